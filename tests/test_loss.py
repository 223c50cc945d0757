"""Losses in chunks of logits, with gradients made in the same pass, against JAX's own gradients through all logits."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jlora.data.batches import Batch
from jlora.models.llama import scores
from jlora.steps import loss

V, D, R, T, S = 1000, 64, 2, 300, 290  # more targets than a chunk, in rows that do not divide


@pytest.fixture(scope="module")
def drawn():
    """Output embedding, hidden states, and a micro-batch with two examples per row."""
    keys = jax.random.split(jax.random.key(0), 5)
    table, hidden = jax.random.normal(keys[0], (V, D)), jax.random.normal(keys[1], (R, T, D))
    at, targets = jax.random.randint(keys[2], (R, S), 0, T), jax.random.randint(keys[3], (R, S), 0, V)
    weights = (jax.random.uniform(keys[4], (R, S)) > 0.3).astype(jnp.float32)
    segments = jnp.broadcast_to(1 + (jnp.arange(T) >= T // 2), (R, T))
    return table, hidden, Batch(segments, segments, segments, at, targets, weights)


def by_example(log_probs, batch):
    """Log-probability of each example's answer [R, 2]."""
    segments = jnp.take_along_axis(batch.segments, batch.predict_at, axis=1)
    member = segments[..., None] == jnp.arange(1, 3)[None, None]
    return jnp.einsum("RS,RS,RSE->RE", log_probs, batch.weights, member.astype(jnp.float32))


def preference(log_probs, batch):
    """Prefers a row's first answer to its second; not linear in the log-probabilities."""
    answers = by_example(log_probs, batch)
    return -jnp.sum(jax.nn.log_sigmoid(0.01 * (answers[:, 0] - answers[:, 1])))


LOSSES = {
    "cross-entropy": loss.CROSS_ENTROPY,
    "preference": loss.Loss(preference, lambda batch: jnp.float32(len(batch.targets)), linear=False),
}


def plain(name, table, hidden, batch):
    """The loss from all logits at once."""
    states = jnp.take_along_axis(hidden, batch.predict_at[..., None], axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores(states, table), batch.targets)
    return jnp.sum(losses * batch.weights) if name == "cross-entropy" else preference(-losses, batch)


def relative_error(a, b):
    a, b = (x.astype(jnp.float32).ravel() for x in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype, near", [("float32", 2e-6), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_chunked_loss_and_gradients_equal_those_of_all_logits(drawn, name, dtype, near):
    table, hidden, batch = drawn
    hidden = hidden.astype(dtype)

    def ours(table, hidden, batch=batch):
        return LOSSES[name](hidden, table, batch, 1) / 7

    def theirs(table, hidden):
        return plain(name, table, hidden, batch) / 7

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(table, hidden)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1)))(table, hidden)
    assert jnp.abs(value - wanted) < 1e-6 * wanted
    assert jnp.array_equal(value, jax.jit(ours)(table, hidden))  # an evaluation is the same computation
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) < near
    frozen = jax.jit(jax.grad(ours, argnums=1))(table, hidden)
    assert jnp.array_equal(frozen, gradients[1])  # whether the table is trained or not
    wrong = batch._replace(targets=batch.targets + 1)
    shifted = jax.jit(jax.grad(lambda hidden: ours(table, hidden, wrong)))(hidden)
    assert relative_error(shifted, wanted_gradients[1]) > 0.1  # the comparison notices a wrong target


def test_declared_linearity_is_true(drawn):
    _, _, batch = drawn
    points = jax.random.normal(jax.random.key(1), (2, R, S))
    for name, each in LOSSES.items():
        slopes = [jax.grad(each.total)(point, batch) for point in points]
        assert jnp.array_equal(*slopes) == each.linear, name


@pytest.mark.parametrize("name", LOSSES)
def test_all_logits_and_a_float32_copy_of_a_frozen_table_never_exist(drawn, name):
    table, hidden, batch = drawn

    def lowered(table, argnums):
        def of(table, hidden):
            return LOSSES[name](hidden, table, batch, 1)

        return jax.jit(jax.grad(of, argnums=argnums)).lower(table, hidden.astype(jnp.bfloat16)).as_text()

    frozen, trained = lowered(table.astype(jnp.bfloat16), 1), lowered(table, (0, 1))
    whole = f"tensor<{V}x{D}xf32>"
    assert whole not in frozen and whole in trained
    assert f"{S}x{V}x" not in frozen + trained


@pytest.mark.parametrize("name, passes", [("cross-entropy", 1), ("preference", 2)])
def test_logits_are_made_once_for_a_linear_loss_and_for_a_frozen_table(drawn, name, passes):
    table, hidden, batch = drawn
    chunk = f"tensor<{R}x{S // 3 + 1}x{V}xf32>"

    def logits_made(argnums):
        gradient = jax.grad(lambda table, hidden: LOSSES[name](hidden, table, batch, 1), argnums=argnums)
        lines = jax.jit(gradient).lower(table, hidden).as_text().splitlines()
        return sum("dot_general" in line and line.endswith(f"-> {chunk}") for line in lines)

    assert logits_made(1) == 1 and logits_made((0, 1)) == passes
