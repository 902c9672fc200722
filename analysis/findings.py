"""What a sample shows: every number of a report with its interval, or with the reason why it has none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import (
    aggregate,
    agreement,
    anytime,
    compare,
    mixed,
    pruning,
    resample,
    selection,
    summary,
)
from analysis.aggregate import CriticalDifference, Profile
from analysis.agreement import ArmAgreement
from analysis.associations import (
    FEWEST,
    EpochCurve,
    MetricFinding,
    Unanswered,
    draws_for,
    epoch_curves,
    family_note,
    metric_findings,
    swept,
)
from analysis.compare import Comparison, Equivalence, PairedDifference, RelativeImprovement
from analysis.limits import (
    FAILED,
    Counts,
    Flow,
    counts_of,
    doubt,
    flow_of,
    limits,
    stopped_retrainings,
    together,
    told,
    unlike,
)
from analysis.loaders import Sample
from analysis.mixed import Components, FactorSweep
from analysis.resample import Array, Draws, Estimate

_SEQUENCES = 399


@dataclass(frozen=True)
class Versus:
    """One arm held against another, in points of test error, in all ways a reviewer may ask for."""

    claim: summary.Claim
    flow: Flow
    comparison: Comparison | None
    """This and all that follows is None where the arms allow no verdict."""

    paired: PairedDifference | None
    """By shared search seed and split, where every seed of both arms is shared."""

    equivalence: Equivalence | None
    improvement: RelativeImprovement | None
    """Over the random baseline."""


@dataclass(frozen=True)
class ArmAnytime:
    """Error of an arm's incumbent over its end-to-end cost, as other studies of its size would see it."""

    arm: str
    n: int
    hours: Array
    middle: Array
    low: Array
    high: Array
    total_hours: float
    n_without: int
    area: Estimate | None
    """Mean error over the hours in which all arms have an incumbent; None where there are no such hours."""

    target: float | None
    """Mean error of the reference arm, or of the random one, in percent."""

    to_target: tuple[float | None, float | None, float | None]
    """Hours by which 2.5, 50 and 97.5 % of the sequences have reached it (Kaplan-Meier); None if fewer do."""

    n_reached: int
    n_sequences: int


@dataclass(frozen=True)
class Findings:
    """All that a report says in numbers."""

    counts: Counts
    arms: tuple[dict[str, Any], ...]
    """Rows of `summary.summarise`."""

    versus: tuple[Versus, ...]
    doubts: Mapping[str, str]
    """By arm, why its finished runs are no fair sample of independent runs, or were not measured alike."""

    unlike: str | None
    """Why nothing is pooled over arms or compared between them, if so."""

    shared: str | None
    """That arms without a doubt of their own share retrainings, so that nothing rests on all at once."""

    metrics: tuple[MetricFinding, ...]
    unanswered: tuple[Unanswered, ...]
    family: str
    """How the tests of the metrics were adjusted, and why so."""

    curves: tuple[EpochCurve, ...]
    agreement: tuple[ArmAgreement, ...]
    components: Components
    ceiling: Estimate
    replicates: float
    sweep: FactorSweep | None
    critical: CriticalDifference | str
    """Over seeds that all arms share, or the reason why there is none."""

    profiles: Mapping[str, Profile]
    aggregates: Mapping[str, Mapping[str, Estimate]]
    improvement: Mapping[str, Estimate]
    """Probability that a run of an arm beats one of the baseline."""

    anytime: tuple[ArmAnytime, ...]
    no_anytime: Mapping[str, str]
    """By arm, why it has no anytime curve; for all of them under `all arms`."""

    hypervolume: Estimate | None
    random_search: Mapping[str, float]
    """Of a whole space: expected error, in percent, of the best of so many random networks."""

    spread: float | None
    """Standard deviation of the error between runs of one arm, percentage points."""

    spread_df: int
    failures: Mapping[str, float | None]
    """Adjusted p by field of the config that failing depends on it."""

    restrictions: tuple[str, ...]
    draws: Draws
    draws_note: str


