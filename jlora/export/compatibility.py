"""Do an adapter and a base still belong together? Base weights, tokenizer and chat template, each by its hash."""

from pathlib import Path

from jlora.adapters import provenance
from jlora.adapters.peft_config import read_config_file, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter
from jlora.adapters.provenance import WEIGHTS
from jlora.bases import identity
from jlora.common.errors import UserError
from jlora.data.templates import find_template
from jlora.data.tokenizer import load_tokenizer
from jlora.models import hf_loader
from jlora.models.compute import FLOAT32
from jlora.models.families import read_config

PARTS = {  # what is compared -> its key in the adapter's file, and what to do where it differs
    "base weights": (provenance.BASE, "name the base that it was trained on"),
    "tokenizer": (provenance.TOKENIZER, "take the tokenizer's files from that base"),
    "chat template": (provenance.TEMPLATE, "serve it with the template that it was trained with"),
}


def check(adapter: Path, base: Path) -> str:
    """What can be said of an adapter and a base: each part the same or not, whether the shapes fit; in lines.

    Args:
      adapter: a PEFT directory; jlora's notes in its file are compared, of another program's only the shapes.
      base: a model directory.

    Raises:
      UserError: they do not belong together, with the same lines; or one of them cannot be read.
    """
    read_config_file(adapter)  # so that a directory that is no adapter is called that
    noted, own = provenance.metadata(adapter / WEIGHTS), adapter / TEMPLATE
    here, served = {provenance.BASE: identity.base_hash(base)}, ""
    if provenance.TOKENIZER in noted:
        tokenizer = load_tokenizer(base, "")
        served = identity.template_hash(tokenizer)
        if own.is_file():
            tokenizer.chat_template = find_template(str(own))
        here[provenance.TOKENIZER] = identity.tokenizer_hash(tokenizer)
        here[provenance.TEMPLATE] = identity.template_hash(tokenizer)
    lines, same = [], True
    for part, (key, way_out) in PARTS.items():
        if key not in noted:
            lines.append(f"{part}: cannot be checked, as the adapter's file has no hash of it")
        elif noted[key] == here[key]:
            lines.append(f"{part}: the same ({noted[key][:12]})")
        else:
            same, now = False, here[key][:12] or "none"
            lines.append(f"{part}: not the same ({noted[key][:12]} in training, {now} here): {way_out}")
    if served != here.get(provenance.TEMPLATE, ""):
        lines.append(f"the base's own chat template is another one: give the server {own}")
    try:
        _fit(adapter, base)
        lines.append("shapes: all fit")
    except UserError as error:
        if same:  # then this is all there is to say
            raise
        lines.append(f"shapes: {error}")
    if not same:
        raise UserError("\n  ".join([f"{adapter} and {base} do not belong together", *lines]))
    return "\n".join(lines)


def _fit(adapter: Path, base: Path) -> None:
    """Reads the adapter for this base; UserError where it does not fit."""
    config = read_config(base)
    spec = read_spec(adapter, config.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract(config, spec, FLOAT32)
    read_adapter(adapter, spec, shapes, tied=config.tie_word_embeddings)
