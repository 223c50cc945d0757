"""Applies the chat template: conversations to text, prompts to token ids."""

import datetime
import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.data.named_templates import TEMPLATES
from jlora.data.template_forms import Forms, Turns, find_forms, turn_values

DATE_CODES = "aAbBdmyYjUwWHMSpIuGVFDe"  # of strftime
TEXT = "text"  # the role of the only message when the conversation is plain text


class TemplateError(UserError):
    """The chat template does not accept a conversation, or is broken."""


class Chat(NamedTuple):
    """What the chat template renders."""

    messages: Sequence[Message]
    tools: str = ""  # as in `Conversation`
    thinking: bool | None = None  # `enable_thinking` of templates that have this switch; None: the tokenizer's


def states_date(tokenizer: Any) -> bool:
    """Returns whether the chat template asks for today's date."""
    return "strftime_now" in str(tokenizer.chat_template)


def has_thinking_switch(tokenizer: Any) -> bool:
    """Returns whether the chat template asks whether the model shall reason before it answers."""
    return "enable_thinking" in str(tokenizer.chat_template)


def render_chat(tokenizer: Any, chats: Sequence[Chat], *, prompt: bool) -> list[str]:
    """Renders each chat with the chat template; `prompt` appends the opening of the assistant's next turn.

    Raises:
      TemplateError: the template does not accept a conversation, or is broken.
      UserError: the base model has no chat template, or the template has no place for calls of tools.
    """
    if not chats:
        return []
    if not tokenizer.chat_template:
        raise UserError(
            f"base_model={tokenizer.name_or_path} has no chat template. If it is a chat model, set chat_template to "
            f"the one it was trained with: {', '.join(TEMPLATES)}, or a Jinja file. If it is not, set "
            "chat_template=alpaca to teach it one."
        )
    forms = Forms()  # of conversations that have only roles and content
    if any(chat.tools or any(_has_parts(message) for message in chat.messages) for chat in chats):
        forms = chat_forms(tokenizer)
    alike = defaultdict(list)
    for index, chat in enumerate(chats):
        _check_parts(tokenizer, chat, forms)
        alike[chat.tools, chat.thinking].append(index)
    texts = [""] * len(chats)
    for (tools, thinking), indices in alike.items():
        turns = [turn_values(chats[index].messages, forms) for index in indices]
        for index, text in zip(indices, _render(tokenizer, turns, tools, thinking, prompt), strict=True):
            texts[index] = text
    return texts


def chat_forms(tokenizer: Any) -> Forms:
    """Returns the forms in which the chat template takes reasoning, calls and tools."""
    return _forms_of(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=4)  # finding them takes a dozen renderings, and each batch of rows asks for them
def _forms_of(tokenizer: Any, chat_template: str) -> Forms:
    return find_forms(lambda turns, tools: _render(tokenizer, [turns], tools, True, False)[0])


def _has_parts(message: Message) -> bool:
    return bool(message.tool_calls or message.thoughts[0]) or message.role == "tool"


def _check_parts(tokenizer: Any, chat: Chat, forms: Forms) -> None:
    calls = any(message.tool_calls or message.role == "tool" for message in chat.messages)
    if calls and not forms.calls:
        raise TemplateError(
            f"The chat template of base_model={tokenizer.name_or_path} has no place for calls of tools."
        )


def _render(tokenizer: Any, turns: list[Turns], tools: str, thinking: bool | None, prompt: bool) -> list[str]:
    """Renders chats with the same tools, as the tokenizer's apply_chat_template does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    thinking = getattr(tokenizer, "thinking", None) if thinking is None else thinking
    values = {} if thinking is None else {"enable_thinking": thinking}
    template = tokenizer.get_chat_template(tools=[] if tools else None)
    try:
        return list(
            render_jinja_template(
                turns,
                tools=json.loads(tools) if tools else None,
                chat_template=_date_macro(tokenizer.chat_date) + template if states_date(tokenizer) else template,
                add_generation_prompt=prompt,
                **tokenizer.special_tokens_map,
                **values,
            )[0]
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"The chat template is broken, line {error.lineno}: {error.message}.") from None
    except Exception as error:  # a template is a program: it can fail in any way
        words = str(error).strip().removesuffix(".") or type(error).__name__
        raise TemplateError(f"The chat template rejects this conversation: {words}.") from None


def _date_macro(chat_date: str) -> str:
    """Returns Jinja code that makes a template state a fixed date, YYYY-MM-DD, instead of today's."""
    day = datetime.date.fromisoformat(chat_date)
    values = {f"%{code}": day.strftime(f"%{code}") for code in DATE_CODES}
    values |= {f"%-{code}": values[f"%{code}"].lstrip("0") or "0" for code in "dmjHMSIyUW"}
    replaced = "".join(f"|replace('{code}', '{value}')" for code, value in values.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}"


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], tools: str = "", thinking: bool | None = None
) -> list[int]:
    """Returns the token ids that the served model receives: all turns and the opening of the assistant's next turn.

    Plain text gets the BOS token if the tokenizer adds one, and nothing else.
    """
    if messages[0].role == TEXT:
        return tokenizer(text_opening(tokenizer) + messages[0].content, add_special_tokens=False)["input_ids"]
    try:
        (text,) = render_chat(tokenizer, [Chat(messages, tools, thinking)], prompt=True)
    except TemplateError as error:
        raise UserError(
            f"{error} Change the turns ({', '.join(message.role for message in messages)}), or correct the template "
            f"of {tokenizer.name_or_path}."
        ) from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_opening(tokenizer: Any) -> str:
    """Returns the token that the tokenizer itself puts before plain text: its BOS token, or nothing."""
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def text_closing(tokenizer: Any, ends: frozenset[int]) -> str:
    """Returns the token that ends plain text: the EOS token if the model stops at it, else one at which it does."""
    own = tokenizer.eos_token_id
    return tokenizer.decode([own if own in ends else min(ends)]) if ends else ""
