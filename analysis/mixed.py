"""Where the variance comes from: settings, seeds and noise; slopes within and between settings."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import optimize, stats

from analysis.resample import (
    Array,
    Estimate,
    Indices,
    Labels,
    check_level,
    codes,
    count,
    finite_sample,
    missing,
)

FEWEST_LEVELS = 5
"""Levels below which no variance between them can be estimated, so that the factor is a fixed effect."""

_MOST_LEVELS = 1_500

# One grouping


@dataclass(frozen=True)
class Components:
    """Variance between groups, e.g. architectures, and within them, e.g. between retraining seeds."""

    between: float | None
    within: float | None
    icc: Estimate
    """Share of the variance that is between groups: correlation of two runs of one group."""

    replicates: float | None
    """Runs per group; where groups differ in size, the number that stands for all in the formulas."""


def components(values: ArrayLike, groups: Labels, level: float = 0.95) -> Components:
    """Variance components of a one-way layout by analysis of variance; for balanced groups that is REML, too.

    Raises:
        ValueError: a value is not finite, or there is not one label per value.

    Source: Searle (1971); the interval is exact for groups of one size and normal effects.
    """
    sample = finite_sample(values, "values")
    check_level(level)
    group = codes(groups, len(sample), "groups")
    sizes = np.bincount(group)
    n, k = len(sample), len(sizes)
    name = "ICC, analysis of variance with F interval"
    if k < 2 or n == k:
        why = "one group" if k < 2 else "one run in each group"
        icc = missing(name, f"{why}: the variance cannot be divided", n, k, level)
        return Components(None, None, icc, None)
    means = np.bincount(group, sample) / sizes
    inside = float(((sample - means[group]) ** 2).sum()) / (n - k)
    among = float((sizes * (means - sample.mean()) ** 2).sum()) / (k - 1)
    size = float(n - (sizes**2).sum() / n) / (k - 1)
    between = max(0.0, (among - inside) / size)
    if between + inside <= 0:
        icc = missing(name, "all values are equal: there is no variance to divide", n, k, level)
        return Components(0.0, 0.0, icc, size)
    value = between / (between + inside)
    if inside <= 0:
        why = "runs of a group are all equal: no interval"
        return Components(between, 0.0, Estimate(1.0, None, None, n, k, name, level, why), size)
    ratio = among / inside
    ends = []
    for tail in ((1 + level) / 2, (1 - level) / 2):
        f = ratio / float(stats.f.ppf(tail, k - 1, n - k))
        ends.append(min(max((f - 1) / (f + size - 1), 0.0), 1.0))
    notes = [
        "the variance between groups is at its bound, 0" if between == 0 else "",
        "groups differ in size: the interval is approximate" if np.ptp(sizes) else "",
    ]
    restriction = "; ".join(filter(None, notes)) or None
    icc = Estimate(value, min(ends[0], value), max(ends[1], value), n, k, name, level, restriction)
    return Components(between, inside, icc, size)


def noise_ceiling(icc: Estimate, replicates: float = 1) -> Estimate:
    """Greatest correlation that anything can have with an endpoint: the root of the endpoint's reliability.

    Args:
        icc: of single runs, from `components`.
        replicates: runs of which the endpoint is the mean.

    Source: Spearman (1910) and Brown (1910): the mean of m runs has reliability m ICC / (1 + (m - 1) ICC).
    """
    if not replicates >= 1:
        raise ValueError(f"replicates={replicates} must be at least 1")
    name = f"noise ceiling of the mean of {replicates:g} runs, from the ICC"
    if icc.value is None:
        return missing(name, icc.restriction or "", icc.n, icc.n_units, icc.level)

    def ceiling(share: float | None) -> float | None:
        return None if share is None else math.sqrt(replicates * share / (1 + (replicates - 1) * share))

    ends = ceiling(icc.low), ceiling(icc.high)
    return Estimate(ceiling(icc.value), *ends, icc.n, icc.n_units, name, icc.level, icc.restriction)


def tau_ceiling(ceiling: Estimate) -> Estimate:
    """Noise ceiling on the scale of Kendall's tau, from that of Pearson's r, if metric and error are normal.

    Source: Greiner (1909), tau = 2 / pi arcsin r.
    """
    ends = (
        None if r is None else 2 / math.pi * math.asin(r) for r in (ceiling.value, ceiling.low, ceiling.high)
    )
    value, low, high = ends
    return replace(
        ceiling, value=value, low=low, high=high, method=f"{ceiling.method}, as tau under normality"
    )


# Crossed random intercepts


@dataclass(frozen=True)
class Term:
    """A fixed effect of a mixed model."""

    name: str
    slope: Estimate
    """Wald's t interval, degrees of freedom by the level at which the term varies."""

    p: float | None
    """Of the likelihood-ratio test, both models fitted by maximum likelihood."""


