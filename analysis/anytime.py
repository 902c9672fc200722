"""Error against end-to-end cost: what a method has found by then, stopped and failed runs paid for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from analysis import resample
from analysis.resample import DRAWS, ENOUGH_UNITS, Array, Draws, Estimate, Units, count, missing


@dataclass(frozen=True, eq=False)
class Trace:
    """Test error of the incumbent of one run of a method, a step function of the cost so far.

    The incumbent is the trial of least validation error so far: chosen on validation, reported on test.
    """

    cost: Array
    """At which the incumbent changes, ascending; the first is when there is one at all."""

    error: Array
    """Its test error from then on."""

    total: float
    """Cost of the whole run, to which the last incumbent is known."""

    n_trials: int
    n_without: int
    """Trials that cost and gave no error: stopped, failed, or not ended."""

    def __post_init__(self) -> None:
        if len(self.cost) != len(self.error) or (np.diff(self.cost) < 0).any():
            raise ValueError("cost must ascend and have one error each; build traces with `incumbents`")
        if len(self.cost) and not self.cost[-1] <= self.total:
            raise ValueError(
                f"total={self.total} is less than the cost {self.cost[-1]} of the last incumbent"
            )

    def at(self, grid: Array) -> Array:
        """Error at these costs: NaN before the first incumbent, and beyond the end of the run."""
        steps = np.searchsorted(self.cost, grid, side="right") - 1
        if not len(self.cost):
            return np.full(len(grid), np.nan)
        known = (steps >= 0) & (grid <= self.total * (1 + 1e-12))
        return np.where(known, self.error[np.maximum(steps, 0)], np.nan)


def incumbents(cost: ArrayLike, valid_error: ArrayLike, test_error: ArrayLike) -> Trace:
    """Trace of one run from its trials in the order in which they ended.

    Args:
        cost: of each trial, end to end: tuning, search, retraining, selection; stopped and failed ones, too.
        valid_error: NaN for trials that ended without one; they are paid for and never chosen.
        test_error: NaN likewise.

    Raises:
        ValueError: lengths differ, there is no trial, or a cost is negative or not finite.
    """
    price, valid, test = (
        np.asarray(side, dtype=np.float64).reshape(-1) for side in (cost, valid_error, test_error)
    )
    if not len(price) == len(valid) == len(test) or not len(price):
        raise ValueError(f"lengths {len(price)}, {len(valid)}, {len(test)} must be equal, and at least 1")
    if not np.isfinite(price).all() or (price < 0).any():
        raise ValueError(
            "a cost is missing or negative; without the cost of every trial there is no end-to-end cost"
        )
    spent = np.cumsum(price)
    known = np.isfinite(valid) & np.isfinite(test)
    best, at, error = math.inf, [], []
    for row in np.flatnonzero(known):
        if valid[row] < best:
            best = float(valid[row])
            at.append(spent[row])
            error.append(test[row])
    return Trace(np.array(at), np.array(error), float(spent[-1]), len(price), int((~known).sum()))


@dataclass(frozen=True, eq=False)
class AnytimeCurve:
    """Middle of several runs' incumbents over cost, with a pointwise band; NaN where too few have one."""

    cost: Array
    middle: Array
    low: Array
    high: Array
    at_risk: Array
    """Runs that have an incumbent at each cost."""

    n: int
    level: float
    method: str
    restriction: str | None


def anytime(
    traces: Sequence[Trace],
    *,
    statistic: Literal["median", "iqm", "mean"] = "iqm",
    grid: ArrayLike | None = None,
    points: int = 200,
    draws: Draws = DRAWS,
) -> AnytimeCurve:
    """Curve of a method over its independent runs, on a common grid of costs.

    It is given where every run has an incumbent and none has ended: where only some have one, their middle
    would be that of the fast ones.

    Args:
        traces: one per run.
        statistic: middle of the runs.
        grid: costs; by default `points` in equal ratios, from the first incumbent to the shortest run's end.
        points: of the default grid.
        draws: of the band, a percentile bootstrap of runs at each cost by itself.

    Raises:
        ValueError: there is no trace, or the statistic is unknown.
    """
    if not traces:
        raise ValueError("traces is empty; an anytime curve needs at least one run")
    kernels = {
        "median": resample.median_kernel,
        "iqm": resample.trimmed_mean_kernel,
        "mean": resample.mean_kernel,
    }
    if statistic not in kernels:
        raise ValueError(f"statistic={statistic!r} is unknown; use one of {', '.join(kernels)}")
    costs = _grid(traces, points) if grid is None else np.asarray(grid, dtype=np.float64).reshape(-1)
    table = np.stack([trace.at(costs) for trace in traces])
    at_risk = np.isfinite(table).sum(axis=0)
    n = len(traces)
    middle, low, high = (np.full(len(costs), np.nan) for _ in range(3))
    total = draws.resamples or resample.resamples_for(n * max(len(costs), 1))
    weights = Units.of(n).counts(total, np.random.default_rng(draws.seed))
    for column in np.flatnonzero(at_risk == n):
        kernel = kernels[statistic](table[:, column])
        middle[column] = kernel(np.ones((1, n)))[0]
        if n >= ENOUGH_UNITS:
            ends = np.quantile(kernel(weights), [(1 - draws.level) / 2, (1 + draws.level) / 2])
            low[column], high[column] = min(ends[0], middle[column]), max(ends[1], middle[column])
    method = f"{statistic} of {count(n, 'run')}"
    notes = []
    if n >= ENOUGH_UNITS:
        method += f", pointwise percentile bootstrap, {count(total, 'resample')}"
    else:
        notes.append(f"{count(n, 'run')}, fewer than {ENOUGH_UNITS}: no band")
    if not (at_risk == n).any():
        notes.append("at no cost do all runs have an incumbent: no curve")
    return AnytimeCurve(costs, middle, low, high, at_risk, n, draws.level, method, "; ".join(notes) or None)


