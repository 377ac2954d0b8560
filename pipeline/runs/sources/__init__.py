"""What a source holds now, against what was listed of it: new snapshots, changes, and data that moved."""
