"""Resampling of independent units: bootstrap intervals and permutation tests, seeded.

A statistic is a *kernel*: it takes row weights of shape (draws, rows) and returns one value per draw, NaN
where it is not defined. A bootstrap draw gives a row the number of times its unit was drawn, deleting a unit
gives its rows 0, a sampling design gives a row the inverse of its probability: one kernel serves all three.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Kernel = Callable[[Array], Array]
Labels = Sequence[object] | NDArray[np.generic] | pd.Series | None

RESOLUTION = 1e-6
"""Values closer than this are equal: runs that collapsed to one constant differ in the last bits only."""

RESAMPLES = 9_999
PERMUTATIONS = 10_000
EXACT = 40_320
"""Most permutations that are all gone through rather than sampled: those of 8 units."""

ENOUGH_UNITS = 5
"""Fewest independent units for which an interval is given."""

ENOUGH_FOR_BCA = 10
"""Fewest independent units for which the bootstrap interval is corrected for bias and acceleration."""

_LEAST = 99
_LEAST_RESAMPLES = 999
_DRAWN_VALUES = 6_000_000
"""Most values drawn for one interval or test; beyond, it draws less often, and the method says how often."""

_CHUNK = 8_000_000
_PAIRS_PER_VALUE = 20
"""Pairs that a weighted test looks at in the time in which others draw one value."""

_MOST_DELETIONS = 500
_DELETION_GROUPS = 200
MOST_UNDEFINED = 0.05
"""Largest share of resamples in which a statistic may be undefined and still get an interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and what they rest on, or with the `restriction` why it has none."""

    value: float | None
    low: float | None
    high: float | None

    n: int
    """Rows used."""

    n_units: int
    """Independent units among them: what the interval counts as replications."""

    method: str
    """Names of the estimator and of the interval, with the number of resamples."""

    level: float = 0.95
    restriction: str | None = None
    """What the reader must know before believing the number; never None where the interval is missing."""

    def __post_init__(self) -> None:
        check_level(self.level)
        numbers = [number for number in (self.value, self.low, self.high) if number is not None]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{self}: a number is not finite; use None, with a restriction")
        if (self.low is None) != (self.high is None) or (self.low is None and not self.restriction):
            raise ValueError(f"{self}: without an interval a restriction must say why")
        if self.low is not None and self.high is not None and (self.value is None or self.low > self.high):
            raise ValueError(f"{self}: an interval needs a value, and its low end first")

    def restricted(self, restriction: str | None) -> "Estimate":
        """The same estimate with one more restriction, if there is one."""
        both = "; ".join(text for text in (restriction, self.restriction) if text)
        return replace(self, restriction=both or None)

    def __str__(self) -> str:
        if self.value is None:
            return f"- (n = {self.n})"
        interval = "no interval" if self.low is None else f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f} {interval} (n = {self.n})"


def missing(method: str, restriction: str, n: int = 0, n_units: int = 0, level: float = 0.95) -> Estimate:
    """An estimate that could not be made, with the reason."""
    return Estimate(None, None, None, n, n_units, method, level, restriction)


def check_level(level: float) -> None:
    """Refuse a confidence level that is not a share, e.g. 95."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; use 0.95 for a 95 % interval")


def finite_sample(values: ArrayLike, name: str) -> Array:
    """Values as a flat array of floats; those that are not finite are refused."""
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} holds a value that is not finite; count missing runs, then leave them out")
    return sample


def dense_ranks(values: Array, resolution: float) -> Indices:
    """Ranks from 0 without gaps; values that round to the same multiple of `resolution` share one."""
    if not resolution > 0:
        raise ValueError(f"resolution={resolution} must be positive; use 1e-6 of the unit of the values")
    return np.unique(np.rint(values / resolution), return_inverse=True)[1].reshape(-1)


