"""Quantized base models: the codes and values of bitsandbytes; loading, training and export with them."""

import dataclasses
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict
from programs import run_program
from safetensors.numpy import load_file, save_file

from jlora.adapters import params
from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import write_adapter
from jlora.adapters.spec import NO_ADAPTER, AdapterSpec
from jlora.cli import generate
from jlora.common import hf_names
from jlora.common.errors import UserError, VerificationError
from jlora.data.batches import Batch
from jlora.distributed import sharding
from jlora.export import exporter, verify
from jlora.models import hf_loader, quant
from jlora.models.compute_settings import FLOAT32_COMPUTE, UNKNOWN
from jlora.models.families import read_config
from jlora.steps.loss import CROSS_ENTROPY
from jlora.steps.train_step import loss_sum
from jlora.training.checkpoint import read_record

WHEEL = "bitsandbytes==0.50.2"
# In a process of its own: if bitsandbytes can be imported, PEFT imports it, which would slow down every test.
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
    """Random weights with blocks of zeros, of ties and of one sign; the last block of scales is not full."""
    made = np.random.default_rng(0).standard_normal((300, 576)).astype(np.float32) * 0.02
    made[3, :64] = made[299, -64:] = made[7] = 0
    ties = np.append((quant.NORMAL[1:] + quant.NORMAL[:-1]) / 2, np.float32(1))
    for row, size in enumerate((1.0, 0.5, -(2.0**-7))):
        made[20 + row, 64:128] = np.tile(ties, 4) * np.float32(size)
    made[30] = np.abs(made[30])
    return {"float32": made, "bfloat16": made.astype(ml_dtypes.bfloat16), "float16": made.astype(np.float16)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, weights):
    """The codes and values that bitsandbytes computes for them."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", root, WHEEL]
    subprocess.run(fetch, check=True, capture_output=True)
    zipfile.ZipFile(next(root.glob("*.whl"))).extractall(root / "package")
    np.savez(root / "in.npz", **{name: values.astype(np.float32) for name, values in weights.items()})
    command = [sys.executable, "-c", THEIRS, root / "package", root / "in.npz", root / "out.npz"]
    subprocess.run(command, check=True, capture_output=True)
    return dict(np.load(root / "out.npz"))


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_equals_bitsandbytes(weights, theirs, dtype, monkeypatch):
    weight, their = weights[dtype], {key: theirs[f"{dtype} {key}"] for key in quant.NF4._fields}
    ours = quant.NF4.quantized(weight)
    assert np.array_equal(ours.codes.T.ravel(), their["codes"].ravel())
    mean = theirs[f"{dtype} blocks"].mean(dtype=np.float64)
    np.testing.assert_allclose([ours.scale_mean, their["scale_mean"]], mean, rtol=1e-6)
    np.testing.assert_allclose(ours.scale_absmax, their["scale_absmax"], rtol=1e-6)
    np.testing.assert_allclose(quant.DYNAMIC, theirs[f"{dtype} table"], rtol=3e-7)
    # On a CPU bitsandbytes looks scales up in a coarser table of its own: a few are the second nearest there.
    scaled = (theirs[f"{dtype} blocks"] - their["scale_mean"]) / np.repeat(their["scale_absmax"], 256)[: 300 * 9]
    found = ours.scales.T.ravel(), their["scales"]
    distance = [np.abs(quant.DYNAMIC[codes] - scaled) for codes in found]
    assert np.all(distance[0] <= distance[1] + 1e-7) and np.mean(found[0] != found[1]) < 0.01
    monkeypatch.setattr(quant, "DYNAMIC", theirs[f"{dtype} table"])
    same = ours._replace(scales=their["scales"].reshape(300, -1).T, scale_mean=their["scale_mean"])
    same = jax.tree.map(jnp.asarray, same)
    values = theirs[f"{dtype} values"]
    assert np.array_equal(np.asarray(same.astype(jnp.dtype(dtype))).astype(np.float32), values)
    compiled = np.asarray(jax.jit(lambda leaves: leaves.astype(jnp.float32))(same))  # fuses a product and a sum
    exact = np.asarray(same.astype(jnp.float32))
    np.testing.assert_allclose(compiled, exact, rtol=0, atol=2**-23 * np.abs(exact).max())
    scaled, _ = quant._scaled(weight.astype(np.float32), 64)
    assert dtype != "float32" or np.isin(scaled, (quant.NORMAL[1:] + quant.NORMAL[:-1]) / 2).sum() >= 2 * 60  # ties


def test_choosing_between_neighbours_equals_a_lookup():
    codes = jnp.arange(16, dtype=jnp.uint8)
    assert np.array_equal(quant._choose(codes), quant.NORMAL)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_equals_bitsandbytes(weights, theirs, dtype):
    ours = quant.Int8.quantized(weights[dtype])
    nothing = theirs[f"{dtype} absmax"] == 0  # of which it makes what NaN is cast to
    codes = ours.codes.T
    assert np.array_equal(codes[~nothing], theirs[f"{dtype} int8"][~nothing]) and not codes[nothing].any()
    assert np.array_equal(ours.absmax, theirs[f"{dtype} absmax"])
    values = np.asarray(jax.tree.map(jnp.asarray, ours).astype(jnp.float32))
    np.testing.assert_allclose(values[~nothing], theirs[f"{dtype} int8 values"][~nothing], rtol=3e-7)
    assert not values[nothing].any()


SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
KINDS = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
TOKENS = np.random.default_rng(1).integers(0, 1000, (2, 12), dtype=np.int32)


def load(directory, quantize, spec=SPEC, devices=1):
    """Returns the structure of the model, the shapes of the adapter, and the base model."""
    compute = dataclasses.replace(FLOAT32_COMPUTE, quantize=quantize)
    graphdef, adapter, shapes = hf_loader.abstract_model(read_config(directory), spec, compute)
    return graphdef, adapter, hf_loader.load_base(directory, shapes, sharding.make_mesh(jax.devices()[:devices]))


def forward(graphdef):
    @jax.jit
    def run(adapter, base, tokens):
        model = nnx.merge(graphdef, adapter, base)
        positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1))
        return model.logits(model(tokens, jnp.ones_like(tokens), positions)[0])

    return run


def logits(graphdef, adapter, base):
    return np.asarray(forward(graphdef)(adapter, base, TOKENS))


@pytest.mark.parametrize("kind", quant.KINDS)
def test_only_the_projections_are_quantised(tiny, kind):
    files = {name: value for file in tiny.glob("*.safetensors") for name, value in load_file(file).items()}
    _, _, base = load(tiny, kind, devices=2)
    for path, leaf in flatten_dict(base).items():
        for layer, name in enumerate(hf_names.tensor_names(path, leaf.shape)):
            value = files.pop(name)
            if path[-2].endswith("_proj"):
                made = quant.KINDS[kind].quantized(value)
                assert all(np.array_equal(ours[layer], part) for ours, part in zip(leaf, made, strict=True)), name
                assert leaf.shape[1:] == value.shape
            else:
                assert np.array_equal(leaf[layer] if path[0] == "layers" else leaf, value), name
    assert not files
    leaves = jax.tree.leaves({key: base["layers"][key] for key in ("self_attn", "mlp")})
    values = sum(value.size for name, value in load_file(next(tiny.glob("*.safetensors"))).items() if "_proj" in name)
    assert sum(leaf.nbytes for leaf in leaves) / values < {"nf4": 0.517, "int8": 1.03, "bits": 2.01}[kind]


def test_weights_that_cannot_be_quantised_are_reported(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = load_file(tmp_path / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan
    values["model.layers.2.mlp.up_proj.weight"][5, 7] = -np.inf
    save_file(values, tmp_path / "model.safetensors")
    for kind in quant.KINDS:
        with pytest.raises(UserError, match=r"2 tensor.*\n.*\.1\.mlp.up_proj.*\n.*\.2\.mlp.up_proj"):
            load(tmp_path, kind)
    said = r"nf4 requires weights with a multiple of 64 inputs, .* with 96. Set quantize_base to int8 or none"
    with pytest.raises(UserError, match=said):
        quant.zeros("nf4", 128, 96, jnp.float32)
    assert quant.zeros("int8", 128, 96, jnp.float32).shape == (128, 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", quant.KINDS)
def test_peft_on_the_dequantised_base_computes_the_same(tiny, tmp_path, kind, name):
    spec = dataclasses.replace(SPEC, **KINDS[name])
    graphdef, shapes, base = load(tiny, kind, spec)
    start = params.start(spec, shapes, base, jax.random.key(0))
    before = logits(graphdef, params.neutral(spec, start, base), base)
    np.testing.assert_allclose(logits(graphdef, start, base), before, atol=1e-4)
    adapter = jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, start)
    if name == "pissa":  # its frozen pair is the base's
        adapter = params.complete(spec, adapter, base)
    write_adapter(adapter, spec, peft_config(spec, str(tiny), None, tied=True), "", tmp_path / "adapter")

    def theirs(dense):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        with torch.no_grad():
            for tensor, values in dense:
                model.get_parameter(tensor).copy_(torch.tensor(values))
            model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
            return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()

    ours = logits(graphdef, adapter, base)
    np.testing.assert_allclose(ours, theirs(hf_loader.dequantized_weights(base)), atol=2e-4)
    assert np.abs(ours - before).max() > 0.1 and np.abs(ours - theirs(())).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "bits"])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(tiny, monkeypatch, kind):
    ones = np.ones_like(TOKENS)
    places = np.tile(np.arange(TOKENS.shape[1], dtype=np.int32), (2, 1))
    batch = Batch(*map(jnp.asarray, (TOKENS, ones, places, places[:, :-1], TOKENS[:, 1:], ones[:, 1:] * 1.0)))

    config = dataclasses.replace(read_config(tiny), num_hidden_layers=16, vocab_size=1000)
    graphdef, adapter, base = hf_loader.abstract_model(
        config, SPEC, dataclasses.replace(FLOAT32_COMPUTE, quantize=kind)
    )

    def temporaries():
        def loss(adapter, base):
            return loss_sum(graphdef, CROSS_ENTROPY, adapter, base, batch, None, UNKNOWN, 1)

        return jax.jit(jax.grad(loss)).lower(adapter, base).compile().memory_analysis().temp_size_in_bytes

    stack = 4 * 16 * (2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 320)  # bytes of the dense weights
    without = temporaries()
    monkeypatch.setattr(jax, "checkpoint", lambda function, **options: function)
    assert without < stack / 2 and temporaries() > without + stack / 2


@pytest.mark.slow
def test_a_base_in_bfloat16_has_no_float32_copy_on_a_cpu(tiny):
    """Bits give the same logits as an array in bfloat16, for which XLA makes a copy: the control."""
    half = dataclasses.replace(FLOAT32_COMPUTE, param_dtype=jnp.bfloat16)
    outcomes = {}
    for kind in ("none", "bits"):
        graphdef, _, shapes = hf_loader.abstract_model(
            read_config(tiny), NO_ADAPTER, dataclasses.replace(half, quantize=kind)
        )
        base = hf_loader.load_base(tiny, shapes, sharding.make_mesh(jax.devices()[:1]))
        program = forward(graphdef).lower({}, base, TOKENS).compile()
        outcomes[kind] = np.asarray(program({}, base, TOKENS)), program.memory_analysis().temp_size_in_bytes
    np.testing.assert_array_equal(outcomes["bits"][0], outcomes["none"][0])
    stack = 4 * 3 * (2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 320)  # bytes of the projections in float32
    assert outcomes["none"][1] - outcomes["bits"][1] > 0.6 * stack


@pytest.mark.slow
def test_a_4_bit_run_from_training_to_answers(tiny, config_file, tmp_path, monkeypatch, capsys):
    done = run_program("jlora.train", "--config", config_file(quantize_base="nf4", learning_rate=2e-2))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    again = run_program("jlora.train", "--config", config_file(), "--config.resume_from_checkpoint=auto")
    assert again.returncode == 2 and "quantize_base changed from 'nf4' to 'none'" in again.stderr
    assert '"quantize_base": "nf4"' in (run / "adapter/README.md").read_text()
    monkeypatch.setattr(verify, "PROMPTS", 2)
    record, step = read_record(run, "--run"), exporter.find_step(run, "latest")
    parity = verify.verify(record, *exporter.load_adapter(run, step), run / "adapter")
    assert "and the nf4 base model: 2 prompts" in parity.sentence and not parity.weaker
    monkeypatch.setattr(hf_loader, "dequantized_weights", lambda base: ())
    with pytest.raises(VerificationError, match="does not compute what was trained"):
        verify.verify(record, *exporter.load_adapter(run, step), run / "adapter")
    options = ["--quantize_base", "nf4", "--prompt", "Hello", "--max_new_tokens", "4"]
    generate.main(["--adapter", str(run / "adapter"), *options])
    assert capsys.readouterr().out.strip()
