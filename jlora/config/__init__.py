"""The settings of a run: all keys with default and unit, config files, and command-line overrides."""

from jlora.config.schema import Config, default_config

__all__ = ["Config", "default_config"]
