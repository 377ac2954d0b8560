"""The single commands of `mae`, one file each, named like it."""
