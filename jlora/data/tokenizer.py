"""Loads the base model's tokenizer, and finds the tokens that end an answer."""

import datetime
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jlora.common import typed_json
from jlora.common.errors import UserError
from jlora.common.typed_json import Whole
from jlora.data.named_templates import find_template
from jlora.data.template_check import find_excess

TEMPLATE_KEYS = ("chat_template", "chat_date", "enable_thinking")  # the settings that `load_tokenizer` takes
THINKING = {"true": True, "false": False}  # values of `enable_thinking`; "auto" leaves it to the template


def load_tokenizer(directory: Path, chat_template: str, chat_date: str = "", enable_thinking: str = "auto") -> Any:
    """Loads the fast tokenizer of a base model. It may lack a chat template, which plain text does not need.

    Args:
      chat_template: a name in named_templates.py or a Jinja file, used instead of the base model's own; "": keep that.
      chat_date: the date that the template states, YYYY-MM-DD; "": today's.
      enable_thinking: "true" or "false" for templates with this switch; "auto": as the template has it.

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
    except Exception as error:  # each file can be broken in many ways, and the libraries name them in many ways
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"The tokenizer of base_model={directory} cannot be read: {reason}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"base_model={directory} has a slow tokenizer. Expected a fast one (tokenizer.json).")
    if chat_template:
        tokenizer.chat_template = find_template(chat_template)
    if isinstance(tokenizer.chat_template, str) and (excess := find_excess(tokenizer.chat_template)):
        named = f"chat_template={chat_template}" if chat_template else f"The chat template of base_model={directory}"
        raise UserError(f"{named} was stopped: {excess}. Set chat_template to another template.")
    tokenizer.chat_date = chat_date or datetime.date.today().isoformat()
    tokenizer.thinking = THINKING.get(enable_thinking)
    tokenizer("")  # this call turns off the truncation and padding that tokenizer.json may set
    return tokenizer


class GenerationConfig(typed_json.Strict):
    """The keys of generation_config.json that jlora reads."""

    eos_token_id: Whole | list[Whole] | None = None


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Returns the token ids at which the served model stops: the tokenizer's and those of generation_config.json.

    Raises:
      UserError: generation_config.json cannot be read, or does not name token ids.
    """
    path = directory / "generation_config.json"
    raw = typed_json.read_object(path) if path.is_file() else {}
    config, problems = typed_json.parse(GenerationConfig, raw)
    if problems:
        raise UserError(f"{path} has {'; '.join(problems)}. Correct it, or remove the key.")
    stops = config.eos_token_id
    ids = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def check_embedded(tokenizer: Any, tokens: Sequence[int] | np.ndarray, vocab_size: int, where: str = "") -> None:
    """Raises a UserError that names the first token without a row in the base model's embedding.

    Args:
      vocab_size: number of rows of the embedding.
      where: a prefix of the message, such as "file:line: ".
    """
    for token in tokens:
        if token >= vocab_size:
            raise UserError(
                f"{where}The token {tokenizer.convert_ids_to_tokens(int(token))!r} has id {token}, but the base model "
                f"embeds only ids below {vocab_size}: its tokenizer has tokens that its weights lack. Remove the token "
                "from the text, or train an adapter with resize_embeddings=true, which adds the tokens."
            )
