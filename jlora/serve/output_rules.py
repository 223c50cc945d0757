"""What must not be said: a small YAML file of patterns, and answers without them, streamed or whole.

- replace: '[0-9]{17}[0-9Xx]'
  with: '[ID number]'
- refuse: '(?i)guaranteed to win'
  say: I cannot promise how a case ends.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from jlora.common.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One pattern (Python's `re`) and the text that is said instead."""

    pattern: re.Pattern[str]
    instead: str  # as it stands: no group references
    refuses: bool  # it stands for the whole answer, not for the match


Rules = tuple[Rule, ...]


def read_rules(path: Path) -> Rules:
    """The rules of a file.

    Raises:
      UserError: it cannot be read, or entries are not rules; all of them at once.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--output_rules {path} cannot be read: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--output_rules {path}: expected a list of rules, as `- replace: PATTERN` and `  with: TEXT`")
    rules, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_read_rule(entry))
        except (ValueError, re.error) as error:
            problems.append(f"rule {number}: {error}")
    if problems:
        raise UserError("\n  ".join([f"--output_rules {path} needs {len(problems)} change(s):", *problems]))
    return tuple(rules)


def _read_rule(entry: object) -> Rule:
    kinds = {("refuse", "say"): True, ("replace", "with"): False}
    for (key, other), refuses in kinds.items():
        if isinstance(entry, dict) and entry.keys() == {key, other}:
            pattern, instead = entry[key], entry[other]
            if not (isinstance(pattern, str) and isinstance(instead, str)):
                raise ValueError(f"{key} and {other}: expected texts in quotes, got {pattern!r} and {instead!r}")
            if re.search(pattern, ""):
                raise ValueError(f"{key}: {pattern!r} matches where there is nothing")
            return Rule(re.compile(pattern), instead, refuses)
    raise ValueError(f"expected `refuse` and `say`, or `replace` and `with`, got {entry!r}")


def filtered(pieces: Iterable[str], rules: Rules) -> Iterator[str]:
    """An answer as it grows, with the rules applied; however it is cut into pieces, the same is said.

    A rule that replaces sees one line at a time, and a line is passed on when it is whole. A rule that refuses sees the
    whole answer, so where there is one, nothing is passed on before the end.
    """
    refusing = [rule for rule in rules if rule.refuses]
    if refusing:
        whole = "".join(pieces)
        first = next((rule for rule in refusing if rule.pattern.search(whole)), None)
        pieces = [whole if first is None else first.instead]
        rules = rules if first is None else ()
    replacing = [rule for rule in rules if not rule.refuses]
    if not replacing:
        yield from pieces
        return
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield _replaced(line, replacing) + "\n"
    yield _replaced(rest, replacing)


def _replaced(line: str, rules: Iterable[Rule]) -> str:
    for rule in rules:
        line = rule.pattern.sub(lambda _, instead=rule.instead: instead, line)  # type: ignore[misc]
    return line
