"""The network against transformers, on tiny random models with real head sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_models import VOCABULARY, make_model

from jlora.adapters import params
from jlora.adapters.methods.lora import merged_weight
from jlora.adapters.spec import AdapterSpec
from jlora.distributed import sharding
from jlora.models import attention, hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.models.kv_cache import SPAN, empty_kv_cache

SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
TOKENS = np.random.RandomState(0).randint(0, VOCABULARY, (2, 700)).astype(np.int32)  # beyond one block of queries


def load(directory, spec=SPEC, compute=FLOAT32_COMPUTE):
    """Graph, zero-B adapter and base of a model directory, float32."""
    config = read_config(directory)
    graphdef, adapter, base = hf_loader.abstract_model(config, spec, compute)
    mesh = sharding.make_mesh(jax.devices()[:1])
    return graphdef, params.init(adapter, jax.random.key(0)), hf_loader.load_base(directory, base, mesh)


def logits(graphdef, adapter, base, tokens, segments=None, positions=None):
    segments = np.ones_like(tokens) if segments is None else segments
    positions = (
        np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)) if positions is None else positions
    )

    @jax.jit
    def run(adapter, base, tokens, segments, positions):
        model = nnx.merge(graphdef, adapter, base)
        hidden, _ = model(tokens, segments, positions)
        return model.logits(hidden)

    arrays = (jnp.asarray(values) for values in (tokens, segments, positions))  # a test may call this without jit
    return np.asarray(run(adapter, base, *arrays))


def torch_logits(directory, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def full(adapter, key=1):
    """The adapter with B drawn too, so that it does something."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return structure.unflatten([0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path, smollm, tied):
    directory = make_model(tmp_path, smollm, tie_word_embeddings=tied, head_dim=32, num_key_value_heads=1)
    got, want = logits(*load(directory), TOKENS), torch_logits(directory, TOKENS)
    assert np.abs(got - want).max() < 2e-4
    assert np.abs(want).max() > 1  # the bound means something


@pytest.mark.slow
def test_real_model_equals_transformers(smollm):
    tokens = TOKENS[:1, :80]
    assert np.abs(logits(*load(smollm), tokens) - torch_logits(smollm, tokens)).max() < 2e-3  # logits up to 30


def test_zero_b_gives_the_base_logits_and_adapter_equals_merge(tiny):
    graphdef, adapter, base = load(tiny)
    tokens = TOKENS[:, :64]
    no_adapter, _, _ = load(tiny, dataclasses.replace(SPEC, target_modules=()))
    plain = logits(no_adapter, {}, base, tokens)
    assert np.array_equal(logits(graphdef, adapter, base, tokens), plain)
    adapter = full(adapter)
    merged = jax.tree.map(lambda x: x, base)
    for module, projections in adapter["layers"].items():
        for name, ab in projections.items():
            weight = merged["layers"][module][name]["weight"]
            merge = jax.vmap(lambda w, a, b: merged_weight(w, a, b, scale=SPEC.alpha / SPEC.rank))
            merged["layers"][module][name]["weight"] = merge(weight, ab["lora_A"], ab["lora_B"])
    got, want = logits(graphdef, adapter, base, tokens), logits(no_adapter, {}, merged, tokens)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(got - plain).max() > 0.1


def test_packed_examples_do_not_see_each_other(tiny):
    graphdef, adapter, base = load(tiny)
    adapter = full(adapter)
    a, b = TOKENS[:1, :40], TOKENS[1:, :25]
    row = np.concatenate([a, b, np.zeros((1, 7), np.int32)], axis=1)
    segments = np.array([[1] * 40 + [2] * 25 + [0] * 7], np.int32)
    positions = np.array([[*range(40), *range(25), *[0] * 7]], np.int32)
    packed = logits(graphdef, adapter, base, row, segments, positions)
    assert np.abs(packed[:, :40] - logits(graphdef, adapter, base, a)).max() < 1e-5
    assert np.abs(packed[:, 40:65] - logits(graphdef, adapter, base, b)).max() < 1e-5
    other = row.copy()
    other[:, :40] = TOKENS[:1, 100:140]
    changed = logits(graphdef, adapter, base, other, segments, positions)
    assert np.array_equal(changed[:, 40:65], packed[:, 40:65])
    leaking = logits(graphdef, adapter, base, row, np.ones_like(segments), positions)  # the negative control
    assert np.abs(leaking[:, 40:65] - packed[:, 40:65]).max() > 1e-2


