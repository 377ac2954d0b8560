"""What a training does with its time and memory."""
