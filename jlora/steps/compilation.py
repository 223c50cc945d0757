"""Compiles programs, reports each one and its time, and caches it for the next start."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from jlora.common import malloc, paths

FIRST = {
    "cpu": "about 10 s",
    "gpu": "about a minute",
    "tpu": "about a minute",
}  # expected time by platform, for any size of model
# With these, products of cuBLAS read the weights of a layer where they are in the stack. Otherwise the compiler copies
# them out first, forward and backward. The CUDA compiler of jax 0.10 fails with them.
IN_PLACE: dict[str, str | bool] = {
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": "0",
}
# A library computes matrix products on a CPU; all other operations use XLA's own loops, which use the cores better.
OPTIONS: dict[str, dict[str, str | bool]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "gpu": IN_PLACE if jax.__version_info__ >= (0, 11) else {},
}
LARGEST = 2 << 30  # bytes of cached programs; the least recently used are evicted


def enable_compilation_cache() -> None:
    """Caches compiled programs in the user's cache directory, unless JAX already has a setting for that.

    Does nothing for several processes on GPUs: they autotune together, and a process with a cached program would not
    take part.
    """
    if jax.process_count() > 1 and jax.default_backend() == "gpu":
        return
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(paths.cache_directory() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@functools.cache
def supported_options(platform: str) -> dict[str, str | bool]:
    """Returns OPTIONS of a platform if this version of XLA knows them, for `jax.jit` on it; else none."""
    options = OPTIONS.get(platform, {})
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Compiler:
    """Compiles programs and reports each one.

    Args:
      platform: platform of the target devices.
    """

    def __init__(self, platform: str) -> None:
        self._options = OPTIONS.get(platform)
        self._seconds = 0.0  # of the last compilation

    def __call__(self, name: str, lower: Callable[[], jax.stages.Lowered], say: Callable[[str], None]) -> Any:
        """Returns the compiled program; `name` describes it and its sizes in the report."""
        takes = f"about {self._seconds:.0f} s again" if self._seconds >= 1 else FIRST.get(jax.default_backend(), "")
        say(f"Compiling {name}: {takes}, less if cached")
        start = time.perf_counter()
        program = self._compiled(lower())
        self._seconds = time.perf_counter() - start
        malloc.trim()
        say(f"Compiled in {self._seconds:.1f} s")
        return program

    def _compiled(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        if self._options:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # other versions of XLA may not support the options
                return lowered.compile(compiler_options=self._options)
        return lowered.compile()
