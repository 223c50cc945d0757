"""Conversations -> token ids and loss mask, through the model's own chat template.

The mask needs no change to the template: the conversation is rendered up to each assistant turn without and with the
answer; the characters that were added, up to the end token, are trained; offsets carry them over to tokens.
"""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jlora.data.conversation import Conversation, Message
from jlora.data.templates import TEMPLATES, find_template
from jlora.errors import UserError

TEXT = "text"  # the role of a conversation's only message when it is plain text


class Example(NamedTuple):
    """One conversation as the model sees it."""

    tokens: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: is this token a target of the loss?
    where: str  # file:line


class Measured(Sequence[Example]):
    """Examples whose sizes are known without reading them."""

    sizes: np.ndarray  # [N, 2] int32: tokens and targets of each example


def load_tokenizer(directory: Path, chat_template: str) -> Any:
    """The base's fast tokenizer with its chat template, where it has one: text without roles needs none.

    Args:
      chat_template: a name in templates.py or a file, to be used instead of the base's own; "" is its own.

    Raises:
      UserError: it cannot be read.
    """
    alone = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    if alone and (missing := [name for name in ("sentencepiece", "google.protobuf") if not find_spec(name)]):
        raise UserError(
            f"base_model {directory}: its tokenizer is a sentencepiece model (tokenizer.model) alone, which "
            f"{' and '.join(missing)} can read: pip install sentencepiece protobuf"
        )
    try:
        from transformers import AutoTokenizer  # here, as it imports PyTorch where that is installed

        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"base_model {directory}: its tokenizer cannot be read: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"base_model {directory}: expected a fast tokenizer (tokenizer.json)")
    if chat_template:
        tokenizer.chat_template = find_template(chat_template)
    return tokenizer


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer when the model is served: the tokenizer's, and those of generation_config.json."""
    path = directory / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def render(tokenizer: Any, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
    """The template's text for each list of turns; `prompt` opens the assistant's next turn.

    Raises:
      UserError: there is no template.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise UserError(
            f"base_model {tokenizer.name_or_path} has no chat template. If it is a chat model, set chat_template to "
            f"the form it was trained on: {', '.join(TEMPLATES)}, or a file; if not, alpaca teaches it one"
        )
    turns = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
    from transformers.utils.chat_template_utils import render_jinja_template

    # what apply_chat_template calls for turns that are plain already; here they are
    template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    return list(render_jinja_template(turns, chat_template=template, add_generation_prompt=prompt, **special)[0])


def encode_prompt(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Token ids up to where the assistant begins to speak: what the served model is given. Plain text is itself."""
    if messages[0].role == TEXT:
        return tokenizer(_opening(tokenizer) + messages[0].content, add_special_tokens=False)["input_ids"]
    (text,) = render(tokenizer, [messages], prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, ends: frozenset[int], conversation: Conversation, train_on: str = "assistant") -> Example:
    """One conversation as `encode_batch` encodes many."""
    return encode_batch(tokenizer, ends, [conversation], train_on)[0]


def encode_batch(
    tokenizer: Any, ends: frozenset[int], conversations: Sequence[Conversation], train_on: str
) -> list[Example]:
    """Token ids of conversations, and what of them is trained.

    Args:
      ends: the tokens at which the served model stops.
      train_on: "assistant" trains every answer and its end token, "last" only the last one, "all" every token.
        Plain text is trained whole, with an end token after it.

    Raises:
      UserError: a message spells one of the model's special tokens; or the template refuses the turns, rewrites what
        went before, does not end the assistant's turn with a token at which the model stops, joins prompt and answer
        in one token, doubles the BOS token, or leaves nothing, or everything, to train.
    """
    _refuse_markup(tokenizer, conversations)
    try:
        rendered = _render_all(tokenizer, ends, conversations, train_on)
    except jinja2.TemplateError as error:
        if len(conversations) > 1:  # which one is it?
            return [encode(tokenizer, ends, conversation, train_on) for conversation in conversations]
        raise UserError(f"{conversations[0].where}: the model's chat template refuses it: {error}") from None
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_attention_mask=False)
    examples = []
    for i, (conversation, (text, spans)) in enumerate(zip(conversations, rendered, strict=True)):
        ids = encoded["input_ids"][i]
        trained = np.zeros(len(ids), bool)
        for span in spans:
            first, closing = _trained(tokenizer, ends, text, span, ids, encoded[i], conversation.where)
            trained[first : closing + 1] = True
        whole = train_on == "all" or conversation.plain
        if whole:
            trained[:] = True
        example = Example(np.array(ids, np.int32), trained, conversation.where)
        _gate(tokenizer, example, whole)
        examples.append(example)
    return examples


class _Span(NamedTuple):
    """Characters of one answer in a rendered conversation."""

    start: int  # where the prompt ends
    said: int  # where the answer's words end
    end: int  # where its turn ends


def _refuse_markup(tokenizer: Any, conversations: Sequence[Conversation]) -> None:
    special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    markup = re.compile("|".join(special) or r"(?!)")
    for conversation in conversations:
        for message in conversation.messages:
            if spelled := markup.search(message.content):
                raise UserError(
                    f"{conversation.where}: the {message.role}'s text spells {spelled[0]!r}, which is markup of the "
                    "model"
                )


