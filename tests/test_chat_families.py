"""Tool calls, reasoning, dates and weights: what is trained is what the model must say after the served prompt."""

import datetime
import itertools
import json

import numpy as np
import pytest
from chat_templates import ENDS, FAMILIES, HERMES, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.chat_template import Chat, chat_forms, render_chat
from jlora.data.conversation import Conversation, Message, ToolCall
from jlora.data.loss_mask import encode_conversations
from jlora.data.preview import as_text
from jlora.data.token_cache import load_or_tokenize
from jlora.data.tokenizer import load_tokenizer
from jlora.planning.data_pipeline import RowSource, fix_template_settings

DATE = "2026-11-07"
TOOLS = '[{"type": "function", "function": {"name": "stock", "parameters": {}}}]'
ARGUMENTS = '{"sku": "A7", "n": [1, 2.5], "where": {"city": "Köln"}}'
CALL = ToolCall("stock", ARGUMENTS)
SYSTEM = Message("system", "Be brief.")


def asks(text):
    return Message("user", text)


def answers(text, **parts):
    return Message("assistant", text, **parts)


def calls(*made, text="", **parts):
    return Message("assistant", text, tool_calls=made, **parts)


@pytest.fixture(scope="module")
def base(smollm):
    """The real tokenizer, with the markup of all families as special tokens."""
    tokenizer = load_tokenizer(smollm, "", DATE)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in MARKUP])
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request, base):
    return as_family(base, request.param)


def as_family(tokenizer, name):
    tokenizer.chat_template, tokenizer.bos_token = FAMILIES[name], "<s>"
    tokenizer.eos_token = ENDS.get(name, "<|im_end|>")
    return tokenizer


def encode(tokenizer, messages, tools="", train_on="assistant"):
    row = Conversation(tuple(messages), "rows:1", tools)
    return encode_conversations(tokenizer, frozenset([tokenizer.eos_token_id]), [row], train_on)


def marked(tokenizer, messages, tools=""):
    """Returns the examples of a conversation as text, with [[ ]] around what is trained."""
    return [as_text(tokenizer, example, color=False) for example in encode(tokenizer, messages, tools)]


THINK = "<|im_start|>assistant\n<think>\n"
QUESTION = "<|im_start|>user\nHow much?<|im_end|>\n"
L3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
L3_SYSTEM = "<s>" + L3.format("system", "Today Date: 07 Nov 2026\n\n")
L3_OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"
ANSWERED = [asks("How much?"), answers("Two.")]
PLAIN = {  # a question and an answer without reasoning
    "qwen3": f"{QUESTION}{THINK}\n</think>\n\n[[Two.<|im_end|>]]\n",
    "qwen3-thinking": f"{QUESTION}{THINK}[[\n</think>\n\nTwo.<|im_end|>]]\n",
    "r1": "<s><|User|>How much?<|Assistant|><think>\n[[\n</think>\n\nTwo.</s>]]",
    "mistral": "<s>[INST]How much?[/INST][[ Two.</s>]]",
    "llama31": f"{L3_SYSTEM}{L3.format('user', 'How much?')}{L3_OPENING}[[Two.<|eot_id|>]]",
    "hermes": f"{QUESTION}<|im_start|>assistant\n[[Two.<|im_end|>]]\n",
    "smollm3": "<|im_start|>system\nToday Date: 7 November 2026\n/no_think<|im_end|>\n"
    f"{QUESTION}{THINK}\n</think>\n[[Two.<|im_end|>]]\n",
}
REASONED = {  # the same, with reasoning
    "qwen3": f"{QUESTION}<|im_start|>assistant\n[[<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>]]\n",
    "qwen3-thinking": f"{QUESTION}{THINK}[[One and one.\n</think>\n\nTwo.<|im_end|>]]\n",
    "r1": "<s><|User|>How much?<|Assistant|><think>\n[[One and one.\n</think>\n\nTwo.</s>]]",
    "mistral": "<s>[INST]How much?[/INST][[ <think>\nOne and one.\n</think>\n\nTwo.</s>]]",
    "llama31": f"{L3_SYSTEM}{L3.format('user', 'How much?')}{L3_OPENING}"
    "[[<think>\nOne and one.\n</think>\n\nTwo.<|eot_id|>]]",
    "hermes": f"{QUESTION}<|im_start|>assistant\n[[<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>]]\n",
    "smollm3": "<|im_start|>system\nToday Date: 7 November 2026\n/think<|im_end|>\n"
    f"{QUESTION}<|im_start|>assistant\n[[<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>]]\n",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_what_the_model_says_after_the_served_prompt(base, name):
    tokenizer = as_family(base, name)
    assert marked(tokenizer, ANSWERED) == [PLAIN[name]]
    kept_apart = [asks("How much?"), answers("Two.", reasoning="One and one.")]
    in_the_text = [asks("How much?"), answers("<think>\nOne and one.\n</think>\n\nTwo.")]
    assert marked(tokenizer, kept_apart) == marked(tokenizer, in_the_text) == [REASONED[name]]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "r1"])