def find(sample: Sample, *, pool: bool = False) -> Findings:
    """All findings of a sample.

    Args:
        sample: runs or architectures.
        pool: whether rows measured under different protocols may be thrown together.

    Raises:
        ValueError: `primary_metrics` in study.json is no list of names.
    """
    sample = replace(sample, tables=summary.pooled(sample.tables)) if pool else sample
    draws, note = draws_for(sample)
    apart = unlike(sample)
    doubts = {arm: why for arm in sample.tables.arms if (why := doubt(sample, arm))}
    metrics, unanswered, fewer = metric_findings(sample, draws)
    components = _components(sample)
    replicates = max(len(sample.finals) / max(sample.finals["trial_id"].nunique(), 1), 1.0)
    between_runs, df = spread(sample)
    normal = _normalised(sample)
    baseline = sample.tables.baseline
    curves, no_curves = _anytime(sample)
    return Findings(
        counts=counts_of(sample),
        arms=tuple(
            {str(k): v for k, v in row.items()} for row in summary.summarise(sample.tables).to_dict("records")
        ),
        versus=_versus(sample, draws),
        doubts=doubts,
        unlike=apart,
        shared=together(sample, [arm for arm in sample.tables.arms if arm not in doubts]),
        metrics=metrics,
        unanswered=unanswered,
        family=family_note(metrics, unanswered),
        curves=epoch_curves(sample, metrics, draws) if apart is None else (),
        agreement=agreement.of_arms(sample.tables, draws) if sample.kind == "study" else (),
        components=components,
        ceiling=mixed.noise_ceiling(components.icc, replicates),
        replicates=replicates,
        sweep=_sweep(sample),
        critical=_critical(sample),
        profiles=_profiles(normal, draws),
        aggregates={
            arm: {
                name: aggregate.aggregate({"study": scores}, name, draws=draws)
                for name in ("iqm", "mean", "optimality_gap")
            }
            for arm, scores in normal.items()
        },
        improvement={
            arm: aggregate.probability_of_improvement(
                {"study": scores}, {"study": normal[baseline]}, draws=draws
            )
            for arm, scores in normal.items()
            if baseline in normal and arm != baseline
        },
        anytime=curves,
        no_anytime=no_curves,
        hypervolume=hypervolume(sample, draws),
        random_search=_random_search(sample),
        spread=between_runs,
        spread_df=df,
        failures=_failures(sample, draws),
        restrictions=tuple(limits(sample)),
        draws=draws,
        draws_note=f"{note} {fewer}".rstrip(),
    )


# Arms


def percent(sample: Sample, arm: str) -> Array:
    """Final errors of the runs of an arm, in percent."""
    mine = sample.error[sample.trials["arm"] == arm].dropna()
    return 100 * np.asarray(mine, dtype=np.float64)


def _versus(sample: Sample, draws: Draws) -> tuple[Versus, ...]:
    found = []
    for claim in summary.judged(sample.tables):
        a, b = percent(sample, claim.arm), percent(sample, claim.other)
        rows = sample.trials["arm"].isin([claim.arm, claim.other])
        flow = flow_of(sample.trials.loc[rows, "status"], len(a) + len(b))
        if claim.difference is None or claim.doubt:
            found.append(Versus(claim, flow, None, None, None, None))
            continue
        random = claim.other == sample.tables.baseline and (100 - b).mean() > 0
        found.append(
            Versus(
                claim,
                flow,
                compare.compare_arms(a, b, draws),
                _paired(sample, claim.arm, claim.other, draws),
                compare.equivalence(a, b),
                compare.relative_improvement_interval(100 - a, 100 - b, draws) if random else None,
            )
        )
    return tuple(found)


def _paired(sample: Sample, arm: str, other: str, draws: Draws) -> PairedDifference | None:
    table = by_seed(sample, (arm, other))
    if isinstance(table, str) or not {arm, other} <= set(table.columns):
        return None
    pairs = table[[arm, other]].dropna()
    whole = len(pairs) == table[arm].notna().sum() == table[other].notna().sum()
    return compare.paired_difference(pairs[arm], pairs[other], draws) if whole and len(pairs) > 1 else None


def by_seed(sample: Sample, arms: Sequence[str] | None = None) -> pd.DataFrame | str:
    """Errors in percent, one row per search seed, one column per arm; or the reason why there is no table.

    Args:
        sample: runs.
        arms: whose doubts the caller answers for; without them, all that are a fair sample of independent
            runs and were measured alike.
    """
    if "search_seed" not in sample.trials:
        return "no search seeds were recorded"
    if sample.tables.study.get("joint"):
        return "configurations were chosen one in view of another, so their seeds are no replicates"
    doubts = {arm: why for arm in sample.tables.arms if arms is None and (why := doubt(sample, arm))}
    kept = [arm for arm in (arms or sample.tables.arms) if arm not in doubts]
    trials = sample.trials.assign(error=100 * sample.error)
    used = trials[trials["arm"].isin(kept)].dropna(subset=["error", "search_seed"])
    if used.empty:
        return told(doubts) or "no run with a search seed has a final error"
    repeated = used.loc[used.duplicated(["arm", "search_seed"]), "arm"].unique()
    if len(repeated):
        return f"search seeds repeat within an arm ({', '.join(repeated)})"
    table = used.pivot(index="search_seed", columns="arm", values="error")
    return table[[arm for arm in sample.tables.arms if arm in table]].sort_index()


