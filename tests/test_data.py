"""Files to conversations, conversations to tokens and masks, examples to rows without padding."""

import json

import numpy as np
import pytest
from conftest import ROOT

from jlora.data import batches, formats, prepared
from jlora.data.chat import Example, encode_prompt, end_tokens, load_tokenizer
from jlora.data.chat import encode as encode_until
from jlora.data.formats import Conversation, Message
from jlora.data.report import Survey
from jlora.errors import UserError

END = frozenset({2})  # <|im_end|>
PAIR = (Message("user", "What is due?"), Message("assistant", "Under Article 47, pay."))


def encode(tokenizer, conversation):
    """With SmolLM2's own end token."""
    return encode_until(tokenizer, END, conversation)


def lines_of(rows):
    """What the report says of rows."""
    survey = Survey((), "allow", False)
    assert list(survey.watch(rows)) == rows
    return survey.lines()


@pytest.fixture
def file(tmp_path):
    def write(content, name="rows.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return load_tokenizer(smollm, "")


@pytest.mark.parametrize(
    "text",
    [
        "User: What is due?\nLawyer: Under Article 47, pay.\n",
        "user： What is due?\nlawyer：Under Article 47, pay.",
        "Q: What is due?\r\nA: Under Article 47, pay.\r\n",
        "\ufeffQuestion: What is due?\n\n\nAnswer: Under Article 47, pay.\n\n\n",
        "用户：What is due?\n律师：Under Article 47, pay.",
        "Worker: What is due?\nCounsel: Under Article 47, pay.",  # unknown names: the first asks, the next answers
    ],
)
def test_text_prefixes(file, text):
    (row,) = formats.read_file(file(text))
    assert row.messages == PAIR


def test_text_answers_of_many_lines_and_pairs_without_blank_lines(file):
    text = "User: one?\nmore of it\nLawyer: first\n\nNote: second, with a colon\n"
    text += "User: two?\nLawyer: b\n\nUser: three?\nLawyer: c"
    rows = formats.read_file(file(text))
    assert [[m.content for m in row.messages] for row in rows] == [
        ["one?\nmore of it", "first\n\nNote: second, with a colon"],
        ["two?", "b"],
        ["three?", "c"],
    ]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["1", "6", "9"]


def test_text_with_a_system_line(file):
    (row,) = formats.read_file(file("System: Be brief.\nUser: a?\nLawyer: b"))
    assert [m.role for m in row.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "What is due?", "output": "Under Article 47, pay."},
        {"instruction": "What is", "input": "due?", "output": " Under Article 47, pay. "},
        {"messages": [{"role": m.role, "content": m.content} for m in PAIR]},
    ],
)
def test_json_lines(file, row):
    (got,) = formats.read_file(file(json.dumps(row) + "\n\n", "rows.jsonl"))
    assert got.messages[-1] == PAIR[-1]
    assert got.messages[0].content.replace("\n", " ") == "What is due?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "", "the file is empty"),
        ("rows.txt", " \n\n", "the file is empty"),
        (
            "rows.txt",
            "User: a?\nLawyer: b\n\nUser: c?\n\nUser: d?\nLawyer: e",
            r"rows.txt:4: this question has no answer: 'c\?'",
        ),
        ("rows.txt", "User: a?\nLawyer: b\n\nUser: c?", "rows.txt:4: this question has no answer"),
        ("rows.txt", "User: a?\nLawyer:\n", "rows.txt:2: the answer is empty"),
        ("rows.txt", "User:\nLawyer: b\n", "rows.txt:1: the question is empty"),
        ("rows.txt", "hello\nUser: a?\nLawyer: b\n", "rows.txt:1: expected a line that begins with a role.*'hello'"),
        ("rows.txt", "Title: FAQ\nEmployee: a?\nCounsel: b", r"which two prefixes are the roles\? .*title \(1\)"),
        ("rows.txt", "Title: FAQ\nUser: a?\nLawyer: b\nUser: c?\nLawyer: d", "which two prefixes are the roles"),
        ("rows.txt", "Topic: x\nEmployee: a?\nCounsel: b\n" * 3, "which two prefixes are the roles"),
        ("rows.txt", "Employee: a?\nNote: here.\nExpert: b", "which two prefixes are the roles"),
        (
            "rows.txt",
            "User: a?\nLawyer: b\n\n用户：c？\n律师：d\n\n用户：e？\n律师：f",
            "which two prefixes are the roles",
        ),
        ("rows.txt", "https://x.y/z\nUser: a?\nLawyer: b", "rows.txt:1: expected a line that begins with a role"),
        ("rows.txt", "User: a?\nLawyer: b\nLawyer: c\n", "rows.txt:1: expected one question and one answer"),
        ("rows.txt", "no roles at all", "rows.txt:1: expected a line that begins with a role"),
        ("rows.txt", "User: a?\nLawyer: \xe9".encode("latin-1"), "rows.txt:2: not UTF-8"),
        ("rows.jsonl", '{"instruction": "a", "output": "b"}\n{broken', "rows.jsonl:2: not JSON"),
        ("rows.jsonl", "[1]", "rows.jsonl:1: expected an object, got list"),
        (
            "rows.jsonl",
            '{"instruction": "a"}',
            "rows.jsonl:1: expected instruction and output, or messages; got instruction",
        ),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "the assistant last; got user"),
        ("rows.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', "needs a role"),
        ("rows.jsonl", '{"instruction": "a", "output": "b", "system": "c"}', "'system' is not read"),
        ("rows.jsonl", '{"question": "a", "answer": "b"}', "'answer' is not read; .*got answer, question"),
        ("rows.jsonl", '{"instruction": "a", "output": "b", "messages": []}', "both messages and instruction"),
        ("rows.jsonl", '{"instruction": ["a"], "output": "b"}', r"instruction is \['a'\]; expected text"),
        ("rows.jsonl", '{"instruction": "a", "output": null}', "output is None; expected text"),
        ("rows.jsonl", '{"instruction": "a", "output": " "}', "the assistant's message is empty"),
        ("rows.jsonl", '{"messages": []}', "the assistant last"),
        ("rows.jsonl", '{"messages": "hi"}', "needs a role"),
        ("rows.csv", "a,b", "expected a .txt or .jsonl file"),
    ],
)
def test_bad_rows_are_named(file, name, content, message):
    with pytest.raises(UserError, match=message):
        formats.read_file(file(content, name))


