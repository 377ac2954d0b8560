"""Steps, fingerprints, receipts and the runner: what is done, what is missing, who may write."""
