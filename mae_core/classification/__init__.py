"""From features to classes: heads, probes and accuracy."""
