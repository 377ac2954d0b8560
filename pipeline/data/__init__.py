"""From files to batches: snapshot, shards, manifest, order, decode, loader."""
