"""Errors a person can act on: each message names the file or field, the value, and the way out."""

from mae_core.errors import ConfigError as ConfigError


class PipelineError(Exception):
    """A failure whose message is meant for the person at the terminal; commands print it without a traceback."""


class DataError(PipelineError):
    """The images, shards or manifest are not what they must be."""


class StorageError(PipelineError):
    """The object store or the disk refused: names location, operation and cause."""


class CheckpointError(PipelineError):
    """No usable checkpoint where one is needed, or one that does not fit the run."""


class Fenced(PipelineError):
    """Another driver has claimed a higher generation of this step: this one stops and never claims again."""


class Stopped(PipelineError):
    """The stage was asked to stop, saved what it had, and goes on from there when the same command is run again."""