def _critical(sample: Sample) -> CriticalDifference | str:
    """Ranks over seeds that all arms share, of arms that are independent runs and measured alike."""
    table = by_seed(sample)
    if isinstance(table, str):
        return table
    if len(table.columns) < 2:
        lost = told({arm: why for arm in sample.tables.arms if (why := doubt(sample, arm))})
        return f"fewer than two arms have usable runs{': ' if lost else ''}{lost}"
    if why := together(sample, table.columns.tolist()):
        return why
    whole = table.dropna()
    if whole.empty:
        return "no search seed is shared by all arms"
    return aggregate.critical_difference(
        {str(arm): whole[arm].to_numpy() for arm in whole}, blocks="paired seeds"
    )


def _normalised(sample: Sample) -> dict[str, Array]:
    """Scores by arm: 0 the mean random architecture, 1 the best run; of arms that are independent runs."""
    baseline = sample.tables.baseline
    errors = {arm: percent(sample, arm) for arm in sample.tables.arms if not doubt(sample, arm)}
    errors = {arm: values for arm, values in errors.items() if len(values)}
    if baseline not in errors or len(errors) < 2 or together(sample, list(errors)):
        return {}
    random, best = float(-errors[baseline].mean()), -min(float(values.min()) for values in errors.values())
    if best - random <= resample.RESOLUTION:
        return {}
    return {arm: aggregate.normalised(-values, random, best) for arm, values in errors.items()}


def _profiles(normal: Mapping[str, Array], draws: Draws) -> dict[str, Profile]:
    if not normal:
        return {}
    low = min(float(scores.min()) for scores in normal.values())
    grid = np.linspace(max(low, -2.0) - 0.05, 1.0, 101)
    return {
        arm: aggregate.performance_profile({"study": scores}, grid, draws=draws)
        for arm, scores in normal.items()
    }


def spread(sample: Sample) -> tuple[float | None, int]:
    """Pooled standard deviation within arms of independent runs, and its degrees of freedom.

    Arms may differ in how they were measured, runs of one arm may not. An error that stands in several arms,
    as they found one network that was retrained once, counts in the first of them.
    """
    doubts, seen, groups = spread_doubts(sample), set[str](), []
    for arm in (arm for arm in sample.tables.arms if arm not in doubts):
        runs = sample.trials[(sample.trials["arm"] == arm) & sample.error.notna()]
        ids = runs["retraining_id"] if "retraining_id" in runs else runs["trial_id"]
        values = 100 * runs.loc[~ids.isin(seen), "test_error"].to_numpy(dtype=np.float64)
        seen |= set(ids.dropna())
        groups += [values] if len(values) > 1 else []
    df = sum(len(values) - 1 for values in groups)
    if not df:
        return None, 0
    total = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return math.sqrt(total / df), df


def spread_doubts(sample: Sample) -> dict[str, str]:
    """By arm with finished runs, why these say nothing of the spread between independent runs, if so."""
    tables = sample.tables
    used = [arm for arm in tables.arms if len(tables.finals(arm))]
    # Where retrainings of one search differ, its row does not tell, and no arm is known to be measured alike.
    hidden = unlike(sample) if summary.differing(tables.finals()) != sample.protocols else None
    found = {arm: summary.dependence(tables, arm) or summary.protocols(tables, arm) or hidden for arm in used}
    return {arm: why for arm, why in found.items() if why}


def _sweep(sample: Sample) -> FactorSweep | None:
    """Analysis of variance over the axes, of runs that have them all, so without the random arm."""
    names = swept(sample)
    if not names:
        return None
    rows = sample.trials[names].notna().all(axis=1) & sample.error.notna()
    arms = sample.trials.loc[rows, "arm"].unique().tolist()
    if rows.sum() < 4 or unlike(sample) or together(sample, arms):
        return None
    factors = {name.removeprefix("axes."): sample.trials.loc[rows, name].tolist() for name in names}
    seeds = sample.trials.loc[rows, "search_seed"] if "search_seed" in sample.trials else None
    usable = seeds is not None and seeds.notna().all() and seeds.nunique() > 1
    response = (100 * sample.error[rows]).to_numpy()
    return mixed.factor_sweep(response, factors, seeds.tolist() if usable and seeds is not None else None)


