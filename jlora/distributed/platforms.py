"""Chooses the platform that JAX runs on."""

import os

import jax

from jlora.common.accelerators import has_accelerator, quiet_without_accelerator
from jlora.common.errors import UserError

# Share of a GPU's free memory that JAX reserves at the start. Its own default, 0.75, would leave a quarter unused.
GPU_MEMORY_SHARE = 0.92
MEMORY_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX accepts only one of them
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}  # the setting `device` -> JAX's name


def choose_platform(device: str) -> None:
    """Configures JAX for the setting `device`; call it before JAX is first used.

    With "auto", JAX looks for an accelerator only if the machine has one, or JAX_PLATFORMS names it.
    """
    if not any(map(os.environ.get, MEMORY_SETTINGS)):
        os.environ[MEMORY_SETTINGS[0]] = str(GPU_MEMORY_SHARE)
    if device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[device])
    elif not jax.config.jax_platforms and not has_accelerator():  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def find_devices(device: str = "auto") -> list[jax.Device]:
    """Returns the devices of all processes, for the setting `device`.

    Raises:
      UserError: JAX finds no device of that kind.
    """
    choose_platform(device)
    try:
        with quiet_without_accelerator():
            return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if the platform has no plugin
        reason = str(error).strip().split("\n")[0] or "no plugin is installed"
        named = os.environ.get("JAX_PLATFORMS", "")
        wanted = f"JAX_PLATFORMS={named}" if device == "auto" and named else f"device={device}"
        fix = "unset JAX_PLATFORMS" if wanted.startswith("JAX") else "set device=auto"
        raise UserError(
            f"JAX found no device for {wanted} ({reason}). Install jlora[cuda12], jlora[cuda13] or jlora[tpu] for this "
            f"machine, or {fix}."
        ) from None
