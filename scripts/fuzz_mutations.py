"""Mutations of files for `fuzz.py`: of their structure, if they are JSON or YAML, and of their bytes."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

# Values that readers get wrong.
ODD: list[Any] = [None, True, False, 0, -1, 1, 3.5, 8.0, 1e10, 1e308, 10**30, float("nan"), float("inf"), "", "8", "x"]
ODD += [
    [],
    {},
    [None],
    {"": None},
    "\x1b[2J",
    "\ud800",
    "((.|..)+)+[A-Z]",
    "(" * 500,
    "../../x",
    "/etc/passwd",
    [[[[]]]],
]
SCRAPS = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"{{",
    b"{%",
    b"%}",
]
SCRAPS += [
    b"User: ",
    b"&a [*a, *a]",
    b"!!python/object:os.system",
    b"- ",
    b": ",
    b"[" * 3000,
    b"{% for i in range(9999) %}",
]
SCRAPS += [b"{{ messages * 10 ** 9 }}", b"99999999999999999999", b"\x1b]0;x\x07", b"1e999", b"0x10"]


def mutated_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with some of its bytes flipped, cut, repeated, or with scraps put in."""
    where = st.integers(0, len(content))
    change = st.one_of(
        st.tuples(st.just("flip"), where, st.integers(1, 255)),
        st.tuples(st.just("cut"), where, st.integers(1, 40)),
        st.tuples(st.just("end"), where, st.just(0)),
        st.tuples(st.just("again"), where, st.integers(1, 200)),
        st.tuples(st.just("scrap"), where, st.sampled_from(SCRAPS)),
    )

    def apply(changes: list[Any]) -> bytes:
        now = content
        for kind, at, value in changes:
            if kind == "flip" and at < len(now):
                now = now[:at] + bytes([now[at] ^ value]) + now[at + 1 :]
            elif kind == "cut":
                now = now[:at] + now[at + value :]
            elif kind == "end":
                now = now[:at]
            elif kind == "again":
                now = now[:at] + now[at : at + value] + now[at:]
            elif kind == "scrap":
                now = now[:at] + value + now[at:]
        return now

    return st.lists(change, min_size=1, max_size=4).map(apply)


def mutated_tree(tree: Any) -> st.SearchStrategy[Any]:
    """A JSON value of which some parts are replaced, removed or added."""
    values = st.sampled_from(ODD) | st.text(max_size=5) | st.integers() | st.floats()
    values |= st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3)

    def replaced(node: Any, path: list[int], value: Any, how: str) -> Any:
        if not path or not isinstance(node, dict | list) or not node:
            return value
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[path[0] % len(keys)]
        copy = dict(node) if isinstance(node, dict) else list(node)
        if how == "remove" and len(path) == 1:
            del copy[key]
        elif how == "add" and len(path) == 1:
            copy = {**copy, "added": value} if isinstance(copy, dict) else [*copy, value]
        else:
            copy[key] = replaced(node[key], path[1:], value, how)
        return copy

    def apply(changes: list[Any]) -> Any:
        now = tree
        for path, value, how in changes:
            now = replaced(now, path, value, how)
        return now

    paths = st.lists(st.integers(0, 40), min_size=1, max_size=4)
    change = st.tuples(paths, values, st.sampled_from(["replace", "replace", "remove", "add"]))
    return st.lists(change, min_size=1, max_size=3).map(apply)


def mutated_json(file: Path) -> st.SearchStrategy[bytes]:
    """A JSON file with another tree, or other bytes."""
    content = file.read_bytes()
    trees = mutated_tree(json.loads(content)).map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass"))
    return trees | mutated_bytes(content)


def mutated_yaml(file: Path) -> st.SearchStrategy[bytes]:
    """A YAML file with another tree, or other bytes."""
    content = file.read_bytes()
    trees = mutated_tree(yaml.safe_load(content)).map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass"))
    return trees | mutated_bytes(content)


def mutated_file(file: Path) -> st.SearchStrategy[bytes]:
    """Any file with other bytes; those of a header more often."""
    content = file.read_bytes()
    head = content[:2000]
    return mutated_bytes(content) | mutated_bytes(head).map(lambda new: new + content[2000:])


def mutated_any(file: Path) -> st.SearchStrategy[bytes]:
    """A JSON file with another tree or other bytes, or any other file with other bytes."""
    return mutated_json(file) if file.suffix == ".json" else mutated_file(file)


def mutated_zip(file: Path) -> st.SearchStrategy[bytes]:
    """A zip archive in which one member has other bytes, or an archive with other bytes."""
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def zipped(change: tuple[str, bytes]) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in {**members, change[0]: change[1]}.items():
                archive.writestr(zipfile.ZipInfo(name), text)
        return made.getvalue()

    changed = st.sampled_from(sorted(members)).flatmap(
        lambda name: st.tuples(st.just(name), mutated_bytes(members[name]))
    )
    return changed.map(zipped) | mutated_bytes(content)


def mutated_gzip(file: Path) -> st.SearchStrategy[bytes]:
    """A gzip file with other bytes inside, or outside."""
    content = file.read_bytes()
    return mutated_bytes(gzip.decompress(content)).map(gzip.compress) | mutated_bytes(content)
