"""A stored dataset: shards, their manifest, and what is known about both."""
