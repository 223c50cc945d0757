"""`jlora combine --adapters A=0.7 B=-0.3 --output DIR`: a weighted sum of adapters, written as one, exactly."""

import argparse
from pathlib import Path

from jlora.adapters import mixing
from jlora.export.combined import combine_directories


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.combine", description="Writes a sum of adapters as one.")
    parser.add_argument("--adapters", nargs="+", required=True, help="DIR=WEIGHT, as law/adapter=0.7; DIR alone is 1")
    parser.add_argument("--output", type=Path, required=True, help="where to")
    parser.add_argument("--base", default="", help="where the base is, if not where the adapters say")
    arguments = parser.parse_args(argv)
    parts = [mixing.read_weight(word) for word in arguments.adapters]
    if len({name for name, _ in parts}) < len(parts):
        parser.error("--adapters names one directory twice")
    rank = combine_directories(dict(parts), arguments.base, arguments.output)
    print(f"one adapter of rank {rank}: {arguments.output}")
