"""`jlora train --config configs/law.py [--config.KEY=VALUE ...]`: trains a LoRA adapter.

Exit codes: 0 done, or saved on SIGTERM; 2 something to change; 130 saved on Ctrl-C; 1 another process of the run is
gone, or a fault of ours.
"""

import shlex
import signal
import sys

import jax

from jlora.api import Result, finetune
from jlora.config.files import config_parser, load_config
from jlora.config.schema import Config
from jlora.training import resume


def main(argv: list[str]) -> None:
    """The command line."""
    parser = config_parser("train", "Trains a LoRA adapter.")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    result = finetune(config)
    if result.stopped:
        print(_stopped(result, _again(config, arguments.config, overrides)))
        sys.exit(130 if result.stopped is signal.SIGINT else 0)
    print(f"adapter of step {result.step}: {result.adapter}")
    if config.system_prompt:
        asked_with = shlex.quote(config.system_prompt)
        print(f"it knows one system prompt, so ask it with the same: --system {asked_with}")


def _stopped(result: Result, again: str) -> str:
    """What to do with a run that a signal stopped."""
    return (
        f"stopped after step {result.step} of {result.steps}; it is saved. To continue"
        f"{', in every process' if jax.process_count() > 1 else ''}:\n  {again}\n"
        f"The adapter so far: {sys.executable} -m jlora.export --run {result.run} --step latest"
    )


def _again(config: Config, file: str, overrides: list[str]) -> str:
    """The command that continues a run."""
    own = tuple(f"--config.{key}=" for key in (resume.KEY, "process_id"))
    kept = [word for word in overrides if not word.startswith(own)]
    if config.process_id >= 0:
        kept.append("--config.process_id=N")
    words = [sys.executable, "-m", "jlora.train", "--config", file, *kept, f"--config.{resume.KEY}=auto"]
    return shlex.join(words)
