"""Two arms of runs compared: differences with intervals, effect sizes, equivalence, p-values, verdicts."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from analysis import resample
from analysis.planning import ALPHA, POWER, detectable_shift
from analysis.resample import (
    DRAWS,
    ENOUGH_UNITS,
    EXACT,
    PERMUTATIONS,
    RESOLUTION,
    Array,
    Draws,
    Estimate,
    Kernel,
    Units,
    check_level,
    dense_ranks,
    finite_sample,
)

MARGIN = 0.1
"""Difference in percentage points below which two arms count as equivalent, unless said otherwise."""

_ENOUGH_FOR_RI = 8
"""Runs a side of the study that introduced relative improvement."""


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

    t: float | None
    df: float | None
    """Welch's statistic, and its degrees of freedom."""

    n_a: int
    n_b: int
    cohens_d: float | None
    """Mean difference in pooled standard deviations."""

    hedges_g: float | None
    """Cohen's d, corrected for small samples."""

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
    sample = finite_sample(values, "values")
    check_level(level)
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
    x, y = finite_sample(a, "a"), finite_sample(b, "b")
    check_level(level)
    if not len(x) or not len(y):
        raise ValueError(
            f"n_a={len(x)}, n_b={len(y)}: a difference needs a run on both sides; leave the arm out"
        )
    shift = float(x.mean() - y.mean())
    a12 = _a12(x, y)
    if reason := _no_common_spread(x, y):
        return Difference(
            mean_difference=shift,
            low=None,
            high=None,
            p=None,
            t=None,
            df=None,
            n_a=len(x),
            n_b=len(y),
            cohens_d=None,
            hedges_g=None,
            a12=a12,
            minimum_detectable=None,
            level=level,
            reason=reason,
        )
    parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = math.sqrt(sum(parts))
    df = float(sum(parts) ** 2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1)))
    margin = float(stats.t.ppf((1 + level) / 2, df) * error)
    return Difference(
        mean_difference=shift,
        low=shift - margin,
        high=shift + margin,
        p=float(2 * stats.t.sf(abs(shift) / error, df)),
        t=shift / error,
        df=df,
        n_a=len(x),
        n_b=len(y),
        cohens_d=shift / _pooled_sd(x, y),
        hedges_g=_small_sample(len(x) + len(y) - 2) * shift / _pooled_sd(x, y),
        a12=a12,
        minimum_detectable=error * detectable_shift(df, 1 - level, POWER),
        level=level,
        reason=None,
    )


@dataclass(frozen=True)
class Comparison:
    """Two independent arms compared in all ways that a reviewer may ask for, none of them adjusted."""

    difference: Difference
    """By Welch's t, with effect sizes."""

    bootstrap: Estimate
    """Mean difference; each arm is resampled by itself."""

    a12: Estimate
    u: float
    """Mann-Whitney U of arm a: pairs in which its value is the higher, ties counted half."""

    p_mann_whitney: float | None
    p_brunner_munzel: float | None
    """None where one arm lies wholly above the other, or has fewer than two runs: its variance is 0 then."""

    p_permutation: float | None
    """Of the mean difference; exact where there are at most 40,320 divisions; None for one run in an arm."""

    method: str


def compare_arms(a: ArrayLike, b: ArrayLike, draws: Draws = DRAWS) -> Comparison:
    """Comparison of independent runs of two arms; bootstrap intervals need five runs an arm, BCa ten.

    Raises:
        ValueError: as in `difference`.
    """
    welch = difference(a, b, draws.level)
    x, y = finite_sample(a, "a"), finite_sample(b, "b")
    p_permutation, ways = _permute_arms(x, y, draws)

    return Comparison(
        difference=welch,
        bootstrap=_over_arms(_shift_kernel(x, y), x, y, "difference in mean", draws),
        a12=_over_arms(_a12_kernel(x, y), x, y, "A12", draws),
        u=welch.a12 * len(x) * len(y),
        p_mann_whitney=_mann_whitney(x, y),
        p_brunner_munzel=_brunner_munzel(x, y, welch.a12),
        p_permutation=p_permutation,
        method=f"Welch t; Mann-Whitney; Brunner-Munzel; permutation of arms, {ways}",
    )


