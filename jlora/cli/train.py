"""`jlora train --config configs/law.py [--config.KEY=VALUE ...]`: trains an adapter.

Exit codes: 0 done, or saved after SIGTERM; 2 the user must change something; 130 saved after Ctrl-C; 1 another process
of the run was lost, or a bug; 143 or 130 ended by a second SIGTERM or Ctrl-C.
"""

import shlex
import signal
import sys
from pathlib import Path

import jax

from jlora.adapters.plain_lora import is_uniform_lora
from jlora.adapters.settings import spec_of
from jlora.api import Config, Result, finetune, load_config
from jlora.config.files import config_parser
from jlora.export.servers import SERVERS
from jlora.training import resume
from jlora.training.checkpoint import read_record


def main(argv: list[str]) -> None:
    """Runs `jlora train`."""
    parser = config_parser("train", "Train a LoRA adapter and export it as a PEFT directory.")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    result = finetune(config)
    if result.adapter is None:
        print(_how_to_continue(result, config, arguments.config, overrides))
        sys.exit(130 if result.stopped is signal.SIGINT else 0)
    print(f"\nExported the adapter from step {result.step} to {result.adapter}")
    if jax.process_index() == 0:  # the other processes may not see the files
        print(_next_steps(result.run, result.adapter, result.step, config.system_prompt))


def _next_steps(run: Path, adapter: Path, step: int, system_prompt: str) -> str:
    """Returns the commands that ask the adapter a question, verify it, and write it for a server."""
    which = [] if adapter.name == "adapter" else ["--step", str(step)]
    spec, vllm = spec_of(read_record(run, "--run")["config"]), SERVERS["vllm"]
    ranks = [rank for rank in vllm.ranks if rank >= max(spec.rank, vllm.usual)]
    form = ["--merged"]
    if is_uniform_lora(spec) and ranks:
        form = ["--for", "vllm", *(["--max_lora_rank", str(ranks[0])] if ranks[0] > vllm.usual else [])]
    system = ["--system", system_prompt] if system_prompt else []
    output = ["--output", str(adapter)] if which else []
    return "\n".join(
        [
            "Next steps:",
            f"  ask it:    {_command('generate', '--adapter', str(adapter), *system, '--prompt', 'YOUR QUESTION')}",
            f"  verify it: {_command('export', '--run', str(run), *which, *output, '--verify')}",
            f"  serve it:  {_command('export', '--run', str(run), *which, *form)}",
            *(["It was trained with one system prompt, so use the same --system for every question"] if system else []),
        ]
    )


def _how_to_continue(result: Result, config: Config, file: str, overrides: list[str]) -> str:
    """Returns what to do with a run that a signal stopped: the commands that continue and export it."""
    replaced = tuple(f"--config.{key}=" for key in (resume.RESUME_KEY, "process_id"))
    kept = [word for word in overrides if not word.startswith(replaced)]
    if config.process_id >= 0:
        kept.append("--config.process_id=N")
    everywhere = " in every process" if jax.process_count() > 1 else ""
    return (
        f"Stopped after step {result.step} of {result.steps} and saved. To continue, run{everywhere}:\n"
        f"  {_command('train', '--config', file, *kept, f'--config.{resume.RESUME_KEY}=auto')}\n"
        "To export the adapter as it is now, run:\n"
        f"  {_command('export', '--run', str(result.run), '--step', 'latest')}"
    )


def _command(program: str, *words: str) -> str:
    return shlex.join([sys.executable, "-m", f"jlora.{program}", *words])
