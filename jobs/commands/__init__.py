"""The commands of `mae`: one file per command or group of commands, named like it."""
