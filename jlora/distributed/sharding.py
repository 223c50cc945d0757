"""The mesh, and THE rule table: which axis of which array is split over which axis of the mesh.

Axes of the mesh: `data` copies the base and splits the rows of a batch; `fsdp` splits the rows too, and the base, whose
layers come together one at a time when they are computed (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3); `tensor`
splits heads, feed-forward and vocabulary (Shoeybi et al. 2019, arXiv:1909.08053).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jlora.common.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are split over
# Projections whose output `tensor` splits, and those that take such an output in and add up what the devices have.
SPLIT_OUT, SPLIT_IN = r".*/(self_attn/[qkv]_proj|mlp/(gate|up)_proj)", r".*/(self_attn/o_proj|mlp/down_proj)"
QUANTISED = "weight/(codes|scales)"  # which lie the other way round: codes [L, in or in/2, out], scales [L, in/64, out]

# Path -> spec, first match wins. The optimizer's moments lie as the adapter does: their paths end as its paths do.
RULES: tuple[tuple[str, P], ...] = (
    (rf"base/{SPLIT_OUT}/weight", P(None, "tensor", "fsdp")),  # [L, out, in]
    (rf"base/{SPLIT_IN}/weight", P(None, "fsdp", "tensor")),
    (rf"base/{SPLIT_OUT}/{QUANTISED}", P(None, "fsdp", "tensor")),
    (rf"base/{SPLIT_IN}/{QUANTISED}", P(None, "tensor", "fsdp")),
    (rf"base/{SPLIT_OUT}/weight/absmax", P(None, "tensor")),  # [L, out]
    (rf"base/{SPLIT_IN}/weight/absmax", P(None, "fsdp")),
    (r"base/.*/weight/scale_(absmax|mean)", P()),  # [L, n], [L]: of blocks across rows, and few
    (rf"base/{SPLIT_OUT}/bias", P(None, "tensor")),  # [L, out]
    (rf"base/{SPLIT_IN}/bias", P(None, None)),
    (r"base/(embed_tokens|lm_head)/weight", P("tensor", "fsdp")),  # [V, D]
    (r"base/.*norm/weight", P()),
    (r"state/.*/modules_to_save", P("tensor", "fsdp")),  # [V, D]
    (r"state/.*", P()),
    (r"batch/.*", P(None, ROWS, None)),  # [A, R, T] or [A, R, S]
)


def make_mesh(devices: list[Any] | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """The axes above, `tensor` innermost: over devices that are near each other.

    Args:
      sizes: devices along each axis; -1 takes all that are left. An axis left out has one, `data` all that are left.

    Raises:
      UserError: the sizes do not make up the devices.
    """
    devices, given = jax.devices() if devices is None else devices, dict(sizes or {})
    wanted = {"data": 1 if -1 in given.values() else -1, "fsdp": 1, "tensor": 1, **given}
    fixed = math.prod(size for size in wanted.values() if size > 0)
    if fixed != len(devices) and (-1 not in wanted.values() or len(devices) % fixed):
        asked = " x ".join(f"{axis}={size}" for axis, size in wanted.items())
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"mesh: {asked} does not make up {len(devices)} device(s). The sizes must have the product "
            f"{len(devices)}, each one of {', '.join(map(str, fitting))}; -1 takes what is left"
        )
    shape = [len(devices) // fixed if wanted[axis] == -1 else wanted[axis] for axis in AXES]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError where the examples of a forward pass do not divide; names the nearest sizes that do."""
    ways = row_ways(mesh)
    if batch_size % ways:
        below, above = batch_size // ways * ways, -(-batch_size // ways) * ways
        sizes = f"{below} or {above}" if below else str(above)
        axes = "" if ways == mesh.size else f" (mesh: {describe(mesh)})"
        raise UserError(f"batch_size={batch_size} does not divide over {ways} devices{axes}: set batch_size={sizes}")


def own_rows(mesh: Mesh, rows: int) -> frozenset[int]:
    """Which rows of a batch this process's devices hold."""
    places = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((rows,)).values()
    return frozenset(row for place in places if place for row in range(*place[0].indices(rows)))


def place(tree: Any, places: Any) -> Any:
    """Arrays of the host, whole and the same in every process, on the mesh; `places` has a sharding for each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree, places
    )


def places_of(tree: Any) -> Any:
    """Where the arrays of a tree lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def describe(mesh: Mesh) -> str:
    """As "data=2 x fsdp=4"; "data=1" on one device."""
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return " x ".join(sizes or ["data=1"])


def spec_of(name: str, axes: Mapping[str, str] | None = None) -> P:
    """The table's answer for a path, and before it that of the adapter's arrays, which are split as their weight is.

    Args:
      axes: of the adapter's arrays in one layer, by name: "o" is the outputs of the projection, "i" its inputs.

    Raises:
      ValueError: no rule covers it.
    """
    own = (axes or {}).get(name.rpartition("/")[2], "")
    for projections, split in ((SPLIT_OUT, "o"), (SPLIT_IN, "i")):
        if split in own and re.fullmatch(rf"state/{projections}/\w+", name):
            return P(None, *("tensor" if axis == split else None for axis in own))
    for pattern, spec in RULES:
        if re.fullmatch(pattern, name):
            return spec
    raise ValueError(f"no sharding rule covers {name}")


def shardings(tree: Any, mesh: Mesh, root: str, axes: Mapping[str, str] | None = None) -> Any:
    """A NamedSharding for every leaf of `tree`, whose paths start with `root` ("base", "state", "batch").

    Args:
      axes: of the adapter's arrays, as for `spec_of`; for "state".

    Raises:
      ValueError: no rule covers a path, or an axis does not divide.
    """

    def leaf(path: tuple[Any, ...], array: Any) -> NamedSharding:
        name = "/".join([root, *(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)])
        sharding = NamedSharding(mesh, spec_of(name, axes))
        try:
            sharding.shard_shape(np.shape(array))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return sharding

    return jax.tree_util.tree_map_with_path(leaf, tree)


def split_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Activations within a program: B split as the rows of the batch are, all else whole on each device."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def whole_rows(table: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "V D"]:
    """A token table within a program: V split over `tensor` alone."""
    return table if mesh is None else jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P("tensor")))
