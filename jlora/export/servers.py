"""What PEFT and the servers read of an adapter, and the form that each reads rightly.

By reading their sources: vLLM and LoRAX take one rank and one scale for all modules, older SGLang knows no rsLoRA,
LoRAX drops a module type that one layer lacks, llama.cpp ignores rsLoRA and alpha patterns; none of the four takes
DoRA, IA3 or trained tables.
"""

import dataclasses

from jlora.adapters import portable
from jlora.adapters.spec import AdapterSpec
from jlora.adapters.tree import Adapter
from jlora.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loader:
    """One program that reads adapters."""

    title: str
    plain: bool  # reads only plain LoRA, in the portable form
    ranks: tuple[int, ...] = ()  # sizes that it can be started with; () is any
    usual: int = 0  # the size that it has unless told


LOADERS = {
    "peft": Loader("PEFT", plain=False),
    "vllm": Loader("vLLM", plain=True, ranks=(8, 16, 32, 64, 128, 256, 320, 512), usual=16),
    "sglang": Loader("SGLang", plain=True),
    "lorax": Loader("LoRAX", plain=True),
    "llama.cpp": Loader("llama.cpp", plain=True),
}
MERGE = "merge it into the base instead, with --merged"


def form_for(name: str, adapter: Adapter, spec: AdapterSpec, max_rank: int) -> tuple[Adapter, AdapterSpec]:
    """The adapter in the form that a loader reads rightly: its own, or the portable one.

    Args:
      name: of LOADERS.
      max_rank: the size that the server is started with; 0 is its usual one.

    Raises:
      UserError: it refuses such an adapter, or its rank, with the way out.
    """
    loader = LOADERS[name]
    if not loader.plain:
        return adapter, spec
    for what in portable.beyond_portable(spec):
        raise UserError(f"--for {name}: {loader.title} does not read {what}: {MERGE}")
    if not portable.is_plain(spec):
        adapter, spec = portable.to_portable(adapter, spec)
    largest = max_rank or loader.usual
    if loader.ranks and (largest not in loader.ranks or spec.rank > largest):
        fits = [size for size in loader.ranks if size >= spec.rank]
        if not fits:
            raise UserError(
                f"--for {name}: rank {spec.rank} is above {loader.title}'s limit of {loader.ranks[-1]}: {MERGE}"
            )
        raise UserError(
            f"--for {name}: the adapter has rank {spec.rank}, and {loader.title} is started for ranks up to {largest}. "
            f"Start it with --max-lora-rank {fits[0]}, and say so here: --max_lora_rank {fits[0]}"
        )
    return adapter, spec
