"""What is known of a run before a weight is read: its rows, its batches, its model, and what computes it."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from jlora.adapters import hf_names
from jlora.adapters.peft_config import read_spec
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import settings_of, spec_of
from jlora.bases.identity import check_base, fingerprint, template_source_hash, tokenizer_hash
from jlora.bases.resolve import hub_commit, is_hub_id, resolve_base
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.batches import Batches
from jlora.data.conversation import Conversation, ReadOptions
from jlora.data.examples import SizedExamples
from jlora.data.readers import files
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.distributed import processes
from jlora.distributed.sharding import check_batch, make_mesh, own_rows, row_ways
from jlora.distributed.sharding import describe as describe_mesh
from jlora.models import kernel_choice
from jlora.models.compute import Compute, Packing, default_dtype
from jlora.models.families import read_config
from jlora.models.llama import LlamaConfig
from jlora.planning.data_pipeline import plan_run, read_examples, read_rows
from jlora.training import resume

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
# What each process of a run may have in its own way; of data and base the contents are compared.
OWN = "process_id base_model train_data_dir eval_data_dir questions output_dir chat_template python".split()


class Ready(NamedTuple):
    """All that is known."""

    config: Config
    directory: Path  # of the base
    tokenizer: Any
    model: LlamaConfig
    compute: Compute
    mesh: jax.sharding.Mesh
    attention: str  # in words
    examples: SizedExamples
    steps: int
    batches: Batches
    held_out: Batches | None
    asked: list[Conversation]  # the held-out rows themselves
    record: dict[str, Any]  # config.json of the run


def make_ready(config: Config) -> Ready:
    """Reads all but the weights, and refuses what cannot be trained on; for every process of a run.

    Raises:
      UserError: what must change.
    """
    if processes.is_first():
        resume.check_output(config)
    rows, held_out_rows = read_rows(config)
    mesh = make_mesh(find_devices(config), config.mesh)
    check_batch(mesh, config.batch_size)
    directory = processes.in_turn(lambda: resolve_base(config.base_model, config.revision))
    model, tokenizer = read_config(directory), load_tokenizer(directory, config.chat_template)
    ends = end_tokens(directory, tokenizer)
    examples = processes.in_turn(lambda: read_examples(config, tokenizer, ends, rows, "training"))
    held_out: Any = []
    if held_out_rows:
        held_out = processes.in_turn(lambda: read_examples(config, tokenizer, ends, held_out_rows, "held out"))
    config = take_form(config, directory, model)
    steps, batches, eval_batches = plan_run(config, model, examples, held_out, row_ways(mesh))
    both = [some for some in (batches, eval_batches) if some]
    longest = max(shape.length for some in both for shape in some.shapes)
    packing = Packing(*(max(of) for of in zip(*(some.packing for some in both), strict=True)))
    batches = dataclasses.replace(batches, local_rows=own_rows(mesh, batches.rows))
    if eval_batches:
        eval_batches = dataclasses.replace(eval_batches, local_rows=own_rows(mesh, eval_batches.rows))
    device, wish = jax.local_devices()[0], config.attn_implementation
    compute = choose_compute(config, device)
    attention, why = processes.of_first(
        lambda: kernel_choice.choose(wish, device, model, compute.compute_dtype, longest)
    )
    compute = dataclasses.replace(compute, attention=attention, mesh=mesh, packing=packing)
    words = f"{attention}{why and f' (not {why})'}"
    record = describe(config, directory, tokenizer, mesh, compute)
    shared = {**record["config"], **record["data"], **record["versions"], "base": record["base"]["fingerprint"]}
    shared |= {"end tokens": sorted(ends), "lengths": hashlib.sha256(batches.sizes.tobytes()).hexdigest()}
    processes.agree({key: value for key, value in shared.items() if key not in OWN})
    return Ready(
        config,
        directory,
        tokenizer,
        model,
        compute,
        mesh,
        words,
        examples,
        steps,
        batches,
        eval_batches,
        held_out_rows,
        record,
    )


def choose_platform(config: Config) -> None:
    """Tells JAX, before it is first used, what `device` asks for, and a CPU to run programs where they are called."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # for heap.keep_freed; nothing else is to be done beside
    if config.device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[config.device])


