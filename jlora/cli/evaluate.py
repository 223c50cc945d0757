"""`jlora evaluate --adapter [NAME=]DIR [...] [--data HELD_OUT] [--config FILE]`: compares adapters with the base model.

It writes evaluation.json, evaluation.html and evaluation.md, and continues where an interrupted evaluation stopped.
"""

import argparse

from jlora import UserError
from jlora.cli.generate import adapters_by_name, add_model_options
from jlora.common.paths import user_path
from jlora.config.files import load_config
from jlora.evaluation.run import Request, Tasks, evaluate_adapters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora evaluate",
        description="Compare adapters with their base model on held-out rows.",
        epilog="Override any setting with --config.KEY=VALUE, for example --config.eval_data_dir=data/law_eval.",
    )
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="the run's config; default: the settings in the adapter")
    parser.add_argument("--data", default="", help="held-out rows; default: those of the config")
    parser.add_argument("--general", default="", help="general texts of your own, for what the adapter forgot")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=0,
        help="tokens of an answer, at most; default: twice the written one",
    )
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), default=[], help="tasks of lm-evaluation-harness: hellaswag,mmlu"
    )
    parser.add_argument("--limit", type=int, help="with --tasks: questions of each task, at most")
    parser.add_argument("--task_path", type=user_path, help="with --tasks: a directory with tasks of your own")
    parser.add_argument("--chat_tasks", action="store_true", help="with --tasks: ask through the chat template")
    parser.add_argument("--output", type=user_path, help="directory to write; default: evaluation, beside the adapter")
    return parser


def main(argv: list[str]) -> None:
    """Runs `jlora evaluate`."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if not arguments.adapter:
        parser.error("Set --adapter.")
    if arguments.max_new_tokens < 0:
        parser.error(f"--max_new_tokens {arguments.max_new_tokens}: Expected 0 or more.")
    if arguments.output_rules:
        parser.error("--output_rules does not apply here: the answers are evaluated as the model gives them.")
    if overrides and not arguments.config:
        raise UserError(f"{overrides[0]} requires --config FILE, whose settings it changes.")
    config = load_config(arguments.config, overrides) if arguments.config else None
    options = {"revision": arguments.revision, "quantize": arguments.quantize_base, "mesh": arguments.mesh}
    adapters = adapters_by_name(arguments.adapter)
    tasks = Tasks(arguments.tasks, arguments.task_path, arguments.limit, arguments.chat_tasks)
    places = (arguments.data, arguments.general, arguments.output, arguments.max_new_tokens)
    request = Request(arguments.base or "", adapters, config, *places, tasks)
    for line in evaluate_adapters(request, **options):
        print(line)