@pytest.mark.parametrize("text", ["<think>One and one.</think>Two.", "<think> One and one.\n</think>\n\n\nTwo."])
def test_reasoning_takes_the_form_of_the_template(base, name, text):
    assert marked(as_family(base, name), [asks("How much?"), answers(text)]) == [REASONED[name]]


def test_each_answer_has_its_own_text_where_the_template_removes_reasoning(base):
    two = [asks("a?"), answers("A.", reasoning="one"), asks("b?"), answers("B.")]
    first = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}A.<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n{THINK}\n</think>\n\n[[B.<|im_end|>]]\n"
    assert marked(as_family(base, "qwen3"), two) == [f"{first}[[<think>\none\n</think>\n\nA.<|im_end|>]]\n", second]
    assert len(encode(base, two, train_on="last")) == 1
    assert len(marked(as_family(base, "hermes"), two)) == 1  # nothing changes there
    with pytest.raises(UserError, match=r"rows:1: The chat template writes .* where the prompt .* train_on=all"):
        encode(as_family(base, "r1"), two, train_on="all")


def test_mistrals_system_message_is_trained_where_it_is_served(base):
    tokenizer = as_family(base, "mistral")
    assert marked(tokenizer, [SYSTEM, *ANSWERED]) == ["<s>[INST]Be brief.\n\nHow much?[/INST][[ Two.</s>]]"]
    both = marked(tokenizer, [SYSTEM, asks("a?"), answers("A."), asks("b?"), answers("B.")])
    assert both == [
        "<s>[INST]Be brief.\n\na?[/INST][[ A.</s>]]",
        "<s>[INST]a?[/INST] A.</s>[INST]Be brief.\n\nb?[/INST][[ B.</s>]]",
    ]


CALLED = [asks("How much?"), calls(CALL), Message("tool", "12"), answers("Twelve.")]
WITH_TOOLS = {
    "llama31": L3_SYSTEM
    + L3.format("user", json.dumps(json.loads(TOOLS)[0], indent=4) + "\n\nHow much?")
    + f'{L3_OPENING}[[{{"name": "stock", "parameters": {ARGUMENTS}}}<|eot_id|>]]'
    + L3.format("ipython", "12")
    + f"{L3_OPENING}[[Twelve.<|eot_id|>]]",
    "hermes": '<|im_start|>system\nYou may call: <tools>{"name": "stock", "parameters": {}}</tools><|im_end|>\n'
    f'{QUESTION}<|im_start|>assistant\n[[<tool_call>\n{{"name": "stock", "arguments": {ARGUMENTS}}}\n</tool_call>'
    "<|im_end|>]]\n<|im_start|>tool\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n[[Twelve.<|im_end|>]]\n",
}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_trained_and_results_are_not(base, name):
    assert marked(as_family(base, name), CALLED, TOOLS) == [WITH_TOOLS[name]]


def test_calls_of_templates_that_change_earlier_turns(base):
    called, answered = marked(as_family(base, "qwen3"), CALLED, TOOLS)
    call = f'<tool_call>\n{{"name": "stock", "arguments": {ARGUMENTS}}}\n</tool_call>'
    assert called.endswith(f"{QUESTION}{THINK}\n</think>\n\n[[{call}<|im_end|>]]\n")
    result = "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    assert answered.endswith(f"assistant\n{call}<|im_end|>\n{result}{THINK}\n</think>\n\n[[Twelve.<|im_end|>]]\n")
    called, answered = marked(as_family(base, "mistral"), [SYSTEM, *CALLED], TOOLS)
    call = f'[TOOL_CALLS][{{"name": "stock", "arguments": {ARGUMENTS}, "id": "call00000"}}]</s>'
    assert called == f"<s>[AVAILABLE_TOOLS]{TOOLS}[/AVAILABLE_TOOLS][INST]Be brief.\n\nHow much?[/INST][[{call}]]"
    result = '[TOOL_RESULTS]{"content": "12", "call_id": "call00000"}[/TOOL_RESULTS]'
    assert (
        answered == f"<s>[AVAILABLE_TOOLS]{TOOLS}[/AVAILABLE_TOOLS][INST]How much?[/INST]{call}{result}[[ Twelve.</s>]]"
    )
    called, answered = marked(as_family(base, "r1"), CALLED)
    call = f"<|call|>stock\n```json\n{ARGUMENTS}\n```</s>"
    assert called == f"<s><|User|>How much?<|Assistant|><think>\n[[\n</think>\n\n{call}]]"
    assert answered == f"<s><|User|>How much?<|Assistant|>{call}<|output|>12<|end_output|>[[Twelve.</s>]]"


