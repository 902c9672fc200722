"""What a sample shows: every number of a report with its interval, or with the reason why it has none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from analysis import (
    aggregate,
    agreement,
    anytime,
    compare,
    correlate,
    mixed,
    planning,
    pruning,
    records,
    resample,
    selection,
    summary,
)
from analysis.aggregate import CriticalDifference, Profile
from analysis.agreement import ArmAgreement
from analysis.compare import Comparison, Equivalence, PairedDifference, RelativeImprovement
from analysis.correlate import Association, Grouped, Partial
from analysis.loaders import Sample
from analysis.mixed import Components, FactorSweep, MixedModel
from analysis.pruning import PrunedAssociation
from analysis.resample import DRAWS, RESAMPLES, Array, Draws, Estimate, Permutation
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
_SEQUENCES = 399
_MODELS = 3
"""Metrics that get a mixed model, whose profile intervals take seconds, and undeclared ones with `Detail`."""

_STRONGEST = 12
"""Undeclared metrics that may be drawn as often as declared ones."""

_WORK = 1_500
"""Rows times metrics beyond which undeclared metrics are drawn less often."""

_FEWER = 999
_LEAST_PERMUTATIONS = 99
_NOISE = 1e-9
"""Range of a metric, in shares of its size, below which it differs in rounding only."""

_SPARSE = 1e-3
"""Step of the error, 0.1 %, at which sparse tau-b counts ties."""


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

    n_not_started: int | None
    """Planned and never started; None where the plan was not recorded."""


@dataclass(frozen=True)
class Flow:
    """The rows behind a claim, by what became of them."""

    n_total: int
    n_used: int
    """With what the claim needs: a final error and, for a metric, the metric."""

    n_pruned: int
    n_failed: int
    n_pending: int


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
class Detail:
    """What is asked only of declared metrics and of the few strongest, as it takes time.

    Not where runs were stopped: nothing here is corrected for that.
    """

    sparse: Estimate
    """Tau-b with errors told apart by 0.1 %, within arms as the headline: what is left without small gaps."""

    rho_interval: tuple[float, float] | None
    """Of pooled Spearman's rho by Fisher's z, to check the bootstrap; None where a unit has several rows."""

    over_size: Estimate | None
    """Tau-b within arms of the metric less that of the parameters, both turned to rise with the error."""

    gain: Estimate | None
    """Gain in out-of-sample R squared over a line in the parameters."""

    share: float | None
    """Of a whole space, the networks that err at most as much as the first by the metric; else None."""

    groupings: Mapping[str, Grouped]
    """By axis and by search seed, where that divides the rows otherwise than arms do."""


@dataclass(frozen=True)
class Unanswered:
    """A metric that was declared and cannot be associated with the error; it counts in the family, too."""

    name: str
    flow: Flow
    verdict: str
    reason: str


@dataclass(frozen=True)
class MetricFinding:
    """What a search metric says of the final error."""

    name: str
    primary: bool
    """Declared before the results were known."""

    flow: Flow
    overall: Association
    grouped: Grouped
    headline: Estimate
    """The number to quote: within groups, corrected for stopped runs where their probabilities are known."""

    pooled: bool
    """Whether the headline is pooled over groups: corrected, or of a metric that is constant in each."""

    shared: bool
    """Whether networks with one final error lie in several arms, so that no test within arms is valid."""

    test: Permutation
    p_adjusted: float | None
    adjustment: str
    partial: Partial | None
    best: Mapping[str, Estimate]
    """Tau-b among the best shares of the rows."""

    selection: tuple[Selection, ...]
    model: MixedModel | None
    """Slopes within and between arms, of the first metrics only."""

    detail: Detail | None
    pruned: PrunedAssociation | None
    detectable: float | None
    """Rank correlation that this number of units tells from 0 with a power of 80 %."""

    verdict: str
    restriction: str | None

    @property
    def p(self) -> float | None:
        """Of the test behind the headline, not adjusted."""
        return _p_value(self)

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
            f"{n:,} rows: intervals from 499 resamples (199 for those among the best, selection quality, "
            "sparse tau-b and comparisons with size; in partial correlations ranks are taken once), "
            "p-values from 499 permutations, so none below 0.002, and no mixed models."
        )
        return chosen, note
    return (
        DRAWS,
        "Intervals from 9,999 resamples, p-values from 10,000 permutations, or all where they are fewer.",
    )


def _budget(names: Sequence[str], n: int, draws: Draws) -> Draws:
    """Draws of undeclared metrics: fewer where there are many rows and metrics."""
    work = n * len(names)
    if draws.resamples is not None or work <= _WORK:
        return draws
    total = max(_FEWER, RESAMPLES * _WORK // work)
    return replace(draws, resamples=total, permutations=total)


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
    metrics, unanswered, fewer = _metrics(sample, draws)
    components = _components(sample)
    replicates = max(len(sample.finals) / max(sample.finals["trial_id"].nunique(), 1), 1.0)
    between_runs, df = spread(sample)
    normal = _normalised(sample)
    baseline = sample.tables.baseline
    curves, no_curves = _anytime(sample)
    return Findings(
        counts=_counts(sample),
        arms=tuple(
            {str(k): v for k, v in row.items()} for row in summary.summarise(sample.tables).to_dict("records")
        ),
        versus=_versus(sample, draws),
        doubts=doubts,
        unlike=apart,
        shared=_together(sample, [arm for arm in sample.tables.arms if arm not in doubts]),
        metrics=metrics,
        unanswered=unanswered,
        family=_family_note(metrics, unanswered),
        curves=_curves(sample, metrics, draws) if apart is None else (),
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


def unlike(sample: Sample) -> str | None:
    """Why nothing is pooled over the rows of a sample, if so: they were not measured alike."""
    if sample.protocols is None or sample.tables.study.get("pool"):
        return None
    return f"measured under different protocols ({summary.told_protocols(sample.protocols)})"


def doubt(sample: Sample, arm: str) -> str | None:
    """Why the finished runs of an arm cannot stand beside those of others as independent runs, if so."""
    used = ((sample.trials["arm"] == arm) & sample.error.notna()).any()
    return (summary.dependence(sample.tables, arm) or unlike(sample)) if used else None


def _together(sample: Sample, arms: Sequence[str]) -> str | None:
    """Why the finished runs of arms, taken all at once, are no independent runs, if so."""
    return summary.doubt(*((sample.tables, arm) for arm in arms))


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
        n_not_started=_not_started(sample),
    )


def _flow(status: "pd.Series[Any]", n_used: int) -> Flow:
    return Flow(
        n_total=len(status),
        n_used=n_used,
        n_pruned=int((status == "pruned").sum()),
        n_failed=int(status.isin(_FAILED[:-1]).sum()),
        n_pending=int((status == "pending").sum()),
    )


def _not_started(sample: Sample) -> int | None:
    planned: Mapping[str, int] | None = sample.tables.study.get("planned")
    if planned is None:
        return None
    begun = sample.trials["arm"].value_counts()
    return sum(max(int(number) - int(begun.get(arm, 0)), 0) for arm, number in planned.items())


def limits(sample: Sample, pool: bool = False) -> list[str]:
    """What limits all numbers of a report."""
    sample = replace(sample, tables=summary.pooled(sample.tables)) if pool else sample
    counts, found = _counts(sample), list(sample.notes)
    if sample.protocols is not None:
        which = summary.told_protocols(sample.protocols)
        found.append(
            f"The rows were measured under different protocols ({which}), so no metric is correlated over "
            "them, nothing but the spread between runs of one arm is pooled over arms, and arms that differ "
            "are not compared; --pool does it all the same."
            if unlike(sample)
            else f"The rows were measured under different protocols ({which}) and pooled, as asked."
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
    if lost := _stopped_retrainings(sample):
        found.append(
            f"Of {lost} searches with a final error some retrainings were stopped: such an error is the mean "
            "of the retrainings that a rule let finish, which no weight corrects."
        )
    if counts.n_not_started:
        found.append(f"{counts.n_not_started} planned trials were never started, and are in no number.")
    if "search_seed" in sample.trials and counts.n_used:
        seeds = sample.trials.loc[sample.error.notna()].groupby("arm")["search_seed"].nunique()
        if seeds.max() == 1:
            found.append(
                "One search seed only: nothing is known of how results differ from search to search."
            )
    partly, wholly = _lost(sample)
    if partly:
        named = ", ".join(f"{name} ({n})" for name, n in partly.items())
        found.append(
            f"Metrics missing or not finite for some runs with a final error, left out there: {named}."
        )
    if wholly:
        named = _shortened([f"{name} ({', '.join(arms)})" for name, arms in wholly.items()])
        found.append(f"Metrics missing or not finite in whole arms, of which they say nothing: {named}.")
    if failed := _failed_proxies(sample):
        named = ", ".join(f"{name} ({n})" for name, n in failed.items())
        found.append(
            f"Proxies that could not be computed for some trials, by their recorded status: {named}."
        )
    if strange := _strangers(sample):
        found.append(
            f"primary_metrics in study.json names {', '.join(strange)}, which this study does not record: "
            f"correct the name; recorded are {', '.join(sample.metrics.columns) or 'none'}."
        )
    if sample.tables.study.get("joint"):
        found.append("Configurations were chosen one in view of another, so rows are not independent.")
    if sample.tables.study.get("scheduler") == "pbt":
        found.append("Members of the population copied one another, so rows are not independent.")
    copies = counts.n_used - counts.n_unique
    if copies and sample.kind == "study":
        found.append(f"{copies} runs found a network that another run found, too; they count as one unit.")
    return found


def _shortened(names: Sequence[str], most: int = 12) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _lost(sample: Sample) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Metrics that runs with a final error lack: in how many runs of arms that have it, and in whole arms.

    The random arm has no search, so it may lack what others have.
    """
    used = sample.error.notna()
    arms = sample.trials.loc[used, "arm"]
    known = pd.DataFrame(np.isfinite(sample.metrics[used]), index=arms.index, columns=sample.metrics.columns)
    lost = (known.groupby(arms).transform("any") & ~known).sum()
    by_arm = known.groupby(arms).any()
    by_arm = by_arm[by_arm.index != sample.tables.baseline]
    wholly = {
        str(name): [arm for arm in sample.tables.arms if arm in by_arm.index and not by_arm.loc[arm, name]]
        for name in by_arm.columns
        if by_arm[name].any() and not by_arm[name].all()
    }
    return {str(name): int(n) for name, n in lost.items() if n}, wholly


