"""What a worker is told to train: task, recipe and data, as small frozen values that travel."""
