"""Rows and files that cannot be used: each is reported by file and line, or dropped and counted."""

import os
from pathlib import Path

import pytest
from test_layouts import contents, jsonl, read

from jlora.common.errors import UserError

TURN = {"role": "user", "content": "a?"}
ANSWER = {"role": "assistant", "content": "b"}
Q = "question,answer\n"
HTML = "<!DOCTYPE html>\n<html><head><title>FAQ</title></head>\n<body><p>User: a?</p>\n<p>Bot: b</p></body></html>"
BAD = [
    # text
    ("rows.txt", "", "rows.txt: The file is empty"),
    ("rows.txt", " \n\n", "rows.txt: The file is empty"),
    ("rows.txt", "\ufeff\n", "rows.txt: The file is empty"),
    (
        "rows.txt",
        "User: a?\nLawyer: b\n\nUser: c?\n\nUser: d?\nLawyer: e",
        r"rows.txt:4: This question has no answer: 'c\?'",
    ),
    ("rows.txt", "User: a?\nLawyer: b\n\nUser: c?", "rows.txt:4: This question has no answer"),
    ("rows.txt", "User: a?\nLawyer:\n", "rows.txt:2: The answer is empty"),
    ("rows.txt", "User:\nLawyer: b\n", "rows.txt:1: The question is empty"),
    ("rows.txt", "User: a?\nLawyer: b\0\n", "rows.txt:2: The answer contains a NUL character"),
    (
        "rows.txt",
        "hello\nUser: a?\nLawyer: b\n",
        "rows.txt:1: Expected a line that starts with a role.*'hello'.*plain-text",
    ),
    ("rows.txt", "https://x.y/z\nUser: a?\nLawyer: b", "rows.txt:1: Expected a line that starts with a role"),
    (
        "rows.txt",
        "Staff FAQ\n\nWorker: a?\nCounsel: b\n\nWorker: c?\nCounsel: d",
        "rows.txt:1: Expected a line that starts with a role",
    ),
    (
        "rows.txt",
        "Title: FAQ\nEmployee: a?\nCounsel: b",
        r"Cannot tell which prefixes are the roles\. .*title \(1\).*role_prefixes=",
    ),
    ("rows.txt", "Title: FAQ\nUser: a?\nLawyer: b\nUser: c?\nLawyer: d", "Cannot tell which prefixes are the roles"),
    ("rows.txt", "Topic: x\nEmployee: a?\nCounsel: b\n" * 3, "Cannot tell which prefixes are the roles"),
    ("rows.txt", "Employee: a?\nNote: here.\nExpert: b", "Cannot tell which prefixes are the roles"),
    (
        "rows.txt",
        "User: a?\nLawyer: b\n\n用户：c？\n律师：d\n\n用户：e？\n律师：f",
        "Cannot tell which prefixes are the roles",
    ),
    (
        "rows.txt",
        "User: a?\nLawyer: b\nLawyer: c\n",
        "rows.txt:1: Expected user and assistant turns to alternate, .*Got user, assistant, assistant",
    ),
    ("rows.txt", "Lawyer: b\nUser: a?\nLawyer: c", "rows.txt:1: This answer has no question before it: 'Lawyer: b'"),
    (
        "rows.txt",
        "User: a?\nLawyer: " + ("b" * 4095 + "\n") * 4097,
        r"rows.txt:\d+: The row is longer than 16,777,216 characters",
    ),
    # encodings
    (
        "rows.txt",
        "User: a?\nLawyer: caf\xe9 b".encode("latin-1"),
        "rows.txt:2: Not valid UTF-8, UTF-16 or GB18030. Save .* set encoding",
    ),
    ("rows.txt", "用户：长？\n律师：短".encode()[:-1], "rows.txt:2: Not valid UTF-8, UTF-16 or GB18030"),
    ("rows.txt", "用户：长？\n律师：短".encode("utf-16")[:-1], "rows.txt:2: Not valid utf-16"),
    (
        "rows.txt",
        "勞動契約應以書面為之\n僱主應給付工資".encode("big5"),
        "rows.txt:1: Not valid UTF-8, UTF-16 or GB18030",
    ),
    (
        "rows.txt",
        b"User: a?\nLawyer: \xed\xa0\x80",
        "rows.txt:2: Not valid UTF-8",
    ),  # half a character, as UTF-8 forbids
    ("rows.txt", bytes(range(256)) * 9, r"rows.txt:\d: Not valid UTF-8"),
    (
        "rows.xlsx",
        b"PK\x03\x04....",
        r"rows.xlsx is not a valid archive \(.xlsx and .docx files are zip archives\): .*, or save its rows as CSV",
    ),
    (
        "rows.doc",
        b"{\\rtf1\\ansi{\\fonttbl\\f0 Arial;}\\f0 User: a?\\par}",
        r"rows.doc is a Rich Text document. Save it as plain text \(.txt\)",
    ),
    ("rows.rtf", b"{\\rtf1 User: a?}", "rows.rtf is a Rich Text document"),
    ("rows.html", HTML, r"rows.html is an HTML page. Save its text as .txt, or its table as CSV"),
    ("rows.txt", f"\n  {HTML.lower()}", "rows.txt is an HTML page"),
    ("rows.jsonl", HTML.removeprefix("<!DOCTYPE html>\n"), "rows.jsonl is an HTML page"),
    ("rows.csv", f'<?xml version="1.0"?>\n<!-- saved -->\n{HTML}'.encode("utf-16"), "rows.csv is an HTML page"),
    ("rows.pdf", b"%PDF-1.7", "rows.pdf is a PDF. Save its text"),
    ("rows.jsonl.gz", b"\x1f\x8b\x08", r"rows.jsonl.gz is not a valid archive .*file ended before.*Save it again"),
    # JSON
    (
        "rows.jsonl",
        '{"instruction": "a", "output": "b"}\n{broken',
        "rows.jsonl:2: Not valid JSON: Expecting property name",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b"\n{"q": "c", "a": "d"}\n',
        "rows.jsonl:1: Not valid JSON: Expecting ',' delimiter",
    ),
    ("rows.jsonl", '{"q": "a", "a": }', "rows.jsonl:1: Not valid JSON: Expecting value"),
    ("rows.jsonl", '{"q": "a", "a": "b\0"}\n', "rows.jsonl:1: Not valid JSON: Invalid control character"),
    ("rows.jsonl", '{"q": "a", "a": "b\\u0000"}\n', "rows.jsonl:1: The answer contains a NUL character"),
    (
        "rows.jsonl",
        '{"q": "a", "a": "\\ud83d"}\n',
        r"rows.jsonl:1: The answer contains a lone surrogate \(half a character\)",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b", "a": "c"}\n' * 2,
        r"rows.jsonl:1: Not valid JSON: duplicate key 'a'. .* Also at .*rows.jsonl:2",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b"}\n{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:2: The row is longer than 16,777,216 characters",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:1: The row is longer than 16,777,216 characters",
    ),
    ("rows.json", "[" * 100_000, "rows.json:1: Not valid JSON: too deeply nested"),
    ("rows.jsonl", "[1]", "rows.jsonl:1: Expected a JSON object, got int"),
    ("rows.jsonl", "42\n43", "rows.jsonl:1: Expected a JSON object, got int"),
    ("rows.json", '[{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}]', "rows.json:2: Not valid JSON: Expected ',', got '{"),
    ("rows.json", '[{"q": "a", "a": "b"},\n', "rows.json:2: Not valid JSON: Expecting value"),
    ("rows.json", '[{"q": "a", "a": "b"}', "rows.json:1: Not valid JSON: Expected ',', but the file ends"),
    (
        "rows.json",
        '{"train": [{"q": "a", "a": "b"}], "test": [{"q": "c", "a": "d"}]}',
        "Both train and test hold rows. Set columns=.*rows",
    ),
    ("rows.json", "[]", "rows.json contains no usable rows"),
    ("rows.json", '{"data": []}', "rows.json:1: Cannot tell which columns hold question and answer.*Columns: data"),
    (
        "rows.jsonl",
        '{"instruction": "a"}',
        "rows.jsonl:1: Cannot tell which columns .*Set columns=.*Columns: instruction",
    ),
    (
        "rows.jsonl",
        jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "Cannot tell which columns.*Columns: prompt, chosen, rejected",
    ),
    (
        "rows.jsonl",
        jsonl({"question": "a", "prompt": "b", "answer": "c"}),
        "Cannot tell which columns.*Columns: question, prompt, answer",
    ),
    ("rows.jsonl", '{"q": "a", "a": "b", "messages": []}', "Cannot tell which columns hold question and answer"),
    (
        "rows.jsonl",
        '{"instruction": ["a"], "output": "b"}',
        r"rows.jsonl:1: Expected text in 'instruction', got \['a'\]",
    ),
    ("rows.jsonl", '{"instruction": "a", "output": null}', "rows.jsonl:1: The answer is empty"),
    ("rows.jsonl", '{"instruction": "a", "output": 4}', "rows.jsonl:1: Expected text in 'output', got 4"),
    ("rows.jsonl", '{"instruction": "a", "output": " "}', "rows.jsonl:1: The answer is empty"),
    (
        "rows.jsonl",
        jsonl({"q": "a", "a": "b", "history": [["c"]]}),
        r"Expected pairs of question and answer in 'history', got \['c'\]",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN]}), "This question has no answer: 'a"),
    (
        "rows.jsonl",
        jsonl({"messages": [ANSWER, TURN, ANSWER]}),
        "rows.jsonl:1: This answer has no question before it: 'b'",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, TURN, ANSWER]}), "ending with the assistant. Got user, user, assistant"),
    (
        "rows.jsonl",
        jsonl({"messages": [{"role": "robot", "content": "a"}]}),
        "Unknown role 'robot'. Expected one of",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {"role": "tool", "content": "x"}]}),
        "rows.jsonl:1: This tool's result has no call before it: 'x'",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {**ANSWER, "tool_calls": [1]}]}),
        "Expected a call with a name and arguments, got 1",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {**ANSWER, "weight": -0.5}]}),
        "has weight=-0.5. Expected a number that is 0 or more",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {"role": "assistant", "content": None}]}),
        "Expected text in the assistant's message, got None",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [{"role": "user"}]}),
        "Expected a role and content in each turn of 'messages', got",
    ),
    ("rows.jsonl", '{"messages": []}', "ending with the assistant. Got no turns"),
    ("rows.jsonl", '{"messages": "hi"}', "Expected a list of turns in 'messages', got 'hi'"),
    # tables
    ("rows.csv", Q + "a?\n", r"rows.csv:2: Expected 2 cells, got 1"),
    ("rows.csv", Q + "a?,b,c\n", r"rows.csv:2: Expected 2 cells, got 3. Put quotes around cells that contain ','"),
    ("rows.csv", Q + 'a?,"b\nc?,d\n', "rows.csv:2: Not valid CSV: the quote opened here is never closed"),
    ("rows.csv", Q + 'a?,"b"c\n', "rows.csv:2: Not valid CSV: ',' expected after"),
    ("rows.csv", Q + "a?," + "b" * 200_000, "rows.csv:2: Not valid CSV: a cell is longer than 131,072 characters"),
    ("rows.csv", Q, "rows.csv contains no usable rows"),
    ("rows.csv", Q + "a?,\n", "rows.csv:2: The answer is empty"),
    ("rows.csv", "question,answer,answer\na?,b,c\n", "rows.csv: Two columns are named 'answer'. Rename one"),
    (
        "rows.csv",
        "Frage,Antwort\nWas ist wann fällig?,Nach Artikel 47 sofort.\n",
        "Cannot tell which columns.*Columns: Frage, Antwort. If the file has no header",
    ),
    (
        "rows.csv",
        "1,a?,b\n2,c?,d\n",
        "Cannot tell which columns .*Columns: 1, a., b. If the file has no header, use numbers",
    ),
    ("rows.csv", "a? b\n", "Cannot tell which columns .*Columns: a. b. If"),
    ("rows.parquet", b"PAR1....PAR1", "rows.parquet cannot be read as Parquet after row 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{n}-{m[:40]}" for n, _, m in BAD])