def test_several_calls_keep_the_order_of_their_results(base):
    ids = ("abcdefghi", "x")  # only the first has a form that the template takes
    messages = [
        asks("Both?"),
        calls(CALL._replace(id=ids[0]), ToolCall("price", "{}", ids[1])),
        Message("tool", "9 EUR", call_id=ids[1]),
        Message("tool", "12", call_id=ids[0]),
        answers("Twelve, at 9 EUR."),
    ]
    text = marked(as_family(base, "mistral"), messages)[-1]
    first, second = '{"content": "9 EUR", "call_id": "call00001"}', '{"content": "12", "call_id": "abcdefghi"}'
    assert text.index(first) < text.index(second)
    with pytest.raises(UserError, match=r"rows:1: The chat template rejects this conversation: Only single tool calls"):
        encode(as_family(base, "llama31"), messages)


def test_a_template_without_calls_is_named(base):
    with pytest.raises(UserError, match=r"rows:1: The chat template of base_model=.* has no place for calls of tools"):
        encode(as_family(base, "smollm3"), CALLED)


def test_tools_without_a_place_are_left_out_and_reported(base, monkeypatch):
    as_family(base, "smollm3")
    monkeypatch.setattr(base, "thinking", None, raising=False)
    assert marked(base, ANSWERED, TOOLS) == [PLAIN["smollm3"]]  # the served prompt has no tools either
    said, rows = [], RowSource(Config(), "train_data_dir", count=3, tools=2)
    fix_template_settings(Config(), base, rows, said.append)
    assert said[-1] == "The chat template has no place for tools; the definitions in 2 rows are left out"
    monkeypatch.setattr(base, "chat_template", HERMES)
    said.clear()
    fix_template_settings(Config(), base, rows, said.append)
    assert not said


def test_the_forms_are_those_that_work(base):
    forms = {name: chat_forms(as_family(base, name)) for name in FAMILIES}
    assert {name for name in forms if not forms[name].calls} == {"smollm3"}
    assert {name for name in forms if forms[name].arguments_as_text} == {"r1"}
    assert [forms[name].reasoning for name in ("qwen3", "r1", "hermes")] == ["reasoning_content", "", "content"]


def test_a_weight_is_that_of_each_token_of_its_answer(family):
    messages = [
        asks("a?"),
        answers("A.", weight=0.25),
        asks("b?"),
        answers("B.", weight=0.0),
        asks("c?"),
        answers("C."),
    ]
    found = {}
    for example in encode(family, messages):
        for weight in set(example.weights.tolist()) - {0}:
            found[weight] = family.decode(example.tokens[example.weights == np.float32(weight)])
    assert sorted(found) == [0.25, 1] and "A." in found[0.25] and "C." in found[1]
    assert not any("B." in text for text in found.values())


def test_weights_survive_the_cache(base, tmp_path):
    tokenizer = as_family(base, "hermes")
    rows = [
        Conversation((asks("a?"), answers("A.", weight=w), asks("b?"), answers("B.", weight=v)), f"rows:{n}")
        for n, (w, v) in enumerate([(0.1, 1.0), (1.0, 1e-3), (0.0, 2.5), (1.0, 1.0)])
    ]
    ends = frozenset([tokenizer.eos_token_id])
    stored = load_or_tokenize(tokenizer, ends, rows, tmp_path)
    for one, other in zip(stored, encode_conversations(tokenizer, ends, rows, "assistant"), strict=True):
        assert np.array_equal(one.weights, other.weights) and np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("name", ["llama31", "smollm3"])
def test_the_date_is_fixed_and_not_todays(base, name, monkeypatch):
    tokenizer = as_family(base, name)
    before = render_chat(tokenizer, [Chat(ANSWERED)], prompt=False)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert render_chat(tokenizer, [Chat(ANSWERED)], prompt=False) == before