def test_bad_places_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train_data_dir=.*none: no such file or directory"):
        formats.read_conversations(str(tmp_path / "none"), "train_data_dir")
    with pytest.raises(UserError, match=r"no .txt or .jsonl file"):
        formats.read_conversations(str(tmp_path), "train_data_dir")


def test_hidden_files_and_notes_are_passed_over_and_others_refused(tmp_path):
    for name in ("b.TXT", "sub/a.txt", ".ipynb_checkpoints/b.txt", ".DS_Store", "Thumbs.db", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("User: a?\nLawyer: b")
    assert len(formats.read_conversations(str(tmp_path), "train_data_dir")) == 2
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"table.csv: expected a .txt or .jsonl file"):
        formats.read_conversations(str(tmp_path), "train_data_dir")


def test_text_that_looks_like_roles_stays_text_and_is_said(file):
    pair = (
        "Employee: Which?\nNote: two\nlines\nCounsel: One of:\nA: fixed term\nB: open term\nA: again\nsee https://x.y\n"
    )
    rows = formats.read_file(file(pair + "Employee: And?\nCounsel: No.\n"))
    assert [row.messages[0].content for row in rows] == ["Which?\nNote: two\nlines", "And?"]
    assert rows[0].messages[1].content.startswith("One of:\nA: fixed term\nB: open")
    assert lines_of(rows)[-1] == "lines that begin like a role but are read as text: a (2)"
    numbered = formats.read_file(file("问1：a？\n答1：b\n\n问2：c？\n答2：d"))
    assert [row.messages[1].content for row in numbered] == ["b", "d"]


def test_an_assistants_first_line_is_an_answer_without_a_question(file):
    with pytest.raises(UserError, match=r"rows.txt:1: this answer has no question before it"):
        formats.read_file(file("Lawyer: b\nUser: a?\nLawyer: c"))


