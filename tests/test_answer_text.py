"""The text of an answer does not depend on how its tokens arrive; feedback is read as training data."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_masks import SPECIAL, sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jlora.common.errors import UserError
from jlora.common.patterns import Pattern
from jlora.data.readers.files import read_conversations
from jlora.serve.answer_text import AnswerText
from jlora.serve.feedback import save_feedback
from jlora.serve.openai_bodies import FeedbackBody, parse_body
from jlora.serve.output_rules import Rule, filtered

TEXTS = [
    "Under Article 47, pay.",
    "依据《劳动合同法》，支付。",
    "🙂 yes\n\nno 👩‍👩‍👧",
    " a  b ",
    "é\u0301ü\u2028x",
    "\ufffd",
]
RULES = (Rule(Pattern("[0-9]+"), "#", False), Rule(Pattern("yes"), "no", False))
REFUSING = (*RULES, Rule(Pattern("Article"), "I cannot say.", True))


def metaspace():
    """A tokenizer like those of Llama 2 and Mistral, with bytes for what its vocabulary lacks."""
    backend = sentencepiece(legacy=True)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, smollm):
    """SmolLM2's tokenizer, and one with byte tokens."""
    return AutoTokenizer.from_pretrained(smollm) if request.param == "byte-level" else metaspace()


@st.composite
def answers(draw):
    """Numbers that stand for tokens (of texts, of parts of characters, of any kind), and where they are cut."""
    parts = draw(st.lists(st.sampled_from(TEXTS) | st.text(max_size=6) | st.integers(0, 10**6), max_size=8))
    return parts, draw(st.lists(st.integers(1, 5), max_size=12)), draw(st.booleans())


def ids_of(tokenizer, parts, torn):
    """Returns the tokens of an answer; with `torn`, every third one is missing, so that characters are incomplete."""
    ids = []
    for part in parts:
        known = (
            [part % len(tokenizer)] if isinstance(part, int) else tokenizer(part, add_special_tokens=False).input_ids
        )
        ids += known
    return [token for number, token in enumerate(ids) if number % 3 != 1] if torn else ids


def pushed(tokenizer, ids, sizes, stops=(), rules=()):
    """Returns the pieces of an answer whose tokens arrive in lists of these sizes, until it stops."""
    text, pieces, at = AnswerText(tokenizer, stops, rules), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        pieces.append(text.push(ids[at : at + size]))
        at += size
        if text.stopped:
            break
    return [*pieces, text.close()], text.stopped


@settings(max_examples=150, deadline=None)
@given(
    answers(),
    st.lists(st.sampled_from(["47", "yes", "\n\n", "。", " ", "🙂", "a  b", "\ufffd", "法》，支"]), max_size=3),
)
@example((["Under Article 47"], [], False), ["47"])  # at the very end
@example((["🙂"], [], True), [])  # a character that is never complete
@example((["🙂 yes", "<\x80"], [], False), [])  # a byte that makes the ones before it unreadable
@example((["0", "<\x80", "Under Article 47, pay."], [], True), [])
def test_pieces_join_to_the_decoded_text_up_to_a_stop_string(tokenizer, answer, stops):
    parts, sizes, torn = answer
    ids = ids_of(tokenizer, parts, torn)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    found = [at for at in map(whole.find, stops) if at >= 0]
    expected = whole[: min(found)] if found else whole
    for rules in ((), RULES, REFUSING):
        pieces, stopped = pushed(tokenizer, ids, sizes, stops, rules)
        assert "".join(pieces) == "".join(filtered([expected], rules))
        assert stopped == bool(found)


def test_whole_characters_are_passed_on_at_once_and_starts_of_stop_strings_are_not(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    ids = tokenizer("🙂 ok. The end", add_special_tokens=False).input_ids
    pieces, _ = pushed(tokenizer, ids, [], ["The endless"])
    assert [piece for piece in pieces if piece] == ["🙂", " ok", ".", " ", "The end"]
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    "rating, better, rows, pairs",
    [
        ("up", None, ["Yes."], []),
        ("down", None, [], []),
        ("down", "No — 不。\u2028 Never!", ["No — 不。\u2028 Never!"], ["Yes."]),
        ("up", "  ", ["Yes."], []),
    ],
)
def test_feedback_is_read_as_training_data(tmp_path, rating, better, rows, pairs):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Q?\n🙂"}]},
    ]
    content = json.dumps({"model": "law", "messages": turns, "answer": "Yes.", "rating": rating, "better": better})
    for _ in range(2):
        save_feedback(tmp_path / "new", parse_body(FeedbackBody, content.encode()))
    directory = tmp_path / "new"
    read = read_conversations(str(directory / "rows.jsonl"), "train_data_dir") if rows else []
    assert [[(m.role, m.content) for m in row.messages] for row in read] == [
        [("system", "Be brief."), ("user", "Q?\n🙂"), ("assistant", answer)] for answer in rows * 2
    ]
    file = directory / "pairs.jsonl"
    kept = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    assert [(row["chosen"], row["rejected"]) for row in kept] == [
        ((better or "").strip(), worse) for worse in pairs * 2
    ]


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"model": 1}', '{"model": "a", "messages": [], "answer": "", "rating": "up"}']
)
def test_feedback_that_is_not_what_the_page_sends_is_refused(body):
    with pytest.raises(UserError):
        parse_body(FeedbackBody, body.encode())
