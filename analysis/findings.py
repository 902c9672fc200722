"""What a sample shows: every number of a report with its interval, or with the reason why it has none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis import (
    aggregate,
    anytime,
    compare,
    correlate,
    mixed,
    planning,
    pruning,
    resample,
    selection,
    summary,
)
from analysis.aggregate import CriticalDifference, Profile
from analysis.compare import Comparison, Equivalence, PairedDifference, RelativeImprovement
from analysis.correlate import Association, Grouped, Partial
from analysis.loaders import Sample
from analysis.mixed import Components, FactorSweep, MixedModel
from analysis.pruning import PrunedAssociation
from analysis.resample import DRAWS, Array, Draws, Estimate, Permutation
from analysis.selection import Selection

MANY = 1_000
"""Rows beyond which intervals and tests are drawn 499 times."""

NEGLIGIBLE = 0.1
"""Tau-b within plus and minus this is too little to choose by; an interval inside it refutes a metric."""

CONTROLS = ("params_m", "madds_m", "skips")
"""What a metric may be in disguise; those of the sample are held fixed."""

_FAILED = ("failed", "oom", "diverged", "pending")
_FEWEST = 3
_ENOUGH = 12
"""Fewest units for partial associations, those among the best, selection quality and mixed models."""

_MOST_EPOCHS = 12
_MODELS = 3
"""Metrics that get a mixed model, whose profile intervals take seconds."""


@dataclass(frozen=True)
class Counts:
    """Rows of a sample by what became of them."""

    n_rows: int
    """Of the source, copies of one result included."""

    n_total: int
    n_used: int
    """With a final error: what claims rest on."""

    n_unique: int
    """Different networks among those used."""

    n_pruned: int
    n_failed: int
    """Failed, out of memory or diverged."""

    n_pending: int
    n_missing: int
    """Completed without a final error."""


@dataclass(frozen=True)
class Versus:
    """One arm held against another, in points of test error, in all ways a reviewer may ask for."""

    claim: summary.Claim
    comparison: Comparison | None
    paired: PairedDifference | None
    """By shared search seed and split, where every seed of both arms is shared."""

    equivalence: Equivalence | None
    improvement: RelativeImprovement | None
    """Over the random baseline."""


@dataclass(frozen=True)
class MetricFinding:
    """What a search metric says of the final error."""

    name: str
    primary: bool
    """Declared before the results were known."""

    overall: Association
    grouped: Grouped
    headline: Estimate
    """The number to quote: within groups, corrected for stopped runs where their probabilities are known."""

    pooled: bool
    """Whether the headline is pooled over groups: corrected, or of a metric that is constant in each."""

    test: Permutation
    p_adjusted: float | None
    adjustment: str
    partial: Partial | None
    best: Mapping[str, Estimate]
    """Tau-b among the best shares of the rows."""

    selection: tuple[Selection, ...]
    model: MixedModel | None
    """Slopes within and between arms, of the first metrics only."""

    pruned: PrunedAssociation | None
    detectable: float | None
    """Rank correlation that this number of units tells from 0 with a power of 80 %."""

    verdict: str
    restriction: str | None

    @property
    def decided(self) -> bool:
        """Whether the study has an answer."""
        return self.verdict in ("supported", "not supported")


@dataclass(frozen=True)
class EpochCurve:
    """How a metric goes with the final error at each epoch of the search."""

    name: str
    stage: str
    points: tuple[correlate.EpochAssociation, ...]
    """Within arms, where there are several."""

    pooled: tuple[correlate.EpochAssociation, ...]
    """Over all rows; the same as `points` where there is one arm only."""

    best: correlate.BestEpoch
    n: int


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


@dataclass(frozen=True)
class Findings:
    """All that a report says in numbers."""

    counts: Counts
    arms: tuple[dict[str, Any], ...]
    """Rows of `summary.summarise`."""

    versus: tuple[Versus, ...]
    metrics: tuple[MetricFinding, ...]
    family: str
    """How the tests of the metrics were adjusted, and why so."""

    curves: tuple[EpochCurve, ...]
    components: Components
    ceiling: Estimate
    replicates: float
    sweep: FactorSweep | None
    critical: CriticalDifference | None
    profiles: Mapping[str, Profile]
    aggregates: Mapping[str, Mapping[str, Estimate]]
    improvement: Mapping[str, Estimate]
    """Probability that a run of an arm beats one of the baseline."""

    anytime: tuple[ArmAnytime, ...]
    hypervolume: Estimate | None
    spread: float | None
    """Standard deviation of the error between runs of one arm, percentage points."""

    spread_df: int
    failures: Mapping[str, float | None]
    """Adjusted p by field of the config that failing depends on it."""

    restrictions: tuple[str, ...]
    draws: Draws
    draws_note: str


def told_protocols(protocols: Mapping[str, Sequence[str]], most: int = 6) -> str:
    """The fields in which protocols differ, as text; beyond `most` only their number."""
    named = [f"{name}: {', '.join(values[:4])}" for name, values in list(protocols.items())[:most]]
    more = len(protocols) - len(named)
    return "; ".join([*named, *([f"and {more} more"] if more else [])])


def draws_for(sample: Sample) -> tuple[Draws, str]:
    """How a sample is resampled, and the sentence that says so."""
    n = len(sample.trials)
    if sample.tables.study.get("preset") == "tiny":
        return Draws(resamples=199, permutations=199), (
            "A tiny study checks that the path works: intervals from 199 resamples, p-values from 199 "
            "permutations "
            "or all where they are fewer than 40,320."
        )
    if n > MANY:
        chosen = Draws(resamples=499, permutations=499)
        note = (
            f"{n:,} rows: intervals from 499 resamples (199 for those among the best and selection "
            "quality; in partial "
            "correlations ranks are taken once), p-values from 499 permutations, so none below 0.002, and "
            "no mixed models."
        )
        return chosen, note
    return (
        DRAWS,
        "Intervals from 9,999 resamples, p-values from 10,000 permutations, or all where they are fewer.",
    )


def find(sample: Sample, *, pool: bool = False) -> Findings:
    """All findings of a sample.

    Args:
        sample: runs or architectures.
        pool: whether rows measured under different protocols may be thrown together.
    """
    draws, note = draws_for(sample)
    restrictions = limits(sample, pool)
    mixed_protocols = sample.protocols is not None and not pool
    metrics = () if mixed_protocols else _metrics(sample, draws)
    unit_of = dict(zip(sample.trials["trial_id"], sample.units, strict=True))
    trainings = sample.finals.assign(unit=sample.finals["trial_id"].map(unit_of))
    # One retraining may stand for several searches that found its network.
    trainings = trainings.drop_duplicates(["unit", "retrain_seed", "test_error"])
    components = mixed.components(100 * trainings["test_error"], trainings["unit"].tolist())
    replicates = max(len(sample.finals) / max(sample.finals["trial_id"].nunique(), 1), 1.0)
    between_runs, df = spread(sample)
    normal = _normalised(sample)
    baseline = sample.tables.baseline
    return Findings(
        counts=_counts(sample),
        arms=tuple(
            {str(k): v for k, v in row.items()} for row in summary.summarise(sample.tables).to_dict("records")
        ),
        versus=_versus(sample, draws),
        metrics=metrics,
        family=_family_note(sample, metrics),
        curves=() if mixed_protocols else _curves(sample, metrics, draws),
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
        anytime=_anytime(sample),
        hypervolume=hypervolume(sample, draws),
        spread=between_runs,
        spread_df=df,
        failures=_failures(sample, draws),
        restrictions=tuple(restrictions),
        draws=draws,
        draws_note=note,
    )


# Counts and restrictions


def _counts(sample: Sample) -> Counts:
    status = sample.trials["status"]
    used = sample.error.notna()
    return Counts(
        n_rows=sample.n_rows,
        n_total=len(sample.trials),
        n_used=int(used.sum()),
        n_unique=int(sample.units[used].nunique()),
        n_pruned=int((status == "pruned").sum()),
        n_failed=int(status.isin(_FAILED[:-1]).sum()),
        n_pending=int((status == "pending").sum()),
        n_missing=int(((status == "completed") & ~used).sum()),
    )


def limits(sample: Sample, pool: bool) -> list[str]:
    """What limits all numbers of the report."""
    counts, found = _counts(sample), list(sample.notes)
    if sample.protocols is not None:
        which = told_protocols(sample.protocols)
        found.append(
            f"The rows were measured under different protocols ({which}) and pooled, as asked."
            if pool
            else f"The rows were measured under different protocols ({which}), so no metric is correlated "
            "over them; --pool does it all the same."
        )
    if counts.n_used == 0:
        pruned = counts.n_pruned and counts.n_pruned == counts.n_total
        found.append(
            "All trials were stopped early: there is no final error, and so no claim, comparison or "
            "association."
            if pruned
            else "No trial has a final error, so there is no claim, comparison or association."
        )
    elif counts.n_pruned:
        told = chances(sample) is not None
        found.append(
            f"{counts.n_pruned} of {counts.n_total} trials were stopped early. "
            + (
                "They were to finish with recorded probabilities, by which associations are weighted."
                if told
                else "No probability of finishing was recorded, so associations speak of survivors only."
            )
        )
    if "search_seed" in sample.trials and counts.n_used:
        seeds = sample.trials.loc[sample.error.notna()].groupby("arm")["search_seed"].nunique()
        if seeds.max() == 1:
            found.append(
                "One search seed only: nothing is known of how results differ from search to search."
            )
    if lost := _lost(sample):
        named = ", ".join(f"{name} ({n})" for name, n in lost.items())
        found.append(
            f"Metrics missing or not finite for some runs with a final error, left out there: {named}."
        )
    if sample.tables.study.get("joint"):
        found.append("Configurations were chosen one in view of another, so rows are not independent.")
    if sample.tables.study.get("scheduler") == "pbt":
        found.append("Members of the population copied one another, so rows are not independent.")
    copies = counts.n_used - counts.n_unique
    if copies and sample.kind == "study":
        found.append(f"{copies} runs found a network that another run found, too; they count as one unit.")
    return found


def _lost(sample: Sample) -> dict[str, int]:
    """Runs with a final error and without a metric that other runs of their arm have, by metric."""
    used = sample.error.notna()
    arms = sample.trials.loc[used, "arm"]
    known = pd.DataFrame(np.isfinite(sample.metrics[used]), index=arms.index, columns=sample.metrics.columns)
    some = known.groupby(arms).transform("any")
    lost = (some & ~known).sum()
    return {str(name): int(n) for name, n in lost.items() if n}


# Arms


def percent(sample: Sample, arm: str) -> Array:
    """Final errors of the runs of an arm, in percent."""
    mine = sample.error[sample.trials["arm"] == arm].dropna()
    return 100 * np.asarray(mine, dtype=np.float64)


def _versus(sample: Sample, draws: Draws) -> tuple[Versus, ...]:
    found = []
    for claim in summary.judged(sample.tables):
        a, b = percent(sample, claim.arm), percent(sample, claim.other)
        if claim.difference is None or not len(a) or not len(b):
            found.append(Versus(claim, None, None, None, None))
            continue
        random = claim.other == sample.tables.baseline and (100 - b).mean() > 0
        found.append(
            Versus(
                claim,
                compare.compare_arms(a, b, draws),
                _paired(sample, claim.arm, claim.other, draws),
                compare.equivalence(a, b),
                compare.relative_improvement_interval(100 - a, 100 - b, draws) if random else None,
            )
        )
    return tuple(found)


def _paired(sample: Sample, arm: str, other: str, draws: Draws) -> PairedDifference | None:
    table = by_seed(sample)
    if table is None or not {arm, other} <= set(table.columns):
        return None
    pairs = table[[arm, other]].dropna()
    whole = len(pairs) == table[arm].notna().sum() == table[other].notna().sum()
    return compare.paired_difference(pairs[arm], pairs[other], draws) if whole and len(pairs) > 1 else None


def by_seed(sample: Sample) -> pd.DataFrame | None:
    """Errors in percent, one row per search seed, one column per arm; None where seeds repeat in an arm."""
    trials = sample.trials.assign(error=100 * sample.error)
    if "search_seed" not in trials or sample.tables.study.get("joint"):
        return None
    used = trials.dropna(subset=["error", "search_seed"])
    if used.empty or used.duplicated(["arm", "search_seed"]).any():
        return None
    table = used.pivot(index="search_seed", columns="arm", values="error")
    return table[[arm for arm in sample.tables.arms if arm in table]].sort_index()


def _critical(sample: Sample) -> CriticalDifference | None:
    table = by_seed(sample)
    if table is None or len(table.columns) < 2:
        return None
    whole = table.dropna()
    return aggregate.critical_difference(
        {str(arm): whole[arm].to_numpy() for arm in whole}, blocks="paired seeds"
    )


def _normalised(sample: Sample) -> dict[str, Array]:
    """Scores by arm: 0 the mean random architecture, 1 the best run of the study."""
    baseline = sample.tables.baseline
    errors = {arm: percent(sample, arm) for arm in sample.tables.arms}
    errors = {arm: values for arm, values in errors.items() if len(values)}
    if baseline not in errors or len(errors) < 2:
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
    """Pooled standard deviation within arms, and its degrees of freedom."""
    groups = [values for arm in sample.tables.arms if len(values := percent(sample, arm)) > 1]
    df = sum(len(values) - 1 for values in groups)
    if not df:
        return None, 0
    total = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return math.sqrt(total / df), df


def swept(sample: Sample) -> list[str]:
    """Axes of the study, other than seeds, that took several values."""
    names = [str(name) for name in sample.trials.columns]
    names = [name for name in names if name.startswith("axes.") and not name.endswith("seed")]
    return [name for name in names if sample.trials[name].nunique() > 1 and name != "axes.arm"]


def _sweep(sample: Sample) -> FactorSweep | None:
    """Analysis of variance over the axes, of runs that have them all, so without the random arm."""
    names = swept(sample)
    if not names or sample.tables.study.get("joint"):
        return None
    rows = sample.trials[names].notna().all(axis=1) & sample.error.notna()
    if rows.sum() < 4:
        return None
    factors = {name.removeprefix("axes."): sample.trials.loc[rows, name].tolist() for name in names}
    seeds = sample.trials.loc[rows, "search_seed"] if "search_seed" in sample.trials else None
    usable = seeds is not None and seeds.notna().all() and seeds.nunique() > 1
    response = (100 * sample.error[rows]).to_numpy()
    return mixed.factor_sweep(response, factors, seeds.tolist() if usable and seeds is not None else None)


def _failures(sample: Sample, draws: Draws) -> dict[str, float | None]:
    failed = sample.trials["status"].isin(_FAILED[:-1])
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


def _anytime(sample: Sample) -> tuple[ArmAnytime, ...]:
    """Curves of arms with at least two finished runs and a known cost, over runs drawn with replacement."""
    hours = costs(sample)
    if sample.kind != "study" or "valid_error" not in sample.trials:
        return ()
    found = []
    for arm in sample.tables.arms:
        rows = sample.trials[(sample.trials["arm"] == arm) & hours.notna()].index
        price = hours[rows].to_numpy()
        test = 100 * sample.error[rows].to_numpy(dtype=float)
        valid = sample.trials.loc[rows, "valid_error"].to_numpy(dtype=float)
        if np.isfinite(test).sum() < 2 or not np.isfinite(valid[np.isfinite(test)]).all() or price.sum() <= 0:
            continue
        draw = np.random.default_rng(0)
        orders = [draw.integers(0, len(rows), len(rows)) for _ in range(399)]
        traces = [anytime.incumbents(price[order], valid[order], test[order]) for order in orders]
        traces = [trace for trace in traces if len(trace.cost)]
        grid = np.linspace(0, float(price.sum()), 121)[1:]
        table = np.stack([trace.at(np.minimum(grid, trace.total)) for trace in traces])
        known = np.isfinite(table).mean(axis=0) > 0.95
        middle, low, high = (np.full(len(grid), np.nan) for _ in range(3))
        middle[known] = np.nanmean(table[:, known], axis=0)
        low[known], high[known] = np.nanquantile(table[:, known], [0.025, 0.975], axis=0)
        found.append(
            ArmAnytime(
                arm, len(rows), grid, middle, low, high, float(price.sum()), int((~np.isfinite(test)).sum())
            )
        )
    return tuple(found)


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
    if "params_m" not in table:
        return pd.DataFrame(columns=["trial_id", "arm", "params_m", "error", "measure", "front"])
    table = table.dropna(subset=["error", "params_m"]).sort_values(["params_m", "error", "trial_id"])
    found = table[["trial_id", "arm", "params_m", "error"]].assign(measure=key.replace("_", " "))
    found["front"] = table["error"] < table["error"].cummin().shift(fill_value=np.inf)
    return found


def hypervolume(sample: Sample, draws: Draws) -> Estimate | None:
    """Share of the box of error and size, up to the worst of both, that the front dominates."""
    table = pareto(sample)
    if len(table) < _FEWEST or table["params_m"].nunique() < 2 or table["error"].nunique() < 2:
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


# Metrics


def _metrics(sample: Sample, draws: Draws) -> tuple[MetricFinding, ...]:
    primary = set(sample.tables.study.get("primary_metrics") or ())
    if unknown := primary - set(sample.metrics):
        raise ValueError(
            f"primary_metrics names {', '.join(sorted(unknown))}, which no trial recorded; recorded are "
            f"{', '.join(sample.metrics.columns)}"
        )
    found = [
        metric_finding(sample, name, draws, primary=name in primary)
        for name in map(str, sample.metrics.columns)
        if np.isfinite(sample.metrics[name][sample.error.notna()]).sum() >= _FEWEST
        and sample.metrics.loc[sample.error.notna(), name].nunique() > 1
    ]
    adjusted: dict[str, tuple[float | None, str]] = {}
    kinds: tuple[tuple[Literal["primary", "exploratory"], bool], ...] = (
        ("primary", True),
        ("exploratory", False),
    )
    for kind, declared in kinds:
        tests = {one.name: one.test.p if _testable(one) else None for one in found if one.primary == declared}
        family = compare.family(tests, kind)
        adjusted |= {
            name: (p, f"{family.method} over {family.n_tests}")
            for name, p in zip(family.names, family.adjusted, strict=True)
        }
    judged = [_judged(one, *adjusted[one.name]) for one in found]
    modelled = {one.name for one in ranked(judged)[:_MODELS]}
    return tuple(
        replace(one, model=_model(sample, one.name)) if one.name in modelled else one for one in judged
    )


def ranked(metrics: Sequence[MetricFinding]) -> list[MetricFinding]:
    """Metrics in the order a reader wants them: declared ones first, then by p-value and strength."""
    return sorted(
        metrics,
        key=lambda one: (
            not one.primary,
            1.0 if one.test.p is None else one.test.p,
            -abs(one.headline.value or 0),
        ),
    )


def metric_finding(sample: Sample, name: str, draws: Draws, *, primary: bool = False) -> MetricFinding:
    """What one metric says of the final error, its p-value not adjusted yet."""
    metric: Array = np.asarray(sample.metrics[name], dtype=np.float64)
    error: Array = np.asarray(sample.error, dtype=np.float64)
    rows = np.isfinite(metric) & np.isfinite(error)
    x, y = metric[rows], error[rows]
    units = sample.units[rows].tolist()
    groups = sample.trials.loc[rows, "arm"].tolist()
    resolution = _resolution(x)
    overall = correlate.association(
        metric, error, units=sample.units.tolist(), resolution=resolution, draws=draws
    )
    # Within arms a network counts once in each arm that found it, so that units lie in one arm only.
    nested = [f"{arm} {unit}" for arm, unit in zip(groups, units, strict=True)]
    grouped = correlate.by_group(x, y, groups, units=nested, resolution=resolution, draws=draws)
    several = len(grouped.groups) + grouped.n_small > 1
    headline, test = (grouped.within, grouped.test) if several else (overall.tau_b, overall.test)
    over_all = several and headline.value is None
    if over_all:
        headline, test = (
            overall.tau_b.restricted("pooled: no group tells metric and error apart"),
            overall.test,
        )
    pruned, notes = _pruned(sample, metric, error, resolution, draws)
    if pruned is not None and pruned.weighted:
        weighted = _weighted_within(sample, metric, error, resolution, draws) if several else pruned.headline
        over_all = weighted.value is None
        headline = pruned.headline if over_all else weighted
    controls = {
        other: sample.metrics.loc[rows, other].to_numpy(dtype=np.float64)
        for other in CONTROLS
        if other in sample.metrics and other != name and sample.metrics.loc[rows, other].nunique() > 1
    }
    lowest = (headline.value or overall.tau_b.value or 1.0) > 0
    enough = overall.n_unique >= _ENOUGH
    depth = sorted({1, max(1, round(0.1 * len(x)))}) if enough else []
    fewer = replace(draws, resamples=199) if len(x) > MANY else draws
    kept = replace(fewer, resamples=fewer.resamples or 999)
    return MetricFinding(
        name=name,
        primary=primary,
        overall=overall,
        grouped=grouped,
        headline=headline,
        pooled=over_all,
        test=test,
        p_adjusted=None,
        adjustment="",
        partial=_partial(x, y, controls, units, resolution, draws) if controls and enough else None,
        best=_best(sample, rows, x, y, units, resolution, fewer) if enough else {},
        selection=tuple(
            selection.selection(x, 100 * y, k, lowest=lowest, units=units, resolution=resolution, draws=kept)
            for k in depth
        ),
        model=None,
        pruned=pruned,
        detectable=planning.detectable_correlation(headline.n_units) if headline.n_units >= 4 else None,
        verdict="undecided",
        restriction="; ".join(filter(None, [overall.restriction, *notes])) or None,
    )


def _partial(
    x: Array, y: Array, controls: Mapping[str, Array], units: list[Any], resolution: float, draws: Draws
) -> Partial:
    """Partial Spearman correlation; of very many rows with ranks taken once, not in each resample."""
    if len(x) <= MANY:
        return correlate.partial(x, y, controls, units=units, resolution=resolution, draws=draws)
    ranks = {
        name: stats.rankdata(resample.dense_ranks(column, step))
        for name, column, step in (
            ("", x, resolution),
            (" ", y, resample.RESOLUTION),
            *((k, v, resample.RESOLUTION) for k, v in controls.items()),
        )
    }
    metric, error = ranks.pop(""), ranks.pop(" ")
    return correlate.partial(metric, error, ranks, kind="pearson", units=units, draws=draws)


def _testable(one: MetricFinding) -> bool:
    """Whether a test within arms, over all runs, stands behind the headline."""
    return not one.pooled and one.pruned is None


def _judged(one: MetricFinding, p: float | None, adjustment: str) -> MetricFinding:
    found = one.headline
    weighted = one.pruned is not None and bool(one.pruned.weighted)
    answer = f"undecided at n={found.n_units}"
    if one.pruned is not None and not weighted:
        answer = "no verdict: survivors only"
    elif one.pooled:
        answer = "no verdict: constant within arms"
    elif found.low is not None and found.high is not None:
        if -NEGLIGIBLE < found.low and found.high < NEGLIGIBLE:
            answer = "not supported"
        elif (not found.low <= 0 <= found.high) if weighted else (p is not None and p < planning.ALPHA):
            answer = "supported"
    elif p is not None and p < planning.ALPHA:
        answer = "supported"
    return replace(one, p_adjusted=p, adjustment=adjustment, verdict=answer)


def _resolution(x: Array) -> float:
    """Step of a metric's ranks: a millionth of its unit, or of its range where that is small."""
    span = float(np.ptp(x)) if len(x) else 0.0
    return min(resample.RESOLUTION, 1e-6 * span) if span > 0 else resample.RESOLUTION


