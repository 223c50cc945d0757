"""Chooses the attention backend from the setting, the device and the shapes, and tries a kernel before using it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jlora.common.errors import UserError
from jlora.models.attention import attention
from jlora.models.compute_settings import compute_capability
from jlora.models.flash_attention import BLOCK
from jlora.models.model_config import ModelConfig

KERNEL_OF = {"tpu": "splash", "gpu": "pallas"}  # by jax.Device.platform
TOLERANCE = 0.02  # relative error: several times bfloat16's rounding, far below the effect of a leak or a wrong mask


def choose_backend(
    setting: str, device: Any, model: ModelConfig, dtype: DTypeLike, longest: int, *, here: bool = True
) -> tuple[str, str]:
    """Chooses the backend for `attention.attention`.

    Args:
      setting: "auto", "xla", or a kernel of flash_attention.py.
      device: one of the run's devices: a jax.Device or a stand-in for it.
      dtype: dtype of activations.
      longest: tokens in the longest row.
      here: whether the device belongs to this machine, so that a kernel can be tried on it.

    Returns:
      The backend, and the reason if it is not the device's own kernel ("" if it is).

    Raises:
      UserError: the setting is a kernel that cannot run.
    """
    kernel = KERNEL_OF.get(device.platform, "xla") if setting == "auto" else setting
    if kernel == "xla":
        return "xla", ""
    window = model.sliding_window
    window = None if window is None or window >= longest else window
    reason = _missing_requirement(kernel, device, model.head_dim, window, dtype)
    if not reason and here:
        reason = _try_kernel(kernel, model, window, dtype, longest)
    if not reason:
        return kernel, ""
    if setting == "auto":
        return "xla", f"{kernel}: {reason}"
    raise UserError(
        f"attn_implementation={setting!r} cannot run here: {reason}. Set attn_implementation to 'xla', which runs "
        "anywhere, or to 'auto'."
    )


def _missing_requirement(kernel: str, device: Any, head_dim: int, window: int | None, dtype: DTypeLike) -> str:
    """Returns a reason why a kernel cannot run that is known without trying it; "" if there is none."""
    if KERNEL_OF.get(device.platform) != kernel:
        place = next(platform for platform, name in KERNEL_OF.items() if name == kernel).upper()
        return f"it requires a {place}, and this device is a {device.platform.upper()}"
    if kernel == "splash":
        return ""
    if compute_capability(device) < 8:
        return (
            f"it requires an NVIDIA card of compute capability 8.0 or higher, and this device is a {device.device_kind}"
        )
    if jnp.dtype(dtype).itemsize != 2:
        return f"it requires activations in bfloat16 or float16, and these are {jnp.dtype(dtype).name}"
    if head_dim > 128:
        return f"it requires a head_dim of at most 128, and this model's is {head_dim}"
    if window is not None:
        return f"it does not support a sliding window, and rows are longer than this model's window of {window} tokens"
    return ""


def _try_kernel(kernel: str, model: ModelConfig, window: int | None, dtype: DTypeLike, longest: int) -> str:
    """Runs a kernel and XLA on one row with this model's heads and the run's block size, forward and backward.

    Returns:
      The reason why the kernel cannot be used; "" if it can.
    """
    T, N, K, H = min(longest, 2 * BLOCK), model.num_attention_heads, model.num_key_value_heads, model.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(keys[i], (1, T, heads, H), dtype) for i, heads in enumerate((N, K, K, N)))
    positions = jnp.arange(T)
    segments = jnp.where(positions < T // 3, 1, jnp.where(positions < T - T // 8, 2, 0))[None]

    def run(backend: str) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            out = attention(
                q,
                k,
                v,
                q_segments=segments,
                k_segments=segments,
                q_start=0,
                window=window and min(window, T // 4 + 1),
                backend=backend,
                mesh=None,
            )
            return jnp.sum(out.astype(jnp.float32) * weights), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [x.astype(jnp.float32) for x in (out, *grads)]

    try:
        pairs = list(zip(run(kernel), run("xla"), strict=True))
    except Exception as error:  # compilers and drivers raise many types
        return f"it failed on this device ({str(error).strip().splitlines()[0][:200]})"
    worst = max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)
    return "" if worst <= TOLERANCE else f"its results differ from XLA's by {worst:.1%} on this device"
