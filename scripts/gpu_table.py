"""Plans large base models for the GPUs that jlora knows, with XLA's CUDA compiler: memory and minimum step time.

    python scripts/gpu_table.py

It needs the compiler (`pip install -e '.[test]'` installs it), but no GPU and no weights. It compiles one training step
for each base model and compute capability, in about ten minutes, and writes scripts/results/gpus.md.
"""

import dataclasses
import importlib.metadata
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from jlora.config.schema import Config
from jlora.models.attention_backend import choose_backend
from jlora.models.compute_settings import ComputeSettings, Packing, default_dtype
from jlora.models.families import read_config
from jlora.planning.forecast import Forecast, forecast, layout_of_length, make_job
from jlora.planning.gpu_cards import CARDS
from jlora.planning.hardware import GIB, Target, find_target

HERE = Path(__file__).parent
TOKENS = 2048
BASES = [
    *((shape, kind) for shape in ("llama-2-7b", "llama-3.1-8b", "llama-2-13b") for kind in ("none", "nf4")),
    ("llama-3-70b", "nf4"),
]


def main() -> None:
    """Writes the table."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "flax"))
    lines = [
        "# Large base models on one GPU",
        "",
        f"LoRA r16 on q_proj and v_proj, one row of {TOKENS} tokens, all trained on, `remat=full`: the memory that a",
        "step needs, and its minimum time at the GPU's published peak speeds; a dash where it does not fit. Computed",
        f"by XLA's CUDA compiler without a GPU ({versions}; scripts/gpu_table.py). It was not measured on a GPU.",
        "",
        f"| GPU | usable | {' | '.join(f'{shape}, {kind}' for shape, kind in BASES)} |".replace("none", "16 bits"),
        f"|---|---|{'---|' * len(BASES)}",
    ]
    found: dict[tuple[str, str, str], Forecast] = {}
    for name in sorted(CARDS, key=lambda name: CARDS[name].memory):
        target = find_target(f"gpu:{name}", [])
        cells = [cell(found, shape, kind, name, target) for shape, kind in BASES]
        lines.append(f"| {CARDS[name].name} | {(target.limit or 0) / GIB:.1f} GiB | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (HERE / "results" / "gpus.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cell(found: dict[tuple[str, str, str], Forecast], shape: str, kind: str, name: str, target: Target) -> str:
    """Returns the memory and the minimum time of a step, from a program for this compute capability."""
    key = (shape, kind, CARDS[name].capability)
    if key not in found:
        found[key] = plan(shape, kind, target)
    seen = found[key]
    seconds = max(seen.work.seconds(target).values())
    return f"{seen.needed / GIB:.1f} GiB, {seconds:.2f} s" if seen.fits(target.limit) else "-"


def plan(shape: str, kind: str, target: Target) -> Forecast:
    """Compiles a step of a base model for a GPU."""
    device, model = target.devices[0], read_config(HERE / "shapes" / f"{shape}.json")
    dtype, packing = default_dtype(device), Packing(0, 1, TOKENS)
    backend, _ = choose_backend("auto", device, model, dtype, (1, TOKENS), packing, here=False)
    config = dataclasses.replace(Config(), batch_size=1, quantize_base=kind, remat="full", mesh={})
    compute = ComputeSettings(dtype, dtype, attention=backend)
    return forecast(make_job(config, model, compute, target, layout_of_length(TOKENS)))


if __name__ == "__main__":
    main()