@dataclass(frozen=True)
class PairedDifference:
    """How much higher the values of a are than those of b in the same pair, e.g. of one seed and split.

    Statistics that need a spread between pairs are None, with the `reason`, when there is none to be had.
    """

    mean_difference: float
    low: float | None
    high: float | None
    """Ends of the t interval of the mean difference."""

    p: float | None
    """Of the paired t test, two-sided, not adjusted."""

    t: float | None
    n: int
    """Pairs."""

    cohens_dz: float | None
    """Mean difference in standard deviations of the differences."""

    share_higher: float
    """Share of the pairs in which a is higher, ties counted half."""

    p_wilcoxon: float | None
    p_permutation: float | None
    """Of the mean difference under all swaps within pairs, or 10,000 drawn ones beyond 15 pairs."""

    minimum_detectable: float | None
    bootstrap: Estimate
    level: float
    reason: str | None


def paired_difference(a: ArrayLike, b: ArrayLike, draws: Draws = DRAWS) -> PairedDifference:
    """Difference in mean of runs that come in pairs, by Student's t of the differences.

    Raises:
        ValueError: the sides are not equally long, are empty, or hold a value that is not finite.
    """
    x, y = finite_sample(a, "a"), finite_sample(b, "b")
    if len(x) != len(y) or not len(x):
        raise ValueError(f"n_a={len(x)}, n_b={len(y)}: pairs need as many runs on both sides, at least one")
    gaps = x - y
    n, shift, level = len(gaps), float(gaps.mean()), draws.level
    signs = np.sign(np.rint(gaps / RESOLUTION))
    share = float(np.mean((signs + 1) / 2))
    bootstrap = resample.estimate(
        resample.mean_kernel(gaps), Units.of(n), "mean of paired differences", draws
    )
    if reason := _no_spread(gaps):
        reason = reason.replace("run", "pair").replace("equal pairs", "equal differences")
        return PairedDifference(
            shift, None, None, None, None, n, None, share, None, None, None, bootstrap, level, reason
        )
    sd = float(gaps.std(ddof=1))
    error = sd / math.sqrt(n)
    margin = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    rounded = np.rint(gaps / RESOLUTION)
    swaps = stats.permutation_test(
        (rounded,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=EXACT if 2**n <= EXACT else draws.permutations or PERMUTATIONS,
        rng=np.random.default_rng(draws.seed),
    )
    return PairedDifference(
        mean_difference=shift,
        low=shift - margin,
        high=shift + margin,
        p=float(2 * stats.t.sf(abs(shift) / error, n - 1)),
        t=shift / error,
        n=n,
        cohens_dz=shift / sd,
        share_higher=share,
        p_wilcoxon=float(_wilcoxon(rounded)) if rounded.any() else None,
        p_permutation=float(swaps.pvalue),
        minimum_detectable=error * detectable_shift(n - 1, 1 - level, POWER),
        bootstrap=bootstrap,
        level=level,
        reason=None,
    )


@dataclass(frozen=True)
class Equivalence:
    """Whether two arms differ by less than a margin that matters, by two one-sided tests (TOST).

    That no difference was found does not make two arms the same; this does.
    """

    mean_difference: float
    low: float | None
    high: float | None
    """Ends of the interval of level 1 - 2 alpha: equivalence is shown where it lies within the margin."""

    p: float | None
    """The larger of both one-sided p-values."""

    margin: float
    n_a: int
    n_b: int
    alpha: float
    verdict: Literal["equivalent", "different", "undecided"]
    """`different`: the whole interval lies outside the margin."""

    method: str
    reason: str | None


def equivalence(
    a: ArrayLike, b: ArrayLike, margin: float = MARGIN, alpha: float = ALPHA, paired: bool = False
) -> Equivalence:
    """Test that the mean difference of two arms lies within plus and minus `margin`, in their unit.

    Raises:
        ValueError: as in `difference` or `paired_difference`, or the margin or alpha is out of range.

    Source: Schuirmann (1987), two one-sided tests.
    """
    if not 0 < margin < math.inf or not 0 < alpha < 0.5:
        raise ValueError(f"margin={margin} must be positive and alpha={alpha} between 0 and 0.5")
    found: Difference | PairedDifference
    if paired:
        found = paired_difference(a, b, Draws(level=1 - 2 * alpha))
        n_a, n_b, df = found.n, found.n, float(found.n - 1)
    else:
        found = difference(a, b, 1 - 2 * alpha)
        n_a, n_b, df = found.n_a, found.n_b, found.df or math.nan
    method = f"two one-sided {'paired' if paired else 'Welch'} t tests"
    shift = found.mean_difference
    if found.t is None or found.low is None or found.high is None:
        return Equivalence(
            shift, None, None, None, margin, n_a, n_b, alpha, "undecided", method, found.reason
        )
    error = (found.high - found.low) / 2 / float(stats.t.ppf(1 - alpha, df))
    p = max(float(stats.t.sf((margin - side) / error, df)) for side in (shift, -shift))
    answer: Literal["equivalent", "different", "undecided"] = "undecided"
    if p < alpha:
        answer = "equivalent"
    elif found.low > margin or found.high < -margin:
        answer = "different"
    return Equivalence(shift, found.low, found.high, p, margin, n_a, n_b, alpha, answer, method, None)


@dataclass(frozen=True)
class Reproduction:
    """Our runs beside a published mean."""

    mean: float
    published: float
    difference: float
    """Our mean minus the published one."""

    low: float | None
    high: float | None
    """Ends of the prediction interval: where one new run of ours falls with probability `level`."""

    inside: bool | None
    """Whether the published mean lies in the prediction interval."""

    z: float | None
    """Difference in standard errors that follow from the published spread and both numbers of runs."""

    n: int
    level: float
    reason: str | None


def reproduction(
    values: ArrayLike,
    published: float,
    published_sd: float | None = None,
    published_n: int | None = None,
    level: float = 0.95,
) -> Reproduction:
    """Whether our runs agree with a published mean, and with its spread where that is published, too.

    Raises:
        ValueError: there is no run, a number is not finite, or the published spread or n is not positive.
    """
    sample = finite_sample(values, "values")
    check_level(level)
    n = len(sample)
    if not n or not math.isfinite(published):
        raise ValueError(f"n={n}, published={published}: a reproduction needs runs and a published mean")
    if (published_sd is None) != (published_n is None):
        raise ValueError(f"published_sd={published_sd}, published_n={published_n}: give both or neither")
    gap = float(sample.mean()) - published
    z = None
    if published_sd is not None and published_n is not None:
        if not published_sd > 0 or published_n < 1:
            raise ValueError(f"published_sd={published_sd}, published_n={published_n} must be positive")
        z = gap / (published_sd * math.sqrt(1 / published_n + 1 / n))
    mean = float(sample.mean())
    if reason := _no_spread(sample):
        return Reproduction(mean, published, gap, None, None, None, z, n, level, reason)
    margin = float(stats.t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) * math.sqrt(1 + 1 / n))
    inside = abs(gap) <= margin
    return Reproduction(mean, published, gap, mean - margin, mean + margin, inside, z, n, level, None)


