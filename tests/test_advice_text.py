"""The advice of every error message about JSON, YAML and text is followed; then the rows are read."""

import pytest
import test_advice_files
import test_advice_rows
from advice import PAIR, case, follow, sites, unmet
from conftest import ROOT
from test_layouts import jsonl
from test_yaml import BOMB

TEXT, ROW = "User: a?\nLawyer: b\n", jsonl({"q": "a?", "a": "b"})
PLAIN, TWICE, BOTH = {"task_type": "plain-text"}, PAIR * 2, [*PAIR, ["c?", "d"]]
MOST = "is longer than 16,777,216 characters"
DATA = {"train": [{"q": "a?", "a": "b"}], "test": [{"q": "c?", "a": "d"}]}
ONE = '{"q": "a?", "a": "b"}'
FIX = "Correct it, or write the rows with a JSON library"
JSON = [
    case("a.jsonl", f"{ROW}{{broken\n", "a.jsonl:2: Not valid JSON: Expecting", FIX, ROW * 2, gives=TWICE),
    case(
        "a.json", f"[{ONE}\n{ONE}]", "a.json:2: Not valid JSON: Expected ',', got", FIX, f"[{ONE},\n{ONE}]", gives=TWICE
    ),
    case("a.json", f"[{ONE},", "a.json:1: Not valid JSON: Expecting value", FIX, f"[{ONE}]"),
    case("a.json", '{"x": 1, "x": 2, "rows": []}', "duplicate key 'x'", FIX, f'{{"x": 1, "rows": [{ONE}]}}'),
    case("a.jsonl", jsonl({"q": "a?", "a": "b" * 50_000_000}), MOST, "Split it into several", ROW * 2, gives=TWICE),
    case(
        "a.json",
        jsonl(DATA),
        "Both train and test hold rows",
        'Set columns={"rows": "test"}',
        {"columns": {"rows": "test"}},
        gives=[["c?", "d"]],
    ),
    case(
        "a.json",
        jsonl(DATA),
        "Both train and test",
        "split the file",
        {"a/1.json": jsonl(*DATA["train"]), "a/2.json": jsonl(*DATA["test"])},
        gives=BOTH,
    ),
    case(
        "a.json",
        jsonl(DATA),
        "sets rows to 'x', but",
        "Correct it",
        {"columns": {"rows": "train"}},
        columns={"rows": "x"},
    ),
]
SPLIT = "train:\n- [a?, b]\ntest:\n- [c?, d]\n"
QUOTES = "Correct it, or put quotes around the text there"
YAML = [
    case("a.yml", "- [a?, b]\n" * 2_000_000, MOST, "Save the rows as JSON lines", {"a.jsonl": ROW}),
    case(
        "a.yml",
        "- a?\n- b\n",
        r"got 'a\?'",
        "Expected keys such as question and answer",
        "- question: a?\n  answer: b\n",
    ),
    case(
        "a.yml",
        "- - a?\n  - b: c\n",
        "Expected a list of texts",
        "Put quotes around a text that contains ': '",
        "- - a?\n  - 'b: c'\n",
        gives=[["a?", "b: c"]],
    ),
    case(
        "a.yml",
        "- [a?, b, c]\n",
        "got 3 texts",
        "write each with the question as a list of its own",
        "- [a?, b]\n- [a?, c]\n",
        gives=[*PAIR, ["a?", "c"]],
    ),
    case(
        "a.yml",
        "- [a?, b, c?, d]\n",
        "of a dialogue",
        "write each turn with `role`, user or assistant, and `content`",
        "- "
        + "\n  ".join(
            f"- {{role: {role}, content: {text}}}"
            for role, text in zip(["user", "assistant"] * 2, "a? b c? d".split(), strict=True)
        ),
        gives=[["a?", "b", "c?", "d"]],
    ),
    case(
        "a.yml",
        "- [a?, b]\n- [c?, !own d]\n",
        "tag '!own' is not supported",
        "Remove it",
        "- [a?, b]\n- [c?, d]\n",
        gives=BOTH,
    ),
    case(
        "a.yml", "- q: a?\n  a: @b\n", "a.yml:2: Not valid YAML", QUOTES, "- q: a?\n  a: '@b'\n", gives=[["a?", "@b"]]
    ),
    case(
        "a.yml",
        "- [a?, *b]\n",
        r"no complete value precedes the alias \*b",
        QUOTES,
        "- [a?, '*b']\n",
        gives=[["a?", "*b"]],
    ),
    case(
        "a.yml",
        "- [a?, " + "[" * 200 + "]" * 200 + "]",
        "too deeply nested",
        QUOTES,
        "- [a?, '" + "[" * 200 + "']",
        gives=[["a?", "[" * 200]],
    ),
    case("a.yml", BOMB, "The aliases repeat more than 1,000,000 values", "Write the rows out", "- [a?, b]\n"),
    case("a.yml", SPLIT, "sets rows to 'x', but", "Correct it", {"columns": {"rows": "train"}}, columns={"rows": "x"}),
    case(
        "a.yml",
        SPLIT,
        "Both train and test hold rows",
        'Set columns={"rows": "test"}',
        {"columns": {"rows": "test"}},
        gives=[["c?", "d"]],
    ),
    case(
        "a.yml",
        SPLIT,
        "Both train and test",
        "split the file",
        {"a/1.yml": "- [a?, b]\n", "a/2.yml": "- [c?, d]\n"},
        gives=BOTH,
    ),
    case(
        "a.yml",
        "- &r {q: a?, a: b}\n- {<<: *r, a: d}\n",
        "Expected a text as the key",
        "Write the keys out",
        "- {q: a?, a: b}\n- {q: c?, a: d}\n",
        gives=BOTH,
    ),
    case("a.yml", "- {q: a?, q: b?, a: b}\n", "duplicate key 'q'", "Remove one", "- {q: a?, a: b}\n"),
]
MARKED = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
BOLD = "**Q:** a?\n**A:** b\n"
GIVEN = {"role_prefixes": {"user": "Ask", "assistant": "Say"}}
LINES = "".join(f"{letter * (1 << 20)}\n" for letter in "bcdefghijklmnopqr")
TEXTS = [
    case("a.txt", f"FAQ\n{TEXT}", "got 'FAQ'", "Expected a line that starts with a role, such as `User: ...`", TEXT),
    case("a.txt", f"FAQ\n{TEXT}", "got 'FAQ'", "set task_type=plain-text", PLAIN, gives=[[f"FAQ\n{TEXT}".strip()]]),
    case(
        "a.txt",
        f"Lawyer: b\n{TEXT}",
        "no question before it: 'Lawyer: b'",
        "Write the question there",
        f"User: c?\nLawyer: d\n{TEXT}",
        gives=[["c?", "d"], *PAIR],
    ),
    case("a.txt", "Ask: a?\nSay: b\n", "Cannot tell which prefixes", "Set role_prefixes=", GIVEN),
    case("a.txt", "Ask: a?\nSay: b\n", "Cannot tell which", "task_type=plain-text", PLAIN, gives=[["Ask: a?\nSay: b"]]),
    case("a.txt", TEXT + LINES, f"a.txt:18: The row {MOST}", "Split it into several", TEXT * 2, gives=TWICE),
    case("a.txt", LINES, f"The paragraph {MOST}", "Split it with blank lines", "b\n\nc\n", gives=[["b"], ["c"]]),
    case(
        "a.txt",
        MARKED.replace("b", LINES),
        f"a.txt:1: The row {MOST}",
        "Split it into several",
        MARKED * 2,
        gives=TWICE,
    ),
    case("a.txt", f"FAQ\n\n{BOLD}", "begins with 'FAQ', but later has the form of", "Remove the lines before it", BOLD),
    case(
        "a.txt",
        f"FAQ\n\n{BOLD}",
        "begins with 'FAQ'",
        "set task_type=plain-text",
        PLAIN,
        gives=[["FAQ"], [BOLD.strip()]],
    ),
    case("a.txt", f"{MARKED}more\n", "from 'more' on it does not: Expected the beginning", "Fix it", MARKED),
    case(
        "a.jsonl",
        jsonl({"text": f"{MARKED}more"}),
        "form of ChatML, but from 'more'",
        "Fix it",
        jsonl({"text": MARKED}),
    ),
]
CASES = [*JSON, *YAML, *TEXTS]
FILES = "chat_markup json_files text_files yaml_files".split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.found[:40]}-{case.advice[:30]}")
def test_advice_is_followed(case, tmp_path, monkeypatch):
    follow(case, tmp_path, monkeypatch)


def test_every_message_about_text_has_a_case(tmp_path):
    assert not unmet(CASES, sites(f"data/readers/{name}.py" for name in FILES), {}, tmp_path)


def test_every_reader_is_covered():
    readers = {path.stem for path in (ROOT / "jlora/data/readers").glob("*.py")}
    assert readers == {*FILES, *test_advice_files.FILES, *test_advice_rows.FILES, "hub", "__init__"}


def test_a_message_without_a_case_is_found(tmp_path):
    found = sites(["data/readers/yaml_files.py"])
    assert len(unmet(JSON, found, {}, tmp_path)) == len(found) > 9
    assert unmet(YAML, found, {"no such message": "an exception that nothing needs"}, tmp_path) == ["no such message"]
