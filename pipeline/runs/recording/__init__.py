"""What MLflow is told of a run: what it is called (`naming`), what it did (`results`, `note`), and the calls that say so
(`recorder`)."""