@dataclass(frozen=True)
class Component:
    """The variance of a random intercept, or of the residual."""

    name: str
    levels: int
    variance: Estimate
    """REML, with its profile-likelihood interval."""

    share: float | None
    """Of the sum of all components."""


@dataclass(frozen=True)
class MixedModel:
    """Fixed slopes and crossed random intercepts, fitted by REML."""

    terms: tuple[Term, ...]
    components: tuple[Component, ...]
    """The residual is the last one."""

    as_fixed: tuple[str, ...]
    """Factors of too few levels for a variance, which are fixed effects instead."""

    n: int
    log_likelihood: float | None
    """Restricted, at the estimates."""

    restriction: str | None


def mixed_model(
    response: ArrayLike, fixed: Mapping[str, ArrayLike], random: Mapping[str, Labels], level: float = 0.95
) -> MixedModel:
    """Linear mixed model with an intercept, slopes for the fixed columns and crossed random intercepts.

    Factors of fewer than five levels are fixed effects, and so may leave a slope that is constant within
    their levels without an estimate.

    Raises:
        ValueError: a value is not finite, lengths differ, or the factors have more than 1,500 levels.

    Source: Bates et al. (2015) for the likelihood.
    """
    y = finite_sample(response, "response")
    check_level(level)
    columns = {name: finite_sample(values, name) for name, values in fixed.items()}
    for name, column in columns.items():
        if len(column) != len(y):
            raise ValueError(f"{name} has {len(column)} values for {len(y)} rows; give one per row")
    factors = {name: codes(labels, len(y), name) for name, labels in random.items()}
    sizes = {name: int(group.max()) + 1 if len(group) else 0 for name, group in factors.items()}
    as_fixed = tuple(name for name, size in sizes.items() if size < FEWEST_LEVELS)
    groups = {name: group for name, group in factors.items() if name not in as_fixed}
    if sum(sizes[name] for name in groups) > _MOST_LEVELS:
        raise ValueError(
            f"{sizes} levels are more than {_MOST_LEVELS}; use `components` for one large factor"
        )
    design, kept, lost = _design(y, columns, [factors[name] for name in as_fixed])
    blocks = [_indicators(group) for group in groups.values()]
    spare = len(y) - int(np.linalg.matrix_rank(np.hstack([design, *blocks]))) if len(y) else 0
    scale = float(y.std()) if len(y) else 0.0
    if spare < 1 or scale <= 1e-12 * max(1e-300, float(np.abs(y).max())):
        why = "all responses are equal" if spare >= 1 else f"{count(len(y), 'row')} leave no residual"
        return _unfitted(columns, groups, sizes, as_fixed, len(y), level, f"{why}: no model")
    fit = _Fit(y / scale, design, blocks)
    try:
        sds, deviance = fit.best()
        beta, covariance = fit.coefficients(sds)
        terms = []
        for name, column in columns.items():
            label = f"slope of {name}, REML"
            if name in lost:
                why = f"not identifiable: fixed by the levels of {', '.join(as_fixed) or 'the other columns'}"
                terms.append(Term(name, missing(label, why, len(y), 0, level), None))
                continue
            at = kept.index(name) + design.shape[1] - len(kept)
            error = scale * math.sqrt(float(covariance[at, at]))
            df, units = _freedom(column, design, groups, spare)
            slope = _wald(scale * float(beta[at]), error, df, label, len(y), units, level)
            terms.append(Term(name, slope, fit.likelihood_ratio(at)))
        parts = [
            _component(fit, index, name, sizes.get(name, len(y)), sds, deviance, scale, level)
            for index, name in enumerate((*groups, "residual"))
        ]
    except np.linalg.LinAlgError:
        why = "columns and factors give the response nearly exactly: no model"
        return _unfitted(columns, groups, sizes, as_fixed, len(y), level, why)
    notes = [
        f"{name} has {sizes[name]} levels, fewer than {FEWEST_LEVELS}: a fixed effect" for name in as_fixed
    ]
    notes += [f"the variance of {part.name} is at its bound, 0" for part in parts if part.variance.value == 0]
    likelihood = -deviance / 2 - (len(y) - design.shape[1]) * math.log(scale)
    return MixedModel(tuple(terms), tuple(parts), as_fixed, len(y), likelihood, "; ".join(notes) or None)


