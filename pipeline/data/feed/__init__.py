"""What training reads: the order of samples, the node's shard cache, and batches."""
