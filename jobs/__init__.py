"""The `mae` commands, one file per command or command group, named like it. They parse, call pipeline and print."""