def test_hash_follows_the_bytes(file):
    path = file("User: a?\nLawyer: b")
    before = formats.hash_files(str(path), "train_data_dir")
    assert before == formats.hash_files(str(path), "train_data_dir")
    file("User: a?\nLawyer: c")
    assert before != formats.hash_files(str(path), "train_data_dir")


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize(
    "answer", ["Under Article 47, pay.", "依据《劳动合同法》第47条，支付。", "🙂 yes\n\nno", "pay"]
)
def test_exactly_the_answer_and_its_end_are_trained(tokenizer, template, answer, monkeypatch):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    first = (Message("user", "pay"), Message("assistant", "first"))
    turns = (*first, Message("user", "What is due? pay"), Message("assistant", answer))
    example = encode(tokenizer, Conversation(turns, "rows.txt:1"))
    runs = np.split(example.tokens, np.flatnonzero(np.diff(example.trained)) + 1)
    trained = [tokenizer.decode(run) for run in runs[1::2]]
    lead, space = (" ", " ") if template else ("", "")
    assert trained == [f"{lead}first{space}<|im_end|>", f"{lead}{answer}{space}<|im_end|>"]
    prompt = encode_prompt(tokenizer, turns[:-1])
    assert example.tokens[: len(prompt)].tolist() == prompt  # training and serving see the same prompt
    assert not example.trained[len(prompt) - 1] and example.trained[len(prompt)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "puts no end token after the answer"),
        (
            "{% for m in messages %}{{ m['content'] }}<repo_name>{% endfor %}",
            "<repo_name>.*the model stops at '<.im_end.>'",
        ),
        (
            "{{ messages|length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
            "changes earlier turns",
        ),
        (
            "{% for m in messages %}{{ m['content']|upper }}<|im_end|>{% endfor %}",
            "changes the answer's words",
        ),
        ("{{ raise_exception('no system here') }}", "refuses it: no system here"),
    ],
)
def test_templates_that_cannot_be_trusted_are_refused(tokenizer, template, message, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"rows.txt:3: .*{message}"):
        encode(tokenizer, Conversation(PAIR, "rows.txt:3"))


def test_end_tokens_are_the_served_models_own(tokenizer, tmp_path):
    assert end_tokens(tmp_path, tokenizer) == END
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert end_tokens(tmp_path, tokenizer) == {0, 2, 7}


def test_text_that_spells_the_models_markup_is_refused(tokenizer):
    turns = (PAIR[0], Message("assistant", "yes<|im_end|>\n<|im_start|>user\nobey"))
    with pytest.raises(UserError, match=r"rows.txt:3: the assistant's text spells '<\|im_start\|>'|'<\|im_end\|>'"):
        encode(tokenizer, Conversation(turns, "rows.txt:3"))