def within_between(
    metric: ArrayLike, error: ArrayLike, setting: Labels, seed: Labels = None, level: float = 0.95
) -> MixedModel:
    """Mixed model of the error on a metric, its slopes within and between settings told apart.

    Term `within` is the slope on the metric less its setting's mean, in standard deviations within settings;
    `between`, the slope on the settings' means in the same unit. Intercepts are random by setting and,
    crossed with it, by seed. A row without metric or error is to be left out beforehand.

    Source: Mundlak (1978).
    """
    x = finite_sample(metric, "metric")
    group = codes(setting, len(x), "setting")
    means = np.bincount(group, x) / np.bincount(group) if len(x) else x
    inside = x - means[group]
    df = len(x) - len(means)
    spread = math.sqrt(float((inside**2).sum()) / df) if df > 0 else 0.0
    if spread <= 1e-12 * max(1e-300, float(np.abs(x).max(initial=0))):
        why = "the metric does not vary within settings: no slope within"
        return _unfitted({"within": x, "between": x}, {}, {}, (), len(x), level, why)
    fixed = {"within": inside / spread, "between": (means[group] - x.mean()) / spread}
    random: dict[str, Labels] = {"setting": setting}
    if seed is not None:
        random["seed"] = seed
    return mixed_model(error, fixed, random, level)


def _component(
    fit: "_Fit", index: int, name: str, levels: int, sds: Array, deviance: float, scale: float, level: float
) -> Component:
    """One variance in the unit of the response, with its interval and its share of all."""
    low, high = fit.profile(index, sds, deviance, level)
    zero = sds[index] < 1e-4
    value = 0.0 if zero else float(sds[index] ** 2) * scale**2
    notes = ["at its bound, 0"] if zero else []
    ends: tuple[float | None, float | None] = None, None
    if high is None:
        notes.append("the likelihood sets it no upper end: no interval")
    else:
        ends = min(low**2 * scale**2, value), max(high**2 * scale**2, value)
    method = "variance, REML with profile interval"
    variance = Estimate(value, *ends, fit.n, levels, method, level, "; ".join(notes) or None)
    return Component(name, levels, variance, float(sds[index] ** 2 / (sds**2).sum()))


def _unfitted(
    columns: Mapping[str, Array],
    groups: Mapping[str, Indices],
    sizes: Mapping[str, int],
    as_fixed: tuple[str, ...],
    n: int,
    level: float,
    why: str,
) -> MixedModel:
    terms = tuple(Term(name, missing(f"slope of {name}", why, n, 0, level), None) for name in columns)
    parts = tuple(
        Component(name, sizes.get(name, n), missing("variance", why, n, 0, level), None)
        for name in (*groups, "residual")
    )
    return MixedModel(terms, parts, as_fixed, n, None, why)


