"""cuDNN's attention over slots: the same code against the formula on a CPU, and compiled for GPUs without one."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from test_attention import inputs, plain, run
from test_model import SPEC, TOKENS, full, load

from jlora.data.batches import Batch
from jlora.models import attention, cudnn_attention, hf_loader, splash_attention
from jlora.models.compute_settings import FLOAT32_COMPUTE, UNKNOWN, Packing
from jlora.models.families import read_config
from jlora.models.unpack_examples import slot_sizes
from jlora.planning import gpu_cards
from jlora.steps.loss import CROSS_ENTROPY


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(splash_attention, "INTERPRET", True)
    monkeypatch.setattr(splash_attention, "BLOCK", 128)  # slots of several blocks
    monkeypatch.setattr(splash_attention, "PAIRS_PER_MOVE", -math.inf)  # always in slots


def rows_of(*lengths, T):
    """Segments of rows: the length of the shared prefix, then of each example."""
    segments = np.zeros((len(lengths), T), np.int32)
    for row, (shared, *own) in zip(segments, lengths, strict=True):
        laid = np.repeat([-1, *range(1, len(own) + 1)], [shared, *own])
        row[: len(laid)] = laid
    return jnp.asarray(segments)


LAYOUTS = {
    "one example": (Packing(0, 1, 130), [(0, 130), (0, 1), (0,)], None),
    "many": (Packing(0, 12, 150), [(0, 150), (0, *[12] * 12), (0, 3, 100, 40), (0,)], None),
    "prefix": (Packing(12, 4, 60), [(12, 40, 30, 44, 1), (12, 60), (12, 20, 60), (0,)], None),
    "window": (Packing(0, 3, 100), [(0, 90, 50, 10), (0, 100), (0,)], 20),
    "window of one example": (Packing(0, 1, 130), [(0, 130), (0, 20)], 25),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "name"),
    [*(("cudnn", name) for name in LAYOUTS), ("splash", "many"), ("splash", "prefix")],
)
def test_slots_equal_the_formula(kernel, name, on_cpu):
    """Forward and backward; a change in one example, or in the padding, changes nothing in another."""
    packing, lengths, window = LAYOUTS[name]
    segments = rows_of(*lengths, T=150)
    arrays, _ = inputs(150, 4, 2, 64, rows=len(lengths))
    real = np.asarray(segments != 0)  # the outputs of padding are arbitrary
    arrays[3] = arrays[3] * real[..., None, None]
    got, want = run(kernel, arrays, segments, window, packing=packing), run("xla", arrays, segments, window)
    assert np.abs(got[0] - plain(*arrays[:3], segments, window))[real].max() < 2e-5
    assert np.isfinite(got[0][real]).all()
    for a, b in zip(got[1:], want[1:], strict=True):
        assert np.abs(a - b).max() < 1e-4
    for changed in range(3):
        inside = np.asarray(segments == changed)
        loud = [jnp.where(inside[..., None, None], 1e3 * x[:, ::-1], x) for x in arrays]
        other, kept = run(kernel, loud, segments, window, packing=packing), real & ~inside
        if packing.prefix and changed:
            kept &= np.asarray(segments > 0)  # what comes after reaches the gradient of the prefix
        for a, b in zip(got, other, strict=True):
            assert np.array_equal(a[kept], b[kept])


@pytest.mark.slow
def test_bfloat16_is_as_close_as_its_rounding(on_cpu):
    packing, lengths, _ = LAYOUTS["prefix"]
    segments = rows_of(*lengths, T=150)
    arrays, _ = inputs(150, 4, 2, 64, rows=len(lengths))
    arrays[3] = arrays[3] * (segments != 0)[..., None, None]
    want = run("xla", arrays, segments)
    got = run("cudnn", [x.astype(jnp.bfloat16) for x in arrays], segments, packing=packing)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert np.linalg.norm(a.astype(np.float32) - b) < 0.02 * np.linalg.norm(b)


def positions_of(segments):
    """The position of each token in its example, which begins behind the prefix."""
    positions = np.zeros_like(segments)
    for row, own in zip(positions, np.asarray(segments), strict=True):
        shared = np.sum(own < 0)
        row[own < 0] = np.arange(shared)
        for example in range(1, own.max() + 1):
            row[own == example] = shared + np.arange(np.sum(own == example))
    return jnp.asarray(positions)


@pytest.fixture(scope="module")
def model(tiny):
    """Returns a function of an attention backend, segments and bounds; it returns a model's logits and gradients."""
    _, adapter, base = load(tiny)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(backend, packing, adapter, base, batch):
        compute = dataclasses.replace(FLOAT32_COMPUTE, attention=backend)
        graphdef, *_ = hf_loader.abstract_model(read_config(tiny), SPEC, compute)

        def loss(adapter):
            llama = nnx.merge(graphdef, adapter, base)
            hidden, _ = llama(batch.tokens, batch.segments, batch.positions, packing=packing)
            return CROSS_ENTROPY(*llama.head(hidden), batch, 1) / CROSS_ENTROPY.count(batch), llama.logits(hidden)

        return jax.grad(loss, has_aux=True)(adapter)

    def results(backend, segments, packing=UNKNOWN):
        tokens = jnp.asarray(TOKENS.ravel()[: segments.size].reshape(segments.shape))
        at, next_tokens = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape), jnp.roll(tokens, -1, axis=1)
        weights = jnp.asarray(segments > 0, jnp.float32)
        batch = Batch(tokens, segments, positions_of(segments), at, next_tokens, weights)
        gradients, logits = run(backend, packing, full(adapter), base, batch)
        return np.asarray(logits), jax.tree.leaves(gradients)

    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one example", "many", "prefix"])
