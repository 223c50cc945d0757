"""The loss in chunks with its gradient made at once, against optax's on all logits, differentiated by JAX."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jlora.models.llama import scores
from jlora.steps import loss

V, D, R, T, S = 1000, 64, 2, 300, 290  # more targets than a chunk, in rows that do not divide


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), 5)
    table, hidden = jax.random.normal(keys[0], (V, D)), jax.random.normal(keys[1], (R, T, D))
    at, targets = jax.random.randint(keys[2], (R, S), 0, T), jax.random.randint(keys[3], (R, S), 0, V)
    return table, hidden, at, targets, (jax.random.uniform(keys[4], (R, S)) > 0.3).astype(jnp.float32)


def plain(table, hidden, at, targets, weights):
    states = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores(states, table), targets) * weights)


def off(a, b):
    a, b = (x.astype(jnp.float32).ravel() for x in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


@pytest.mark.parametrize("dtype, near", [("float32", 2e-6), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_loss_and_gradients_are_those_of_all_logits(drawn, dtype, near):
    table, hidden, at, targets, weights = drawn
    hidden = hidden.astype(dtype)

    def ours(table, hidden):
        return loss.target_loss(table, hidden, at, targets, weights, devices=1) / 7

    def theirs(table, hidden):
        return plain(table, hidden, at, targets, weights) / 7

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(table, hidden)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1)))(table, hidden)
    assert jnp.abs(value - wanted) < 1e-6 * wanted
    assert jnp.array_equal(value, jax.jit(ours)(table, hidden))  # an evaluation is the same computation
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert a.dtype == b.dtype and off(a, b) < near
    shifted = jax.jit(jax.grad(lambda h: loss.target_loss(table, h, at, targets + 1, weights, devices=1) / 7))(hidden)
    assert off(shifted, wanted_gradients[1]) > 0.1  # a wrong target would be seen


def test_no_array_of_all_logits_and_none_of_a_frozen_table_in_float32(drawn):
    table, hidden, at, targets, weights = drawn

    def lowered(table, argnums):
        def of(table, hidden):
            return loss.target_loss(table, hidden, at, targets, weights, devices=1)

        return jax.jit(jax.grad(of, argnums=argnums)).lower(table, hidden.astype(jnp.bfloat16)).as_text()

    frozen, trained = lowered(table.astype(jnp.bfloat16), 1), lowered(table, (0, 1))
    whole = f"tensor<{V}x{D}xf32>"
    assert whole not in frozen and whole in trained
    assert f"{S}x{V}x" not in frozen + trained
