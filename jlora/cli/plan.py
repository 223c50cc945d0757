"""Will it fit, how fast can it be, what would be better: `python -m jlora.plan --config FILE [--target v5e:2x4]`.

Reads the base's config.json, never its weights, and compiles the real training step for the target. Exit codes: 0 it
fits; 2 it does not, or something else is to change.
"""

import dataclasses
from pathlib import Path

import jax

from jlora.bases.resolve import resolve_base
from jlora.common.errors import UserError
from jlora.config.files import config_parser, load_config
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.data.chat import end_tokens, load_tokenizer
from jlora.distributed.sharding import describe
from jlora.models import kernel_choice
from jlora.models.compute import UNKNOWN, Packing
from jlora.models.families import read_config
from jlora.models.llama import LlamaConfig
from jlora.planning.forecast import Forecast, Layout, laid_out, make_job
from jlora.planning.pipeline import read_examples, read_rows
from jlora.planning.search import changes, first_fit, remedy, search, too_large
from jlora.planning.targets import EXAMPLES, GIB, Target, find_target
from jlora.training.setup import choose_compute, choose_platform, find_devices


def main(argv: list[str]) -> None:
    """The command line."""
    parser = config_parser("jlora.plan", "Says whether a run fits, and what it costs, before a weight is read.")
    parser.add_argument("--target", default="here", help=f"where it is to run: {EXAMPLES}")
    parser.add_argument("--tokens", type=int, default=0, help="length of every example, instead of the data's own")
    parser.add_argument("--only", action="store_true", help="say nothing of other settings, which each take as long")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    target = _find(arguments.target, config)
    directory = Path(config.base_model)
    if directory.suffix != ".json":
        directory = resolve_base(config.base_model, config.revision, weights=False)
    model = read_config(directory)
    layout, lengths = _layout(config, directory, model, arguments.tokens)
    compute, here = choose_compute(config, target.devices[0]), arguments.target == "here"
    wish, dtype = "auto" if target.stands_in else config.attn_implementation, compute.compute_dtype
    attention, _ = kernel_choice.choose(wish, target.devices[0], model, dtype, config.max_seq_length, here=here)
    compute = dataclasses.replace(compute, attention=attention)
    seen, _ = first_fit(make_job(config, model, compute, target, layout), target, 1000, lambda line: None)
    fits = seen.fits(target.limit)
    for line in report(seen, target, lengths):
        print(line)
    if arguments.only and fits:
        return
    if arguments.only:
        raise UserError(too_large(seen, target))
    best = search(seen, target, layout, print)
    if best is seen:
        print("no other setting that fits should be faster")
    elif best is not None:
        print(f"this fits, and should be faster ({best.needed / GIB:.2f} GiB):" if fits else "this fits:")
        for key, value in changes(config, best.job.config).items():
            print(f"    c.{key} = {value!r}")
    if not fits:
        raise UserError(f"{too_large(seen, target)}. {remedy(config, best)}")


def _find(name: str, config: Config) -> Target:
    """The target, with the devices of this machine or stand-ins."""
    if name != "here" and not name.startswith("gpu"):
        jax.config.update("jax_platforms", "cpu")  # the slice's compiler is asked directly
    elif name == "here":
        choose_platform(config)
    return find_target(name, find_devices(config))


def _layout(config: Config, directory: Path, model: LlamaConfig, tokens: int) -> tuple[Layout, str]:
    """How batches are laid out, and a sentence on where their lengths come from."""
    if not tokens and directory.is_dir() and Path(config.train_data_dir).exists():
        tokenizer = load_tokenizer(directory, config.chat_template)
        rows, _ = read_rows(config, lambda line: None)
        ends = end_tokens(directory, tokenizer)
        examples = read_examples(config, tokenizer, ends, rows, "training", lambda line: None)
        return laid_out(model, examples), f"row lengths from {config.train_data_dir}"
    length = tokens or config.max_seq_length

    def layout(config: Config, ways: int) -> tuple[int, int, Shape, Packing]:
        return config.gradient_accumulation_steps, config.batch_size, Shape(length, length), UNKNOWN

    source = "--tokens" if tokens else "max_seq_length"
    return layout, f"every example taken as {length} tokens long ({source}), all of them trained on"


def report(seen: Forecast, target: Target, lengths: str) -> list[str]:
    """What was found, in lines."""
    job, compute = seen.job, seen.job.compute
    devices = f"{job.mesh.size} x {target.devices[0].device_kind}" + (f" as {target.name}" if target.stands_in else "")
    lines = [
        f"{devices}, {describe(job.mesh)}; remat={compute.remat}, {jax.numpy.dtype(compute.param_dtype).name} base",
        f"a step: {job.micro_batches} forward and backward passes of {job.rows} x {job.shape.length} tokens; {lengths}",
    ]
    room = "" if target.limit is None else f" of {target.limit / GIB:.2f}"
    lines.append(
        f"{'fits' if seen.fits(target.limit) else 'DOES NOT FIT'}: {seen.needed / GIB:.2f}{room} GiB on each device"
    )
    if target.stands_in:
        lines.append(f"  {target.stands_in}. How far off such a figure is was never checked on a GPU")
    if seen.memory:
        parts = {**dataclasses.asdict(seen.memory), "activations, temporaries, padding": seen.memory.rest}
        parts["program"] = parts.pop("code")
        del parts["rest"]
        lines += [f"  {size / GIB:8.3f}  {name}" for name, size in parts.items()]
        lines.append(f"  the largest of these, which limits it: {max(parts, key=lambda name: parts[name])}")
    work = seen.work
    lines.append(f"on each device a step: {work.flops / 1e12:.2f} TFLOPs; {_sent(seen)}")
    if seconds := work.seconds(target):
        limit = max(seconds, key=lambda name: seconds[name])
        each = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        lines.append(
            f"at least {seconds[limit]:.3f} s a step, limited by {limit}: a roofline, which no real step reaches "
            f"(seconds by the maker's peaks: {each})"
        )
    else:
        lines.append("no step time: the peaks of these devices are not in jlora's table (jlora/targets.py)")
    return lines


def _sent(seen: Forecast) -> str:
    kinds: dict[str, float] = {}
    for collective in seen.collectives:
        kinds[collective.kind] = kinds.get(collective.kind, 0.0) + collective.size * collective.times
    if not kinds:
        return "nothing sent between devices"
    listed = ", ".join(f"{kind} of {size / 1e6:.2f} MB" for kind, size in kinds.items())
    return f"{seen.work.sent / 1e6:.2f} MB sent ({listed})"
