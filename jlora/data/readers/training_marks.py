"""Marks in rows and turns that say what must not be learned, such as `train: false`, `weight: 0` or `label: false`."""

import math
from collections.abc import Mapping
from typing import Any

from jlora.common.errors import UserError

LEARN = ("train", "trainable", "loss")  # false: do not learn
HIDE = ("mask", "masked")  # true: do not learn; 0 and 1 mean one thing to some programs, the reverse to others
TURN_MARKS = (*LEARN, *HIDE, "weight")  # a weight multiplies the loss on the answer
ROW_MARKS = ("label", *LEARN)  # of a row; KTO's data sets mark a bad answer with label: false


def loss_weight(turn: Mapping[str, Any], where: str) -> float:
    """Returns the weight of the loss on an answer, from the marks of its turn; 0 if it must not be learned.

    Raises:
      UserError: a mark has a value that jlora does not support.
    """
    weight = 1.0
    for key in TURN_MARKS:
        value = turn.get(key)
        if value is None or (key == "loss" and isinstance(value, float)):  # a measured loss is not a mark
            continue
        if key == "weight":
            weight *= _read_weight(value, where)
            continue
        mark = bool(value) if value in (0, 1) and key not in HIDE else _read_mark(value)
        if mark is None:
            raise UserError(f"{where}: A turn has {key}={value!r}. Expected true or false.")
        weight *= mark is not (key in HIDE)
    return weight


def _read_weight(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where}: A turn has weight={value!r}. Expected a number that is 0 or more.")
    return float(value)


def bad_mark(row: Mapping[str, Any]) -> str:
    """Returns the key that marks a whole row as bad; "" if none does."""
    return next((key for key in row if key.strip().lower() in ROW_MARKS and _read_mark(row[key]) is False), "")


def _read_mark(value: Any) -> bool | None:
    """Returns a boolean, or the one that a text names; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None
