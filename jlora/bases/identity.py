"""What makes a base the same base: hashes of its weights, its tokenizer and its chat template."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np

from jlora.adapters.provenance import BASE, metadata
from jlora.common.errors import UserError
from jlora.models.safetensors_files import Weights

SAMPLE = 64  # values of every tensor that count
# Scripts, digits, spaces, line ends: where tokenizers with one vocabulary part ways.
TEXT = " Must a contract be in writing?\n\n  劳动合同，第19条。 Ünï 12345 don't\t🙂\u00a0e\u0301 "
USER, ASSISTANT = {"role": "user", "content": " Is it? "}, {"role": "assistant", "content": " It is.\n"}
NO_DAY = "{% macro strftime_now(form) %}{{ form }}{% endmacro %}{{ '' }}"  # for templates that ask which day it is
CHATS = [[USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]]


def base_hash(directory: Path) -> str:
    """A hash of every tensor's name, shape and first values, as bfloat16: the same in other files or another dtype."""
    weights, digest = Weights(directory), hashlib.sha256()
    for name in sorted(weights.names()):
        values, shape = weights.read(name), list(weights.shape(name))
        first = np.asarray(values[0] if len(shape) > 1 else values, np.float32)[:SAMPLE]
        digest.update(f"{name} {shape}\n".encode() + first.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary, the special tokens, and the ids of a text that is hard to cut."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    known = [sorted(tokenizer.get_vocab().items()), sorted(special.items()), ids]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """A hash of what the chat template makes of a few conversations, on no particular day; "" where there is none."""
    if not tokenizer.chat_template:
        return ""
    digest, template = hashlib.sha256(), NO_DAY + tokenizer.chat_template
    for chat in CHATS:
        try:  # some templates know no system
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=chat[-1] is USER
            )
        except jinja2.TemplateError:
            text = "refused"
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def fingerprint(directory: Path) -> str:
    """A cheap identity of a base's files: config.json, and each weight file's size, first and last mebibyte."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def check_unchanged(record: dict[str, Any], tokenizer: Any) -> None:
    """Raises UserError where base, tokenizer or chat template of a run are no longer what it was trained with.

    Args:
      record: the run's config.json; what an older run does not note is not compared.
      tokenizer: as it is now, with the run's chat template.
    """
    base, data = record["base"], record["data"]
    now = {"tokenizer": tokenizer_hash(tokenizer), "template": source_hash(tokenizer)}
    changed = [f"its {part}" for part in now if part in data and data[part] != now[part]]
    if base["fingerprint"] != fingerprint(Path(base["directory"])):
        changed.insert(0, "its weights or config.json")
    if changed:
        raise UserError(
            f"the base in {base['directory']} is not what the run was trained on; {' and '.join(changed)} changed "
            "since: put the files back"
        )


def source_hash(tokenizer: Any) -> str:
    """A hash of the chat template as it is written, if there is one."""
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()


def check_base(weights: Path, base: Path) -> None:
    """Raises UserError where an adapter's file notes another base than the one at hand."""
    noted = metadata(weights).get(BASE)
    if noted and noted != (here := base_hash(base)):
        raise UserError(
            f"adapter {weights.parent} was trained on other weights than {base} holds (hash {noted[:12]}, here "
            f"{here[:12]}): name the base that it was trained on"
        )
