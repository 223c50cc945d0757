"""Loads the base model's tokenizer, and finds the tokens that end an answer."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.data.named_templates import find_template


def load_tokenizer(directory: Path, chat_template: str) -> Any:
    """Loads the fast tokenizer of a base model. It may lack a chat template, which plain text does not need.

    Args:
      chat_template: a name in named_templates.py or a Jinja file, used instead of the base model's own; "": keep that.

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
