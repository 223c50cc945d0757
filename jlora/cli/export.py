"""`jlora export --run DIR [--step N|best|latest] [--for SERVER]`: writes a run's adapter as a PEFT directory.

--for writes the form that a server loads correctly, and only after verifying that it computes what was trained.
--merged writes the base model with the adapter merged into it. --check ADAPTER --base BASE checks that they match.
"""

import argparse

from jlora import export_adapter, verify_adapter
from jlora.bases.resolve import resolve_base
from jlora.common.paths import user_path
from jlora.distributed.platforms import find_devices
from jlora.export.base_match import check_base_match
from jlora.export.converted import convert_directory
from jlora.export.exporter import default_output, find_step, merge_directory, merge_run, verify_live
from jlora.export.live_server import SPAWN
from jlora.export.servers import SERVERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jlora export", description="Export a run's adapter.")
    parser.add_argument("--run", type=user_path, help="the output_dir of a run")
    parser.add_argument("--step", default="best", help="a step, best (default) or latest")
    parser.add_argument(
        "--output",
        type=user_path,
        help="directory to write; default: RUN/adapter for the best step, else RUN/adapter-STEP",
    )
    parser.add_argument("--verify", action="store_true", help="load it with PEFT, and compare logits and answers")
    parser.add_argument(
        "--for", dest="server", choices=SERVERS, default="", help="the server; verifies the adapter too"
    )
    parser.add_argument("--max_lora_rank", type=int, default=0, help="vLLM's --max-lora-rank; default: 16")
    parser.add_argument(
        "--live", metavar="URL|spawn", default="", help="with --for: ask a running server, or start one, and compare"
    )
    parser.add_argument("--live_name", default="", help="with --live URL: the adapter's name there")
    parser.add_argument("--questions", default="", help="with --live: rows to ask; default: the run's held-out rows")
    parser.add_argument("--base_gguf", type=user_path, help="with --live spawn, for llama.cpp: the base model")
    parser.add_argument("--merged", action="store_true", help="write base model and adapter as one model, RUN/merged")
    parser.add_argument("--check", type=user_path, metavar="ADAPTER", help="check that a PEFT directory matches --base")
    parser.add_argument("--adapter", type=user_path, help="with --merged or --for: a PEFT directory, instead of --run")
    parser.add_argument("--base", default="", help="with --adapter, --merged or --check: the base model")
    return parser


def _problem(arguments: argparse.Namespace) -> str:
    """Returns what is wrong with a combination of options; "" if nothing is."""
    run, merged, adapter, base = arguments.run, arguments.merged, arguments.adapter, arguments.base
    if arguments.check:
        alone = base and not (run or merged)
        return "" if alone else "--check ADAPTER requires --base, and no other option."
    converts = adapter and arguments.server and not merged
    if not (run or merged or converts):
        return "--run is not set. Set it to the output_dir of a run."
    if converts and not arguments.output:
        return "--for with --adapter requires --output, a new directory."
    if not run and not (arguments.output and (base or adapter)):
        return "--merged requires --run, or --output with --adapter, --base or both."
    if (base or adapter) and (run or not (merged or converts)):
        return "--base and --adapter require --merged or --for, and cannot be combined with --run."
    if (merged and (arguments.verify or arguments.server)) or (converts and arguments.verify):
        return "--verify requires --run; --verify and --for cannot be combined with --merged."
    if arguments.live and not (run and arguments.server not in ("", "peft")):
        return "--live requires --run, and --for with the server."
    if arguments.live and arguments.live != SPAWN and not arguments.live_name:
        return "--live URL requires --live_name, the name that the adapter has there."
    return ""


def main(argv: list[str]) -> None:
    """Runs `jlora export`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if problem := _problem(arguments):
        parser.error(problem)
    run, server, output = arguments.run, arguments.server, arguments.output
    if arguments.check:
        print(check_base_match(arguments.check, resolve_base(arguments.base)))
        return
    find_devices()
    if run:
        _export_run(arguments)
    elif arguments.merged:
        merge_directory(arguments.adapter, arguments.base, output)
        print(f"Wrote the merged model to {output}")
    else:
        rank = arguments.max_lora_rank
        print(convert_directory(arguments.adapter, arguments.base, output, server, rank))
        print(f"Wrote the adapter for {server} to {output}")


def _export_run(arguments: argparse.Namespace) -> None:
    run, server = arguments.run, arguments.server
    step = find_step(run, arguments.step)
    name = "merged" if arguments.merged else "adapter" if server in ("", "peft") else f"adapter-{server}"
    target = arguments.output or default_output(run, name, arguments.step, step)
    if arguments.merged:
        merge_run(run, step, target)
        print(f"Wrote the merged model to {target}")
        return
    if target.exists() and (arguments.verify or arguments.live):
        print(f"Verifying the existing {target} against the checkpoint of step {step}")
    else:
        export_adapter(run, target, step, server, arguments.max_lora_rank)
        print(f"Exported the adapter from step {step} to {target}")
    if arguments.verify:
        print(verify_adapter(run, target, step).sentence)
    if arguments.live:
        options = {"name": arguments.live_name, "questions": arguments.questions, "gguf": arguments.base_gguf}
        print(verify_live(run, target, step, server, arguments.live, **options).sentence)