def test_a_whole_model_has_the_same_logits_and_gradients(name, model, on_cpu):
    """Of three layers, with heads that share keys, as with XLA's attention."""
    packing, lengths, _ = LAYOUTS[name]
    segments = rows_of(*lengths[:3], T=150)
    real = np.asarray(segments != 0)
    (logits, gradients), (want, slopes) = model("cudnn", segments, packing), model("xla", segments)
    assert np.abs(logits - want)[real].max() < 2e-4
    for a, b in zip(gradients, slopes, strict=True):
        assert np.abs(a - b).max() < 1e-4 < 1e-2 < np.abs(b).max()
    other, _ = model("xla", jnp.roll(segments, 1, axis=1))  # the negative control: off by one token
    assert np.abs(other - want)[real].max() > 0.1


@pytest.mark.parametrize(
    ("packing", "row"),
    [
        (Packing(0, 2, 40), (0, 135, 10)),  # too long
        (Packing(0, 2, 90), (0, 50, 20, 30)),  # too many
        (Packing(12, 2, 60), (0, 50, 20)),  # without the prefix
        (Packing(12, 2, 60), (6, 50, 20)),  # with half of it
        (Packing(0, 1, 90), (0, 50, 20)),
    ],
)
@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_row_beyond_the_bounds_is_nan(kernel, packing, row, on_cpu):
    """The row next to it is not."""
    if kernel == "splash" and packing.examples == 1:
        pytest.skip("splash computes whole rows then")
    segments = rows_of(row, (packing.prefix, 20), T=150)
    arrays, _ = inputs(150, 4, 2, 64, rows=2)
    out, *_ = run(kernel, arrays, segments, packing=packing)
    real = np.asarray(segments[1] != 0)
    assert np.isnan(out[0]).all() and np.isfinite(out[1][real]).all()


def test_slots_suffice_for_any_row():
    random = np.random.default_rng(0)
    for _ in range(500):
        T, prefix = int(random.integers(40, 400)), int(random.integers(0, 20))
        lengths = sorted(random.geometric(1 / random.integers(2, 200), random.integers(1, 30)).tolist(), reverse=True)
        while sum(lengths) > T - prefix:
            lengths.pop(int(random.integers(len(lengths))))
        if lengths:
            sizes = slot_sizes(T, prefix, len(lengths), lengths[0], multiple=8)
            assert all(size >= length for size, length in zip(sizes, lengths, strict=True)), (T, prefix, lengths)
            assert list(sizes) == sorted(sizes, reverse=True)
            assert sum(sizes) <= (T + 8) * (len(lengths).bit_length()) + 8 * len(lengths)


NEEDS_COMPILER = [
    pytest.mark.cuda_compiler,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins.xla_cuda12"), reason="the compiler is not installed"),
]


def compiled(T, packing, N=8, K=2, H=128, rows=2, card="h100", window=None, dtype=jnp.bfloat16):
    """The program of attention's output and gradients on a GPU, compiled from shapes alone."""
    place = SingleDeviceSharding(gpu_cards.simulated_cards(gpu_cards.CARDS[card], 1)[0])

    def loss(q, k, v, segments):
        places = {"q_segments": segments, "k_segments": segments, "q_start": 0, "window": window}
        out = attention.attention(q, k, v, **places, backend="cudnn", mesh=None, packing=packing)
        return jnp.sum(out.astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((rows, T, heads, H), dtype, sharding=place) for heads in (N, K, K)]
    segments = jax.ShapeDtypeStruct((rows, T), jnp.int32, sharding=place)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*shapes, segments).compile()


class TestCompiled:
    """By XLA's CUDA compiler, without a card."""

    pytestmark = NEEDS_COMPILER

    @pytest.mark.parametrize(
        ("card", "packing", "window", "dtype"),
        [
            ("a100-40", Packing(0, 4, 300), 64, jnp.bfloat16),
            ("l4", Packing(0, 1, 300), None, jnp.bfloat16),
            ("h100", Packing(24, 6, 150), None, jnp.float16),
        ],
    )
    def test_each_slot_size_is_one_call_forward_and_one_backward(self, card, packing, window, dtype):
        text = compiled(300, packing, card=card, window=window, dtype=dtype).as_text()
        sizes = len(set(slot_sizes(300, *packing, multiple=cudnn_attention.BLOCK)))
        assert len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', text)) == sizes
        assert len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmaxBackward"', text)) == sizes
        assert not re.search(r"\[(\d+,)*300,300\]", text)  # no scores

    def test_memory_is_linear_in_the_length(self):
        short, long = (compiled(T, Packing(0, 1, T)).memory_analysis().temp_size_in_bytes for T in (4096, 32768))
        assert long < 8.2 * short
