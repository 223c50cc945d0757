"""The forms of a state: that of a run, and the padded one in which adapters of other settings share a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jlora.adapters.methods import make_method
from jlora.adapters.methods.swept import SETTINGS
from jlora.adapters.settings import spec_of
from jlora.config.schema import Config
from jlora.steps.train_step import TrainState


def padded_config(config: Config, configs: Sequence[Config]) -> Config:
    """Returns the config whose adapter has room for those of all settings."""
    targets = {name for one in configs for name in spec_of(dataclasses.asdict(one)).target_modules}
    rank = max(one.lora_rank for one in configs)
    return dataclasses.replace(
        config,
        sweep={},
        lora_rank=rank,
        lora_alpha=float(rank),
        use_rslora=False,
        lora_dropout=max(one.lora_dropout for one in configs),
        target_modules=tuple(sorted(targets)),
    )


def pad(own: TrainState, config: Config, like: TrainState) -> TrainState:
    """Returns a run's state in the form of a sweep: padded if several adapters share a step.

    Args:
      config: of the run.
      like: a state of that form, for its shapes.
    """
    found = {"lora": own.lora, "optimizer": own.optimizer}
    leaves, spec = _by_path(found), spec_of(dataclasses.asdict(config))
    scale = make_method(spec, "").scale(spec.rank, spec.alpha)

    def filled(path: Any, leaf: Any) -> np.ndarray:
        if path[-1] == jax.tree_util.DictKey(SETTINGS):
            keeps = 1.0 - config.lora_dropout
            own_settings = [scale * (_target(path) in spec.target_modules), keeps, 1.0 / keeps]
            return np.tile(np.array(own_settings, leaf.dtype), (leaf.shape[0], 1))
        made, values = np.zeros(leaf.shape, leaf.dtype), leaves.get(jax.tree_util.keystr(path))
        if values is not None:
            made[tuple(map(slice, values.shape))] = values
        return made

    inner = {"lora": like.lora, "optimizer": like.optimizer.inner_state}
    made = jax.tree_util.tree_map_with_path(filled, inner)
    varied = {key: np.array(getattr(config, key), np.float32) for key in like.optimizer.hyperparams}
    step = np.array(own.step, np.int32)
    optimizer = like.optimizer._replace(count=step.copy(), hyperparams=varied, inner_state=made["optimizer"])
    return TrainState(made["lora"], optimizer, step, own.scaling)  # type: ignore[arg-type]


def cut(padded: TrainState, like: TrainState) -> TrainState:
    """Returns a state of a sweep in the form of a run of its own.

    Args:
      like: the run's state as shapes.
    """
    leaves = _by_path({"lora": padded.lora, "optimizer": padded.optimizer.inner_state})

    def taken(path: Any, leaf: Any) -> np.ndarray:
        return np.asarray(leaves[jax.tree_util.keystr(path)])[tuple(slice(size) for size in leaf.shape)]

    made = jax.tree_util.tree_map_with_path(taken, {"lora": like.lora, "optimizer": like.optimizer})
    return TrainState(made["lora"], made["optimizer"], padded.step, padded.scaling)


def stack(states: Sequence[TrainState]) -> TrainState:
    """Returns states of the same form as one, with a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *states)


def unstack(stacked: Any, index: int) -> Any:
    """Returns one of several states, or of their metrics, which are in host memory."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _target(path: Any) -> str:
    """Returns the projection of a leaf, such as "q_proj"."""
    return str(path[-2].key)
