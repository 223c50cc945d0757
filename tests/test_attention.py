"""Attention kernels against the plain formula, in Pallas's interpreter; and the choice of a kernel."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jlora.common.errors import UserError
from jlora.distributed.sharding import make_mesh
from jlora.models import attention, attention_backend, cudnn_attention, splash_attention
from jlora.models.compute_settings import UNKNOWN, Packing
from jlora.models.families import read_config


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setattr(splash_attention, "INTERPRET", True)
    monkeypatch.setattr(splash_attention, "BLOCK", 128)
    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")


def inputs(T, N, K, H, rows=1):
    """q, k, v and the weights of a scalar, one row of two segments and padding; T is not a multiple of a block."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (rows, T, heads, H)) for key, heads in zip(keys, (N, K, K, N), strict=True)]
    ends = np.array([T // 3, T - 20])
    segments = np.where(np.arange(T) < ends[1], 1 + (np.arange(T) >= ends[0]), 0)
    return arrays, jnp.asarray(segments, jnp.int32)[None].repeat(rows, 0)


def plain(q, k, v, segments, window):
    """The formula, in NumPy's float64 by hand: a loop over rows, heads and queries."""
    B, T, N, H = q.shape
    q, k, v, segments = (np.asarray(x, np.float64) for x in (q, k, v, segments))
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        first = 0 if window is None else max(0, t - window + 1)
        own = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        seen = sorted({*own, *(s for s in range(t + 1) if segments[b, s] < 0)})
        group = n // (N // k.shape[2])
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("kind", "window", "mesh", "packing"))
def step(kind, arrays, segments, window, mesh, packing=UNKNOWN):
    *qkv, weights = arrays

    def loss(q, k, v):
        places = {"q_segments": segments, "k_segments": segments, "q_start": 0, "window": window}
        out = attention.attention(q, k, v, **places, backend=kind, mesh=mesh, packing=packing)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return out, *grads


def run(kind, arrays, segments, window=None, mesh=None, packing=UNKNOWN):
    """Outputs and gradients of q, k, v."""
    return [np.asarray(x) for x in step(kind, arrays, segments, window, mesh, packing)]


@pytest.mark.slow
@pytest.mark.parametrize(("T", "N", "K", "H", "window"), [(150, 4, 2, 64, None), (150, 2, 1, 128, 40)])
def test_splash_equals_the_formula_and_keeps_examples_apart(T, N, K, H, window):
    kernel, (arrays, segments) = "splash", inputs(T, N, K, H)
    got, want = run(kernel, arrays, segments, window), run("xla", arrays, segments, window)
    assert np.abs(got[0] - plain(*arrays[:3], segments, window)).max() < 1e-5
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() < 3e-5
    other = run("xla", arrays, jnp.ones_like(segments), window)  # the negative control: without segments
    assert min(np.abs(a - b).max() for a, b in zip(other, want, strict=True)) > 0.1

    for changed in (1, 2, 0):  # one segment's inputs become others, and large; 0 is what stands in the padding
        inside = np.asarray(segments == changed)
        loud = [jnp.where(inside[..., None, None], 1e3 * x[:, ::-1], x) for x in arrays]
        for a, b in zip(got, run(kernel, loud, segments, window), strict=True):
            assert np.array_equal(a[~inside], b[~inside])
            assert not np.allclose(a[inside], b[inside])
    leaking = run(kernel, loud, jnp.ones_like(segments), window)[3]  # dv, before the padding: what a leak would do
    assert not np.array_equal(leaking[~inside], run(kernel, arrays, jnp.ones_like(segments), window)[3][~inside])


@pytest.mark.slow
@pytest.mark.parametrize("packing", [(12, 2), (20, 3)])
def test_splash_sees_the_shared_prefix(packing):
    """Also with a shorter prefix or fewer examples than the bounds allow, or without a prefix."""
    kernel, (arrays, segments) = "splash", inputs(150, 4, 2, 64, rows=2)
    segments = segments.at[0, :12].set(-1)
    real = np.asarray(segments != 0)  # the outputs of padding are arbitrary
    arrays[3] = arrays[3] * real[..., None, None]
    got, want = run(kernel, arrays, segments, packing=Packing(*packing)), run("xla", arrays, segments)
    assert np.abs(got[0] - plain(*arrays[:3], segments, None))[real].max() < 1e-5
    got[0], want[0] = (np.where(real[..., None, None], out, 0) for out in (got[0], want[0]))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < 3e-5
    hidden = run(kernel, arrays, segments)[1]  # the negative control: the gradient of q without copies
    assert np.abs(hidden[0] - want[1][0]).max() > 0.1 and np.abs(hidden[1] - want[1][1]).max() < 3e-5


@pytest.mark.parametrize("window", [None, 40])
def test_shared_prefix_is_seen_at_any_distance(window):
    arrays, segments = inputs(150, 4, 2, 64)
    segments = segments.at[:, :12].set(-1)
    got = run("xla", arrays, segments, window)
    assert np.abs(got[0] - plain(*arrays[:3], segments, window)).max() < 1e-5
    loud = [arrays[0], *(jnp.where((segments == 1)[..., None, None], 1e3 * x, x) for x in arrays[1:])]
    other, last = run("xla", loud, segments, window), np.asarray(segments == 2)
    assert np.array_equal(other[0][last], got[0][last])
    assert np.abs(got[2][:, :12]).min(axis=(0, 2, 3)).max() > 0  # what comes after tells the beginning what to become


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "slots"), [("splash", False), ("splash", True), ("cudnn", True)])
def test_kernel_on_eight_devices_equals_one_without_communication(monkeypatch, kernel, slots):
    monkeypatch.setattr(splash_attention, "faster_in_slots", lambda *bounds: slots)
    step.clear_cache()  # of what was traced with the other choice
    packing = Packing(0, 2, 60)
    arrays, segments = inputs(60, 2, 1, 64, rows=8)
    arrays[3] = arrays[3] * (segments != 0)[..., None, None]  # the outputs of padding are arbitrary
    mesh = make_mesh(jax.devices())
    want = run("xla", arrays, segments)
    split = NamedSharding(mesh, P("data"))
    placed = jax.device_put((arrays, segments), split)

    program, alone = (step.lower(kernel, *placed, None, over, packing).compile() for over in (mesh, None))
    got = program(*placed)
    for a, b in zip((jnp.where((segments != 0)[..., None, None], got[0], want[0]), *got[1:]), want, strict=True):
        assert np.abs(a - b).max() < 3e-5
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not any(name in program.as_text() for name in collectives)
    if kernel == "splash":  # the negative control: the compiler alone cannot split a kernel
        assert any(name in alone.as_text() for name in collectives)


