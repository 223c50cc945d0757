"""Attention's kernels against the plain formula, in Pallas's interpreter; and which of them a run uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.model import attention, flash
from jlora.sharding import make_mesh


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setattr(flash, "INTERPRET", True)
    monkeypatch.setattr(flash, "BLOCK", 128)


def inputs(T, N, K, H, rows=1):
    """q, k, v and the weights of a scalar, one row of two segments and padding, T no multiple of a block."""
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
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        group = n // (N // k.shape[2])
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("kind", "window", "mesh"))
def step(kind, arrays, segments, window, mesh):
    *qkv, weights = arrays

    def loss(q, k, v):
        places = {"q_segments": segments, "k_segments": segments, "q_start": 0, "window": window}
        out = attention.attention(q, k, v, **places, backend=kind, mesh=mesh)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return out, *grads


def run(kind, arrays, segments, window=None, mesh=None):
    """Outputs and gradients of q, k, v."""
    return [np.asarray(x) for x in step(kind, arrays, segments, window, mesh)]


CASES = [
    ("splash", 150, 4, 2, 64, None),
    ("splash", 150, 2, 1, 128, 40),
    ("pallas", 150, 4, 2, 64, None),
    ("pallas", 100, 2, 2, 128, None),
    ("pallas", 100, 2, 1, 80, None),
]


@pytest.mark.parametrize(("kernel", "T", "N", "K", "H", "window"), CASES)
def test_a_kernel_is_the_formula_and_leaks_nothing(kernel, T, N, K, H, window):
    arrays, segments = inputs(T, N, K, H)
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


@pytest.mark.parametrize("kernel", ["splash", "pallas"])
def test_eight_devices_equal_one_without_communication(kernel):
    arrays, segments = inputs(60, 2, 1, 64, rows=8)
    mesh = make_mesh(jax.devices())
    want = run("xla", arrays, segments)
    split = NamedSharding(mesh, P("data"))
    placed = jax.device_put((arrays, segments), split)

    program, alone = (step.lower(kernel, *placed, None, over).compile() for over in (mesh, None))
    for a, b in zip(program(*placed), want, strict=True):
        assert np.abs(a - b).max() < 3e-5
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not any(name in program.as_text() for name in collectives)
    assert any(name in alone.as_text() for name in collectives)  # the negative control: the compiler alone cannot
