"""Output rules: they replace or refuse text in answers, however the answer is cut into pieces."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.common.errors import UserError
from jlora.serve.output_rules import filtered, read_rules

PARTITION_RULES = """\
- replace: '\\b[0-9]{4,}\\b'
  with: '[number]'
- replace: 'Article (1|2)'
  with: 'an article \\1'
"""
REFUSAL = "- refuse: '(?is)promise.*win'\n  say: I cannot say.\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["Article ", "1", "23", "4567", " ", "\n", "Pro", "mise ", "you w", "in", "胜"])))
def test_output_rules_do_not_depend_on_how_the_answer_is_cut(tmp_path_factory, pieces):
    file = tmp_path_factory.getbasetemp() / "rules.yaml"
    whole = "".join(pieces)
    for text in (PARTITION_RULES, REFUSAL + PARTITION_RULES):
        file.write_text(text)
        rules = read_rules(file)
        shown = "".join(filtered(pieces, rules))
        assert shown == "".join(filtered([whole], rules)) == "".join(filtered(whole, rules))
        if "refuse" in text and re.search("(?is)promise.*win", whole):
            assert shown == "I cannot say."
        else:
            want = re.sub(r"\b[0-9]{4,}\b", "[number]", whole)
            assert shown == re.sub("Article (1|2)", lambda _: "an article \\1", want)


def test_rules_show_complete_lines_and_hide_refused_answers(tmp_path):
    (tmp_path / "rules.yaml").write_text(PARTITION_RULES)
    seen = []

    def pieces():
        for piece in ["No 12", "345.\nYes", " 67", "8"]:
            yield piece
            seen.append((piece, "".join(shown)))

    shown: list[str] = []
    for piece in filtered(pieces(), read_rules(tmp_path / "rules.yaml")):
        shown.append(piece)
    assert seen == [
        ("No 12", ""),
        ("345.\nYes", "No [number].\n"),
        (" 67", "No [number].\n"),
        ("8", "No [number].\n"),
    ]
    assert "".join(shown) == "No [number].\nYes 678"
    (tmp_path / "refusal.yaml").write_text(REFUSAL)
    parts = list(filtered(iter(["I pro", "mise\n", "a w", "in."]), read_rules(tmp_path / "refusal.yaml")))
    assert parts == ["I cannot say."]
    assert list(filtered(["a", "b"], ())) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replace: x", "Expected a list of rules"),
        ("", "Expected a list of rules"),
        ("- [", "cannot be read"),
        pytest.param("- " * 3000, "cannot be read: it is nested too deeply", id="deep"),
        ("- replace: x", "Rule 1: Expected `refuse` and `say`, or `replace` and `with`"),
        ("- replace: x\n  say: y", "Rule 1: Expected `refuse` and `say`"),
        ("- refuse: 5\n  say: y", "Expected strings in quotes for refuse and say, found {'refuse': 5"),
        ("- refuse: '('\n  say: y", "Rule 1: '\\(' is not a valid regular expression"),
        ("- refuse: 'x*'\n  say: y", "'x\\*' matches the empty string"),
        ("- nothing\n- refuse: '('\n  say: y", "contains 2 invalid rules"),
    ],
)
def test_invalid_rules_are_reported(tmp_path, text, message):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rules(tmp_path / "rules.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_rules(tmp_path / "none.yaml")


def test_a_slow_pattern_is_stopped(tmp_path):
    (tmp_path / "rules.yaml").write_text("- refuse: '((.|..)+)+[A-Z]'\n  say: 'no'\n")
    rules = read_rules(tmp_path / "rules.yaml")
    with pytest.raises(UserError, match="takes more than 2 s to match"):
        list(filtered(["it is a long answer " * 20], rules))
