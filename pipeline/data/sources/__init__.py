"""What `data.source` points at: files, tars and tables, their labels and their splits."""
