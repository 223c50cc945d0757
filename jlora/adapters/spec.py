"""Where an adapter sits and how strong it is there, by PEFT's own rules of names, layers and patterns."""

import dataclasses
import math
import re
from typing import Any

LAYER = "model.layers.{i}."  # before the name of a projection, as "self_attn.q_proj", in Hugging Face's names
TABLES = ("embed_tokens", "lm_head")  # what `modules_to_save` may train whole
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ("all-linear",)


@dataclasses.dataclass(frozen=True)
class Site:
    """The adapter of one projection, layer by layer."""

    ranks: tuple[int, ...]  # 0 where the layer has none
    scales: tuple[float, ...]  # the factor before BA; 0 where the layer has none


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter in PEFT's terms. What is left out is off: plain LoRA with one rank and one alpha."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # module names, or their last parts
    peft_type: str = "LORA"  # or "IA3", of which only the targets below count
    use_rslora: bool = False  # alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)
    use_dora: bool = False  # magnitude and direction (Liu et al. 2024, arXiv:2402.09353)
    pissa: bool = False  # starts at the principal components (Meng et al. 2024, arXiv:2404.02948)
    rank_pattern: tuple[tuple[str, int], ...] = ()  # the first that matches a module's name decides its rank
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # () is all
    modules_to_save: tuple[str, ...] = ()  # of TABLES
    feedforward_modules: tuple[str, ...] = ()  # the targets whose input IA3 scales, not their output
    neftune_noise_alpha: float = 0.0  # noise on embeddings in training (Jain et al. 2023, arXiv:2310.05914)

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: dropout, or noise."""
        return self.dropout > 0 or self.neftune_noise_alpha > 0

    @property
    def is_plain(self) -> bool:
        """Whether r and lora_alpha alone say it all, for every layer and by module names' last parts."""
        varied = self.rank_pattern or self.alpha_pattern or self.layers_to_transform
        special = self.use_rslora or self.use_dora or self.pissa or self.modules_to_save or self.peft_type != "LORA"
        return not (varied or special or any("." in target for target in self.target_modules))

    @property
    def beyond_portable(self) -> tuple[str, ...]:
        """What of this the portable form cannot say (see `lora.portable`), by the users' names."""
        there = {
            "IA3": self.peft_type == "IA3",
            "DoRA (use_dora)": self.use_dora,
            f"modules_to_save={','.join(self.modules_to_save)}": bool(self.modules_to_save),
        }
        return tuple(what for what, is_there in there.items() if is_there)

    def site(self, module: str, layers: int) -> Site:
        """The ranks and scales of one projection, named as "self_attn.q_proj", in a model of so many layers."""
        ranks, scales = [], []
        for i in range(layers):
            name = LAYER.format(i=i) + module
            rank = _first(self.rank_pattern, name, self.rank) if self._targets(name, i) else 0
            alpha = _first(self.alpha_pattern, name, self.alpha)
            ranks.append(1 if rank and self.peft_type == "IA3" else rank)
            scales.append(self._scale(rank, alpha) if rank else 0.0)
        return Site(tuple(ranks), tuple(scales))

    def _scale(self, rank: int, alpha: float) -> float:
        if self.peft_type == "IA3":
            return 1.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _targets(self, name: str, layer: int) -> bool:
        if name in self.target_modules:  # a whole name is meant, whatever `layers_to_transform` says
            return True
        chosen = not self.layers_to_transform or layer in self.layers_to_transform
        return chosen and any(name.endswith(f".{target}") for target in self.target_modules)

    def saves(self, table: str, *, tied: bool) -> bool:
        """Whether a table of TABLES is trained whole; tied ones are one table."""
        return bool(self.modules_to_save) if tied else table in self.modules_to_save

    def problems(self, modules: list[str], layers: int) -> list[str]:
        """What this asks for that a model with these projections and layers does not have: no key is without effect."""
        names = {
            LAYER.format(i=i) + module
            for module in modules
            for i, rank in enumerate(self.site(module, layers).ranks)
            if rank
        }
        beyond = [i for i in self.layers_to_transform if i >= layers]
        unused = [
            f"{key} has {pattern!r}, which matches no module that is trained"
            for key, entries in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern, _ in entries
            if not any(_matches(pattern, name) for name in names)
        ]
        unused += [
            f"target_modules has {target!r}, which no module is called"
            for target in self.target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
        return [f"layers_to_transform has {i}: the layers are 0 to {layers - 1}" for i in beyond] or unused


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule: the pattern, whole, is the name or what stands after one of its dots."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first(entries: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
    return next((value for pattern, value in entries if _matches(pattern, name)), default)


def spec_of(settings: dict[str, Any]) -> LoraConfig:
    """The adapter that the `config` of a run's config.json describes."""
    s = settings
    targets = TARGETS if tuple(s["target_modules"]) == ALL_LINEAR else tuple(s["target_modules"])
    noise = s["neftune_noise_alpha"]
    if s["peft_type"] == "IA3":
        leaves = {target.split(".")[-1] for target in targets}
        forward = tuple(target for target in s["feedforward_modules"] if target in leaves)
        return LoraConfig(1, 1.0, 0.0, targets, peft_type="IA3", feedforward_modules=forward, neftune_noise_alpha=noise)
    return LoraConfig(
        s["lora_rank"],
        s["lora_alpha"],
        s["lora_dropout"],
        targets,
        use_rslora=s["use_rslora"],
        use_dora=s["use_dora"],
        pissa=s["init_lora_weights"] == "pissa",
        rank_pattern=tuple(read_pattern(entry, int) for entry in s["rank_pattern"]),
        alpha_pattern=tuple(read_pattern(entry, float) for entry in s["alpha_pattern"]),
        layers_to_transform=tuple(map(int, s["layers_to_transform"])),
        modules_to_save=tuple(s["modules_to_save"]),
        neftune_noise_alpha=noise,
    )


def settings_of(spec: LoraConfig) -> dict[str, Any]:
    """The other way: the keys of a config that `spec_of` reads as this adapter."""
    return {
        "lora_rank": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": spec.target_modules,
        "peft_type": spec.peft_type,
        "feedforward_modules": spec.feedforward_modules,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": "pissa" if spec.pissa else "true",
        "rank_pattern": tuple(f"{pattern}={rank}" for pattern, rank in spec.rank_pattern),
        "alpha_pattern": tuple(f"{pattern}={alpha!r}" for pattern, alpha in spec.alpha_pattern),
        "layers_to_transform": tuple(map(str, spec.layers_to_transform)),
        "modules_to_save": spec.modules_to_save,
    }


def read_pattern(entry: str, kind: type) -> tuple[str, Any]:
    """An entry of `rank_pattern` or `alpha_pattern`, "PATTERN=NUMBER", in two."""
    pattern, _, value = entry.rpartition("=")
    if not pattern:
        raise ValueError(entry)
    return pattern, kind(value)
