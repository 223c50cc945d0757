"""Writes a run's adapter as a PEFT directory: `python -m jlora.export --run DIR [--step N|best|latest] [--for LOADER]`.

With --for it is written in the form that the loader reads rightly, and only if it computes what was trained. With
--merged, base and adapter are written as one model. --check ADAPTER --base BASE says whether they belong together.
"""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import provenance, sources
from jlora.adapter_config import base_of, peft_config, read_spec
from jlora.card import card
from jlora.check import check
from jlora.checkpoint import Checkpoints, read_record
from jlora.config import ALL_LINEAR, TARGETS, Config, read_pattern
from jlora.data.chat import load_tokenizer
from jlora.data.templates import find_template
from jlora.errors import UserError, run_program
from jlora.loaders import LOADERS, form_for
from jlora.lora import Adapter
from jlora.merged import write_merged
from jlora.model import hf
from jlora.model.compute import FLOAT32
from jlora.model.families import read_config
from jlora.peft_format import TEMPLATE, WEIGHTS, read_adapter, write_adapter
from jlora.provenance import check_base
from jlora.sites import LoraConfig
from jlora.to_gguf import write_gguf
from jlora.verify import verify


def export_run(run: Path, step: int, target: Path, loader: str = "", max_rank: int = 0) -> None:
    """Writes a checkpoint of a run as a PEFT directory; for a `loader` of LOADERS, in its form and certified."""
    record = read_record(run, "--run")
    trained = adapter, spec = load_adapter(run, step)
    tokenizer = trained_tokenizer(record)
    if loader:
        adapter, spec = form_for(loader, adapter, spec, max_rank)
    if loader == "llama.cpp":
        print(write_gguf(trained, (adapter, spec), Path(record["base"]["directory"]), target))
        return
    directory = Path(record["base"]["directory"])
    template = tokenizer.chat_template if record["config"]["chat_template"] else ""
    base = record["base"]["hub_id"] or record["base"]["directory"]
    tied = read_config(directory).tie_word_embeddings
    config = peft_config(spec, base, record["base"]["commit"] or None, tied=tied)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        progress = checkpoints.progress(step)
    notes = provenance.notes(record, step, progress.base_loss, progress.eval_loss, tokenizer)

    def certify(made: Path) -> str:
        parity = verify(record, *trained, made)
        parity = dataclasses.replace(parity, sentence=parity.sentence.replace(str(made), str(target)))
        print(parity.sentence)
        return json.dumps(dataclasses.asdict(parity), indent=2, ensure_ascii=False) + "\n"

    about = card(config, notes, own_template=bool(template))
    write_adapter(adapter, spec, config, about, target, notes, certify if loader else None, template)


def load_adapter(run: Path, step: int) -> tuple[Adapter, LoraConfig]:
    """The adapter of a run's checkpoint."""
    record = read_record(run, "--run")
    spec = spec_of(record["config"])
    model_config = read_config(Path(record["base"]["directory"]))
    _, shapes, _ = hf.abstract(model_config, spec, FLOAT32)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        adapter = jax.tree.map(jnp.asarray, checkpoints.restore_adapter(step, shapes))
    return adapter, spec


def trained_tokenizer(record: dict[str, Any]) -> Any:
    """The tokenizer of a run with its chat template; UserError where it or the base changed since."""
    tokenizer = load_tokenizer(Path(record["base"]["directory"]), record["config"]["chat_template"])
    provenance.check_unchanged(record, tokenizer)
    return tokenizer


def spec_of(settings: dict[str, Any]) -> LoraConfig:
    """The adapter that the `config` of a run's config.json describes."""
    s = {**dataclasses.asdict(Config()), **settings}  # what is left out has its default
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
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        steps, latest = checkpoints.steps(), checkpoints.latest()
        if latest is None:
            raise UserError(f"--run {run}: no checkpoint was completed")
        best = checkpoints.best() if wanted == "best" else None
    step = {"best": best, "latest": latest}.get(wanted, int(wanted) if wanted.isdigit() else -1)
    if step not in steps:
        raise UserError(f"--step {wanted}: there are {', '.join(map(str, steps))} (or best, latest)")
    return step


