"""The documents: every command parses, every key, link and file exists, and the English is plain.

`scripts/run_docs.py` runs the commands; here is what is cheap enough for every run.
"""

import argparse
import ast
import dataclasses
import importlib
import io
import re
import shlex
import sys
import tokenize

import pytest
from conftest import ROOT

from jlora.cli.program import COMMANDS
from jlora.cli.sweep import split_words
from jlora.config.files import load_config
from jlora.config.schema import Config
from jlora.sweep.grid import read_grid

sys.path.insert(0, str(ROOT / "scripts"))
from run_docs import blocks, pages

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
PROSE = {name: re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S) for name, page in PAGES.items()}
SPANS = [(name, span) for name, text in PROSE.items() for span in re.findall(r"`([^`\n]+)`", text)]
KEYS = {field.name for field in dataclasses.fields(Config)}
TAKES_CONFIG = {"train", "data", "plan", "sweep"}
SETTINGS = r"^\| to\b[^|\n]*\| set \|\n\|---\|---\|\n((?:\|.*\n)+)"
NOT_KEYS = {"law", "brief"}  # names of adapters in the examples
COLUMNS = set(
    "prompt response messages text context system history reasoning tools rows file".split()
)  # what `columns` may name
# Old habits of this project's English, each hardly ever right in a technical text. Add what comes up in review.
STIFF = [
    r"\w\(s\)",  # "3 row(s)"
    r"(^|[.!?] )What (is|was|are|were|cannot|can|follows|it|one|jlora|all|each|does|stands|becomes)\b[^?\n]*\.( |$)",
    r"\bwhat (cannot|follows|is|was|are)\b[^?\n,.:;]*\b(is|are|was) (named|refused|asked for)\b",
    r"\b(is|are|was|were) said\b(?! to\b)",
    r"\bstands?\b(?! for\b|-in)",
    r"\blies?\b",
    r"\bleads nowhere\b",
    r"\bto be had\b",
    r"\bsays? nothing of\b|\bnothing of (it|this)\b",
    r"\b(of old|at hand|anew|whosoever\w*|and kin|in words)\b",
    r"\bgo(es)? on all the same\b",
    r"\bmend(s|ed)?\b",
    r"\bknown are\b|\bthere (is|are) (for|of)\b",
    r"\bheld against\b",
    r"\bas \w+ has it\b|\bwhat (it|they) likes?\b",
    r"\b(is|are) to (be changed|change|stay|start|run)\b",
    r"\bas DESIGN says\b|\bthe seed's\b|\bthe user fixed\b",
    r"\bthe base's\b|\bthe base at hand\b",  # the base model
    r"\b(the latter|the former|so many \w+|with the way out|the other way:|as it stands)\b",
    r"\b(broke|breaks) down\b|\bbeside others\b|\btakes? (\w+ ){1,2}away\b",
    r"\bwhole or not at all\b|\bcompiles nothing\b|\bnothing behind\b|\bleft zero\b",
    r"\b(misshapen|surplus)\b",
    r"\bwhat was \w+ stays\b|\bthat there (is|are)\b[,.;]",
    r"\b(is|are) (that|those) of (old|them)\b|\bits own of\b",
    r"\bwhich is no \w+|\bthat is no \w+|\bso no \w+ of\b",  # "a directory that is no adapter"
    r"\b(colours?|coloured|neighbours?|neighbouring|behaviours?|labour|dialled)\b",  # American spelling
    r"\b(de)?(quanti|recogni|initiali|stabili|normali|optimi|organi|seriali|summari)s(e[sd]?|ing|ation)\b(?!\.py)",
]


def commands():
    """Every jlora command in the documents: its place, the command's name, and its arguments."""
    for page in PAGES.values():
        for block in blocks(page):
            if block.language != "sh":
                continue
            for line in block.text.splitlines():
                for part in re.split(r" && | & ?$|; ", line):
                    words = shlex.split(part, comments=True)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        del words[0]
                    name, *arguments = words or [""]
                    if name.endswith("python") and arguments[:1] == ["-m"]:
                        name, *arguments = arguments[1:]
                    if name == "jlora" and arguments:
                        name, *arguments = arguments
                    elif name.startswith("jlora."):
                        name = name.removeprefix("jlora.")
                    else:
                        continue
                    yield pytest.param(name, arguments, id=f"{block.page}:{block.line}-{name}")


class ParsedError(Exception):
    """The command line parsed; the arguments that the parser left over."""


