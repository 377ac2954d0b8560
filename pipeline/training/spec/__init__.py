"""The specification of a training: task, recipe and data, as small frozen values that travel to the workers."""