class Wish:
    """The arguments of attention_backend.choose_backend: by default for the tiny model on a TPU."""

    def __init__(self, directory):
        self.model = read_config(directory)

    def __call__(self, wish, platform="tpu", capability="8.0", dtype=jnp.bfloat16, **changes):
        device = types.SimpleNamespace(platform=platform, device_kind="T4", compute_capability=capability)
        model = dataclasses.replace(self.model, **changes)
        return attention_backend.choose_backend(wish, device, model, dtype, (2, 150), Packing(0, 2, 100))


@pytest.mark.slow
def test_kernel_is_chosen_only_if_it_agrees_with_xla(tiny, monkeypatch):
    monkeypatch.setattr(attention_backend, "RUNS", 1)
    wish, times = Wish(tiny), r"\d+\.\d\d ms a layer, \d+\.\d\d ms in XLA"
    assert wish("auto", "cpu") == wish("xla") == ("xla", "")
    for name, note in (wish("splash"), wish("splash", sliding_window=64)):
        assert name == "splash" and re.fullmatch(times, note)
    name, note = wish("auto")  # the interpreter is slow
    assert name == "xla" and re.fullmatch(rf"not splash: it is slower \({times}\)", note)
    monkeypatch.setattr(attention_backend, "RUNS", 0)  # both take as long
    assert wish("auto")[0] == "splash"
    monkeypatch.setattr(splash_attention, "INTERPRET", False)  # a CPU cannot run it then
    name, note = wish("auto")
    assert name == "xla" and re.match(r"not splash: it failed on this device \(.*interpret", note)
    with pytest.raises(UserError, match=r"attn_implementation='splash' cannot run here: it failed .* Set .* to 'xla'"):
        wish("splash")

    def leaking(q, k, v, segments, window, mesh, packing):
        places = {"q_segments": segments.clip(1, 1), "k_segments": segments.clip(1, 1), "q_start": 0}
        return attention.attention(q, k, v, **places, window=window, backend="xla", mesh=None)

    monkeypatch.setitem(attention.KERNELS, "splash", leaking)
    assert re.match(r"not splash: its results differ from XLA's by \d", wish("auto")[1])


@pytest.mark.parametrize(
    ("wish", "changes", "message"),
    [
        ("splash", {"platform": "cpu"}, "it requires a TPU, and this device is a CPU"),
        ("cudnn", {"platform": "tpu"}, "it requires a GPU, and this device is a TPU"),
        (
            "cudnn",
            {"capability": "7.5"},
            "it requires an NVIDIA card of compute capability 8.0 or higher, and this device is a T4",
        ),
        ("cudnn", {"capability": "gfx90a"}, "it requires an NVIDIA card .*"),
        ("cudnn", {"dtype": jnp.float32}, "it requires activations in bfloat16 or float16, and these are float32"),
        ("cudnn", {"head_dim": 256}, "it requires a head_dim of at most 128 that is a multiple of 8, and .* is 256"),
        ("cudnn", {"head_dim": 100, "capability": "9.0"}, "it requires a head_dim of at most 256 .* is 100"),
    ],
)
def test_unusable_kernel_gives_one_message(tiny, wish, changes, message):
    changes = {"platform": "gpu", **changes}
    with pytest.raises(UserError, match=f"attn_implementation='{wish}' cannot run here: {message}. Set .* to 'xla'"):
        Wish(tiny)(wish, **changes)
    if changes["platform"] == "gpu":
        name, why = Wish(tiny)("auto", **changes)
        assert name == "xla" and re.match(f"not cudnn: {message}", why)