def test_bad_rows_are_reported(file, name, content, message):
    with pytest.raises(UserError, match=message):
        read(file(content, name))


def test_text_about_html_stays_text(file):
    for text in (
        "<html> is the first tag of a page.",
        "<!DOCTYPE html> comes first,\nthen <html>.",
        "{\\bf a} is bold.",
    ):
        assert contents(read(file(text))[0]) == [[text]]
    text = f"User: Write a page.\nBot: {HTML}\n"
    assert contents(read(file(text))[0]) == [["Write a page.", HTML]]
    assert contents(read(file(HTML), task_type="plain-text")[0]) == [[HTML]]


def test_settings_that_do_not_match_the_files(file):
    path = file(jsonl({"q": "a?", "a": "b"}), "a.jsonl")
    for settings, message in [
        (
            {"columns": {"prompt": "ask", "response": "a"}},
            "a.jsonl:1: The key columns names the column 'ask', which does not exist. Columns: q, a",
        ),
        ({"columns": {"rows": "data"}}, "a.jsonl: The key columns sets rows to 'data', but no list of rows has"),
        (
            {"task_type": "plain-text"},
            r"a.jsonl:1: Cannot tell which column holds the text. Set columns=.*Columns: q, a",
        ),
        ({"encoding": "utf-16"}, "a.jsonl:1: Not valid utf-16"),
    ]:
        with pytest.raises(UserError, match=message):
            read(path, **settings)
    assert contents(read(file("User: caf\xe9?\nBot: b".encode("latin-1")), encoding="latin-1")[0]) == [
        ["caf\xe9?", "b"]
    ]
    given = {"user": "Mandant", "assistant": "Kanzlei"}
    with pytest.raises(UserError, match=r"rows.txt:1: Expected a line that starts with a role"):
        read(file("User: a?\nLawyer: b"), role_prefixes=given)


