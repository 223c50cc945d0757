"""The bodies of requests of OpenAI's API that `jlora serve` answers, and what it refuses in them.

A key that would change the answer and is not supported is refused; a key that cannot change it is ignored.
"""

from typing import Annotated, Any, Literal

import pydantic

from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.serve.sampling import ALTERNATIVES

# Keys that change no answer, with any value; of those of other servers too.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
# Keys that change nothing with these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "modalities": (["text"], None),
    "echo": (False, None),
    "suffix": ("", None),
    "best_of": (1, None),
}
Count = Annotated[int, pydantic.Field(ge=1, le=10**9)]
TokenId = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]
STOPS, STOP_LENGTH = 16, 200  # every piece of an answer is compared with all starts of all stop strings


class Part(pydantic.BaseModel):
    """A part of a message's content. Only text can be read."""

    model_config = pydantic.ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Turn(pydantic.BaseModel):
    """A message of a conversation."""

    model_config = pydantic.ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None

    def message(self) -> Message:
        """Returns the turn as the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(pydantic.BaseModel):
    """What a stream contains beside the answer."""

    include_usage: bool = False


class Body(pydantic.BaseModel):
    """What requests for chat and for plain completions have in common."""

    model_config = pydantic.ConfigDict(extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = 1.0
    seed: int | None = None
    n: Annotated[int, pydantic.Field(ge=1, le=128)] | None = 1
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @pydantic.model_validator(mode="after")
    def _refuses_what_it_cannot_do(self) -> "Body":
        for key, value in (self.model_extra or {}).items():
            if key not in IGNORED and (key not in NEUTRAL or value not in NEUTRAL[key]):
                raise ValueError(f"{key} is not supported. Remove it from the request")
        if len(self.stops) > STOPS or any(len(stop) > STOP_LENGTH for stop in self.stops):
            raise ValueError(f"stop: Expected at most {STOPS} strings of at most {STOP_LENGTH} characters")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


class ChatBody(Body):
    """A request for the next turn of a conversation."""

    messages: Annotated[list[Turn], pydantic.Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=ALTERNATIVES)] | None = None

    @property
    def limit(self) -> int | None:
        """The largest number of tokens of the answer, if it is given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to list beside each one; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """A request for the continuation of a text, or of token ids."""

    prompt: (
        str
        | Annotated[list[TokenId], pydantic.Field(min_length=1)]
        | Annotated[list[str], pydantic.Field(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, pydantic.Field(ge=0, le=ALTERNATIVES)] | None = None

    @property
    def limit(self) -> int:
        """The largest number of tokens of the answer; 16 by default, as in OpenAI's API."""
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to list beside each one; None: no log-probabilities."""
        return self.logprobs


class AdapterBody(pydantic.BaseModel):
    """A request to load or unload an adapter; the keys are those of vLLM."""

    lora_name: str
    lora_path: str = ""


class FeedbackBody(pydantic.BaseModel):
    """What a user thinks of an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")
    model: str
    messages: Annotated[list[Turn], pydantic.Field(min_length=1)]
    answer: str
    rating: Literal["up", "down"]
    better: str | None = None


def parse_body(schema: type[Any], content: bytes) -> Any:
    """Returns a body.

    Raises:
      UserError: it is not JSON, or not what the schema describes.
    """
    try:
        return schema.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {text}." if place else f"{text}.") from None
