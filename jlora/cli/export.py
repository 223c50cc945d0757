"""`jlora export --run DIR [--step N|best|latest] [--for SERVER]`: a run's adapter as a PEFT directory.

With --for it is written in the form that the server reads rightly, and only if it computes what was trained. With
--merged, base and adapter are written as one model. --check ADAPTER --base BASE says whether they belong together.
"""

import argparse
from pathlib import Path

from jlora.bases.resolve import resolve_base
from jlora.export.compatibility import check
from jlora.export.exporter import default_output, export_adapter, find_step, merge_directory, merge_run, verify_adapter
from jlora.export.servers import LOADERS


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.export", description="Writes a run's adapter for PEFT.")
    parser.add_argument("--run", type=Path, help="output_dir of a run")
    parser.add_argument("--step", default="best", help="a step, best (default) or latest")
    parser.add_argument("--output", type=Path, help="where to; by default RUN/adapter for best, RUN/adapter-STEP else")
    parser.add_argument("--verify", action="store_true", help="load it with PEFT and compare logits and answers")
    parser.add_argument("--for", dest="loader", choices=LOADERS, default="", help="what will read it; verified too")
    parser.add_argument("--max_lora_rank", type=int, default=0, help="what vLLM is started with; by default 16")
    parser.add_argument("--merged", action="store_true", help="write base and adapter as one model, to RUN/merged")
    parser.add_argument("--check", type=Path, metavar="ADAPTER", help="do a PEFT directory and --base belong together?")
    parser.add_argument("--adapter", type=Path, help="with --merged, a PEFT directory instead of a run")
    parser.add_argument("--base", default="", help="to merge into, or alone, with --merged; or the base for --check")
    arguments = parser.parse_args(argv)
    if arguments.check:
        if not arguments.base or arguments.run or arguments.merged:
            parser.error("--check ADAPTER needs --base, and stands alone with it")
        print(check(arguments.check, resolve_base(arguments.base)))
        return
    run, loader, merged = arguments.run, arguments.loader, arguments.merged
    if not (run or merged):
        parser.error("--run is missing")
    if not run and not (arguments.output and (arguments.base or arguments.adapter)):
        parser.error("--merged needs --run, or --output with --adapter, --base, or both")
    if (arguments.base or arguments.adapter) and (run or not merged):
        parser.error("--base and --adapter go with --merged, instead of --run")
    if merged and (arguments.verify or loader):
        parser.error("--verify and --for are for adapters, not for --merged")
    if not run:
        merge_directory(arguments.adapter, arguments.base, arguments.output)
        print(f"merged model: {arguments.output}")
        return
    step = find_step(run, arguments.step)
    named = "merged" if merged else "adapter" if loader in ("", "peft") else f"adapter-{loader}"
    target = arguments.output or default_output(run, named, arguments.step, step)
    if merged:
        merge_run(run, step, target)
        print(f"merged model: {target}")
        return
    if target.exists() and arguments.verify:
        print(f"{target} exists: verifying it against the checkpoint of step {step}")
    else:
        export_adapter(run, target, step, loader, arguments.max_lora_rank)
        print(f"adapter of step {step}: {target}")
    if arguments.verify:
        print(verify_adapter(run, target, step).sentence)
