"""Converts an adapter to the form that a server loads correctly, or rejects the export.

From their sources: vLLM and LoRAX take one rank and one scale for all modules. Older SGLang does not support rsLoRA.
LoRAX drops a module type that is missing in a layer. llama.cpp ignores rsLoRA and alpha patterns. None of the four
supports DoRA, IA3, biases, or a trained embedding or head.
"""

import dataclasses

from jlora.adapters import plain_lora
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Server:
    """A program that loads adapters."""

    title: str
    plain: bool  # loads only plain LoRA: one rank and scale for all modules
    ranks: tuple[int, ...] = ()  # maximum ranks that it can be started with; (): any
    usual: int = 0  # its default maximum rank; 0: no maximum


VLLM = Server("vLLM", plain=True, ranks=(8, 16, 32, 64, 128, 256, 320, 512), usual=16)
SERVERS = {
    "peft": Server("PEFT", plain=False),
    "vllm": VLLM,
    "tpu-inference": dataclasses.replace(VLLM, title="vLLM on TPU"),
    "sglang": Server("SGLang", plain=True),
    "lorax": Server("LoRAX", plain=True),
    "llama.cpp": Server("llama.cpp", plain=True),
    "jlora": Server("jlora serve", plain=False),
}
MERGE = "Merge it into the base model instead, with --merged, or load it with PEFT."


def convert_for_server(name: str, adapter: Adapter, spec: AdapterSpec, max_rank: int) -> tuple[Adapter, AdapterSpec]:
    """Returns the adapter and its spec in a form that a server loads correctly: unchanged, or as plain LoRA.

    Args:
      name: a key of SERVERS.
      adapter, spec: the trained adapter.
      max_rank: the maximum rank that the server is started with; 0: its default.

    Raises:
      UserError: the server does not support such an adapter, or its rank.
    """
    server = SERVERS[name]
    if not server.plain:
        return adapter, spec
    for what in plain_lora.unsupported_as_lora(spec):
        raise UserError(f"--for {name}: {server.title} does not support {what}. {MERGE}")
    if not plain_lora.is_uniform_lora(spec):
        adapter, spec = plain_lora.to_plain_lora(adapter, spec)
    largest = max_rank or server.usual
    if server.ranks and (largest not in server.ranks or spec.rank > largest):
        fits = [size for size in server.ranks if size >= spec.rank]
        if not fits:
            raise UserError(
                f"--for {name}: Rank {spec.rank} exceeds {server.title}'s limit of {server.ranks[-1]}. {MERGE}"
            )
        raise UserError(
            f"--for {name}: The adapter has rank {spec.rank}, but {server.title} would be started with a maximum rank "
            f"of {largest}. Add --max_lora_rank {fits[0]}, and start {server.title} with --max-lora-rank {fits[0]}."
        )
    return adapter, spec
