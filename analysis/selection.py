"""What choosing by a metric buys: the quality of its top k, and of random draws to hold against it.

Where the metric ties runs, the numbers are the exact means over all ways to break the ties, never file order.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from analysis.resample import (
    DRAWS,
    ENOUGH_UNITS,
    MOST_UNDEFINED,
    RESOLUTION,
    Array,
    Draws,
    Estimate,
    Indices,
    Labels,
    Units,
    count,
    dense_ranks,
    finite_sample,
)

_RESAMPLES = 999


@dataclass(frozen=True)
class Selection:
    """Quality of the k runs that a metric puts first, of n."""

    k: int
    top: int
    """Runs of least error that count as truly good; ties of the last rank are shared out among them."""

    n: int
    precision: Estimate
    """Share of the k chosen that are among the `top` best."""

    recall: Estimate
    """Share of the `top` best that are among the k chosen."""

    regret: Estimate
    """Least error among the chosen, minus the least of all, in the unit of the error."""

    rank: Estimate
    """Rank by error of the best run chosen; 1 is the best of all, equal errors share their first rank."""

    beats_random: Estimate
    """Probability that the best chosen is strictly better than the best of k random draws."""

    ties_random: Estimate
    """Probability that it is as good, or the same run."""


def selection(
    metric: ArrayLike,
    error: ArrayLike,
    k: int,
    *,
    top: int | None = None,
    lowest: bool = True,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Selection:
    """Quality of the k runs of lowest (or highest) metric.

    Intervals are percentile ones over resampled units, from 999 resamples unless `draws` says otherwise; in
    each of them the best run is that of the resample. Units of several rows make resamples of other sizes:
    those with fewer rows than k or top are left out, up to one in twenty.

    Args:
        metric, error: of all runs of a pool; all finite.
        k: runs chosen.
        top: truly good runs; k of them by default.
        lowest: whether a lower metric is chosen, as for an error.
        units: independent units, each row by default.
        resolution: of metric and error.
        draws: of the intervals.

    Raises:
        ValueError: a value is not finite, lengths differ, or k or top is not within 1 and the number of runs.
    """
    x, y = finite_sample(metric, "metric"), finite_sample(error, "error")
    if len(x) != len(y):
        raise ValueError(f"metric has {len(x)} values and error {len(y)}; give one of each per run")
    good = k if top is None else top
    if not 1 <= k <= len(x) or not 1 <= good <= len(x):
        raise ValueError(f"k={k} and top={good} must lie within 1 and the {len(x)} runs")
    score = dense_ranks(x if lowest else -x, resolution).astype(np.float64)
    rounded = np.rint(y / RESOLUTION) * RESOLUTION
    unit = Units.of(len(x), units)
    found = np.array(_quality(score, rounded, k, good))
    total = draws.resamples or _RESAMPLES
    drawn = np.full((total, len(found)), np.nan)
    if len(unit) >= ENOUGH_UNITS:
        members = np.argsort(unit.of_row, kind="stable")
        for number, weights in enumerate(unit.counts(total, np.random.default_rng(draws.seed))):
            times = weights[unit.of_row[members]].astype(np.intp)
            rows = np.repeat(members, times)
            if max(k, good) <= len(rows):
                drawn[number] = _quality(score[rows], rounded[rows], k, good)
    names = ("precision", "recall", "regret", "rank of the best", "beats random", "ties random")
    estimates = [
        _interval(value, column, f"{name} at k = {k}", len(x), len(unit), draws.level)
        for name, value, column in zip(names, found.tolist(), drawn.T, strict=True)
    ]
    return Selection(k, good, len(x), *estimates)


def expected_best(values: ArrayLike, n: int, lowest: bool = False) -> float:
    """Expected best of n values drawn without replacement from these.

    Source: with y ascending, sum of y_i C(i - 1, n - 1) / C(N, n).

    Raises:
        ValueError: n is not within 1 and the number of values, or a value is not finite.
    """
    sample = finite_sample(values, "values")
    if not 1 <= n <= len(sample):
        raise ValueError(f"n={n} must lie within 1 and the {len(sample)} values")
    ordered = np.sort(-sample if lowest else sample)
    best = float(ordered @ _chances(len(ordered), n))
    return -best if lowest else best


def share_at_least_as_good(error: float, space: ArrayLike, resolution: float = RESOLUTION) -> float:
    """Share of a space whose errors are all known that is at least as good as an error: q of `random_policy`.

    q = (architectures of the space with error <= this one's) / (architectures of the space); closer errors
    than the resolution are equal, and the architecture itself counts where it is of the space.

    Raises:
        ValueError: the space is empty, or an error is not finite.
    """
    known, own = finite_sample(space, "space"), finite_sample([error], "error")
    if not len(known):
        raise ValueError("space is empty; give the true error of every architecture in it")
    return float(np.mean(np.rint(known / resolution) <= np.rint(own / resolution)))


def random_policy(share: float, n: int) -> float:
    """Probability that n random architectures are all strictly worse than one: (1 - share)^n.

    Args:
        share: of the space that is at least as good as the one, see `share_at_least_as_good`.
        n: random draws, independent.

    Source: Yu et al. (2020); some print this number, some its complement, under one name.
    """
    if not 0 <= share <= 1 or n < 1:
        raise ValueError(f"share={share} must lie in [0, 1], and n={n} be at least 1")
    return float((1 - share) ** n)


def _quality(score: Array, error: Array, k: int, top: int) -> tuple[float, ...]:
    """Precision, recall, regret, rank, and chances to beat and to equal random draws; low scores first."""
    n = len(score)
    cut = np.partition(score, k - 1)[k - 1]
    sure, open_ones = error[score < cut], np.sort(error[score == cut])
    places = k - len(sure)
    # Weight of each run among the top: 1, or its share of the last rank.
    last = np.partition(error, top - 1)[top - 1]
    share = (top - int((error < last).sum())) / int((error == last).sum())

    def hits(values: Array) -> float:
        return float((values < last).sum() + share * (values == last).sum())

    hit = hits(sure) + places / len(open_ones) * hits(open_ones)
    # The best chosen is a sure one, or the least of `places` draws from the tied ones.
    chance = _chances(len(open_ones), places)[::-1]
    best = np.minimum(open_ones, sure.min(initial=math.inf))
    ordered = np.sort(error)
    below, upto = np.searchsorted(ordered, best, "left"), np.searchsorted(ordered, best, "right")
    worse, no_better = _all_above(n, n - upto, k), _all_above(n, n - below, k)
    return (
        hit / k,
        hit / top,
        float(chance @ best) - float(ordered[0]),
        float(chance @ (below + 1)),
        float(chance @ worse),
        float(chance @ (no_better - worse)),
    )


def _chances(n: int, draws: int) -> Array:
    """Probability that the i-th smallest is the largest drawn: C(i - 1, draws - 1) / C(n, draws)."""
    below = np.arange(n)
    logs = _log_choose(below, draws - 1) - _log_choose(np.array([n]), draws)
    return np.where(below >= draws - 1, np.exp(logs), 0.0)


def _all_above(n: int, above: Indices, draws: int) -> Array:
    """Probability that all draws without replacement from n are among the `above`."""
    logs = _log_choose(above, draws) - _log_choose(np.array([n]), draws)
    return np.where(above >= draws, np.exp(np.minimum(logs, 0)), 0.0)


def _log_choose(n: Indices, k: int) -> Array:
    safe = np.maximum(n, k)
    logs: Array = special.gammaln(safe + 1) - special.gammaln(k + 1) - special.gammaln(safe - k + 1)
    return logs


def _interval(value: float, drawn: Array, name: str, n: int, n_units: int, level: float) -> Estimate:
    if n_units < ENOUGH_UNITS:
        few = f"{count(n_units, 'independent unit')}, fewer than {ENOUGH_UNITS}: no interval"
        return Estimate(value, None, None, n, n_units, name, level, few)
    good = drawn[np.isfinite(drawn)]
    if len(good) < (1 - MOST_UNDEFINED) * len(drawn):
        lacking = f"{100 * (1 - len(good) / len(drawn)):.0f} % of the resamples hold too few rows"
        return Estimate(value, None, None, n, n_units, name, level, f"{lacking}: no interval")
    if np.ptp(good) < 1e-12:
        why = "every resample gives the same value: no interval"
        return Estimate(value, None, None, n, n_units, name, level, why)
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2]).tolist()
    method = f"{name}; percentile bootstrap, {count(len(good), 'resample')} of {count(n_units, 'unit')}"
    return Estimate(value, low, high, n, n_units, method, level)
