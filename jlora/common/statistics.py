"""Means over rows with bootstrap intervals (Efron 1979), and paired tests of the difference between two models."""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.95  # of the intervals
RESAMPLES = 2000
SIGNIFICANT = 0.05  # a difference with a larger p-value may be chance

Values = Float[np.ndarray, " N"]


class Interval(NamedTuple):
    """A mean and its interval; both ends are the mean itself if there is one row."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of two means over the same rows, its interval, and the p-value of "there is no difference"."""

    value: float
    low: float
    high: float
    p: float

    @property
    def shown(self) -> bool:
        """Whether the difference is more than chance explains."""
        return self.p < SIGNIFICANT


def ratio(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the weighted mean of values that contain their weight, such as a sum of losses; NaN without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sum(values, axis) / np.sum(weights, axis))


def interval(values: Values, weights: Values) -> Interval:
    """Returns sum(values) / sum(weights) with its bootstrap interval; rows without weight are left out.

    Shares of rows get Wilson's interval (1927): resampling 20 rows that all match would claim certainty.
    """
    from scipy import stats  # half a second

    counted = weights > 0
    values, weights = values[counted], weights[counted]
    mean = float(ratio(values, weights))
    if len(values) < 2:
        return Interval(mean, mean, mean)
    if (weights == 1).all() and np.isin(values, (0, 1)).all():
        share = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, "wilson")
        return Interval(mean, share.low, share.high)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are all equal have an interval of one point
        found = stats.bootstrap(
            (values, weights),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=100,
            confidence_level=LEVEL,
            method="percentile",
            rng=0,
        )
    return Interval(mean, *map(float, found.confidence_interval))


def difference(values: Values, others: Values, weights: Values) -> Difference:
    """Returns how much larger sum(values) / sum(weights) is than sum(others) / sum(weights).

    The p-value is that of Fisher's randomization test: under chance, each row's difference has either sign.
    """
    from scipy import stats

    counted = weights > 0
    rows, weights = (values - others)[counted], weights[counted]
    value, low, high = interval(rows, weights)
    if len(rows) < 2 or not rows.any():
        return Difference(value, low, high, 1.0)
    tested = stats.permutation_test(
        (rows,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=100, vectorized=True, rng=0
    )
    return Difference(value, low, high, float(tested.pvalue))


def adjusted(p_values: np.ndarray) -> list[float]:
    """Returns the p-values of several questions so that few "yes" are false (Benjamini and Hochberg 1995)."""
    from scipy import stats

    return list(map(float, stats.false_discovery_control(p_values)))


def gap(values: Values, others: Values) -> Interval:
    """Returns the difference of the means of two independent sets of rows, with its bootstrap interval."""
    from scipy import stats

    def means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(np.mean(a, axis) - np.mean(b, axis))

    mean = float(means(values, others))
    if min(len(values), len(others)) < 2:
        return Interval(mean, mean, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (values, others), means, vectorized=True, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0
        )
    return Interval(mean, *map(float, found.confidence_interval))
