"""The checkpoints and the cached base loss that a run keeps."""

import numpy as np

from jlora.steps.train_step import TrainState
from jlora.training import base_loss_cache
from jlora.training.checkpoint import Checkpoints, Progress


def test_the_best_checkpoint_is_kept_when_a_run_continues(tmp_path):
    progress = Progress(base_loss=5.0)
    for losses in ({1: 1.0, 2: 2.0, 3: 3.0, 4: None}, {5: 4.0, 6: None}):  # one process after the other
        checkpoints = Checkpoints(tmp_path)
        for step, loss in losses.items():
            if loss is not None:
                progress.record(step, loss)
            moments = {"m": np.zeros(2, np.float32)}
            state = TrainState({"a": np.ones(2, np.float32)}, moments, np.array(step, np.int32))
            checkpoints.save(state, progress, loss)
        checkpoints.wait()
        assert checkpoints.steps() == [1, step - 1, step] and checkpoints.best() == 1
        assert [checkpoints.progress(n).eval_loss for n in (1, step - 1, step)] == [1.0, losses[step - 1], None]
        checkpoints.close()


def test_the_base_loss_cache_depends_on_all_values_and_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def cached(values, array):
        return base_loss_cache.read_loss(base_loss_cache.cache_file(values, [array]))

    assert cached({"base": "a"}, np.arange(3)) is None
    base_loss_cache.write_loss(base_loss_cache.cache_file({"base": "a"}, [np.arange(3)]), 1 / 3)
    assert cached({"base": "a"}, np.arange(3)) == 1 / 3
    for values, array in [
        ({"base": "b"}, np.arange(3)),
        ({"base": "a"}, np.arange(4)),
        ({"base": "a"}, np.arange(3.0)),
    ]:
        assert cached(values, array) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    base_loss_cache.write_loss(base_loss_cache.cache_file({}, []), 1.0)  # a cache that cannot be written is ignored