# Several p-values


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's step-down method, in the given order.

    Rejecting those below alpha keeps the probability of any false rejection among them at most alpha.
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1) if len(p) else []
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float], dependent: bool = False) -> list[float]:
    """P-values adjusted by Benjamini and Hochberg's method, in the given order; for exploration.

    Rejecting those below alpha keeps the expected share of false rejections among them at most alpha. With
    `dependent`, by Benjamini and Yekutieli's method, whatever the dependence between the tests.
    """
    p = _p_values(p_values)
    if not len(p):
        return []
    return stats.false_discovery_control(p, method="by" if dependent else "bh").tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Family:
    """Tests that are judged together: their p-values, adjusted for their number."""

    names: tuple[str, ...]
    p: tuple[float | None, ...]
    adjusted: tuple[float | None, ...]
    """None where there is no p-value; such a test does not count."""

    n_tests: int
    method: str


def family(
    p_values: Mapping[str, float | None], kind: Literal["primary", "exploratory", "dependent"]
) -> Family:
    """Adjusted p-values of a family of tests.

    `primary` tests, declared before the results, by Holm; `exploratory` ones by Benjamini and Hochberg;
    `dependent`, exploratory ones that depend on each other in unknown ways, by Benjamini and Yekutieli.
    """
    tested = {name: p for name, p in p_values.items() if p is not None}
    values = list(tested.values())
    adjusted = holm(values) if kind == "primary" else benjamini_hochberg(values, kind == "dependent")
    found = dict(zip(tested, adjusted, strict=True))
    method = {"primary": "Holm", "exploratory": "Benjamini-Hochberg", "dependent": "Benjamini-Yekutieli"}[
        kind
    ]
    return Family(
        tuple(p_values),
        tuple(p_values.values()),
        tuple(found.get(name) for name in p_values),
        len(tested),
        method,
    )


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
    method, random = (
        finite_sample(method_accuracy, "method_accuracy"),
        finite_sample(random_accuracy, "random_accuracy"),
    )
    if not len(method) or not len(random) or random.mean() <= 0:
        raise ValueError(
            "relative improvement needs runs on both sides and a positive mean accuracy of random ones"
        )
    return float(100 * (method.mean() - random.mean()) / random.mean())


