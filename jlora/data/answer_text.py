"""Conversations to the texts that are trained on, with the characters of each trained answer, for any chat template.

The template needs no changes. Each conversation is rendered up to each answer, without it as it is served, and with it.
What the answer adds to the served prompt is trained. If the template changes earlier turns when it goes on (as those
that remove reasoning do), each answer gets a text of its own, which starts with exactly the served prompt.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jlora.common.errors import UserError
from jlora.data.chat_template import Chat, render_chat, text_closing, text_opening
from jlora.data.conversation import Conversation, Message

OPEN, EMPTY, START = (re.compile(p) for p in (r"<think>\s*$", r"<think>\s*</think>\s*$", r"<think>\s*"))
OTHER = Message("assistant", "\u2042 Another answer.")  # differs from any answer in its first character


class AnswerSpan(NamedTuple):
    """Character offsets of one answer in a text, and the weight of its loss."""

    start: int  # the end of the prompt
    words_end: int  # the end of the answer's own words
    end: int  # the end of the assistant's turn
    weight: float


class AnswerText(NamedTuple):
    """A text with its trained answers; without any, all of it is trained."""

    text: str
    spans: list[AnswerSpan]


class _Turn(NamedTuple):
    """An answer, the prompt that the served model would receive, and what the template makes of both."""

    chat: Chat  # up to the answer
    prompt: str
    rendered: str
    where: str

    @property
    def answer(self) -> Message:
        return self.chat.messages[-1]


def answer_texts(
    tokenizer: Any, ends: frozenset[int], conversations: Sequence[Conversation], train_on: str
) -> list[list[AnswerText]]:
    """Returns the texts of each conversation: one, or one for each answer if the template changes earlier turns.

    Args:
      ends, train_on: as in `encode_conversations`.

    Raises:
      TemplateError: the template does not accept a conversation.
      UserError: what the template makes of an answer does not start with the served prompt, or lacks the answer.
    """
    rows = [c for c in conversations if not c.plain]
    _check_thinking(tokenizer, rows)
    whole = [Chat(c.messages, c.tools, c.reasons) for c in rows]
    upto = [_up_to_answers(chat, train_on) for chat in whole]
    answers = [chat for some in upto for chat in some]
    questions = [chat._replace(messages=chat.messages[:-1]) for chat in answers]
    inner = [chat for all_of, some in zip(whole, upto, strict=True) for chat in some if chat != all_of]
    texts = iter(render_chat(tokenizer, whole, prompt=False))
    prompts = iter(render_chat(tokenizer, questions, prompt=True))
    earlier = iter(render_chat(tokenizer, inner, prompt=False))
    chats = iter(zip(whole, upto, strict=True))
    made: list[list[AnswerText]] = []
    for c in conversations:
        if c.plain:
            text = text_opening(tokenizer) + c.messages[0].content + text_closing(tokenizer, ends)
            made.append([AnswerText(text, [])])
            continue
        (all_of, some), text = next(chats), next(texts)
        turns = [_Turn(chat, next(prompts), text if chat == all_of else next(earlier), c.where) for chat in some]
        made.append(_split(tokenizer, text, turns, train_on))
    return made


def _up_to_answers(chat: Chat, train_on: str) -> list[Chat]:
    """Returns the chat up to each trained answer; with "all" too, the last one, so that its end token is checked.

    An answer without reasoning is rendered for a model that was told not to reason, if the template has that switch, so
    that the prompt holds what stands for no reasoning, and nobody trains on it.
    """
    answers = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    wanted = [i for i in (answers if train_on == "assistant" else answers[-1:]) if chat.messages[i].weight]
    return [chat._replace(messages=chat.messages[: i + 1], thinking=bool(chat.messages[i].thoughts[0])) for i in wanted]


def _check_thinking(tokenizer: Any, rows: Sequence[Conversation]) -> None:
    wrong = next((row for row in rows if row.reasons), None)
    if wrong and getattr(tokenizer, "thinking", None) is False:
        raise UserError(
            f"{wrong.where}: The answer has reasoning, but enable_thinking=false. Set enable_thinking=auto, or remove "
            "the reasoning."
        )


def _split(tokenizer: Any, text: str, turns: list[_Turn], train_on: str) -> list[AnswerText]:
    """Returns one text with all answers if it holds each of them right after its served prompt, else one for each."""
    spans = []
    for turn in turns:
        end = _words_end(turn.answer, turn.rendered, len(turn.prompt))
        if end and turn.rendered.startswith(turn.prompt) and text.startswith(turn.rendered):
            spans.append(AnswerSpan(len(turn.prompt), end, len(turn.rendered), turn.answer.weight))
    if len(spans) == len(turns):
        return [AnswerText(text, spans)]
    if train_on == "all":
        raise UserError(f"{turns[0].where}: {_parting(turns[-1])}, so train_on=all cannot train it. Remove train_on.")
    return [_text_of(tokenizer, turn) for turn in turns]


def _text_of(tokenizer: Any, turn: _Turn) -> AnswerText:
    """Returns the served prompt with what the model must answer to it."""
    added = _added(tokenizer, turn)
    if added is None:
        raise UserError(f"{turn.where}: {_parting(turn)}. {_advice(tokenizer, turn)}")
    text = turn.prompt + added
    end = _words_end(turn.answer, text, len(turn.prompt))
    if not end:
        thought, words = turn.answer.thoughts
        raise UserError(
            f"{turn.where}: The chat template rewrites the answer, so the model would learn different text. Expected "
            f"{(thought or words)[:60]!r}, rendered {added[:60]!r}. Fix the template, or set chat_template."
        )
    return AnswerText(text, [AnswerSpan(len(turn.prompt), end, len(text), turn.answer.weight)])


def _added(tokenizer: Any, turn: _Turn) -> str | None:
    """Returns what the model must answer to the served prompt, with reasoning that the template would cut out; None if
    the template's text does not show it."""
    thought = turn.answer.thoughts[0]
    opened = OPEN.search(turn.prompt)
    prompt = turn.prompt[: opened.start()] if opened else turn.prompt
    if turn.rendered.startswith(turn.prompt):
        added, opened = turn.rendered[len(turn.prompt) :], None
    elif turn.rendered.startswith(prompt):
        added = turn.rendered[len(prompt) :]
    else:
        earlier = turn.chat.messages[:-1]
        (other,) = render_chat(tokenizer, [turn.chat._replace(messages=(*earlier, OTHER))], prompt=False)
        start = _answer_start(prompt, turn.rendered[: _shared(turn.rendered, other)], earlier[-1].content)
        if start is None:
            return None
        added = turn.rendered[start:]
    if opened and (start_of := START.match(added)):  # the prompt has this already
        return added[start_of.end() :]
    if opened:
        return f"{thought}\n</think>\n\n{added}"
    return added if not thought or thought in added else f"<think>\n{thought}\n</think>\n\n{added}"


