"""YAML files are read as YAML: pairs of texts, rows with keys, turns; anything else is refused by file and line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats_fuzz import FUZZ, SCRAPS, outcome
from test_layouts import contents, read, roles

from jlora.common.errors import UserError
from jlora.data.conversation import ReadOptions
from jlora.data.loss_mask import encode_conversation
from jlora.data.tokenizer import end_tokens, load_tokenizer

PAIRS = [["How long?", "Two weeks."], ["When?", "In May: early."]]
FORMS = {
    "chatterbot": """\
categories:
- leave
conversations:
- - How long?
  - Two weeks.
- - When?
  - "In May: early."
""",
    "lists of texts": "- [How long?, Two weeks.]\n- - When?\n  - 'In May: early.'\n",
    "rows": """\
# FAQ
- question: How long?
  answer: Two weeks.
- question: When?
  answer: |
    In May: early.
""",
    "rows below a key": """\
version: 1.0
faq:
  rows:
    - q: How long?
      a: Two weeks.
    - {q: When?, a: "In May: early."}
""",
    "documents": "---\nquestion: How long?\nanswer: Two weeks.\n---\nquestion: When?\nanswer: 'In May: early.'\n",
    "turns": """\
- - role: user
    content: How long?
  - role: assistant
    content: Two weeks.
- messages:
    - {from: human, value: When?}
    - {from: gpt, value: "In May: early."}
""",
    "JSON": '[{"question": "How long?", "answer": "Two weeks."}, {"q": "When?", "a": "In May: early."}]',
    "aliases": "- {q: &q How long?, a: &a Two weeks.}\n- {q: When?, a: 'In May: early.', system: ''}\n",
}
LINES = {"chatterbot": 6, "rows": 4, "rows below a key": 6, "documents": 5, "turns": 5, "JSON": 1}  # of the second row


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_forms_of_yaml(file, form, encoding):
    path = file(FORMS[form].encode(encoding), "rows.yml")
    rows, said = read(path)
    assert contents(rows) == PAIRS
    assert rows[1].where == f"{path}:{LINES.get(form, 2)}"
    assert ("unused keys" in " ".join(said)) == (form in ("chatterbot", "rows below a key"))


def test_texts_are_kept_as_they_are_written(file):
    words = "Yes no 42 1.50 2024-01-01 12:30 true 'null'".split()
    rows, _ = read(file("".join(f"- [Is it?, {word}]\n" for word in words), "rows.yaml"))
    assert [answer for _, answer in contents(rows)] == [word.strip("'") for word in words]


def test_a_system_prompt_that_is_an_alias(file):
    text = "- {system: &s Be kind., question: a?, answer: b}\n- {system: *s, question: c?, answer: d}\n"
    assert contents(read(file(text, "rows.yml"))[0]) == [["Be kind.", "a?", "b"], ["Be kind.", "c?", "d"]]


def test_marks_are_obeyed(file, tiny):
    text = """
- messages:
  - {role: user, content: a?}
  - {role: assistant, content: b, weight: 0}
  - {role: user, content: c?}
  - {role: assistant, content: d, weight: 1, train: true}
"""
    (row,), _ = read(file(text, "rows.yml"))
    assert roles([row]) == ["uaua"]
    tokenizer = load_tokenizer(tiny, "")
    example = encode_conversation(tokenizer, end_tokens(tiny, tokenizer), row, "assistant")
    assert tokenizer.decode(example.tokens[example.loss_mask]) == "d<|im_end|>"


def test_columns_are_set_in_the_config(file):
    text = "- {Frage: a?, Antwort: b}\n"
    given = {"prompt": "Frage", "response": "Antwort"}
    assert contents(read(file(text, "rows.yml"), columns=given)[0]) == [["a?", "b"]]
    both = "train:\n- [a?, b]\ntest:\n- [c?, d]\n"
    assert contents(read(file(both, "rows.yml"), columns={"rows": "test"})[0]) == [["c?", "d"]]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = [
    (
        "- - How?\n  - So.\n- - When?\n  - In May.\n  - In June.\n",
        "rows.yml:3: Expected a question and an answer, got 3",
    ),
    ("- - How?\n  - So.\n- - When?\n", "rows.yml:3: Expected a question and an answer, got 1 text"),
    ("- - How?\n  - Note: it is so.\n", r"rows.yml:1: .*Put quotes around a text that contains ': '"),
    ("- How?\n- So.\n", "rows.yml:1: Expected keys such as question and answer, got 'How"),
    ("- - How?\n  -\n", "rows.yml:1: The answer is empty"),
    (
        "- messages: [{role: user, content: a?}, {role: assistant, content: b, train: 2026-13-45}]\n",
        "rows.yml:1: .*2026-13-45",
    ),
    ("How is it? Well.\n", "rows.yml:1: Expected keys such as question and answer, got 'How is it"),
    (
        "title: FAQ\nauthor: Ann\n",
        "rows.yml:1: Cannot tell which columns .*Columns: title, author",
    ),
    ("- question: a?\n  answer: b\n- question: [a?\n", r"rows.yml:\d: Not valid YAML: "),
    ("- question: a?\n\tanswer: b\n", "rows.yml:2: Not valid YAML: "),
    ("- question: a?\n  question: b?\n  answer: c\n", "rows.yml:2: Not valid YAML: duplicate key 'question'"),
    ("- &r {question: a?, answer: b}\n- {<<: *r, answer: c}\n", "rows.yml:2: Expected a text as the key"),
    ("- question: a?\n  answer: !!python/object/apply:os.system [ls]\n", "rows.yml:2: The YAML tag 'python/object"),
    ("- question: a?\n  answer: !own x\n", "rows.yml:2: The YAML tag '!own' is not supported"),
    (BOMB, r"rows.yml:\d: The aliases repeat more than 1,000,000 values"),
    ("- &a [*a, *a]\n", r"rows.yml:1: Not valid YAML: .*alias \*a"),
    ("- *b\n", r"rows.yml:1: Not valid YAML: .*alias \*b"),
    ("[" * 200 + "]" * 200, "rows.yml:1: Not valid YAML: too deeply nested"),
    ("[" * 100_000, "rows.yml:1: Not valid YAML: "),
    ("- [a?, b]\n" * 2_000_000, r"rows.yml: The file is longer than 16,777,216 characters"),
    ("train:\n- [a?, b]\ntest:\n- [c?, d]\n", r"rows.yml:4: Both train and test hold rows. Set columns="),
    ("- [a?, b\0]\n", "rows.yml:1: Not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_yaml_that_cannot_be_used_is_refused(file, text, message):
    with pytest.raises(UserError, match=message):
        read(file(text, "rows.yml"))


def test_unusable_rows_may_be_dropped(file):
    rows, said = read(file("conversations:\n- [a?, b]\n- [c?, d, e]\n- text\n- [f?, g]\n", "rows.yml"), bad_rows="drop")
    assert contents(rows) == [["a?", "b"], ["f?", "g"]] and "dropped 2 of 4 rows" in said[0]


def test_plain_text_is_not_read_as_yaml(file):
    rows, _ = read(file("title: On leave\n\nTwo weeks.\n", "rows.yml"), task_type="plain-text")
    assert len(rows) == 2


PIECES = st.sampled_from([*"[]{}|'", "- ", "\n", "\n  ", ": ", "question: ", "answer: ", "&a ", "*a", "!!x "])


@FUZZ
@given(st.lists(PIECES | SCRAPS, max_size=12).map("".join))
def test_any_yaml(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "rows.yml"
    path.write_text(text, encoding="utf-8", errors="replace")
    outcome(path, ReadOptions())
