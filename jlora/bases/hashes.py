"""Identity of a base model: hashes of its weights, its tokenizer and its chat template, and checks against them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.adapters.peft_io import copied_tables
from jlora.adapters.provenance import BASE, metadata
from jlora.common.errors import UserError
from jlora.common.hf_names import NAMES
from jlora.models.safetensors_files import Weights

SAMPLE = 64  # values of each tensor that are hashed
# Scripts, digits, spaces and newlines: where tokenizers with the same vocabulary differ.
TEXT = " Must a contract be in writing?\n\n  劳动合同，第19条。 Ünï 12345 don't\t🙂\u00a0e\u0301 "
USER, ASSISTANT = {"role": "user", "content": " Is it? "}, {"role": "assistant", "content": " It is.\n"}
NO_DATE = "{% macro strftime_now(form) %}{{ form }}{% endmacro %}{{ '' }}"  # for templates that insert today's date
CHATS = [[USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]]


def weights_hash(directory: Path) -> str:
    """Hashes the name, shape and first values of each tensor, as bfloat16; file layout and dtype do not matter."""
    weights, digest = Weights(directory), hashlib.sha256()
    for name in sorted(weights.names()):
        values, shape = weights.read(name), list(weights.shape(name))
        first = np.asarray(values[0] if len(shape) > 1 else values, np.float32)[:SAMPLE]
        digest.update(f"{name} {shape}\n".encode() + first.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hashes the vocabulary, the special tokens, and the ids of a text on which tokenizers differ."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    known = [sorted(tokenizer.get_vocab().items()), sorted(special.items()), ids]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def rendered_template_hash(tokenizer: Any) -> str:
    """Hashes the chat template's output for a few conversations, without today's date; "" without a template."""
    if not tokenizer.chat_template:
        return ""
    digest, template = hashlib.sha256(), NO_DATE + tokenizer.chat_template
    for chat in CHATS:
        try:  # some templates reject a system message
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=chat[-1] is USER
            )
        except Exception:  # a template is a program: it can fail in any way
            text = "refused"
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def fingerprint(directory: Path) -> str:
    """Hashes config.json, and each weight file's size, first and last mebibyte: cheap, but tied to the exact files."""
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
    """Raises a UserError if the base model, tokenizer or chat template of a run has changed since training.

    Args:
      record: the run's config.json; values that older versions did not record are not compared.
      tokenizer: the tokenizer as loaded now, with the run's chat template.
    """
    base, data = record["base"], record["data"]
    now = {"tokenizer": tokenizer_hash(tokenizer), "template": template_source_hash(tokenizer)}
    names = {"tokenizer": "tokenizer", "template": "chat template"}
    changed = [names[part] for part in now if part in data and data[part] != now[part]]
    if base["fingerprint"] != fingerprint(Path(base["directory"])):
        changed.insert(0, "weights or config.json")
    if changed:
        raise UserError(
            f"The base model in {base['directory']} has changed since the run was trained: {' and '.join(changed)}. "
            "Restore the original files."
        )


def template_source_hash(tokenizer: Any) -> str:
    """Hashes the source text of the chat template, or "" if there is none."""
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()


def check_base(weights: Path, base: Path) -> None:
    """Raises a UserError if an adapter file records another base model than the one in `base`, or has tables of one."""
    expected = metadata(weights).get(BASE)
    if expected and expected != (actual := weights_hash(base)):
        raise UserError(
            f"Adapter {weights.parent} was trained on other weights than those in {base} (expected hash "
            f"{expected[:12]}, found {actual[:12]}). Pass the base model that it was trained on."
        )
    check_copied_tables(weights, base)


def check_copied_tables(weights: Path, base: Path) -> None:
    """Raises a UserError if the token tables that PEFT copied into an adapter file are not those of the base model."""
    for table, values in copied_tables(weights).items():
        stored = Weights(base)
        name = NAMES[table, "weight"] if NAMES[table, "weight"] in stored.names() else NAMES["embed_tokens", "weight"]
        if not np.array_equal(values, np.asarray(stored.read(name), np.float32)):
            raise UserError(
                f"Adapter {weights.parent} contains a copy of {table} that differs from the one in {base}. Pass the "
                "base model that it was trained on."
            )
