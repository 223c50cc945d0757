"""Conversations to token ids and loss weights, which are 0 for the tokens that are not trained.

`answer_text` finds the characters of each trained answer. In tokens, these are the ones after the prompt's own
tokens, up to and including the next end token.
"""

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jlora.common.errors import UserError
from jlora.data.answer_text import AnswerSpan, answer_texts
from jlora.data.chat_template import TemplateError
from jlora.data.conversation import Conversation
from jlora.data.examples import Example


def encode_conversation(
    tokenizer: Any, ends: frozenset[int], conversation: Conversation, train_on: str = "assistant"
) -> Example:
    """Encodes one conversation, and returns the example of its last answer; see `encode_conversations`."""
    return encode_conversations(tokenizer, ends, [conversation], train_on)[-1]


def encode_conversations(
    tokenizer: Any, ends: frozenset[int], conversations: Sequence[Conversation], train_on: str
) -> list[Example]:
    """Tokenizes conversations: each to one example, or to one for each answer (see `answer_texts`).

    Args:
      ends: the token ids at which the served model stops.
      train_on: "assistant" trains every answer with its end token, "last" only the last answer, "all" every token.
        Plain text is trained in full, followed by an end token.

    Raises:
      UserError: a message contains one of the model's special tokens; or the template rejects the turns, does not
        end the assistant's turn with a token at which the model stops, merges prompt and answer into one token,
        doubles the BOS token, or leaves no token, or every token, to train.
    """
    _reject_special_tokens(tokenizer, conversations)
    for conversation in conversations:
        if train_on == "all" and any(message.weight != 1 for message in conversation.messages):
            raise UserError(
                f"{conversation.where}: An answer has a weight of its own, or is marked not to be learned, but "
                "train_on=all trains every token alike. Set train_on=assistant."
            )
    try:
        texts = answer_texts(tokenizer, ends, conversations, train_on)
    except TemplateError as error:
        if len(conversations) > 1:  # encode them one by one, to name the one that fails
            return [
                example for one in conversations for example in encode_conversations(tokenizer, ends, [one], train_on)
            ]
        advice = "Remove the row, or set chat_template to a template that takes it."
        raise UserError(f"{conversations[0].where}: {error} {advice}") from None
    pairs = [(conversation, made) for conversation, some in zip(conversations, texts, strict=True) for made in some]
    encoded = _token_ids(tokenizer, [made.text for _, made in pairs])
    locator = _AnswerLocator(tokenizer, ends)
    examples = []
    for (conversation, (text, spans)), ids in zip(pairs, encoded, strict=True):
        tokens = np.array(ids, np.int32)
        train_all = train_on == "all" or conversation.plain
        weights = np.full(len(ids), float(train_all), np.float32)
        for span, (first, last) in zip(spans, locator.find(text, spans, tokens, conversation.where), strict=True):
            weights[first : last + 1] = 1.0 if train_all else span.weight
        examples.append(Example(tokens, weights, conversation.where, conversation.source))
        _check_example(tokenizer, examples[-1], train_all)
    return examples


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokenizes texts that already contain their special tokens."""
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _reject_special_tokens(tokenizer: Any, conversations: Sequence[Conversation]) -> None:
    special = _pattern(token for token in tokenizer.added_tokens_decoder.values() if token.special)
    for conversation in conversations:
        for message in conversation.messages:
            calls = (text for call in message.tool_calls for text in (call.name, call.arguments))
            if found := special.search("\n".join((*message.thoughts, *calls))):
                raise UserError(
                    f"{conversation.where}: The {message.role}'s text contains {found[0]!r}, a special token of the "
                    "model. Remove it from the text."
                )


def _pattern(tokens: Iterable[Any]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the added tokens; without tokens it matches nothing."""
    return re.compile("|".join(re.escape(str(token)) for token in tokens) or r"(?!)")


class _AnswerLocator:
    """Locates answers among the tokens, using the end tokens, which occur in both the text and its tokens.

    The tokenizer's character offsets are not used: computing them takes a third of its time, and some tokenizers leave
    spaces out of them.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        added = tokenizer.added_tokens_decoder  # an added token is never part of a longer token
        self._tokenizer, self._end_names = tokenizer, [tokenizer.decode([token]) for token in sorted(ends)]
        self._ends = np.array([token for token in ends if token in added], np.int32)
        self._text = _pattern(added[token] for token in self._ends.tolist())
        self._openings: dict[str, list[int]] = {}

    def find(self, text: str, spans: list[AnswerSpan], tokens: np.ndarray, where: str) -> Iterator[tuple[int, int]]:
        """Yields the index of each answer's first token and of its end token."""
        if not spans:
            return
        in_text = [stop.span() for stop in self._text.finditer(text)]
        in_tokens = np.flatnonzero((tokens[:, None] == self._ends).any(1)).tolist()
        if len(in_tokens) != len(in_text):  # text and tokens disagree, so neither can locate an answer
            in_text = []
        for span in spans:
            earlier = bisect.bisect_left(in_text, (span.start, 0))
            begin, token = (in_text[earlier - 1][0], in_tokens[earlier - 1]) if earlier else (0, 0)
            opening = text[begin : span.start]
            if opening not in self._openings:
                (self._openings[opening],) = _token_ids(self._tokenizer, [opening])
            found = bisect.bisect_left(in_text, (span.words_end, 0))
            if found == len(in_text) or in_text[found][1] > span.end:
                expected = " or ".join(map(repr, self._end_names)) or "no token"
                raise UserError(
                    f"{where}: The chat template adds no end token after the answer, so the model would not learn "
                    f"when to stop. It adds {text[span.words_end : span.end]!r}; the model stops at {expected}. "
                    "Fix the template, or set chat_template."
                )
            first = token + self._opening_length(opening, tokens[token : in_tokens[found]].tolist(), where)
            yield first, in_tokens[found]

    def _opening_length(self, opening: str, ids: list[int], where: str) -> int:
        """Returns how many of the first tokens encode the opening."""
        expected = self._openings[opening]
        if ids[: len(expected)] == expected:
            return len(expected)
        agreed = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
        decode = self._tokenizer.backend_tokenizer.decode
        for count in range(agreed, len(ids) + 1):  # spaces at its end may be tokenized differently before a word
            if decode(ids[:count], skip_special_tokens=False).lstrip() == opening.lstrip():
                return count
        raise UserError(
            f"{where}: The end of the chat template's prompt, {opening[-12:]!r}, and the start of the answer become "
            "one token, which the served model would never have to predict. Remove the space at the end of the prompt."
        )


def _check_example(tokenizer: Any, example: Example, train_all: bool) -> None:
    """Rejects a doubled BOS token, and weights that are all 0 or, unless `train_all`, train everything."""
    targets = int(np.count_nonzero(example.weights[1:]))  # no token predicts the first one
    bos = tokenizer.bos_token_id
    if bos is not None and example.tokens[:2].tolist() == [bos, bos]:
        raise UserError(
            f"{example.where}: The example starts with {tokenizer.bos_token!r} twice, but a served prompt would not. "
            "Remove one from the chat template."
        )
    if not targets:
        raise UserError(
            f"{example.where}: This example has no trainable tokens. Lengthen its text, or remove train_on."
        )
    if targets == len(example.tokens) - 1 and not train_all:
        raise UserError(
            f"{example.where}: Every token of this example would be trained, including the question. Set train_on=all "
            "if this is intended."
        )