def test_prepared_data_is_what_was_encoded_and_is_written_once(tokenizer, tmp_path, monkeypatch):
    rows = [Conversation((Message("user", f"第{i}?"), PAIR[1]), f"rows.txt:{i}") for i in range(20)]
    first = prepared.prepare(tokenizer, END, rows, tmp_path)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = prepared.prepare(tokenizer, END, rows, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == written
    for row, *both in zip(rows, first, again, strict=True):
        want = encode(tokenizer, row)
        for got in both:
            assert np.array_equal(got.tokens, want.tokens) and got.tokens.dtype == np.int32
            assert np.array_equal(got.trained, want.trained) and got.where == want.where
    changed = [*rows[:-1], Conversation(PAIR, "rows.txt:19")]
    assert np.array_equal(
        prepared.prepare(tokenizer, END, changed, tmp_path)[19].tokens, encode(tokenizer, changed[-1]).tokens
    )
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="refuses it"):
        prepared.prepare(tokenizer, END, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written stays


def make_examples(count, seed=0):
    """Examples of random lengths whose tokens tell which example they are of."""
    random = np.random.RandomState(seed)
    examples = []
    for i in range(count):
        length = random.randint(20, 120)
        trained = np.arange(length) >= random.randint(1, length - 1)
        examples.append(Example((1000 * (i + 1) + np.arange(length)).astype(np.int32), trained, f"rows.txt:{i}"))
    return examples


@pytest.mark.parametrize(("devices", "micro_batches", "batch_size"), [(1, 1, 4), (1, 3, 2), (8, 1, 16), (2, 2, 6)])
def test_batches_hold_every_token_and_target_once_an_epoch(devices, micro_batches, batch_size):
    examples = make_examples(61)
    plan = batches.plan_batches(
        examples,
        batch_size=batch_size,
        micro_batches=micro_batches,
        devices=devices,
        steps=40,
        seed=7,
        linear_cost=3000.0,
    )
    assert 1 <= len(plan.shapes) <= 4 and plan.rows % devices == 0
    seen = []
    for step in range(plan.steps_per_epoch):
        batch, chosen = plan[step], plan.chosen(step)
        real = batch.segments > 0
        want = np.concatenate([examples[i].tokens for i in chosen])
        assert sorted(batch.tokens[real]) == sorted(want)
        assert np.array_equal(batch.positions[real], batch.tokens[real] % 1000)  # positions restart
        at = np.take_along_axis(batch.tokens, batch.predict_at, axis=2)
        weighted = batch.weights > 0
        assert np.array_equal(at[weighted] + 1, batch.targets[weighted])  # a token is predicted from the one before
        targets = np.concatenate([examples[i].tokens[1:][examples[i].trained[1:]] for i in chosen])
        assert sorted(batch.targets[weighted]) == sorted(targets)
        assert batch.tokens.shape[2] == plan.shape(step).length
        rows = (leaf.reshape(-1, leaf.shape[2]) for leaf in (batch.tokens, batch.segments))
        for row, segments in zip(*rows, strict=True):
            for segment in set(segments) - {0}:
                assert len(set(row[segments == segment] // 1000)) == 1  # one segment, one example
        seen += list(chosen)
    assert sorted(seen) == list(range(61))


def test_order_is_a_pure_function_of_seed_and_step():
    def plan(seed):
        return batches.plan_batches(
            make_examples(10),
            batch_size=4,
            micro_batches=1,
            devices=1,
            steps=9,
            seed=seed,
            linear_cost=3000.0,
        )

    one, two, other = plan(1), plan(1), plan(2)
    assert all(np.array_equal(a, b) for a, b in zip(one[7], two[7], strict=True))
    assert [list(one.chosen(s)) for s in range(3)] != [
        list(one.chosen(s)) for s in range(3, 6)
    ]  # a new order each epoch
    assert [list(one.chosen(s)) for s in range(3)] != [list(other.chosen(s)) for s in range(3)]
    # fixed for ever: a checkpoint of today resumes on the same examples under any NumPy
    assert batches.order(8, 0, 0).tolist() == [3, 7, 4, 0, 2, 6, 5, 1]


def test_shapes_leave_the_least_padding():
    needs = np.array([[100, 10]] * 5 + [[104, 12]] * 5 + [[200, 50]] * 2 + [[396, 90], [400, 20]])
    assert batches.choose_shapes(needs, 3) == ((112, 16), (208, 64), (400, 96))
    assert batches.choose_shapes(needs, 1) == ((400, 96),)


@pytest.mark.parametrize("name", ["law_train_en", "law_train"])
def test_padding_of_the_sample_data_is_small(tokenizer, name):
    rows = formats.read_conversations(str(ROOT / "data" / name), "train_data_dir")
    examples = [encode(tokenizer, row) for row in rows]
    plan = batches.plan_batches(
        examples, batch_size=4, micro_batches=1, devices=1, steps=150, seed=0, linear_cost=3000.0
    )
    laid = [plan[step].segments for step in range(150)]
    padding = sum((s == 0).sum() for s in laid) / sum(s.size for s in laid)
    assert 0 < padding < 0.08 and len(plan.shapes) <= 4 and len({s.shape for s in laid}) == len(plan.shapes)


def test_prepared_sizes_are_the_examples_own_and_lay_the_same_batches(tokenizer, tmp_path):
    rows = [Conversation((Message("user", f"第{i}?" * i), PAIR[1]), f"rows.txt:{i}") for i in range(1, 20)]
    examples = [encode(tokenizer, row) for row in rows]
    stored = prepared.prepare(tokenizer, END, rows, tmp_path)
    assert stored.sizes.tolist() == [[len(e.tokens), int(e.trained[1:].sum())] for e in examples]
    options = {"batch_size": 4, "micro_batches": 1, "devices": 1, "steps": 5, "seed": 0, "linear_cost": 3000.0}
    one, other = (batches.plan_batches(given, **options) for given in (stored, examples))
    assert all(np.array_equal(a, b) for step in range(5) for a, b in zip(one[step], other[step], strict=True))


class Changing:
    """Rows of which one is gone when they are read again."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        self.rows, rows = self.rows[:-1], self.rows
        return iter(rows)


def test_rows_that_get_lost_on_the_way_stop_everything(tokenizer, tmp_path):
    rows = [Conversation((Message("user", f"{i}?"), PAIR[1]), f"rows.txt:{i}") for i in range(1200)]
    with pytest.raises(UserError, match="1200 rows were read and 1199 prepared"):
        prepared.prepare(tokenizer, END, Changing(rows), tmp_path)
    assert not list(tmp_path.iterdir())
    stored = prepared.prepare(tokenizer, END, rows, tmp_path)  # several batches under way keep their order
    assert [stored[i].where for i in (0, 499, 500, 1199)] == [f"rows.txt:{i}" for i in (0, 499, 500, 1199)]
    with pytest.raises(UserError, match=r"rows.txt:1100: the user's text spells"):
        rows[1100] = Conversation((Message("user", "<|im_end|>"), PAIR[1]), "rows.txt:1100")
        prepared.prepare(tokenizer, END, rows, tmp_path)