def _components(sample: Sample) -> Components:
    """Variance between networks and between the trainings of one."""
    if apart := unlike(sample):
        return Components(None, None, resample.missing("ICC", apart), None)
    unit_of = dict(zip(sample.trials["trial_id"], sample.units, strict=True))
    trainings = sample.finals.assign(unit=sample.finals["trial_id"].map(unit_of))
    # One retraining may stand for several searches that found its network.
    trainings = trainings.drop_duplicates(["unit", "retrain_seed", "test_error"])
    found = mixed.components(100 * trainings["test_error"], trainings["unit"].tolist())
    stopped = (sample.trials["status"] == "pruned").any() or stopped_retrainings(sample)
    return replace(found, icc=found.icc.restricted("of trainings that no rule stopped" if stopped else None))


def _failures(sample: Sample, draws: Draws) -> dict[str, float | None]:
    failed = sample.trials["status"].isin(FAILED[:-1])
    fields_ = {name: sample.trials[name].astype(str).tolist() for name in ("arm", *swept(sample))}
    if not failed.any():
        return {}
    _, family = pruning.failure_dependence(failed.to_numpy(), fields_, draws=draws)
    return dict(zip(family.names, family.adjusted, strict=True))


# Cost


def costs(sample: Sample) -> "pd.Series[float]":
    """Hours of search and retraining of each trial, stopped and failed ones included; NaN if not recorded."""
    epochs = sample.tables.epochs
    spent = epochs[epochs["key"] == "seconds"].groupby("trial_id", observed=True)["value"].sum()
    spent.index = spent.index.astype(str)
    return spent.reindex(sample.trials["trial_id"]).set_axis(sample.trials.index).astype(float) / 3600


def _anytime(sample: Sample) -> tuple[tuple[ArmAnytime, ...], dict[str, str]]:
    """Curves of arms over runs drawn with replacement, and why other arms have none.

    Stopped runs are drawn with the others, and paid for; runs that depend on one another cannot be drawn.
    """
    hours = costs(sample)
    if sample.kind != "study":
        return (), {"all arms": "networks of a table are not found one after the other"}
    if apart := unlike(sample):
        return (), {"all arms": apart}
    lost: dict[str, str] = {}
    priced: dict[str, tuple[Array, Array, list[anytime.Trace]]] = {}
    for arm in sample.tables.arms:
        rows = sample.trials[(sample.trials["arm"] == arm) & hours.notna()].index
        price: Array = np.asarray(hours[rows], dtype=np.float64)
        test: Array = 100 * np.asarray(sample.error[rows], dtype=np.float64)
        valid = sample.trials.reindex(columns=["valid_error"]).loc[rows, "valid_error"].to_numpy(dtype=float)
        if why := summary.dependence(sample.tables, arm, stopped=False):
            lost[arm] = why
        elif not price.sum() > 0:
            lost[arm] = "no seconds were recorded"
        elif (n := int(np.isfinite(test).sum())) < 2:
            lost[arm] = f"{resample.count(n, 'run')} with a test error and seconds, fewer than 2"
        elif not np.isfinite(valid[np.isfinite(test)]).all():
            lost[arm] = "not all of its runs have a validation error"
        if arm in lost:
            continue
        draw = np.random.default_rng(0)
        orders = [draw.integers(0, len(rows), len(rows)) for _ in range(_SEQUENCES)]
        traces = [anytime.incumbents(price[each], valid[each], test[each]) for each in orders]
        priced[arm] = price, test, traces
    tables = {arm: _sequences(traces, float(price.sum())) for arm, (price, _, traces) in priced.items()}
    starts = [float(grid[known][0]) for grid, _, known in tables.values() if known.any()]
    start = max(starts) if starts and len(starts) == len(tables) else math.inf
    end = min((float(price.sum()) for price, _, _ in priced.values()), default=0.0)
    target = _target(sample)
    found = []
    for arm, (price, test, traces) in priced.items():
        grid, table, known = tables[arm]
        low, middle, high = np.full((3, len(grid)), np.nan)
        if known.any():
            low[known], middle[known], high[known] = np.nanquantile(
                table[:, known], [0.025, 0.5, 0.975], axis=0
            )
        reached = None if target is None else anytime.time_to_target(traces, target)
        found.append(
            ArmAnytime(
                arm=arm,
                n=len(price),
                hours=grid,
                middle=middle,
                low=low,
                high=high,
                total_hours=float(price.sum()),
                n_without=int((~np.isfinite(test)).sum()),
                area=_area(traces, start, end, len(price)),
                target=target,
                to_target=(None, None, None) if reached is None else _by_hours(reached),
                n_reached=0 if reached is None else reached.n_reached,
                n_sequences=len(traces),
            )
        )
    return tuple(found), lost


