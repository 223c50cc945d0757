"""Which attention a run uses: the wish, the device and the shapes decide, and a kernel is tried before it is used."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jlora.common.errors import UserError
from jlora.models.attention import attention
from jlora.models.compute import compute_capability
from jlora.models.kernels import BLOCK
from jlora.models.llama import LlamaConfig

KERNEL_OF = {"tpu": "splash", "gpu": "pallas"}  # by jax.Device.platform
TOLERANCE = 0.02  # of the norm: several times bfloat16's rounding, far below what a leak or a wrong mask makes


def choose(
    wish: str, device: Any, model: LlamaConfig, dtype: DTypeLike, longest: int, *, here: bool = True
) -> tuple[str, str]:
    """The backend of attention.attention, and where that is not the one made for the device, why not.

    Args:
      wish: "auto", "xla", or a kernel of flash.py.
      device: one of those that the run uses, a jax.Device or what stands for it.
      dtype: of activations.
      longest: tokens of the longest row.
      here: the device is of this machine, so that a kernel can be tried on it.

    Raises:
      UserError: the kernel that is wished for cannot run.
    """
    kernel = KERNEL_OF.get(device.platform, "xla") if wish == "auto" else wish
    if kernel == "xla":
        return "xla", ""
    window = model.sliding_window
    window = None if window is None or window >= longest else window
    reason = obstacle(kernel, device, model.head_dim, window, dtype)
    if not reason and here:
        reason = trial(kernel, model, window, dtype, longest)
    if not reason:
        return kernel, ""
    if wish == "auto":
        return "xla", f"{kernel}: {reason}"
    raise UserError(
        f"attn_implementation={wish!r} cannot run here: {reason}. Set attn_implementation to 'xla', which runs "
        "anywhere, or to 'auto'"
    )


def obstacle(kernel: str, device: Any, head_dim: int, window: int | None, dtype: DTypeLike) -> str:
    """Why a kernel cannot run, as far as that is known before it is tried; "" otherwise."""
    if KERNEL_OF.get(device.platform) != kernel:
        place = next(platform for platform, name in KERNEL_OF.items() if name == kernel).upper()
        return f"it is made for a {place}, and this is a {device.platform.upper()}"
    if kernel == "splash":
        return ""
    if compute_capability(device) < 8:
        return f"it needs an NVIDIA card of compute capability 8.0 or more, and this is a {device.device_kind}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"it needs activations in bfloat16 or float16, and they are {jnp.dtype(dtype).name}"
    if head_dim > 128:
        return f"it needs a head_dim of at most 128, and this is {head_dim}"
    if window is not None:
        return f"it has no sliding window, and rows are longer than this base's of {window}"
    return ""


def trial(kernel: str, model: LlamaConfig, window: int | None, dtype: DTypeLike, longest: int) -> str:
    """Runs a kernel and XLA on one row of this base's heads, in the run's blocks, forward and backward.

    Returns:
      What went wrong; "" where nothing did.
    """
    T, N, K, H = min(longest, 2 * BLOCK), model.num_attention_heads, model.num_key_value_heads, model.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(keys[i], (1, T, heads, H), dtype) for i, heads in enumerate((N, K, K, N)))
    places = jnp.arange(T)
    segments = jnp.where(places < T // 3, 1, jnp.where(places < T - T // 8, 2, 0))[None]

    def run(backend: str) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            mixed = attention(
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
            return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

        (_, mixed), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [x.astype(jnp.float32) for x in (mixed, *grads)]

    try:
        pairs = list(zip(run(kernel), run("xla"), strict=True))
    except Exception as error:  # whatever a compiler or a driver makes of it
        return f"it failed on this device ({str(error).strip().splitlines()[0][:200]})"
    worst = max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)
    return "" if worst <= TOLERANCE else f"its results are not XLA's on this device (off by {worst:.1%})"