def _failed_proxies(sample: Sample) -> dict[str, int]:
    """Trials by proxy whose recorded status is another than 0, which is ok."""
    found = {
        name.removesuffix("_status"): int((sample.trials[name] > 0).sum())
        for name in map(str, sample.trials.columns)
        if name.startswith("proxy_") and name.endswith("_status")
    }
    return {name: n for name, n in found.items() if n}


def _stopped_retrainings(sample: Sample) -> int:
    """Searches with a final error of which some retrainings were stopped."""
    if "stopped_retrainings" not in sample.trials:
        return 0
    return int(((sample.trials["stopped_retrainings"] > 0) & sample.error.notna()).sum())


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
        flow = _flow(sample.trials.loc[rows, "status"], len(a) + len(b))
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


def told(doubts: Mapping[str, str]) -> str:
    """Doubts by arm as text; of arms with the same one, once."""
    arms: dict[str, list[str]] = {}
    for arm, why in doubts.items():
        arms.setdefault(why, []).append(arm)
    return "; ".join(f"{why} ({', '.join(names)})" for why, names in arms.items())


def _critical(sample: Sample) -> CriticalDifference | str:
    """Ranks over seeds that all arms share, of arms that are independent runs and measured alike."""
    table = by_seed(sample)
    if isinstance(table, str):
        return table
    if len(table.columns) < 2:
        lost = told({arm: why for arm in sample.tables.arms if (why := doubt(sample, arm))})
        return f"fewer than two arms have usable runs{': ' if lost else ''}{lost}"
    if why := _together(sample, table.columns.tolist()):
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
    if baseline not in errors or len(errors) < 2 or _together(sample, list(errors)):
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


