"""One pipeline run: its graph, its checks, its walk, and how people find what earlier runs left."""