def area(traces: Sequence[Trace], until: float, *, log: bool = False, draws: Draws = DRAWS) -> Estimate:
    """Mean error over the cost up to `until`: area under the step functions, over its width.

    It starts where the last of the runs has its first incumbent, as the method says. On a log axis if `log`.
    """
    name = f"mean error over {'log ' if log else ''}cost"
    late = [trace for trace in traces if not len(trace.cost) or trace.total < until * (1 - 1e-12)]
    start = max((float(trace.cost[0]) for trace in traces if len(trace.cost)), default=math.inf)
    if not traces or late or not start < until or (log and start <= 0):
        why = f"not all runs have an incumbent and reach the cost {until:g}: no area"
        return missing(name, why, len(traces), len(traces), draws.level)

    def scale(values: Array) -> Array:
        return np.log(values) if log else values

    areas = []
    for trace in traces:
        inside = trace.cost[(trace.cost > start) & (trace.cost < until)]
        edges = np.concatenate([[start], inside, [until]])
        widths = np.diff(scale(edges))
        areas.append(float((trace.at(edges[:-1]) * widths).sum() / widths.sum()))
    units = Units.of(len(areas))
    return resample.estimate(
        resample.mean_kernel(np.array(areas)), units, f"{name} from {start:g} to {until:g}", draws
    )


@dataclass(frozen=True, eq=False)
class TimeToTarget:
    """Kaplan-Meier estimate of the cost at which runs first reach a target error."""

    cost: Array
    """At which runs reached it."""

    missing: Array
    """Estimated share of runs that have not reached it by then."""

    low: Array
    high: Array
    """Ends of the pointwise interval of that share, by Greenwood's variance of log(-log)."""

    median: Estimate
    """Cost by which half the runs reach it."""

    n: int
    n_reached: int
    n_censored: int
    """Runs that ended without reaching it."""

    level: float


def time_to_target(traces: Sequence[Trace], target: float, level: float = 0.95) -> TimeToTarget:
    """Cost to an incumbent of at most the target error; runs that never reach it are censored at their end.

    Source: Kaplan & Meier (1958); interval of the median by Brookmeyer & Crowley (1982).
    """
    resample.check_level(level)
    if not traces:
        raise ValueError("traces is empty; a time to target needs at least one run")
    times, reached = [], []
    for trace in traces:
        hits = np.flatnonzero(trace.error <= target)
        times.append(float(trace.cost[hits[0]]) if len(hits) else trace.total)
        reached.append(bool(len(hits)))
    time, hit = np.array(times), np.array(reached)
    events = np.unique(time[hit])
    at_risk = (time >= events[:, None]).sum(axis=1)
    deaths = ((time == events[:, None]) & hit).sum(axis=1)
    survival = np.cumprod(1 - deaths / at_risk)
    low, high = _greenwood(survival, deaths, at_risk, level)
    return TimeToTarget(
        events,
        survival,
        low,
        high,
        _median(events, survival, low, high, hit, level),
        len(time),
        int(hit.sum()),
        int((~hit).sum()),
        level,
    )


def _greenwood(survival: Array, deaths: Array, at_risk: Array, level: float) -> tuple[Array, Array]:
    inside = (survival > 0) & (survival < 1)
    s = np.where(inside, survival, 0.5)
    left = np.maximum(at_risk - deaths, 1)
    variance = np.cumsum(np.where(at_risk > deaths, deaths / (at_risk * left), 0.0))
    margin = float(special.ndtri((1 + level) / 2)) * np.sqrt(variance) / np.abs(np.log(s))
    # Where all or none have reached it, the variance is not defined.
    low = np.where(inside, s ** np.exp(margin), np.nan)
    high = np.where(inside, s ** np.exp(-margin), np.nan)
    return low, high


def _median(events: Array, survival: Array, low: Array, high: Array, hit: Array, level: float) -> Estimate:
    n = len(hit)
    name = "median cost to the target, Kaplan-Meier"
    half = np.flatnonzero(survival <= 0.5 + 1e-12)
    if not len(half):
        share = f"{int(hit.sum())} of {count(n, 'run')} reached the target: no median"
        return missing(name, share, n, n, level)
    value = float(events[half[0]])
    first, last = np.flatnonzero(low <= 0.5), np.flatnonzero(high <= 0.5)
    if n < ENOUGH_UNITS or not len(first) or not len(last):
        why = f"the interval of the share does not cross one half with {count(n, 'run')}: no interval"
        return Estimate(value, None, None, n, n, name, level, why)
    ends = min(float(events[first[0]]), value), max(float(events[last[0]]), value)
    return Estimate(value, *ends, n, n, f"{name}, log(-log) interval", level)


def _grid(traces: Sequence[Trace], points: int) -> Array:
    end = min(trace.total for trace in traces)
    start = min((float(trace.cost[0]) for trace in traces if len(trace.cost)), default=end)
    if not 0 < start < end:
        return np.array([end])
    grid: Array = np.geomspace(start, end, points)
    return grid
