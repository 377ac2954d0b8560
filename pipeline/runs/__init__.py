"""Pipeline runs: the graph of one, its checks and execution; and what earlier runs left: datasets, pretrainings, garbage."""
