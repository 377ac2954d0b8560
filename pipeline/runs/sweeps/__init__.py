"""Several configurations run as one graph: `mae sweep`."""
