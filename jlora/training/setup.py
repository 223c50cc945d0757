"""Prepares a run before any weight is read: rows, batches, model config, devices and dtypes."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.peft_config import read_spec
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.settings import settings_of, spec_of
from jlora.bases.hashes import check_base, fingerprint, template_source_hash, tokenizer_hash
from jlora.bases.resolve import hub_commit, is_hub_id, resolve_base
from jlora.common import hf_names
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.batches import Batches
from jlora.data.conversation import Conversation
from jlora.data.examples import SizedExamples
from jlora.data.readers import files
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.distributed import processes
from jlora.distributed.platforms import choose_platform, find_devices
from jlora.distributed.sharding import check_batch, data_parallel_size, make_mesh, own_rows
from jlora.distributed.sharding import describe as describe_mesh
from jlora.models import attention_backend
from jlora.models.compute_settings import ComputeSettings, Packing, default_dtype
from jlora.models.families import read_config, read_context
from jlora.models.model_config import ModelConfig
from jlora.models.quant import storage
from jlora.planning.data_pipeline import (
    RowSource,
    context_warning,
    fix_template_settings,
    held_out_source,
    make_run_batches,
    read_examples,
    read_rows,
    with_new_tokens,
)
from jlora.training import resume
from jlora.training.trackers import check_trackers

# Entries that may differ between the processes of a run; data and base model are compared by their contents.
MAY_DIFFER = (
    "process_id base_model train_data_dir eval_data_dir questions train_commit held_out_commit output_dir "
    "chat_template python"
).split()


class RunSetup(NamedTuple):
    """Everything that is known about a run before any weight is read."""

    config: Config
    directory: Path  # of the base model
    tokenizer: Any
    model: ModelConfig
    compute: ComputeSettings
    mesh: jax.sharding.Mesh
    attention: str  # the chosen kernel, and the reason if it is not the device's own
    examples: SizedExamples
    steps: int
    batches: Batches
    held_out: Batches | None
    held_out_rows: list[Conversation]
    record: dict[str, Any]  # contents of the run's config.json


def prepare_run(config: Config) -> RunSetup:
    """Reads everything but the weights, and checks that it can be trained on. Every process of a run calls this.

    Raises:
      UserError: the data, the base model or the config must change, or the processes disagree.
    """
    if processes.is_first():
        resume.check_output(config)
        check_trackers(config)
    rows, held_out_rows = read_rows(config)
    mesh = make_mesh(find_devices(config.device), config.mesh)
    check_batch(mesh, config.batch_size)
    directory = processes.first_then_others(lambda: resolve_base(config.base_model, config.revision))
    chat_date = processes.broadcast_from_first(lambda: resume.find_date(config))
    model, tokenizer = read_config(directory), load_tokenizer(directory, config.chat_template, chat_date)
    config = fix_template_settings(config, tokenizer, rows)
    config = add_adapter_settings(config, directory, model)
    stored, model = model.vocab_size, with_new_tokens(config, model, tokenizer)
    check_adapter_settings(config, model)
    ends, vocab_size = end_tokens(directory, tokenizer), model.vocab_size

    def tokenized(rows: RowSource | list[Conversation], name: str) -> SizedExamples:
        return processes.first_then_others(lambda: read_examples(config, tokenizer, ends, rows, name, vocab_size))

    examples = tokenized(rows, "training")
    held_out: Any = tokenized(held_out_rows, "held out") if held_out_rows else []
    if warning := context_warning(read_context(directory), [examples, held_out]):
        print(warning)
    steps, batches, eval_batches = make_run_batches(config, model, examples, held_out, data_parallel_size(mesh))
    batches = dataclasses.replace(batches, local_rows=own_rows(mesh, batches.rows))
    if eval_batches:
        eval_batches = dataclasses.replace(eval_batches, local_rows=own_rows(mesh, eval_batches.rows))
    device, wish = jax.local_devices()[0], config.attn_implementation
    compute = choose_compute(config, device)
    own_batch = (batches.rows // data_parallel_size(mesh), batches.shapes[-1].length)
    packing = Packing(*batches.packing)
    attention, note = processes.broadcast_from_first(
        lambda: attention_backend.choose_backend(wish, device, model, compute.compute_dtype, own_batch, packing)
    )
    compute = dataclasses.replace(compute, attention=attention, mesh=mesh)
    words = f"{attention}{note and f' ({note})'}"
    record = make_record(config, directory, tokenizer, mesh, compute)
    record["base"]["vocabulary"] = str(model.vocab_size) if model.vocab_size > stored else ""
    shared = {**record["config"], **record["data"], **record["versions"], "base": record["base"]["fingerprint"]}
    shared |= {"end tokens": sorted(ends), "lengths": hashlib.sha256(batches.sizes.tobytes()).hexdigest()}
    processes.check_agreement({key: value for key, value in shared.items() if key not in MAY_DIFFER})
    inputs = (config, directory, tokenizer, model, compute, mesh, words)
    return RunSetup(*inputs, examples, steps, batches, eval_batches, held_out_rows, record)


def configure_jax(config: Config) -> None:
    """Configures JAX for `device`; call it before JAX is first used."""
    # malloc.retain_freed_memory needs steps on the main thread
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    choose_platform(config.device)


def choose_compute(config: Config, device: Any) -> ComputeSettings:
    """Returns the dtypes of a run, with `auto` resolved for a device. `remat` is chosen later, from the free memory."""
    auto = default_dtype(device)
    names = {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    param = names[config.param_dtype]
    compute = param if config.compute_dtype == "auto" else names[config.compute_dtype]
    if config.fp16 and config.compute_dtype == "auto":
        compute = jnp.float16 if auto == jnp.float16 else jnp.bfloat16
        if compute == jnp.bfloat16:
            print("fp16=true: computing in bfloat16, which needs no loss scaling")
    if compute == jnp.float16:
        why = f", because {device.device_kind} does not support bfloat16" if config.compute_dtype == "auto" else ""
        print(f"Computing in float16{why}: the loss is scaled, and steps whose gradients overflow are skipped")
    return ComputeSettings(param, compute, quantize=storage(config.quantize_base, param, device.platform))


def add_adapter_settings(config: Config, directory: Path, model: ModelConfig) -> Config:
    """Returns the config, with the adapter settings of `init_adapter` if that is set.

    Raises:
      UserError: `init_adapter` cannot be read, or belongs to another base model.
    """
    if not config.init_adapter:
        return config
    check_base(Path(config.init_adapter) / WEIGHTS, directory)
    settings = settings_of(read_spec(Path(config.init_adapter), model.num_hidden_layers))
    shown = ", ".join(f"{key}={settings[key]!r}" for key in ("peft_type", "lora_rank", "lora_alpha"))
    print(f"Starting from the adapter {config.init_adapter}, with its own settings: {shown}")
    return dataclasses.replace(config, **settings)


def check_adapter_settings(config: Config, model: ModelConfig) -> None:
    """Raises a UserError that lists the adapter settings of a config that do not fit the base model."""
    spec = spec_of(dataclasses.asdict(config))
    problems = find_conflicts(spec, tied=model.tie_word_embeddings)
    if not config.init_adapter:  # whose settings may name what this base model lacks
        problems += spec.problems(hf_names.projections(), model.num_hidden_layers)
    if problems:
        raise UserError("\n  ".join([f"The adapter settings do not fit {config.base_model}:", *problems]))


def make_record(
    config: Config, base: Path, tokenizer: Any, mesh: jax.sharding.Mesh, compute: ComputeSettings
) -> dict[str, Any]:
    """Returns the contents of config.json: the config, hashes of data and base model, versions and devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy")
    rows = RowSource(config, "train_data_dir")
    held_out = None if config.eval_share else held_out_source(config)  # of a share, the training data's hash is enough
    questions = held_out or rows
    return {
        "config": dataclasses.asdict(config),
        "data": {
            "train": rows.hash(),
            "held_out": held_out.hash() if held_out else "",
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template_source_hash(tokenizer),
            "questions": files.resolved_path(questions.paths[0], questions.key),
            "question_files": questions.use,
            "train_commit": " ".join(filter(None, (files.hub_commit(path, rows.key) for path in rows.paths))),
            "held_out_commit": files.hub_commit(config.eval_data_dir, "eval_data_dir"),
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
