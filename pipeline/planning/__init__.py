"""What a run takes, before anything is held: memory, time, cost, and which layout fits the hardware."""
