"""Measures jlora on the GPU of this machine, beside PEFT, and writes the figures to scripts/results/gpu-CARD.json.

    python scripts/gpu_check.py                              # under six minutes on one H100 or H200
    python scripts/gpu_check.py --wheels wheels              # first installs what is missing from this folder
    python scripts/gpu_check.py --shape tiny --tokens 64     # to try the script, on any device

It needs no network, except for the base model of configs/law.py, if that is not in jlora's cache. Each part is a
process of its own with a time limit, so a failure of one leaves the others. jlora and PEFT run in turns.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Part -> the most seconds that it may take, in the order in which they run.
PARTS = {
    "versions": 60,
    "attention": 60,
    "peak": 40,
    "jlora_lora": 90,
    "peft_lora": 60,
    "jlora_lora again": 60,
    "peft_lora again": 60,
    "jlora_qlora": 60,
    "law": 120,
    "compiler_options": 120,
    "generation": 60,
}


def main() -> None:
    """Runs all parts and writes the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, for machines without a network")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a file in scripts/shapes")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="the folder of the results")
    parser.add_argument("--only", nargs="*", default=list(PARTS), help="names of parts")
    arguments = parser.parse_args()
    if arguments.wheels:
        install(arguments.wheels)
    results: dict[str, Any] = {}
    for part in arguments.only:
        results[part] = run(part, arguments.shape, arguments.tokens)
        print(f"{part}: {json.dumps(results[part])}", flush=True)
        write(arguments.output, results, f"{arguments.shape}, rows of {arguments.tokens} tokens")


def install(wheels: Path) -> None:
    """Installs jlora, and the packages that it lacks, from a folder; what is there already stays as it is."""
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheels)]
    subprocess.run([*command, "--no-build-isolation", "-e", str(HERE.parent), "torch", "peft"], check=True)


def run(part: str, shape: str, tokens: int) -> dict[str, Any]:
    """Returns the figures of a part, or its error."""
    name, start = part.removesuffix(" again"), time.perf_counter()
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--shape", shape, "--tokens", str(tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PARTS[part], cwd=HERE.parent)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {PARTS[part]} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    return {**json.loads(done.stdout.splitlines()[-1]), "part_seconds": round(time.perf_counter() - start, 1)}


def write(output: Path, results: dict[str, Any], work: str) -> None:
    """Writes the results as JSON and as a table."""
    card = results.get("versions", {}).get("device", "unknown").lower().replace(" ", "-")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"gpu-{card}.json").write_text(json.dumps(results, indent=1) + "\n")
    peaks = [value for value in results.get("peak", {}).values() if isinstance(value, float) and value > 1e9]
    lines = [
        f"# {card}: {work}",
        "",
        "| part | tokens/s | TFLOP/s | share of peak | peak memory (planned) |",
        "|---|---|---|---|---|",
    ]
    for part, figures in results.items():
        if "tokens_per_second" in figures:
            share = f"{figures['flops'] / max(peaks):.0%}" if peaks else "-"
            planned = f" ({figures['planned_bytes'] / 2**30:.2f})" if "planned_bytes" in figures else ""
            lines.append(
                f"| {part} | {figures['tokens_per_second']:.0f} | {figures['flops'] / 1e12:.1f} | {share} "
                f"| {figures['peak_bytes'] / 2**30:.2f} GiB{planned} |"
            )
    others = {part: figures for part, figures in results.items() if "tokens_per_second" not in figures}
    lines += ["", *(f"- {part}: {json.dumps(figures)}" for part, figures in others.items())]
    (output / f"gpu-{card}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
