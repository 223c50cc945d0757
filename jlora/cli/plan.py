"""`jlora plan`: forecasts memory and time of a run, and searches for faster settings that fit.

    jlora plan --config configs/law.py --target v5e:2x4

It reads the base model's config.json, not its weights, and compiles the real training step for the target. Exit codes:
0: the run fits; 2: it does not, or a setting is wrong.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from jlora.bases.resolve import resolve_base
from jlora.common.accelerators import unprinted
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.config.files import config_parser, load_config
from jlora.config.schema import Config
from jlora.data.readers.splits import split_sheet
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.distributed.platforms import find_devices
from jlora.distributed.sharding import data_parallel_size, describe
from jlora.models import attention_backend
from jlora.models.families import read_config
from jlora.models.model_config import ModelConfig
from jlora.planning.data_pipeline import RowSource, fix_template_settings, read_examples, read_rows, with_new_tokens
from jlora.planning.forecast import Forecast, Layout, layout_from_examples, layout_of_length, make_job
from jlora.planning.hardware import EXAMPLES, GIB, Target, find_target
from jlora.planning.search import changed_settings, choose_remat, describe_shortfall, find_fastest, suggest_fix
from jlora.training.setup import choose_compute, configure_jax


def main(argv: list[str]) -> None:
    """Runs `jlora plan` with these arguments."""
    parser = config_parser("plan", "Forecasts whether a run fits and how long a step takes, without weights.")
    parser.add_argument("--target", default="here", help=f"the devices to plan for, for example {EXAMPLES}")
    parser.add_argument("--tokens", type=int, default=0, help="assume this length for every example")
    parser.add_argument("--only", action="store_true", help="do not search for other settings, which takes longer")
    parser.add_argument(
        "--together",
        type=int,
        default=0,
        metavar="N",
        help="plan a sweep that trains N adapters in one step (no search)",
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.together < 0:
        parser.error(f"--together {arguments.together}: Expected 0 or more.")
    config = load_config(arguments.config, overrides)
    target = _find_target(arguments.target, config)
    directory = Path(config.base_model)
    if directory.suffix != ".json":
        directory = resolve_base(config.base_model, config.revision, weights=False)
    model = read_config(directory)
    layout, lengths = _layout(config, directory, model, arguments.tokens)
    compute, here = choose_compute(config, target.devices[0]), arguments.target == "here"
    job = make_job(config, model, compute, target, layout)
    attention, _ = attention_backend.choose_backend(
        config.attn_implementation,
        target.devices[0],
        model,
        compute.compute_dtype,
        (job.rows // data_parallel_size(job.mesh), job.shape.length),
        job.packing,
        here=here,
    )
    compute = dataclasses.replace(job.compute, attention=attention)
    job, only = dataclasses.replace(job, compute=compute, team=arguments.together), arguments.only or arguments.together
    with _compiler_of(target, here=here):
        forecast, *_ = choose_remat(job, target, 1000, lambda line: None)
    fits = forecast.fits(target.limit)
    for line in report(forecast, target, lengths):
        print(line)
    if only and fits:
        return
    if only:
        raise UserError(describe_shortfall(forecast, target))
    with _compiler_of(target, here=here):
        best = find_fastest(forecast, target, layout, print)
    if best is forecast:
        print("No faster settings that fit were found")
    elif best is not None:
        print(f"Faster settings ({best.needed / GIB:.2f} GiB):" if fits else "Settings that fit:")
        for key, value in changed_settings(config, best.job.config).items():
            print(f"    c.{key} = {value!r}")
    if not fits:
        raise UserError(f"{describe_shortfall(forecast, target)} {suggest_fix(config, best)}")


@contextlib.contextmanager
def _compiler_of(target: Target, *, here: bool) -> Iterator[None]:
    """Discards what the compiler for another machine prints, such as that a program does not fit.

    Raises:
      UserError: the compiler failed.
    """
    if here:
        yield
        return
    try:
        with unprinted():
            yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"The compiler for --target {target.name} failed: {reason}. For a GPU, it needs all packages of "
            "jlora[cuda-compiler]; for a TPU, those of jlora[tpu]."
        ) from None


def _find_target(name: str, config: Config) -> Target:
    """Returns the target, after selecting the JAX platform that it needs."""
    if name != "here":
        return find_target(name, find_devices("cpu"))  # only the target's compiler is needed
    configure_jax(config)
    return find_target(name, find_devices(config.device))


def _layout(config: Config, directory: Path, model: ModelConfig, tokens: int) -> tuple[Layout, str]:
    """Returns how batches are laid out, and a note on where the lengths of the examples come from."""
    paths = RowSource(config, "train_data_dir").paths
    if not tokens and directory.is_dir() and all(Path(split_sheet(path)[0]).exists() for path in paths):
        tokenizer = load_tokenizer(directory, config.chat_template, config.chat_date)
        rows, _ = read_rows(config, lambda line: None)
        config = fix_template_settings(config, tokenizer, rows, lambda line: None)
        ends = end_tokens(directory, tokenizer)
        vocab_size = with_new_tokens(config, model, tokenizer).vocab_size
        examples = read_examples(config, tokenizer, ends, rows, "training", vocab_size, lambda line: None)
        return layout_from_examples(model, examples), f"row lengths from {', '.join(paths)}"
    length = tokens or config.max_seq_length
    source = "--tokens" if tokens else "max_seq_length"
    return layout_of_length(length), f"assuming {length} tokens per example, all trained on ({source})"


def report(forecast: Forecast, target: Target, lengths: str) -> list[str]:
    """Returns the forecast as lines for people."""
    job, compute = forecast.job, forecast.job.compute
    kind = target.devices[0].device_kind
    lines = [
        f"{job.mesh.size} x {kind}, {describe(job.mesh)}; remat={compute.remat}, "
        f"{jax.numpy.dtype(compute.param_dtype).name} base, attention by {compute.attention}",
        f"Step: {job.micro_batches} forward and backward {'pass' if job.micro_batches == 1 else 'passes'} of "
        f"{job.rows} x {job.shape.length} tokens{f' for each of {job.team} adapters' if job.team else ''}; {lengths}",
    ]
    room = "" if target.limit is None else f" of {target.limit / GIB:.2f}"
    verdict = "Fits" if forecast.fits(target.limit) else "DOES NOT FIT"
    lines.append(f"{verdict}: {forecast.needed / GIB:.2f}{room} GiB on each device")
    if forecast.memory:
        parts = {**dataclasses.asdict(forecast.memory), "activations, temporaries, padding": forecast.memory.rest}
        parts["program"] = parts.pop("code")
        del parts["rest"]
        lines += [f"  {size / GIB:8.3f}  {name}" for name, size in parts.items()]
        lines.append(f"  The largest of these is {max(parts, key=lambda name: parts[name])}")
    work = forecast.work
    lines.append(f"Per device and step: {work.flops / 1e12:.2f} TFLOPs; {_communication(forecast)}")
    if forecast.kernels:
        kernels = sorted(forecast.kernels.items(), key=lambda item: -item[1][1])
        each = ", ".join(f"{kind} {moved / 1e9:.1f} GB in {plural(runs, 'run')}" for kind, (runs, moved) in kernels)
        lines.append(f"Kernels move {work.moved / 1e9:.1f} GB: {each}")
    if seconds := work.seconds(target):
        limit = max(seconds, key=lambda name: seconds[name])
        each = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        lines.append(
            f"At least {seconds[limit]:.3f} s per step, limited by {limit}. No real step reaches this roofline bound "
            f"(seconds at the maker's published peaks: {each})"
        )
    else:
        lines.append("No step time: jlora has no peak figures for these devices (jlora/planning/hardware.py)")
    return lines


def _communication(forecast: Forecast) -> str:
    kinds: dict[str, float] = {}
    for collective in forecast.collectives:
        kinds[collective.kind] = kinds.get(collective.kind, 0.0) + collective.size * collective.times
    if not kinds:
        return "nothing sent between devices"
    listed = ", ".join(f"{kind} of {size / 1e6:.2f} MB" for kind, size in kinds.items())
    return f"{forecast.work.sent / 1e6:.2f} MB sent ({listed})"
