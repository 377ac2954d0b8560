"""The engine: training steps over all workers, with DeepSpeed ZeRO behind a small interface."""
