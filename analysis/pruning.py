"""Association between metric and final error when some runs were stopped early and have no final error.

Those that finished were selected on the very metric whose association is asked, so the association among them
is not that of all runs: mostly it is smaller. Where each run finished with a known probability, weights of
one over the probability put that right. Without such a design there is no number for all runs, only what the
survivors show, bounds, and models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis import resample
from analysis.compare import Family, family
from analysis.correlate import ACROSS, NAMES
from analysis.resample import (
    DRAWS,
    ENOUGH_UNITS,
    RESOLUTION,
    Array,
    Draws,
    Estimate,
    Indices,
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

LEAST_STOOD_FOR = 0.75
"""Sum of weights, in shares of the runs that it should add up to, below which there is a warning, too."""


@dataclass(frozen=True)
class PrunedAssociation:
    """What a study with stopped runs says about a metric: of all runs, or of its survivors only."""

    headline: Estimate
    """The weighted tau-b if the study recorded probabilities, else none, with the reason."""

    test: Permutation
    """Of the weighted tau-b against no association; without weights there is none here."""

    survivors: Estimate
    """Tau-b among runs with a final error, as if nothing had been stopped: conditional on survival."""

    weighted: Mapping[str, Estimate]
    """By inverse probabilities: `tau_b`, `spearman`, `pearson`; empty without a design."""

    audit: Estimate
    """Tau-b, unweighted, among the uniformly drawn runs that were exempt from stopping."""

    effective_n: float | None
    """Of the finals, see `effective_n`."""

    bounds: tuple[float, float] | None
    """Least and greatest tau-b that any final errors of the stopped runs, none tied, could give.

    None where a run was stopped before it had the metric.
    """

    model: Estimate
    """Tau-b by a bivariate normal model of metric and error, which no data can confirm."""

    n_total: int
    n_used: int
    n_stopped: int
    """Runs that were stopped, so without a final error."""

    n_unseen: int
    """Those of them that were stopped before they had the metric."""

    n_failed: int
    """Runs that failed: missing for another reason, neither bounded nor modelled."""

    n_no_metric: int
    """Runs without the metric that neither failed nor were stopped."""

    restriction: str | None


@dataclass(frozen=True)
class Weighted:
    """Tau-b weighted by inverse probabilities, and its test."""

    estimate: Estimate
    test: Permutation


def inverse_probability(probability: ArrayLike, error: ArrayLike) -> Array | None:
    """Weight of each run: one over the probability with which it was to get its final error, 0 without one.

    None where a run without a final error had no chance to get one, or none that is known: nobody stands for
    such runs. Leave failed runs out beforehand.

    Raises:
        ValueError: lengths differ; a probability of a run with a final error is not in (0, 1]; or one without
            has a probability that is not in [0, 1), known as it is.
    """
    pi, y = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (probability, error))
    if len(pi) != len(y):
        raise ValueError(f"probability has {len(pi)} values for {len(y)} rows; give one per row")
    final = np.isfinite(y)
    _check_probabilities(pi, final)
    if not (pi[~final] > 0).all():
        return None
    return np.where(final, 1 / pi, 0.0)


def weighted_within(
    metric: ArrayLike,
    error: ArrayLike,
    probability: ArrayLike,
    groups: Labels,
    *,
    failed: ArrayLike | None = None,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Weighted:
    """Tau-b within groups, e.g. arms of a sweep, of all runs of a study in which some have no final error.

    Runs with the metric are resampled, within groups that have enough units; the test exchanges finals
    within their group. Groups of one final say nothing and change nothing.

    Args:
        metric, error, probability, failed: as in `association`.
        groups: of the rows; pairs of different groups do not count.
        units: as in `association`; the test needs units that lie in one group each.
        resolution, draws: as in `association`.

    Raises:
        ValueError: as in `association`, or a row has no group.
    """
    x, y = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (metric, error))
    n = len(x)
    kept = ~_flags(failed, n, "failed")
    pi = _column(probability, "probability", n).astype(np.float64)
    group, labels = _column(groups, "groups", n), None if units is None else _column(units, "units", n)
    found = inverse_probability(pi[kept], _column(y, "error", n)[kept])
    if found is None:
        why = "a run without a final error had no known chance of one: no estimate for all runs"
        none = missing(NAMES["tau_b"], why, level=draws.level)
        return Weighted(none, Permutation(None, 0, False, 0, why))
    weights = np.zeros(n)
    weights[kept] = found
    kept &= np.isfinite(x)
    sample = _Sample.of(x, y, kept, labels, resolution, draws)
    return sample.weighted_tau(weights[kept], codes(group[kept], int(kept.sum()), "groups"))


def association(
    metric: ArrayLike,
    error: ArrayLike,
    *,
    probability: ArrayLike | None = None,
    stopped: ArrayLike | None = None,
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
            runs that no rule stopped, the product over rungs where there are several. None if nothing was
            recorded. It is needed where there is a final error; of a stopped run, one that is 0 or not known
            means that the study has no such design.
        stopped: whether a rule stopped the run. Runs with the metric and without a final error that did not
            fail count as stopped anyway; this tells of those that were stopped before they had the metric.
        audit: whether the run is of a uniformly drawn set that no rule could stop.
        failed: whether the run failed (out of memory, diverged) or has not ended. Such runs are left out of
            everything but the counts: whether they may be is a question to `failure_dependence`.
        units, resolution, draws: as in `analysis.correlate.association`.

    Raises:
        ValueError: lengths differ, or a probability of a run with a final error is not in (0, 1].
    """
    x, y = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (metric, error))
    n_total = len(x)
    lost, exempt, ended = (
        _flags(flags, n_total, name)
        for flags, name in ((failed, "failed"), (audit, "audit"), (stopped, "stopped"))
    )
    _column(y, "error", n_total)
    labels = None if units is None else _column(units, "units", n_total)
    has = np.isfinite(x)
    keep = has & ~lost
    unfinished = ~np.isfinite(y) & ~lost & (has | ended)
    unseen = int((unfinished & ~has).sum())
    weights = None
    if probability is not None:
        counted = keep | unfinished
        pi = _column(probability, "probability", n_total).astype(np.float64)
        weights = inverse_probability(pi[counted], y[counted])
        weights = None if weights is None else weights[keep[counted]]
    sample = _Sample.of(x, y, keep, labels, resolution, draws)
    final, n_stopped, n_failed = sample.final, int(unfinished.sum()), int(lost.sum())
    weighted: dict[str, Estimate] = {}
    effective = None
    test = Permutation(None, 0, False, len(sample.units), "no weights: no test of all runs")
    if weights is not None:
        found = sample.weighted_tau(weights)
        weighted, test = {"tau_b": found.estimate, **sample.weighted_others(weights)}, found.test
        effective = effective_n(weights)
    survivors = sample.among(final, f"{NAMES['tau_b']} among finished runs")
    if n_stopped:
        survivors = survivors.restricted("conditional on survival: not the association of all runs")
    if weighted:
        headline = weighted["tau_b"]
    elif n_stopped:
        why = "runs were stopped without recorded probabilities: no estimate for all runs"
        headline = missing(NAMES["tau_b"], why, int(final.sum()), survivors.n_units, draws.level)
    else:
        headline = survivors
    notes = [
        f"{count(n_failed, 'failed run')} left out: check that failing does not depend on the config"
        if n_failed
        else "",
        f"{count(unseen, 'run')} stopped before the metric was measured" if unseen else "",
        "all runs were stopped" if n_stopped and not np.isfinite(y).any() else "",
    ]
    return PrunedAssociation(
        headline=headline,
        test=test,
        survivors=survivors,
        weighted=weighted,
        audit=sample.audited(exempt[keep]),
        effective_n=effective,
        bounds=tau_bounds(x[keep], y[keep], resolution) if keep.sum() > 1 and not unseen else None,
        model=sample.modelled(unseen),
        n_total=n_total,
        n_used=int(final.sum()),
        n_stopped=n_stopped,
        n_unseen=unseen,
        n_failed=n_failed,
        n_no_metric=n_total - int(keep.sum()) - n_failed - unseen,
        restriction="; ".join(filter(None, notes)) or None,
    )


