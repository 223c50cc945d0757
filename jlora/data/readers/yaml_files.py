"""Reads YAML files: a list of rows, of turns, or of pairs of texts; or an object that holds the list under one key."""

import contextlib
from collections.abc import Iterator
from typing import Any

import yaml

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.common.yaml_text import parse_yaml
from jlora.data.conversation import MAX_ROW, ReaderNotes, ReadOptions
from jlora.data.readers.column_mapping import NAMES, makes_row
from jlora.data.readers.json_files import Row
from jlora.data.readers.source import Source
from jlora.data.readers.training_marks import TURN_MARKS

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FIX = "Correct it, or put quotes around the text there."  # for YAML that is not valid
DEEPEST, MOST_ALIASED = 100, 1_000_000  # lists within lists; values that aliases repeat
TAG = "tag:yaml.org,2002:"
TAGS = {f"{TAG}{name}" for name in "str int float bool null timestamp map seq value".split()}


def read_yaml(file: Source, encoding: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Yields the rows of a YAML file, each with its `file:line`; an unusable one is yielded as its UserError.

    Values are text as written, so `Yes`, `1.0` and `2024-01-01` are words; only an empty value or `null` is none.

    Raises:
      UserError: the file is not valid YAML, is too large, or has rows in more than one place.
    """
    with file.open(encoding=encoding) as stream:
        text = stream.read(MAX_ROW + 1)
    if len(text) > MAX_ROW:
        raise UserError(f"{file}: The file is longer than {MAX_ROW:,} characters. Save the rows as JSON lines.")
    try:
        _check_limits(file, text)
        for document in yaml.compose_all(text, Loader=LOADER):
            for node in _row_nodes(file, document, options, notes):
                try:
                    yield _place(file, node), _row(file, node)
                except UserError as error:
                    yield _place(file, node), error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UserError(f"{file}:{line + 1}: Not valid YAML: {reason}. {FIX}") from None


def _check_limits(file: Source, text: str) -> None:
    """Raises a UserError if the file is too deeply nested, or if its aliases repeat too much or contain themselves."""
    sizes: dict[str, int] = {}  # of the value of each anchor
    open_values: list[tuple[str | None, int]] = []  # the anchor of each open list or object, and its size so far
    aliased = 0
    event: Any
    for event in yaml.parse(text, Loader=LOADER):
        where = f"{file}:{event.start_mark.line + 1}"
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{where}: Not valid YAML: no complete value precedes the alias *{event.anchor}. {FIX}")
            size = sizes[event.anchor]
            aliased += size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_values.append((anchor, 1))
            if len(open_values) > DEEPEST:
                raise UserError(f"{where}: Not valid YAML: too deeply nested. {FIX}")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_values.pop()
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        if open_values:
            open_values[-1] = (open_values[-1][0], open_values[-1][1] + size)
        if aliased > MOST_ALIASED:
            raise UserError(f"{where}: The aliases repeat more than {MOST_ALIASED:,} values. Write the rows out.")


def _row_nodes(file: Source, document: yaml.Node, options: ReadOptions, notes: ReaderNotes) -> Iterator[yaml.Node]:
    """Yields the nodes of the rows of a document."""
    wanted = options.columns.get("rows", "")
    if isinstance(document, yaml.MappingNode) and (wanted or not _is_row(document, options)):
        lists = dict(_lists_of_rows(document, ""))
        found = [name for name in lists if name == wanted or not wanted]
        if wanted and not found:
            raise UserError(
                f"{file}: The key columns sets rows to {wanted!r}, but no list of rows has that key. Correct it."
            )
        if len(found) > 1:
            advice = f'Set columns={{"rows": "{found[1]}"}}, or split the file.'
            raise UserError(f"{_place(file, lists[found[1]])}: Both {found[0]} and {found[1]} hold rows. {advice}")
        for key, value in document.value if found else ():
            if value is not lists[found[0]]:
                notes.add("unused keys", str(key.value))
        document = lists[found[0]] if found else document
    if isinstance(document, yaml.SequenceNode):
        yield from document.value
    else:
        yield document


def _is_row(document: yaml.MappingNode, options: ReadOptions) -> bool:
    """Returns whether an object's own keys make a row; not if it holds lists of lists, which are conversations."""
    of_lists = any(
        isinstance(inner, yaml.SequenceNode)
        for key, value in document.value
        if isinstance(value, yaml.SequenceNode) and str(key.value).lower() in NAMES["messages"]
        for inner in value.value
    )
    return not of_lists and makes_row([str(key.value) for key, _ in document.value], options)


def _lists_of_rows(mapping: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.SequenceNode]]:
    for key, value in mapping.value:
        if isinstance(value, yaml.MappingNode):
            yield from _lists_of_rows(value, f"{path}{key.value}.")
        elif isinstance(value, yaml.SequenceNode) and any(isinstance(v, yaml.CollectionNode) for v in value.value):
            yield f"{path}{key.value}", value


def _row(file: Source, node: yaml.Node) -> Any:
    """Returns the row of an object, a list of turns, or a list of a question and an answer."""
    if isinstance(node, yaml.MappingNode):
        return _value(file, node)
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{_place(file, node)}: Expected keys such as question and answer, got {node.value[:60]!r}.")
    turns = [_value(file, inner) for inner in node.value]
    if turns and all(isinstance(turn, dict) for turn in turns):
        return {"messages": turns}
    if not all(isinstance(turn, str | None) for turn in turns):
        raise UserError(f"{_place(file, node)}: Expected a list of texts. Put quotes around a text that contains ': '.")
    if len(turns) != 2:
        raise UserError(
            f"{_place(file, node)}: Expected a question and an answer, got {plural(len(turns), 'text')}. Of several "
            "answers, write each with the question as a list of its own; of a dialogue, write each turn with `role`, "
            "user or assistant, and `content`."
        )
    return {"messages": [{"role": r, "content": t or ""} for r, t in zip(("user", "assistant"), turns, strict=True)]}


def _value(file: Source, node: yaml.Node, key: str = "") -> Any:
    """Returns the value of a node; marks, which may be numbers, as what they are, and other values as text."""
    if node.tag not in TAGS:
        raise UserError(
            f"{_place(file, node)}: The YAML tag {node.tag.removeprefix(TAG)!r} is not supported. Remove it."
        )
    if isinstance(node, yaml.SequenceNode):
        return [_value(file, inner) for inner in node.value]
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{TAG}null":
            return None
        if key in TURN_MARKS and not node.style:
            with contextlib.suppress(ValueError):
                return parse_yaml(node.value)
        return node.value
    values: dict[str, Any] = {}
    for name, inner in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.tag not in TAGS:
            raise UserError(
                f"{_place(file, name)}: Expected a text as the key, not a list, an object or `<<`. Write the keys out."
            )
        if name.value in values:
            raise UserError(f"{_place(file, name)}: Not valid YAML: duplicate key {name.value!r}. Remove one.")
        values[name.value] = _value(file, inner, name.value)
    return values


def _place(file: Source, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"
