"""From a score back to the source, and from a file to the scores that depend on it. Receipts are read, nothing is written."""
