"""rsLoRA: LoRA scaled by alpha / sqrt(r), so that high ranks keep learning (Kalajdzievski 2023, arXiv:2312.03732)."""

import math
from typing import Any

from jlora.adapters.methods.lora import Lora
from jlora.adapters.spec import AdapterSpec


class RsLora(Lora):
    """Rank-stabilized LoRA, which divides alpha by the square root of the rank."""

    chosen_by, title = ("use_rslora", True), "rsLoRA"

    @staticmethod
    def divisor(rank: int) -> float:
        return math.sqrt(rank)

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        return {**super().peft_fields(spec, tied=tied), "use_rslora": True}
