"""Statistics of the arms of a study: means, differences with intervals, effect sizes, verdicts on claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

RESOLUTION = 1e-6
"""Values closer than this are equal: runs that collapsed to one constant differ in the last bits only."""

POWER = 0.8
"""Probability with which a study should find the difference called its minimum detectable one."""


@dataclass(frozen=True)
class Mean:
    """The mean of `n` runs with its interval, or with the `reason` why it has none."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    level: float
    reason: str | None


@dataclass(frozen=True)
class Difference:
    """How much higher the values of runs `a` are than those of runs `b`.

    Statistics that need a spread between runs are None, with the `reason`, when there is none to be had.
    """

    mean_difference: float
    """Mean of a minus mean of b, in the unit of the values."""

    low: float | None
    high: float | None
    """Ends of Welch's interval of the mean difference."""

    p: float | None
    """Welch's two-sided p-value, not adjusted."""

    n_a: int
    n_b: int
    hedges_g: float | None
    """Mean difference in pooled standard deviations, corrected for small samples."""

    a12: float
    """Vargha and Delaney's A: probability that a run of a has the higher value, ties counted half."""

    minimum_detectable: float | None
    """True difference that runs of this number and spread find with probability `POWER`, at p < 1 - level."""

    level: float
    reason: str | None

    @property
    def cliff_delta(self) -> float:
        """Cliff's delta: probability that a run of a is higher, minus probability that it is lower."""
        return 2 * self.a12 - 1


def mean_interval(values: ArrayLike, level: float = 0.95) -> Mean:
    """Mean with its t interval; without interval for fewer than two runs, or runs that are all equal.

    Raises:
        ValueError: a value is not finite, or the level is not between 0 and 1.
    """
    sample = _sample(values, "values")
    _check_level(level)
    n = len(sample)
    if n == 0:
        return Mean(None, None, None, 0, level, "no finished run")
    mean = float(sample.mean())
    if reason := _no_spread(sample):
        return Mean(mean, None, None, n, level, reason)
    margin = stats.t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n)
    return Mean(mean, float(mean - margin), float(mean + margin), n, level, None)


def difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Difference:
    """Difference in mean of independent runs of two arms, by Welch's unequal-variances t.

    Raises:
        ValueError: a side has no value or one that is not finite, or the level is not between 0 and 1.

    Source: Welch (1947); Hedges (1981), J = 1 - 3 / (4 df - 1); Vargha & Delaney (2000).
    """
    x, y = _sample(a, "a"), _sample(b, "b")
    _check_level(level)
    if not len(x) or not len(y):
        raise ValueError(
            f"n_a={len(x)}, n_b={len(y)}: a difference needs a run on both sides; leave the arm out"
        )
    shift = float(x.mean() - y.mean())
    a12 = _a12(x, y)
    if reason := _no_common_spread(x, y):
        return Difference(shift, None, None, None, len(x), len(y), None, a12, None, level, reason)
    parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = math.sqrt(sum(parts))
    df = sum(parts) ** 2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))
    margin = float(stats.t.ppf((1 + level) / 2, df) * error)
    return Difference(
        mean_difference=shift,
        low=shift - margin,
        high=shift + margin,
        p=float(2 * stats.t.sf(abs(shift) / error, df)),
        n_a=len(x),
        n_b=len(y),
        hedges_g=_hedges_g(x, y),
        a12=a12,
        minimum_detectable=error * _detectable_shift(df, 1 - level),
        level=level,
        reason=None,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's step-down method, in the given order.

    Rejecting those below alpha keeps the probability of any false rejection among them at most alpha.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"p_values={list(p_values)} must lie in [0, 1]; leave out comparisons that have no p-value"
        )
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1) if len(p) else []
    return adjusted.tolist()


def verdict(
    result: Difference,
    adjusted_p: float | None,
    claim: Literal["lower", "higher"] = "lower",
    alpha: float = 0.05,
) -> str:
    """Plain answer to the claim that a has the lower (or higher) mean than b.

    `supported`: the p-value, adjusted over all claims, is below alpha, the sign as claimed.
    `not supported`: it is below alpha, the sign the other one.
    `undecided at n=...`: neither; `minimum_detectable` then says what such a study could have found.
    """
    if adjusted_p is not None and adjusted_p < alpha:
        return "supported" if (result.mean_difference < 0) == (claim == "lower") else "not supported"
    n = f"{result.n_a}" if result.n_a == result.n_b else f"{result.n_a} and {result.n_b}"
    return f"undecided at n={n}"


def relative_improvement(method_accuracy: ArrayLike, random_accuracy: ArrayLike) -> float:
    """Percent by which the mean accuracy of a method exceeds that of random architectures of its space.

    Both are trained by one protocol. The denominator moves with the space, so state both means beside it.

    Source: Yang, Esperança & Carlucci, "NAS evaluation is frustratingly hard", arXiv:1912.12522.
    """
    method, random = _sample(method_accuracy, "method_accuracy"), _sample(random_accuracy, "random_accuracy")
    if not len(method) or not len(random) or random.mean() <= 0:
        raise ValueError(
            "relative improvement needs runs on both sides and a positive mean accuracy of random ones"
        )
    return float(100 * (method.mean() - random.mean()) / random.mean())


def _sample(values: ArrayLike, name: str) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} holds a value that is not finite; count missing runs, then leave them out")
    return sample


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; use 0.95 for a 95 % interval")


def _no_spread(sample: NDArray[np.float64]) -> str | None:
    """Why a sample says nothing about the spread between runs, if so."""
    if len(sample) == 1:
        return "one run"
    return f"{len(sample)} equal runs" if np.ptp(sample) < RESOLUTION else None


def _no_common_spread(x: NDArray[np.float64], y: NDArray[np.float64]) -> str | None:
    if min(len(x), len(y)) == 1:
        return "one run on a side" if max(len(x), len(y)) > 1 else "one run on each side"
    return "equal runs on each side" if _no_spread(x) and _no_spread(y) else None


def _a12(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    gaps = np.rint(x / RESOLUTION)[:, None] - np.rint(y / RESOLUTION)[None, :]
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))


def _hedges_g(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    df = len(x) + len(y) - 2
    pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / df)
    return float((1 - 3 / (4 * df - 1)) * (x.mean() - y.mean()) / pooled)


def _detectable_shift(df: float, alpha: float) -> float:
    """Non-centrality, in standard errors, at which a two-sided t test at `alpha` has power `POWER`."""
    critical = float(stats.t.ppf(1 - alpha / 2, df))

    def shortfall(shift: float) -> float:
        # A significant difference of the wrong sign is left out: at this power its probability is negligible.
        return float(stats.nct.sf(critical, df, shift)) - POWER

    return float(optimize.brentq(shortfall, 0.0, 4 * critical + 4))