def swept(sample: Sample) -> list[str]:
    """Axes of the study, other than seeds, that took several values."""
    names = [str(name) for name in sample.trials.columns]
    names = [name for name in names if name.startswith("axes.") and not name.endswith("seed")]
    return [name for name in names if sample.trials[name].nunique() > 1 and name != "axes.arm"]


def _sweep(sample: Sample) -> FactorSweep | None:
    """Analysis of variance over the axes, of runs that have them all, so without the random arm."""
    names = swept(sample)
    if not names:
        return None
    rows = sample.trials[names].notna().all(axis=1) & sample.error.notna()
    arms = sample.trials.loc[rows, "arm"].unique().tolist()
    if rows.sum() < 4 or unlike(sample) or _together(sample, arms):
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
    stopped = (sample.trials["status"] == "pruned").any() or _stopped_retrainings(sample)
    return replace(found, icc=found.icc.restricted("of trainings that no rule stopped" if stopped else None))


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


def _metrics(sample: Sample, draws: Draws) -> tuple[tuple[MetricFinding, ...], tuple[Unanswered, ...], str]:
    """Metrics that can be associated with the error, declared ones that cannot, and a note on their draws."""
    declared = _declared(sample)
    reasons = {name: _why_not(sample, name) for name in (*declared, *map(str, sample.metrics.columns))}
    lost = tuple(_unanswered(sample, name, why) for name in declared if (why := reasons[name]) is not None)
    names = [name for name in map(str, sample.metrics.columns) if reasons[name] is None]
    names.sort(key=lambda name: (name not in declared, -_strength(sample, name)))
    n = int(sample.error.notna().sum())
    others = _budget(names, n, draws)
    first = len(declared) + _STRONGEST
    last = replace(others, resamples=_FEWER, permutations=_FEWER) if draws.resamples is None else others
    found = [
        metric_finding(
            sample,
            name,
            draws if name in declared else others if place < first else last,
            primary=name in declared,
            whole=place < first,
        )
        for place, name in enumerate(names)
    ]
    notes = []
    if others != draws:
        notes.append(f"There are many metrics: those not declared are drawn {others.resamples:,} times.")
    if len(names) > first:
        told = f", drawn {_FEWER} times" if last != draws else ""
        notes.append(
            f"Metrics not declared, beyond the {_STRONGEST} strongest, have tau-b, rho and r only{told}."
        )
    adjusted: dict[str, tuple[float | None, str]] = {}
    kinds: tuple[tuple[Literal["primary", "exploratory"], bool], ...] = (
        ("primary", True),
        ("exploratory", False),
    )
    for kind, primary in kinds:
        tests = {one.name: _p_value(one) for one in found if one.primary == primary}
        # A declared claim counts in the family even if there is nothing to test: it was asked.
        asked = {name: 1.0 if p is None and primary else p for name, p in tests.items()}
        asked |= {one.name: 1.0 for one in lost} if primary else {}
        family = compare.family(asked, kind)
        adjusted |= {
            name: (None if tests.get(name) is None else p, f"{family.method} over {family.n_tests}")
            for name, p in zip(family.names, family.adjusted, strict=True)
        }
    judged = [_judged(one, *adjusted[one.name]) for one in found]
    first_ones = {one.name for one in ranked(judged)[:_MODELS]}
    rest = [one.name for one in ranked(judged) if not one.primary][:_MODELS]
    return (
        tuple(
            replace(
                one,
                model=_model(sample, one.name) if one.name in first_ones else None,
                detail=(
                    _detail(sample, one, draws)
                    if one.pruned is None and (one.primary or one.name in rest)
                    else None
                ),
            )
            for one in judged
        ),
        lost,
        " ".join(notes),
    )


