"""The training loop, its periodic actions, and what it scores at the end."""
