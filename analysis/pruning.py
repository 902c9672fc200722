"""Association between metric and final error when some runs were stopped early and have no final error.

Those that finished were selected on the very metric whose association is asked, so the association among them
is not that of all runs: mostly it is smaller. Where each run finished with a known probability, weights of
one over the probability put that right. Without such a design there is no number for all runs, only what the
survivors show, bounds, and models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis import resample
from analysis.compare import Family, family
from analysis.correlate import NAMES
from analysis.resample import (
    DRAWS,
    ENOUGH_UNITS,
    RESOLUTION,
    Array,
    Draws,
    Estimate,
    Kernel,
    Labels,
    Permutation,
    Units,
    codes,
    count,
    dense_ranks,
    missing,
)

LEAST_EFFECTIVE = 10
"""Effective number of finals below which a weighted association gets a warning."""


@dataclass(frozen=True)
class PrunedAssociation:
    """What a study with stopped runs says about a metric: of all runs, or of its survivors only."""

    headline: Estimate
    """The weighted tau-b if the study recorded probabilities, else none, with the reason."""

    survivors: Estimate
    """Tau-b among runs with a final error, as if nothing had been stopped: conditional on survival."""

    weighted: Mapping[str, Estimate]
    """By inverse probabilities: `tau_b`, `spearman`, `pearson`; empty without a design."""

    audit: Estimate
    """Tau-b, unweighted, among the uniformly drawn runs that were exempt from stopping."""

    effective_n: float | None
    """Finals that would be as informative if all had the same weight: (sum w)^2 / sum w^2."""

    bounds: tuple[float, float] | None
    """Least and greatest tau-b that any final errors of the stopped runs could give."""

    model: Estimate
    """Tau-b by a bivariate normal model of metric and error, which no data can confirm."""

    n_total: int
    n_used: int
    n_stopped: int
    """Runs with the metric that were stopped, so without a final error."""

    n_failed: int
    """Runs that failed: missing for another reason, neither bounded nor modelled."""

    n_no_metric: int
    restriction: str | None


def association(
    metric: ArrayLike,
    error: ArrayLike,
    *,
    probability: ArrayLike | None = None,
    audit: ArrayLike | None = None,
    failed: ArrayLike | None = None,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> PrunedAssociation:
    """Association over all runs of a study, one row each, in which some runs have no final error.

    Args:
        metric: of all runs, e.g. at the first rung; rows without it are counted and left out.
        error: final error, NaN for runs that were stopped or failed.
        probability: with which each run was to get its final error, recorded when that was decided: 1 for
            runs that no rule stopped, and see `completion_probability` for several rungs. None if nothing was
            recorded. It is needed where there is a final error.
        audit: whether the run is of a uniformly drawn set that no rule could stop.
        failed: whether the run failed (out of memory, diverged) or has not ended. Such runs are left out of
            everything but the counts: whether they may be is a question to `failure_dependence`.
        units, resolution, draws: as in `analysis.correlate.association`.

    Raises:
        ValueError: lengths differ, or a probability of a run with a final error is not in (0, 1].
    """
    x, y = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (metric, error))
    n_total = len(x)
    lost, exempt = (_flags(flags, n_total, name) for flags, name in ((failed, "failed"), (audit, "audit")))
    pi = None if probability is None else np.asarray(probability, dtype=np.float64).reshape(-1)
    for name, column in {"error": y, "probability": pi}.items():
        if column is not None and len(column) != n_total:
            raise ValueError(f"{name} has {len(column)} values for {n_total} rows; give one per row")
    labels = None if units is None else pd.Series(units, dtype=object).to_numpy()
    if labels is not None and len(labels) != n_total:
        raise ValueError(f"units has {len(labels)} labels for {n_total} rows; give one per row")
    keep = np.isfinite(x) & ~lost
    x, y, exempt = x[keep], y[keep], exempt[keep]
    pi = None if pi is None else pi[keep]
    labels = None if labels is None else labels[keep]
    final = np.isfinite(y)
    if pi is not None:
        _check_probabilities(pi, final)
        if (~final & (pi == 0)).any():
            pi = None  # those who had no chance to finish are stood for by nobody

    sample = _Sample(x, y, final, Units.of(len(x), labels), labels, resolution, draws)
    stopped = int((~final).sum())
    weighted: dict[str, Estimate] = {}
    effective = None
    if pi is not None:
        weights = np.zeros(len(x))
        weights[final] = 1 / pi[final]
        weighted = sample.weighted(weights)
        effective = float(weights.sum() ** 2 / (weights**2).sum()) if final.any() else None
    survivors = sample.among(final, f"{NAMES['tau_b']} among finished runs")
    if stopped:
        survivors = survivors.restricted("conditional on survival: not the association of all runs")
    if weighted:
        headline = weighted["tau_b"]
        if effective is not None and effective < LEAST_EFFECTIVE:
            headline = headline.restricted(f"{effective:.1f} effective runs: a few weights decide the number")
    elif stopped:
        why = "runs were stopped without recorded probabilities: no estimate for all runs"
        headline = missing(NAMES["tau_b"], why, int(final.sum()), survivors.n_units, draws.level)
    else:
        headline = survivors
    n_failed = int(lost.sum())
    notes = [
        f"{count(n_failed, 'failed run')} left out: check that failing does not depend on the config"
        if n_failed
        else "",
        "all runs were stopped" if len(x) and not final.any() else "",
    ]
    return PrunedAssociation(
        headline=headline,
        survivors=survivors,
        weighted=weighted,
        audit=sample.audited(exempt),
        effective_n=effective,
        bounds=tau_bounds(x, y, resolution) if len(x) > 1 else None,
        model=sample.modelled(),
        n_total=n_total,
        n_used=int(final.sum()),
        n_stopped=stopped,
        n_failed=n_failed,
        n_no_metric=n_total - len(x) - n_failed,
        restriction="; ".join(filter(None, notes)) or None,
    )


def weighted_tau(
    x: ArrayLike, y: ArrayLike, weights: ArrayLike, resolution: float = RESOLUTION
) -> float | None:
    """Tau-b in which each pair counts the product of its weights; None if one side has no untied pair.

    With equal weights it is tau-b, and multiplying all weights changes nothing.
    """
    a, b, w = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (x, y, weights))
    if not len(a) == len(b) == len(w):
        raise ValueError(
            f"lengths {len(a)}, {len(b)} and {len(w)} differ; give one weight per pair of values"
        )
    if not np.isfinite([a, b, w]).all() or (w < 0).any():
        raise ValueError("x, y and weights must be finite, and weights not negative; leave missing rows out")
    if not len(a):
        return None
    kernel = resample.tau_kernel(dense_ranks(a, resolution), dense_ranks(b, resolution), w)
    value = float(kernel(np.ones((1, len(a))))[0])
    return value if math.isfinite(value) else None


def completion_probability(conditional: ArrayLike) -> Array:
    """Probability of a final error from those at each rung, (runs, rungs): their product.

    A rung whose rule did not stop the run, or that it was exempt from, counts 1; a run stopped before a rung
    was never decided on there, so its later entries may be NaN.
    """
    table = np.asarray(conditional, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(
            f"conditional has {table.ndim} dimensions; give one row per run, one column per rung"
        )
    wrong = (table <= 0) | (table > 1)
    if wrong.any():
        raise ValueError(
            f"probability {table[wrong][0]} must lie in (0, 1]; runs that cannot finish have none"
        )
    product: Array = np.nanprod(table, axis=1)
    return product


def tau_bounds(x: ArrayLike, y: ArrayLike, resolution: float = RESOLUTION) -> tuple[float, float] | None:
    """Least and greatest tau-b over all final errors, none tied, that rows without one (NaN) could have.

    Each missing error is put where it agrees, or disagrees, most with the known ones; as a larger x never
    asks for a smaller place, all missing ones can at once agree, or disagree, with each other, too.
    """
    a, b = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (x, y))
    known = np.isfinite(b)
    order = np.argsort(b[known], kind="stable")
    ranks = dense_ranks(a, resolution)
    known_x, known_y = ranks[known][order], dense_ranks(b[known][order], resolution)
    unknown = np.sort(ranks[~known])
    # A missing error can go before the first known one, after the last, or between two that differ.
    steps = np.diff(known_y, prepend=-1) != 0
    places = np.append(np.flatnonzero(steps), len(known_y))
    score = 0.0
    if len(known_x):
        score = float(resample.pair_kernel(known_x, known_y)(np.ones((1, len(known_x))))[0][0])
    sign = np.sign(unknown[:, None] - known_x)
    upto = np.concatenate([np.zeros((len(unknown), 1)), np.cumsum(sign, axis=1)], axis=1)
    gains = 2 * upto[:, places] - upto[:, -1:]
    among = (len(unknown) ** 2 - int((np.bincount(unknown) ** 2).sum() if len(unknown) else 0)) / 2
    ends = []
    for side in (-1, 1):
        gain = side * (float((side * gains).max(axis=1).sum()) + among)
        untied_x = (len(ranks) ** 2 - int((np.bincount(ranks) ** 2).sum())) / 2
        tied_y = int((np.bincount(known_y) ** 2).sum()) if len(known_y) else 0
        untied_y = (len(ranks) ** 2 - tied_y - len(unknown)) / 2
        if min(untied_x, untied_y) <= 0:
            return None
        ends.append((score + gain) / math.sqrt(untied_x * untied_y))
    return ends[0], ends[1]


def failure_dependence(
    failed: ArrayLike, config: Mapping[str, Labels], *, draws: Draws = DRAWS
) -> tuple[Mapping[str, Permutation], Family]:
    """Tests by field of the config that failing depends on it: chi-squared by permutation, and Holm's family.

    Fields with a single value are not tested, and say so.
    """
    flags = np.asarray(failed, dtype=np.bool_).reshape(-1)
    tests = {name: _depends(flags, codes(labels, len(flags), name), draws) for name, labels in config.items()}
    return tests, family({name: test.p for name, test in tests.items()}, "primary")


def _depends(failed: NDArray[np.bool_], level: NDArray[np.intp], draws: Draws) -> Permutation:
    n = len(failed)
    sizes = np.bincount(level)
    if len(sizes) < 2 or failed.all() or not failed.any():
        why = "one value only" if len(sizes) < 2 else "all runs failed" if failed.any() else "no run failed"
        return Permutation(None, 0, False, n, why)
    total = draws.permutations or resample.PERMUTATIONS
    # Under permutation the number failed at each value is multivariate hypergeometric.
    drawn = np.random.default_rng(draws.seed).multivariate_hypergeometric(
        sizes, int(failed.sum()), total, method="marginals"
    )
    expected = sizes * failed.mean()
    found = ((np.bincount(level, failed) - expected) ** 2 / sizes).sum()
    reached = int((((drawn - expected) ** 2 / sizes).sum(axis=1) >= found - 1e-9).sum())
    return Permutation((reached + 1) / (total + 1), total, False, n)


@dataclass(frozen=True, eq=False)
class _Sample:
    """Runs with the metric that did not fail, and how they are resampled."""

    x: Array
    y: Array
    final: NDArray[np.bool_]
    units: Units
    labels: NDArray[np.generic] | None
    resolution: float
    draws: Draws

    def weighted(self, weights: Array) -> dict[str, Estimate]:
        """Estimates by weights, 0 without a final error; all runs are resampled."""
        ranks = dense_ranks(self.x, self.resolution)
        filled = np.where(self.final, self.y, 0.0)
        errors = dense_ranks(filled, RESOLUTION)
        kernels = {
            "tau_b": resample.tau_kernel(ranks, errors, weights),
            "spearman": resample.spearman_kernel(ranks, errors, weights),
            "pearson": resample.pearson_kernel(self.x, filled, weights),
        }
        return {
            kind: self._estimate(kernel, f"{NAMES[kind]} weighted by inverse probability", self.final)
            for kind, kernel in kernels.items()
        }

    def among(self, chosen: NDArray[np.bool_], name: str) -> Estimate:
        """Tau-b of the chosen runs, which have a final error."""
        a = dense_ranks(self.x[chosen], self.resolution)
        b = dense_ranks(self.y[chosen], RESOLUTION)
        units = Units.of(len(a), None if self.labels is None else self.labels[chosen])
        if len(units) < 3:
            few = f"{count(len(units), 'independent unit')} with a final error: no association"
            return missing(name, few, len(a), len(units), self.draws.level)
        return resample.estimate(resample.tau_kernel(a, b), units, name, self.draws)

    def audited(self, exempt: NDArray[np.bool_]) -> Estimate:
        """Tau-b of the audit subset, if there is one, and all of it finished."""
        name = f"{NAMES['tau_b']} of the audit subset"
        if not exempt.any():
            return missing(name, "no audit subset", level=self.draws.level)
        found = self.among(exempt & self.final, name)
        open_ones = int((exempt & ~self.final).sum())
        why = f"{count(open_ones, 'run')} of the audit subset without a final error" if open_ones else None
        return found.restricted(why)

    def modelled(self) -> Estimate:
        """Tau-b if metric and error were bivariate normal, and only the metric decided who was stopped.

        The line of error on metric and the spread around it are then the same among survivors; the spread of
        the metric is known from all runs.
        """
        name = f"{NAMES['tau_b']}, model-based (bivariate normal, stopped by the metric)"
        if self.final.all():
            return missing(name, "no run was stopped: nothing to model", len(self.x), len(self.units))
        filled = np.where(self.final, self.y, 0.0)
        correlation = resample.pearson_kernel(self.x, filled, self.final.astype(np.float64))
        a = resample.standardised(self.x)
        moments = np.stack([np.ones_like(a), a, a * a], axis=1)

        def variance(weights: Array) -> Array:
            total, first, second = (weights @ moments).T
            return resample.ratio(second, total) - resample.ratio(first, total) ** 2

        def kernel(weights: Array) -> Array:
            r = correlation(weights)
            ratio = resample.ratio(variance(weights), variance(weights * self.final))
            full = r * np.sqrt(ratio / (1 + r**2 * (ratio - 1)))
            return 2 / math.pi * np.arcsin(np.clip(full, -1, 1))

        return self._estimate(kernel, name, self.final)

    def _estimate(self, kernel: Kernel, name: str, chosen: NDArray[np.bool_]) -> Estimate:
        """Estimate from resamples of all runs, counting those that have a final error."""
        finals = len(np.unique(self.units.of_row[chosen]))
        if finals < ENOUGH_UNITS:
            few = f"{count(finals, 'independent unit')} with a final error, fewer than {ENOUGH_UNITS}"
            return missing(name, few, int(chosen.sum()), finals, self.draws.level)
        found = resample.estimate(kernel, self.units, name, self.draws)
        return Estimate(
            found.value,
            found.low,
            found.high,
            int(chosen.sum()),
            finals,
            found.method,
            found.level,
            found.restriction,
        )


def _check_probabilities(pi: Array, final: NDArray[np.bool_]) -> None:
    wrong = final & ~((pi > 0) & (pi <= 1))
    if wrong.any():
        raise ValueError(
            f"probability={pi[wrong][0]} of a run with a final error must lie in (0, 1]; it is the one with "
            "which the run was to finish, 1 where no rule stopped it"
        )
    if (~final & (pi == 1)).any():
        raise ValueError(
            "a run without a final error has probability 1, so it should have one; mark it as failed, or "
            "give the probability with which it was to finish"
        )


def _flags(values: ArrayLike | None, n: int, name: str) -> NDArray[np.bool_]:
    flags = np.zeros(n, dtype=np.bool_) if values is None else np.asarray(values, dtype=np.bool_).reshape(-1)
    if len(flags) != n:
        raise ValueError(f"{name} has {len(flags)} values for {n} rows; give one per row")
    return flags
