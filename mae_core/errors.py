"""The one error that mae_core defines: a configuration that cannot work."""


class ConfigError(ValueError):
    """A field holds a value that cannot work. The message names the field, its value and what to write instead."""
