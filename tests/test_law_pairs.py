"""The sample data: format, count, duplicates, overlap, and the same pairs in both languages."""

import difflib
import re

import pytest
from conftest import ROOT

from jlora.data.readers.files import read_conversations

LAWS = {
    "劳动合同法": ("Labor Contract Law", 98),
    "劳动合同法实施条例": ("Implementing Regulations of the Labor Contract Law", 38),
    "劳动法": ("Labor Law", 107),
}
CHINESE = re.compile(r"依据《(.+?)》第(\d+)条，.+。")
ENGLISH = re.compile(r"Under Article (\d+) of the (.+?), .+\.")


def read(name):
    """Returns question and answer of each pair."""
    rows = read_conversations(str(ROOT / "data" / name), "train_data_dir")
    assert all([m.role for m in row.messages] == ["user", "assistant"] for row in rows)
    return [(row.messages[0].content, row.messages[1].content) for row in rows]


@pytest.mark.parametrize(
    ("chinese", "english", "count"), [("law_train", "law_train_en", 200), ("law_eval", "law_eval_en", 20)]
)
def test_format_count_and_languages_agree(chinese, english, count):
    pairs = list(zip(read(chinese), read(english), strict=True))
    assert len(pairs) == count
    for (zh_question, zh_answer), (en_question, en_answer) in pairs:
        zh, en = CHINESE.fullmatch(zh_answer), ENGLISH.fullmatch(en_answer)
        assert zh and en, (zh_answer, en_answer)
        name, articles = LAWS[zh[1]]
        assert en[2] == name and en[1] == zh[2]  # the same article of the same law
        assert 1 <= int(zh[2]) <= articles
        assert zh_question.endswith("？") and en_question.endswith("?")
        assert not re.search(r"[A-Za-z]{4,}", zh_answer) and not re.search(r"[\u4e00-\u9fff]", en_answer)
        assert len(en_answer.split()) <= 45 and len(zh_answer) <= 100


def alike(one, other, ratio):
    """Whether two texts are that alike; the first ratio is a quick upper bound of the other."""
    matcher = difflib.SequenceMatcher(None, one, other)
    return matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio


@pytest.mark.parametrize("suffix", ["", "_en"])
def test_questions_are_unique_within_and_across_sets(suffix):
    train, held_out = read(f"law_train{suffix}"), read(f"law_eval{suffix}")
    questions = [question for question, _ in train + held_out]
    assert len(set(questions)) == len(questions)
    answers = [answer for _, answer in train + held_out]
    assert len(set(answers)) == len(answers)
    for question, answer in held_out:
        for other, other_answer in train:
            assert not alike(question, other, 0.85), (question, other)
            assert not alike(answer, other_answer, 0.95), (answer, other_answer)
