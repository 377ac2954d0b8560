"""Errors that a user can act on. Each message names the file or field, its value, and what to do about it."""

from mae_core.errors import ConfigError as ConfigError


class PipelineError(Exception):
    """Base of the failures whose message is meant for the user; commands print it without a traceback."""


class DataError(PipelineError):
    """Images, shards, a manifest or a receipt are not what they must be."""


class StorageError(PipelineError):
    """The object store or the disk refused an operation. The message names location, operation and cause."""


class TrackingError(PipelineError):
    """MLflow's server or database cannot be reached, or refuses.

    Once `check_tracking` has passed, callers log this error as a warning instead of failing the run."""


class WrongAddress(PipelineError):
    """An address, or a setting that says how to reach it, cannot be right. It is the person's input: commands exit with 2."""


class WrongStoreAddress(StorageError, WrongAddress):
    """A store's address or an AWS setting cannot be right."""


class WrongTrackingAddress(TrackingError, WrongAddress):
    """MLflow's address cannot be right."""


class CheckpointError(PipelineError):
    """No usable checkpoint where one is needed, or one that does not fit the run."""


class Fenced(PipelineError):
    """Another driver has claimed a higher generation of this step. This one stops and never claims again."""


class Stopped(PipelineError):
    """The step was asked to stop and has saved its state. The same command continues from there."""