def test_every_bad_row_is_listed_or_dropped_and_counted(file):
    good = {"q": "a?", "a": "b"}
    path = file(jsonl(good, {"q": "", "a": "b"}, good, {"q": "", "a": "c"}, {"x": 1}) + "{", "a.jsonl")
    with pytest.raises(UserError) as caught:
        read(path)
    heading, *named = str(caught.value).split("\n  ")
    assert heading == f"train_data_dir={path}: 4 of 6 rows cannot be used. Fix them, or set bad_rows=drop:"
    assert named[0] == f"{path}:2: The question is empty. Write it, or remove the row. Also at {path}:4."
    assert named[1].startswith(f"{path}:5: Cannot tell which columns") and named[2].startswith(
        f"{path}:6: Not valid JSON"
    )
    rows, said = read(path, bad_rows="drop")
    assert contents(rows) == [["a?", "b"]] * 2
    assert said == ["\n  ".join(["train_data_dir: dropped 4 of 6 rows that cannot be used:", *named])]
    with pytest.raises(UserError, match=r"a.jsonl contains no usable rows"):
        read(file("{}\n{}", "a.jsonl"), bad_rows="drop")


def test_bad_paths_are_reported(file, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            read(path)

    refused(tmp_path / "none", r"train_data_dir=.*none: No such file or directory")
    refused("none/rows", rf"train_data_dir=none/rows: No such file or directory. Looked for {Path.cwd()}/none/rows")
    refused(tmp_path, r"train_data_dir=.*: The directory contains no data files")
    file("User: a?\nLawyer: b", "good/rows.txt")
    for name, make, message in [
        ("loop", lambda p: p.symlink_to(p), r"loop is a broken symbolic link \(Too many levels of symbolic links\)"),
        (
            "dangling.txt",
            lambda p: p.symlink_to("nothing"),
            r"dangling.txt is a broken symbolic link \(No such file or directory\)",
        ),
        ("sub", lambda p: p.symlink_to(p.parent), r"sub is a link to one of its own parent directories"),
        ("pipe.txt", os.mkfifo, r"pipe.txt is not a regular file"),
        (
            "unreadable.txt",
            lambda p: p.symlink_to("/proc/self/mem"),
            r"unreadable.txt cannot be read: Input/output error",
        ),
        (
            "notes.txt",
            lambda p: p.write_text("Read me."),
            r"rows.txt:1 is a conversation, but .*notes.txt:1 is plain text",
        ),
    ]:
        path = tmp_path / "good" / name
        make(path)
        refused(tmp_path / "good", message)
        path.unlink()
    (tmp_path / "linked").symlink_to(tmp_path / "good")  # a valid link is followed
    assert contents(read(tmp_path / "linked")[0]) == [["a?", "b"]]
