"""Conversations -> token ids and loss mask, through the model's own chat template.

The mask needs no change to the template: the conversation is rendered up to each assistant turn without and with the
answer; the characters that were added, up to the end token, are trained. They are the tokens between those of the
prompt alone and the end token that stands after them in the text.
"""

import bisect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jlora.common.errors import UserError
from jlora.data.conversation import Conversation, Message
from jlora.data.templates import TEMPLATES, find_template

TEXT = "text"  # the role of a conversation's only message when it is plain text


class Example(NamedTuple):
    """One conversation as the model sees it."""

    tokens: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: is this token a target of the loss?
    where: str  # file:line


class Measured(Sequence[Example]):
    """Examples whose sizes are known without reading them."""

    sizes: np.ndarray  # [N, 3] int32: of each example, what `sizes_of` says
    prefix: int  # tokens that all of them begin with


def sizes_of(trained: np.ndarray) -> tuple[int, int, int]:
    """An example's tokens, targets, and places in a row: the last target and what follows it are read by nothing."""
    targets = np.flatnonzero(trained[1:])  # nothing predicts a first token
    return len(trained), len(targets), int(targets[-1]) + 1 if len(targets) else 1


def common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The tokens that both begin with."""
    length = min(len(some), len(others))
    same = some[:length] == others[:length]
    return some[: length if same.all() else int(np.argmin(same))]


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
    tokenizer("")  # from then on it neither cuts off nor pads, also where its file says so
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
    encoded = _ids(tokenizer, [text for text, _ in rendered])
    stops = _Stops(tokenizer, ends)
    examples = []
    for conversation, (text, spans), ids in zip(conversations, rendered, encoded, strict=True):
        tokens = np.array(ids, np.int32)
        whole = train_on == "all" or conversation.plain
        trained = np.full(len(ids), whole)
        for first, last in stops.answers(text, spans, tokens, conversation.where):
            trained[first : last + 1] = True
        examples.append(Example(tokens, trained, conversation.where))
        _gate(tokenizer, examples[-1], whole)
    return examples


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text as it is: none added, none cut off."""
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class _Span(NamedTuple):
    """Characters of one answer in a rendered conversation."""

    start: int  # where the prompt ends
    said: int  # where the answer's words end
    end: int  # where its turn ends


def _refuse_markup(tokenizer: Any, conversations: Sequence[Conversation]) -> None:
    markup = _pattern(token for token in tokenizer.added_tokens_decoder.values() if token.special)
    for conversation in conversations:
        for message in conversation.messages:
            if spelled := markup.search(message.content):
                raise UserError(
                    f"{conversation.where}: the {message.role}'s text spells {spelled[0]!r}, which is markup of the "
                    "model"
                )


def _pattern(tokens: Iterable[Any]) -> re.Pattern[str]:
    """Finds any of some added tokens in a text; of none, nothing."""
    return re.compile("|".join(re.escape(str(token)) for token in tokens) or r"(?!)")


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


class _Stops:
    """The tokens at which the model stops, in a text and among its tokens: the answers are found by them.

    Offsets, which would say it too, cost a third of the tokenizer's time and leave blanks out as some please.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        added = tokenizer.added_tokens_decoder  # tokens that no word can be part of
        self._tokenizer, self._named = tokenizer, [tokenizer.decode([token]) for token in sorted(ends)]
        self._ends = np.array([token for token in ends if token in added], np.int32)
        self._text = _pattern(added[token] for token in self._ends.tolist())
        self._openings: dict[str, list[int]] = {}

    def answers(self, text: str, spans: list[_Span], tokens: np.ndarray, where: str) -> Iterator[tuple[int, int]]:
        """The first token of each answer, and the token that ends it."""
        if not spans:
            return
        spelled = [stop.span() for stop in self._text.finditer(text)]
        places = np.flatnonzero((tokens[:, None] == self._ends).any(1)).tolist()
        if len(places) != len(spelled):  # the tokenizer reads them otherwise: none can be relied on
            spelled = []
        for span in spans:
            earlier = bisect.bisect_left(spelled, (span.start, 0))
            begin, token = (spelled[earlier - 1][0], places[earlier - 1]) if earlier else (0, 0)
            opening = text[begin : span.start]
            if opening not in self._openings:
                (self._openings[opening],) = _ids(self._tokenizer, [opening])
            found = bisect.bisect_left(spelled, (span.said, 0))
            if found == len(spelled) or spelled[found][1] > span.end:
                named = ", ".join(map(repr, self._named)) or "no token"
                raise UserError(
                    f"{where}: the model's chat template puts no end token after the answer (it puts "
                    f"{text[span.said : span.end]!r}; the model stops at {named}), so the tuned model would not know "
                    "when to stop"
                )
            yield self._first(opening, tokens[token : places[found]].tolist(), where) + token, places[found]

    def _first(self, opening: str, ids: list[int], where: str) -> int:
        """How many of the first tokens are the opening."""
        expected = self._openings[opening]
        if ids[: len(expected)] == expected:
            return len(expected)
        agreed = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
        decode = self._tokenizer.backend_tokenizer.decode
        for count in range(agreed, len(ids) + 1):  # its last blanks may be other tokens where words follow
            if decode(ids[:count], skip_special_tokens=False).lstrip() == opening.lstrip():
                return count
        raise UserError(
            f"{where}: the end of the chat template's prompt, {opening[-12:]!r}, and the beginning of the answer "
            "become one token, so the served model would never be asked for it; let the prompt end without a space"
        )


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
