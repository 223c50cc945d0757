"""Checks that an adapter and a base model match: hashes of weights, tokenizer and chat template, and shapes."""

from pathlib import Path

from jlora.adapters import provenance
from jlora.adapters.peft_config import read_config_file, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter, read_tensors
from jlora.adapters.provenance import WEIGHTS
from jlora.bases import hashes
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.named_templates import find_template
from jlora.data.tokenizer import load_tokenizer
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config

PARTS = {  # part -> its key in the adapter's metadata, and what to do if it differs
    "base model weights": (provenance.BASE, "use the base model that the adapter was trained on"),
    "tokenizer": (provenance.TOKENIZER, "use the tokenizer files of the base model that it was trained on"),
    "chat template": (provenance.TEMPLATE, "serve it with the chat template that it was trained with"),
}


def check_base_match(adapter: Path, base: Path) -> str:
    """Compares an adapter with a base model; returns a line for each part.

    Args:
      adapter: a PEFT directory; if another program wrote it, only the shapes are compared.
      base: a model directory.

    Raises:
      UserError: they do not match (the message contains the same lines), or one of them cannot be read.
    """
    read_config_file(adapter)  # first, for a clear error if `adapter` is not an adapter
    tensors = _check_tensors(adapter)
    recorded, own = provenance.metadata(adapter / WEIGHTS), adapter / TEMPLATE
    here, served = {provenance.BASE: hashes.weights_hash(base)}, ""
    if provenance.TOKENIZER in recorded:
        tokenizer = load_tokenizer(base, "")
        served = hashes.rendered_template_hash(tokenizer)
        if own.is_file():
            tokenizer.chat_template = find_template(str(own))
        here[provenance.TOKENIZER] = hashes.tokenizer_hash(tokenizer)
        here[provenance.TEMPLATE] = hashes.rendered_template_hash(tokenizer)
    lines, match = [], True
    for part, (key, advice) in PARTS.items():
        if key not in recorded:
            lines.append(f"{part}: unknown, because the adapter file does not record its hash")
        elif recorded[key] == here[key]:
            lines.append(f"{part}: same ({recorded[key][:12]})")
        else:
            match, now = False, here[key][:12] or "none"
            lines.append(f"{part}: different ({recorded[key][:12]} in training, {now} here): {advice}")
    if served != here.get(provenance.TEMPLATE, ""):
        lines.append(f"The base model has another chat template: start the server with {own}")
    lines.append(tensors)
    try:
        _check_shapes(adapter, base)
        lines.append("shapes: compatible")
    except UserError as error:
        if match:  # nothing else to report
            raise
        lines.append(f"shapes: {error}")
    if not match:
        raise UserError("\n  ".join([f"Adapter {adapter} and base model {base} do not match:", *lines]))
    return "\n".join(lines)


def _check_tensors(adapter: Path) -> str:
    """Returns a line about the tensors, which names zero ones; raises a UserError if they are damaged."""
    found = read_tensors(adapter)
    zero = sorted(name for name, values in found.items() if not values.any())
    factors = [name for name in found if ".lora_B" in name]
    if zero and factors and set(factors) <= set(zero):
        return "tensors: all lora_B tensors are zero, so the adapter changes nothing"
    if zero:
        return f"tensors: {plural(len(zero), 'tensor')} of {len(found)} are all zero, such as {zero[0]}"
    known = provenance.TENSORS in provenance.metadata(adapter / WEIGHTS)
    return "tensors: as written" if known else "tensors: finite; the adapter file does not record their hash"


def _check_shapes(adapter: Path, base: Path) -> None:
    """Reads the adapter for this base model; raises a UserError if shapes, or copies of token tables, differ."""
    hashes.check_copied_tables(adapter / WEIGHTS, base)
    config = read_config(base)
    spec = read_spec(adapter, config.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
    read_adapter(adapter, spec, shapes, tied=config.tie_word_embeddings)
