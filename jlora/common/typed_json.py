"""Reads JSON files and fields that somebody else wrote: each value is checked by pydantic before it is used."""

import json
from pathlib import Path
from typing import Annotated, Any

import pydantic

from jlora.common.errors import UserError

LARGEST = 64 * 2**20  # bytes; a config is never larger


STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class Strict(pydantic.BaseModel):
    """A schema whose numbers are numbers and finite, whose booleans are booleans; keys that it lacks are ignored."""

    model_config = pydantic.ConfigDict(**STRICT, frozen=True)


def whole(value: Any) -> Any:
    """Returns 32 for 32.0, and other values unchanged: some programs write whole numbers so, others cannot read it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, pydantic.BeforeValidator(whole)]
Size = Annotated[Whole, pydantic.Field(gt=0, le=10**8)]
Layers = Annotated[Whole, pydantic.Field(gt=0, le=1000)]
Count = Annotated[Whole, pydantic.Field(ge=0)]


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size / 2**20:.0f} MiB, expected at most {LARGEST >> 20}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is {_shown(value)}, expected a JSON object.")
    return value


def parse(schema: type[Any], values: dict[str, Any]) -> tuple[Any, list[str]]:
    """Returns the schema's object, or None and a description of each value that does not fit it.

    Args:
      schema: a pydantic model or dataclass; it ignores keys that it lacks.
    """
    try:
        return schema(**{key: values[key] for key in schema.__pydantic_fields__ if key in values}), []
    except pydantic.ValidationError as error:
        wishes: dict[Any, list[str]] = {}
        for entry in error.errors(include_url=False):
            wishes.setdefault(entry["loc"][:1], []).append(_expected(entry))
        return None, [_described(loc, list(dict.fromkeys(wish)), values) for loc, wish in wishes.items()]


def mismatches(types: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Describes each value that does not have the type of its key; ignores keys that lack a type or a value."""
    found = []
    for key in types.keys() & values.keys():
        try:
            pydantic.TypeAdapter(types[key], config=STRICT).validate_python(values[key])
        except pydantic.ValidationError as error:
            wish = list(dict.fromkeys(map(_expected, error.errors(include_url=False))))
            found.append(_described((key,), wish[:1], values))
    return sorted(found)


def _expected(error: Any) -> str:
    """Returns what pydantic expected, such as "greater than 0"; "" if the key is missing."""
    if error["type"] == "missing":
        return ""
    text = error["msg"]
    for opening in ("Value error, ", "Input should be ", "a valid "):
        text = text.removeprefix(opening)
    return text.replace("None", "null")


def _described(loc: tuple[str, ...], wishes: list[str], values: dict[str, Any]) -> str:
    """Describes a value that does not fit, such as "r=-1 (expected greater than 0)"."""
    if not loc:  # a check of several keys has its own words
        return "; ".join(wishes)
    return (
        f"{loc[0]}={_shown(values[loc[0]])} (expected {' or '.join(wishes)})" if wishes[0] else f"{loc[0]} is missing"
    )


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