def count(number: int, noun: str) -> str:
    """Number and noun, e.g. `1 row` or `3,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@dataclass(frozen=True)
class Draws:
    """How intervals and permutation tests are drawn; the same draws of the same rows for every statistic."""

    level: float = 0.95
    """Of confidence."""

    resamples: int | None = None
    """Bootstrap resamples; None for 9,999, fewer where that would draw more than 6 million values."""

    permutations: int | None = None
    """Permutations where they are too many to go through; None for 10,000, fewer beyond 600 rows."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_level(self.level)
        for name, number in {"resamples": self.resamples, "permutations": self.permutations}.items():
            if number is not None and number < _LEAST:
                raise ValueError(f"{name}={number} are too few for the tails; use at least {_LEAST}, or None")


DRAWS = Draws()


# Units


@dataclass(frozen=True, eq=False)
class Units:
    """The independent units of a sample: to which unit each row belongs, and to which stratum each unit."""

    of_row: Indices
    """Unit of each row, shape (rows,)."""

    stratum: Indices
    """Stratum of each unit, shape (units,); units are drawn and exchanged within their stratum."""

    @classmethod
    def of(cls, n: int, labels: Labels = None, strata: Labels = None) -> "Units":
        """Units of `n` rows by the labels of the rows; without labels every row is a unit.

        Raises:
            ValueError: the lengths differ, a label is missing, or the rows of a unit lie in several strata.
        """
        of_row = np.arange(n) if labels is None else codes(labels, n, "units")
        of_stratum = np.zeros(n, dtype=np.intp) if strata is None else codes(strata, n, "strata")
        total = int(of_row.max()) + 1 if n else 0
        stratum = np.zeros(total, dtype=np.intp)
        stratum[of_row] = of_stratum
        if (stratum[of_row] != of_stratum).any():
            raise ValueError("a unit has rows in several strata; leave the strata out, or make units finer")
        return cls(of_row, stratum)

    def __len__(self) -> int:
        return len(self.stratum)

    def nested(self, group: Indices) -> "Units | None":
        """The units with groups of rows as their strata, None where a unit has rows in several groups."""
        pairs = np.unique(np.stack([self.of_row, group]), axis=1).shape[1]
        return Units.of(len(group), self.of_row, group) if pairs == len(self) else None

    def drawn_within(self, group: Indices) -> "Units":
        """The units as drawn for rows in groups: within these if each has enough units, else over all."""
        strata = self.nested(group)
        sizes = np.bincount(strata.stratum) if strata is not None and len(self) else np.zeros(1)
        return strata if strata is not None and sizes.min() >= ENOUGH_UNITS else self

    def counts(self, resamples: int, draw: np.random.Generator) -> Array:
        """How often each unit is drawn, shape (resamples, units): with replacement within its stratum."""
        drawn = np.zeros((resamples, len(self)))
        for stratum in range(int(self.stratum.max()) + 1):
            members = np.flatnonzero(self.stratum == stratum)
            picks = draw.integers(0, len(members), (resamples, len(members)))
            flat = picks + np.arange(resamples)[:, None] * len(members)
            tally = np.bincount(flat.reshape(-1), minlength=resamples * len(members))
            drawn[:, members] = tally.reshape(resamples, len(members))
        return drawn

    def deletions(self) -> Array:
        """Units kept when one of them is left out, one a row; beyond 500 units, one of 200 groups of them."""
        groups = np.arange(len(self))
        if len(self) > _MOST_DELETIONS:
            groups = np.random.default_rng(0).permutation(groups % _DELETION_GROUPS)
        kept: Array = (groups[None, :] != np.arange(groups.max() + 1)[:, None]).astype(np.float64)
        return kept


def codes(labels: Labels, n: int, name: str) -> Indices:
    """Labels as numbers from 0 in order of appearance; a missing label is refused."""
    found = pd.factorize(pd.Series(labels, dtype=object))[0]
    if len(found) != n:
        raise ValueError(f"{name} has {len(found)} labels for {n} rows; give one per row")
    if (found < 0).any():
        raise ValueError(f"{name}: row {int(np.argmin(found))} has no label; name it, or leave the row out")
    return found.astype(np.intp)


# Bootstrap


