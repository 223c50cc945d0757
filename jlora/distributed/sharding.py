"""The device mesh, and PARTITION_RULES: the one table of which array axis is split over which mesh axis.

Mesh axes: `data` copies the base model and splits the rows of a batch. `fsdp` splits the rows too, and the base model,
whose layers are gathered one at a time when they are computed (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3).
`tensor` splits heads, feed-forward and vocabulary (Shoeybi et al. 2019, arXiv:1909.08053).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jlora.common.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the rows of a batch
# Projections whose output `tensor` splits, and projections that take such a split input and sum over devices.
SPLIT_OUT, SPLIT_IN = r".*/(self_attn/[qkv]_proj|mlp/(gate|up)_proj)", r".*/(self_attn/o_proj|mlp/down_proj)"
QUANTIZED = "weight/(codes|scales)"  # transposed: codes [L, in or in/2, out], scales [L, in/64, out]

# Path -> spec; the first match wins. Optimizer moments are sharded as the adapter is: their paths end the same way.
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (rf"base/{SPLIT_OUT}/weight(/bits)?", P(None, "tensor", "fsdp")),  # [L, out, in]
    (rf"base/{SPLIT_IN}/weight(/bits)?", P(None, "fsdp", "tensor")),
    (rf"base/{SPLIT_OUT}/{QUANTIZED}", P(None, "fsdp", "tensor")),
    (rf"base/{SPLIT_IN}/{QUANTIZED}", P(None, "tensor", "fsdp")),
    (rf"base/{SPLIT_OUT}/weight/absmax", P(None, "tensor")),  # [L, out]
    (rf"base/{SPLIT_IN}/weight/absmax", P(None, "fsdp")),
    (r"base/.*/weight/scale_(absmax|mean)", P()),  # [L, n], [L]: small, and one block spans rows
    (rf"base/{SPLIT_OUT}/bias", P(None, "tensor")),  # [L, out]
    (rf"base/{SPLIT_IN}/bias", P(None, None)),
    (r"base/(embed_tokens|lm_head)/weight", P("tensor", "fsdp")),  # [V, D]
    (r"base/.*norm/weight", P()),
    (r"state/.*/modules_to_save", P("tensor", "fsdp")),  # [V, D]
    (r"state/.*", P()),
    (r"stacked/weights", P(None, None, BATCH_AXES, None)),  # [K, A, R, S], of K trainings with the same batches
    (r"(batch|stacked)/.*", P(None, BATCH_AXES, None)),  # [A, R, T] or [A, R, S]
)


def make_mesh(devices: list[Any] | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """Returns a mesh with the axes above; `tensor` is innermost, so it spans neighboring devices.

    Args:
      devices: the devices to use; None: all devices of all processes.
      sizes: the number of devices along each axis; -1 takes all that remain. Defaults: -1 for `data`, 1 for the others.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices, given = jax.devices() if devices is None else devices, dict(sizes or {})
    wanted = {"data": 1 if -1 in given.values() else -1, "fsdp": 1, "tensor": 1, **given}
    fixed = math.prod(size for size in wanted.values() if size > 0)
    if fixed != len(devices) and (-1 not in wanted.values() or len(devices) % fixed):
        product = " x ".join(f"{axis}={size}" for axis, size in wanted.items())
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        count = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
        raise UserError(
            f"mesh: {product} does not match {count}. The product of the sizes must be {len(devices)}, so use sizes "
            f"from {', '.join(map(str, divisors))}, or -1 on one axis for all remaining devices."
        )
    shape = [len(devices) // fixed if wanted[axis] == -1 else wanted[axis] for axis in MESH_AXES]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def data_parallel_size(mesh: Mesh) -> int:
    """Returns the number of devices over which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises a UserError that suggests the nearest batch sizes if `batch_size` does not divide over the devices."""
    ways = data_parallel_size(mesh)
    if batch_size % ways:
        below, above = batch_size // ways * ways, -(-batch_size // ways) * ways
        sizes = f"{below} or {above}" if below else str(above)
        axes = "" if ways == mesh.size else f" (mesh: {describe(mesh)})"
        raise UserError(f"batch_size={batch_size} does not divide over {ways} devices{axes}. Set batch_size={sizes}.")


def own_rows(mesh: Mesh, rows: int) -> frozenset[int]:
    """Returns the rows of a batch that the devices of this process hold."""
    places = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,)).values()
    return frozenset(row for place in places if place for row in range(*place[0].indices(rows)))


def place(tree: Any, places: Any) -> Any:
    """Moves host arrays, complete and equal in every process, to the mesh; `places` has a sharding for each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree, places
    )


def places_of(tree: Any) -> Any:
    """Returns the sharding of every array in a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def describe(mesh: Mesh) -> str:
    """Formats a mesh as "data=2 x fsdp=4"; a single device is "data=1"."""
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return " x ".join(sizes or ["data=1"])


def partition_spec(name: str, axes: Mapping[str, str] | None = None) -> P:
    """Looks up the partition spec of an array by its path; an adapter's arrays are split as their weight is.

    Args:
      axes: of the adapter's arrays in one layer, by name: "o" is the outputs of the projection, "i" its inputs.


    Raises:
      ValueError: no rule matches the path.
    """
    own = (axes or {}).get(name.rpartition("/")[2], "")
    for projections, split in ((SPLIT_OUT, "o"), (SPLIT_IN, "i")):
        if split in own and re.fullmatch(rf"state/{projections}/\w+", name):
            return P(None, *("tensor" if axis == split else None for axis in own))
    for pattern, spec in PARTITION_RULES:
        if re.fullmatch(pattern, name):
            return spec
    raise ValueError(f"No sharding rule matches {name}.")


def shardings(tree: Any, mesh: Mesh, root: str, axes: Mapping[str, str] | None = None) -> Any:
    """Returns a NamedSharding for every leaf of `tree`, whose paths start with `root` ("base", "state", "batch").

    Args:
      axes: of the adapter's arrays, as for `partition_spec`; for "state".

    Raises:
      ValueError: no rule matches a path, or an axis does not divide over the devices.
    """

    def leaf(path: tuple[Any, ...], array: Any) -> NamedSharding:
        name = "/".join([root, *(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)])
        sharding = NamedSharding(mesh, partition_spec(name, axes))
        try:
            sharding.shard_shape(np.shape(array))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return sharding

    return jax.tree_util.tree_map_with_path(leaf, tree)


def map_rows_and_heads(attend: Callable[..., Array], mesh: Mesh | None) -> Callable[..., Array]:
    """Returns `attend(q, k, v, segments)`, computed by each device for its own rows and heads, without communication.

    The arrays are [B, T, heads, H] and [B, T]. The compiler cannot split a kernel by itself.
    """
    if mesh is None or mesh.size == 1:
        return attend
    split, rows = P(BATCH_AXES, None, "tensor", None), P(BATCH_AXES, None)
    specs = (split, split, split, rows)
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)


def constrain_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Constrains activations inside a program: B is split as the rows of a batch are, the other axes are whole."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))


def constrain_table(table: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "V D"]:
    """Constrains an embedding table inside a program: V is split over `tensor`, D is whole."""
    return table if mesh is None else jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P("tensor")))
