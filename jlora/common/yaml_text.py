"""Reads YAML that somebody else wrote; every way in which it can be wrong is one error."""

from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document.

    Raises:
      ValueError: the text is not valid YAML, has a date that does not exist, or is nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None
