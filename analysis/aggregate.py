"""Many runs on many datasets: aggregate scores, performance profiles, and the ranks behind CD diagrams.

Source: Agarwal et al. (2021) for the aggregates; Demšar (2006) for ranks and critical differences.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from analysis import resample
from analysis.compare import holm
from analysis.resample import (
    DRAWS,
    ENOUGH_FOR_BCA,
    RESOLUTION,
    Array,
    Draws,
    Estimate,
    Indices,
    Kernel,
    Units,
    check_level,
    count,
    finite_sample,
)

Runs = Mapping[str, ArrayLike]
"""Values of the runs of one method by dataset."""

_FEWEST_DATASETS = 5
_FEW_DATASETS = 10


# Scores


def normalised(values: ArrayLike, random_mean: float, target: float) -> Array:
    """Scores in which the mean random architecture has 0 and the target, e.g. the best known, has 1.

    Raises:
        ValueError: both are equal, or a value is not finite.
    """
    if not abs(target - random_mean) > RESOLUTION:
        raise ValueError(f"target={target} equals random_mean={random_mean}: there is no scale between them")
    return (finite_sample(values, "values") - random_mean) / (target - random_mean)


def iqm(values: ArrayLike) -> float:
    """Interquartile mean: the mean of the middle half, without the lowest and highest quarter of the runs."""
    sample = finite_sample(values, "values")
    if not len(sample):
        raise ValueError("values is empty; an interquartile mean needs at least one run")
    return float(resample.trimmed_mean_kernel(sample)(np.ones((1, len(sample))))[0])


def aggregate(
    scores: Runs,
    statistic: Literal["iqm", "mean", "median", "optimality_gap"] = "iqm",
    *,
    draws: Draws = DRAWS,
) -> Estimate:
    """Aggregate of normalised scores over all runs and datasets; the bootstrap draws runs within datasets.

    `optimality_gap` is the mean amount by which scores fall short of 1; scores above 1 do not make up for it.
    """
    values, dataset = _flat(scores, "scores")
    kernels = {
        "iqm": lambda: resample.trimmed_mean_kernel(values),
        "mean": lambda: resample.mean_kernel(values),
        "median": lambda: resample.median_kernel(values),
        "optimality_gap": lambda: resample.mean_kernel(1 - np.minimum(values, 1)),
    }
    if statistic not in kernels:
        raise ValueError(f"statistic={statistic!r} is unknown; use one of {', '.join(kernels)}")
    return _stratified(kernels[statistic](), dataset, statistic, draws)


def probability_of_improvement(a: Runs, b: Runs, *, draws: Draws = DRAWS) -> Estimate:
    """Probability that a run of a scores higher than one of b, ties counted half: mean over datasets.

    Raises:
        ValueError: the two name different datasets, or a dataset has no run.
    """
    if set(a) != set(b):
        raise ValueError(f"datasets differ: {sorted(set(a) ^ set(b))}; leave out those that one side lacks")
    values_a, dataset_a = _flat(a, "a")
    values_b, dataset_b = _flat({name: b[name] for name in a}, "b")
    pairs = []
    for index in range(len(a)):
        x, y = (
            np.rint(v[d == index] / RESOLUTION) for v, d in ((values_a, dataset_a), (values_b, dataset_b))
        )
        higher = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        pairs.append((np.flatnonzero(dataset_a == index), np.flatnonzero(dataset_b == index), higher))
    split = len(values_a)

    def kernel(weights: Array) -> Array:
        total = np.zeros(len(weights))
        for rows_a, rows_b, higher in pairs:
            of_a, of_b = weights[:, rows_a], weights[:, split + rows_b]
            wins = np.einsum("bj,bj->b", of_a @ higher, of_b)
            total += resample.ratio(wins, of_a.sum(axis=1) * of_b.sum(axis=1))
        mean: Array = total / len(pairs)
        return mean

    strata = np.concatenate([dataset_a, dataset_b + len(a)])
    return _stratified(kernel, strata, "probability of improvement, mean over datasets", draws)


@dataclass(frozen=True, eq=False)
class Profile:
    """Share of runs that score above each threshold, with a pointwise band."""

    threshold: Array
    share: Array
    low: Array | None
    high: Array | None
    n: int
    n_datasets: int
    level: float
    method: str
    restriction: str | None


def performance_profile(scores: Runs, thresholds: ArrayLike, *, draws: Draws = DRAWS) -> Profile:
    """Performance profile: share of runs with score > tau in each dataset, then mean over datasets.

    The band is the percentile bootstrap of runs within datasets, at each threshold by itself.
    """
    values, dataset = _flat(scores, "scores")
    taus = finite_sample(thresholds, "thresholds")
    above = (values[:, None] > taus).astype(np.float64)
    sizes = np.bincount(dataset)
    each = above / sizes[dataset][:, None] / len(sizes)
    share = each.sum(axis=0)
    units = Units.of(len(values), strata=dataset)
    method = f"performance profile; {count(len(sizes), 'dataset')}"
    if sizes.min() < 2:
        why = "a dataset with a single run: no band"
        return Profile(taus, share, None, None, len(values), len(sizes), draws.level, method, why)
    total = draws.resamples or resample.resamples_for(len(values))
    drawn = units.counts(total, np.random.default_rng(draws.seed)) @ each
    tails = [(1 - draws.level) / 2, (1 + draws.level) / 2]
    low, high = np.quantile(drawn, tails, axis=0)
    few = f"a dataset with {count(int(sizes.min()), 'run')}: the band may be too narrow"
    return Profile(
        taus,
        share,
        np.minimum(low, share),
        np.maximum(high, share),
        len(values),
        len(sizes),
        draws.level,
        f"{method}, pointwise percentile bootstrap, {count(total, 'resample')}",
        few if sizes.min() < ENOUGH_FOR_BCA else None,
    )


def _flat(runs: Runs, name: str) -> tuple[Array, Indices]:
    """All values, and the number of their dataset."""
    samples = [finite_sample(values, f"{name}[{dataset!r}]") for dataset, values in runs.items()]
    empty = [dataset for dataset, sample in zip(runs, samples, strict=True) if not len(sample)]
    if not samples or empty:
        raise ValueError(
            f"{name} has no run on {empty or 'any dataset'}; leave such datasets out, and say so"
        )
    return np.concatenate(samples), np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])


def _stratified(kernel: Kernel, strata: Indices, name: str, draws: Draws) -> Estimate:
    n, smallest = len(strata), int(np.bincount(strata).min())
    if smallest < 2:
        value = float(kernel(np.ones((1, n)))[0])
        why = "a dataset with a single run: no interval"
        return Estimate(value, None, None, n, n, name, draws.level, why)
    found = resample.estimate(
        kernel, Units.of(n, strata=strata), f"{name}, within datasets", draws, correct=False
    )
    few = f"a dataset with {smallest} runs: the interval may be too narrow"
    return found.restricted(few if smallest < ENOUGH_FOR_BCA else None)


# Ranks


@dataclass(frozen=True)
class Friedman:
    """Test that all methods have the same mean rank."""

    mean_ranks: tuple[float, ...]
    chi_squared: float
    p: float
    iman_davenport: float | None
    """Less conservative F form of the test; None where the methods' order is the same in every block."""

    p_iman_davenport: float
    n_blocks: int
    n_methods: int


