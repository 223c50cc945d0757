"""`jlora combine --adapters A=0.7 B=-0.3 --output DIR`: combine adapters into one, as an exact weighted sum."""

import argparse

from jlora.adapters import combining
from jlora.common.paths import user_path
from jlora.common.plural import plural
from jlora.distributed.platforms import find_devices
from jlora.export.combined import combine_directories


def main(argv: list[str]) -> None:
    """Runs `jlora combine`."""
    parser = argparse.ArgumentParser(prog="jlora combine", description="Combine adapters into one, as a weighted sum.")
    parser.add_argument(
        "--adapters",
        nargs="+",
        required=True,
        help="PEFT directories with weights, as in law/adapter=0.7; the default weight is 1",
    )
    parser.add_argument("--output", type=user_path, required=True, help="directory to write")
    parser.add_argument("--base", default="", help="the base model; default: the one that the adapters name")
    arguments = parser.parse_args(argv)
    find_devices("cpu")
    parts = [combining.read_weight(word) for word in arguments.adapters]
    if len({name for name, _ in parts}) < len(parts):
        parser.error("--adapters lists the same directory twice; list each directory once")
    rank = combine_directories(dict(parts), arguments.base, arguments.output)
    print(f"Combined {plural(len(parts), 'adapter')} into one of rank {rank}: {arguments.output}")
