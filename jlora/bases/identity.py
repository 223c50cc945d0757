"""Identity of a base model: hashes of its weights, tokenizer and chat template."""

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

SAMPLE = 64  # values of each tensor that are hashed
# Scripts, digits, spaces and line ends, which tokenizers with the same vocabulary may split differently.
TEXT = " Must a contract be in writing?\n\n  劳动合同，第19条。 Ünï 12345 don't\t🙂\u00a0e\u0301 "
USER, ASSISTANT = {"role": "user", "content": " Is it? "}, {"role": "assistant", "content": " It is.\n"}
NO_DAY = (
    "{% macro strftime_now(form) %}{{ form }}{% endmacro %}{{ '' }}"  # replaces the date in templates that contain it
)
CHATS = [[USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]]


def base_hash(directory: Path) -> str:
    """Hashes each tensor's name, shape and first values, as bfloat16: equal for other files or another dtype."""
    weights, digest = Weights(directory), hashlib.sha256()
    for name in sorted(weights.names()):
        values, shape = weights.read(name), list(weights.shape(name))
        first = np.asarray(values[0] if len(shape) > 1 else values, np.float32)[:SAMPLE]
        digest.update(f"{name} {shape}\n".encode() + first.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hashes the vocabulary, the special tokens, and the token ids of a text that is hard to split."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    known = [sorted(tokenizer.get_vocab().items()), sorted(special.items()), ids]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """Hashes a few conversations that the chat template renders, without the date; returns "" without a template."""
    if not tokenizer.chat_template:
        return ""
    digest, template = hashlib.sha256(), NO_DAY + tokenizer.chat_template
    for chat in CHATS:
        try:  # some templates refuse system turns
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=chat[-1] is USER
            )
        except jinja2.TemplateError:
            text = "refused"
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def fingerprint(directory: Path) -> str:
    """Hashes config.json and each weight file's size, first and last MiB: fast, but only for the same files."""
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
    """Raises a UserError if the base model, tokenizer or chat template of a run changed since training.

    Args:
      record: the run's config.json; hashes that older versions did not record are not compared.
      tokenizer: the current tokenizer, with the run's chat template.
    """
    base, data = record["base"], record["data"]
    now = {"tokenizer": tokenizer_hash(tokenizer), "template": template_source_hash(tokenizer)}
    changed = [f"its {part}" for part in now if part in data and data[part] != now[part]]
    if base["fingerprint"] != fingerprint(Path(base["directory"])):
        changed.insert(0, "its weights or config.json")
    if changed:
        raise UserError(
            f"The base model in {base['directory']} is not the one that the run was trained on: "
            f"{' and '.join(changed)} changed. Restore the original files."
        )


def template_source_hash(tokenizer: Any) -> str:
    """Hashes the source of the chat template; a missing template counts as empty."""
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()


def check_base(weights: Path, base: Path) -> None:
    """Raises a UserError if an adapter's file records another base model than the one in `base`."""
    recorded = metadata(weights).get(BASE)
    if recorded and recorded != (here := base_hash(base)):
        raise UserError(
            f"Adapter {weights.parent} was trained on another base model than {base} (weights hash {recorded[:12]}, "
            f"here {here[:12]}). Use the base model that it was trained on."
        )
