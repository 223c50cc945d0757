"""The settings of a run: every key, its default and unit; config files and command-line overrides."""

from jlora.config.schema import Config, default_config

__all__ = ["Config", "default_config"]
