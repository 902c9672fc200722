"""Association between a search metric and the final error: over which runs, with which interval, within what.

Everything here correlates with *error*: a positive association says that a higher metric goes with a higher
error. Absolute values are never taken; they would make a metric that is always wrong look good.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from analysis import resample
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

Kind = Literal["tau_b", "spearman", "pearson"]

NAMES: Mapping[str, str] = {
    "tau_b": "Kendall's tau-b",
    "spearman": "Spearman's rho",
    "pearson": "Pearson's r",
}

ACROSS = "units lie in several groups: no permutation within them"
"""Why a sample in groups has no test."""

_FEWEST = 3
"""Independent units below which an association is no number worth printing."""

_FEW_STEPS = 100


# Coefficients


def tau_b(x: ArrayLike, y: ArrayLike, resolution: float = RESOLUTION) -> float | None:
    """Kendall's tau-b of complete pairs; None where one side has no two different values.

    Source: Kendall (1945), (C - D) / sqrt((n0 - n1) (n0 - n2)); n1 and n2 count the pairs tied in x and in y.
    """
    a, b = _complete(x, y)
    if not len(a):
        return None
    value = float(stats.kendalltau(dense_ranks(a, resolution), dense_ranks(b, resolution)).statistic)
    return value if math.isfinite(value) else None


def spearman(x: ArrayLike, y: ArrayLike, resolution: float = RESOLUTION) -> float | None:
    """Spearman's rank correlation of complete pairs; None where one side has no two different values."""
    a, b = _complete(x, y)
    return _point(resample.spearman_kernel(dense_ranks(a, resolution), dense_ranks(b, resolution)), len(a))


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation of complete pairs; None where one side has no two different values."""
    a, b = _complete(x, y)
    return _point(resample.pearson_kernel(a, b), len(a))


def bonett_wright(rho: float, n: int, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of Spearman's rho by Fisher's z, to check a bootstrap by; None below 4 pairs or at rho = +-1.

    Source: Bonett & Wright (2000), standard error sqrt((1 + rho^2 / 2) / (n - 3)) of atanh(rho).
    """
    resample.check_level(level)
    if n < 4 or abs(rho) >= 1:
        return None
    margin = float(special.ndtri((1 + level) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - margin), math.tanh(math.atanh(rho) + margin)


def unrestricted(r: float, spread_ratio: float) -> float:
    """Pearson's r as it would be in all runs, from that of runs selected on x; a model, not an observation.

    Args:
        r: correlation among the selected runs.
        spread_ratio: standard deviation of x in all runs over that in the selected ones.

    Source: Thorndike (1949), case 2; holds where y is linear in x with equal spread around the line.
    """
    if not -1 <= r <= 1 or not 0 < spread_ratio < math.inf:
        raise ValueError(f"r={r} must lie in [-1, 1], and spread_ratio={spread_ratio} be positive")
    return r * spread_ratio / math.sqrt(1 + r**2 * (spread_ratio**2 - 1))


# One metric


@dataclass(frozen=True)
class Association:
    """How a search metric goes with the final error, over the rows that have both."""

    tau_b: Estimate
    """The headline."""

    spearman: Estimate
    pearson: Estimate
    test: Permutation
    """Of tau-b against no association."""

    n_total: int
    n_used: int
    n_unique: int
    """Independent units among the rows used, e.g. different architectures."""

    n_no_metric: int
    n_no_error: int
    """Rows left out, by what is missing or not finite; a row without either counts as without metric."""

    restriction: str | None

    @property
    def words(self) -> str:
        """The direction in words."""
        return direction(self.tau_b)


def association(
    metric: ArrayLike,
    error: ArrayLike,
    *,
    units: Labels = None,
    resolution: float = RESOLUTION,
    error_resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Association:
    """Association of a metric with the final error over all rows that have both.

    Args:
        metric, error: one value per row; NaN and infinite values are counted and left out.
        units: label of the independent unit of each row: its search run, or its genotype where several runs
            found the same; without it every row is one.
        resolution: of the metric; closer values are equal.
        error_resolution: of the error; 0.001, of fractions, gives the sparse tau of Yu et al. (2020).
        draws: of the intervals and of the test.

    Raises:
        ValueError: lengths differ, or a unit has no label.
    """
    x, y, used, counts = _usable(metric, error)
    unit = _units(units, used)
    a, b = dense_ranks(x, resolution), dense_ranks(y, error_resolution)
    kernels = {
        "tau_b": resample.tau_kernel(a, b),
        "spearman": resample.spearman_kernel(a, b),
        "pearson": resample.pearson_kernel(x, y),
    }
    found = {kind: _estimate(kernel, unit, NAMES[kind], draws) for kind, kernel in kernels.items()}
    if found["tau_b"].value is None:
        test = Permutation(None, 0, False, len(unit), found["tau_b"].restriction)
    else:
        steps = np.stack([a, b]).astype(np.float64)
        (test,) = resample.permute_association(steps[0][:, None], steps[1], unit, resolution=1, draws=draws)
    notes = [
        f"{count(counts[1], 'row')} without the metric left out" if counts[1] else "",
        f"{count(counts[2], 'row')} without a final error left out: conditional on having one"
        if counts[2]
        else "",
        _coarse(x, resolution),
    ]
    return Association(
        **found,
        test=test,
        n_total=counts[0],
        n_used=len(x),
        n_unique=len(unit),
        n_no_metric=counts[1],
        n_no_error=counts[2],
        restriction="; ".join(filter(None, notes)) or None,
    )


def direction(found: Estimate) -> str:
    """Association in words, undecided where the interval holds 0 or is missing."""
    if found.value is None:
        return "association not known"
    if not _decided(found):
        return "direction undecided"
    return f"higher metric ↔ {'higher' if found.value > 0 else 'lower'} error"


def compare_metrics(
    first: ArrayLike,
    second: ArrayLike,
    error: ArrayLike,
    *,
    kind: Kind = "tau_b",
    groups: Labels = None,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Estimate:
    """How much higher the association of the first metric with the error is than that of the second.

    Both are taken over the rows that have all three values, and resampled together: two intervals or p-values
    side by side do not answer this. If one metric should rise with the error and the other fall, turn one
    round first. With `groups`, e.g. settings of a sweep, both associations are those within them, as in
    `by_group`; of tau-b only.

    Raises:
        ValueError: lengths differ, or groups with another kind than tau-b.
    """
    _check_groups(groups, kind)
    table = _columns(first=first, second=second, error=error)
    used = _finite(table)
    a, b, y = table[used].T
    unit = _units(units, used)
    name = f"difference in {NAMES[kind]} on the same rows"
    if groups is None:
        one, two = (_kernel(kind, side, y, resolution) for side in (a, b))
    else:
        group, _ = _groups(groups, used)
        rows, errors = _members(group), dense_ranks(y, RESOLUTION)
        one, two = (
            resample.within_tau_kernel(dense_ranks(side, resolution), errors, rows) for side in (a, b)
        )
        unit, name = unit.drawn_within(group), f"{name}, within groups"

    def kernel(weights: Array) -> Array:
        return one(weights) - two(weights)

    found = _estimate(kernel, unit, name, draws)
    left_out = int((~used).sum())
    return found.restricted(f"{count(left_out, 'row')} with a missing value left out" if left_out else None)


# Many epochs


@dataclass(frozen=True)
class EpochAssociation:
    """Association of a metric at one epoch with the final error."""

    epoch: object
    at_risk: int
    """Rows that have the metric at this epoch."""

    estimate: Estimate
    """Over those of them that have a final error; weighted, over all of them."""


def over_epochs(
    curves: pd.DataFrame,
    error: ArrayLike,
    *,
    kind: Kind = "tau_b",
    groups: Labels = None,
    weights: ArrayLike | None = None,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> tuple[EpochAssociation, ...]:
    """Association at each epoch, a column of `curves`, with the number of rows that got there.

    Where rows at risk have no final error and no weights stand for them, the estimate says how many: it is
    conditional on survival.

    Args:
        curves: of the metric, rows as in `error`; NaN where a run did not get to an epoch.
        error: final error, NaN where there is none.
        kind: of association.
        groups: settings of a sweep; the association is then that within them, as in `by_group`, and without
            them the pooled one. Of tau-b only.
        weights: of the rows with a final error, one over the probability with which they got it, from
            `analysis.pruning.inverse_probability`. All rows at risk are resampled.
        units, resolution, draws: as in `association`.

    Raises:
        ValueError: lengths differ, groups with another kind than tau-b, or a weight of a row with a final
            error is not positive.
    """
    _check_groups(groups, kind)
    y = np.asarray(error, dtype=np.float64).reshape(-1)
    final = np.isfinite(y)
    design = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if design is not None and (len(design) != len(y) or not (design[final] > 0).all()):
        raise ValueError("weights must be positive where there is a final error, and one per row")
    name = NAMES[kind] + (" within groups" if groups is not None else "")
    if design is not None:
        name += " weighted by inverse probability"
    found = []
    for epoch in curves.columns:
        x = curves[epoch].to_numpy(dtype=np.float64)
        _, _, complete, counts = _usable(x, y)
        at_risk = counts[0] - counts[1]
        used = complete if design is None else np.isfinite(x)
        a, b = x[used], np.where(final, y, 0.0)[used]
        own = None if design is None else np.where(final, design, 0.0)[used]
        unit = _units(units, used)
        if groups is None:
            kernel = _kernel(kind, a, b, resolution, own)
        else:
            group, _ = _groups(groups, used)
            ranks = dense_ranks(a, resolution), dense_ranks(b, RESOLUTION)
            kernel = resample.within_tau_kernel(*ranks, _members(group), own)
            unit = unit.drawn_within(group)
        finals = len(np.unique(unit.of_row[final[used]]))
        one = _estimate(kernel, unit, name, draws, finals)
        one = replace(one, n=int(complete.sum()), n_units=finals)
        lost = f"{counts[2]} of {at_risk} rows at risk have no final error, so survivors only"
        survivors = counts[2] and design is None
        found.append(EpochAssociation(epoch, at_risk, one.restricted(lost if survivors else None)))
    return tuple(found)


@dataclass(frozen=True)
class BestEpoch:
    """The epoch whose metric is most associated with the final error, tested as the best of all of them."""

    epoch: object
    value: float | None
    p: float | None
    """Probability of so strong an association at *any* of the epochs if there were none."""

    n: int
    n_epochs: int
    method: str
    restriction: str | None


def best_epoch(
    curves: pd.DataFrame,
    error: ArrayLike,
    *,
    kind: Kind = "tau_b",
    groups: Labels = None,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> BestEpoch:
    """The epoch, a column of `curves`, of strongest association, by the permutation of the largest statistic.

    Only rows with every epoch and the error are used, so that one permutation serves all epochs. With
    `groups`, e.g. settings of a sweep, the association is that within groups, and units are exchanged within
    their group; that needs units that lie in one group each, and tau-b.

    Raises:
        ValueError: lengths differ, or groups with another kind than tau-b.
    """
    _check_groups(groups, kind)
    table = np.column_stack([curves.to_numpy(dtype=np.float64), np.asarray(error, dtype=np.float64)])
    used = _finite(table)
    x, y = table[used, :-1], table[used, -1]
    unit = _units(units, used)
    left_out = f"{count(int((~used).sum()), 'row')} without some epoch or the error left out"
    restriction = left_out if not used.all() else None
    name = NAMES[kind] + (" within groups" if groups is not None else "")
    if len(unit) < _FEWEST or not x.shape[1]:
        few = f"{count(len(unit), 'independent unit')} with all epochs: no test"
        return BestEpoch(None, None, None, len(y), x.shape[1], "largest of all epochs", few)
    if kind != "pearson":  # each side by its own resolution
        x = np.stack([dense_ranks(column, resolution) for column in x.T], axis=1).astype(np.float64)
        y = dense_ranks(y, RESOLUTION).astype(np.float64)
    group = np.zeros(len(y), dtype=np.intp) if groups is None else _groups(groups, used)[0]
    rows = _members(group)
    if groups is None:
        values = [_point(_kernel(kind, column, y, 1), len(y)) for column in x.T]
    else:
        ranks = y.astype(np.intp)
        values = [
            _point(resample.within_tau_kernel(column.astype(np.intp), ranks, rows), len(y)) for column in x.T
        ]
    strengths = [-1.0 if value is None else abs(value) for value in values]
    best = int(np.argmax(strengths))
    if values[best] is None:
        restriction = "all values of the error, or of the metric at every epoch, are equal"
        return BestEpoch(None, None, None, len(y), x.shape[1], f"largest {name} of all epochs", restriction)
    total = draws.permutations or resample.permutations_for(len(y) * x.shape[1])
    strata = unit.nested(group)
    test = Permutation(None, 0, False, len(unit), ACROSS)
    if strata is not None:
        test = resample.permute_association(
            x, y, strata, kind=kind, resolution=1, draws=replace(draws, permutations=total)
        )[best]
    method = f"largest {name} of {count(x.shape[1], 'epoch')}; {test.method}"
    restriction = "; ".join(filter(None, [restriction, test.restriction])) or None
    return BestEpoch(curves.columns[best], values[best], test.p, len(y), x.shape[1], method, restriction)


# Other quantities held fixed


@dataclass(frozen=True)
class Partial:
    """An association as it is, and as it is among runs alike in the controls."""

    raw: Estimate
    partial: Estimate
    change: Estimate
    """Partial minus raw, resampled together."""

    controls: tuple[str, ...]

    @property
    def words(self) -> str:
        """What the controls do to the association, where the intervals decide it."""
        if not _decided(self.change):
            return "no change shown under control"
        if not _decided(self.raw) or self.raw.value is None or self.partial.value is None:
            return "suppression: the association shows under control only"
        if self.raw.value * self.partial.value < 0:
            return "the association turns under control"
        if (self.partial.value > self.raw.value) == (self.raw.value > 0):
            return "suppression: the association grows under control"
        return "the association shrinks under control: the metric is in part the controls in disguise"


def partial(
    metric: ArrayLike,
    error: ArrayLike,
    controls: Mapping[str, ArrayLike],
    *,
    kind: Literal["spearman", "pearson"] = "spearman",
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Partial:
    """Partial correlation of metric and error given controls such as parameters: that of the residuals.

    For Spearman's rho, residuals of ranks.

    Raises:
        ValueError: there is no control, or lengths differ.
    """
    if not controls:
        raise ValueError("controls is empty; name at least one quantity to hold fixed, e.g. params")
    table = _columns(metric=metric, error=error, **controls)
    used = _finite(table)
    columns = list(table[used].T)
    k = len(columns)
    pairs = {
        (i, j): _kernel(kind, columns[i], columns[j], RESOLUTION if i else resolution)
        for i in range(k)
        for j in range(i + 1, k)
    }

    def given(weights: Array) -> Array:
        matrix = np.tile(np.eye(k), (len(weights), 1, 1))
        for (i, j), kernel in pairs.items():
            matrix[:, i, j] = matrix[:, j, i] = kernel(weights)
        return _conditional(matrix)

    raw = pairs[0, 1]

    def change(weights: Array) -> Array:
        return given(weights) - raw(weights)

    unit = _units(units, used)
    left_out = int((~used).sum())
    restriction = f"{count(left_out, 'row')} with a missing value left out" if left_out else None
    named = f"{NAMES[kind]} given {', '.join(controls)}"
    found = [
        _estimate(kernel, unit, name, draws).restricted(restriction)
        for kernel, name in ((raw, NAMES[kind]), (given, named), (change, f"{named}, less without"))
    ]
    return Partial(found[0], found[1], found[2], tuple(controls))


def predictive_gain(
    metric: ArrayLike,
    error: ArrayLike,
    controls: Mapping[str, ArrayLike],
    *,
    units: Labels = None,
    folds: int = 10,
    draws: Draws = DRAWS,
) -> Estimate:
    """Out-of-sample R squared of a line in metric and controls, less that of a line in the controls alone.

    Units are divided into folds at random; each is predicted by lines fitted to the others. The interval
    resamples the units' squared errors, for the lines as they were fitted.
    """
    table = _columns(metric=metric, error=error, **controls)
    used = _finite(table)
    x, y, other = table[used, 0], table[used, 1], table[used, 2:]
    unit = _units(units, used)
    name = f"gain in R squared over {', '.join(controls) or 'the mean'}, {folds}-fold"
    if len(unit) < max(2 * folds, other.shape[1] + 4):
        few = f"{count(len(unit), 'independent unit')}, fewer than two a fold"
        return missing(name, few, len(y), len(unit), draws.level)
    fold = np.random.default_rng(draws.seed).permutation(np.arange(len(unit)) % folds)[unit.of_row]
    small = np.column_stack([np.ones(len(y)), *(resample.standardised(column) for column in other.T)])
    large = np.column_stack([small, resample.standardised(x)])
    loss = np.stack([_left_out(design, y, fold) for design in (small, large)])
    mean_loss = _left_out(np.ones((len(y), 1)), y, fold)

    def kernel(weights: Array) -> Array:
        return resample.ratio(weights @ (loss[0] - loss[1]), weights @ mean_loss)

    return _estimate(kernel, unit, name, draws)


def _left_out(design: Array, y: Array, fold: Indices) -> Array:
    """Squared error of each row, predicted by least squares on the other folds."""
    loss = np.empty(len(y))
    for number in range(int(fold.max()) + 1):
        test = fold == number
        weights = np.linalg.lstsq(design[~test], y[~test], rcond=None)[0]
        loss[test] = (y[test] - design[test] @ weights) ** 2
    return loss


def _conditional(matrix: Array) -> Array:
    """Correlation of the first two variables given the others, (draws,), from matrices (draws, k, k)."""
    controls = matrix[:, 2:, 2:]
    good = _finite(matrix.reshape(len(matrix), -1))
    good[good] &= np.linalg.eigvalsh(controls[good])[:, 0] > 1e-9
    rest = np.full((len(matrix), 2, 2), np.nan)
    cross = matrix[good, 2:, :2]
    rest[good] = matrix[good, :2, :2] - np.swapaxes(cross, 1, 2) @ np.linalg.solve(controls[good], cross)
    defined = good & (rest[:, 0, 0] > 1e-9) & (rest[:, 1, 1] > 1e-9)
    scale = np.sqrt(np.where(defined, rest[:, 0, 0] * rest[:, 1, 1], 1.0))
    return np.where(defined, np.clip(rest[:, 0, 1] / scale, -1, 1), np.nan)


# Groups


@dataclass(frozen=True)
class Heterogeneity:
    """Mean of the groups' associations, and how much they differ by more than chance."""

    mean: Estimate
    tau_squared: float | None
    """Variance between groups of Fisher's z."""

    i_squared: float | None
    """Share of the variance of the groups' z that is not chance."""

    p: float | None
    """Of Cochran's Q: that the groups have one common association."""


@dataclass(frozen=True)
class Grouped:
    """An association pooled over groups, e.g. settings of a sweep, within them and between them."""

    pooled: Estimate
    within: Estimate
    """Concordant less discordant pairs of the same group, over untied ones; the headline of a sweep."""

    between: Estimate
    """Of the groups' means."""

    groups: tuple[tuple[str, Estimate], ...]
    """Each group that has at least five independent units."""

    n_small: int
    """Groups that have fewer."""

    heterogeneity: Heterogeneity
    test: Permutation
    """Of the association within groups, units exchanged within their group."""

    simpson: str | None
    """Warning that pooled and within-group association disagree, or None."""

    n_total: int
    n_used: int

    @property
    def headline(self) -> Estimate:
        """The association within groups, or the pooled one if there is one group only."""
        return self.within if len(self.groups) + self.n_small > 1 else self.pooled


def by_group(
    metric: ArrayLike,
    error: ArrayLike,
    groups: Labels,
    *,
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> Grouped:
    """Kendall's tau-b pooled, in each group, within and between groups, with a warning where they disagree.

    A sweep of a setting makes an association between groups by itself: the setting moves metric and error.
    Rows without a group label form a group `(none)`. Units are resampled within groups if each lies in one
    group and each group has at least five, else over all rows.

    Source: for the mean of groups, DerSimonian & Laird (1986) on Fisher's z of tau, its variance
    0.437 / (n - 4) by Fieller, Hartley & Pearson (1957).
    """
    x, y, used, counts = _usable(metric, error)
    group, labels = _groups(groups, used)
    unit = _units(units, used)
    rows = _members(group)
    sizes = [len(np.unique(unit.of_row[members])) for members in rows]
    strata, drawn = unit.nested(group), unit.drawn_within(group)
    a, b = dense_ranks(x, resolution), dense_ranks(y, RESOLUTION)
    name = NAMES["tau_b"]
    pooled = _estimate(resample.tau_kernel(a, b), drawn, name, draws)
    within = _estimate(resample.within_tau_kernel(a, b, rows), drawn, f"{name} within groups", draws)
    between = _estimate(
        _between_kernel(x, y, rows, resolution), drawn, f"{name} of group means, groups as given", draws
    ).restricted(f"{count(len(rows), 'group')} only" if len(rows) < 5 else None)
    single = [
        (label, _estimate(resample.tau_kernel(a[m], b[m]), Units.of(len(m), unit.of_row[m]), name, draws))
        for label, m, size in zip(labels, rows, sizes, strict=True)
        if size >= ENOUGH_UNITS
    ]
    if len(rows) == 1:
        within = within.restricted("one group only: the same as pooled")
    if strata is None:
        test = Permutation(None, 0, False, len(unit), ACROSS)
    elif within.value is None:
        test = Permutation(None, 0, False, len(unit), within.restriction)
    else:
        (test,) = resample.permute_association(
            a[:, None].astype(np.float64),
            b.astype(np.float64),
            strata,
            resolution=1,
            draws=draws,
        )
    return Grouped(
        pooled,
        within,
        between,
        tuple(single),
        len(rows) - len(single),
        _heterogeneity([found for _, found in single], draws.level),
        test,
        _simpson(pooled, within) if len(rows) > 1 else None,
        counts[0],
        len(x),
    )


def apart(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals have nothing in common; False where one is missing."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


def _simpson(pooled: Estimate, within: Estimate) -> str | None:
    if pooled.value is None or within.value is None:
        return None
    both = f"tau-b is {pooled.value:+.3f} pooled and {within.value:+.3f} within groups"
    if pooled.value * within.value < 0:
        return f"Simpson warning: {both}; the signs differ, so the groups make the pooled association"
    ends = pooled.low, pooled.high, within.low, within.high
    if None not in ends and (ends[0] > ends[3] or ends[1] < ends[2]):  # type: ignore[operator]
        return f"Simpson warning: {both}; the intervals do not overlap, so the groups make part of it"
    return None


def _between_kernel(x: Array, y: Array, rows: Sequence[Indices], resolution: float) -> Kernel:
    """Tau-b of the groups' means; groups that a draw leaves empty do not count in it."""
    member = np.zeros((len(x), len(rows)))
    for index, members in enumerate(rows):
        member[members, index] = 1

    def kernel(weights: Array) -> Array:
        sizes = weights @ member
        # Exact rounding of means of ties: to the resolution, which is far above the error of the sums.
        a, b = (
            np.rint(resample.ratio(weights @ (member * side[:, None]), sizes) / step)
            for side, step in ((x, resolution), (y, RESOLUTION))
        )
        same, untied_a, untied_b = np.zeros((3, len(weights)))
        for i in range(len(rows)):
            for j in range(i + 1, len(rows)):
                present = (sizes[:, i] > 0) & (sizes[:, j] > 0)
                in_a = np.sign(np.where(present, a[:, i] - a[:, j], 0))
                in_b = np.sign(np.where(present, b[:, i] - b[:, j], 0))
                same += in_a * in_b
                untied_a += in_a != 0
                untied_b += in_b != 0
        return resample.ratio(same, np.sqrt(untied_a * untied_b))

    return kernel


def _heterogeneity(found: Sequence[Estimate], level: float) -> Heterogeneity:
    name = "random-effects mean of Fisher's z (DerSimonian-Laird)"
    usable = [one for one in found if one.value is not None]
    n, n_units = sum(one.n for one in usable), sum(one.n_units for one in usable)
    if len(usable) < 2:
        few = f"{count(len(usable), 'group')} with at least {ENOUGH_UNITS} units: no mean of groups"
        return Heterogeneity(missing(name, few, n, n_units, level), None, None, None)
    # A perfect association has no finite z; half a discordant pair is taken from it.
    limits = [1 - 2 / (one.n * (one.n - 1)) for one in usable]
    z = np.arctanh([float(np.clip(one.value, -m, m)) for one, m in zip(usable, limits, strict=True)])  # type: ignore[arg-type]
    variances = np.array([0.437 / max(one.n_units - 4, 1) for one in usable])
    return _random_effects(z, variances, name, n, n_units, level)


def _random_effects(
    z: Array, variances: Array, name: str, n: int, n_units: int, level: float
) -> Heterogeneity:
    weights = 1 / variances
    fixed = float((weights * z).sum() / weights.sum())
    q, df = float((weights * (z - fixed) ** 2).sum()), len(z) - 1
    spread = max(0.0, (q - df) / float(weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (variances + spread)
    mean = float((weights * z).sum() / weights.sum())
    margin = float(special.ndtri((1 + level) / 2)) / math.sqrt(float(weights.sum()))
    method = f"{name}, {count(len(z), 'group')}, normal interval"
    found = Estimate(
        math.tanh(mean), math.tanh(mean - margin), math.tanh(mean + margin), n, n_units, method, level
    )
    i_squared = max(0.0, (q - df) / q) if q > 0 else 0.0
    return Heterogeneity(found, spread, i_squared, float(stats.chi2.sf(q, df)))


# The best runs only


def in_the_best(
    metric: ArrayLike,
    error: ArrayLike,
    selector: ArrayLike,
    *,
    shares: Sequence[float] = (1.0, 0.5, 0.2, 0.1),
    units: Labels = None,
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> dict[float, Estimate]:
    """Tau-b among the best shares of the runs, where a search has to tell them apart.

    Args:
        metric, error: as in `association`.
        selector: error of the same runs in an *independent* retraining, by which the best are taken; ties of
            the last rank are all taken. With the same measurement the selection itself lowers the
            association, and the estimates say so.
        shares: of the rows with all three values.
        units, resolution, draws: as in `association`.
    """
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"shares={tuple(shares)} must lie in (0, 1]; use 0.1 for the best tenth")
    table = _columns(metric=metric, error=error, selector=selector)
    used = _finite(table)
    x, y, by = table[used].T
    same = "selected by the very measurement that is correlated, which biases it" if (y == by).all() else None
    of_row = _units(units, used).of_row
    found = {}
    for share in shares:
        cut = np.sort(by)[max(math.ceil(share * len(by) - 1e-9), 1) - 1] if len(by) else 0.0
        best = by <= cut
        one = _estimate(
            _kernel("tau_b", x[best], y[best], resolution),
            Units.of(int(best.sum()), of_row[best]),
            f"{NAMES['tau_b']} in the best {100 * share:g} %",
            draws,
        )
        found[share] = one.restricted(same if share < 1 else None)
    return found


# Samples


def _decided(found: Estimate) -> bool:
    """Whether the interval leaves out 0."""
    return found.low is not None and found.high is not None and not found.low <= 0 <= found.high


def _kernel(kind: Kind, x: Array, y: Array, resolution: float, weights: Array | None = None) -> Kernel:
    if kind == "pearson":
        return resample.pearson_kernel(x, y, weights)
    make = resample.tau_kernel if kind == "tau_b" else resample.spearman_kernel
    return make(dense_ranks(x, resolution), dense_ranks(y, RESOLUTION), weights)


def _estimate(kernel: Kernel, units: Units, name: str, draws: Draws, finals: int | None = None) -> Estimate:
    """Estimate over units; none below three, where an association can hardly be anything but +1 or -1.

    Where units without a final error are drawn, too, `finals` is the number of the others.
    """
    known = len(units) if finals is None else finals
    if known < _FEWEST:
        few = f"{count(known, 'independent unit')}, fewer than {_FEWEST}: no association"
        return missing(name, few, len(units.of_row), known, draws.level)
    return resample.estimate(kernel, units, name, draws)


def _usable(
    metric: ArrayLike, error: ArrayLike
) -> tuple[Array, Array, NDArray[np.bool_], tuple[int, int, int]]:
    """Both columns where both are finite, those rows, and counts: all, without metric, without error only."""
    table = _columns(metric=metric, error=error)
    good = np.isfinite(table)
    used = _finite(table)
    counts = len(table), int((~good[:, 0]).sum()), int((good[:, 0] & ~good[:, 1]).sum())
    x, y = table[used].T
    return x, y, used, counts


def _columns(**columns: ArrayLike) -> Array:
    flat = {name: np.asarray(values, dtype=np.float64).reshape(-1) for name, values in columns.items()}
    sizes = {name: len(values) for name, values in flat.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns differ in length: {sizes}; give one value per row in each")
    return np.stack(list(flat.values()), axis=1)


def _finite(table: Array) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(table).all(axis=1), dtype=np.bool_)


def _complete(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b, _, _ = _usable(x, y)
    return a, b


def _groups(labels: Labels, used: NDArray[np.bool_]) -> tuple[Indices, list[str]]:
    """Groups of the rows used, as numbers, and their names; rows without a label are the group `(none)`."""
    names = pd.Series(labels, dtype=object).reset_index(drop=True)
    if len(names) != len(used):
        raise ValueError(f"groups has {len(names)} labels for {len(used)} rows; give one per row")
    names = names.where(names.notna(), "(none)")[used].reset_index(drop=True)
    group = codes(names, len(names), "groups")
    return group, [str(names[row]) for row in np.unique(group, return_index=True)[1]]


def _members(group: Indices) -> list[Indices]:
    return [np.flatnonzero(group == index) for index in range(int(group.max(initial=-1)) + 1)]


def _check_groups(groups: Labels, kind: str) -> None:
    if groups is not None and kind != "tau_b":
        raise ValueError(f"kind={kind!r} within groups is not defined here; use 'tau_b', or leave groups out")


def _units(labels: Labels, used: NDArray[np.bool_]) -> Units:
    if labels is None:
        return Units.of(int(used.sum()))
    series = pd.Series(labels, dtype=object)
    if len(series) != len(used):
        raise ValueError(f"units has {len(series)} labels for {len(used)} rows; give one per row")
    return Units.of(int(used.sum()), series[used].reset_index(drop=True))


def _point(kernel: Callable[[Array], Array], n: int) -> float | None:
    value = float(kernel(np.ones((1, n)))[0]) if n else math.nan
    return value if math.isfinite(value) else None


def _coarse(x: Array, resolution: float) -> str:
    """Note on a metric so small that its resolution ties values that differ."""
    if not len(x):
        return ""
    steps, values = len(np.unique(np.rint(x / resolution))), len(np.unique(x))
    if steps < values and steps < _FEW_STEPS and np.ptp(x) < _FEW_STEPS * resolution and np.ptp(x) > 1e-12:
        return f"{values} values of the metric are {steps} at its resolution of {resolution:g}"
    return ""
