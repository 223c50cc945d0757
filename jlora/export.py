"""Writes a run's adapter as a PEFT directory: `python -m jlora.export --run DIR [--step N|best|latest] [--verify]`."""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jlora.checkpoint import Checkpoints, read_record
from jlora.data.templates import find_template
from jlora.errors import UserError, run_program
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.families import read_config
from jlora.model.llama import LoraConfig
from jlora.peft_format import peft_config, write_adapter
from jlora.verify import verify


def export_run(run: Path, step: int, target: Path) -> None:
    """Writes a checkpoint of a run as a PEFT directory."""
    record = read_record(run, "--run")
    adapter, spec = load_adapter(run, step)
    settings = record["config"]
    base = record["base"]["hub_id"] or record["base"]["directory"]
    config = peft_config(spec, base, record["base"]["commit"] or None)
    template = find_template(settings["chat_template"]) if settings["chat_template"] else ""
    write_adapter(adapter, config, _card(settings, step, base), target, step, template)


def load_adapter(run: Path, step: int) -> tuple[Adapter, LoraConfig]:
    """The adapter of a run's checkpoint."""
    record = read_record(run, "--run")
    spec = spec_of(record["config"])
    model_config = read_config(Path(record["base"]["directory"]))
    _, shapes, _ = hf.abstract(model_config, spec, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    checkpoints = Checkpoints(run)
    adapter = checkpoints.restore_adapter(step, shapes)
    checkpoints.close()
    return adapter, spec


def spec_of(settings: dict[str, Any]) -> LoraConfig:
    """The adapter that the `config` of a run's config.json describes."""
    return LoraConfig(
        settings["lora_rank"], settings["lora_alpha"], settings["lora_dropout"], tuple(settings["target_modules"])
    )


def find_step(run: Path, wanted: str) -> int:
    """`best`, `latest` or a number as a step that has a checkpoint; `best` without evaluations is the latest."""
    if not (run / "checkpoints").is_dir():
        raise UserError(f"--run {run}: no checkpoints there; expected the output_dir of a run")
    checkpoints = Checkpoints(run)
    steps, latest = checkpoints.steps(), checkpoints.latest()
    best = checkpoints.best()
    checkpoints.close()
    if latest is None:
        raise UserError(f"--run {run}: no checkpoint was completed")
    step = {"best": best, "latest": latest}.get(wanted, int(wanted) if wanted.isdigit() else -1)
    if step not in steps:
        raise UserError(f"--step {wanted}: there are {', '.join(map(str, steps))} (or best, latest)")
    return step


def _card(settings: dict[str, Any], step: int, base: str) -> str:
    return f"""---
library_name: peft
base_model: {settings["base_model"]}
---
A LoRA adapter trained by jlora: rank {settings["lora_rank"]}, alpha {settings["lora_alpha"]:g}, on
{", ".join(settings["target_modules"])}; step {step}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```
{"It speaks the chat template in chat_template.jinja, not the base's own." if settings["chat_template"] else ""}
"""


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.export", description="Writes a run's adapter for PEFT.")
    parser.add_argument("--run", required=True, type=Path, help="output_dir of a run")
    parser.add_argument("--step", default="best", help="a step, best (default) or latest")
    parser.add_argument("--output", type=Path, help="where to; by default RUN/adapter for best, RUN/adapter-STEP else")
    parser.add_argument("--verify", action="store_true", help="load it with PEFT and compare logits and answers")
    arguments = parser.parse_args(argv)
    run = arguments.run
    step = find_step(run, arguments.step)
    target = arguments.output or run / ("adapter" if arguments.step == "best" else f"adapter-{step}")
    if target.exists() and arguments.verify:
        print(f"{target} exists: verifying it against the checkpoint of step {step}")
    else:
        export_run(run, step, target)
        print(f"adapter of step {step}: {target}")
    if arguments.verify:
        adapter, spec = load_adapter(run, step)
        print(verify(read_record(run, "--run"), adapter, spec, target))


if __name__ == "__main__":
    run_program(main)