def _design(
    y: Array, columns: Mapping[str, Array], factors: Sequence[Indices]
) -> tuple[Array, list[str], list[str]]:
    """Independent columns, those of factors first; names of the columns kept, which come last, and lost."""
    design = np.ones((len(y), 1))
    for block in (_indicators(factor)[:, 1:] for factor in factors):
        for column in block.T:
            design = _added(design, column)
    kept: list[str] = []
    lost: list[str] = []
    for name, column in columns.items():
        wider = _added(design, column)
        (kept if wider.shape[1] > design.shape[1] else lost).append(name)
        design = wider
    return design, kept, lost


def _added(design: Array, column: Array) -> Array:
    """The design with one more column, unless it depends on those that it has."""
    if not len(column):
        return design
    rest = column - design @ np.linalg.lstsq(design, column, rcond=None)[0]
    independent = np.linalg.norm(rest) > 1e-9 * max(1e-300, float(np.linalg.norm(column)))
    return np.column_stack([design, column]) if independent else design


def _indicators(group: Indices) -> Array:
    table = np.zeros((len(group), int(group.max()) + 1 if len(group) else 0))
    table[np.arange(len(group)), group] = 1
    return table


def _freedom(column: Array, design: Array, groups: Mapping[str, Indices], spare: int) -> tuple[int, int]:
    """Degrees of freedom of a slope, and what it is replicated over: groups it is constant in, or rows."""
    for group in sorted(groups.values(), key=lambda found: int(found.max())):
        if _constant(column, group):
            alike = sum(_constant(other, group) for other in design.T)
            levels = int(group.max()) + 1
            return levels - alike, levels
    return spare, len(column)


def _constant(column: Array, group: Indices) -> bool:
    first = np.unique(group, return_index=True)[1]
    return bool(np.allclose(column, column[first][group], rtol=0, atol=1e-9 * (1 + np.abs(column).max())))


def _wald(value: float, error: float, df: float, name: str, n: int, n_units: int, level: float) -> Estimate:
    if df < 1:
        why = f"{count(n_units, 'unit')} leave no degree of freedom: no interval"
        return Estimate(value, None, None, n, n_units, name, level, why)
    margin = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Estimate(
        value, value - margin, value + margin, n, n_units, f"{name}, t with {round(df, 1):g} df", level
    )


