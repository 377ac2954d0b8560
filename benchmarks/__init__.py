"""Benchmarks: `python -m benchmarks.NAME [--quick]` prints a table and, last, one JSON line. Files named `_*.py` are helpers."""
