"""The optimiser of all workers together: DeepSpeed ZeRO behind a small interface."""