@pytest.mark.parametrize(
    ("T", "packing", "faster"),
    [
        (320, Packing(0, 4, 109), False),  # saves little
        (4096, Packing(0, 30, 500), False),
        (4096, Packing(0, 8, 3000), False),  # slots have room for any lengths: more than the row
        (2048, Packing(300, 10, 300), True),
        (4096, Packing(1000, 20, 400), True),
        (2000, Packing(1000, 1, 1000), False),  # one segment
        (16, Packing(16, 2, 0), False),  # the prefix is all there is
        (4096, UNKNOWN, False),
    ],
)
def test_splash_moves_examples_to_slots_where_that_saves_more_than_it_costs(monkeypatch, T, packing, faster):
    """As compiled for TPU v5e: the bytes of the moves against the arithmetic of pairs that no example sees."""
    monkeypatch.setattr(splash_attention, "BLOCK", 512)
    assert splash_attention.faster_in_slots(T, packing, None) == faster
    assert not splash_attention.faster_in_slots(T, packing, 100)


def grad(kernel, H, N, K, T, dtype, window=None, sharding=None, packing=UNKNOWN):
    """The gradient's lowering for shapes alone."""

    def loss(q, k, v, segments):
        places = {"q_segments": segments, "k_segments": segments, "q_start": 0, "window": window, "packing": packing}
        return jnp.sum(attention.attention(q, k, v, **places, backend=kernel, mesh=None).astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((2, T, heads, H), dtype, sharding=sharding) for heads in (N, K, K)]
    segments = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=sharding)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, segments)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_splash_compiles_for_a_tpu(monkeypatch):
    """By libtpu, without a TPU: the head sizes of SmolLM2 and Llama 3, a window, and slots."""
    monkeypatch.setattr(splash_attention, "INTERPRET", False)
    monkeypatch.setattr(splash_attention, "BLOCK", 512)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    for H, N, K, T, window in [(64, 9, 3, 1100, None), (128, 8, 2, 600, 256)]:
        traced = grad("splash", H, N, K, T, jnp.bfloat16, window, SingleDeviceSharding(device))
        program = traced.lower().compile()
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
        assert program.memory_analysis().temp_size_in_bytes < 2 * T * T * N  # no scores, in any dtype
    traced = grad("splash", 128, 8, 2, 2048, jnp.bfloat16, None, SingleDeviceSharding(device), Packing(300, 10, 300))
    assert traced.lower().compile().as_text().count('custom_call_target="tpu_custom_call"') == 6  # two sizes of slot


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("block", [512, 16])
def test_attention_in_slots_equals_attention_in_the_row(monkeypatch, prefix, block, window):
    """In rows whose prefix, example count or length differs from the bounds; the last row has no examples."""
    arrays, _ = inputs(150, 4, 2, 64, rows=4)
    lengths = [(prefix, 40, 30, 44), (prefix // 2, 44, 1, 44, 44), (0, 20), (0,)]
    segments = np.zeros((4, 150), np.int32)
    for row, (shared, *own) in zip(segments, lengths, strict=True):
        laid = np.repeat([-1, *range(1, len(own) + 1)], [shared, *own])
        row[: len(laid)] = laid
    real = segments != 0
    arrays[3] = arrays[3] * real[..., None, None]
    want = run("xla", arrays, jnp.asarray(segments), window)
    calls = []
    apart = attention._by_example
    monkeypatch.setattr(attention, "_by_example", lambda *a: calls.append(1) or apart(*a))
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "MAX_SLOT_SHARE", 10)
    step.clear_cache()  # of what was traced with other settings
    got = run("xla", arrays, jnp.asarray(segments), window, packing=Packing(prefix, 4, 44))
    assert calls
    got[0], want[0] = (np.where(real[..., None, None], out, 0) for out in (got[0], want[0]))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < 3e-5


@pytest.mark.parametrize("packing", [(12, 3, 40), (12, 2, 90), (0, 3, 90)])
def test_row_that_does_not_fit_its_slots_is_nan(monkeypatch, packing):
    arrays, _ = inputs(150, 4, 2, 64, rows=2)
    segments = np.repeat([[-1, 1, 2, 3], [0, 1, 2, 0]], [12, 60, 50, 28], axis=1)
    segments[1, 12:] = np.repeat([1, 2, 0], [20, 20, 98])
    monkeypatch.setattr(attention, "MAX_SLOT_SHARE", 10)
    step.clear_cache()
    out, *_ = run("xla", arrays, jnp.asarray(segments, jnp.int32), packing=Packing(*packing))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
