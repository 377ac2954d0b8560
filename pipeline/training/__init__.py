"""One training loop, its engine, its checkpoints, and how Ray Train starts it."""