def chances(sample: Sample) -> Array | None:
    """Probability with which each trial was to finish; None where stopped ones had none, or none known."""
    trials = sample.trials
    stopped = trials["status"] == "pruned"
    if "completion_probability" not in trials or not stopped.any():
        return None
    chance = trials["completion_probability"].astype(float)
    if not ((chance[stopped] > 0) & (chance[stopped] < 1)).all():
        return None
    return np.asarray(chance.where(chance.notna(), 1.0), dtype=np.float64)


def _pruned(
    sample: Sample, metric: Array, error: Array, resolution: float, draws: Draws
) -> tuple[PrunedAssociation | None, list[str]]:
    trials = sample.trials
    if not (trials["status"] == "pruned").any():
        return None, []
    probability = chances(sample)
    audit = (
        trials["audit"].astype("boolean").fillna(False).to_numpy(dtype=bool) if "audit" in trials else None
    )
    try:
        found = pruning.association(
            metric,
            error,
            probability=probability,
            audit=audit,
            failed=_failed(sample).to_numpy(),
            units=sample.units.tolist(),
            resolution=resolution,
            draws=draws,
        )
    except ValueError as problem:
        found = pruning.association(metric, error, failed=_failed(sample).to_numpy(), draws=draws)
        return found, [f"not corrected for stopped runs: {problem}"]
    return found, ["among survivors only"] if not found.weighted else []


