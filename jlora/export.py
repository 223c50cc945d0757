"""Writes a run's adapter as a PEFT directory: `python -m jlora.export --run DIR [--step N|best|latest] [--verify]`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jlora.adapter_config import peft_config
from jlora.checkpoint import Checkpoints, read_record
from jlora.config import ALL_LINEAR, TARGETS, Config, read_pattern
from jlora.errors import UserError, run_program
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.families import read_config
from jlora.peft_format import write_adapter
from jlora.provenance import BASE, STEP, base_hash
from jlora.sites import LoraConfig
from jlora.verify import verify


def export_run(run: Path, step: int, target: Path) -> None:
    """Writes a checkpoint of a run as a PEFT directory."""
    record = read_record(run, "--run")
    adapter, spec = load_adapter(run, step)
    settings = record["config"]
    base = record["base"]["hub_id"] or record["base"]["directory"]
    tied = read_config(Path(record["base"]["directory"])).tie_word_embeddings
    notes = {STEP: str(step), BASE: base_hash(Path(record["base"]["directory"]))}
    config = peft_config(spec, base, settings["revision"] or None, tied=tied)
    write_adapter(adapter, spec, config, _card(settings, step, base), target, notes)


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
    s = {**dataclasses.asdict(Config()), **settings}  # a setting that is newer than the run had its default
    targets = TARGETS if tuple(s["target_modules"]) == ALL_LINEAR else tuple(s["target_modules"])
    noise = s["neftune_noise_alpha"]
    if s["peft_type"] == "IA3":
        leaves = {target.split(".")[-1] for target in targets}
        forward = tuple(target for target in s["feedforward_modules"] if target in leaves)
        return LoraConfig(1, 1.0, 0.0, targets, peft_type="IA3", feedforward_modules=forward, neftune_noise_alpha=noise)
    return LoraConfig(
        s["lora_rank"],
        s["lora_alpha"],
        s["lora_dropout"],
        targets,
        use_rslora=s["use_rslora"],
        use_dora=s["use_dora"],
        pissa=s["init_lora_weights"] == "pissa",
        rank_pattern=tuple(read_pattern(entry, int) for entry in s["rank_pattern"]),
        alpha_pattern=tuple(read_pattern(entry, float) for entry in s["alpha_pattern"]),
        layers_to_transform=tuple(map(int, s["layers_to_transform"])),
        modules_to_save=tuple(s["modules_to_save"]),
        neftune_noise_alpha=noise,
    )


def settings_of(spec: LoraConfig) -> dict[str, Any]:
    """The other way: the keys of a config that `spec_of` reads as this adapter."""
    return {
        "lora_rank": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": spec.target_modules,
        "peft_type": spec.peft_type,
        "feedforward_modules": spec.feedforward_modules,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": "pissa" if spec.pissa else "true",
        "rank_pattern": tuple(f"{pattern}={rank}" for pattern, rank in spec.rank_pattern),
        "alpha_pattern": tuple(f"{pattern}={alpha!r}" for pattern, alpha in spec.alpha_pattern),
        "layers_to_transform": tuple(map(str, spec.layers_to_transform)),
        "modules_to_save": spec.modules_to_save,
    }


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