def _answer_start(prompt: str, shared: str, last: str) -> int | None:
    """Returns where an answer starts in a rendering whose earlier turns differ from those of the prompt.

    Args:
      shared: the rendering up to where it differs from that of another answer.
      last: the content of the turn before the answer, which prompt and rendering must share.
    """
    shared = EMPTY.sub("", shared)

    def alike(end: int) -> int:
        return _shared(prompt[::-1], shared[:end][::-1])

    end = max(range(len(shared.rstrip()), len(shared) + 1), key=alike)
    return end if last in prompt[len(prompt) - alike(end) :] else None


def _shared(one: str, other: str) -> int:
    """Returns how many characters two texts have in common from their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _words_end(answer: Message, text: str, start: int) -> int:
    """Returns where the answer's own words end in a text; 0 if it lacks them, or has them in another order."""
    thought, words = answer.thoughts
    pieces = [thought, words.strip()]
    for call in answer.tool_calls:
        pieces += [call.name, *([call.arguments] if call.arguments in text else _spelled(json.loads(call.arguments)))]
    for piece in filter(None, pieces):
        found = text.find(piece, start)
        if found < 0:
            return 0
        start = found + len(piece)
    return start


def _spelled(value: Any) -> Iterator[str]:
    """Yields the keys and values of a call's arguments as JSON spells them, without quotes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_spelled(key), *_spelled(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _spelled(inner)
    else:
        spelled = json.dumps(value, ensure_ascii=False)
        yield spelled[1:-1] if isinstance(value, str) else spelled


def _parting(turn: _Turn) -> str:
    """Describes where the template's text leaves the served prompt."""
    at = _shared(turn.prompt, turn.rendered)
    begin = max(0, at - 20)
    return (
        f"The chat template writes {turn.rendered[begin : at + 40]!r} where the prompt of the served model has "
        f"{turn.prompt[begin : at + 40]!r}"
    )


def _advice(tokenizer: Any, turn: _Turn) -> str:
    """Returns a way out that works for this row."""
    first, *others = turn.chat.messages
    if first.role == "system":
        chat = turn.chat._replace(messages=tuple(others))
        (prompt,) = render_chat(tokenizer, [chat._replace(messages=chat.messages[:-1])], prompt=True)
        (rendered,) = render_chat(tokenizer, [chat], prompt=False)
        if _added(tokenizer, _Turn(chat, prompt, rendered, turn.where)) is not None:
            return "Without the system message it is right: move its text into the first question."
    return "Correct the template, or set chat_template to one that only appends turns."