def _declared(sample: Sample) -> tuple[str, ...]:
    """The primary metrics of the study.

    Raises:
        ValueError: they are no list of names.
    """
    names = sample.tables.study.get("primary_metrics") or ()
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"primary_metrics in study.json is {names!r}; write a list of names, e.g. "
            '["search_valid_error"], or [] where none was declared'
        )
    return tuple(dict.fromkeys(names))


def _strangers(sample: Sample) -> list[str]:
    """Declared names that no trial of this study can record, by its catalogue of metrics."""
    listed = set(sample.tables.study.get("metrics") or ())
    known = {*listed, *(f"search_{name}" for name in listed), *records.END_METRICS, *sample.trials.columns}
    return [name for name in _declared(sample) if name not in {*known, *sample.metrics.columns}]


def _why_not(sample: Sample, name: str) -> str | None:
    """Why a metric cannot be associated with the error, if so."""
    if apart := unlike(sample):
        return apart
    if name not in sample.metrics:
        return "not recorded"
    values = sample.metrics[name][sample.error.notna()].to_numpy(dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < _FEWEST:
        return (
            f"finite in {resample.count(len(values), 'run')} only" if len(values) else "not finite in any run"
        )
    return "constant" if _constant(values) else None


def _unanswered(sample: Sample, name: str, why: str) -> Unanswered:
    known = sample.error.notna()
    if name in sample.metrics:
        known &= np.isfinite(sample.metrics[name])
    n = int(known.sum()) if name in sample.metrics else 0
    answer = "no verdict" if unlike(sample) else f"undecided at n={n}"
    return Unanswered(name, _flow(sample.trials["status"], n), f"{answer}: {why}", why)


def _strength(sample: Sample, name: str) -> float:
    """How strongly a metric goes with the error within arms, up to the sign: which are drawn most often."""
    rows = np.isfinite(sample.metrics[name].to_numpy(dtype=np.float64)) & sample.error.notna().to_numpy()
    table = pd.DataFrame({"x": sample.metrics.loc[rows, name], "y": sample.error[rows]})
    arms = sample.trials.loc[rows, "arm"]
    ranks = table.groupby(arms).rank(pct=True)
    x, y = (ranks[side] - ranks[side].groupby(arms).transform("mean") for side in ("x", "y"))
    scale = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return abs(float((x * y).sum())) / scale if scale > 0 else 0.0


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


def metric_finding(
    sample: Sample, name: str, draws: Draws, *, primary: bool = False, whole: bool = True
) -> MetricFinding:
    """What one metric says of the final error, its p-value not adjusted yet.

    Without `whole`, no partial association, none among the best, and no quality of choices.
    """
    metric: Array = np.asarray(sample.metrics[name], dtype=np.float64)
    error: Array = np.asarray(sample.error, dtype=np.float64)
    rows = np.isfinite(metric) & np.isfinite(error)
    if _constant(metric[np.isfinite(metric)]):  # but for the last bits, which are no order
        metric = np.where(np.isfinite(metric), metric[np.isfinite(metric)].mean(), metric)
    x, y = metric[rows], error[rows]
    units = sample.units[rows].tolist()
    groups = sample.trials.loc[rows, "arm"].tolist()
    resolution = _resolution(x)
    overall = correlate.association(
        metric, error, units=sample.units.tolist(), resolution=resolution, draws=draws
    )
    within, shared = _within(sample)
    grouped = correlate.by_group(
        x, y, groups, units=within[rows].tolist(), resolution=resolution, draws=draws
    )
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
        headline, test = pruned.headline, pruned.test
        weighted = _weighted_within(sample, metric, error, resolution, draws) if several else None
        over_all = weighted is not None and weighted.estimate.value is None
        if weighted is not None and not over_all:
            headline, test = weighted.estimate, weighted.test
    controls = {
        other: sample.metrics.loc[rows, other].to_numpy(dtype=np.float64)
        for other in CONTROLS
        if other in sample.metrics and other != name and not _constant(sample.metrics.loc[rows, other])
    }
    lowest = (headline.value or overall.tau_b.value or 1.0) > 0
    enough = whole and overall.n_unique >= _ENOUGH
    depth = sorted({1, max(1, round(0.1 * len(x)))}) if enough else []
    fewer = replace(draws, resamples=199) if len(x) > MANY else draws
    kept = replace(fewer, resamples=min(fewer.resamples or _FEWER, _FEWER))
    return MetricFinding(
        name=name,
        primary=primary,
        flow=_flow(sample.trials["status"], overall.n_used),
        overall=overall,
        grouped=grouped,
        headline=headline,
        pooled=over_all,
        shared=shared and several,
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
        detail=None,
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


def _p_value(one: MetricFinding) -> float | None:
    """P-value of the test within arms that stands behind the headline: of all runs, so not of survivors."""
    of_all = one.pruned is None or bool(one.pruned.weighted)
    return one.test.p if of_all and not one.pooled else None


def _judged(one: MetricFinding, p: float | None, adjustment: str) -> MetricFinding:
    found = one.headline
    weighted = one.pruned is not None and bool(one.pruned.weighted)
    answer = f"undecided at n={found.n_units}"
    if one.pruned is not None and not weighted:
        answer = "no verdict: survivors only"
    elif one.shared and not one.pooled and p is None:
        answer = "no verdict: networks shared between arms"
    elif one.pooled:
        answer = "no verdict: constant within arms"
    elif found.low is not None and found.high is not None:
        if -NEGLIGIBLE < found.low and found.high < NEGLIGIBLE:
            answer = "not supported"
        elif p is not None and p < planning.ALPHA:
            answer = "supported"
    elif p is not None and p < planning.ALPHA:
        answer = "supported"
    return replace(one, p_adjusted=p, adjustment=adjustment, verdict=answer)


def _constant(values: ArrayLike) -> bool:
    """Whether finite values differ by rounding only, if at all; NaN and infinity do not count."""
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    return not len(x) or float(np.ptp(x)) <= _NOISE * float(np.abs(x).max())


def _resolution(x: Array) -> float:
    """Step of a metric's ranks: a millionth of its unit, or of its range if that is less; never rounding."""
    if _constant(x):
        return resample.RESOLUTION
    return max(min(resample.RESOLUTION, 1e-6 * float(np.ptp(x))), 1e-12 * float(np.abs(x).max()))


def _within(sample: Sample) -> tuple["pd.Series[Any]", bool]:
    """Units for what is told within arms, and whether they lie in several arms.

    A network counts once in each arm that found and trained it. Where one final error stands for it in
    several arms, it counts once in all, and nothing can be exchanged within arms.
    """
    trials, used = sample.trials, sample.error.notna()
    final = sample.units.astype(str) + " " + sample.error.astype(str)
    if "retraining_id" in trials:
        final = trials["retraining_id"].where(trials["retraining_id"].notna(), trials["trial_id"])
    if trials.loc[used, "arm"].groupby(final[used]).nunique().gt(1).any():
        return sample.units, True
    return trials["arm"].astype(str) + " " + sample.units.astype(str), False


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
    probability, stopped = chances(sample), (trials["status"] == "pruned").to_numpy()
    audit = (
        trials["audit"].astype("boolean").fillna(False).to_numpy(dtype=bool) if "audit" in trials else None
    )
    try:
        found = pruning.association(
            metric,
            error,
            probability=probability,
            stopped=stopped,
            audit=audit,
            failed=_failed(sample).to_numpy(),
            units=sample.units.tolist(),
            resolution=resolution,
            draws=draws,
        )
    except ValueError as problem:
        found = pruning.association(
            metric, error, stopped=stopped, failed=_failed(sample).to_numpy(), draws=draws
        )
        return found, [f"not corrected for stopped runs: {problem}"]
    return found, ["among survivors only"] if not found.weighted else []


def _weights(sample: Sample, error: Array) -> Array | None:
    """One over the probability with which each row got its final error, 0 without; None without a design."""
    chance = chances(sample)
    if chance is None:
        return None
    weights = np.zeros(len(error))
    kept = ~_failed(sample).to_numpy()
    found = pruning.inverse_probability(chance[kept], error[kept])
    if found is None:
        return None
    weights[kept] = found
    return weights


def _failed(sample: Sample) -> "pd.Series[bool]":
    """Rows that have no final error for another reason than that a rule stopped them."""
    status = sample.trials["status"]
    return status.isin(_FAILED) | ((status == "completed") & sample.error.isna())


def _weighted_within(
    sample: Sample, metric: Array, error: Array, resolution: float, draws: Draws
) -> pruning.Weighted:
    """Tau-b within arms, weighted by inverse probabilities."""
    chance = chances(sample)
    assert chance is not None
    return pruning.weighted_within(
        metric,
        error,
        chance,
        sample.trials["arm"].tolist(),
        failed=_failed(sample).to_numpy(),
        units=_within(sample)[0].tolist(),
        resolution=resolution,
        draws=draws,
    )


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


def _detail(sample: Sample, one: MetricFinding, draws: Draws) -> Detail:
    """Further numbers on a metric, from 999 resamples, of very many rows from 199."""
    table = np.stack([sample.metrics[one.name], sample.error], axis=1).astype(np.float64)
    rows: Any = np.isfinite(table).all(axis=1)
    x, y = table[rows].T
    units, arms = sample.units[rows].tolist(), sample.trials.loc[rows, "arm"].tolist()
    within = _within(sample)[0][rows].tolist()
    few = 199 if len(x) > MANY else min(draws.resamples or _FEWER, _FEWER)
    fewer = replace(draws, resamples=few, permutations=_LEAST_PERMUTATIONS)
    step = _resolution(x)
    coarse = np.rint(y / _SPARSE) * _SPARSE
    sparse = correlate.by_group(x, coarse, arms, units=within, resolution=step, draws=fewer)
    rho = one.overall.spearman.value
    alone = one.overall.n_unique == one.overall.n_used
    over = gain = None
    size = sample.metrics["params_m"] if "params_m" in sample.metrics and one.name != "params_m" else None
    if size is not None and not _constant(size[rows]) and one.overall.n_unique >= _ENOUGH:
        over = against(sample, one.name, "params_m", fewer)
        gain = correlate.predictive_gain(x, 100 * y, {"params_m": size[rows]}, units=units, draws=fewer)
    groupings = {
        name.removeprefix("axes."): correlate.by_group(
            x, y, sample.trials.loc[rows, name].tolist(), units=units, resolution=step, draws=fewer
        )
        for name in _groupings(sample, rows)
    }
    return Detail(
        sparse=sparse.headline,
        rho_interval=correlate.bonett_wright(rho, len(x)) if rho is not None and alone else None,
        over_size=over,
        gain=gain,
        share=_share(sample, one, x, y, step),
        groupings=groupings,
    )


def against(
    sample: Sample,
    name: str,
    other: str,
    draws: Draws,
    *,
    over: Literal["within arms", "pooled"] = "within arms",
) -> Estimate:
    """Tau-b of one metric with the error less that of another, on the rows that have both, drawn together.

    A metric that falls with the error is turned round first, so what is above 0 speaks for the first one.
    """
    within = over == "within arms"
    units = (_within(sample)[0] if within else sample.units).tolist()
    arms = sample.trials["arm"] if within else None
    table = np.stack([sample.metrics[name], sample.metrics[other], sample.error], axis=1).astype(np.float64)
    rows: Any = np.isfinite(table).all(axis=1)
    error, groups = table[:, 2], None if arms is None else arms[rows].tolist()
    sides: list[Array] = []
    turned: list[str] = []
    for label, values in zip((name, other), table.T[:2], strict=True):
        ranks = np.full(len(error), np.nan)  # a step that suits one metric may be all of the other's range
        ranks[rows] = resample.dense_ranks(values[rows], _resolution(values[rows]))
        falls = _falls(ranks[rows], error[rows], groups)
        sides.append(-ranks if falls else ranks)
        turned += [label] if falls else []
    labels = None if arms is None else arms.tolist()
    found = correlate.compare_metrics(sides[0], sides[1], error, groups=labels, units=units, draws=draws)
    which = " and ".join(turned)
    return found.restricted(f"{which} turned round, as it goes the other way" if turned else None)


def _falls(ranks: Array, error: Array, arms: Sequence[str] | None) -> bool:
    """Whether a metric falls as the error rises, within arms if these are given."""
    group = resample.codes(arms, len(ranks), "arms") if arms is not None else np.zeros(len(ranks), np.intp)
    members = [np.flatnonzero(group == arm) for arm in range(int(group.max(initial=-1)) + 1)]
    level, errors = (resample.dense_ranks(side, resample.RESOLUTION) for side in (ranks, error))
    kernel = resample.within_tau_kernel(level, errors, members)
    return bool(kernel(np.ones((1, len(error))))[0] < 0)


def _groupings(sample: Sample, rows: Any) -> list[str]:
    """Axes, and the search seed, that divide rows into groups otherwise than arms do."""
    names = [*swept(sample), *(["search_seed"] if "search_seed" in sample.trials else [])]
    arms = sample.trials.loc[rows, "arm"]
    found = []
    for name in names:
        labels = sample.trials.loc[rows, name].astype(str)
        pairs = pd.DataFrame({"arm": arms, "label": labels}).drop_duplicates()
        same = len(pairs) == arms.nunique() == labels.nunique()
        if labels.nunique() > 1 and labels.value_counts().max() >= resample.ENOUGH_UNITS and not same:
            found.append(name)
    return found


def _share(sample: Sample, one: MetricFinding, x: Array, y: Array, step: float) -> float | None:
    """Share of a whole space that errs at most as much as what the metric puts first; ties by their mean."""
    if sample.kind != "ground truth" or one.overall.tau_b.value is None:
        return None
    ranks = resample.dense_ranks(x if one.overall.tau_b.value > 0 else -x, step)
    return selection.share_at_least_as_good(float(y[ranks == 0].mean()), y)


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


def _family_note(metrics: Sequence[MetricFinding], unanswered: Sequence[Unanswered]) -> str:
    declared = [*(one.name for one in metrics if one.primary), *(one.name for one in unanswered)]
    rest = len(metrics) + len(unanswered) - len(declared)
    if declared:
        lost = f", {len(unanswered)} without an answer among them" if unanswered else ""
        return (
            f"{len(declared)} primary metrics were declared in study.json ({', '.join(declared)}){lost}: "
            f"their p-values are adjusted by Holm; those of the other {rest} by Benjamini and Hochberg, for "
            "exploration."
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
    by_key = epochs.groupby("key", observed=True)["value"]
    named = [
        str(key)
        for key, values in by_key
        if values.nunique() > 2 and not _constant(values) and key not in ("seconds", "lr", "drop_path")
    ]
    strength = {one.name.removeprefix("search_"): one.test.p for one in metrics}
    declared = {one.name.removeprefix("search_") for one in metrics if one.primary}
    named = [key for key in named if not key.endswith("_mb")]
    ranked = sorted(named, key=lambda key: (key not in declared, strength.get(key) or 1.0, key))
    arms = sample.trials["arm"].tolist()
    error: Array = np.asarray(sample.error, dtype=np.float64)
    groups = arms if len(set(arms)) > 1 else None
    units = (_within(sample)[0] if groups else sample.units).tolist()
    weights = _weights(sample, error)
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
        points = correlate.over_epochs(
            wide, error, groups=groups, weights=weights, units=units, resolution=step, draws=draws
        )
        pooled = points
        if groups:
            pooled = correlate.over_epochs(
                wide, error, weights=weights, units=sample.units.tolist(), resolution=step, draws=draws
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
