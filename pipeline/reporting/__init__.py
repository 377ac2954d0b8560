"""Figures, reconstructions and the page of a run."""