def _failed(sample: Sample) -> "pd.Series[bool]":
    """Rows that have no final error for another reason than that a rule stopped them."""
    status = sample.trials["status"]
    return status.isin(_FAILED) | ((status == "completed") & sample.error.isna())


def _weighted_within(
    sample: Sample, metric: Array, error: Array, resolution: float, draws: Draws
) -> Estimate:
    """Tau-b within arms, weighted by inverse probabilities; all runs with the metric are resampled."""
    rows = np.isfinite(metric) & ~_failed(sample).to_numpy()
    final = np.isfinite(error[rows])
    chance = chances(sample)
    assert chance is not None
    weights = np.zeros(int(rows.sum()))
    weights[final] = 1 / chance[rows][final]
    x = resample.dense_ranks(metric[rows], resolution)
    y = resample.dense_ranks(np.where(final, error[rows], 0.0), resample.RESOLUTION)
    arms = sample.trials.loc[rows, "arm"].to_numpy()
    members = [np.flatnonzero(arms == arm) for arm in sample.tables.arms]
    forms = [(m, resample.pair_kernel(x[m], y[m], weights[m])) for m in members if len(m) > 1]

    def kernel(draw: Array) -> Array:
        parts = [form(draw[:, m]) for m, form in forms]
        above: Array = np.sum([part[0] for part in parts], axis=0)
        below: Array = np.sum([part[1] for part in parts], axis=0)
        return resample.ratio(above, below)

    nested = [f"{arm} {unit}" for arm, unit in zip(arms, sample.units[rows], strict=True)]
    units = resample.Units.of(len(x), nested, arms.tolist())
    name = f"{correlate.NAMES['tau_b']} within arms, weighted by inverse probability"
    found_units = len(np.unique(units.of_row[final]))
    if not forms or found_units < resample.ENOUGH_UNITS:
        few = f"{resample.count(found_units, 'unit')} with a final error"
        return resample.missing(name, few, int(final.sum()), found_units, draws.level)
    return replace(resample.estimate(kernel, units, name, draws), n=int(final.sum()), n_units=found_units)