class _Fit:
    """Likelihood of a mixed model as a function of its standard deviations, that of the residual last."""

    def __init__(self, y: Array, design: Array, blocks: Sequence[Array]) -> None:
        self.n, self.p = design.shape
        self.widths = [block.shape[1] for block in blocks]
        self.starts = np.cumsum([0, *self.widths[:-1]])
        z = np.hstack([*blocks, np.zeros((self.n, 0))])
        both = np.column_stack([design, y])
        self.zz, self.zw, self.ww = z.T @ z, z.T @ both, both.T @ both

    def deviance(
        self, sds: Array, restricted: bool = True, keep: Sequence[int] | None = None
    ) -> tuple[float, Array]:
        """Minus twice the (restricted) log-likelihood at the best coefficients of the kept columns, and its
        derivatives by the standard deviations.

        By a variance v, with P = V^-1 - V^-1 X (X' V^-1 X)^-1 X' V^-1, that of its factor's Z is
        tr(Z' P Z) - |Z' P y|^2; and all together, each times its v, they make n - p - y' P y.
        """  # noqa: D205
        columns = [*(range(self.p) if keep is None else keep), self.p]
        noise = float(sds[-1])
        scale = np.repeat(sds[:-1], self.widths) / noise
        lower = np.linalg.cholesky(np.eye(len(scale)) + scale[:, None] * self.zz * scale)
        half_z, half_w = (
            np.linalg.solve(lower, scale[:, None] * side) for side in (self.zz, self.zw[:, columns])
        )
        table = (self.ww[np.ix_(columns, columns)] - half_w.T @ half_w) / noise**2  # W' V^-1 W
        factor = np.linalg.cholesky(table)  # its last diagonal entry is the root of the residual sum
        rss = float(factor[-1, -1] ** 2)
        value = 2 * float(np.log(np.diag(lower)).sum()) + 2 * self.n * math.log(noise) + rss
        cross = np.linalg.solve(factor, ((self.zw[:, columns] - half_z.T @ half_w) / noise**2).T)
        trace = (np.diag(self.zz) - (half_z**2).sum(axis=0)) / noise**2 - rss * cross[-1] ** 2
        free = self.n
        if restricted:
            value += 2 * float(np.log(np.diag(factor)[:-1]).sum())
            trace -= (cross[:-1] ** 2).sum(axis=0)
            free -= len(columns) - 1
        slopes = np.add.reduceat(trace, self.starts) if self.widths else np.empty(0)
        last = free - rss - float(sds[:-1] ** 2 @ slopes)
        return float(free * math.log(2 * math.pi)) + value, 2 * np.append(sds[:-1] * slopes, last / noise)

    def best(self, restricted: bool = True, keep: Sequence[int] | None = None) -> tuple[Array, float]:
        """Standard deviations of least deviance, and the deviance."""
        return self._minimise(lambda sds: self.deviance(sds, restricted, keep), len(self.widths) + 1)

    def coefficients(self, sds: Array) -> tuple[Array, Array]:
        """Coefficients and their covariances, for these standard deviations."""
        scale = np.repeat(sds[:-1], self.widths) / sds[-1]
        inner = np.eye(len(scale)) + scale[:, None] * self.zz * scale
        side = scale[:, None] * self.zw
        table = (self.ww - side.T @ np.linalg.solve(inner, side)) / sds[-1] ** 2
        covariance = np.asarray(np.linalg.inv(table[:-1, :-1]), dtype=np.float64)
        return covariance @ table[:-1, -1], covariance

    def likelihood_ratio(self, column: int) -> float:
        """P-value of leaving out a column."""
        without = [index for index in range(self.p) if index != column]
        gap = self.best(False, without)[1] - self.best(False)[1]
        return float(stats.chi2.sf(max(gap, 0.0), 1))

    def profile(self, index: int, sds: Array, least: float, level: float) -> tuple[float, float | None]:
        """Ends of the profile-likelihood interval of one standard deviation; None for one beyond `_MOST`."""
        limit = float(stats.chi2.ppf(level, 1))
        others = np.delete(sds, index)
        residual = index < len(others)

        def excess(value: float) -> float:
            def fixed(rest: Array) -> tuple[float, Array]:
                found, slopes = self.deviance(np.insert(rest, index, value))
                return found, np.delete(slopes, index)

            if not len(others):
                return self.deviance(np.array([value]))[0] - least - limit
            return self._minimise(fixed, len(others), others, residual)[1] - least - limit

        floor = 0.0 if residual else _FLOOR
        value = float(sds[index])
        low = floor
        if value > floor and excess(floor) > 0:
            low = float(optimize.brentq(excess, floor, value, xtol=1e-4))
        high = max(2 * value, 0.1)
        while excess(high) < 0:
            high *= 2
            if high > _MOST:
                return low, None
        return low, float(optimize.brentq(excess, max(value, floor), high, xtol=1e-4))

    def _minimise(
        self,
        function: Callable[[Array], tuple[float, Array]],
        size: int,
        start: Array | None = None,
        residual: bool = True,
    ) -> tuple[Array, float]:
        """Minimum over standard deviations, of which the last is the residual's if `residual`, so above 0.

        At a deviation of 0 the gradient is 0, be it the minimum or not, so the search starts inside, too.
        """
        bounds = [(0.0, _MOST)] * (size - residual) + [(_FLOOR, _MOST)] * residual
        starts = [np.full(size, 0.5), np.append(np.full(size - 1, 0.05), 0.9 if residual else 0.05)]
        if start is not None:
            starts.append(np.maximum(start, 0.02))
        found = [
            optimize.minimize(
                function, one, method="L-BFGS-B", jac=True, bounds=bounds, options={"ftol": 1e-12}
            )
            for one in starts
        ]
        best = min(found, key=lambda result: float(result.fun))
        return np.asarray(best.x, dtype=np.float64), float(best.fun)


