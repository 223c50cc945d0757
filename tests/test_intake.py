"""From a config to examples: the held-out split, overlong examples, system prompts, the report, personal data."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import ROOT

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data import held_out_split, length_limit
from jlora.data.checks import pii
from jlora.data.checks.report import DataReport
from jlora.data.conversation import Conversation, Message
from jlora.data.examples import Example, SizedExamples, example_sizes
from jlora.data.readers.files import read_conversations
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.planning import data_pipeline

REGIONS = ("CN", "US")


def row(question, answer, line=1, system=""):
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation((Message("system", system), *turns) if system else turns, f"rows.txt:{line}")


def plain(text, line=1):
    return Conversation((Message("text", text),), f"rows.txt:{line}")


class InMemoryExamples(SizedExamples):
    """Examples whose tokens count up and whose second half is trained."""

    def __init__(self, *lengths):
        self.examples = [
            Example(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2, f"rows.txt:{i}")
            for i, n in enumerate(lengths, start=1)
        ]
        self.sizes = np.array([example_sizes(e.loss_mask) for e in self.examples], np.int32)
        self.prefix = min(lengths)
        self.source_names, self.sources = [""], np.zeros(len(lengths), np.int32)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def targets(examples):
    """Returns every target, as (row, token)."""
    return [(e.where, int(token)) for e in examples for token in e.tokens[1:][e.loss_mask[1:]]]


def check(examples, limit):
    """Asserts that no example is too long, and that the recorded sizes are right."""
    assert all(len(e.tokens) <= limit for e in examples)
    last = [int(np.flatnonzero(e.loss_mask)[-1]) for e in examples]
    sizes = [[len(e.tokens), int(e.loss_mask[1:].sum()), end] for e, end in zip(examples, last, strict=True)]
    assert examples.sizes.tolist() == sizes


def test_examples_that_fit_are_unchanged():
    examples = InMemoryExamples(10, 20, 30)
    for how in ("error", "drop", "truncate", "split"):
        assert length_limit.limit_length(examples, 30, how, "training") == (examples, "")


def test_overlong_examples_are_an_error_with_places_and_lengths():
    with pytest.raises(
        UserError,
        match=r"training: 2 examples are longer than max_seq_length=19 tokens: rows.txt:2 \(20\), rows.txt:3 "
        r"\(30\). Set max_seq_length=30, shorten them, or set overlong to truncate, drop or split\.",
    ):
        length_limit.limit_length(InMemoryExamples(10, 20, 30), 19, "error", "training")


def test_dropped_examples_are_counted():
    examples, said = length_limit.limit_length(InMemoryExamples(10, 50, 20, 60), 20, "drop", "training")
    assert examples.prefix == 10
    check(examples, 20)
    assert [e.where for e in examples] == ["rows.txt:1", "rows.txt:3"]
    assert "dropped 2 of 4 examples longer than 20 tokens (overlong=drop): rows.txt:2 (50), rows.txt:4" in said
    with pytest.raises(UserError, match=r"2 of 2 examples .*No examples are left. Set a larger max_seq_length"):
        length_limit.limit_length(InMemoryExamples(50, 60), 20, "drop", "training")


def test_truncated_examples_and_shortened_answers_are_counted():
    examples, said = length_limit.limit_length(InMemoryExamples(10, 30, 20, 60), 20, "truncate", "training")
    check(examples, 20)
    assert [(e.where, len(e.tokens)) for e in examples] == [("rows.txt:1", 10), ("rows.txt:2", 20), ("rows.txt:3", 20)]
    assert "truncated 2 of 4 examples longer than 20 tokens, so 1 answer lost the end" in said
    assert "and dropped 1 part without trainable tokens (overlong=truncate): " in said  # row 4, trained from token 30


@pytest.mark.parametrize("limit", [2, 3, 7, 20, 59])
def test_splitting_keeps_every_target_exactly_once(limit):
    whole = InMemoryExamples(10, 30, 1 + limit, 60)
    examples, said = length_limit.limit_length(whole, limit, "split", "training")
    assert examples.prefix == 0  # some parts begin elsewhere
    check(examples, limit)
    assert targets(examples) == targets(whole)
    long = sum(len(e.tokens) > limit for e in whole)
    parts = sum(len(whole[int(e.where[-1]) - 1].tokens) > limit for e in examples)
    assert f"split {long} of 4 examples longer than {limit} tokens into {parts} part" in said


def test_held_out_split_depends_only_on_question_and_seed():
    rows = [row(f"question {i}", "yes", i, system="") for i in range(300)]
    chosen = [r for r in rows if held_out_split.is_held_out(r, 0.1, 3)]
    assert 15 <= len(chosen) <= 45
    assert chosen != [r for r in rows if held_out_split.is_held_out(r, 0.1, 4)]
    for r in rows:  # neither the answer, nor the line, nor a system message moves a row
        other = row(r.messages[0].content, "no", 999, system="Be brief.")
        assert held_out_split.is_held_out(other, 0.1, 3) == held_out_split.is_held_out(r, 0.1, 3)
    texts = [plain(f"text {i}") for i in range(300)]
    assert 15 <= sum(held_out_split.is_held_out(r, 0.1, 3) for r in texts) <= 45


def test_overlap_of_training_and_held_out_rows_is_rejected():
    rows = [row("What is due?", "a", 1), row("And then?", "b", 2)]
    held_out_split.refuse_overlap(rows[:1], rows[1:])
    with pytest.raises(UserError, match=r"1 held-out question is also trained on.*rows.txt:9 equals rows.txt:2"):
        held_out_split.refuse_overlap(iter(rows), [row("And then?", "other", 9, system="Be brief.")])
    held_out_split.refuse_overlap([plain("one")], [plain("two")])
    with pytest.raises(UserError, match=r"rows.txt:2 equals rows.txt:1"):
        held_out_split.refuse_overlap([plain("one", 1)], [plain("one", 2)])


@pytest.fixture
def config(tmp_path):
    """Returns a function that writes text to a file and makes a config for it."""

    def make(text, **changes):
        (tmp_path / "rows.txt").write_text(text)
        return dataclasses.replace(Config(train_data_dir=str(tmp_path / "rows.txt")), **changes)

    return make


def test_system_prompt_is_added_to_rows_without_one(config):
    text = "User: a?\nLawyer: b\n\nSystem: Be kind.\nUser: c?\nLawyer: d\n"
    rows, held_out = data_pipeline.read_rows(config(text, system_prompt="Be brief."))
    assert [r.messages[0] for r in rows] == [Message("system", "Be brief."), Message("system", "Be kind.")]
    assert list(rows) == list(rows) and held_out == []  # rows can be gone through again


def test_eval_share_uses_every_row_once(config):
    text = "\n\n".join(f"User: question {i}?\nLawyer: yes {i}" for i in range(60))
    rows, held_out = data_pipeline.read_rows(config(text, eval_share=0.2))
    assert len(held_out) + len(list(rows)) == 60 and 3 < len(held_out) < 25
    for share, side in ((0.0001, "held-out"), (0.9999, "training")):
        with pytest.raises(UserError, match=f"eval_share={share} leaves no {side} rows"):
            data_pipeline.read_rows(config(text, eval_share=share))


def report_on(rows, rule="warn", amounts=False):
    report = DataReport(REGIONS, rule, amounts)
    assert list(report.inspect(rows)) == rows
    return report.lines()


@pytest.mark.parametrize("name", ["law_train", "law_train_en", "law_eval", "law_eval_en"])
def test_report_on_the_sample_data_is_empty(name):
    assert report_on(read_conversations(str(ROOT / "data" / name), "train_data_dir")) == []


def test_report_lists_each_problem_where_it_is():
    rows = read_conversations(str(ROOT / "data/law_train"), "train_data_dir")
    question, answer = (message.content for message in rows[3].messages)
    odd = [
        dataclasses.replace(rows[0], where="rows.txt:900"),
        row(rows[1].messages[0].content, rows[9].messages[1].content, 901),
        row(question + "呢", answer, 902),
        row("这样行吗？", "依据《劳动合同法》，……", 903),
        row("那样行吗？", "不行。", 904),
        row("怎么办？", "——", 905),
        row(
            "如何计算？",
            "依据《劳动合同法》第\ufffd条，按月计算，不足半年的按半个月计算，超过半年不满一年的按一年计算。",
            906,
        ),
    ]
    lines = report_on(rows + odd)
    assert lines == [
        "1 row duplicates another row, so its content counts twice: rows.txt:900 and train.txt:1",
        "1 row nearly duplicates another row: rows.txt:902 and train.txt:10",
        "1 row contradicts another row's answer to the same question: rows.txt:901 and train.txt:4",
        "1 answer has no text: rows.txt:905",
        "1 answer is unusually short: rows.txt:904",
        "205 of 207 answers start with '依据《劳动', except rows.txt:904, rows.txt:905",
        "1 row contains characters damaged by a wrong encoding: rows.txt:906",
    ]


def test_report_on_plain_text_has_no_answers():
    rows = [
        plain(f"{i} and so on, the contract goes on for quite a while and says many a thing.", i) for i in range(20)
    ]
    assert [line for line in report_on([*rows, plain("Yes.", 99)]) if "answer" in line] == []


def test_near_duplicates_are_paired_with_the_first():
    long = "the employer must pay the employee for every day of leave that was not taken before the contract ended "
    rows = [row(f"{long}{i}?", long * 3, i) for i in range(3000)]
    (line,) = report_on(rows)
    assert re.match(r"2,\d\d\d rows nearly duplicate another row: rows.txt:1 and rows.txt:0, rows.txt:2 and", line)


# Invented, with valid check digits.
PERSONAL = [
    ("EMAIL", "zhang.san@example.com"),
    ("PHONE", "13800138000"),
    ("PHONE", "+86 138 0013 8000"),
    ("PHONE", "010-62770334"),
    ("PHONE", "(212) 555-1234"),
    ("PHONE", "+44 20 7946 0958"),
    ("ID", "11010519491231002X"),
    ("ID", "219-09-9998"),
    ("ID", "X-1234567-L"),
    ("ID", "RCCMNL83S18D969H"),
    ("TAX", "91110000600037341L"),
    ("TAX", "DE136695976"),
    ("ACCOUNT", "4111 1111 1111 1111"),
    ("ACCOUNT", "6222021001116245702"),
    ("ACCOUNT", "GB82 WEST 1234 5698 7654 32"),
]
INNOCENT = [
    "依据《劳动合同法》第13800138000条，工资不得低于13800138000元",
    "2008年1月1日起施行，2012-12-28修正，20121228公布",
    "（2019）京0105民初12345号，国务院令第535号",
    "Article 2025550143 of the Law of 2007-06-29, in force since 01/01/2008",
    "$1,234,567.89 and 5550143 yuan, 10,000,000-20,000,000, 42 U.S.C. 1395-1396, Pub. L. 104-191",
    "Case No. 2019-00123456, document 202312345678, ISBN 978-7-5118-1234-5",
    "110105194912310021 与 4111 1111 1111 1112 校验位不对",
    "at @ 3 o'clock, a@b, 3.14159265358979, 192.168.100.200, 10:30-11:45",
]


@pytest.mark.parametrize(("kind", "value"), PERSONAL)
@pytest.mark.parametrize("around", ["请联系{}。", "Write to {}, please.", "{}"])
def test_personal_data_is_found_masked_and_never_quoted(kind, value, around):
    text = around.format(value)
    ((start, stop, found),) = pii.find(text, REGIONS)
    assert (text[start:stop], found) == (value, kind)
    given = row(f"Q {text}?", f"First [x], {text} and {text}", 7)
    masked = pii.mask(given, REGIONS)
    replaced = around.format(f"[{kind}_1]")
    assert [m.content for m in masked.messages] == [f"Q {replaced}?", f"First [x], {replaced} and {replaced}"]
    (line,) = report_on([given])
    assert "1 row contains personal data" in line and "rows.txt:7" in line and value not in line
    with pytest.raises(UserError, match=r"1 row contains personal data .*rows.txt:7.*pii=mask") as refused:
        report_on([given], "error")
    assert value not in str(refused.value)
    assert report_on([given], "allow") == []
    assert "Placeholders replace it (pii=mask)" in report_on([masked], "mask")[0]


@pytest.mark.parametrize("text", INNOCENT)
def test_numbers_in_legal_text_are_not_personal_data(text):
    assert pii.find(text, REGIONS) == []


def test_placeholders_are_numbered_within_a_row():
    text = "13800138000, a@b.cn, 13900139000, A@B.cn, 138-0013-8000"
    masked = pii.mask(row(text, "call 13900139000"), REGIONS)
    assert masked.messages[0].content == "[PHONE_1], [EMAIL_1], [PHONE_2], [EMAIL_1], [PHONE_1]"
    assert masked.messages[1].content == "call [PHONE_2]"


def test_amounts_are_found_on_request():
    text = "工资5000元、$1,200.50、3万元，and 40 yuan, Article 47"
    assert pii.find(text, REGIONS) == []
    assert [text[a:b] for a, b, _ in pii.find(text, REGIONS, amounts=True)] == [
        "5000元",
        "$1,200.50",
        "3万元",
        "40 yuan",
    ]


def test_training_uses_masked_rows(config, capsys):
    text = "User: Whom do I call?\nLawyer: Under Article 1, 13800138000.\n"
    rows, _ = data_pipeline.read_rows(config(text, pii="mask"))
    assert next(iter(rows)).messages[-1].content == "Under Article 1, [PHONE_1]."
    said = capsys.readouterr().out
    assert (
        "training: 1 row contains personal data (phone number in 1): rows.txt:1" in said and "13800138000" not in said
    )
    rows, _ = data_pipeline.read_rows(config(text))
    assert "13800138000" in next(iter(rows)).messages[-1].content
    assert "13800138000" not in capsys.readouterr().out


@pytest.mark.parametrize(("opening", "differs"), [("Answer:\n", False), ("Answer:\n\n", True)])
def test_prompts_tokenized_differently_when_served_are_reported(
    config, tmp_path, smollm, monkeypatch, opening, differs
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # two line ends are one token, but not before a word
    turn = "{{ m.content }}\n{% else %}" + opening + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    asked = "{% if add_generation_prompt %}" + opening + "{% endif %}"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{% if m.role == 'user' %}" + turn + asked)
    tokenizer = load_tokenizer(smollm, str(tmp_path / "own.jinja"))
    made = config("User: a?\nLawyer: Under Article 2, yes.\n")
    said = []
    rows, _ = data_pipeline.read_rows(made, said.append)
    data_pipeline.read_examples(made, tokenizer, end_tokens(smollm, tokenizer), rows, "training", 49152, said.append)
    assert any("The tokens before an answer depend on the answer (" in line for line in said) == differs
