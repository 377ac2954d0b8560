"""What a person points `data.source` at: files, their labels and their splits."""