@dataclass(frozen=True)
class RelativeImprovement:
    """Relative improvement over random architectures with its interval, and both means that it divides."""

    percent: Estimate
    method_mean: float
    random_mean: float
    n_method: int
    n_random: int


def relative_improvement_interval(
    method_accuracy: ArrayLike, random_accuracy: ArrayLike, draws: Draws = DRAWS
) -> RelativeImprovement:
    """Relative improvement in percent, with a bootstrap that resamples method and random runs independently.

    Raises:
        ValueError: as in `relative_improvement`.
    """
    relative_improvement(method_accuracy, random_accuracy)
    x, y = (
        finite_sample(method_accuracy, "method_accuracy"),
        finite_sample(random_accuracy, "random_accuracy"),
    )
    of_x, of_y = _arm_means(x, y)

    def kernel(weights: Array) -> Array:
        random: Array = of_y(weights)
        return resample.ratio(100 * (of_x(weights) - random), random)

    percent = _over_arms(kernel, x, y, "relative improvement over random, percent", draws)
    if min(len(x), len(y)) < _ENOUGH_FOR_RI:
        percent = percent.restricted(f"fewer than the {_ENOUGH_FOR_RI} runs a side that are customary")
    return RelativeImprovement(percent, float(x.mean()), float(y.mean()), len(x), len(y))


def _no_spread(sample: Array) -> str | None:
    """Why a sample says nothing about the spread between runs, if so."""
    if len(sample) == 1:
        return "one run"
    return f"{len(sample)} equal runs" if np.ptp(sample) < RESOLUTION else None


def _no_common_spread(x: Array, y: Array) -> str | None:
    if min(len(x), len(y)) == 1:
        return "one run on a side" if max(len(x), len(y)) > 1 else "one run on each side"
    return "equal runs on each side" if _no_spread(x) and _no_spread(y) else None


def _a12(x: Array, y: Array) -> float:
    both = np.ones((1, len(x) + len(y)))
    return float(_a12_kernel(x, y)(both)[0])


