"""Applies the chat template: conversations to text, prompts to token ids."""

from collections.abc import Sequence
from typing import Any

import jinja2

from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.data.named_templates import TEMPLATES

TEXT = "text"  # the role of the only message when the conversation is plain text


class TemplateError(UserError):
    """The chat template does not accept a conversation, or is broken."""


def render_chat(tokenizer: Any, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
    """Renders each list of turns with the chat template; `prompt` appends the opening of the assistant's next turn.

    Raises:
      TemplateError: the template does not accept a conversation, or is broken.
      UserError: the base model has no chat template.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise UserError(
            f"base_model={tokenizer.name_or_path} has no chat template. If it is a chat model, set chat_template to "
            f"the one it was trained with: {', '.join(TEMPLATES)}, or a Jinja file. If it is not, set "
            "chat_template=alpaca to teach it one."
        )
    turns = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
    from transformers.utils.chat_template_utils import render_jinja_template

    # apply_chat_template calls this function too, after converting the turns to the form they already have here.
    special = tokenizer.special_tokens_map
    try:
        template = tokenizer.get_chat_template()
        return list(render_jinja_template(turns, chat_template=template, add_generation_prompt=prompt, **special)[0])
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"The chat template is broken, line {error.lineno}: {error.message}.") from None
    except Exception as error:  # a template is a program: it can fail in any way
        words = str(error).strip().removesuffix(".") or type(error).__name__
        raise TemplateError(f"The chat template rejects this conversation: {words}.") from None


def encode_prompt(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Returns the token ids that the served model receives: all turns and the opening of the assistant's next turn.

    Plain text gets the BOS token if the tokenizer adds one, and nothing else.
    """
    if messages[0].role == TEXT:
        return tokenizer(text_opening(tokenizer) + messages[0].content, add_special_tokens=False)["input_ids"]
    try:
        (text,) = render_chat(tokenizer, [messages], prompt=True)
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
