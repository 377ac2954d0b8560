"""Everything that touches the world: storage, Ray, MLflow, DeepSpeed, and the stages built on them."""
