"""The one error of mae_core: a configuration that cannot work, answered with the value and the way out."""


class ConfigError(ValueError):
    """A field holds a value that cannot work; the message names field, value and what to write instead."""
