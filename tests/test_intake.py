"""From a config to examples: the split, over-long rows, system prompts, the report, personal data."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import ROOT

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data import length_limit, summary
from jlora.data.chat import Example, Measured, end_tokens, load_tokenizer, sizes_of
from jlora.data.checks import pii
from jlora.data.checks.report import Survey
from jlora.data.conversation import Conversation, Message
from jlora.data.readers.files import read_conversations
from jlora.planning import pipeline

REGIONS = ("CN", "US")


def row(question, answer, line=1, system=""):
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation((Message("system", system), *turns) if system else turns, f"rows.txt:{line}")


def plain(text, line=1):
    return Conversation((Message("text", text),), f"rows.txt:{line}")


class Listed(Measured):
    """Examples in memory: tokens count up, the second half is trained."""

    def __init__(self, *lengths):
        self.examples = [
            Example(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2, f"rows.txt:{i}")
            for i, n in enumerate(lengths, start=1)
        ]
        self.sizes = np.array([sizes_of(e.trained) for e in self.examples], np.int32)
        self.prefix = min(lengths)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def targets(examples):
    """Every place that is a target, as (row, token)."""
    return [(e.where, int(token)) for e in examples for token in e.tokens[1:][e.trained[1:]]]


def check(examples, limit):
    """No example is too long, and the sizes are what they say."""
    assert all(len(e.tokens) <= limit for e in examples)
    last = [int(np.flatnonzero(e.trained)[-1]) for e in examples]
    sizes = [[len(e.tokens), int(e.trained[1:].sum()), end] for e, end in zip(examples, last, strict=True)]
    assert examples.sizes.tolist() == sizes


def test_what_fits_is_left_alone():
    examples = Listed(10, 20, 30)
    for how in ("error", "drop", "truncate", "split"):
        assert length_limit.fit(examples, 30, how, "training") == (examples, "")


def test_over_long_rows_are_an_error_that_names_them_and_the_length():
    with pytest.raises(
        UserError,
        match=r"training data: 2 example\(s\) are longer than max_seq_length=19 tokens: rows.txt:2 \(20\), rows.txt:3 "
        r"\(30\). Set max_seq_length=30, shorten them, or choose overlong=truncate, drop or split",
    ):
        length_limit.fit(Listed(10, 20, 30), 19, "error", "training")


def test_dropped_rows_are_counted():
    examples, said = length_limit.fit(Listed(10, 50, 20, 60), 20, "drop", "training")
    assert examples.prefix == 10
    check(examples, 20)
    assert [e.where for e in examples] == ["rows.txt:1", "rows.txt:3"]
    assert "2 of 4 examples are longer than 20 tokens: left out (overlong=drop): rows.txt:2 (50), rows.txt:4" in said
    with pytest.raises(UserError, match=r"2 of 2 examples .*leaves nothing: set a larger max_seq_length"):
        length_limit.fit(Listed(50, 60), 20, "drop", "training")


def test_truncated_rows_are_counted_and_so_are_answers_that_lose_their_end():
    examples, said = length_limit.fit(Listed(10, 30, 20, 60), 20, "truncate", "training")
    check(examples, 20)
    assert [(e.where, len(e.tokens)) for e in examples] == [("rows.txt:1", 10), ("rows.txt:2", 20), ("rows.txt:3", 20)]
    assert "2 of 4 examples are longer than 20 tokens: cut there (overlong=truncate); 1 of their answers lose" in said
    assert "1 part(s) without anything to train on are left out" in said  # row 4: its answer begins at token 30


@pytest.mark.parametrize("limit", [2, 3, 7, 20, 59])
def test_split_rows_keep_every_target_exactly_once(limit):
    whole = Listed(10, 30, 1 + limit, 60)
    examples, said = length_limit.fit(whole, limit, "split", "training")
    assert examples.prefix == 0  # some parts begin elsewhere
    check(examples, limit)
    assert targets(examples) == targets(whole)
    long = sum(len(e.tokens) > limit for e in whole)
    parts = sum(len(whole[int(e.where[-1]) - 1].tokens) > limit for e in examples)
    assert f"{long} of 4 examples are longer than {limit} tokens: split (overlong=split) into {parts} parts" in said


def test_the_split_follows_from_question_and_seed_alone():
    rows = [row(f"question {i}", "yes", i, system="") for i in range(300)]
    chosen = [r for r in rows if summary.is_held_out(r, 0.1, 3)]
    assert 15 <= len(chosen) <= 45
    assert chosen != [r for r in rows if summary.is_held_out(r, 0.1, 4)]
    for r in rows:  # neither the answer, nor the line, nor a system message moves a row
        other = row(r.messages[0].content, "no", 999, system="Be brief.")
        assert summary.is_held_out(other, 0.1, 3) == summary.is_held_out(r, 0.1, 3)
    texts = [plain(f"text {i}") for i in range(300)]
    assert 15 <= sum(summary.is_held_out(r, 0.1, 3) for r in texts) <= 45


def test_held_out_rows_that_are_trained_on_are_refused():
    rows = [row("What is due?", "a", 1), row("And then?", "b", 2)]
    summary.refuse_overlap(rows[:1], rows[1:])
    with pytest.raises(UserError, match=r"1 held-out question\(s\) are also trained on.*rows.txt:9 is rows.txt:2"):
        summary.refuse_overlap(iter(rows), [row("And then?", "other", 9, system="Be brief.")])
    summary.refuse_overlap([plain("one")], [plain("two")])
    with pytest.raises(UserError, match=r"rows.txt:2 is rows.txt:1"):
        summary.refuse_overlap([plain("one", 1)], [plain("one", 2)])


@pytest.fixture
def config(tmp_path):
    """A config over some text; returns a function of text and changes."""

    def make(text, **changes):
        (tmp_path / "rows.txt").write_text(text)
        return dataclasses.replace(Config(train_data_dir=str(tmp_path / "rows.txt")), **changes)

    return make


def test_a_system_prompt_goes_before_rows_that_have_none(config):
    text = "User: a?\nLawyer: b\n\nSystem: Be kind.\nUser: c?\nLawyer: d\n"
    rows, held_out = pipeline.read_rows(config(text, system_prompt="Be brief."))
    assert [r.messages[0] for r in rows] == [Message("system", "Be brief."), Message("system", "Be kind.")]
    assert list(rows) == list(rows) and held_out == []  # rows can be gone through again


def test_eval_share_takes_every_row_once(config):
    text = "\n\n".join(f"User: question {i}?\nLawyer: yes {i}" for i in range(60))
    rows, held_out = pipeline.read_rows(config(text, eval_share=0.2))
    assert len(held_out) + len(list(rows)) == 60 and 3 < len(held_out) < 25
    for share, side in ((0.0001, "hold out"), (0.9999, "train on")):
        with pytest.raises(UserError, match=f"leaves nothing to {side}"):
            pipeline.read_rows(config(text, eval_share=share))


def survey(rows, rule="warn", amounts=False):
    watcher = Survey(REGIONS, rule, amounts)
    assert list(watcher.watch(rows)) == rows
    return watcher.lines()


@pytest.mark.parametrize("name", ["law_train", "law_train_en", "law_eval", "law_eval_en"])
def test_nothing_is_said_of_the_sample_data(name):
    assert survey(read_conversations(str(ROOT / "data" / name), "train_data_dir")) == []


def test_the_report_finds_each_thing_and_only_where_it_is():
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
    lines = survey(rows + odd)
    assert lines == [
        "1 row(s) stand more than once: rows.txt:900 and train.txt:1",
        "1 row(s) are nearly the same as another: rows.txt:902 and train.txt:10",
        "1 row(s) answer a question differently from another row: rows.txt:901 and train.txt:4",
        "1 answer(s) say nothing: rows.txt:905",
        "1 answer(s) are far shorter than the others: rows.txt:904",
        "205 of 207 answers begin with '依据《劳动'; not so rows.txt:904, rows.txt:905",
        "1 row(s) hold characters that a wrong encoding left behind: rows.txt:906",
    ]


def test_plain_text_has_no_answers_to_compare():
    rows = [
        plain(f"{i} and so on, the contract goes on for quite a while and says many a thing.", i) for i in range(20)
    ]
    assert [line for line in survey([*rows, plain("Yes.", 99)]) if "answer" in line] == []


def test_many_alike_rows_are_found_each_against_the_first():
    long = "the employer must pay the employee for every day of leave that was not taken before the contract ended "
    rows = [row(f"{long}{i}?", long * 3, i) for i in range(3000)]
    (line,) = survey(rows)
    assert re.match(r"2\d\d\d row\(s\) are nearly the same as another: rows.txt:1 and rows.txt:0, rows.txt:2 and", line)


# Invented, with check digits that hold.
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
def test_personal_data_is_found_masked_and_never_told(kind, value, around):
    text = around.format(value)
    ((start, stop, found),) = pii.find(text, REGIONS)
    assert (text[start:stop], found) == (value, kind)
    given = row(f"Q {text}?", f"First [x], {text} and {text}", 7)
    masked = pii.mask(given, REGIONS)
    replaced = around.format(f"[{kind}_1]")
    assert [m.content for m in masked.messages] == [f"Q {replaced}?", f"First [x], {replaced} and {replaced}"]
    (line,) = survey([given])
    assert "1 row(s) hold personal data" in line and "rows.txt:7" in line and value not in line
    with pytest.raises(UserError, match=r"1 row\(s\) hold personal data .*rows.txt:7.*pii=mask") as refused:
        survey([given], "error")
    assert value not in str(refused.value)
    assert survey([given], "allow") == []
    assert "placeholders stand in its place" in survey([masked], "mask")[0]


@pytest.mark.parametrize("text", INNOCENT)
def test_numbers_of_legal_text_are_not_personal(text):
    assert pii.find(text, REGIONS) == []


def test_placeholders_tell_one_from_another_within_a_row():
    text = "13800138000, a@b.cn, 13900139000, A@B.cn, 138-0013-8000"
    masked = pii.mask(row(text, "call 13900139000"), REGIONS)
    assert masked.messages[0].content == "[PHONE_1], [EMAIL_1], [PHONE_2], [EMAIL_1], [PHONE_1]"
    assert masked.messages[1].content == "call [PHONE_2]"


def test_amounts_are_found_where_asked():
    text = "工资5000元、$1,200.50、3万元，and 40 yuan, Article 47"
    assert pii.find(text, REGIONS) == []
    assert [text[a:b] for a, b, _ in pii.find(text, REGIONS, amounts=True)] == [
        "5000元",
        "$1,200.50",
        "3万元",
        "40 yuan",
    ]


def test_masked_rows_are_what_is_trained_on(config, capsys):
    text = "User: Whom do I call?\nLawyer: Under Article 1, 13800138000.\n"
    rows, _ = pipeline.read_rows(config(text, pii="mask"))
    assert next(iter(rows)).messages[-1].content == "Under Article 1, [PHONE_1]."
    said = capsys.readouterr().out
    assert "training: 1 row(s) hold personal data (phone number in 1): rows.txt:1" in said and "13800138000" not in said
    rows, _ = pipeline.read_rows(config(text))
    assert "13800138000" in next(iter(rows)).messages[-1].content
    assert "13800138000" not in capsys.readouterr().out


@pytest.mark.parametrize(("opening", "differs"), [("Answer:\n", False), ("Answer:\n\n", True)])
def test_a_prompt_that_is_other_tokens_when_it_is_served_is_said(
    config, tmp_path, smollm, monkeypatch, opening, differs
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # two line ends are one token, but not before a word
    turn = "{{ m.content }}\n{% else %}" + opening + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    asked = "{% if add_generation_prompt %}" + opening + "{% endif %}"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{% if m.role == 'user' %}" + turn + asked)
    tokenizer = load_tokenizer(smollm, str(tmp_path / "own.jinja"))
    made = config("User: a?\nLawyer: Under Article 2, yes.\n")
    said = []
    rows, _ = pipeline.read_rows(made, said.append)
    pipeline.read_examples(made, tokenizer, end_tokens(smollm, tokenizer), rows, "training", said.append)
    assert any("the tokens before an answer depend on the answer (" in line for line in said) == differs