def effective_n(weights: Array) -> float | None:
    """Runs that would be as informative if all had the same weight: (sum w)^2 / sum w^2; None without any."""
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else None


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

    @classmethod
    def of(
        cls,
        x: Array,
        y: Array,
        keep: NDArray[np.bool_],
        labels: NDArray[np.generic] | None,
        resolution: float,
        draws: Draws,
    ) -> "_Sample":
        """The rows kept of all."""
        own = None if labels is None else labels[keep]
        final = np.isfinite(y[keep])
        return cls(x[keep], y[keep], final, Units.of(len(final), own), own, resolution, draws)

    def weighted_tau(self, weights: Array, group: Indices | None = None) -> Weighted:
        """Weighted tau-b, within groups if there are any, and its test; without final error weights are 0."""
        within = "" if group is None else " within groups"
        name = f"{NAMES['tau_b']}{within} weighted by inverse probability"
        x, y = dense_ranks(self.x, self.resolution), dense_ranks(self._filled, RESOLUTION)
        of_row = np.zeros(len(x), dtype=np.intp) if group is None else group
        rows = [np.flatnonzero(of_row == label) for label in np.unique(of_row)]
        kernel = (
            resample.tau_kernel(x, y, weights)
            if group is None
            else resample.within_tau_kernel(x, y, rows, weights)
        )
        found = self._estimate(kernel, name, self.final, self.units.drawn_within(of_row))
        size = effective_n(weights)
        if found.value is not None and size is not None and size < LEAST_EFFECTIVE:
            few = f"{size:.1f} effective runs: a few weights decide the number, its interval is too narrow"
            found = found.restricted(few)
        stood_for = float(weights.sum()) / max(len(weights), 1)
        if found.value is not None and stood_for < LEAST_STOOD_FOR:
            # By bad luck nobody went on of a kind that few were let go on of: weights seem even, and are not.
            part = f"the finals stand for {100 * stood_for:.0f} % of the runs: some kinds of them have none"
            found = found.restricted(f"{part}, so the number leans to those that have")
        chosen = np.flatnonzero(self.final)
        own = Units.of(len(chosen), self.units.of_row[chosen])
        strata = own.nested(of_row[chosen])
        if found.value is None or strata is None:
            why = found.restriction if found.value is None else ACROSS
            return Weighted(found, Permutation(None, 0, False, len(own), why))
        test = resample.permute_weighted(x[chosen], y[chosen], weights[chosen], strata, self.draws)
        return Weighted(found, test)

    def weighted_others(self, weights: Array) -> dict[str, Estimate]:
        """Weighted Spearman and Pearson correlations."""
        ranks = dense_ranks(self.x, self.resolution), dense_ranks(self._filled, RESOLUTION)
        kernels = {
            "spearman": resample.spearman_kernel(*ranks, weights),
            "pearson": resample.pearson_kernel(self.x, self._filled, weights),
        }
        return {
            kind: self._estimate(kernel, f"{NAMES[kind]} weighted by inverse probability", self.final)
            for kind, kernel in kernels.items()
        }

    @property
    def _filled(self) -> Array:
        return np.where(self.final, self.y, 0.0)

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

    def modelled(self, unseen: int) -> Estimate:
        """Tau-b if metric and error were bivariate normal, and only the metric decided who was stopped.

        The line of error on metric and the spread around it are then the same among survivors; the spread of
        the metric is known from all runs.
        """
        name = f"{NAMES['tau_b']}, model-based (bivariate normal, stopped by the metric)"
        if self.final.all():
            why = "no run with the metric was stopped: nothing to model"
            return missing(name, why, len(self.x), len(self.units), self.draws.level)
        if unseen:
            why = "runs were stopped before the metric was measured: its spread in all runs is not known"
            return missing(name, why, len(self.x), len(self.units), self.draws.level)
        correlation = resample.pearson_kernel(self.x, self._filled, self.final.astype(np.float64))
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

    def _estimate(
        self, kernel: Kernel, name: str, chosen: NDArray[np.bool_], drawn: Units | None = None
    ) -> Estimate:
        """Estimate from resamples of all runs, counting those that have a final error."""
        finals = len(np.unique(self.units.of_row[chosen]))
        if finals < ENOUGH_UNITS:
            few = f"{count(finals, 'independent unit')} with a final error, fewer than {ENOUGH_UNITS}"
            return missing(name, few, int(chosen.sum()), finals, self.draws.level)
        found = resample.estimate(kernel, drawn or self.units, name, self.draws)
        return replace(found, n=int(chosen.sum()), n_units=finals)


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
    wrong = ~final & ((pi < 0) | (pi > 1)) & np.isfinite(pi)
    if wrong.any():
        raise ValueError(
            f"probability={pi[wrong][0]} of a stopped run must lie in [0, 1), or be NaN if unknown"
        )


def _column(values: Any, name: str, n: int) -> NDArray[Any]:
    """Values as they are, one per row."""
    column: NDArray[Any] = np.asarray(pd.Series(values).to_numpy())
    if len(column) != n:
        raise ValueError(f"{name} has {len(column)} values for {n} rows; give one per row")
    return column


def _flags(values: ArrayLike | None, n: int, name: str) -> NDArray[np.bool_]:
    flags = np.zeros(n, dtype=np.bool_) if values is None else np.asarray(values, dtype=np.bool_).reshape(-1)
    if len(flags) != n:
        raise ValueError(f"{name} has {len(flags)} values for {n} rows; give one per row")
    return flags
