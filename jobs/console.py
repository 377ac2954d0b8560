"""What a person sees when something is wrong: one line on standard error, and the exit code."""

import sys

from pipeline.errors import ConfigError, DataError, PipelineError


def explain(error: Exception) -> int:
    """Prints a person's error as one message and returns its exit code; anything else is a bug and is raised."""
    if not isinstance(error, ConfigError | PipelineError):
        raise error
    print(f"mae: {error}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError | DataError) else 1