def _best(
    sample: Sample, rows: Any, x: Array, y: Array, units: list[Any], resolution: float, draws: Draws
) -> dict[str, Estimate]:
    """Tau-b with the mean of the other trainings among the best by the first; with one only, flagged."""
    wide = sample.finals.pivot_table(index="trial_id", columns="retrain_seed", values="test_error")
    wide = wide.reindex(sample.trials.loc[rows, "trial_id"])
    target, by = y, y
    if wide.shape[1] > 1 and wide.notna().all().all():
        by, target = wide.iloc[:, 0].to_numpy(), wide.iloc[:, 1:].mean(axis=1).to_numpy()
    found = correlate.in_the_best(
        x, target, by, shares=(0.5, 0.2, 0.1), units=units, resolution=resolution, draws=draws
    )
    return {f"{100 * share:g} %": one for share, one in found.items()}


def _model(sample: Sample, name: str) -> MixedModel | None:
    """Slopes within and between arms, seeds crossed; None for few rows, or for very many."""
    rows = np.isfinite(sample.metrics[name]) & sample.error.notna()
    arms = sample.trials.loc[rows, "arm"]
    if not _ENOUGH <= len(arms) <= MANY or arms.nunique() < 2:
        return None
    seeds = sample.trials.loc[rows, "search_seed"] if "search_seed" in sample.trials else None
    usable = seeds is not None and seeds.notna().all() and seeds.nunique() > 1
    crossed = seeds.tolist() if usable and seeds is not None else None
    try:
        return mixed.within_between(
            sample.metrics.loc[rows, name], 100 * sample.error[rows], arms.tolist(), crossed
        )
    except np.linalg.LinAlgError:  # metric, arms and seeds give the error exactly
        return None


