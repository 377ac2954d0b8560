"""Runs side by side: the values, the tables of the terminal, and one page that needs no network."""
