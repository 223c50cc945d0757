"""Compiling: said beforehand, with about how long it takes; timed; and kept for the next start."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from jlora.common import malloc, paths

FIRST = {"cpu": "about 10 s", "gpu": "about a minute", "tpu": "about a minute"}  # by platform, for any size of model
# A CPU's matrix products by XLA's library; what stands around them by XLA's own loops, which use both cores better.
OPTIONS: dict[str, dict[str, str | bool]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
}
LARGEST = 2 << 30  # bytes of kept programs; the ones longest unused make room


def keep_programs() -> None:
    """Compiled programs are kept in the user's cache directory, unless JAX was told where to, or not to, keep them.

    Not for several processes on GPUs: they tune programs together, and one that has its own does not take part.
    """
    if jax.process_count() > 1 and jax.default_backend() == "gpu":
        return
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(paths.cache_directory() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class Compiler:
    """Compiles one program after the other, and says so.

    Args:
      platform: of the devices that they are for.
    """

    def __init__(self, platform: str) -> None:
        self._options = OPTIONS.get(platform)
        self._seconds = 0.0  # that the last one took

    def __call__(self, name: str, lower: Callable[[], jax.stages.Lowered], say: Callable[[str], None]) -> Any:
        """The program; `name` is what it does and for which sizes."""
        takes = f"about {self._seconds:.0f} s again" if self._seconds >= 1 else FIRST.get(jax.default_backend(), "")
        say(f"compiling {name}: {takes}, or less where it was compiled before")
        start = time.perf_counter()
        program = self._compiled(lower())
        self._seconds = time.perf_counter() - start
        malloc.give_back()
        say(f"compiled in {self._seconds:.1f} s")
        return program

    def _compiled(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        if self._options:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another XLA may not know them
                return lowered.compile(compiler_options=self._options)
        return lowered.compile()
