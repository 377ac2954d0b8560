"""Images on their way from the source through the stored dataset to training batches."""