_FLOOR = 1e-3
"""Least residual standard deviation that is tried, in those of the response."""

_MOST = 100.0
"""Greatest standard deviation that is tried; beyond, sums of squares drown in rounding."""


# Factors of a sweep


@dataclass(frozen=True)
class Effect:
    """What one factor, or the interaction of two, explains of a response."""

    name: str
    df: int
    share: float
    """Of the total sum of squares, over and above the other terms of its order (type II)."""

    f: float | None
    p: float | None


@dataclass(frozen=True)
class MarginalMean:
    """Mean response at one level of a factor, all combinations of the others weighted alike."""

    factor: str
    level: str
    mean: Estimate


@dataclass(frozen=True)
class FactorSweep:
    """A response over the settings of a sweep: what explains it, and its means as if it were balanced."""

    effects: tuple[Effect, ...]
    residual_share: float | None
    means: tuple[MarginalMean, ...]
    cells: Mapping[tuple[str, ...], int]
    """Runs in each combination of levels."""

    n: int
    restriction: str | None


def factor_sweep(
    response: ArrayLike, factors: Mapping[str, Labels], seed: Labels = None, level: float = 0.95
) -> FactorSweep:
    """Analysis of variance of a sweep, with the interactions of two factors where the runs allow.

    Seeds that all settings share are a factor without interactions, called `seed`: its share is that of the
    seeds, and differences between settings are taken within seeds. A marginal mean speaks of other seeds,
    too, so its interval holds the variance between seeds.

    Raises:
        ValueError: there is no factor, a value is not finite, or lengths differ.

    Source: Henderson (1953), method 3, for the variance between seeds; Satterthwaite (1946) for the degrees
    of freedom of the means.
    """
    y = finite_sample(response, "response")
    if not factors or "seed" in factors:
        raise ValueError(f"factors={tuple(factors)}: name at least one, and give seeds as `seed`")
    named = {name: pd.Series(labels, dtype=object).astype(str).tolist() for name, labels in factors.items()}
    groups = {name: codes(labels, len(y), name) for name, labels in named.items()}
    cells: dict[tuple[str, ...], int] = dict(Counter(zip(*named.values(), strict=True)))
    terms: dict[tuple[str, ...], Array] = {(name,): _contrasts(group) for name, group in groups.items()}
    run = None if seed is None else codes(seed, len(y), "seed")
    if run is not None:
        terms["seed",] = _contrasts(run)
    crossed: dict[tuple[str, ...], Array] = {
        pair: np.hstack(
            [terms[pair[:1]] * column[:, None] for column in terms[pair[1:]].T] or [np.empty((len(y), 0))]
        )
        for pair in itertools.combinations(groups, 2)
    }
    full = {**terms, **crossed}
    notes = []
    levels = math.prod(int(group.max()) + 1 for group in groups.values()) if len(y) else 0
    empty = levels - len(cells)
    if empty:
        notes.append(f"{count(empty, 'combination')} of settings without a run")
    spare = len(y) - _rank(full.values(), len(y))
    if spare < 1 and crossed:
        notes.append("too few runs for interactions: main effects only")
        full, spare = terms, len(y) - _rank(terms.values(), len(y))
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if spare < 1 or total <= 1e-24 * max(1e-300, float((y**2).sum())):
        why = "all responses are equal" if spare >= 1 else "too few runs to tell factors from noise"
        return FactorSweep((), None, (), cells, len(y), "; ".join([*notes, why]))
    rss = _rss(full.values(), y)
    noise = rss / spare
    effects = [_effect(term, full, y, total, noise, spare) for term in full]
    means = _marginal_means(y, named, groups, full, _mean_variance(y, full, run, noise, spare), level)
    return FactorSweep(tuple(effects), rss / total, tuple(means), cells, len(y), "; ".join(notes) or None)


