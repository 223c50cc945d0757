"""The portable form, which every server reads correctly: LoRA with one rank and scale 1."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters import params
from jlora.adapters.methods import Lora, component_methods, make_method
from jlora.adapters.methods.method import Leaves
from jlora.adapters.params import Adapter
from jlora.adapters.spec import EMBEDDINGS, AdapterSpec


def is_uniform_lora(spec: AdapterSpec) -> bool:
    """Returns whether `r` and `lora_alpha` alone describe the adapter, in every layer and for whole module types."""
    varied = spec.rank_pattern or spec.alpha_pattern or spec.layers_to_transform or _tables(spec)
    return (
        component_methods(spec) == (Lora,) and not varied and not any("." in target for target in spec.target_modules)
    )


def unsupported_as_lora(spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the features of an adapter that the portable form cannot express, by their names in messages."""
    return (*(part.title for part in component_methods(spec) if not part.portable), *_tables(spec))


def _tables(spec: AdapterSpec) -> tuple[str, ...]:
    """Describes what an adapter changes in the token tables."""
    found: dict[str, list[str]] = {}
    for table in EMBEDDINGS:
        for key in spec.table_keys(table):
            found.setdefault(key, []).append(table)
    return tuple(f"{key}={','.join(tables)}" for key, tables in found.items())


def deltas(adapter: Adapter, spec: AdapterSpec) -> Iterator[tuple[tuple[str, ...], int, np.ndarray]]:
    """Yields what an adapter adds to each weight: the path of the module, the layer, and the delta [o, i]; float64."""
    for path, leaves in params.modules(jax.device_get(adapter)):
        method = make_method(spec, params.projection(path))
        site = method.site(len(next(iter(leaves.values()))))
        for layer, (rank, scale) in enumerate(zip(site.ranks, site.scales, strict=True)):
            a, b = method.pair({part: leaf[layer] for part, leaf in leaves.items()}, rank)
            yield path, layer, scale * np.asarray(b, np.float64) @ np.asarray(a, np.float64)


def relative_difference(delta: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference of two deltas, relative to the largest entry of the expected one."""
    if delta.shape != expected.shape:
        return float("inf")
    return float(np.abs(delta - expected).max() / (np.abs(expected).max() or 1.0))


def to_plain_lora(adapter: Adapter, spec: AdapterSpec) -> tuple[Adapter, AdapterSpec]:
    """Converts an adapter to LoRA with one rank and scale 1: folds scales into B, pads ranks and layers with zeros."""
    methods = {path: make_method(spec, params.projection(path)) for path, _ in params.modules(adapter)}
    pairs = {path: jax.vmap(methods[path].pair)(leaves) for path, leaves in params.modules(adapter)}
    rank = max(a.shape[1] for a, _ in pairs.values())
    made: dict[tuple[str, ...], Leaves] = {}
    for path, (a, b) in pairs.items():
        scales = methods[path].site(len(a)).scales
        missing = rank - a.shape[1]
        folded = np.asarray(b, np.float64) * np.array(scales)[:, None, None]  # float64, so that it is rounded only once
        made[path] = {
            "lora_A": jnp.pad(a, [(0, 0), (0, missing), (0, 0)]),
            "lora_B": jnp.pad(jnp.asarray(folded, b.dtype), [(0, 0), (0, 0), (0, missing)]),
        }
    return params.build(made), AdapterSpec(rank, float(rank), spec.dropout, tuple(path[-1] for path in pairs))
