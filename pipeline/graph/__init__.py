"""The step graph: steps and their fingerprints, receipts of finished steps, and the runner that executes the rest."""
