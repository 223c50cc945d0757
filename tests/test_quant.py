"""Quantised bases: bitsandbytes' own codes and values, and training, loading and export on top of them."""

import dataclasses
import json
import subprocess
import sys
import warnings
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import make_model, run_module, short_run
from flax import nnx
from flax.traverse_util import flatten_dict

from jlora import lora, sharding
from jlora.adapter_config import peft_config
from jlora.errors import UserError
from jlora.model import hf, quant
from jlora.model.compute import FLOAT32, Compute
from jlora.model.families import read_config
from jlora.model.weights import Weights
from jlora.peft_format import write_adapter
from jlora.sites import LoraConfig
from jlora.step import loss_sum
from test_variants import TOKENS, batch, torch_logits

WHEEL = "bitsandbytes==0.50.2"
# Beside torch, in a process of its own: where it can be imported, PEFT takes it up, and every test would wait for that.
THEIRS = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from bitsandbytes import functional as F
made = {}
for name, weight in np.load(sys.argv[2]).items():
    weight = torch.tensor(weight).to(getattr(torch, name))
    codes, state = F.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    _, plain = F.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    rows, absmax, _ = F.int8_vectorwise_quant(weight)
    made |= {f"{name} codes": codes, f"{name} scales": state.absmax, f"{name} scale_absmax": state.state2.absmax}
    made |= {f"{name} scale_mean": state.offset, f"{name} blocks": plain.absmax, f"{name} table": state.state2.code}
    made |= {f"{name} values": F.dequantize_4bit(codes, state).float(), f"{name} int8": rows}
    made |= {f"{name} absmax": absmax, f"{name} int8 values": F.int8_vectorwise_dequant(rows, absmax)}
np.savez(sys.argv[3], **{key: value.numpy() for key, value in made.items()})
"""


@pytest.fixture(scope="module")
def weights():
    """Random weights with blocks of zeros, blocks of ties and blocks of one sign; scales in whole blocks and a rest."""
    made = np.random.default_rng(0).standard_normal((300, 576)).astype(np.float32) * 0.02
    made[3, :64] = made[299, -64:] = made[7] = 0
    ties = np.append((quant.NORMAL[1:] + quant.NORMAL[:-1]) / 2, np.float32(1))
    for row, size in enumerate((1.0, 0.5, -(2.0**-7))):
        made[20 + row, 64:128] = np.tile(ties, 4) * np.float32(size)
    made[30] = np.abs(made[30])
    return {"float32": made, "bfloat16": made.astype(ml_dtypes.bfloat16), "float16": made.astype(np.float16)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, weights):
    """What bitsandbytes makes of them."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", root, WHEEL]
    subprocess.run(fetch, check=True, capture_output=True)
    zipfile.ZipFile(next(root.glob("*.whl"))).extractall(root / "package")
    np.savez(root / "in.npz", **{name: values.astype(np.float32) for name, values in weights.items()})
    command = [sys.executable, "-c", THEIRS, root / "package", root / "in.npz", root / "out.npz"]
    subprocess.run(command, check=True, capture_output=True)
    return dict(np.load(root / "out.npz"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_is_that_of_bitsandbytes(weights, theirs, dtype, monkeypatch):
    weight, their = weights[dtype], {key: theirs[f"{dtype} {key}"] for key in quant.NF4._fields}
    ours = quant.NF4.quantized(weight)
    assert np.array_equal(ours.codes.ravel(), their["codes"].ravel())
    mean = theirs[f"{dtype} blocks"].mean(dtype=np.float64)
    np.testing.assert_allclose([ours.scale_mean, their["scale_mean"]], mean, rtol=1e-6)
    np.testing.assert_allclose(ours.scale_absmax, their["scale_absmax"], rtol=1e-6)
    np.testing.assert_allclose(quant.DYNAMIC, theirs[f"{dtype} table"], rtol=3e-7)
    # On a CPU bitsandbytes looks scales up in a coarser table of its own: a few are the second nearest there.
    scaled = (theirs[f"{dtype} blocks"] - their["scale_mean"]) / np.repeat(their["scale_absmax"], 256)[: 300 * 9]
    found = ours.scales.ravel(), their["scales"]
    distance = [np.abs(quant.DYNAMIC[codes] - scaled) for codes in found]
    assert np.all(distance[0] <= distance[1] + 1e-7) and np.mean(found[0] != found[1]) < 0.01
    monkeypatch.setattr(quant, "DYNAMIC", theirs[f"{dtype} table"])
    same = ours._replace(scales=their["scales"].reshape(300, -1), scale_mean=their["scale_mean"])
    values = theirs[f"{dtype} values"]
    assert np.array_equal(np.asarray(same.astype(jnp.dtype(dtype))).astype(np.float32), values)
    compiled = np.asarray(jax.jit(lambda leaves: leaves.astype(jnp.float32))(same))  # may round a product and sum once
    np.testing.assert_allclose(
        compiled,
        values,
        rtol=2**-8 if dtype == "bfloat16" else 2**-11 if dtype == "float16" else 0,
        atol=3e-7 * np.abs(values).max(),
    )
    scaled, _ = quant._scaled(weight.astype(np.float32), 64)
    assert dtype != "float32" or np.isin(scaled, (quant.NORMAL[1:] + quant.NORMAL[:-1]) / 2).sum() >= 3 * 60  # ties


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_is_that_of_bitsandbytes(weights, theirs, dtype):
    ours = quant.Int8.quantized(weights[dtype])
    nothing = theirs[f"{dtype} absmax"] == 0  # of which it makes what NaN is cast to
    assert np.array_equal(ours.codes[~nothing], theirs[f"{dtype} int8"][~nothing]) and not ours.codes[nothing].any()
    assert np.array_equal(ours.absmax, theirs[f"{dtype} absmax"])
    values = np.asarray(jax.jit(lambda leaves: leaves.astype(jnp.float32))(ours))
    np.testing.assert_allclose(values[~nothing], theirs[f"{dtype} int8 values"][~nothing], rtol=3e-7)
    assert not values[nothing].any()
