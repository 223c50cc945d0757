"""README.md of an exported adapter: what it is, how to use it, and what it was trained with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jlora.adapters import provenance
from jlora.adapters.methods import core_of
from jlora.bases.identity import base_hash, template_hash, tokenizer_hash
from jlora.config.schema import NOT_TRAINING, Config

HASHES = {
    provenance.BASE: "base weights (the first values of every tensor)",
    provenance.TOKENIZER: "tokenizer",
    provenance.TEMPLATE: "what the chat template renders",
    provenance.DATA: "training data",
    provenance.HELD_OUT: "held-out data",
}
TEXT = ['inputs = tokenizer("Your text begins", return_tensors="pt")']  # for text without roles


def card(config: dict[str, Any], notes: dict[str, str], *, own_template: bool) -> str:
    """The card of an adapter.

    Args:
      config: its adapter_config.json.
      notes: what its file says of where it comes from (`card.notes`).
      own_template: it brings a chat template, as the base's own is another.
    """
    kind = core_of(config["peft_type"]).described(config)
    settings = json.loads(notes[provenance.CONFIG])
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    chats = provenance.TEMPLATE in notes and settings["task_type"] != "plain-text"
    ask = _asked(settings["system_prompt"]) if chats else TEXT
    hashes = [f"| {what} | `{notes[key]}` |" for key, what in HASHES.items() if key in notes]
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {_quoted(config['base_model_name_or_path'])}",
        "pipeline_tag: text-generation",
        "---",
        f"{kind} adapter, trained by jlora {notes[provenance.VERSION]}, on {', '.join(config['target_modules'])};",
        f"step {notes[provenance.STEP]}. {_losses(notes)}",
        *(["It speaks the chat template in chat_template.jinja, not the base's own."] if own_template else []),
        "",
        "From this directory, with `base` wherever your copy of it lies:",
        "",
        "```python",
        *_snippet(config, ask, own_template=own_template),
        "```",
        "",
        "| it was trained with | sha256 |",
        "|---|---|",
        *hashes,
        "",
        "Do they still belong together? `python -m jlora.export --check THIS_DIRECTORY --base BASE`",
        "",
        "Settings, where they are not the defaults:",
        "",
        "```json",
        json.dumps(changed, indent=2, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _losses(notes: dict[str, str]) -> str:
    if provenance.LOSS not in notes:
        return "No held-out loss was measured at this step."
    kind = json.loads(notes[provenance.CONFIG])["quantize_base"]
    base = "the base" if kind == "none" else f"the base in {kind}"
    return f"Held-out loss: {notes[provenance.BASE_LOSS]} of {base}, {notes[provenance.LOSS]} with it (nats a token)."


def _snippet(config: dict[str, Any], ask: list[str], *, own_template: bool) -> list[str]:
    """Python that puts what `ask` makes into PEFT."""
    revision = f", revision={_quoted(config['revision'])}" if config["revision"] else ""
    template = ['tokenizer.chat_template = Path("chat_template.jinja").read_text(encoding="utf-8")']
    return [
        *(["from pathlib import Path", ""] if own_template else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {_quoted(config['base_model_name_or_path'])}",
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        *(template if own_template else []),
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}), ".")',
        *ask,
        "answer = model.generate(**inputs, max_new_tokens=200, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _asked(system_prompt: str) -> list[str]:
    """Python that puts a question through the chat template, after the system prompt that was trained with."""
    system = f'{{"role": "system", "content": {_quoted(system_prompt)}}}, ' if system_prompt else ""
    return [
        f'chat = [{system}{{"role": "user", "content": "Your question?"}}]',
        'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
        "inputs = tokenizer.apply_chat_template(chat, **options)",
    ]


def _quoted(text: str) -> str:
    """In double quotes, on one line: the same in Python, JSON and YAML."""
    return json.dumps(text, ensure_ascii=False)


def provenance_notes(
    record: dict[str, Any], step: int, base_loss: float | None, loss: float | None, tokenizer: Any
) -> dict[str, str]:
    """What goes into the file of a run's adapter, under the keys above; what there is none of is left out.

    Args:
      record: the run's config.json.
      base_loss, loss: on the held-out data, without the adapter and with it.
      tokenizer: with the chat template that was trained on.
    """
    settings = {key: value for key, value in record["config"].items() if key not in NOT_TRAINING}
    known = {
        provenance.BASE: base_hash(Path(record["base"]["directory"])),
        provenance.TOKENIZER: tokenizer_hash(tokenizer),
        provenance.TEMPLATE: template_hash(tokenizer),
        provenance.DATA: record["data"]["train"],
        provenance.HELD_OUT: record["data"]["held_out"],
        provenance.VERSION: record["versions"]["jlora"],
        provenance.CONFIG: json.dumps(settings, ensure_ascii=False),
        provenance.STEP: str(step),
        provenance.BASE_LOSS: "" if base_loss is None else f"{base_loss:.4f}",
        provenance.LOSS: "" if loss is None else f"{loss:.4f}",
    }
    return {key: value for key, value in known.items() if value}
