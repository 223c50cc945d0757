"""Chooses the platform that JAX runs on."""

import jax

from jlora.common.accelerators import has_accelerator, quiet_without_accelerator

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}  # the setting `device` -> JAX's name


def choose_platform(device: str) -> None:
    """Configures JAX for the setting `device`; call it before JAX is first used.

    With "auto", JAX looks for an accelerator only if the machine has one, or JAX_PLATFORMS names it.
    """
    if device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[device])
    elif not jax.config.jax_platforms and not has_accelerator():  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def find_devices() -> list[jax.Device]:
    """Returns the devices of all processes; if no platform was chosen, as for "auto"."""
    choose_platform("auto")
    with quiet_without_accelerator():
        return jax.devices()
