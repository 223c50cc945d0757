"""Loss masks against expected values and transformers' own masks: five templates, four kinds of tokenizer."""

import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jlora.common.errors import UserError
from jlora.data.chat_template import Chat, encode_prompt, render_chat
from jlora.data.conversation import Conversation, Message
from jlora.data.loss_mask import encode_conversation, encode_conversations
from jlora.data.tokenizer import load_tokenizer

SPECIAL = (
    "<s> </s> <unk> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
)
# The chat template of each model family.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + "
    "'\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # template, end token, and the trained text of an answer
    "llama-2": (LLAMA2, "</s>", " {} </s>"),
    "llama-3": (LLAMA3, "<|eot_id|>", "{}<|eot_id|>"),
    "chatml": (CHATML, "<|im_end|>", "{}<|im_end|>"),
    "mistral": (MISTRAL, "</s>", "{}</s>"),
    "qwen": (QWEN, "<|im_end|>", "{}<|im_end|>"),
}
WITH_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWERS = ["Under Article 47, pay.", "依据《劳动合同法》第47条，支付。", "🙂 yes\n\nno 👩‍👩‍👧", "[x] 好", "pay", "▁"]


def byte_level(*, trimmed: bool) -> Tokenizer:
    """Trains a tokenizer like those of GPT-2, Llama 3 and Qwen; with `trimmed`, offsets omit spaces, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False))
    if trimmed:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentencepiece(*, legacy: bool) -> Tokenizer:
    """Trains a tokenizer like those of Llama 2 and Mistral: no splitting before the merges, and byte fallback."""
    rough = Tokenizer(models.BPE())
    rough.pre_tokenizer = pre_tokenizers.Metaspace()
    train(rough, trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    state = json.loads(rough.to_str())["model"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in state["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    vocabulary["<unk>"] = len(vocabulary)
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def train(tokenizer, trainer):
    texts = [(ROOT / "data" / name / "train.txt").read_text() for name in ("law_train", "law_train_en")]
    tokenizer.train_from_iterator([line for text in texts for line in text.split("\n")[:300]], trainer)


KINDS = {
    "byte-level": lambda: byte_level(trimmed=False),
    "byte-level-trimmed": lambda: byte_level(trimmed=True),
    "sentencepiece": lambda: sentencepiece(legacy=True),
    "metaspace": lambda: sentencepiece(legacy=False),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A tokenizer of each kind, without a chat template."""
    backend = KINDS[request.param]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_template(tokenizer, name):
    """Sets a family's template; returns its end token ids, and a format for the trained text of an answer."""
    tokenizer.chat_template, end, trained = TEMPLATES[name]
    return frozenset([tokenizer.convert_tokens_to_ids(end)]), trained


def runs(tokenizer, example):
    """Returns the text of each run of trained tokens, and of each run of other tokens."""
    cuts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    stretches = [
        (tokenizer.decode(run), bool(example.loss_mask[at]))
        for at, run in zip([0, *cuts], np.split(example.tokens, cuts), strict=True)
    ]
    return [text for text, trained in stretches if trained], [text for text, trained in stretches if not trained]


def without_added_space(kind, text):
    """Removes the outer spaces of text if the tokenizer adds a leading space, which it drops after special tokens.

    Such a tokenizer writes a space as "▁", and so decodes a "▁" of the text as a space.
    """
    adds_space = kind.decode(kind("a", add_special_tokens=False)["input_ids"]) == " a"
    return text.replace("▁", " ").strip(" ") if adds_space else text


def conversation(*contents, system=""):
    roles = ["user", "assistant"] * len(contents)
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    return Conversation((*([Message("system", system)] if system else []), *turns), "rows.txt:1")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("system", ["", "简短。Be brief."])
def test_only_answers_and_their_end_tokens_are_trained(kind, name, answer, system):
    ends, truth = with_template(kind, name)
    if system and name == "mistral":
        with pytest.raises(UserError, match=r"rows.txt:1: .*rejects this conversation: Only user and assistant roles"):
            encode_conversation(kind, ends, conversation("q", "a", system=system))
        return
    row = conversation("pay", "first 一", "What is due? pay", answer, system=system)
    whole = kind.apply_chat_template([{"role": m.role, "content": m.content} for m in row.messages], tokenize=False)
    for train_on, expected in {"assistant": ["first 一", answer], "last": [answer]}.items():
        example = encode_conversation(kind, ends, row, train_on)
        assert example.tokens.tolist() == kind(whole, add_special_tokens=False)["input_ids"]
        trained, rest = runs(kind, example)
        assert [without_added_space(kind, text) for text in trained] == [
            without_added_space(kind, truth.format(words)) for words in expected
        ]
        assert not any(answer == text for text in rest)
        prompt = encode_prompt(kind, row.messages[:-1])
        assert example.tokens[: len(prompt)].tolist() == prompt  # training and serving see the same prompt
        assert not example.loss_mask[len(prompt) - 1] and example.loss_mask[len(prompt)]
    assert encode_conversation(kind, ends, row, "all").loss_mask.all()


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("method_class", KINDS.values(), ids=KINDS)
def test_special_tokens_may_absorb_adjacent_spaces(method_class, side):
    backend = method_class()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **{side: True}) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name in TEMPLATES:
        ends, truth = with_template(tokenizer, name)
        example = encode_conversation(tokenizer, ends, conversation("pay", "first 一", "What is due?", "pay"))
        trained, _ = runs(tokenizer, example)
        expected = [truth.format(words) for words in ("first 一", "pay")]
        assert [text.replace(" ", "") for text in trained] == [text.replace(" ", "") for text in expected]


