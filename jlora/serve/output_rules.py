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


def filtered(pieces: Iterable[str], rules: Rules) -> Iterator[str]:
    """Yields an answer with the rules applied; the result does not depend on how the answer is cut into pieces.

    Rules that replace see one line at a time, so a line is passed on when it is complete. Rules that refuse see the
    whole answer, so if there is one, nothing is passed on before the end.
    """
    refusing = [rule for rule in rules if rule.refuses]
    if refusing:
        whole = "".join(pieces)
        first = next((rule for rule in refusing if rule.pattern.found_in(whole)), None)
        pieces = [whole if first is None else first.replacement]
        rules = rules if first is None else ()
    replacing = [rule for rule in rules if not rule.refuses]
    if not replacing:
        yield from pieces
        return
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield _replace(line, replacing) + "\n"
    yield _replace(rest, replacing)


def _replace(line: str, rules: Iterable[Rule]) -> str:
    for rule in rules:
        line = rule.pattern.replaced(line, rule.replacement)
    return line
