"""The mesh, and THE rule table: which axis of which array is split over which axis of the mesh."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Path -> spec, first match wins. Data-parallel: every device holds the base and the adapter, and its share of the rows.
RULES: tuple[tuple[str, P], ...] = (
    (r"base/.*", P()),
    (r"state/lora/.*", P()),
    (r"state/optimizer/.*", P()),
    (r"state/(step|scaling/.*)", P()),
    (r"batch/(tokens|segments|positions)", P(None, "data", None)),  # [A, R, T]
    (r"batch/(predict_at|targets|weights)", P(None, "data", None)),  # [A, R, S]
)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis, `data`, over all devices."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shardings(tree: Any, mesh: Mesh, root: str) -> Any:
    """A NamedSharding for every leaf of `tree`, whose paths start with `root` ("base", "state", "batch").

    Raises:
      ValueError: no rule covers a path, no path uses a rule, or an axis does not divide.
    """

    used = set()

    def leaf(path: tuple[Any, ...], array: Any) -> NamedSharding:
        name = "/".join([root, *(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)])
        pattern, spec = next(((p, s) for p, s in RULES if re.fullmatch(p, name)), ("", None))
        if spec is None:
            raise ValueError(f"no sharding rule covers {name}")
        used.add(pattern)
        for axis, size in zip(spec, np.shape(array), strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(f"{name}: {size} does not divide over {mesh.shape[axis]} devices ({axis})")
        return NamedSharding(mesh, spec)

    placed = jax.tree_util.tree_map_with_path(leaf, tree)
    unused = [pattern for pattern, _ in RULES if pattern.startswith(f"{root}/") and pattern not in used]
    if unused and jax.tree.leaves(tree):
        raise ValueError(f"sharding rules that no path uses: {', '.join(unused)}")
    return placed