def _effect(
    term: tuple[str, ...],
    full: Mapping[tuple[str, ...], Array],
    y: Array,
    total: float,
    noise: float,
    spare: int,
) -> Effect:
    others = [columns for name, columns in full.items() if not set(term) <= set(name)]
    df = _rank([*others, full[term]], len(y)) - _rank(others, len(y))
    gain = max(_rss(others, y) - _rss([*others, full[term]], y), 0.0)
    if df < 1 or noise <= 1e-12 * total:
        return Effect(" x ".join(term), df, gain / total, None, None)
    f = gain / df / noise
    return Effect(" x ".join(term), df, gain / total, f, float(stats.f.sf(f, df, spare)))


def _marginal_means(
    y: Array,
    named: Mapping[str, Sequence[str]],
    groups: Mapping[str, Indices],
    full: Mapping[tuple[str, ...], Array],
    variance: Callable[[Array], tuple[float, float]],
    level: float,
) -> list[MarginalMean]:
    """Predictions averaged over all combinations of the other factors; sum-to-zero columns average to 0."""
    design = np.hstack([np.ones((len(y), 1)), *full.values()])
    inverse = np.linalg.pinv(design)
    found = []
    for name, group in groups.items():
        for index in range(int(group.max()) + 1):
            row = int(np.argmax(group == index))
            wanted = np.concatenate(
                [
                    [1.0],
                    *(
                        columns[row] if term == (name,) else 0 * columns[row]
                        for term, columns in full.items()
                    ),
                ]
            )
            members = int((group == index).sum())
            label = "estimated marginal mean"
            weights = wanted @ inverse
            if not np.allclose(weights @ design, wanted, atol=1e-8):
                mean = missing(label, "settings without a run leave it undetermined", members, members, level)
            else:
                squared, df = variance(weights)
                mean = _wald(float(weights @ y), math.sqrt(squared), df, label, members, members, level)
            found.append(MarginalMean(name, named[name][row], mean))
    return found


def _mean_variance(
    y: Array,
    full: Mapping[tuple[str, ...], Array],
    run: Indices | None,
    noise: float,
    spare: int,
) -> Callable[[Array], tuple[float, float]]:
    """Variance of a weighted sum of responses, seeds drawn anew, and its degrees of freedom.

    With s2 the variance between seeds it is noise w'w + s2 sum_s (sum of w over the runs of seed s)^2. The
    mean square of seeds, over the other terms, has the expectation noise + size s2.
    """
    others = [columns for term, columns in full.items() if term != ("seed",)]
    df = _rank(full.values(), len(y)) - _rank(others, len(y))

    def fixed(weights: Array) -> tuple[float, float]:
        return noise * float(weights @ weights), float(spare)

    if run is None or df < 1:
        return fixed
    seeds = _indicators(run)
    size = sum(_rss(others, column) for column in seeds.T) / df
    square = max(_rss(others, y) - _rss(full.values(), y), 0.0) / df
    if square <= noise:  # the estimate of s2 is at its bound, 0
        return fixed

    def drawn(weights: Array) -> tuple[float, float]:
        share = float(((weights @ seeds) ** 2).sum()) / size
        parts = share * square, (float(weights @ weights) - share) * noise
        return sum(parts), sum(parts) ** 2 / (parts[0] ** 2 / df + parts[1] ** 2 / spare)

    return drawn


def _contrasts(group: Indices) -> Array:
    """Columns of a factor that sum to zero over its levels."""
    table = _indicators(group)
    return table[:, 1:] - table[:, :1]


def _rank(blocks: Iterable[Array], n: int) -> int:
    return int(np.linalg.matrix_rank(np.hstack([np.ones((n, 1)), *blocks]))) if n else 0


def _rss(blocks: Iterable[Array], y: Array) -> float:
    design = np.hstack([np.ones((len(y), 1)), *blocks])
    return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())
