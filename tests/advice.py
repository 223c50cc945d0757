"""The law of advice: what an error message advises is done, and then the rows are read."""

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from test_layouts import contents, read

from jlora.common.errors import UserError
from jlora.data.conversation import ReadOptions

PAIR = [["a?", "b"]]  # the contents of the rows, unless a case says otherwise
SETTINGS = {field.name for field in dataclasses.fields(ReadOptions)}
Steps = Iterator[Callable[[], Any]]  # what leads to the message; and the same after the advice, which gives the rows


class Case(NamedTuple):
    """A message, and what leads to it and out of it."""

    found: str  # a pattern of the message
    advice: str  # words of the message
    steps: Callable[[Path, pytest.MonkeyPatch], Steps]
    gives: Any = PAIR


def case(name, content, found, advice, then, *, gives=PAIR, **settings) -> Case:
    """A file with its settings.

    Args:
      then: what the advice says: the file's new content; or settings; or names of other files with their content.
    """

    def steps(place, patch):
        yield reader(place / "before", {name: content}, settings)
        if isinstance(then, dict) and then.keys() <= SETTINGS | {"sheet"}:
            yield reader(place / "after", {name: content}, settings | then)
        else:
            yield reader(place / "after", then if isinstance(then, dict) else {name: then}, settings)

    return Case(found, advice, steps, gives)


def reader(place, files, settings) -> Callable[[], Any]:
    """Writes files, and returns a function that reads them: the only file, or their directory."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    options = dict(settings)
    sheet = options.pop("sheet", "")
    where = f"{path if len(files) == 1 else place}{sheet and '#'}{sheet}"
    return lambda: contents(read(where, **options)[0])


def follow(case: Case, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Gets the message, does what it advises, and reads the rows."""
    steps = case.steps(place, patch)
    with pytest.raises(UserError, match=f"(?s){case.found}") as caught:
        next(steps)()
    assert case.advice in str(caught.value)
    rows = next(steps)()
    assert rows == case.gives and rows, rows


def sites(files: Iterable[str], functions: Iterable[str] = ()) -> dict[tuple[str, int], str]:
    """Returns the place of every message in these files of jlora, with its code; or of those in some functions."""
    found = {}
    for file in files:
        tree = ast.parse((ROOT / "jlora" / file).read_text())
        parts = [node for node in ast.walk(tree) if getattr(node, "name", "") in functions] if functions else [tree]
        for node in (node for part in parts for node in ast.walk(part)):
            if isinstance(node, ast.Call) and re.fullmatch(r"(User|Template)Error", ast.unparse(node.func)):
                found[str(ROOT / "jlora" / file), node.lineno] = ast.unparse(node)
    return found


def messages(cases: list[Case], place: Path) -> set[tuple[str, int]]:
    """Returns the places of the messages to which the cases lead."""
    met = set()
    for number, one in enumerate(cases):
        made = {}

        def note(error, *words, made=made):
            Exception.__init__(error, *words)
            caller = sys._getframe(1)
            made[caller.f_code.co_filename, caller.f_lineno] = str(words[0])

        with pytest.MonkeyPatch.context() as patch:
            read_rows = next(one.steps(place / str(number), patch))
            patch.setattr(UserError, "__init__", note)
            with pytest.raises(UserError) as caught:
                read_rows()
        met |= {site for site, words in made.items() if words in str(caught.value)}
    return met


def unmet(cases: list[Case], found: dict[tuple[str, int], str], exceptions: dict[str, str], place: Path):
    """Returns the messages to which no case leads, without the exceptions: part of a message -> a reason."""
    met = messages(cases, place)
    left = {site: code for site, code in found.items() if site not in met}
    unused = [part for part in exceptions if not any(part in code for code in left.values())]
    return [*unused, *(code for code in left.values() if not any(part in code for part in exceptions))]
