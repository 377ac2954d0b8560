"""Thin commands: they parse, call pipeline, print."""
