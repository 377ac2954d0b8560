"""From stored shards to training batches: selection, order, cache, decoding, and substitutes for unreadable images."""
