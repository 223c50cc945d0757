"""Chooses the attention backend from the setting, the device and the shapes, and tries a kernel before using it."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jlora.common.errors import UserError
from jlora.models.attention import attention
from jlora.models.compute_settings import Packing, compute_capability
from jlora.models.model_config import ModelConfig

KERNEL_OF = {"tpu": "splash", "gpu": "cudnn"}  # by jax.Device.platform
TOLERANCE = 0.02  # relative error: several times bfloat16's rounding, far below the effect of a leak or a wrong mask
RUNS = 5  # timed runs; the fastest counts


def choose_backend(
    setting: str,
    device: Any,
    model: ModelConfig,
    dtype: DTypeLike,
    rows: tuple[int, int],
    packing: Packing,
    *,
    here: bool = True,
) -> tuple[str, str]:
    """Chooses the backend for `attention.attention`.

    Args:
      setting: "auto", "xla", or a kernel, a key of `attention.KERNELS`.
      device: one of the run's devices: a jax.Device or a stand-in for it.
      dtype: dtype of activations.
      rows: the rows of a batch on this device, and the tokens in the longest one.
      packing: bounds on the rows.
      here: whether the device belongs to this machine, so that a kernel can be tried on it.

    Returns:
      The backend, and a note for the log: the reason if it is not the device's own kernel, or the times of both.

    Raises:
      UserError: the setting is a kernel that cannot run.
    """
    kernel = KERNEL_OF.get(device.platform, "xla") if setting == "auto" else setting
    if kernel == "xla":
        return "xla", ""
    reason, note = _missing_requirement(kernel, device, model.head_dim, dtype), ""
    if not reason and here:
        reason, note = _try_kernel(kernel, model, dtype, rows, packing, must_be_fast=setting == "auto")
    if not reason:
        return kernel, note
    if setting == "auto":
        return "xla", f"not {kernel}: {reason}"
    raise UserError(
        f"attn_implementation={setting!r} cannot run here: {reason}. Set attn_implementation to 'xla', which runs "
        "anywhere, or to 'auto'."
    )


def _missing_requirement(kernel: str, device: Any, head_dim: int, dtype: DTypeLike) -> str:
    """Returns a reason why a kernel cannot run that is known without trying it; "" if there is none."""
    if KERNEL_OF.get(device.platform) != kernel:
        place = next(platform for platform, name in KERNEL_OF.items() if name == kernel).upper()
        return f"it requires a {place}, and this device is a {device.platform.upper()}"
    if kernel == "splash":
        return ""
    capability = compute_capability(device)
    if capability < 8:
        return (
            f"it requires an NVIDIA card of compute capability 8.0 or higher, and this device is a {device.device_kind}"
        )
    if jnp.dtype(dtype).itemsize != 2:
        return f"it requires activations in bfloat16 or float16, and these are {jnp.dtype(dtype).name}"
    largest = 256 if capability >= 9 else 128
    if head_dim > largest or head_dim % 8:
        return f"it requires a head_dim of at most {largest} that is a multiple of 8, and this model's is {head_dim}"
    return ""


def _try_kernel(
    kernel: str, model: ModelConfig, dtype: DTypeLike, rows: tuple[int, int], packing: Packing, *, must_be_fast: bool
) -> tuple[str, str]:
    """Runs a kernel and XLA on rows of the run's size with this model's heads, forward and backward.

    Returns:
      The reason why the kernel is not used ("" if it is), and the times of both.
    """
    (B, T), N, K, H = rows, model.num_attention_heads, model.num_key_value_heads, model.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(keys[i], (B, T, heads, H), dtype) for i, heads in enumerate((N, K, K, N)))
    segments = jnp.asarray(np.broadcast_to(_full_row(T, packing), (B, T)))
    real = (segments != 0)[..., None, None]  # outputs of padding are arbitrary

    def loss(q: Array, k: Array, v: Array, backend: str) -> tuple[Array, Array]:
        window = model.sliding_window
        places: dict[str, Any] = {"q_segments": segments, "k_segments": segments, "q_start": 0, "window": window}
        out = jnp.where(real, attention(q, k, v, **places, backend=backend, mesh=None, packing=packing), 0)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    def run(backend: str) -> tuple[list[Array], float]:
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        (_, out), grads = jax.block_until_ready(step(q, k, v, backend))
        best = math.inf
        for _ in range(RUNS):
            start = time.perf_counter()
            jax.block_until_ready(step(q, k, v, backend))
            best = min(best, time.perf_counter() - start)
        return [x.astype(jnp.float32) for x in (out, *grads)], best

    try:
        (got, seconds), (want, xla_seconds) = run(kernel), run("xla")
    except Exception as error:  # compilers and drivers raise many types
        return f"it failed on this device ({str(error).strip().splitlines()[0][:200]})", ""
    norms = [
        (float(jnp.linalg.norm((a - b).ravel())), float(jnp.linalg.norm(b.ravel())))
        for a, b in zip(got, want, strict=True)
    ]
    worst = max(difference / size for difference, size in norms)
    if not worst <= TOLERANCE:
        return f"its results differ from XLA's by {worst:.1%} on this device", ""
    times = f"{1e3 * seconds:.2f} ms a layer, {1e3 * xla_seconds:.2f} ms in XLA"
    return (f"it is slower ({times})" if must_be_fast and seconds > xla_seconds else ""), times


def _full_row(T: int, packing: Packing) -> Int[np.ndarray, " T"]:
    """Returns the segments of a row that holds as many examples as `packing` allows, or two if it has no bounds."""
    P, E, M = packing if packing.examples else Packing(0, 2, T)
    size = max(1, min(M, (T - P) * 7 // (8 * E)))  # an eighth is padding
    segments = np.zeros(T, np.int32)
    segments[:P] = -1
    own = np.repeat(np.arange(1, E + 1), size)[: T - P]
    segments[P : P + len(own)] = own
    return segments