def _family_note(sample: Sample, metrics: tuple[MetricFinding, ...]) -> str:
    declared = [one.name for one in metrics if one.primary]
    rest = len(metrics) - len(declared)
    if declared:
        return (
            f"{len(declared)} primary metrics were declared in study.json ({', '.join(declared)}): their "
            "p-values "
            f"are adjusted by Holm; those of the other {rest} by Benjamini and Hochberg, for exploration."
        )
    return (
        f"No primary metric was declared before the results, so all {rest} are exploratory: p-values are "
        "adjusted by Benjamini and Hochberg, and what is found here wants a second study."
    )


def _curves(sample: Sample, metrics: tuple[MetricFinding, ...], draws: Draws) -> tuple[EpochCurve, ...]:
    """Association over the epochs of the search (of training, for ground truth) of up to three metrics."""
    stage = "search" if sample.kind == "study" else "retrain"
    epochs = sample.tables.epochs
    epochs = epochs[(epochs["stage"] == stage) & np.isfinite(epochs["value"].astype(float))]
    spread = epochs.groupby("key", observed=True)["value"].nunique()
    named = [
        str(key) for key in spread.index if spread[key] > 2 and key not in ("seconds", "lr", "drop_path")
    ]
    strength = {one.name.removeprefix("search_"): one.test.p for one in metrics}
    declared = {one.name.removeprefix("search_") for one in metrics if one.primary}
    named = [key for key in named if not key.endswith("_mb")]
    ranked = sorted(named, key=lambda key: (key not in declared, strength.get(key) or 1.0, key))
    found = []
    for key in ranked[:3]:
        rows = epochs[epochs["key"] == key]
        wide = rows.astype({"trial_id": str}).pivot_table(index="trial_id", columns="epoch", values="value")
        wide = wide.reindex(sample.trials["trial_id"]).set_axis(sample.trials.index)
        if key == "test_error":
            wide = wide.iloc[:, :-1]  # the last epoch is the endpoint itself
        if wide.shape[1] < 2:
            continue
        steps = np.unique(
            np.linspace(0, wide.shape[1] - 1, min(_MOST_EPOCHS, wide.shape[1])).round().astype(int)
        )
        wide = wide.iloc[:, steps]
        values = wide.to_numpy()
        step = _resolution(values[np.isfinite(values)])
        error, arms = sample.error.to_numpy(), sample.trials["arm"].tolist()
        groups = arms if len(set(arms)) > 1 else None
        units = [f"{arm} {unit}" for arm, unit in zip(arms, sample.units, strict=True)]
        points = correlate.over_epochs(wide, error, groups=groups, units=units, resolution=step, draws=draws)
        pooled = points
        if groups:
            pooled = correlate.over_epochs(
                wide, error, units=sample.units.tolist(), resolution=step, draws=draws
            )
        best = correlate.best_epoch(wide, error, groups=groups, units=units, resolution=step, draws=draws)
        found.append(EpochCurve(key, stage, points, pooled, best, int(sample.error.notna().sum())))
    return tuple(found)


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
