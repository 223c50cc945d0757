"""Arbitrary input to every reader: rows or one UserError, never a traceback; and no row is lost silently."""

import csv
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import LAYOUTS, contents

from jlora.common.errors import UserError
from jlora.data.conversation import ReadOptions
from jlora.data.readers import files, json_files
from jlora.data.readers.column_mapping import NO_VALUE

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
ENDINGS = st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ""])
READINGS = st.builds(
    ReadOptions,
    columns=st.sampled_from([{}, {"prompt": "q", "response": "a"}, {"prompt": "1", "response": "2"}, {"rows": "data"}]),
    role_prefixes=st.sampled_from([{}, {"user": "Q|问", "assistant": "A|答|#"}]),
    task_type=st.sampled_from(["text-generation", "plain-text"]),
    bad_rows=st.sampled_from(["error", "drop"]),
)
CHUNKS = st.integers(1, 40) | st.just(json_files.CHUNK)
WORDS = [
    "User: ",
    "律师：",
    "\n\n",
    "---\n",
    '"',
    ",",
    "\t",
    '{"q": "',
    '", "a": "',
    '"}\n',
    "[",
    "]",
    "\0",
    "\\ud800",
    "\r",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<s>[INST] ",
    " [/INST] ",
    "### Question: ",
    "### Answer: ",
    "- **A:** ",
    "**Q:** ",
]
SCRAPS = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=20).map("".join)
KEYS = st.sampled_from(
    "q a input system history messages role content from value text data rows instruction".split()
) | (st.text(max_size=3))
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | SCRAPS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(path, reading):
    """Returns the rows and the logged lines, or the UserError."""
    said = []
    try:
        rows = files.read_conversations(str(path), "train_data_dir", reading, said.append)
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return None, [str(error)]
    assert rows and all(message.content.strip() for row in rows for message in row.messages)
    return rows, said


def file(folder, ending, content):
    path = folder / f"rows{ending}"
    path.write_bytes(content)
    return path


@FUZZ
@given(st.binary(max_size=200), ENDINGS, READINGS)
def test_any_bytes(folder, content, ending, reading):
    outcome(file(folder, ending, content), reading)


@FUZZ
@given(SCRAPS, ENDINGS, READINGS, st.sampled_from(["utf-8", "utf-16", "gb18030"]))
def test_any_scraps(folder, text, ending, reading, encoding):
    outcome(file(folder, ending, text.encode(encoding, "replace")), reading)


@FUZZ
@given(st.lists(VALUES, max_size=4), ENDINGS, READINGS, st.booleans(), CHUNKS)
def test_any_json(folder, values, ending, reading, lines, chunk):
    text = "\n".join(json.dumps(value) for value in values) if lines else json.dumps(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        outcome(file(folder, ending, text.encode()), reading)


@FUZZ
@given(st.sampled_from(sorted(LAYOUTS)), st.data(), READINGS, st.sampled_from(["utf-8", "utf-16", "gb18030"]))
def test_files_with_a_piece_removed_or_added(folder, layout, data, reading, encoding):
    name, content, _ = LAYOUTS[layout]
    whole = content.removeprefix("\ufeff").encode(encoding)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 30)))
    changed = (
        whole[:start]
        + data.draw(st.binary(max_size=8) | SCRAPS.map(lambda s: s.encode(encoding, "replace")))
        + whole[end:]
    )
    outcome(file(folder, name.removeprefix("a"), changed), reading)


def dropped(said):
    """Returns how many rows were reported as dropped, and of how many."""
    counts = [re.match(r"train_data_dir: dropped (\d+) of (\d+) rows? that cannot be used", line) for line in said]
    return next(((int(c[1]), int(c[2])) for c in counts if c), (0, None))


def good(said, ending):
    missing = ending in (".csv", ".tsv", ".parquet") and said.strip() in NO_VALUE
    return said.strip() != "" and "\0" not in said and not missing


def as_csv(pairs, delimiter=","):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(
        [("id", "q", "a"), *((i, *p) for i, p in enumerate(pairs))]
    )
    return out.getvalue()


def as_parquet(pairs):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"q": [q for q, _ in pairs], "a": [a for _, a in pairs]}), out)
    return out.getvalue()


def as_text(pairs):
    return "".join(f"User: {q}\nLawyer: {a}\n\n" for q, a in pairs)


WRITERS = {
    ".jsonl": lambda pairs: "".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in pairs),
    ".json": lambda pairs: json.dumps({"data": [{"q": q, "a": a} for q, a in pairs]}, indent=1),
    ".csv": as_csv,
    ".tsv": lambda pairs: as_csv(pairs, "\t"),
    ".parquet": as_parquet,
}


def as_arrow(writer):
    table, out = (
        pyarrow.table({"q": ["a?"] * 5, "a": ["b" * 40] * 5, "list": [[1], [], None, [2, 3], []]}),
        io.BytesIO(),
    )
    with writer(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return out.getvalue()


COLUMNAR = [as_parquet([("a?", "b" * 40)] * 5), *map(as_arrow, (pyarrow.ipc.new_stream, pyarrow.ipc.new_file))]


@FUZZ
@given(st.sampled_from(COLUMNAR), st.data())
def test_parquet_and_arrow_with_bytes_changed(folder, whole, data):
    content = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    outcome(file(folder, ".data", bytes(content[: data.draw(st.integers(0, len(content)))] or content)), ReadOptions())


@FUZZ
@given(
    st.sampled_from(sorted(WRITERS)),
    st.lists(st.tuples(st.just("") | st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=6),
    CHUNKS,
)
def test_every_row_is_used_or_reported(folder, ending, pairs, chunk):
    content = WRITERS[ending](pairs)
    path = file(folder, ending, content if isinstance(content, bytes) else content.encode())
    kept = [[q.strip(), a.strip()] for q, a in pairs if good(q, ending) and good(a, ending)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        rows, said = outcome(path, ReadOptions(bad_rows="drop"))
        assert (rows is None) == (not kept)
        if not kept:
            return
        if ending in (".csv", ".tsv"):  # any newline is read as \n
            kept = [[re.sub("\r\n?", "\n", said) for said in pair] for pair in kept]
        assert contents(rows) == kept
        bad = len(pairs) - len(kept)
        assert dropped(said) == (bad, len(pairs) if bad else None)
        refused, message = outcome(path, ReadOptions())
        assert (refused is None) == (bad > 0) and (bad < 2 or f": {bad} of {len(pairs)} rows" in message[0])


LINE = st.from_regex(r"[a-z一-龥 ,.?]{0,8}", fullmatch=True)


@FUZZ
@given(st.lists(st.lists(LINE, min_size=2, max_size=6), min_size=1, max_size=5))
def test_every_text_row_is_used_or_reported(folder, rows):
    text = "".join(
        "".join(f"{('User', 'Lawyer')[i % 2]}: {line}\n" for i, line in enumerate(turns)) + "\n" for turns in rows
    )
    kept = [[line.strip() for line in turns] for turns in rows if len(turns) % 2 == 0 and all(map(str.strip, turns))]
    got, said = outcome(file(folder, ".txt", text.encode()), ReadOptions(bad_rows="drop"))
    if len(rows) == 1 and len(rows[0]) > 2:  # without a blank line, each question is a row
        pairs = list(zip(rows[0][::2], rows[0][1::2], strict=False))
        kept = [[q.strip(), a.strip()] for q, a in pairs if q.strip() and a.strip()]
    assert (contents(got) if got else []) == kept
    if got and len(rows) > 1:
        bad = len(rows) - len(kept)
        assert dropped(said) == (bad, len(rows) if bad else None)