def estimate(
    kernel: Kernel,
    units: Units,
    name: str,
    draws: Draws = DRAWS,
    *,
    correct: bool = True,
    samples: bool = False,
) -> Estimate:
    """A statistic with its bootstrap interval over independent units.

    The interval is BCa, bias corrected and accelerated; below `ENOUGH_FOR_BCA` units, where BCa is
    degenerate, and with `correct` off it is the plain percentile interval, which the method then says. The
    acceleration of more than 500 units comes from deleting groups of units, which the method says, too.

    Args:
        kernel: row weights (draws, rows) to values (draws,).
        units: what is drawn.
        name: of the statistic, for `method`.
        draws: their number and seed, and the level of the interval.
        correct: for bias and acceleration.
        samples: whether each stratum is a sample of its own, e.g. an arm; the smallest one then counts for
            whether there are enough units for BCa.

    Source: Efron (1987), "Better Bootstrap Confidence Intervals".
    """
    n, level = len(units.of_row), draws.level
    value = float(kernel(np.ones((1, n)))[0]) if n else math.nan
    if not math.isfinite(value):
        return missing(name, "not defined: no rows, or values that are all equal", n, len(units), level)
    plain = Estimate(value, None, None, n, len(units), name, level, "no interval")
    if len(units) < ENOUGH_UNITS:
        return plain.restricted(f"{count(len(units), 'independent unit')}, fewer than {ENOUGH_UNITS}")
    total = draws.resamples or resamples_for(n)
    drawn = _by_units(kernel, units, units.counts(total, np.random.default_rng(draws.seed)))
    good = drawn[np.isfinite(drawn)]
    if len(good) < (1 - MOST_UNDEFINED) * total:
        return plain.restricted(f"not defined in {100 * (1 - len(good) / total):.0f} % of the resamples")
    if np.ptp(good) < 1e-12:
        return plain.restricted("every resample gives the same value")
    ends, kind, restriction = None, "percentile", None
    fewest = int(np.bincount(units.stratum).min()) if samples else len(units)
    if correct and fewest >= ENOUGH_FOR_BCA:
        ends = bca_ends(value, good, _by_units(kernel, units, units.deletions()), level)
        kind = "BCa" if ends else kind
        restriction = None if ends else "BCa is degenerate here, so the interval is the percentile one"
    elif correct:
        of = f"{fewest} units{' of a sample' if samples else ''}"
        restriction = f"{of} are too few for BCa: percentile interval, which may be too narrow"
    low, high = ends or np.quantile(good, [(1 - level) / 2, (1 + level) / 2]).tolist()
    if high - low < 1e-12:
        return plain.restricted("nearly every resample gives the same value")
    method = f"{name}; {kind} bootstrap, {count(total, 'resample')} of {count(len(units), 'unit')}"
    if ends and len(units) > _MOST_DELETIONS:
        method += f", acceleration from {_DELETION_GROUPS} groups of units"
    if len(good) < total:
        method += f" ({total - len(good)} undefined)"
    return Estimate(value, low, high, n, len(units), method, level, restriction)