def _a12_kernel(x: Array, y: Array) -> Kernel:
    """A12 of draws from both arms; the weights of x come first."""
    order, starts = resample.ties(dense_ranks(np.concatenate([x, y]), RESOLUTION))
    of_x = np.arange(len(x) + len(y)) < len(x)

    def kernel(weights: Array) -> Array:
        in_x, in_y = (np.add.reduceat((weights * side)[:, order], starts, axis=1) for side in (of_x, ~of_x))
        below = np.cumsum(in_y, axis=1) - in_y / 2
        return resample.ratio((in_x * below).sum(axis=1), in_x.sum(axis=1) * in_y.sum(axis=1))

    return kernel


def _pooled_sd(x: Array, y: Array) -> float:
    df = len(x) + len(y) - 2
    return math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / df)


def _small_sample(df: int) -> float:
    return 1 - 3 / (4 * df - 1)


def _arm_means(x: Array, y: Array) -> tuple[Kernel, Kernel]:
    """Means of both arms; the weights of x come first."""
    of_x, of_y = resample.mean_kernel(x), resample.mean_kernel(y)
    return (lambda weights: of_x(weights[:, : len(x)])), (lambda weights: of_y(weights[:, len(x) :]))


def _shift_kernel(x: Array, y: Array) -> Kernel:
    of_x, of_y = _arm_means(x, y)
    return lambda weights: of_x(weights) - of_y(weights)


def _over_arms(kernel: Kernel, x: Array, y: Array, name: str, draws: Draws) -> Estimate:
    """Estimate whose bootstrap draws runs within their arm."""
    n = len(x) + len(y)
    units = Units.of(n, strata=np.repeat([0, 1], [len(x), len(y)]))
    if min(len(x), len(y)) >= ENOUGH_UNITS:
        return resample.estimate(kernel, units, name, draws, samples=True)
    few = f"fewer than {ENOUGH_UNITS} runs in an arm: no bootstrap interval"
    return Estimate(float(kernel(np.ones((1, n)))[0]), None, None, n, n, name, draws.level, few)


def _mann_whitney(x: Array, y: Array) -> float:
    a, b = (np.rint(values / RESOLUTION) for values in (x, y))
    return float(stats.mannwhitneyu(a, b).pvalue)


def _brunner_munzel(x: Array, y: Array, a12: float) -> float | None:
    if min(len(x), len(y)) < 2 or a12 in (0.0, 1.0):
        return None
    with warnings.catch_warnings():  # of a variance of 0, which the check below turns into None
        warnings.simplefilter("ignore", RuntimeWarning)
        p = stats.brunnermunzel(np.rint(x / RESOLUTION), np.rint(y / RESOLUTION)).pvalue
    return float(p) if math.isfinite(p) else None


def _permute_arms(x: Array, y: Array, draws: Draws) -> tuple[float | None, str]:
    if min(len(x), len(y)) < 2:
        return None, "none with one run in an arm"
    ways = math.comb(len(x) + len(y), len(x))
    # Whole steps of RESOLUTION add up exactly in any order, so that equal differences count as ties.
    test = stats.permutation_test(
        (np.rint(x / RESOLUTION), np.rint(y / RESOLUTION)),
        lambda a, b, axis: a.sum(axis=axis) * len(y) - b.sum(axis=axis) * len(x),
        permutation_type="independent",
        vectorized=True,
        n_resamples=EXACT if ways <= EXACT else draws.permutations or PERMUTATIONS,
        batch=max(1, 2_000_000 // (len(x) + len(y))),
        rng=np.random.default_rng(draws.seed),
    )
    return float(
        test.pvalue
    ), f"all {ways:,}" if ways <= EXACT else f"{draws.permutations or PERMUTATIONS:,} drawn"


def _wilcoxon(gaps: Array) -> float:
    with warnings.catch_warnings():  # of ties and zeros in small samples, where scipy itself falls back
        warnings.simplefilter("ignore", UserWarning)
        return float(stats.wilcoxon(gaps).pvalue)


def _p_values(p_values: Sequence[float]) -> Array:
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"p_values={list(p_values)} must lie in [0, 1]; leave out comparisons that have no p-value"
        )
    return p