@pytest.mark.parametrize(("name", "arguments"), list(commands()))
def test_commands_parse(name, arguments, monkeypatch):
    if name == "--help":
        return
    assert name in COMMANDS
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None):
        raise ParsedError(*parse(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(ParsedError) as parsed:
        importlib.import_module(f"jlora.cli.{name}").main(arguments)
    known, left = parsed.value.args
    if name in TAKES_CONFIG:
        monkeypatch.chdir(ROOT)
        varied, others = split_words(left)
        assert not varied or name == "sweep"
        config = load_config(known.config, others)  # an unknown key or a wrong value is an error
        if name == "sweep":
            groups = {"groups": known.groups} if known.groups else {}
            read_grid(dataclasses.replace(config, sweep={**varied, **groups}))
    else:
        assert not left


def test_keys_exist():
    wrong = [
        f"{page}: `{span}`"
        for page, span in SPANS
        for key in re.findall(r"^([a-z]\w*)=", span)
        if key not in KEYS | NOT_KEYS
    ]
    assert not wrong


def test_keys_in_tables_of_settings_exist():
    """In a table with the columns "to" and "set", the second one names keys."""
    tables = [(page, table) for page, text in PROSE.items() for table in re.findall(SETTINGS, text, re.M)]
    assert len(tables) > 3
    wrong = [
        f"{page}: `{span}`"
        for page, table in tables
        for row in table.splitlines()
        for span in re.findall(r"`([a-z]\w*)`", row.split(" | ", 1)[1])
        if span not in KEYS | COLUMNS
    ]
    assert not wrong


def test_links_and_files_exist():
    wrong = []
    for name, text in PROSE.items():
        links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
        wrong += [f"{name}: {link}" for link in links if not (PAGES[name].parent / link).exists()]
    paths = re.compile(r"(?<![\w./-])(?:jlora|scripts|configs|tests|docs|data|\.ci)/[\w./-]+")
    wrong += [f"{name}: {path}" for name, span in SPANS for path in paths.findall(span) if not (ROOT / path).exists()]
    for name, page in PAGES.items():
        commands = "\n".join(block.text for block in blocks(page) if block.language in ("sh", "python"))
        wrong += [f"{name}: {path}" for path in paths.findall(commands) if not (ROOT / path).exists()]
    assert not wrong


def test_names_in_python_exist():
    for _, span in SPANS:
        if match := re.fullmatch(r"(jlora(?:\.\w+)+)(?:\(.*\))?", span):
            module, name = match[1].rsplit(".", 1)
            found = importlib.import_module(module)
            if not hasattr(found, name):
                importlib.import_module(match[1])  # a module, or an error that names it


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\((docs/[\w-]+\.md)\)", PAGES["README.md"].read_text()))
    assert linked == {name for name in PAGES if name.startswith("docs/")}


def test_blocks_say_how_they_run():
    for page in PAGES.values():
        for block in blocks(page):
            assert block.language in ("sh", "python", "text", "mermaid"), f"{block.page}:{block.line}"
            block.command()  # a replacement that applies to nothing is an error


def test_readme_is_short_and_has_the_test_command():
    text = PAGES["README.md"].read_text()
    assert len(text.split()) < 1200
    assert re.findall(r".*-m pytest$", text, re.M)[:1] == [
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    ]


@pytest.mark.parametrize("name", PAGES)
def test_documents_are_in_plain_english(name):
    assert not stiff(re.sub(r"`[^`\n]+`", "", PROSE[name]))


def test_docstrings_of_functions_start_with_a_verb():
    """In the third person, such as "Returns"; properties are exempt, because a noun describes an attribute."""
    wrong = []
    for file in sorted((ROOT / "jlora").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                continue
            is_property = any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)
            if not is_property and not re.match(r"[A-Z][a-z]+s\b", text):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_messages_docstrings_and_comments_are_in_plain_english():
    """Every string of the code, with X for each value that is filled in, and every comment."""
    wrong = []
    for file in sorted((ROOT / "jlora").rglob("*.py")):
        tree = ast.parse(file.read_text())
        parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            else:
                continue
            wrong += [f"{file.relative_to(ROOT)}:{node.lineno}: {found}" for found in stiff(text)]
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.COMMENT:
                wrong += [f"{file.relative_to(ROOT)}:{token.start[0]}: {found}" for found in stiff(token.string)]
    assert not wrong, "\n".join(wrong)


def stiff(text):
    """The old habits in a text."""
    return [match[0] for pattern in STIFF for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE)]
