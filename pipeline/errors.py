"""Errors that a user can act on. Each message names the file or field, its value, and what to do about it."""

from mae_core.errors import ConfigError as ConfigError


class PipelineError(Exception):
    """Base of the failures whose message is meant for the user; commands print it without a traceback."""


class DataError(PipelineError):
    """Images, shards, a manifest or a receipt are not what they must be."""


class StorageError(PipelineError):
    """The object store or the disk refused an operation. The message names location, operation and cause."""


class CheckpointError(PipelineError):
    """No usable checkpoint where one is needed, or one that does not fit the run."""


class Fenced(PipelineError):
    """Another driver has claimed a higher generation of this step. This one stops and never claims again."""


class Stopped(PipelineError):
    """The step was asked to stop and has saved its state. The same command continues from there."""
