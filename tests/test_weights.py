"""Checkpoints on disk: sharded ones, half-precision ones, and broken ones with a message each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_families import SIZES

from jlora.adapters.spec import AdapterSpec
from jlora.common import hf_names
from jlora.common.errors import UserError
from jlora.distributed import sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import ComputeSettings
from jlora.models.families import read_config
from jlora.models.safetensors_files import INDEX, Weights, write_weights

NONE = AdapterSpec(rank=1, alpha=1.0, dropout=0.0, target_modules=())
Q1 = "model.layers.1.self_attn.q_proj.weight"


def make(directory, dtype="float32", **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "head_dim": 32, **changes})
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="200KB")
    return directory


@pytest.fixture
def sharded(tmp_path):
    """A float32 Llama in several shards with an index."""
    directory = make(tmp_path / "model")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def load(directory, dtype=jnp.float32, progress=lambda size: None):
    _, _, shapes = hf_loader.abstract_model(read_config(directory), NONE, ComputeSettings(dtype, dtype))
    return hf_loader.load_base(directory, shapes, sharding.make_mesh(jax.devices()[:1]), progress)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_tensor_arrives_with_its_position_and_dtype(tmp_path, stored, wanted):
    directory, seen = make(tmp_path / "model", stored), []
    base = load(directory, jnp.dtype(wanted), seen.append)
    files = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    placed = flatten_dict(base)
    for path, leaf in placed.items():
        names = hf_names.tensor_names(path, leaf.shape)
        for name, value in zip(names, leaf if path[0] == "layers" else [leaf], strict=True):
            assert value.dtype == wanted and np.array_equal(value, files.pop(name).astype(wanted)), name
    assert not files and sum(seen) == sum(leaf.nbytes for leaf in placed.values())


def change(directory, name, edit):
    """Rewrites the shard that holds a tensor; `edit` changes the shard's dict in place."""
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def point(directory, name, file):
    """Makes the index name another file for a tensor."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


def poison(tensors, value):
    tensors[Q1] = tensors[Q1].copy()
    tensors[Q1][3, 5] = value


def truncate(directory):
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][Q1]
    file.write_bytes(file.read_bytes()[:-8])


def both(directory):
    change(directory, Q1, lambda tensors: tensors.update({"lm_head.weight": np.zeros((2, 2), np.float32)}))


def pickled(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")


BROKEN = {
    "truncated": (truncate, r"model-0000\d-of-.*cannot be read as safetensors: .*copied completely"),
    "missing shard": (
        lambda d: next(d.glob("*-00002-*")).unlink(),
        r"index.json lists 'model-00002-.*not a file in the same directory",
    ),
    "outside": (
        lambda d: point(d, Q1, "../model/x.safetensors"),
        r"lists '../model/x.safetensors', which is not a file",
    ),
    "absolute": (
        lambda d: point(d, Q1, "/etc/passwd"),
        r"index.json lists '/etc/passwd', which is not a file in the same directory",
    ),
    "wrong shard": (
        lambda d: point(d, Q1, json.loads((d / INDEX).read_text())["weight_map"]["model.norm.weight"]),
        rf"index.json says that {Q1} is in model-.*, but it is not there \(1 tensor in all\)",
    ),
    "broken index": (lambda d: (d / INDEX).write_text("{"), "index.json cannot be read"),
    "empty index": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "index.json lists no tensors"),
    "listed index": (lambda d: (d / INDEX).write_text('{"weight_map": []}'), "index.json cannot be read"),
    "twice": (both, r"lm_head.weight is in both model-"),
    "shape": (
        lambda d: change(d, Q1, lambda t: t.update({Q1: t[Q1].T.copy()})),
        rf"does not match its config.json \(1 tensor\):\n  {Q1} has shape \(96, 128\), expected \(128, 96\)",
    ),
    "dtype": (
        lambda d: change(d, Q1, lambda t: t.update({Q1: t[Q1].astype(np.int8)})),
        rf"{Q1} is I8, expected F32, F16, BF16",
    ),
    "nan": (
        lambda d: change(d, Q1, lambda t: poison(t, np.nan)),
        rf"contains NaN or infinity in float32 \(1 tensor\):\n  {Q1}$",
    ),
    "infinite": (
        lambda d: change(d, Q1, lambda t: poison(t, -np.inf)),
        rf"NaN or infinity in float32 \(1 tensor\):\n  {Q1}$",
    ),
    "pickled": (pickled, r"only pickled weights \(pytorch_model.bin\), which can run code.*save_pretrained"),
    "unnamed": (lambda d: (d / INDEX).unlink(), r"Expected model.safetensors or .*index.json, found model-00001-"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_directory_is_an_error_that_names_the_fault(sharded, name):
    damage, message = BROKEN[name]
    damage(sharded)
    with pytest.raises(UserError, match=message):
        load(sharded)


def test_all_mismatched_tensors_are_listed(sharded):
    change(sharded, Q1, lambda tensors: tensors.update({"model.odd.weight": np.zeros(3, np.float32)}))
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "intermediate_size": 80}))
    with pytest.raises(UserError) as error:
        load(sharded)
    said = str(error.value)
    assert said.startswith(f"base_model={sharded} does not match its config.json (19 tensors):\n")
    for line in (
        "model.layers.3.self_attn.q_proj.weight is missing",
        "model.layers.0.mlp.gate_proj.weight has shape (160, 96), expected (80, 96)",
        "model.odd.weight is not part of the model",
    ):
        assert f"\n  {line}" in said


def test_value_that_overflows_the_dtype_is_an_error(tmp_path):
    directory = make(tmp_path / "model")
    change(directory, Q1, lambda tensors: poison(tensors, 1e5))
    with pytest.raises(UserError, match=rf"NaN or infinity in float16 \(1 tensor\):\n  {Q1}$"):
        load(directory, jnp.float16)


def test_weights_survive_a_round_trip_through_shards(tmp_path):
    tensors = {f"t{i}": np.full((10, 10), i, np.float32).T[: 10 - i] for i in range(5)}
    write_weights(tmp_path, {name: value.nbytes for name, value in tensors.items()}, tensors.__getitem__, shard=800)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the index
    read = Weights(tmp_path)
    assert read.names() == tensors.keys()
    for name, value in tensors.items():
        assert read.shape(name) == value.shape and np.array_equal(read.read(name), value)
        assert np.array_equal(read.read(name)[1:3, :2], value[1:3, :2])
