"""What an adapter was trained with: cheap hashes of base, tokenizer and chat template, kept in the adapter's file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"  # PEFT's name for the tensors of an adapter
# Keys of the safetensors metadata; every value is text.
BASE, TOKENIZER, TEMPLATE = "jlora_base", "jlora_tokenizer", "jlora_template"
DATA, HELD_OUT = "jlora_data", "jlora_held_out_data"
VERSION, CONFIG, STEP = "jlora_version", "jlora_config", "jlora_step"
BASE_LOSS, LOSS = "jlora_base_loss", "jlora_held_out_loss"  # nats a target


def metadata(weights: Path) -> dict[str, str]:
    """What jlora noted in an adapter's file; nothing where another program wrote it."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def written_step(directory: Path) -> int | None:
    """The step that an exported adapter is of; None where jlora did not write it."""
    step = metadata(directory / WEIGHTS).get(STEP, "")
    return int(step) if step.isdigit() else None
