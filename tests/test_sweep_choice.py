"""Which setting of a sweep goes on, and which wins."""

import dataclasses

from jlora.config.schema import Config
from jlora.sweep.choice import rungs, standings, survivors, winner
from jlora.sweep.grid import read_grid


def grid(ranks, halving=0):
    """A grid of ranks."""
    config = dataclasses.replace(Config(), train_data_dir="x", sweep={"lora_rank": ranks, "halving": halving})
    return read_grid(config)


class Evaluated:
    """What the choice looks at in a trial."""

    def __init__(self, setting, losses):
        self.setting, self.held_out_losses, self.step, self.diverged = setting, losses, max(losses), False
        self.base_loss = 3.0

    def loss_at(self, step):
        return self.held_out_losses[step]


def test_the_smaller_rank_wins_unless_the_larger_is_better_by_more_than_its_error():
    ranks = grid([16, 4])
    same = standings(ranks, [Evaluated(0, {1: 2.0}), Evaluated(1, {1: 2.0})])
    assert winner(ranks, same)[0].setting == 1
    close = standings(ranks, [Evaluated(0, {1: 1.9}), Evaluated(1, {1: 2.0})])
    assert winner(ranks, close)[0].setting == 0
    folds = [Evaluated(0, {1: 1.8}), Evaluated(0, {1: 2.0}), Evaluated(1, {1: 1.9}), Evaluated(1, {1: 2.05})]
    chosen, reason = winner(ranks, standings(ranks, folds))
    assert chosen.setting == 1
    assert "not better by more than its standard error" in reason


def test_a_setting_that_is_not_better_than_the_base_model_is_not_called_so():
    """With folds, by twice the standard error of the differences: of 0.5, 0.1 and 0.0 it is 0.31; of 0.3 thrice, 0."""
    one = grid([4])
    for losses, better in (((2.9,), True), ((3.1,), False), ((2.5, 2.9, 3.0), False), ((2.7, 2.7, 2.7), True)):
        found = standings(one, [Evaluated(0, {1: loss}) for loss in losses])
        assert found[0].gains == better
        assert ("no setting is better than the base model, 3.0000" in winner(one, found)[1]) != better


def test_rungs_leave_enough_settings():
    many = grid(list(range(1, 13)), halving=3)
    assert rungs(many, 150) == [16, 50]
    trials = [Evaluated(i, {16: float(i), 50: float(-i)}) for i in range(12)]
    alive = survivors(many, trials, 16, range(12))
    assert alive == [0, 1, 2, 3]
    assert survivors(many, trials, 50, alive) == [2, 3]
    assert rungs(grid([1, 2]), 150) == []
