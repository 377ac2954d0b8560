"""Evaluation of encoders: one file per protocol in `protocols/`, on shared encoder sources and cached features."""
