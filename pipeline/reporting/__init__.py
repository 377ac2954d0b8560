"""What people see of a run: progress and tables in the terminal, figures, and the HTML page. Nothing is computed here."""
