"""How search metrics go with the final error: every metric with its tests, controls and verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from analysis import compare, correlate, mixed, planning, pruning, resample, selection
from analysis.correlate import Association, Grouped, Partial
from analysis.limits import Flow, chances, declared_metrics, failed_rows, flow_of, unlike
from analysis.loaders import Sample
from analysis.mixed import MixedModel
from analysis.pruning import PrunedAssociation
from analysis.resample import DRAWS, RESAMPLES, Array, Draws, Estimate, Permutation
from analysis.selection import Selection

MANY = 1_000
"""Rows beyond which intervals and tests are drawn 499 times."""

NEGLIGIBLE = 0.1
"""Tau-b within plus and minus this is too little to choose by; an interval inside it refutes a metric."""

CONTROLS = ("params_m", "madds_m", "skips")
"""What a metric may be in disguise; those of the sample are held fixed."""

FEWEST = 3
"""Runs below which nothing is estimated."""

_ENOUGH = 12
"""Fewest units for partial associations, those among the best, selection quality and mixed models."""

_MOST_EPOCHS = 12
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


def swept(sample: Sample) -> list[str]:
    """Axes of the study, other than seeds, that took several values."""
    names = [str(name) for name in sample.trials.columns]
    names = [name for name in names if name.startswith("axes.") and not name.endswith("seed")]
    return [name for name in names if sample.trials[name].nunique() > 1 and name != "axes.arm"]


def metric_findings(
    sample: Sample, draws: Draws
) -> tuple[tuple[MetricFinding, ...], tuple[Unanswered, ...], str]:
    """Metrics that can be associated with the error, declared ones that cannot, and a note on their draws."""
    declared = declared_metrics(sample)
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


def _why_not(sample: Sample, name: str) -> str | None:
    """Why a metric cannot be associated with the error, if so."""
    if apart := unlike(sample):
        return apart
    if name not in sample.metrics:
        return "not recorded"
    values = sample.metrics[name][sample.error.notna()].to_numpy(dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < FEWEST:
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
    return Unanswered(name, flow_of(sample.trials["status"], n), f"{answer}: {why}", why)


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
        flow=flow_of(sample.trials["status"], overall.n_used),
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
            failed=failed_rows(sample).to_numpy(),
            units=sample.units.tolist(),
            resolution=resolution,
            draws=draws,
        )
    except ValueError as problem:
        found = pruning.association(
            metric, error, stopped=stopped, failed=failed_rows(sample).to_numpy(), draws=draws
        )
        return found, [f"not corrected for stopped runs: {problem}"]
    return found, ["among survivors only"] if not found.weighted else []


def _weights(sample: Sample, error: Array) -> Array | None:
    """One over the probability with which each row got its final error, 0 without; None without a design."""
    chance = chances(sample)
    if chance is None:
        return None
    weights = np.zeros(len(error))
    kept = ~failed_rows(sample).to_numpy()
    found = pruning.inverse_probability(chance[kept], error[kept])
    if found is None:
        return None
    weights[kept] = found
    return weights


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
        failed=failed_rows(sample).to_numpy(),
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


def family_note(metrics: Sequence[MetricFinding], unanswered: Sequence[Unanswered]) -> str:
    """How the tests of metrics were adjusted, and why so, as text."""
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


def epoch_curves(sample: Sample, metrics: tuple[MetricFinding, ...], draws: Draws) -> tuple[EpochCurve, ...]:
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
