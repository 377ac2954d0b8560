"""Benchmarks: `python -m benchmarks.NAME [--quick]` prints a table, then one JSON line. `_x.py` are helpers."""
