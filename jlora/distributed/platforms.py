"""Chooses the platform that JAX runs on."""

import os

import jax

from jlora.common.accelerators import has_accelerator, quiet_without_accelerator

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


def find_devices() -> list[jax.Device]:
    """Returns the devices of all processes; if no platform was chosen, as for "auto"."""
    choose_platform("auto")
    with quiet_without_accelerator():
        return jax.devices()
