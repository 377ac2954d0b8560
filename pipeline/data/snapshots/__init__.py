"""Snapshots: pinned listings of a source. What is listed, how labels and splits are read from it, and what earlier parts know."""
