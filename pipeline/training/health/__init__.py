"""What can go wrong while training, and what is done about it."""
