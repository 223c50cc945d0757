"""Answers in the form of OpenAI's API, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from jlora.serve.engine import Token

Json = dict[str, Any]


class Answers:
    """The answers to one request, in the form that clients read.

    Args:
      model: the name that the request gave.
      chat: whether they are turns of a conversation, not continuations of a text.
      alternatives: how many likely tokens to list beside each token; None: no log-probabilities.
    """

    def __init__(self, tokenizer: Any, model: str, *, chat: bool, alternatives: int | None) -> None:
        self._tokenizer, self._chat, self._alternatives = tokenizer, chat, alternatives
        self._kind = "chat.completion" if chat else "text_completion"
        name = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        """Returns all answers."""
        return {**self._head, "object": self._kind, "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        """Returns a part of a stream: new pieces of answers, or the usage at the end."""
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": list(choices), "usage": usage}

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> Json:
        """Returns one complete answer."""
        content: Json = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._choice(index, content, tokens, finish)

    def opening(self, index: int) -> Json:
        """Returns the first piece of an answer, without text."""
        return self._choice(
            index, {"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""}, (), None
        )

    def piece(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> Json:
        """Returns a piece of an answer."""
        content: Json = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return self._choice(index, content, tokens, finish)

    def _choice(self, index: int, content: Json, tokens: Sequence[Token], finish: str | None) -> Json:
        logprobs = None if self._alternatives is None else self._logprobs(tokens, self._alternatives)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token], count: int) -> Json:
        if self._chat:
            return {
                "content": [
                    {
                        **self._entry(token.id, token.logprob),
                        "top_logprobs": [self._entry(*pair) for pair in token.alternatives[:count]],
                    }
                    for token in tokens
                ]
            }
        texts = [self._tokenizer.decode([token.id]) for token in tokens]
        likely = [{self._tokenizer.decode([id]): log for id, log in token.alternatives[:count]} for token in tokens]
        return {"tokens": texts, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": likely}

    def _entry(self, token: int, logprob: float | None) -> Json:
        text = self._tokenizer.decode([token])
        # A token may be a part of a character's bytes.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def usage(prompt: int, reused: int, answer: int) -> Json:
    """Returns how many tokens a request had; `reused` of the prompt were computed for an earlier request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def event(content: Json) -> str:
    """Returns an event of a stream (server-sent events)."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error(message: str, status: int, code: str | None = None) -> Json:
    """Returns an error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