def merge_run(run: Path, step: int, target: Path) -> None:
    """Writes the base of a run and the adapter of one of its checkpoints as one model."""
    record = read_record(run, "--run")
    adapter, spec = load_adapter(run, step)
    tokenizer = trained_tokenizer(record)
    template = tokenizer.chat_template if record["config"]["chat_template"] else ""
    write_merged(Path(record["base"]["directory"]), adapter, spec, target, template)


def merge_directory(adapter: Path | None, base: str, target: Path) -> None:
    """Writes a base, with a PEFT directory merged into it where one is given, as one model."""
    revision, template, spec = "", "", LoraConfig(rank=1, alpha=1.0, dropout=0.0, target_modules=())
    if adapter and not base:
        base, revision = base_of(adapter)
    directory = sources.resolve(base, revision)
    config, weights = read_config(directory), {}
    if adapter:
        check_base(adapter / WEIGHTS, directory)
        spec = read_spec(adapter, config.num_hidden_layers)
        _, shapes, _ = hf.abstract(config, spec, FLOAT32)
        weights = read_adapter(adapter, spec, shapes, tied=config.tie_word_embeddings)
        template = find_template(str(adapter / TEMPLATE)) if (adapter / TEMPLATE).is_file() else ""
    write_merged(directory, weights, spec, target, template)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.export", description="Writes a run's adapter for PEFT.")
    parser.add_argument("--run", type=Path, help="output_dir of a run")
    parser.add_argument("--step", default="best", help="a step, best (default) or latest")
    parser.add_argument("--output", type=Path, help="where to; by default RUN/adapter for best, RUN/adapter-STEP else")
    parser.add_argument("--verify", action="store_true", help="load it with PEFT and compare logits and answers")
    parser.add_argument("--for", dest="loader", choices=LOADERS, default="", help="what will read it; verified too")
    parser.add_argument("--max_lora_rank", type=int, default=0, help="what vLLM is started with; by default 16")
    parser.add_argument("--merged", action="store_true", help="write base and adapter as one model, to RUN/merged")
    parser.add_argument("--check", type=Path, metavar="ADAPTER", help="do a PEFT directory and --base belong together?")
    parser.add_argument("--adapter", type=Path, help="with --merged, a PEFT directory instead of a run")
    parser.add_argument("--base", default="", help="to merge into, or alone, with --merged; or the base for --check")
    arguments = parser.parse_args(argv)
    if arguments.check:
        if not arguments.base or arguments.run or arguments.merged:
            parser.error("--check ADAPTER needs --base, and stands alone with it")
        print(check(arguments.check, sources.resolve(arguments.base)))
        return
    run, loader, merged = arguments.run, arguments.loader, arguments.merged
    if not (run or merged):
        parser.error("--run is missing")
    if not run and not (arguments.output and (arguments.base or arguments.adapter)):
        parser.error("--merged needs --run, or --output with --adapter, --base, or both")
    if (arguments.base or arguments.adapter) and (run or not merged):
        parser.error("--base and --adapter go with --merged, instead of --run")
    if merged and (arguments.verify or loader):
        parser.error("--verify and --for are for adapters, not for --merged")
    if not run:
        merge_directory(arguments.adapter, arguments.base, arguments.output)
        print(f"merged model: {arguments.output}")
        return
    step = find_step(run, arguments.step)
    named = "merged" if merged else "adapter" if loader in ("", "peft") else f"adapter-{loader}"
    target = arguments.output or run / (named if arguments.step == "best" else f"{named}-{step}")
    if merged:
        merge_run(run, step, target)
        print(f"merged model: {target}")
        return
    if target.exists() and arguments.verify:
        print(f"{target} exists: verifying it against the checkpoint of step {step}")
    else:
        export_run(run, step, target, loader, arguments.max_lora_rank)
        print(f"adapter of step {step}: {target}")
    if arguments.verify:
        print(verify(read_record(run, "--run"), *load_adapter(run, step), target).sentence)


if __name__ == "__main__":
    run_program(main)
