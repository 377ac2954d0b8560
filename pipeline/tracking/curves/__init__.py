"""What grows while a step runs: the journal of its metrics, how that reaches MLflow, and what its nodes are doing."""