def find_devices(config: Config) -> list[jax.Device]:
    """The devices that `device` asks for, of all processes.

    Raises:
      UserError: there are none.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts where the wanted platform has no plugin
        reason = str(error).strip().split("\n")[0] or "no plugin for it"
        raise UserError(
            f"device={config.device}: JAX finds none here ({reason}). Install jlora[cuda12], jlora[cuda13] or "
            "jlora[tpu] for this machine, or set device=auto"
        ) from None


def choose_compute(config: Config, device: Any) -> Compute:
    """The dtypes of this run: `auto` resolved for a device. What is recomputed follows from the memory, later."""
    auto = default_dtype(device)
    names = {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    param = names[config.param_dtype]
    compute = param if config.compute_dtype == "auto" else names[config.compute_dtype]
    if config.fp16 and config.compute_dtype == "auto":
        compute = jnp.float16 if auto == jnp.float16 else jnp.bfloat16
        if compute == jnp.bfloat16:
            print("fp16: computing in bfloat16, which needs no loss scaling")
    if compute == jnp.float16:
        why = f", since a {device.device_kind} has no bfloat16" if config.compute_dtype == "auto" else ""
        print(f"computing in float16{why}: the loss is scaled, and a step whose gradients overflow is skipped")
    return Compute(param, compute, quantize=config.quantize_base)


def take_form(config: Config, directory: Path, model: LlamaConfig) -> Config:
    """The config with the adapter's form that `init_adapter` has, where it is set.

    Raises:
      UserError: a key asks for what this base does not have.
    """
    layers = model.num_hidden_layers
    if config.init_adapter:
        check_base(Path(config.init_adapter) / WEIGHTS, directory)
        settings = settings_of(read_spec(Path(config.init_adapter), layers))
        form = ", ".join(f"{key}={settings[key]!r}" for key in ("peft_type", "lora_rank", "lora_alpha"))
        print(f"starting from the adapter {config.init_adapter}, in its own form: {form}")
        return dataclasses.replace(config, **settings)
    if problems := spec_of(dataclasses.asdict(config)).problems(hf_names.projections(), layers):
        raise UserError("\n  ".join([f"{config.base_model} does not fit the config:", *problems]))
    return config


def describe(config: Config, base: Path, tokenizer: Any, mesh: jax.sharding.Mesh, compute: Compute) -> dict[str, Any]:
    """What config.json of the run says: the config, where data and base lie, their hashes, and what computes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy")
    questions = config.eval_data_dir or config.train_data_dir
    reading = ReadOptions.from_config(dataclasses.asdict(config))
    held_out = config.eval_data_dir
    return {
        "config": dataclasses.asdict(config),
        "data": {
            "train": files.hash_files(config.train_data_dir, "train_data_dir", reading),
            "held_out": files.hash_files(held_out, "eval_data_dir", reading) if held_out else "",
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template_source_hash(tokenizer),
            "questions": files.resolved_path(questions),
        },
        "base": {
            "directory": str(base.resolve()),
            "hub_id": config.base_model if is_hub_id(config.base_model) else "",
            "commit": hub_commit(base),
            "fingerprint": fingerprint(base),
        },
        "versions": {
            "jlora": jlora.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "runtime": {
            "devices": mesh.size,
            "processes": jax.process_count(),
            "mesh": describe_mesh(mesh),
            "device_kind": mesh.devices.flat[0].device_kind,
            "param_dtype": jnp.dtype(compute.param_dtype).name,
            "compute_dtype": jnp.dtype(compute.compute_dtype).name,
            "attention": compute.attention,
            **({} if config.remat == "auto" else {"remat": config.remat}),
        },
    }