def _render_all(
    tokenizer: Any, ends: frozenset[int], conversations: Sequence[Conversation], train_on: str
) -> list[tuple[str, list[_Span]]]:
    """Each conversation's text, and where its trained answers stand in it."""
    chats = [c for c in conversations if not c.plain]
    whole = iter(render(tokenizer, [c.messages for c in chats], prompt=False))
    answers = [(c, i) for c in chats for i in _answers(c.messages, train_on)]
    before = iter(render(tokenizer, [c.messages[:i] for c, i in answers], prompt=True))
    earlier = [c.messages[: i + 1] for c, i in answers if i + 1 < len(c.messages)]
    after = iter(render(tokenizer, earlier, prompt=False))
    rendered: list[tuple[str, list[_Span]]] = []
    for c in conversations:
        if c.plain:
            rendered.append((_opening(tokenizer) + c.messages[0].content + _closing(tokenizer, ends), []))
            continue
        text = next(whole)
        spans = [
            _span(c, i, next(before), next(after) if i + 1 < len(c.messages) else text, text)
            for i in _answers(c.messages, train_on)
        ]
        rendered.append((text, spans))
    return rendered


def _answers(messages: Sequence[Message], train_on: str) -> list[int]:
    """Which turns are trained; with "all" the last one is still looked at, for its end token."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return answers if train_on == "assistant" else answers[-1:]


def _span(conversation: Conversation, turn: int, before: str, after: str, text: str) -> _Span:
    if not after.startswith(before) or not text.startswith(after):
        raise UserError(
            f"{conversation.where}: the model's chat template changes earlier turns when an answer is added; "
            "train_on=last trains on the last answer alone"
        )
    words = conversation.messages[turn].content.strip()
    said = after.find(words, len(before))
    if said < 0:
        raise UserError(f"{conversation.where}: the model's chat template changes the answer's words")
    return _Span(len(before), said + len(words), len(after))


def _trained(
    tokenizer: Any, ends: frozenset[int], text: str, span: _Span, ids: list[int], encoding: Any, where: str
) -> tuple[int, int]:
    """The first token of an answer, and the token that ends it."""
    first = _prompt_tokens(tokenizer, text, span.start, ids, encoding)
    if first is None:
        raise UserError(
            f"{where}: the end of the chat template's prompt, {text[: span.start][-12:]!r}, and the beginning of the "
            "answer become one token, so the served model would never be asked for it; let the prompt end without a "
            "space"
        )
    last = _token_before(encoding, span.said, span.start)
    for place in range(max(first, last or 0), len(ids)):
        begin, end = encoding.token_to_chars(place)
        if begin >= span.said and end <= span.end and ids[place] in ends:
            return first, place
    named = ", ".join(repr(tokenizer.decode([token])) for token in sorted(ends)) or "no token"
    raise UserError(
        f"{where}: the model's chat template puts no end token after the answer (it puts "
        f"{text[span.said : span.end]!r}; the model stops at {named}), so the tuned model would not know when to stop"
    )


def _prompt_tokens(tokenizer: Any, text: str, start: int, ids: list[int], encoding: Any) -> int | None:
    """How many tokens the first `start` characters are; None where a token stands on both sides."""
    token = _token_before(encoding, start, 0)
    if token is None:
        return None if start else 0
    begin, first = encoding.token_to_chars(token)[0], token + 1
    if encoding.char_to_token(start - 1) is not None:
        while first < len(ids) and encoding.token_to_chars(first)[0] < start:  # one character may be several tokens
            first += 1
        return None if encoding.token_to_chars(first - 1)[1] > start else first
    for first in range(token + 1, min(token + 1 + start - begin, len(ids)) + 1):  # offsets leave these blanks out
        if tokenizer.decode(ids[token:first]).lstrip() == text[begin:start].lstrip():
            return first
    return None


def _token_before(encoding: Any, stop: int, start: int) -> int | None:
    """The first token of the last character before `stop`, from `start` on, that is in any."""
    tokens = (encoding.char_to_token(place) for place in range(stop - 1, start - 1, -1))
    return next((token for token in tokens if token is not None), None)


def _gate(tokenizer: Any, example: Example, whole: bool) -> None:
    """What no example may be; `whole`: it is meant to be trained on every token."""
    targets = int(np.count_nonzero(example.trained[1:]))  # nothing predicts a first token
    bos = tokenizer.bos_token_id
    if bos is not None and example.tokens[:2].tolist() == [bos, bos]:
        raise UserError(
            f"{example.where}: it begins with {tokenizer.bos_token!r} twice, and a served prompt would not; remove one "
            "from the chat template"
        )
    if not targets:
        raise UserError(f"{example.where}: nothing of it would be trained on")
    if targets == len(example.tokens) - 1 and not whole:
        raise UserError(
            f"{example.where}: everything of it would be trained on, the question too; set train_on=all if it is meant"
        )


def _opening(tokenizer: Any) -> str:
    """What the tokenizer itself puts before plain text: the BOS token, or nothing."""
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _closing(tokenizer: Any, ends: frozenset[int]) -> str:
    """The token that ends plain text: the tokenizer's own where the model stops at it."""
    own = tokenizer.eos_token_id
    return tokenizer.decode([own if own in ends else min(ends)]) if ends else ""