def test_packed_examples_see_the_shared_prefix_but_not_each_other(tiny):
    graphdef, adapter, base = load(tiny)
    adapter = full(adapter)
    prefix, a, b = TOKENS[:1, :9], TOKENS[:1, 9:40], TOKENS[1:, :25]
    row = np.concatenate([prefix, a, b, np.zeros((1, 7), np.int32)], axis=1)
    segments = np.array([[-1] * 9 + [1] * 31 + [2] * 25 + [0] * 7], np.int32)
    positions = np.array([[*range(40), *range(9, 34), *[0] * 7]], np.int32)
    packed = logits(graphdef, adapter, base, row, segments, positions)
    assert np.abs(packed[:, :40] - logits(graphdef, adapter, base, row[:, :40])).max() < 1e-5
    alone = logits(graphdef, adapter, base, np.concatenate([prefix, b], axis=1))[:, 9:]
    assert np.abs(packed[:, 40:65] - alone).max() < 1e-5
    for place, heard in ((20, False), (4, True)):
        other = row.copy()
        other[0, place] += 1
        changed = logits(graphdef, adapter, base, other, segments, positions)
        assert np.array_equal(changed[:, 40:65], packed[:, 40:65]) != heard
    hidden = logits(graphdef, adapter, base, row, np.where(segments < 0, 3, segments), positions)  # negative control
    assert np.abs(hidden[:, 40:65] - packed[:, 40:65]).max() > 1e-2


def test_attention_in_blocks_equals_attention_in_one_block(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    T = 200
    q = jax.random.normal(keys[0], (2, T, 4, 32))
    k, v = (jax.random.normal(key, (2, T, 2, 32)) for key in keys[1:])
    segments = jnp.where(jnp.arange(T) < 90, 1, 2)[None].repeat(2, 0)

    def loss(q, k, v):
        out = attention.attention(
            q, k, v, q_segments=segments, k_segments=segments, q_start=0, window=None, backend="xla", mesh=None
        )
        return jnp.sum(out**2), out

    at_once = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setattr(attention, "BLOCK", 64)
    in_blocks = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_blocks), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_cache_gives_the_same_logits_token_by_token(tiny):
    graphdef, adapter, base = load(tiny)
    adapter, tokens = full(adapter), TOKENS[:, :20]
    want = logits(graphdef, adapter, base, tokens)
    trained, _, _ = load(tiny, compute=dataclasses.replace(FLOAT32_COMPUTE, attention="splash"))  # runs on no CPU
    step = jax.jit(lambda *inputs, cache: _step(trained, adapter, base, *inputs, cache=cache))
    cache = empty_kv_cache(read_config(tiny), jnp.float32, 2 * SPAN + 1)
    blocks = np.random.RandomState(0).permutation(np.arange(1, 2 * SPAN + 1)).reshape(2, SPAN)  # in any order
    cache = cache._replace(blocks=jnp.asarray(blocks, jnp.int32))
    start, segments = (np.pad(x, [(0, 0), (0, 4)]) for x in (tokens[:, :10], np.ones((2, 10), np.int32)))
    positions = np.where(segments > 0, np.arange(14)[None], 0).astype(np.int32)  # padding, as the engine has it
    last, cache = step(start, segments, positions, cache=cache)
    got = [last[:, 9]]
    for t in range(10, 19):
        one = np.ones((2, 1), np.int32)
        last, cache = step(tokens[:, t : t + 1], one, one * t, cache=cache)
        got.append(last[:, -1])
    assert np.abs(np.stack(got, axis=1) - want[:, 9:19]).max() < 1e-4


def _step(graphdef, adapter, base, *inputs, cache):
    model = nnx.merge(graphdef, adapter, base)
    hidden, cache = model(*inputs, cache=cache)
    return model.logits(hidden), cache


@pytest.mark.slow
def test_remat_keeps_the_gradient_and_saves_memory(tiny):
    tokens = jnp.asarray(TOKENS[:, :64])

    def compiled(remat):
        graphdef, adapter, base = load(tiny, compute=dataclasses.replace(FLOAT32_COMPUTE, remat=remat))

        def loss(adapter):
            model = nnx.merge(graphdef, adapter, base)
            hidden, _ = model(tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(64), (2, 1)))
            return jnp.sum(hidden**2)

        adapter = full(adapter)
        program = jax.jit(jax.grad(loss)).lower(adapter).compile()
        return program.memory_analysis().temp_size_in_bytes, program(adapter)

    (kept, one), (recomputed, other) = compiled("none"), compiled("full")
    assert recomputed < 0.7 * kept
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-3)
