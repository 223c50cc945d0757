"""Adapters as trees of arrays: their modules, their initial values, and neutral values, which change nothing.

The arrays of a module depend on its method (`methods/`) and are stacked over layers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jlora.adapters.methods import LEAVES, make_method, table_method
from jlora.adapters.methods.method import Leaves, Method, Weight
from jlora.adapters.spec import AdapterSpec

Adapter = dict[str, Any]  # nested: {"layers": {"self_attn": {"q_proj": {"lora_A": [L, r, in], "lora_B": [L, out, r]}}}}


def modules(adapter: Adapter, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaves]]:
    """Yields the adapted modules: path, such as ("layers", "self_attn", "q_proj"), and arrays by name."""
    if any(not isinstance(node, dict) for node in adapter.values()):
        yield path, adapter
        return
    for key, node in adapter.items():
        yield from modules(node, (*path, key))


def build(found: dict[tuple[str, ...], Leaves]) -> Adapter:
    """Builds an adapter from its modules by path, the inverse of `modules`."""
    made: Adapter = {}
    for (*parents, name), leaves in found.items():
        node = made
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaves
    return made


def projection(path: tuple[str, ...]) -> str:
    """Returns the name of a projection in specs, such as "self_attn.q_proj"; "" for a token table."""
    return ".".join(path[1:]) if path[0] == "layers" else ""


def init(shapes: Adapter, key: PRNGKeyArray) -> Adapter:
    """Returns initial values: random for arrays that are drawn, such as A, and zero for all others.

    Args:
      shapes: the adapter's tree of shapes and dtypes.
      key: a random key, which is split over the arrays.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def first(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: PRNGKeyArray) -> Array:
        draw = LEAVES[path[-1].key].draw
        return draw(key, shape.shape, shape.dtype) if draw else jnp.zeros(shape.shape, shape.dtype)

    values = [first(path, shape, key) for (path, shape), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, values)


def start(spec: AdapterSpec, shapes: Adapter, base: Any, key: PRNGKeyArray) -> Adapter:
    """Returns the adapter with which training starts; it changes nothing, regardless of the method.

    Args:
      shapes: the adapter's tree of shapes and dtypes.
      base: the frozen weights; the `weight` of each adapted module has the same path.
    """
    first = neutral(spec, init(shapes, key), base)
    return _by_method(spec, first, base, lambda method, leaves, weight: method.start(leaves, weight))


def neutral(spec: AdapterSpec, adapter: Adapter, base: Any) -> Adapter:
    """Returns an adapter of the same form that changes nothing: `neutral` values, except for the drawn arrays."""
    made, tied = dict(modules(adapter)), "lm_head" not in base
    for path, leaves in made.items():
        name = projection(path)
        method = make_method(spec, name) if name else table_method(spec, path[0], tied=tied)
        weight = _weight(base, ("embed_tokens",) if path == ("lm_head",) and tied else path)
        made[path] = {
            leaf.name: values if leaf.draw else leaf.neutral(values, weight)
            for leaf, values in ((leaf, leaves[leaf.name]) for leaf in method.leaves())
        }
    return build(made)


def complete(spec: AdapterSpec, adapter: Adapter, base: Any) -> Adapter:
    """Computes the arrays that PEFT's file lacks, such as PiSSA's frozen pair, from the base model."""
    return _by_method(spec, adapter, base, lambda method, leaves, weight: method.complete(leaves, weight))


def _by_method(
    spec: AdapterSpec, adapter: Adapter, base: Any, change: Callable[[Method, Leaves, Weight], Leaves]
) -> Adapter:
    """Applies `change` to the arrays of every projection; token tables stay unchanged."""
    made = dict(modules(adapter))
    for path, leaves in made.items():
        if name := projection(path):
            made[path] = change(make_method(spec, name), leaves, _weight(base, path))
    return build(made)


def _weight(base: Any, path: tuple[str, ...]) -> Weight:
    """Returns the base model's weight at a path: stacked layers, or a table."""
    for key in path:
        base = base[key]
    return base["weight"]
