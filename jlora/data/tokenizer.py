"""The base model's tokenizer and chat template: conversations to text, prompts to token ids."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.data.templates import TEMPLATES, find_template

TEXT = "text"  # the role of the only message when the conversation is plain text


def load_tokenizer(directory: Path, chat_template: str) -> Any:
    """Loads the fast tokenizer of a base model. It may lack a chat template, which plain text does not need.

    Args:
      chat_template: a name from templates.py or a Jinja file, used instead of the base model's own; "": keep that.

    Raises:
      UserError: the tokenizer or the template cannot be read.
    """
    only_sentencepiece = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    missing = [name for name in ("sentencepiece", "google.protobuf") if not find_spec(name)]
    if only_sentencepiece and missing:
        raise UserError(
            f"base_model={directory} has only a sentencepiece tokenizer (tokenizer.model), and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run: pip install sentencepiece protobuf"
        )
    try:
        from transformers import AutoTokenizer  # lazy: it imports PyTorch if that is installed

        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"The tokenizer of base_model={directory} cannot be read: {reason}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"base_model={directory} has a slow tokenizer. Expected a fast one (tokenizer.json).")
    if chat_template:
        tokenizer.chat_template = find_template(chat_template)
    tokenizer("")  # this call turns off the truncation and padding that tokenizer.json may set
    return tokenizer


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Returns the token ids at which the served model stops: the tokenizer's and those of generation_config.json."""
    path = directory / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def render(tokenizer: Any, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
    """Renders each list of turns with the chat template; `prompt` appends the opening of the assistant's next turn.

    Raises:
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
    template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    return list(render_jinja_template(turns, chat_template=template, add_generation_prompt=prompt, **special)[0])


def encode_prompt(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Returns the token ids that the served model receives: all turns and the opening of the assistant's next turn.

    Plain text gets the BOS token if the tokenizer adds one, and nothing else.
    """
    if messages[0].role == TEXT:
        return tokenizer(text_opening(tokenizer) + messages[0].content, add_special_tokens=False)["input_ids"]
    (text,) = render(tokenizer, [messages], prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_opening(tokenizer: Any) -> str:
    """Returns the token that the tokenizer itself puts before plain text: its BOS token, or nothing."""
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def text_closing(tokenizer: Any, ends: frozenset[int]) -> str:
    """Returns the token that ends plain text: the EOS token if the model stops at it, else one at which it does."""
    own = tokenizer.eos_token_id
    return tokenizer.decode([own if own in ends else min(ends)]) if ends else ""
