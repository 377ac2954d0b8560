"""Groups of commands, one file each, named like it: `mae shards ...` is shards.py."""
