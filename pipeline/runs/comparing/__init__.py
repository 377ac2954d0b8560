"""Runs side by side, and what a result was made from: read from MLflow and from receipts, never written."""