def _sequences(traces: Sequence[anytime.Trace], total: float) -> tuple[Array, Array, Any]:
    """Grid of hours, error of each sequence on it, and where 95 % of the sequences have an incumbent."""
    grid = np.linspace(0, total, 121)[1:]
    table = np.stack([_at(trace, grid) for trace in traces])
    return grid, table, np.isfinite(table).mean(axis=0) > 0.95


def _at(trace: anytime.Trace, grid: Array) -> Array:
    """Error of the incumbent, which stays what it is when the sequence has ended."""
    return trace.at(np.minimum(grid, trace.total))


def _area(traces: Sequence[anytime.Trace], start: float, end: float, n: int) -> Estimate | None:
    """Mean error from hour `start` to `end` over the sequences that have an incumbent by then."""
    if not start < end:
        return None
    areas = np.stack([_at(trace, np.linspace(start, end, 401)) for trace in traces]).mean(axis=1)
    areas = areas[np.isfinite(areas)]
    if not len(areas) or np.ptp(areas) < resample.RESOLUTION:
        return None
    low, middle, high = np.quantile(areas, [0.025, 0.5, 0.975]).tolist()
    method = f"mean error from {start:.3g} to {end:.3g} hours; quantiles of {len(areas)} sequences of runs"
    return Estimate(middle, low, high, n, n, method)


def _target(sample: Sample) -> float | None:
    """Mean error of the reference arm in percent, of the random arm where there is no reference."""
    for arm in (sample.tables.reference, sample.tables.baseline):
        if arm is not None and len(errors := percent(sample, arm)):
            return float(errors.mean())
    return None


def _by_hours(found: anytime.TimeToTarget) -> tuple[float | None, float | None, float | None]:
    """Hours by which 2.5, 50 and 97.5 % have reached the target, None where fewer ever do."""

    def by(share: float) -> float | None:
        enough = np.flatnonzero(found.missing <= 1 - share)
        return float(found.cost[enough[0]]) if len(enough) else None

    return by(0.025), by(0.5), by(0.975)


def _random_search(sample: Sample) -> dict[str, float]:
    """Expected error of the best of 1, 10, ... random networks of a whole space, in percent."""
    errors = 100 * sample.error.dropna().to_numpy(dtype=np.float64)
    if sample.kind != "ground truth" or unlike(sample):
        return {}
    counts = [10**power for power in range(4) if 10**power <= len(errors)]
    return {f"{n:,}": selection.expected_best(errors, n, lowest=True) for n in counts}


def pareto(sample: Sample) -> pd.DataFrame:
    """Error in percent and size of each row that has both, and whether no other row is smaller and no worse.

    The front is that of the validation error where it is known: fronts chosen on test flatter themselves.
    """
    key = (
        "valid_error"
        if "valid_error" in sample.trials and sample.trials["valid_error"].notna().any()
        else "test_error"
    )
    table = sample.trials.assign(error=100 * sample.trials[key].where(sample.error.notna()))
    if "params_m" not in table or unlike(sample):
        return pd.DataFrame(columns=["trial_id", "arm", "params_m", "error", "measure", "front"])
    table = table.dropna(subset=["error", "params_m"]).sort_values(["params_m", "error", "trial_id"])
    found = table[["trial_id", "arm", "params_m", "error"]].assign(measure=key.replace("_", " "))
    found["front"] = table["error"] < table["error"].cummin().shift(fill_value=np.inf)
    return found


def hypervolume(sample: Sample, draws: Draws) -> Estimate | None:
    """Share of the box of error and size, up to the worst of both, that the front dominates."""
    table = pareto(sample)
    if len(table) < FEWEST or table["params_m"].nunique() < 2 or table["error"].nunique() < 2:
        return None
    size, error = (table[name].to_numpy(dtype=np.float64) for name in ("params_m", "error"))
    x, y = ((values - values.min()) / np.ptp(values) for values in (size, error))
    width = np.diff(np.append(x, 1.0))

    def kernel(weights: Array) -> Array:
        best = np.minimum.accumulate(np.where(weights > 0, y, 1.0), axis=1)
        volume: Array = (1 - best) @ width
        return volume

    units = resample.Units.of(len(table))
    found = resample.estimate(
        kernel, units, "hypervolume of the front, share of the box", draws, correct=False
    )
    return found.restricted("a resample lacks some of the best runs, so the interval leans down")


# Plain values


def plain(value: Any) -> Any:
    """The value in types that JSON has; floats have six significant digits, NaN and infinity are None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {
            " x ".join(key) if isinstance(key, tuple) else str(key): plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") + 0.0 if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
