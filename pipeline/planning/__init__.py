"""Estimates made before a run starts: memory, time and cost, and which settings fit the hardware."""
