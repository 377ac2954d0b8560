"""Measurements of where a training's time and memory go."""
