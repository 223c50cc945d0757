"""Writes a run's adapter as a PEFT directory: `python -m jlora.export --run DIR [--step N|best|latest] [--verify]`;
or base and adapter as one model: `--merged`.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jlora import sources
from jlora.checkpoint import Checkpoints, read_record
from jlora.data.templates import find_template
from jlora.errors import UserError, run_program
from jlora.lora import Adapter
from jlora.merged import write_merged
from jlora.model import hf
from jlora.model.families import read_config
from jlora.model.llama import LoraConfig
from jlora.peft_format import TEMPLATE, peft_config, read_adapter, refuse_other_base, write_adapter
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


def export_merged(run: Path | None, step: int, base: str, adapter: Path | None, output: Path) -> None:
    """Writes base and adapter as one model: those of a run's checkpoint, or a base with or without a PEFT directory."""
    if run:
        record = read_record(run, "--run")
        directory, named = Path(record["base"]["directory"]), record["config"]["chat_template"]
        weights, spec = load_adapter(run, step)
        write_merged(directory, weights, spec, output, find_template(named) if named else "")
        return
    weights, spec, template = {}, LoraConfig(rank=1, alpha=1.0, dropout=0.0, target_modules=()), ""
    revision = ""
    if adapter:
        weights, spec, named_in = read_adapter(adapter)
        template = find_template(str(adapter / TEMPLATE)) if (adapter / TEMPLATE).is_file() else ""
        if not base:
            base, revision = named_in["base_model_name_or_path"], named_in.get("revision") or ""
    directory = sources.resolve(base, revision)
    _, shapes, _ = hf.abstract(read_config(directory), spec, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    if adapter:
        refuse_other_base(weights, shapes, adapter, base)
    write_merged(directory, weights, spec, output, template)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.export", description="Writes a run's adapter for PEFT.")
    parser.add_argument("--run", type=Path, help="output_dir of a run")
    parser.add_argument("--step", default="best", help="a step, best (default) or latest")
    parser.add_argument("--output", type=Path, help="where to; by default RUN/adapter for best, RUN/adapter-STEP else")
    parser.add_argument("--verify", action="store_true", help="load it with PEFT and compare logits and answers")
    parser.add_argument("--merged", action="store_true", help="write base and adapter as one model, to RUN/merged")
    parser.add_argument("--adapter", type=Path, help="with --merged, a PEFT directory instead of a run")
    parser.add_argument("--base", default="", help="with --merged, a base instead of the adapter's own, or alone")
    arguments = parser.parse_args(argv)
    run, merged = arguments.run, arguments.merged
    if not merged and not run:
        parser.error("--run is missing")
    if merged and not run and not (arguments.output and (arguments.base or arguments.adapter)):
        parser.error("--merged needs --run, or --output with --adapter, --base, or both")
    if merged and arguments.verify:
        parser.error("--verify is for adapters")
    if (arguments.base or arguments.adapter) and (run or not merged):
        parser.error("--base and --adapter go with --merged, instead of --run")
    step = find_step(run, arguments.step) if run else 0
    name = "merged" if merged else "adapter"
    target = arguments.output or run / (name if arguments.step == "best" else f"{name}-{step}")
    if merged:
        export_merged(run, step, arguments.base, arguments.adapter, target)
        print(f"merged model: {target}")
        return
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
