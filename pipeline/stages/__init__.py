"""One file a stage; each a plain function. Stages never import stages."""
