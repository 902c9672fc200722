"""The sections of a report: verdicts, tables and figures in the order in which they are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from analysis.agreement import KEPT
from analysis.associations import NEGLIGIBLE, MetricFinding, Unanswered, ranked
from analysis.checklist import Item
from analysis.compare import MARGIN, Comparison, Difference, PairedDifference
from analysis.correlate import apart
from analysis.findings import Findings, Versus
from analysis.limits import Flow
from analysis.loaders import Sample
from analysis.mixed import tau_ceiling
from analysis.page import Block, Bullets, Cards, Heading, Picture, Table, Text
from analysis.resample import Estimate
from analysis.selection import random_policy

_EXPLORED = 3
"""Exploratory metrics that stand beside the verdicts; all are in the table of metrics."""


@dataclass(frozen=True)
class Answer:
    """The answer of a study to a claim, and all that it rests on."""

    claim: str
    kind: Literal["arm", "metric"]
    declared: bool
    """Whether the study named it before there were results; what was not is exploratory."""

    verdict: str
    flow: Flow
    value: float | None
    """Of an arm, the difference in test error in percentage points; of a metric, tau-b."""

    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    detectable: float | None
    """True difference, or rank correlation, that such a study finds with a power of 80 %."""

    reason: str | None
    """Why there is no verdict, or what limits the number."""

    rests_on: str
    """The same in words."""


def claims(sample: Sample, found: Findings) -> list[Answer]:
    """All claims with their answers: of arms, then of metrics, declared ones first."""
    answers = [_of_arms(one) for one in found.versus]
    noun = "run" if sample.kind == "study" else "network"
    declared = [_of_metric(one, noun) for one in ranked(found.metrics) if one.primary]
    lost = [_without(one, noun) for one in found.unanswered]
    rest = [_of_metric(one, noun) for one in ranked(found.metrics) if not one.primary]
    return [*answers, *declared, *lost, *rest]


def _of_arms(one: Versus) -> Answer:
    result = one.claim.difference
    return Answer(
        claim=f"{one.claim.arm} errs less than {one.claim.other}",
        kind="arm",
        declared=True,
        verdict=one.claim.verdict,
        flow=one.flow,
        value=None if result is None else result.mean_difference,
        low=None if result is None else result.low,
        high=None if result is None else result.high,
        p=None if result is None else result.p,
        p_adjusted=one.claim.adjusted_p,
        detectable=None if result is None else result.minimum_detectable,
        reason=one.claim.doubt or (None if result is None else result.reason),
        rests_on=_rests_on(one),
    )


def _of_metric(one: MetricFinding, noun: str) -> Answer:
    return Answer(
        claim=f"{one.name} tells which {noun} errs less",
        kind="metric",
        declared=one.primary,
        verdict=one.verdict,
        flow=one.flow,
        value=one.headline.value,
        low=one.headline.low,
        high=one.headline.high,
        p=one.p,
        p_adjusted=one.p_adjusted,
        detectable=one.detectable,
        reason="; ".join(filter(None, [one.restriction, one.headline.restriction])) or None,
        rests_on=_metric_rests_on(one),
    )


def _without(one: Unanswered, noun: str) -> Answer:
    return Answer(
        claim=f"{one.name} tells which {noun} errs less",
        kind="metric",
        declared=True,
        verdict=one.verdict,
        flow=one.flow,
        value=None,
        low=None,
        high=None,
        p=None,
        p_adjusted=None,
        detectable=None,
        reason=one.reason,
        rests_on=f"Declared, and without an answer: {one.reason}. It counts in the family of declared "
        "metrics.",
    )


def _rests_on(one: Versus) -> str:
    result = one.claim.difference
    if result is None:
        return "No run of one side has finished."
    told = f"Difference {result.mean_difference:+.2f} points"
    told += f" [{result.low:+.2f}, {result.high:+.2f}]" if result.low is not None else ", no interval"
    told += f", n = {result.n_a} and {result.n_b}"
    told += f", adjusted {_p_is(one.claim.adjusted_p)}" if one.claim.adjusted_p is not None else ""
    if one.claim.doubt:
        return f"{told}. No verdict: {one.claim.doubt}."
    if result.minimum_detectable is None:
        return f"{told}. {result.reason}: the spread between runs is unknown."
    return f"{told}. Minimum detectable difference {result.minimum_detectable:.2f} points (power 80 %)."


def _metric_rests_on(one: MetricFinding) -> str:
    where = (
        " pooled"
        if one.pooled
        else " within arms"
        if len(one.grouped.groups) + one.grouped.n_small > 1
        else ""
    )
    told = f"Tau-b {_estimate(one.headline)}{where}, n = {one.headline.n:,}"
    told += f", adjusted {_p_is(one.p_adjusted)}" if one.p_adjusted is not None else ""
    told += "" if one.primary else "; not declared beforehand"
    if not one.decided and one.detectable is not None:
        told += f". Minimum detectable rank correlation {one.detectable:.2f} (power 80 %)"
    return f"{told}."


# The page


def page_blocks(
    sample: Sample,
    found: Findings,
    items: Sequence[Item],
    pictures: Mapping[str, Picture],
    missing: Mapping[str, str],
) -> list[Block]:
    """All blocks of the page: what the findings, the checklist and the figures say, section by section."""

    def shown(*stems: str) -> list[Block]:
        return [
            picture
            for stem, picture in pictures.items()
            if any(stem == s or (s.endswith("_") and stem.startswith(s)) for s in stems)
        ]

    answers = claims(sample, found)
    cards = [(one.claim, one.verdict, one.rests_on) for one in answers if one.declared]
    blocks: list[Block] = [Heading("Verdicts")]
    blocks += [Cards(cards)] if cards else [Text("The study declared no claim.", "warning")]
    blocks.append(
        Text(
            "Claims that the study named before its results. A claim of an arm is decided where its p-value, "
            "adjusted by Holm over all arms' claims, is below 0.05. A metric has no verdict where runs were "
            "stopped and their chances of finishing are not known, where networks are shared between arms, "
            "or where it is constant within arms. Otherwise it is not supported where its interval lies "
            f"within -{NEGLIGIBLE} and +{NEGLIGIBLE}, whatever its p-value says; else supported where that "
            "p-value, adjusted over the declared metrics, is below 0.05; else undecided."
        )
    )
    exploratory = [(one.claim, one.verdict, one.rests_on) for one in answers if not one.declared]
    if exploratory:
        blocks += [
            Heading("Exploratory", 3),
            Cards(exploratory[:_EXPLORED]),
            Text(
                "Metrics that were not declared before the results, the strongest first: p-values are "
                "adjusted by Benjamini and Hochberg over all of them, and what stands here is a question for "
                "a next study, not a claim of this one."
            ),
        ]
    if found.restrictions:
        blocks += [Heading("What limits this report", 3), Bullets(found.restrictions)]
    blocks += [Heading("Runs"), *_counts(found), *shown("flow")]
    blocks += [
        Heading("Arms"),
        *_arms(sample, found),
        *shown("error_by_arm", "interaction"),
        *_versus_tables(found),
    ]
    blocks += shown("improvement", "profiles", "critical_difference", "seeds")
    blocks += [*_aggregates(found)]
    blocks += [Heading("Search metrics and the final error"), *_metrics(sample, found, shown)]
    searched = shown("trajectories", "operations", "cells_", "cell_", "curves")
    if sample.kind == "study" or searched:
        blocks.append(Heading("The searches" if sample.kind == "study" else "The networks"))
        blocks += searched or [Text("No search was recorded over epochs.")]
    blocks += _agreement(found, shown("distances"))
    blocks += [Heading("Variance and power"), *_variance(found), *shown("variance", "power")]
    blocks += [Heading("Cost and size"), *shown("anytime"), *_anytime(found), *shown("front")]
    if not shown("anytime", "front"):
        blocks.append(Text("Neither cost nor size was recorded."))
    blocks += [Heading("Checklist"), *_checklist(items)]
    blocks += [Heading("Environment and data"), *_environment(sample)]
    blocks += [Heading("How the numbers were made"), *_methods(found, missing)]
    return blocks


def _counts(found: Findings) -> list[Block]:
    counts = found.counts
    row = [
        "-" if value is None else f"{value:,}"
        for value in (
            counts.n_rows,
            counts.n_total,
            counts.n_used,
            counts.n_unique,
            counts.n_pruned,
            counts.n_failed,
            counts.n_pending,
            counts.n_missing,
            counts.n_not_started,
        )
    ]
    header = ["n_rows", "n_total", "n_used", "n_unique", "n_pruned", "n_failed", "n_pending", "n_missing"]
    header.append("n_not_started")
    blocks: list[Block] = [
        Table(
            header,
            [row],
            "Rows of the source; rows in the analysis; with a final error; different networks among "
            "these; stopped early; failed; not ended; completed without a final error; planned and never "
            "started (- where the plan is not recorded).",
        )
    ]
    if found.failures:
        told = "; ".join(
            f"{name}: {'not testable' if p is None else _p_is(p)}" for name, p in found.failures.items()
        )
        blocks.append(Text(f"Whether failing depends on the configuration (permutation test, Holm): {told}."))
    return blocks


def _arms(sample: Sample, found: Findings) -> list[Block]:
    rows = []
    for arm in found.arms:
        mean, low, high = arm["error_mean"], arm["error_low"], arm["error_high"]
        error = "-" if _nan(mean) else f"{mean:.2f}" if _nan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"
        role = f" ({arm['role']})" if arm["role"] and arm["role"] != arm["arm"] else ""
        rows.append(
            [
                f"{arm['arm']}{role}",
                f"{arm['n']:,} of {arm['n_total']:,}",
                error,
                f"{arm['n_unique']:,}",
                *(
                    "-" if _nan(arm[name]) else _short(arm[name])
                    for name in ("params_m", "skips", "search_seconds", "peak_memory_mb")
                ),
            ]
        )
    header = ["arm", "runs", "error % [95 % CI]", "networks", "params M", "skips", "search s", "memory MB"]
    blocks: list[Block] = [
        Table(
            header,
            rows,
            "Means over finished runs; 95 % t intervals where runs are independent, measured alike, and "
            "differ.",
        )
    ]
    notes = [
        f"{arm['arm']}: {arm['no_interval']}: no interval."
        for arm in found.arms
        if arm["n"] and arm["no_interval"]
    ]
    if notes and sample.kind == "study":
        blocks.append(Bullets(notes))
    return blocks


def _versus_tables(found: Findings) -> list[Block]:
    if not found.versus:
        return [Text("The study names no reference and no random arm, so arms are not compared.")]
    header = ["arms", "n", "difference [95 % CI]", "adjusted p", "A12", "RI %", "detectable"]
    blocks: list[Block] = [
        Heading("Comparisons", 3),
        Table(
            [*header, "verdict: errs less"],
            [_versus_row(one) for one in found.versus],
            "Differences in percentage points of error, Welch intervals, p by Holm over all rows. A12: "
            "probability that a run of the first arm has the higher error. "
            "RI: relative improvement of accuracy over random. Detectable: true difference found with 80 % "
            "power before adjustment.",
        ),
    ]
    if doubts := {one.claim.doubt: None for one in found.versus if one.claim.doubt}:
        blocks.append(Bullets([f"No interval, test or verdict: {why}." for why in doubts]))
    more = [
        _tests_row(one, one.claim.difference, one.comparison)
        for one in found.versus
        if one.claim.difference is not None and one.comparison is not None
    ]
    if more:
        header = ["arms", "bootstrap difference", "Welch p", "Mann-Whitney p", "Brunner-Munzel p"]
        header += ["permutation p", "Hedges g", "Cliff delta", "paired by seed"]
        blocks.append(
            Table(
                [*header, f"equivalent within {MARGIN} points"],
                more,
                "The same by other tests, none adjusted; paired where all seeds are shared; equivalence "
                "by two one-sided tests.",
                folded="The same by other tests",
            )
        )
    return blocks


def _versus_row(one: Versus) -> list[str]:
    result, name = one.claim.difference, f"{one.claim.arm} - {one.claim.other}"
    if result is None:
        return [name, *["-"] * 6, one.claim.verdict]
    told = [name, f"{result.n_a}, {result.n_b}", _difference(result)]
    if one.comparison is None:
        return [*told, *["-"] * 4, one.claim.verdict]
    gain = one.improvement.percent if one.improvement else None
    return [
        *told,
        _p(one.claim.adjusted_p),
        _estimate(one.comparison.a12, ".2f"),
        "-" if gain is None else _estimate(gain, "+.2f"),
        "-" if result.minimum_detectable is None else f"{result.minimum_detectable:.2f}",
        one.claim.verdict,
    ]


def _tests_row(one: Versus, result: Difference, by: Comparison) -> list[str]:
    same, paired = one.equivalence, one.paired
    return [
        f"{one.claim.arm} - {one.claim.other}",
        _estimate(by.bootstrap, "+.2f"),
        _p(result.p),
        _p(by.p_mann_whitney),
        _p(by.p_brunner_munzel),
        _p(by.p_permutation),
        "-" if result.hedges_g is None else f"{result.hedges_g:+.2f}",
        f"{result.cliff_delta:+.2f}",
        "-" if paired is None else f"{_difference(paired)} (n = {paired.n})",
        "-" if same is None else f"{same.verdict} ({_p_is(same.p)})",
    ]


def _difference(result: Difference | PairedDifference) -> str:
    interval = f" [{result.low:+.2f}, {result.high:+.2f}]" if result.low is not None else ""
    return f"{result.mean_difference:+.2f}{interval}"


def _aggregates(found: Findings) -> list[Block]:
    if not found.aggregates:
        return []
    rows = []
    for arm in (str(each["arm"]) for each in found.arms if each["n"]):
        values = found.aggregates.get(arm)
        names = ("iqm", "mean", "optimality_gap")
        rows.append(
            [
                arm,
                *("-" if values is None else _estimate(values[name]) for name in names),
                "-" if arm not in found.improvement else _estimate(found.improvement[arm], ".2f"),
                found.doubts.get(arm, ""),
            ]
        )
    header = ["arm", "IQM", "mean", "optimality gap", "P(beats random)", "why not"]
    kept = len(header) if found.doubts else -1
    return [
        Heading("Normalised scores", 3),
        Table(
            header[:kept],
            [row[:kept] for row in rows],
            "0 is the mean random architecture, 1 the best run among these; stratified bootstrap, 95 %.",
        ),
    ]


def _metrics(sample: Sample, found: Findings, shown: Callable[..., list[Block]]) -> list[Block]:
    if not found.metrics:
        return [
            *([Text(found.family)] if found.unanswered else []),
            Text(
                "No metric can be correlated with a final error here; see what limits this report.", "warning"
            ),
        ]
    return [
        Text(found.family),
        _ceiling(found),
        *_simpson(found),
        *shown("metrics"),
        _associations(sample, found),
        _coefficients(found),
        *shown("scatter_"),
        *shown("heat"),
        *shown("groups_"),
        *shown("epochs"),
        *_pruning(found),
        *_controls(found),
        *_choosing(found),
        *_models(found),
        *_groupings(found),
        *_single_restrictions(found),
    ]


def _ceiling(found: Findings) -> Text:
    ceiling = found.ceiling
    if ceiling.value is None:
        return Text(f"Noise ceiling: not known, as {ceiling.restriction}.", "note")
    return Text(
        "Noise ceiling: no metric can correlate with the error by more than "
        f"r = {_estimate(ceiling, '.3f')}, which is tau-b {_estimate(tau_ceiling(ceiling), '.3f')} "
        "under normality (dashed in the figures). It is the root of the reliability of the mean of "
        f"{found.replicates:.3g} trainings (ICC of one: {_estimate(found.components.icc, '.3f')}), "
        "over all arms; within arms, where networks differ less, the ceiling is at most this.",
        "note",
    )


def _associations(sample: Sample, found: Findings) -> Table:
    rows = [
        [
            _named(one),
            _unit(sample, one.name),
            f"{one.headline.n:,}",
            f"{one.headline.n_units:,}",
            _estimate(one.headline),
            _estimate(one.grouped.pooled),
            _p(one.p),
            _p(one.p_adjusted),
            _detectable(one),
            one.verdict,
        ]
        for one in ranked(found.metrics)
    ]
    rows += [
        [f"{one.name} (primary)", _unit(sample, one.name), f"{one.flow.n_used:,}", *["-"] * 6, one.verdict]
        for one in found.unanswered
    ]
    header = ["metric", "unit, better", "n", "units", "tau-b, headline", "tau-b, pooled", "p", "adjusted p"]
    return Table(
        [*header, "detectable", "verdict"],
        rows,
        "Associations with the final error: above 0, a higher metric goes with a higher error. Headline: "
        "within arms where there are several, weighted where runs were stopped with known probabilities. "
        "95 % intervals; p by permutation within arms; detectable: rank correlation told from 0 with 80 % "
        "power.",
    )


def _coefficients(found: Findings) -> Table:
    rows = [
        [
            one.name,
            _estimate(one.overall.spearman),
            _by_fisher(one),
            _estimate(one.overall.pearson),
            "-" if one.detail is None else _estimate(one.detail.sparse),
            _estimate(one.grouped.between),
            one.overall.words,
            one.test.method,
        ]
        for one in ranked(found.metrics)
    ]
    header = ["metric", "Spearman's rho", "the same by Fisher's z", "Pearson's r", "sparse tau-b"]
    return Table(
        [*header, "tau-b of arms' means", "pooled, in words", "test"],
        rows,
        "Other coefficients, pooled over arms but for sparse tau-b, which is within them as the "
        "headline, with errors told apart by 0.1 %. Fisher's z with the standard error of Bonett and "
        "Wright checks the bootstrap, where every row is a unit.",
        folded="Other coefficients",
    )


def _single_restrictions(found: Findings) -> list[Block]:
    rows = [
        [one.name, f"{text}."]
        for one in found.metrics
        if (text := one.restriction or one.headline.restriction)
    ]
    title = "Restrictions of single metrics"
    return [Table(["metric", "restriction"], rows, f"{title}.", folded=title)] if rows else []


def _simpson(found: Findings) -> list[Block]:
    """The warnings: first those that the intervals bear out, then those that only the signs give."""
    warned = [one for one in found.metrics if one.grouped.simpson]
    clear = [one for one in warned if apart(one.grouped.pooled, one.grouped.within)]
    blocks: list[Block] = []
    if clear:
        told = "; ".join(
            f"{one.name} {_estimate(one.grouped.pooled)} pooled and {_estimate(one.grouped.within)} within"
            for one in clear
        )
        blocks.append(
            Text(
                "Simpson warning: pooled over arms, these metrics tell another story than within arms, and "
                "the intervals of "
                f"tau-b lie apart: {told}. The arms make part or all of the pooled association; quote the "
                "one within.",
                "warning",
            )
        )
    if weak := [one for one in warned if one not in clear]:
        told = ", ".join(
            f"{one.name} ({one.grouped.pooled.value:+.2f} and {one.grouped.within.value:+.2f})"
            for one in weak
        )
        blocks.append(
            Text(
                "Simpson warning, by the sign alone: pooled and within arms tau-b differ in sign for "
                f"{told}, but their "
                "intervals overlap, as they do by chance in few runs.",
                "note",
            )
        )
    return blocks


def _pruning(found: Findings) -> list[Block]:
    with_stops = [one for one in found.metrics if one.pruned is not None and one.pruned.n_stopped]
    if not with_stops:
        return []
    rows = []
    for one in with_stops:
        p = one.pruned
        assert p is not None
        rows.append(
            [
                one.name,
                f"{p.n_used}, {p.n_stopped}",
                _estimate(p.survivors),
                _estimate(one.headline) if p.weighted and not one.pooled else "-",
                _estimate(p.weighted["tau_b"]) if p.weighted else "-",
                _estimate(p.audit),
                "-" if p.effective_n is None else f"{p.effective_n:.1f}",
                "-" if p.bounds is None else f"{p.bounds[0]:+.2f} to {p.bounds[1]:+.2f}",
                _estimate(p.model),
            ]
        )
    header = [
        "metric",
        "finished, stopped",
        "survivors only",
        "weighted, headline",
        "weighted, pooled",
        "audit subset",
        "effective n",
        "bounds",
        "model-based",
    ]
    return [
        Heading("Corrected for stopped runs", 3),
        Table(
            header,
            rows,
            "Tau-b, pooled over arms but for the headline, which is within. Survivors were selected on "
            "what is correlated: conditional on "
            "survival. Weighted by recorded probabilities of finishing; bounds over all errors that "
            "stopped runs could have had; the model is bivariate normal and cannot be checked.",
        ),
    ]


def _controls(found: Findings) -> list[Block]:
    rows = [
        [
            one.name,
            ", ".join(one.partial.controls),
            _estimate(one.partial.raw),
            _estimate(one.partial.partial),
            one.partial.words,
        ]
        for one in found.metrics
        if one.partial is not None
    ]
    if not rows:
        return []
    return [
        Heading("Size held fixed", 3),
        Table(
            ["metric", "controls", "rho", "rho given controls", "in words"],
            rows,
            "Spearman's rho pooled over arms, and that of the residuals of ranks; 95 % intervals.",
        ),
        *_over_size(found),
    ]


def _over_size(found: Findings) -> list[Block]:
    rows = [
        [
            one.name,
            _estimate(one.detail.over_size),
            "-" if one.detail.gain is None else _estimate(one.detail.gain),
        ]
        for one in ranked(found.metrics)
        if one.detail is not None and one.detail.over_size is not None
    ]
    if not rows:
        return []
    return [
        Table(
            ["metric", "tau-b within arms above that of params", "gain in R squared over params"],
            rows,
            "Whether the metric says more than size: its tau-b within arms less that of the parameters, both "
            "turned to rise with the error as observed here and resampled together; and how much better a "
            "line in both predicts runs left out than one in the parameters alone (10-fold). 95 % intervals.",
        )
    ]


def _groupings(found: Findings) -> list[Block]:
    """Each metric of interest within every grouping of the rows, and the warnings that these raise."""
    blocks: list[Block] = []
    for one in ranked(found.metrics):
        if one.detail is None or not one.detail.groupings:
            continue
        rows = [
            [
                name,
                f"{len(each.groups) + each.n_small}",
                _estimate(each.pooled),
                _estimate(each.within),
                _estimate(each.between),
                _estimate(each.heterogeneity.mean),
                "-"
                if each.heterogeneity.i_squared is None
                else f"{100 * each.heterogeneity.i_squared:.0f} %",
                "; ".join(f"{label} {_estimate(group)}" for label, group in each.groups) or "-",
                each.simpson or "",
            ]
            for name, each in one.detail.groupings.items()
        ]
        header = [
            "by",
            "groups",
            "pooled",
            "within",
            "between",
            "mean of groups",
            "I squared",
            "groups of 5 or more",
        ]
        blocks.append(
            Table(
                [*header, "warning"],
                rows,
                f"Tau-b of {one.name} with the final error over other groupings than arms: pooled, within "
                "and between groups, the random-effects mean of the groups, and each group of five units or "
                "more.",
                folded=f"{one.name} by axis and seed",
            )
        )
    return blocks


def _choosing(found: Findings) -> list[Block]:
    return [*_chosen(found), *_random_search(found), *_policies(found), *_among_the_best(found)]


def _chosen(found: Findings) -> list[Block]:
    rows = [
        [
            one.name,
            f"{chosen.k} of {chosen.n:,}",
            _estimate(chosen.regret, ".2f"),
            _estimate(chosen.precision, ".2f"),
            _estimate(chosen.rank, ".1f"),
            _estimate(chosen.beats_random, ".2f"),
        ]
        for one in ranked(found.metrics)
        for chosen in one.selection[:2]
    ]
    if not rows:
        return []
    return [
        Heading("Choosing by a metric", 3),
        Table(
            ["metric", "chosen", "regret, points", "precision", "rank of the best", "P(beats random draws)"],
            rows,
            "Runs chosen by the metric in the direction observed here, which flatters it; percentile "
            "intervals, 95 %. The last column: probability that the best chosen is strictly better "
            "than the best of as many random draws.",
            folded="Quality of choices",
        ),
    ]


def _random_search(found: Findings) -> list[Block]:
    if not found.random_search:
        return []
    errors = [f"{error:.2f}" for error in found.random_search.values()]
    return [
        Table(
            ["random networks", *found.random_search],
            [["expected error of the best, %", *errors]],
            "What random search finds in this space, exactly: with errors y in descending order, the "
            "expected best of n draws without replacement is the sum of y_i C(i - 1, n - 1) / C(N, n).",
        )
    ]


def _policies(found: Findings) -> list[Block]:
    rows = [
        [one.name, f"{q:.3g}", *(f"{random_policy(q, n):.3g}" for n in (1, 10, 100))]
        for one in ranked(found.metrics)
        if one.detail is not None and (q := one.detail.share) is not None
    ]
    if not rows:
        return []
    return [
        Table(
            ["metric", "q", "n = 1", "n = 10", "n = 100"],
            rows,
            "The network that each metric puts first, in the direction observed here, against random "
            "search: q, the share of the space that errs at most as much, and the probability "
            "(1 - q)^n that n random networks all err more.",
            folded="Against random search",
        )
    ]


def _among_the_best(found: Findings) -> list[Block]:
    shares = [(one.name, one.best) for one in found.metrics if one.best]
    if not shares:
        return []
    biased = any("selected by" in (e.restriction or "") for _, best in shares for e in best.values())
    return [
        Table(
            ["metric", *(f"best {name}" for name in shares[0][1])],
            [[name, *(f"{_estimate(e)}, n = {e.n:,}" for e in best.values())] for name, best in shares],
            "Tau-b among the best runs, taken by the very error that is correlated, which biases it: no "
            "second training."
            if biased
            else "Tau-b among the best runs, where a search has to tell them apart; the best are taken by "
            "another training.",
            folded="Among the best runs only",
        )
    ]


def _models(found: Findings) -> list[Block]:
    rows = []
    for one in found.metrics:
        if one.model is None or not one.model.terms:
            continue
        terms = {term.name: term for term in one.model.terms}
        parts = "; ".join(
            f"{c.name} {100 * c.share:.0f} %" for c in one.model.components if c.share is not None
        )
        rows.append(
            [
                one.name,
                f"{one.model.n}",
                *(
                    f"{_estimate(terms[name].slope, '+.2f')}, {_p_is(terms[name].p)}"
                    for name in ("within", "between")
                ),
                parts or "-",
                one.model.restriction or "",
            ]
        )
    if not rows:
        return []
    return [
        Table(
            ["metric", "n", "slope within arms", "slope between arms", "variance", "note"],
            rows,
            "Mixed models: points of error per standard deviation of the metric within arms; intercepts "
            "random by arm and, crossed, by search seed.",
            folded="Mixed models",
        )
    ]


def _variance(found: Findings) -> list[Block]:
    blocks: list[Block] = []
    if found.spread is not None:
        blocks.append(
            Text(
                f"Between runs of one arm the final error has a standard deviation of {found.spread:.3g} "
                f"points ({found.spread_df} degrees of freedom)."
            )
        )
    elif found.unlike is not None:
        blocks.append(Text(f"Nothing is pooled over arms: {found.unlike}.", "warning"))
    elif found.doubts:
        blocks.append(
            Text(
                "The spread between independent runs is not known, as no arm has two of them: "
                + "; ".join(f"{arm}: {why}" for arm, why in found.doubts.items())
                + ".",
                "warning",
            )
        )
    else:
        blocks.append(
            Text(
                "One run per arm at most: the spread between runs is unknown, and so is what the study "
                "could find.",
                "warning",
            )
        )
    icc = found.components.icc
    blocks.append(
        Text(
            "Share of the variance between networks rather than between trainings of one (ICC): "
            f"{_estimate(icc, '.3f')}."
            if icc.value is not None
            else f"Noise of retraining: not known, as {icc.restriction}."
        )
    )
    if found.sweep is not None and found.sweep.effects:
        rows = [
            [e.name, str(e.df), f"{100 * e.share:.1f} %", "-" if e.f is None else f"{e.f:.2f}", _p(e.p)]
            for e in found.sweep.effects
        ]
        rows.append(["residual", "-", f"{100 * (found.sweep.residual_share or 0):.1f} %", "-", "-"])
        blocks.append(
            Table(
                ["factor", "df", "share", "F", "p"],
                rows,
                f"Analysis of variance over the axes, n = {found.sweep.n}, the random arm left out. "
                f"{found.sweep.restriction or ''}",
            )
        )
        means = [[m.factor, m.level, _estimate(m.mean, ".2f"), f"{m.mean.n}"] for m in found.sweep.means]
        blocks.append(
            Table(
                ["factor", "level", "estimated marginal mean, %", "n"],
                means,
                "Estimated marginal means of the final error, all combinations of the other axes weighted "
                "alike. Where settings share their seeds, a mean speaks of other seeds, too: its interval "
                "holds the variance between seeds.",
                folded="Estimated marginal means",
            )
        )
    return blocks


def _anytime(found: Findings) -> list[Block]:
    if not found.anytime:
        return []
    rows = []
    for one in found.anytime:
        low, middle, high = (None if hours is None else f"{hours:.3g}" for hours in one.to_target)
        never = one.n_sequences - one.n_reached
        rows.append(
            [
                one.arm,
                f"{one.n}",
                f"{one.total_hours:.3g}",
                "-" if one.area is None else _estimate(one.area, ".2f"),
                "-" if one.target is None or middle is None else f"{middle} [{low}, {high or 'never'}]",
                "-" if one.target is None else f"{never} of {one.n_sequences}",
            ]
        )
    area = next((one.area for one in found.anytime if one.area is not None), None)
    target = found.anytime[0].target
    told = f" {area.method.partition(';')[0].capitalize()}." if area is not None else ""
    told += f" Target: {target:.2f} %, the mean of the reference or random arm." if target is not None else ""
    return [
        Table(
            ["arm", "n", "hours", "mean error, %", "hours to the target", "never reached it"],
            rows,
            f"Area under the anytime curves over its width, and hours to a target.{told} Medians and 95 % "
            "ranges over the same sequences of runs; those that never reach the target are censored at their "
            "end (Kaplan-Meier).",
        )
    ]


def _checklist(items: Sequence[Item]) -> list[Block]:
    rows = [
        [
            str(item.number),
            item.question,
            item.answer,
            item.evidence + (f" Authors: {item.said}" if item.said else ""),
        ]
        for item in items
    ]
    count = {answer: sum(item.answer == answer for item in items) for answer in ("yes", "no", "unknown")}
    told = ", ".join(f"{number} {answer}" for answer, number in count.items())
    return [
        Text(
            f"The best-practice checklist of Lindauer and Hutter (2020), answered from the records: {told}."
        ),
        Table(["", "point", "answer", "evidence"], rows),
    ]


def _environment(sample: Sample) -> list[Block]:
    study = sample.tables.study
    origin = dict(study.get("provenance") or {})
    packages = origin.pop("packages", None) or {}
    rows = [[name.replace("_", " "), _plain_text(value)] for name, value in origin.items()]
    rows += (
        [["packages", ", ".join(f"{name} {version}" for name, version in packages.items())]]
        if packages
        else []
    )
    rows += [["command", str(study["command"])]] if study.get("command") else []
    rows += [
        [
            name.replace("_", " ") + "s",
            ", ".join(map(str, values[:40])) + (", ..." if len(values) > 40 else ""),
        ]
        for name, values in sample.seeds.items()
    ]
    rows += [[f"sha256 of {name}", digest] for name, digest in sample.sources.items()]
    return [Table(["", ""], rows)] if rows else [Text("No provenance was recorded.", "warning")]


def _methods(found: Findings, missing: Mapping[str, str]) -> list[Block]:
    notes = [
        found.draws_note,
        "Independent units: different networks (genotype keys) of an arm, or of all where pooled; for "
        "arms, search runs.",
        "Tau-b, Spearman's rho and Pearson's r with BCa bootstrap intervals over units; percentile "
        "intervals below 10 units, none below 5.",
        "P-values of metrics: permutation of units within arms. Values of a metric count as ties where they "
        "are closer than 1e-6, or than a millionth of its range where that is smaller; a metric whose range "
        "is below 1e-9 of its size is constant. Errors closer than 1e-6 are ties.",
        "Numbers in results.json are rounded to six significant digits; the rows behind every figure are "
        "in figures/.",
    ]
    rows = [[name, reason] for name, reason in missing.items()]
    blocks: list[Block] = [Bullets(notes)]
    if rows:
        blocks.append(
            Table(
                ["figure", "why it is not drawn"],
                rows,
                "Figures that the records do not support.",
                folded="Figures not drawn",
            )
        )
    return blocks


# Texts


def _estimate(found: Estimate, form: str = "+.2f") -> str:
    """A number with its interval; the reason for none is in the notes."""
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:{form}}, no interval"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _by_fisher(one: MetricFinding) -> str:
    interval = one.detail.rho_interval if one.detail is not None else None
    return "-" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _unit(sample: Sample, name: str) -> str:
    """Unit of a metric and which direction is better, from the catalogue in study.json."""
    listed = sample.tables.study.get("metrics") or {}
    about = listed.get(name) or listed.get(name.removeprefix("search_")) or {}
    return ", ".join(filter(None, [about.get("unit"), about.get("better")])) or "-"


def _named(one: MetricFinding) -> str:
    return one.name + (" (primary)" if one.primary else "") + (" (pooled)" if one.pooled else "")


def _detectable(one: MetricFinding) -> str:
    return "-" if one.detectable is None else f"{one.detectable:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _p_is(value: float | None) -> str:
    return "no p" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _short(value: float) -> str:
    """The number with three digits, and never as a power of ten: 1,730 and 0.0469."""
    return f"{float(f'{value:.3g}'):,.12g}"


def _nan(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain_text(value: Any) -> str:
    if value is None:
        return "not recorded"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list | tuple) and value
        else "none"
        if value in ([], ())
        else str(value)
    )


def _agreement(found: Findings, drawn: Sequence[Block]) -> list[Block]:
    """Whether the searches of an arm find the same cells, and when each has found its own."""
    if not found.agreement:
        return []
    rows = [
        [
            one.arm + (" (random)" if one.baseline and one.arm != "random" else ""),
            f"{one.n:,} of {one.n_total:,}",
            _estimate(one.jaccard, ".2f"),
            _estimate(one.kappa, ".2f"),
            _estimate(one.edits, ".1f"),
            _estimate(one.kept_from, ".1f"),
            "-" if one.last_epoch is None else f"{one.last_epoch}",
        ]
        for one in found.agreement
    ]
    header = [
        "arm",
        "searches",
        "Jaccard [95 % CI]",
        "kappa",
        "edit distance",
        "kept from epoch",
        "last epoch",
    ]
    random = any(one.baseline for one in found.agreement)
    chance = (
        "The random arm is the agreement that comes by chance. "
        if random
        else "There is no random arm to show the agreement that comes by chance. "
    )
    blocks: list[Block] = [
        Heading("Do searches find the same cells?", 3),
        Table(
            header,
            rows,
            "Jaccard: edges (cell, node, source, operation) that two searches share over those that either "
            "has; edit distance: operations and sources to change, at most, to make one network the other; "
            "means over all pairs of searches of the arm. Kappa (Fleiss): agreement on the operation of each "
            "edge, or that it is not taken, beyond that of answers given at random in the same shares. Kept "
            "from epoch: the first, counted from 0, from which on the Jaccard index with the search's own "
            f"genotype of its last epoch is at least {KEPT:g}, mean over searches. Percentile bootstrap "
            f"intervals over searches, none below 5 of them. {chance}High agreement does not mean good "
            "cells: searches that all collapse to skip connections agree.",
        ),
        *drawn,
    ]
    notes = [f"{one.arm}: {why}." for one in found.agreement if (why := one.jaccard.restriction)]
    return blocks + ([Bullets(notes)] if notes else [])
