"""Checkpoints: their format, how they are saved while training goes on, which are kept, and where a training resumes."""
