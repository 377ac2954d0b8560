"""How weights are updated: parameter groups, learning-rate schedules and LARS."""