def resamples_for(n: int) -> int:
    """Resamples drawn by default from `n` rows: 9,999, or as many as draw 6 million values, at least 999."""
    return min(RESAMPLES, max(_LEAST_RESAMPLES, _DRAWN_VALUES // max(n, 1)))


def bca_ends(value: float, draws: Array, deleted: Array, level: float) -> tuple[float, float] | None:
    """Ends of the BCa interval, or None where bias or acceleration are not defined.

    Args:
        value: the statistic of the sample.
        draws: its bootstrap distribution.
        deleted: its values with one unit left out.
        level: of confidence.
    """
    below = np.mean((draws < value) + 0.5 * (draws == value))
    gaps = deleted.mean() - deleted
    spread = float((gaps**2).sum())
    if not 0 < below < 1 or not spread > 0 or not np.isfinite(deleted).all():
        return None
    bias = stats.norm.ppf(below)
    acceleration = float((gaps**3).sum()) / (6 * spread**1.5)
    shifted = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    if not (1 - acceleration * shifted > 0).all():
        return None
    shares = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(draws, shares)
    return float(low), float(high)


def _by_units(kernel: Kernel, units: Units, weights: Array) -> Array:
    """Values of a kernel under weights of units, in chunks that fit in memory."""
    step = max(1, _CHUNK // len(units.of_row))
    chunks = (weights[at : at + step] for at in range(0, len(weights), step))
    if len(units) < len(units.of_row):
        chunks = (chunk[:, units.of_row] for chunk in chunks)
    return np.concatenate([kernel(chunk) for chunk in chunks])


# Kernels


def mean_kernel(values: Array) -> Kernel:
    """Weighted mean; NaN where all weights are 0."""
    return lambda weights: ratio(weights @ values, weights.sum(axis=1))


def trimmed_mean_kernel(values: Array, cut: float = 0.25) -> Kernel:
    """Mean without the lowest and the highest share `cut` of the rows, rounded down to whole rows."""
    order = np.argsort(values, kind="stable")

    def kernel(weights: Array) -> Array:
        upto = np.cumsum(weights[:, order], axis=1)
        total = upto[:, -1:]
        low = np.floor(cut * total)
        kept = np.clip(upto, low, total - low)
        kept = np.diff(kept, axis=1, prepend=low)
        return ratio(kept @ values[order], kept.sum(axis=1))

    return kernel


def median_kernel(values: Array) -> Kernel:
    """Median of rows with whole numbers as weights: the mean of the middle two where their number is even."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def kernel(weights: Array) -> Array:
        upto = np.cumsum(weights[:, order], axis=1)
        total = upto[:, -1:]
        # The first row at which more than half, and at which at least half, has been passed.
        middle = ordered[np.argmax(upto >= total / 2, axis=1)] + ordered[np.argmax(upto > total / 2, axis=1)]
        return np.where(total[:, 0] > 0, middle / 2, np.nan)

    return kernel


def tau_kernel(x: Indices, y: Indices, row_weights: Array | None = None) -> Kernel:
    """Kendall's tau-b from dense ranks; `row_weights`, of a sampling design, multiply those of the draws."""
    forms = pair_kernel(x, y, row_weights)

    def kernel(weights: Array) -> Array:
        concordance, scale = forms(weights)
        return ratio(concordance, scale)

    return kernel


def within_tau_kernel(
    x: Indices, y: Indices, groups: Sequence[Indices], row_weights: Array | None = None
) -> Kernel:
    """Kendall's tau-b within groups of rows: of pairs of one group, over the untied ones of all groups."""
    forms = [
        (rows, pair_kernel(x[rows], y[rows], None if row_weights is None else row_weights[rows]))
        for rows in groups
    ]

    def kernel(weights: Array) -> Array:
        concordance, scale = np.zeros(len(weights)), np.zeros(len(weights))
        for rows, form in forms:
            above, below = form(weights[:, rows])
            concordance += above
            scale += below
        return ratio(concordance, scale)

    return kernel


def pair_kernel(
    x: Indices, y: Indices, row_weights: Array | None = None
) -> Callable[[Array], tuple[Array, Array]]:
    """Both parts of tau-b: concordant minus discordant pairs, and the root of pairs untied in x times in y.

    A pair counts the product of its weights. The numerator is a quadratic form of the weights, so all draws
    are one matrix product; whole numbers keep it exact in single precision.
    """
    n = len(x)
    size = 2048
    dtype = np.float32 if row_weights is None else np.float64
    starts = range(0, n, size)

    def signs(i: int, j: int) -> NDArray[Any]:
        a, b = slice(i, i + size), slice(j, j + size)
        in_x = np.sign(x[a, None] - x[None, b]).astype(np.int8)
        in_y = np.sign(y[a, None] - y[None, b]).astype(np.int8)
        product: NDArray[Any] = (in_x * in_y).astype(dtype)
        return product

    whole = signs(0, 0) if n <= size else None
    untied_x, untied_y = _untied(x), _untied(y)

    def kernel(weights: Array) -> tuple[Array, Array]:
        own = weights if row_weights is None else weights * row_weights
        cast: NDArray[Any] = own.astype(dtype)
        concordance = np.zeros(len(weights))
        for i, j in itertools.combinations_with_replacement(starts, 2):
            block = whole if whole is not None else signs(i, j)
            left = cast[:, i : i + size] @ block
            part = np.einsum("bj,bj->b", left, cast[:, j : j + size], dtype=np.float64)
            concordance += part / 2 if i == j else part
        return concordance, np.sqrt(untied_x(own) * untied_y(own))

    return kernel


def _untied(ranks: Indices) -> Kernel:
    """Weight of the pairs of rows that differ in rank."""
    order, starts = ties(ranks)

    def kernel(weights: Array) -> Array:
        distinct = len(starts) == len(ranks)
        tied = weights if distinct else np.add.reduceat(weights[:, order], starts, axis=1)
        pairs = (weights.sum(axis=1) ** 2 - np.einsum("bj,bj->b", tied, tied)) / 2
        return np.where(pairs > 1e-9 * np.maximum(weights.sum(axis=1) ** 2, 1e-300), pairs, 0.0)

    return kernel


def ties(ranks: Indices) -> tuple[Indices, Indices]:
    """Order of the rows by rank, and where each rank starts in it."""
    order = np.argsort(ranks, kind="stable")
    return order, np.flatnonzero(np.diff(ranks[order], prepend=-1))


def rank_kernel(ranks: Indices) -> Kernel:
    """Mean ranks of the rows in each draw, shape (draws, rows), short of a constant; from dense ranks."""
    order, starts = ties(ranks)

    def kernel(weights: Array) -> Array:
        tied = np.add.reduceat(weights[:, order], starts, axis=1)
        middle: Array = (np.cumsum(tied, axis=1) - tied / 2)[:, ranks]
        return middle

    return kernel


def spearman_kernel(x: Indices, y: Indices, row_weights: Array | None = None) -> Kernel:
    """Spearman's rho from dense ranks: the correlation of the mean ranks within each draw."""
    in_x, in_y = rank_kernel(x), rank_kernel(y)

    def kernel(weights: Array) -> Array:
        own = weights if row_weights is None else weights * row_weights
        return _correlation(own, in_x(own), in_y(own))

    return kernel


def pearson_kernel(x: Array, y: Array, row_weights: Array | None = None) -> Kernel:
    """Pearson's r."""
    a, b = standardised(x), standardised(y)
    moments = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)

    def kernel(weights: Array) -> Array:
        own = weights if row_weights is None else weights * row_weights
        total, sum_a, sum_b, aa, bb, ab = (own @ moments).T
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_a, mean_b = sum_a / total, sum_b / total
            variances = np.maximum(aa / total - mean_a**2, 0), np.maximum(bb / total - mean_b**2, 0)
            return _bounded(ab / total - mean_a * mean_b, *variances)

    return kernel


def standardised(values: Array) -> Array:
    """Values less their mean, in standard deviations; zeros where they are all equal."""
    if not len(values):
        return values
    centred = values - values.mean()
    spread = float(np.abs(centred).max(initial=0))
    if spread <= 1e-12 * max(1e-300, float(np.abs(values).max(initial=0))):
        return np.zeros_like(values)
    scaled = centred / spread  # first, so that squares neither vanish nor overflow
    result: Array = scaled / math.sqrt(float((scaled**2).mean()))
    return result


def _correlation(weights: Array, a: Array, b: Array) -> Array:
    """Weighted correlation of rows that differ from draw to draw; all of shape (draws, rows)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights.sum(axis=1)
        a = (a - ((weights * a).sum(axis=1) / total)[:, None]) / total[:, None]
        b = (b - ((weights * b).sum(axis=1) / total)[:, None]) / total[:, None]
        mean = [(weights * product).sum(axis=1) / total for product in (a * b, a * a, b * b)]
    return _bounded(*mean)


def _bounded(covariance: Array, variance_a: Array, variance_b: Array) -> Array:
    defined = np.minimum(variance_a, variance_b) > 1e-12
    scale = np.sqrt(np.where(defined, variance_a * variance_b, 1.0))
    return np.where(defined, np.clip(covariance / scale, -1, 1), np.nan)


def ratio(above: Array, below: Array) -> Array:
    """Quotient, NaN where the divisor is not positive."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


# Permutation tests


@dataclass(frozen=True)
class Permutation:
    """Two-sided p-value of a permutation test, or the `restriction` why there is none."""

    p: float | None
    permutations: int
    """Permutations gone through: all there are if `exact`, else drawn at random."""

    exact: bool
    n_units: int
    restriction: str | None = None

    @property
    def method(self) -> str:
        """Name of the test, with the number of permutations."""
        if self.p is None:
            return "permutation test"
        kind = "exact permutation test, all" if self.exact else "permutation test,"
        return f"{kind} {count(self.permutations, 'permutation')} of {count(self.n_units, 'unit')}"


def permute_association(
    x: Array,
    y: Array,
    units: Units,
    *,
    kind: Literal["tau_b", "spearman", "pearson"] = "tau_b",
    resolution: float = RESOLUTION,
    draws: Draws = DRAWS,
) -> tuple[Permutation, ...]:
    """Tests that y is associated with the columns of x, exchanging units within their strata.

    The statistic looks only at pairs within a stratum, so a difference between strata is no association. The
    p-values hold for all columns together: each column is compared with the largest of all columns in each
    permutation (for one column, that is the plain test).

    Units of several rows are exchanged as wholes: the value of the side that is constant within units, or
    blocks of equally many rows.

    Args:
        x: shape (rows, columns).
        y: shape (rows,).
        units: what is exchanged, and the strata.
        kind: of association.
        resolution: of ranks.
        draws: number and seed of the permutations.

    Source: for the largest of several statistics, Westfall & Young (1993).
    """
    columns = int(x.shape[1])
    stratum = units.stratum[units.of_row]
    by_x = not _constant(y[:, None], units) and _constant(x, units)
    fixed, moved = (y[:, None], x) if by_x else (x, y[:, None])
    indices, exact = _exchanges(units, _constant(moved, units), draws)
    if len(indices) < 2:
        reason = "no two units can be exchanged, so there is no permutation test"
        return (Permutation(None, 0, False, len(units), reason),) * columns
    parts = [_associations(fixed, column, indices, stratum, kind, resolution) for column in moved.T]
    values = np.concatenate(parts, axis=1)
    largest: Array = np.abs(values).max(axis=1)[0 if exact else 1 :]
    # Sums in another order differ in the last bits; equal statistics must count as reached.
    reached: Indices = (largest[:, None] >= np.abs(values[0]) - 1e-12).sum(axis=0)
    p: Array = reached / len(largest) if exact else (reached + 1) / (len(largest) + 1)
    tests = [Permutation(float(value), len(largest), exact, len(units)) for value in p]
    for column in np.flatnonzero(~values.any(axis=0)):
        tests[column] = replace(tests[column], p=None, restriction="no untied pair to test")
    return tuple(tests)


def permute_weighted(
    x: Indices, y: Indices, row_weights: Array, units: Units, draws: Draws = DRAWS
) -> Permutation:
    """Test that weighted tau-b within strata is 0, exchanging y with its weight between units of a stratum.

    The statistic is the weighted difference of concordant and discordant pairs, over its standard error as
    the shares of the units in it give that, in each permutation anew. The test is exact where x is
    independent of y and weight together. Where the weights follow x, e.g. of a rule that stopped runs by it,
    the exchange takes them apart; the standard error makes up for that in samples that are not too small.

    Args:
        x, y: dense ranks, shape (rows,).
        row_weights: of the rows, above 0.
        units: what is exchanged, and the strata.
        draws: number and seed of the permutations.

    Source: DiCiccio & Romano (2017), "Robust Permutation Tests for Correlation and Regression Coefficients".
    """
    stratum = units.stratum[units.of_row]
    strata = [np.flatnonzero(stratum == label) for label in np.unique(stratum)]
    pairs = sum(len(rows) ** 2 for rows in strata)
    number = draws.permutations or permutations_for(pairs // _PAIRS_PER_VALUE)
    by_x = _constant(x[:, None].astype(np.float64), units)
    whole = by_x or _constant(np.stack([y, row_weights], axis=1), units)
    indices, exact = _exchanges(units, whole, replace(draws, permutations=number))
    if len(indices) < 2:
        reason = "no two units can be exchanged, so there is no permutation test"
        return Permutation(None, 0, False, len(units), reason)
    score = np.zeros(len(indices))
    share = np.zeros((len(indices), len(units)))
    of_unit = np.equal.outer(units.of_row, np.arange(len(units))).astype(np.float64)
    for rows in strata:
        in_x = np.sign(x[rows, None] - x[rows]).astype(np.float64)
        in_y = np.sign(y[rows, None] - y[rows]) * row_weights[rows, None] * row_weights[rows]
        fixed, moved = (in_y, in_x.ravel()) if by_x else (in_x, in_y.ravel())
        place = np.searchsorted(rows, indices[:, rows])
        step = max(1, _CHUNK // len(rows) ** 2)
        for at in range(0, len(indices), step):
            own = place[at : at + step]
            other = moved[own[:, :, None] * len(rows) + own[:, None, :]]
            each = np.einsum("ij,pij->pi", fixed, other)
            score[at : at + step] += each.sum(axis=1) / 2
            share[at : at + step] += each @ of_unit[rows]
    strength = np.abs(ratio(score, np.sqrt((share**2).sum(axis=1))))
    if not strength[0] >= 0:
        return Permutation(None, 0, False, len(units), "no untied pair to test")
    others = np.nan_to_num(strength[0 if exact else 1 :])
    reached = int((others >= strength[0] - 1e-9).sum())
    p = reached / len(others) if exact else (reached + 1) / (len(others) + 1)
    return Permutation(p, len(others), exact, len(units))


def permutations_for(n: int) -> int:
    """Permutations drawn by default for `n` rows: 10,000, fewer beyond 600 rows, at least 999."""
    return min(PERMUTATIONS, max(_LEAST_RESAMPLES, _DRAWN_VALUES // max(n, 1)))


def _constant(values: Array, units: Units) -> bool:
    """Whether the rows of each unit are alike in all columns."""
    first = np.unique(units.of_row, return_index=True)[1]
    return bool((values == values[first][units.of_row]).all())


def _exchanges(units: Units, constant: bool, draws: Draws) -> tuple[Indices, bool]:
    """Rows that take the place of each row, one permutation a line, the first as it is; whether it is all."""
    n = len(units.of_row)
    order = np.argsort(units.of_row, kind="stable")
    sizes = np.bincount(units.of_row)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(n, dtype=np.intp)
    place[order] = np.arange(n) - starts[units.of_row[order]]
    # Values that are constant within units can go to units of any size, others to those of the same size.
    alike = units.stratum * (n + 1) + (0 if constant else sizes)
    classes = [members for label in np.unique(alike) if len(members := np.flatnonzero(alike == label)) > 1]
    number = math.prod(math.factorial(len(members)) for members in classes)
    exact = number <= EXACT
    total = draws.permutations or permutations_for(n)
    moved = np.tile(np.arange(len(units)), (number if exact else 1 + total, 1))
    if exact:
        every = itertools.product(*(itertools.permutations(members) for members in classes))
        for row, parts in enumerate(every):
            for members, part in zip(classes, parts, strict=True):
                moved[row, members] = part
    else:
        draw = np.random.default_rng(draws.seed)
        for members in classes:
            moved[1:, members] = draw.permuted(np.tile(members, (total, 1)), axis=1)
    source = starts[moved][:, units.of_row] + (0 if constant else place)
    return order[source], exact


def _associations(
    fixed: Array, moved: Array, indices: Indices, stratum: Indices, kind: str, resolution: float
) -> Array:
    """Association within strata of each column of `fixed` with `moved` in each order, (orders, columns).

    Scaled by what no permutation changes, so that columns can be compared.
    """
    if kind == "tau_b":
        return _concordances(fixed, moved, indices, stratum, resolution)
    if kind == "spearman":
        fixed = np.stack([_within_ranks(column, stratum, resolution) for column in fixed.T], axis=1)
        moved = _within_ranks(moved, stratum, resolution)
    columns = np.stack([standardised(_centred(column, stratum)) for column in fixed.T], axis=1)
    other = standardised(_centred(moved, stratum))
    product: Array = other[indices] @ columns / len(moved)
    return product


def _concordances(fixed: Array, moved: Array, indices: Indices, stratum: Indices, resolution: float) -> Array:
    """Concordant minus discordant pairs within strata, in shares of the geometric mean of untied pairs."""
    y = dense_ranks(moved, resolution)
    kinds = int(y.max()) + 1
    parts = []
    for column in fixed.T:
        both = np.stack([stratum, dense_ranks(column, resolution)])
        x = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
        untied = _within(x, stratum) * _within(stratum * kinds + y, stratum)
        step = max(1, _CHUNK // len(y))
        chunks = (x * kinds + y[indices[at : at + step]] for at in range(0, len(indices), step))
        found = np.concatenate([_concordance(chunk, kinds, stratum) for chunk in chunks])
        parts.append(found / math.sqrt(untied) if untied else np.zeros(len(indices)))
    return np.stack(parts, axis=1)


def _within(ranks: Indices, stratum: Indices) -> int:
    """Pairs of a stratum that differ in rank; ranks differ between strata."""
    return int((np.bincount(stratum) ** 2).sum() - (np.bincount(ranks) ** 2).sum()) // 2


def _concordance(keys: Indices, kinds: int, stratum: Indices) -> Array:
    """Concordant minus discordant pairs within strata, for each row of keys x * kinds + y.

    Ranks x rise from stratum to stratum; y is made to do so, too, hence no pair of two strata is discordant.
    """
    keys = np.sort(keys, axis=1)
    y = keys % kinds + np.sort(stratum) * kinds
    tied = [_tied(found) for found in (keys // kinds, np.sort(y, axis=1), keys)]
    pairs = int((np.bincount(stratum) * (np.bincount(stratum) - 1)).sum()) // 2
    concordance: Array = pairs - tied[0] - tied[1] + tied[2] - 2.0 * _inversions(y)
    return concordance


def _tied(ordered: Indices) -> Indices:
    """Pairs of equal values in each row of sorted values."""
    at = np.arange(ordered.shape[1])
    starts = np.where(np.diff(ordered, axis=1, prepend=-1) != 0, at, 0)
    pairs: Indices = (at - np.maximum.accumulate(starts, axis=1)).sum(axis=1)
    return pairs


def _inversions(values: Indices) -> Indices:
    """Pairs in each row whose first value is the larger, counted while merging sorted halves."""
    rows, n = values.shape
    length = 1 << max(n - 1, 1).bit_length()
    top = int(values.max()) + 1
    found = np.full((rows, length), top, dtype=np.int32 if top < 2**30 else np.int64)
    found[:, :n] = values
    total = np.zeros(rows, dtype=np.intp)
    half = 1
    while half < length:
        # The last bit tells the halves apart and puts the left one first among equals.
        halves = found.reshape(rows, -1, 2 * half) * 2
        halves[:, :, half:] += 1
        halves.sort(axis=2)
        passed = (halves & 1 == 0) @ np.arange(2 * half) - half * (half - 1) // 2
        total += passed.sum(axis=1)
        found = halves // 2
        half *= 2
    return total


def _within_ranks(values: Array, stratum: Indices, resolution: float) -> Array:
    rounded = pd.Series(np.rint(values / resolution))
    return np.asarray(rounded.groupby(stratum).rank(), dtype=np.float64)


def _centred(values: Array, stratum: Indices) -> Array:
    series = pd.Series(values)
    return np.asarray(series - series.groupby(stratum).transform("mean"), dtype=np.float64)
