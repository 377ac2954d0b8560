"""A dataset in the store: shards, their manifest, duplicates, and the checks that read it back."""
