"""The sections of a report: verdicts, tables and figures in the order in which they are read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis import figures
from analysis.checklist import Item
from analysis.compare import MARGIN
from analysis.findings import Findings, MetricFinding, Versus
from analysis.loaders import Sample
from analysis.page import Block, Bullets, Cards, Heading, Picture, Table, Text
from analysis.resample import Estimate


def verdicts(sample: Sample, found: Findings, most: int) -> list[tuple[str, str, str]]:
    """Claims with their verdicts: of arms, then of metrics."""
    cards = [
        (f"{one.claim.arm} errs less than {one.claim.other}", one.claim.verdict, _rests_on(one))
        for one in found.versus
    ]
    return cards + [
        (
            f"{one.name} tells which {'run' if sample.kind == 'study' else 'network'} errs less",
            one.verdict,
            _metric_rests_on(one),
        )
        for one in figures.top(found, most)
    ]


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

    blocks: list[Block] = [Heading("Verdicts")]
    cards = verdicts(sample, found, 6)
    blocks += [Cards(cards)] if cards else [Text("The records allow no claim.", "warning")]
    blocks.append(
        Text(
            "A claim of an arm is decided where its p-value, adjusted by Holm over all arms' claims, is "
            "below 0.05. A metric is "
            "supported where its adjusted p-value is below 0.05 (weighted associations: where the interval "
            "leaves out 0), and "
            "not supported where its interval lies within -0.1 and +0.1; else the study leaves it undecided."
        )
    )
    if found.restrictions:
        blocks += [Heading("What limits this report", 3), Bullets(found.restrictions)]
    blocks += [Heading("Runs"), *_counts(sample, found), *shown("flow")]
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
    blocks += [Heading("Variance and power"), *_variance(found), *shown("variance", "power")]
    blocks += [Heading("Cost and size"), *shown("anytime", "front")]
    if not shown("anytime", "front"):
        blocks.append(Text("Neither cost nor size was recorded."))
    blocks += [Heading("Checklist"), *_checklist(items)]
    blocks += [Heading("Environment and data"), *_environment(sample)]
    blocks += [Heading("How the numbers were made"), *_methods(found, missing)]
    return blocks


def _counts(sample: Sample, found: Findings) -> list[Block]:
    counts = found.counts
    row = [
        f"{value:,}"
        for value in (
            counts.n_rows,
            counts.n_total,
            counts.n_used,
            counts.n_unique,
            counts.n_pruned,
            counts.n_failed,
            counts.n_pending,
            counts.n_missing,
        )
    ]
    header = ["n_rows", "n_total", "n_used", "n_unique", "n_pruned", "n_failed", "n_pending", "n_missing"]
    blocks: list[Block] = [
        Table(
            header,
            [row],
            "Rows of the source; rows in the analysis; with a final error; different networks among "
            "these; stopped early; failed; not ended; completed without a final error.",
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
                    "-" if _nan(arm[name]) else f"{arm[name]:.3g}"
                    for name in ("params_m", "skips", "search_seconds", "peak_memory_mb")
                ),
            ]
        )
    header = ["arm", "runs", "error % [95 % CI]", "networks", "params M", "skips", "search s", "memory MB"]
    blocks: list[Block] = [
        Table(
            header, rows, "Means over finished runs; 95 % t intervals where runs are independent and differ."
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
    rows, more = [], []
    for one in found.versus:
        result, name = one.claim.difference, f"{one.claim.arm} - {one.claim.other}"
        if result is None or one.comparison is None:
            rows.append([name, "-", "-", "-", "-", "-", "-", one.claim.verdict])
            continue
        gain = one.improvement.percent if one.improvement else None
        rows.append(
            [
                name,
                f"{result.n_a}, {result.n_b}",
                f"{result.mean_difference:+.2f}"
                + (f" [{result.low:+.2f}, {result.high:+.2f}]" if result.low is not None else ""),
                _p(one.claim.adjusted_p),
                _estimate(one.comparison.a12),
                "-" if gain is None else _estimate(gain, "+.2f"),
                "-" if result.minimum_detectable is None else f"{result.minimum_detectable:.2f}",
                one.claim.verdict,
            ]
        )
        same, paired = one.equivalence, one.paired
        more.append(
            [
                name,
                _estimate(one.comparison.bootstrap, "+.2f"),
                _p(result.p),
                _p(one.comparison.p_mann_whitney),
                _p(one.comparison.p_brunner_munzel),
                _p(one.comparison.p_permutation),
                "-" if result.hedges_g is None else f"{result.hedges_g:+.2f}",
                f"{result.cliff_delta:+.2f}",
                "-"
                if paired is None
                else f"{paired.mean_difference:+.2f}"
                + (f" [{paired.low:+.2f}, {paired.high:+.2f}]" if paired.low is not None else "")
                + f" (n = {paired.n})",
                "-" if same is None else f"{same.verdict} ({_p_is(same.p)})",
            ]
        )
    header = [
        "arms",
        "n",
        "difference [95 % CI]",
        "adjusted p",
        "A12",
        "RI %",
        "detectable",
        "verdict: errs less",
    ]
    caption = (
        "Differences in percentage points of error, Welch intervals, p by Holm over all rows. A12: "
        "probability that a run of the first arm has the higher error. "
        "RI: relative improvement of accuracy over random. Detectable: true difference found with 80 % "
        "power before adjustment."
    )
    blocks: list[Block] = [Heading("Comparisons", 3), Table(header, rows, caption)]
    if more:
        header = [
            "arms",
            "bootstrap difference",
            "Welch p",
            "Mann-Whitney p",
            "Brunner-Munzel p",
            "permutation p",
            "Hedges g",
            "Cliff delta",
            "paired by seed",
            f"equivalent within {MARGIN} points",
        ]
        blocks.append(
            Table(
                header,
                more,
                "The same by other tests, none adjusted; paired where all seeds are shared; equivalence "
                "by two one-sided tests.",
                folded="The same by other tests",
            )
        )
    return blocks


def _aggregates(found: Findings) -> list[Block]:
    if not found.aggregates:
        return []
    rows = [
        [
            arm,
            *(_estimate(values[name]) for name in ("iqm", "mean", "optimality_gap")),
            "-" if arm not in found.improvement else _estimate(found.improvement[arm]),
        ]
        for arm, values in found.aggregates.items()
    ]
    return [
        Heading("Normalised scores", 3),
        Table(
            ["arm", "IQM", "mean", "optimality gap", "P(beats random)"],
            rows,
            "0 is the mean random architecture, 1 the best run of the study; stratified bootstrap, 95 %.",
        ),
    ]


def _metrics(sample: Sample, found: Findings, shown: Any) -> list[Block]:
    if not found.metrics:
        return [
            Text(
                "No metric can be correlated with a final error here; see what limits this report.", "warning"
            )
        ]
    blocks: list[Block] = [Text(found.family)]
    ceiling = found.ceiling
    if ceiling.value is None:
        blocks.append(
            Text(
                f"Noise ceiling: not known, as {ceiling.restriction}. A metric cannot be more strongly "
                "associated with the error than the error with itself in another training.",
                "note",
            )
        )
    else:
        blocks.append(
            Text(
                "Noise ceiling: no metric can correlate with the error by more than "
                f"{_estimate(ceiling, '.3f')}, the root of the reliability of the mean of "
                f"{found.replicates:.3g} trainings (ICC of one: {_estimate(found.components.icc, '.3f')}).",
                "note",
            )
        )
    blocks += _simpson(found)
    blocks += shown("metrics")
    ordered = figures.top(found, len(found.metrics))
    rows = [
        [
            _named(one),
            f"{one.headline.n:,}",
            f"{one.headline.n_units:,}",
            _estimate(one.headline),
            _estimate(one.overall.tau_b),
            _p(one.test.p),
            _p(one.p_adjusted),
            _detectable(one),
            one.verdict,
        ]
        for one in ordered
    ]
    header = [
        "metric",
        "n",
        "units",
        "tau-b, headline",
        "tau-b, pooled",
        "p",
        "adjusted p",
        "detectable",
        "verdict",
    ]
    blocks.append(
        Table(
            header,
            rows,
            "Associations with the final error: above 0, a higher metric goes with a higher error. "
            "Headline: within arms where "
            "there are several, weighted where runs were stopped with known probabilities. 95 % intervals; "
            "p by permutation "
            "within arms; detectable: rank correlation told from 0 with 80 % power.",
        )
    )
    more = [
        [
            one.name,
            _estimate(one.overall.spearman),
            _estimate(one.overall.pearson),
            _estimate(one.grouped.between),
            one.overall.words,
            one.test.method,
        ]
        for one in ordered
    ]
    header = ["metric", "Spearman's rho", "Pearson's r", "tau-b of arms' means", "pooled, in words", "test"]
    blocks.append(Table(header, more, "Other coefficients, pooled over arms.", folded="Other coefficients"))
    blocks += [*shown("scatter_"), *shown("heat"), *shown("groups_"), *shown("epochs")]
    blocks += [*_pruning(found), *_controls(found), *_choosing(found), *_models(found)]
    notes = [
        f"{one.name}: {text}."
        for one in found.metrics
        for text in [one.restriction or one.headline.restriction]
        if text
    ]
    if notes:
        blocks.append(
            Table(
                ["metric", "restriction"],
                [note.split(": ", 1) for note in notes],
                "Restrictions of single metrics.",
                folded="Restrictions of single metrics",
            )
        )
    return blocks


def _simpson(found: Findings) -> list[Block]:
    """The warnings: first those that the intervals bear out, then those that only the signs give."""
    warned = [one for one in found.metrics if one.grouped.simpson]
    clear = [one for one in warned if figures.apart(one.grouped.pooled, one.grouped.within)]
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
    ]


def _choosing(found: Findings) -> list[Block]:
    rows = []
    for one in figures.top(found, len(found.metrics)):
        for chosen in one.selection[:2]:
            rows.append(
                [
                    one.name,
                    f"{chosen.k} of {chosen.n:,}",
                    _estimate(chosen.regret),
                    _estimate(chosen.precision),
                    _estimate(chosen.rank, ".1f"),
                    _estimate(chosen.beats_random),
                ]
            )
    blocks: list[Block] = []
    if rows:
        blocks += [
            Heading("Choosing by a metric", 3),
            Table(
                [
                    "metric",
                    "chosen",
                    "regret, points",
                    "precision",
                    "rank of the best",
                    "P(beats random draws)",
                ],
                rows,
                "Runs chosen by the metric in the direction observed here, which flatters it; percentile "
                "intervals, 95 %. The last column: probability that the best chosen is strictly better "
                "than the best of as many random draws.",
                folded="Quality of choices",
            ),
        ]
    shares = [(one.name, one.best) for one in found.metrics if one.best]
    if shares:
        names = list(shares[0][1])
        notes = {
            e.restriction
            for _, best in shares
            for e in best.values()
            if e.restriction and "selected by" in e.restriction
        }
        caption = (
            "Tau-b among the best runs, where a search has to tell them apart; the best are taken by "
            "another training."
        )
        caption = (
            "Tau-b among the best runs, taken by the very error that is correlated, which biases it: no "
            "second training."
            if notes
            else caption
        )
        blocks.append(
            Table(
                ["metric", *(f"best {name}" for name in names)],
                [[name, *(f"{_estimate(e)}, n = {e.n:,}" for e in best.values())] for name, best in shares],
                caption,
                folded="Among the best runs only",
            )
        )
    return blocks


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
        means = [[m.factor, m.level, _estimate(m.mean), f"{m.mean.n}"] for m in found.sweep.means]
        blocks.append(
            Table(
                ["factor", "level", "estimated marginal mean, %", "n"],
                means,
                "Estimated marginal means of the final error.",
                folded="Estimated marginal means",
            )
        )
    return blocks


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
        for name, values in seeds(sample).items()
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
        "P-values of metrics: permutation of units within arms. Values closer than 1e-6 count as ties.",
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
    form = (
        form
        if found.value is None
        or not found.method.startswith(("precision", "recall", "regret", "rank", "beats"))
        else form.lstrip("+")
    )
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:{form}}, no interval"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _named(one: MetricFinding) -> str:
    return one.name + (" (primary)" if one.primary else "") + (" (pooled)" if one.pooled else "")


def _detectable(one: MetricFinding) -> str:
    return "-" if one.detectable is None else f"{one.detectable:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _p_is(value: float | None) -> str:
    return "no p" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


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


def seeds(sample: Sample) -> dict[str, list[int]]:
    """Seeds that the trials took, by the name of their column."""
    return {
        name: sorted(int(value) for value in sample.trials[name].dropna().unique())
        for name in map(str, sample.trials.columns)
        if name.endswith("_seed") and "." not in name
    }