@pytest.mark.parametrize("form", ["%d %b %Y", "%-d.%-m.%y", "%A, %B %d, %Y", "%Y-%m-%d", "day %j, %Y%m%d"])
@pytest.mark.parametrize("date", [DATE, "2024-02-29", "2027-01-01"])
def test_dates_equal_pythons(base, monkeypatch, form, date):
    monkeypatch.setattr(base, "chat_template", f"{{{{ strftime_now('{form}') }}}}")
    monkeypatch.setattr(base, "chat_date", date)
    (text,) = render_chat(base, [Chat([asks("?")])], prompt=True)
    assert text == datetime.date.fromisoformat(date).strftime(form)


WITH_GENERATION = HERMES.replace(
    "{{- '<|im_start|>assistant' }}\n", "{{- '<|im_start|>assistant' }}{% generation %}"
).replace("{{- '<|im_end|>\\n' }}\n{%- else %}", "{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\n{%- else %}")


def test_masks_equal_those_of_generation_tags(base, monkeypatch):
    """The template marks its calls with generation tags, which transformers reads."""
    as_family(base, "hermes")
    monkeypatch.setattr(base, "chat_template", WITH_GENERATION)
    (ours,) = encode(base, CALLED[:2], TOOLS)
    function = {"name": CALL.name, "arguments": json.loads(CALL.arguments)}
    turns = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
    ]
    theirs = base.apply_chat_template(
        turns, tools=json.loads(TOOLS), return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.tokens.tolist() == theirs["input_ids"]
    newline = base("\n", add_special_tokens=False)["input_ids"]  # in the tags, but a part of the served prompt
    first = theirs["assistant_masks"].index(1)
    assert ours.tokens[first : first + 1].tolist() == newline
    assert ours.loss_mask.astype(int).tolist()[first + 1 :] == theirs["assistant_masks"][first + 1 :]


WORDS = st.text('abc 一é{}"\\', min_size=1, max_size=8).filter(str.strip).map(str.strip)
VALUES = st.recursive(
    WORDS | st.integers(-9, 9) | st.booleans() | st.none(), lambda v: st.lists(v, max_size=2), max_leaves=3
)


@st.composite
def conversations(draw):
    messages = draw(st.sampled_from([[], [SYSTEM]]))[:]
    for count in range(draw(st.integers(1, 3))):
        messages.append(asks(f"q{count} {draw(WORDS)}"))
        for _ in range(draw(st.integers(0, 2))):
            arguments = json.dumps(draw(st.dictionaries(WORDS, VALUES, max_size=2)), ensure_ascii=False)
            messages += [calls(ToolCall("stock", arguments)), Message("tool", f"result {draw(WORDS)}")]
        reasoning, weight = draw(st.sampled_from(["", f"thought {count}"])), draw(st.sampled_from([0.0, 0.5, 1.0]))
        messages.append(answers(f"a{count} {draw(WORDS)}", reasoning=reasoning, weight=weight))
    return messages


@pytest.mark.parametrize("name", FAMILIES)
@given(messages=conversations())
@settings(max_examples=25, deadline=None)
def test_training_text_equals_served_text_for_any_conversation(base, name, messages):
    tokenizer = as_family(base, name)
    if name == "smollm3":
        messages = [m for m in messages if m.role != "tool" and not m.tool_calls]
    if not any(m.weight for m in messages if m.role == "assistant"):
        return
    examples = encode(tokenizer, messages)
    trained = [m for m in messages if m.role == "assistant" and m.weight]
    texts = []  # of each trained answer, in order, with its weight
    for example in examples:
        edges = np.flatnonzero(np.diff(example.weights, prepend=0, append=0))
        spans = [(a, b) for a, b in itertools.pairwise(edges) if example.weights[a]]
        texts += [(tokenizer.decode(example.tokens[a:b]), example.weights[a]) for a, b in spans]
    assert len(texts) == len(trained)
    for message, (text, weight) in zip(trained, texts, strict=True):
        assert weight == message.weight and text.endswith(tokenizer.eos_token) and "result" not in text
        assert message.content in text and message.reasoning in text and ("thought" in text) == bool(message.reasoning)
    for index in (i for i, m in enumerate(messages) if m.role == "assistant" and m.weight):
        (served,) = render_chat(tokenizer, [Chat(messages[:index], "", bool(messages[index].reasoning))], prompt=True)
        assert any(tokenizer.decode(example.tokens).startswith(served) for example in examples)
