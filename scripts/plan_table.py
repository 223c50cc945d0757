"""Plans large base models for TPU slices and GPUs with their own compilers: memory, collectives, minimum step time.

    python scripts/plan_table.py [ROW ...]

It needs libtpu and the CUDA compiler (`pip install -e '.[test]'` installs them), but no device and no weights. Each row
takes a minute or two and adds a line to scripts/results/plan.md, and the output of `python -m jlora.plan` to
scripts/results/plan/ROW.txt.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ADAPTER = "LoRA r16 on q_proj and v_proj"
# Name -> shape, target, tokens per row, settings.
ROWS: dict[str, tuple[str, str, int, dict[str, object]]] = {
    "7b-v5e-8": ("llama-2-7b", "v5e:2x4", 512, {"batch_size": 8, "remat": "full"}),
    "7b-v5e-64": ("llama-2-7b", "v5e:8x8", 512, {"batch_size": 64, "remat": "full"}),
    "7b-v5e-256": ("llama-2-7b", "v5e:16x16", 512, {"batch_size": 256, "remat": "full"}),
    "7b-v5e-1-nf4": ("llama-2-7b", "v5e:1", 512, {"batch_size": 4, "remat": "full", "quantize_base": "nf4"}),
    "8b-8192-v5e-8": ("llama-3.1-8b", "v5e:2x4", 8192, {"batch_size": 8, "remat": "full", "mesh": "{fsdp: 8}"}),
    "70b-v5p-8": ("llama-3-70b", "v5p:2x2x2", 4096, {"batch_size": 8, "remat": "full", "mesh": "{fsdp: 8}"}),
    "70b-v5p-64": ("llama-3-70b", "v5p:4x4x4", 4096, {"batch_size": 64, "remat": "full", "mesh": "{fsdp: 64}"}),
    "70b-v5p-256": (
        "llama-3-70b",
        "v5p:4x8x8",
        4096,
        {"batch_size": 256, "remat": "full", "mesh": "{data: 4, fsdp: 64}"},
    ),
    "7b-h100": ("llama-2-7b", "gpu:h100", 512, {"batch_size": 4, "remat": "dots"}),
    "7b-rtx4090": ("llama-2-7b", "gpu:rtx4090", 512, {"batch_size": 4, "remat": "full"}),
    "7b-nf4-rtx4060": ("llama-2-7b", "gpu:rtx4060", 512, {"batch_size": 1, "remat": "full", "quantize_base": "nf4"}),
}


def main(names: list[str]) -> None:
    """Plans the named rows, or all of them."""
    for name in names or ROWS:
        shape, target, tokens, settings = ROWS[name]
        started = time.monotonic()
        text = plan(shape, target, tokens, settings)
        seconds = time.monotonic() - started
        file = RESULTS / "plan" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "flax"))
        file.write_text(f"{shape}, {ADAPTER}; {versions}; {seconds:.0f} s\n{text}", encoding="utf-8")
        print(file.read_text(encoding="utf-8"), flush=True)
        table()


def plan(shape: str, target: str, tokens: int, settings: dict[str, object]) -> str:
    """Returns the output of `jlora plan`, without its search for other settings."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        values = {"base_model": HERE / "shapes" / f"{shape}.json", "train_data_dir": "none", **settings}
        config.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
        command = ["-m", "jlora.plan", "--config", config, "--target", target, "--tokens", tokens, "--only"]
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=HERE.parent, env={**os.environ}, capture_output=True, text=True
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.stdout + "\n".join(errors if done.returncode in (0, 2) else [done.stderr])


def table() -> None:
    """Writes plan.md, with one line for each planned row."""
    lines = [
        "# Memory and minimum step time of large base models",
        "",
        f"Computed for {ADAPTER} by the compilers for TPUs and CUDA, without a device (scripts/plan_table.py).",
        "",
        "| run | target | memory per device | sent per step and device | minimum step time |",
        "|---|---|---|---|---|",
    ]
    for name, (shape, target, tokens, settings) in ROWS.items():
        file = RESULTS / "plan" / f"{name}.txt"
        if file.exists():
            text = file.read_text(encoding="utf-8")
            listed = ", ".join(f"{key}={value}" for key, value in settings.items())
            needs, sent, least = (
                match[1] if (match := re.search(pattern, text)) else "-"
                for pattern in (r": (\S+(?: of \S+)? GiB) on each", r"; (.* MB sent|nothing sent)", r"t least (\S+ s)")
            )
            lines.append(f"| {shape}, {tokens} tokens, {listed} | {target} | {needs} | {sent} | {least} |")
    (RESULTS / "plan.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
