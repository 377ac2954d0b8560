"""Checkpoints: their format, how they are saved beside training, which are kept, and where a training resumes."""
