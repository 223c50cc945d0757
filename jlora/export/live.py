"""Compares the answers of a real server with jlora's own, for an adapter that was exported for it."""

import contextlib
import dataclasses
import json
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from jlora.common.errors import UserError, VerificationError
from jlora.serve.generator import Generator

NEW_TOKENS = 40
AGREEMENT = 0.9  # share of greedy answers that must be equal; rounding may break a tie the other way
TOLERANCE = 0.1  # largest allowed median difference of the first token's log-probability


@dataclasses.dataclass(frozen=True)
class LiveParity:
    """How closely a running server answers as jlora does."""

    server: str  # its name and version, as far as it tells
    dtype: str  # "float32" if jlora started it, else "unknown"
    questions: int
    equal_greedy_answers: int
    tokens_an_answer: int
    largest_logprob_difference: float  # of the first token of an answer
    median_logprob_difference: float
    sentence: str


def compare_live(
    url: str, model: str, dtype: str, generator: Generator, prompts: list[list[int]], questions: list[str]
) -> LiveParity:
    """Asks a server with OpenAI's completions API, greedily and by token ids, and compares its answers with jlora's.

    Args:
      url: the server's address, such as "http://127.0.0.1:8000".
      model: the adapter's name there.
      generator: the base model with this adapter, in float32.

    Raises:
      UserError: the server cannot be asked.
      VerificationError: it answers differently.
    """
    name = _name(url)
    own = generator.adapters.select(list(generator.adapters.places))
    logits = generator.next_token_logits([own] * len(prompts), prompts)
    ours = generator.generate_batch([own] * len(prompts), prompts, NEW_TOKENS)
    texts = [generator.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ours]
    theirs = [_ask(url, model, prompt) for prompt in prompts]
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    same = [text == answer for text, (answer, _) in zip(texts, theirs, strict=True)]
    differences = [
        abs(float(row.max()) - first)
        for row, (_, first), text, (answer, _) in zip(logs, theirs, texts, theirs, strict=True)
        if text[:1] == answer[:1]
    ]
    largest, median = (float(f(differences)) if differences else float("inf") for f in (np.max, np.median))
    figures = (
        f"{name} at {url}: {sum(same)} of {len(prompts)} greedy answers of {NEW_TOKENS} tokens are equal, "
        f"log-probabilities of the first token differ by at most {largest:.1e} (median {median:.1e})"
    )
    if sum(same) < AGREEMENT * len(prompts) or not median <= TOLERANCE:
        first = next((q for q, equal in zip(questions, same, strict=True) if not equal), questions[0])
        raise VerificationError(
            f"The server does not answer as the adapter was trained to. {figures}. Expected {AGREEMENT:.0%}, and a "
            f"median of {TOLERANCE:g}. The first different answer is that to {first[:60]!r}."
        )
    return LiveParity(name, dtype, len(prompts), sum(same), NEW_TOKENS, largest, median, f"Compared with {figures}")


def _ask(url: str, model: str, prompt: list[int]) -> tuple[str, float]:
    """Returns a server's greedy answer, and the log-probability of its first token."""
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    try:
        choice = _json(f"{url}/v1/completions", body)["choices"][0]
        found = choice["logprobs"]
        content = found.get("content")  # llama.cpp has the form of a chat's
        first = content[0]["logprob"] if content else found["token_logprobs"][0]
        return choice["text"].strip(), float(first)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else error
        raise UserError(f"--live {url} cannot be asked as model {model!r}: {reason}") from None


def _name(url: str) -> str:
    """Returns a server's name and version, as far as it tells them."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return f"vLLM {_json(f'{url}/version')['version']}"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return f"llama.cpp {_json(f'{url}/props')['build_info']}"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if _json(f"{url}/v1/models")["data"][0]["owned_by"] == "jlora":
            return "jlora serve"
    return "a server"


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("JLORA_LIVE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600) as reply:
        return json.load(reply)
