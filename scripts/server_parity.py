"""Compares the answers of real servers with jlora's own, for three adapters, and checks that a broken one is caught.

PATH=VLLM_ENVIRONMENT/bin:$PATH python scripts/server_parity.py [--servers vllm llama.cpp jlora] [--work DIR]

The adapters are that of configs/law.py, one with patterned ranks and rsLoRA, and one that was trained on a base model
in a GGUF file. Each server answers the 40 held-out questions in data/, greedily and in float32; the adapter of an
earlier step must be caught. vLLM must be on the PATH, and llama.cpp (xllamacpp) in this environment.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from float32_gguf import download_quantized, write_float32

ROOT = Path(__file__).parents[1]
HELD_OUT = ("law_eval_en", "law_eval")  # 20 rows each, in English and Chinese; no adapter is trained on them
PATTERNED = ["use_rslora=true", "lora_rank=8", "rank_pattern={'layers.1.self_attn.v_proj': 4}", "max_steps=50"]


def jlora(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of jlora; its output is shown if it fails."""
    return subprocess.run([sys.executable, "-m", "jlora", *words], cwd=ROOT, capture_output=True, text=True)


def trained(work: Path, name: str, *settings: str) -> Path:
    """Returns a run of configs/law.py with these settings; trains it unless it is there."""
    run = work / name
    if not (run / "adapter").exists():
        words = [f"--config.{setting}" for setting in (*settings, f"output_dir={run}", "sample_questions=0")]
        done = jlora("train", "--config", "configs/law.py", *words)
        assert done.returncode == 0, done.stderr
    return run


def live(run: Path, target: Path, server: str, gguf: Path) -> subprocess.CompletedProcess[str]:
    """Asks a server with the adapter in `target` the held-out questions, and compares its answers with the run's."""
    options = ["--base_gguf", str(gguf)] if server == "llama.cpp" else []
    words = ("--for", server, "--live", "spawn", "--questions", str(gguf.parent / "questions"), *options)
    return jlora("export", "--run", str(run), "--output", str(target), *words)


def compare(run: Path, server: str, gguf: Path) -> str:
    """Returns what `jlora export --live` says about a run's adapter on a server."""
    target = run / f"parity-{server}"
    shutil.rmtree(target, ignore_errors=True)
    done = live(run, target, server, gguf)
    return (done.stderr if done.returncode else done.stdout).strip().split("\n")[-1]


def broken(run: Path, server: str, gguf: Path) -> str:
    """Returns what it says if the adapter on the server is that of an earlier step."""
    target = run / f"broken-{server}"
    shutil.rmtree(target, ignore_errors=True)
    first = min(int(place.name) for place in (run / "checkpoints").iterdir() if place.name.isdigit())
    made = jlora("export", "--run", str(run), "--step", str(first), "--for", server, "--output", str(target))
    assert made.returncode == 0, made.stderr
    done = live(run, target, server, gguf)
    assert done.returncode == 1, f"not caught: {done.stdout}"
    return done.stderr.strip().split("\n")[-1]


def main() -> None:
    """Trains the adapters and prints what each server does with each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--servers", nargs="+", default=["vllm", "llama.cpp", "jlora"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "server_parity")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in HELD_OUT:
        shutil.copytree(ROOT / "data" / name, work / "questions" / name, dirs_exist_ok=True)
    gguf = work / "base.gguf"
    if not gguf.exists():
        write_float32(download_quantized(work), gguf)
    runs = {
        "law": trained(work, "law"),
        "patterned rsLoRA": trained(work, "patterned", *PATTERNED),
        "GGUF base": trained(work, "gguf", f"base_model={gguf}", "max_steps=50"),
    }
    for server in arguments.servers:
        for name, run in runs.items():
            print(f"{server}, {name}: {compare(run, server, gguf)}", flush=True)
        print(f"{server}, an earlier step: {broken(runs['law'], server, gguf)}", flush=True)
    figures = {
        f"{server}, {name}": json.loads((run / f"parity-{server}/parity.json").read_text())["live"][server]
        for server in arguments.servers
        for name, run in runs.items()
        if (run / f"parity-{server}/parity.json").exists()
    }
    (work / "parity.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
