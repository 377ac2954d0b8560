"""The `mae` command: its entry point, what all commands share, and the demo. The commands are in commands/."""
