"""Conversations -> token ids and loss mask, through the model's own chat template.

The mask needs no change to the template: the conversation is rendered up to each assistant turn without and with the
answer; the characters that were added, up to the end token, are trained; offsets carry them over to tokens.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import AutoTokenizer

from jlora.data.formats import Conversation, Message
from jlora.data.templates import TEMPLATES, find_template
from jlora.errors import UserError


class Example(NamedTuple):
    """One conversation as the model sees it."""

    tokens: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: is this token a target of the loss?
    where: str  # file:line


def load_tokenizer(directory: Path, chat_template: str) -> Any:
    """The base's fast tokenizer with its chat template.

    Args:
      chat_template: a name in templates.py or a file, to be used instead of the base's own; "" is its own.

    Raises:
      UserError: it cannot be read, or there is no chat template.
    """
    alone = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    if alone and (missing := [name for name in ("sentencepiece", "google.protobuf") if not find_spec(name)]):
        raise UserError(
            f"base_model {directory}: its tokenizer is a sentencepiece model (tokenizer.model) alone, which "
            f"{' and '.join(missing)} can read: pip install sentencepiece protobuf"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"base_model {directory}: its tokenizer cannot be read: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"base_model {directory}: expected a fast tokenizer (tokenizer.json)")
    if chat_template:
        tokenizer.chat_template = find_template(chat_template)
    if not tokenizer.chat_template:
        raise UserError(
            f"base_model {directory} has no chat template. If it is a chat model, set chat_template to the form it was "
            f"trained on: {', '.join(TEMPLATES)}, or a file; if not, alpaca teaches it one"
        )
    return tokenizer


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer when the model is served: the tokenizer's, and those of generation_config.json."""
    path = directory / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def render(tokenizer: Any, messages: tuple[Message, ...], *, prompt: bool) -> str:
    """The template's text for the turns; `prompt` opens the assistant's next turn."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)


def encode_prompt(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Token ids up to where the assistant begins to speak: what the served model is given."""
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, ends: frozenset[int], conversation: Conversation) -> Example:
    """Token ids of a conversation; the assistant's words and their end token, one of `ends`, are trained.

    Raises:
      UserError: a message spells one of the model's special tokens; or the template refuses the turns, rewrites what
        went before, or does not end the assistant's turn with a token at which the model stops.
    """
    messages = conversation.messages
    markup = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for message in messages:
        if spelled := [token for token in markup if token in message.content]:
            raise UserError(
                f"{conversation.where}: the {message.role}'s text spells {spelled[0]!r}, which is markup of the model"
            )
    try:
        text = render(tokenizer, messages, prompt=False)
        spans = [
            _answer(tokenizer, messages[: i + 1], text, conversation.where)
            for i, message in enumerate(messages)
            if message.role == "assistant"
        ]
    except jinja2.TemplateError as error:
        raise UserError(f"{conversation.where}: the model's chat template refuses it: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.array(encoded["input_ids"], np.int32)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    stops = np.isin(tokens, list(ends))
    trained = np.zeros(len(tokens), bool)
    for start, said, end in spans:
        closing = np.flatnonzero(stops & (offsets[:, 0] >= said) & (offsets[:, 1] <= end))
        if not len(closing):
            named = ", ".join(repr(tokenizer.decode([token])) for token in sorted(ends)) or "no token"
            raise UserError(
                f"{conversation.where}: the model's chat template puts no end token after the answer (it puts "
                f"{text[said:end]!r}; the model stops at {named}), so the tuned model would not know when to stop"
            )
        trained[(offsets[:, 0] >= start) & (np.arange(len(tokens)) <= closing[0])] = True
    return Example(tokens, trained, conversation.where)


def _answer(tokenizer: Any, turns: tuple[Message, ...], text: str, where: str) -> tuple[int, int, int]:
    """Characters where the last turn begins, where its words end, and where its closing ends."""
    before = render(tokenizer, turns[:-1], prompt=True)
    after = render(tokenizer, turns, prompt=False)
    if not after.startswith(before) or not text.startswith(after):
        raise UserError(f"{where}: the model's chat template changes earlier turns when an answer is added")
    said = after.find(turns[-1].content.strip(), len(before))
    if said < 0:
        raise UserError(f"{where}: the model's chat template changes the answer's words")
    return len(before), said + len(turns[-1].content.strip()), len(after)