@dataclass(frozen=True)
class CriticalDifference:
    """Numbers of a critical-difference diagram, or the `restriction` why there must be none."""

    methods: tuple[str, ...]
    """By mean rank, the best first."""

    mean_ranks: tuple[float, ...]
    friedman: Friedman | None
    cd: float | None
    """Mean ranks closer than this do not differ by Nemenyi's test."""

    cliques: tuple[tuple[str, ...], ...]
    """Methods that a bar joins: largest sets that do not differ from each other by Nemenyi's test."""

    wilcoxon: tuple[tuple[str, str, float, float | None], ...]
    """Default post hoc test: pairs of methods, p of the signed-rank test, and p adjusted by Holm."""

    n_blocks: int
    alpha: float
    restriction: str | None


def ranks(errors: ArrayLike) -> Array:
    """Ranks of methods within blocks, (blocks, methods); 1 is the lowest error, ties share mean ranks."""
    table = np.asarray(errors, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(
            "errors must be a complete table, one row per block, one column per method; leave out blocks "
            "that a method lacks"
        )
    found: Array = stats.rankdata(np.rint(table / RESOLUTION), axis=1)
    return found


def friedman(errors: ArrayLike) -> Friedman:
    """Friedman's test on the ranks of methods within blocks, corrected for ties, with Iman and Davenport's F.

    Args:
        errors: (blocks, methods); ranks do as well.

    Raises:
        ValueError: fewer than 2 blocks or 3 methods, a value is missing, or all methods tie in every block.
    """
    rank = ranks(errors)
    n, k = rank.shape
    if n < 2 or k < 3:
        raise ValueError(
            f"{n} blocks of {k} methods: Friedman's test needs 2 blocks and 3 methods; compare pairs"
        )
    spread = float(((rank - (k + 1) / 2) ** 2).sum())
    if spread == 0:
        raise ValueError("all methods tie in every block; there is nothing to test")
    means = rank.mean(axis=0)
    chi = float((k - 1) * n**2 * ((means - (k + 1) / 2) ** 2).sum() / spread)
    room = n * (k - 1) - chi
    f = (n - 1) * chi / room if room > 1e-9 else None
    p_f = float(stats.f.sf(f, k - 1, (k - 1) * (n - 1))) if f is not None else 0.0
    return Friedman(tuple(means.tolist()), chi, float(stats.chi2.sf(chi, k - 1)), f, p_f, n, k)


def nemenyi_cd(n_methods: int, n_blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks: q sqrt(k (k + 1) / (6 N)).

    q is the studentised range's quantile for infinitely many degrees of freedom, over the root of 2.
    """
    check_level(1 - alpha)
    if n_methods < 2 or n_blocks < 1:
        raise ValueError(f"n_methods={n_methods} must be at least 2 and n_blocks={n_blocks} at least 1")
    q = float(stats.studentized_range.ppf(1 - alpha, n_methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks))


def critical_difference(
    errors: Mapping[str, ArrayLike],
    blocks: Literal["datasets", "paired seeds", "seeds"] = "datasets",
    alpha: float = 0.05,
) -> CriticalDifference:
    """Numbers of a critical-difference diagram of methods over blocks.

    Args:
        errors: of each method, one per block, in the same order of blocks.
        blocks: what they are. Seeds of one dataset are replicates, not blocks, unless all methods shared
            what the seed decides (`paired seeds`): then the diagram speaks of that one dataset.
        alpha: of the tests.

    Raises:
        ValueError: methods have different numbers of blocks, or a value is not finite.
    """
    samples = {name: finite_sample(values, name) for name, values in errors.items()}
    sizes = {name: len(values) for name, values in samples.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"methods have different numbers of blocks: {sizes}; leave out those that one lacks")
    n = next(iter(sizes.values()), 0)
    reason = None
    if blocks == "seeds":
        reason = (
            "seeds of one dataset are replicates, not blocks: no diagram unless they are paired by design"
        )
    elif n < _FEWEST_DATASETS:
        reason = f"{count(n, 'block')}, fewer than {_FEWEST_DATASETS}: no diagram"
    elif len(samples) < 3:
        reason = f"{count(len(samples), 'method')}: no diagram; compare the pair"
    table = np.stack(list(samples.values()), axis=1) if n else np.zeros((0, len(samples)))
    if reason is None and not np.ptp(ranks(table), axis=1).any():
        reason = "all methods tie in every block: no diagram"
    if reason:
        return CriticalDifference(tuple(samples), (), None, None, (), (), n, alpha, reason)
    test = friedman(table)
    order = np.argsort(test.mean_ranks, kind="stable")
    methods = tuple(list(samples)[index] for index in order)
    means = [test.mean_ranks[index] for index in order]
    cd = nemenyi_cd(len(methods), n, alpha)
    few = (
        f"{n} blocks, fewer than {_FEW_DATASETS}: the tests have little power" if n < _FEW_DATASETS else None
    )
    one = "of one dataset only: the blocks are its seeds" if blocks == "paired seeds" else None
    return CriticalDifference(
        methods,
        tuple(means),
        test,
        cd,
        tuple(tuple(methods[i : j + 1]) for i, j in _cliques(means, cd)),
        _signed_ranks(samples, methods),
        n,
        alpha,
        "; ".join(filter(None, [few, one])) or None,
    )


def _cliques(means: Sequence[float], cd: float) -> list[tuple[int, int]]:
    """First and last of the largest runs of mean ranks that span less than the critical difference."""
    spans: list[tuple[int, int]] = []
    for first in range(len(means)):
        last = max(index for index in range(first, len(means)) if means[index] - means[first] < cd)
        if last > first and (not spans or last > spans[-1][1]):
            spans.append((first, last))
    return spans


def _signed_ranks(
    samples: Mapping[str, Array], methods: Sequence[str]
) -> tuple[tuple[str, str, float, float | None], ...]:
    found = []
    for index, first in enumerate(methods):
        for second in methods[index + 1 :]:
            gaps = np.rint((samples[first] - samples[second]) / RESOLUTION)
            with (
                warnings.catch_warnings()
            ):  # of ties and zeros in small samples, where scipy itself falls back
                warnings.simplefilter("ignore", UserWarning)
                p = float(stats.wilcoxon(gaps).pvalue) if gaps.any() else 1.0
            found.append((first, second, p))
    adjusted = holm([p for _, _, p in found])
    return tuple((a, b, p, q) for (a, b, p), q in zip(found, adjusted, strict=True))
