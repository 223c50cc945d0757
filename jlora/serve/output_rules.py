"""Output rules: a small YAML file of patterns that are replaced in answers, or for which an answer is refused.

- replace: '[0-9]{17}[0-9Xx]'
  with: '[ID number]'
- refuse: '(?i)guaranteed to win'
  say: I cannot promise how a case ends.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jlora.common.errors import UserError
from jlora.common.patterns import Pattern
from jlora.common.plural import plural
from jlora.common.yaml_text import parse_yaml


@dataclass(frozen=True)
class Rule:
    """One pattern and its replacement."""

    pattern: Pattern
    replacement: str  # literal: no group references
    refuses: bool  # the replacement replaces the whole answer, not only the match


Rules = tuple[Rule, ...]


def read_rules(path: Path) -> Rules:
    """Reads a file of rules.

    Raises:
      UserError: the file cannot be read, or it contains invalid rules; all of them are listed.
    """
    try:
        entries = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--output_rules {path} cannot be read: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"--output_rules {path}: Expected a list of rules like `- replace: PATTERN` and `  with: TEXT`."
        )
    rules, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_read_rule(entry))
        except (ValueError, UserError) as error:
            problems.append(f"Rule {number}: {error}")
    if problems:
        found = plural(len(problems), "invalid rule")
        raise UserError("\n  ".join([f"--output_rules {path} contains {found}:", *problems]))
    return tuple(rules)


def _read_rule(entry: object) -> Rule:
    kinds = {("refuse", "say"): True, ("replace", "with"): False}
    for (key, other), refuses in kinds.items():
        if isinstance(entry, dict) and entry.keys() == {key, other}:
            pattern, replacement = entry[key], entry[other]
            if not (isinstance(pattern, str) and isinstance(replacement, str)):
                raise ValueError(f"Expected strings in quotes for {key} and {other}, found {entry!r}.")
            compiled = Pattern(pattern)
            if compiled.found_in(""):
                raise ValueError(f"{key}={pattern!r} matches the empty string.")
            return Rule(compiled, replacement, refuses)
    raise ValueError(f"Expected `refuse` and `say`, or `replace` and `with`, found {entry!r}.")


class Filter:
    """Applies rules to an answer that arrives in pieces; the result does not depend on how it is cut.

    Rules that replace see one line at a time, so a line is passed on when it is complete. Rules that refuse see the
    whole answer, so if there is one, nothing is passed on before the end.
    """

    def __init__(self, rules: Rules) -> None:
        self._refusing = [rule for rule in rules if rule.refuses]
        self._replacing = [rule for rule in rules if not rule.refuses]
        self._rest = ""

    def push(self, piece: str) -> str:
        """Adds a piece of the answer, and returns what can be passed on."""
        self._rest += piece
        if self._refusing:
            return ""
        if not self._replacing:
            passed, self._rest = self._rest, ""
            return passed
        *lines, self._rest = self._rest.split("\n")
        return "".join(f"{_replace(line, self._replacing)}\n" for line in lines)

    def close(self) -> str:
        """Returns the rest of the answer."""
        refused = next((rule.replacement for rule in self._refusing if rule.pattern.found_in(self._rest)), None)
        if refused is not None:
            return refused
        return "\n".join(_replace(line, self._replacing) for line in self._rest.split("\n"))


def filtered(pieces: Iterable[str], rules: Rules) -> Iterator[str]:
    """Yields an answer with the rules applied, in pieces that are passed on as soon as they are final."""
    passing = Filter(rules)
    for piece in pieces:
        if text := passing.push(piece):
            yield text
    if text := passing.close():
        yield text


def _replace(line: str, rules: Iterable[Rule]) -> str:
    for rule in rules:
        line = rule.pattern.replaced(line, rule.replacement)
    return line
