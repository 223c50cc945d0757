"""`jlora sweep --config C --sweep.lora_rank=4,8 --sweep.learning_rate=1e-4,3e-4`: trains all combinations at once.

The settings share the base model and programs. Exit codes as for `jlora train`.
"""

import dataclasses
import signal
import sys

from jlora.api import load_config, run_sweep
from jlora.config.files import config_parser
from jlora.sweep.groups import KINDS


def split_words(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the settings of `--sweep.KEY=VALUE` or `--sweep.KEY VALUE`, and all other words."""
    given, others, words = {}, [], iter(overrides)
    for word in words:
        if word.startswith("--sweep."):
            key, equals, value = word.removeprefix("--sweep.").partition("=")
            given[key] = value if equals else next(words, "")
        else:
            others.append(word)
    return given, others


def main(argv: list[str]) -> None:
    """Runs `jlora sweep`."""
    parser = config_parser("sweep", "Trains many settings on one base model, and exports the best.")
    parser.add_argument("--groups", metavar="KIND", help=f"leave out one group of training rows at a time: {KINDS}")
    arguments, overrides = parser.parse_known_args(argv)
    given, others = split_words(overrides)
    if arguments.groups is not None:
        given["groups"] = arguments.groups
    config = load_config(arguments.config, others)
    result = run_sweep(dataclasses.replace(config, sweep={**config.sweep, **given}))
    page = f"The page {result.run / 'sweep.html'}"
    if result.adapter is None and not result.stopped:
        print(f"\n{page} shows the effects. Correct or remove the rows that do harm, and compare again.")
        return
    if result.adapter is None:
        print("Stopped and saved. To continue, run the same command with --config.resume_from_checkpoint=auto")
        sys.exit(130 if result.stopped is signal.SIGINT else 0)
    print(f"\nExported the adapter of the winner to {result.adapter}")
    print(f"{page} has all losses. Settings for a config:\n{result.pasted}")