def test_masks_equal_those_of_the_generation_tag(kind):
    kind.chat_template = WITH_GENERATION
    ends = frozenset([kind.convert_tokens_to_ids("<|im_end|>")])
    for answer in ANSWERS:
        row = conversation("问 🙂", answer, "and?", answer + "!", system="Be brief.")
        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        theirs = kind.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        ours = encode_conversation(kind, ends, row)
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.loss_mask.astype(int).tolist() == theirs["assistant_masks"]
        assert 0 < sum(theirs["assistant_masks"]) < len(ours.tokens)


# Text as readers return it: stripped, without special tokens or lone surrogates.
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).map(str.strip).filter(bool)
words = words.filter(lambda text: not any(token in text for token in SPECIAL)) | st.sampled_from(ANSWERS)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_text_is_trained_unchanged(kind, name, turns):
    ends, truth = with_template(kind, name)
    row = conversation(*[part for turn in turns for part in turn])
    try:
        example = encode_conversation(kind, ends, row)
    except UserError as error:  # rightly: the row does not start with the served prompt
        assert "become one token" in str(error)
        prompts = [encode_prompt(kind, row.messages[: 2 * i + 1]) for i in range(len(turns))]
        full = kind(
            kind.apply_chat_template([{"role": m.role, "content": m.content} for m in row.messages], tokenize=False),
            add_special_tokens=False,
        )
        assert any(full["input_ids"][: len(prompt)] != prompt for prompt in prompts)
        return
    trained, _ = runs(kind, example)
    assert [without_added_space(kind, text) for text in trained] == [
        without_added_space(kind, truth.format(answer)) for _, answer in turns
    ]


def test_encoding_a_batch_equals_encoding_each_row(kind):
    ends, _ = with_template(kind, "chatml")
    rows = [conversation("q", answer, "and?", answer) for answer in ANSWERS]
    rows.insert(2, Conversation((Message("text", "Plain 文本 🙂."),), "rows.txt:9"))
    for row, example in zip(rows, encode_conversations(kind, ends, rows, "assistant"), strict=True):
        alone = encode_conversation(kind, ends, row)
        assert np.array_equal(example.tokens, alone.tokens) and np.array_equal(example.loss_mask, alone.loss_mask)
        assert example.where == row.where


def test_plain_text_is_trained_in_full_with_an_end_token(kind):
    ends, _ = with_template(kind, "chatml")
    row = Conversation((Message("text", "第一条 Plain text 🙂.\n\nMore."),), "book.txt:1")
    example = encode_conversation(kind, ends, row)
    assert example.loss_mask.all()
    assert without_added_space(kind, kind.decode(example.tokens)) == "第一条 Plain text 🙂.\n\nMore.<|im_end|>"
    assert encode_prompt(kind, row.messages) == example.tokens[:-1].tolist()


CLOSING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CLOSING + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "assistant: ', and the start of the answer become one token",
        ),
        ("{{ bos_token + bos_token }}" + CHATML, "starts with '<s>' twice"),
        (
            "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
            "train_on=all",
        ),
    ],
)
def test_templates_that_train_the_wrong_tokens_are_rejected(kind, template, message):
    kind.chat_template = template
    ends = frozenset([kind.convert_tokens_to_ids("<|im_end|>")])
    with pytest.raises(UserError, match=rf"rows.txt:1: .*{message}"):
        encode_conversation(kind, ends, conversation("What is due?", "Under Article 47, pay."))


def test_render_equals_apply_chat_template(smollm):
    tokenizer = load_tokenizer(smollm, "")
    turns = (Message("user", "a?"), Message("assistant", "b"), Message("user", "c?"), Message("assistant", " d "))
    for messages, prompt in ((turns, False), (turns[:-1], True)):
        want = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=prompt
        )
        assert render_chat(tokenizer, [Chat(messages), Chat(messages)], prompt=prompt) == [want, want]
