"""Figures of a report: one function each, from findings to a drawing, or to the reason for none."""

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from scipy import stats

from analysis import planning, plots
from analysis.correlate import EpochAssociation
from analysis.findings import Findings, MetricFinding, by_seed, pareto, ranked, swept
from analysis.loaders import Sample
from analysis.plots import BLUE, GREY, INK, PALE, VERMILION, blank, legend
from analysis.resample import Estimate, count
from nas.genotype import OPERATIONS

GREEN, PURPLE, ORANGE, SKY = "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
DARKER = ("#00436B", "#8A3B00", "#005C43", "#8C4A6B", "#8F6200", "#2C6E99")
"""For arms beyond the seventh: the same hues, darker."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")

_MANY_POINTS = 1_500
_MOST_GROUPS = 12
_TOP = 3


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with what a reader needs to judge it, and the rows that drew it."""

    stem: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


Result = Drawing | str
"""A drawing, or the reason why the sample supports none."""


def top(found: Findings, most: int = _TOP) -> list[MetricFinding]:
    """The metrics to draw, as `ranked` orders them."""
    return ranked(found.metrics)[:most]


# Runs


def flow(sample: Sample, found: Findings) -> Result:
    """What became of every row: submitted, stopped, failed, finished."""
    counts = found.counts
    figure = blank("", 3.1)
    axes = figure.add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 6.3)
    axes.axis("off")
    noun = "trials started" if sample.kind == "study" else "different networks"
    steps = [(f"{counts.n_total:,} {noun}", 4.75)]
    if counts.n_rows != counts.n_total:
        steps.insert(0, (f"{counts.n_rows:,} rows in the source", 5.6))
        steps[1] = (steps[1][0], 4.1)
    steps.append((f"{counts.n_used:,} with a final error", 2.2))
    unit = "different networks" if sample.kind == "study" else "independent units"
    steps.append((f"{counts.n_unique:,} {unit} among them", 0.6))
    for text, y in steps:
        _box(axes, 2.6, y, text, BLUE)
    for (_, y), (_, below) in itertools.pairwise(steps):
        axes.annotate(
            "", (2.6, below + 0.45), (2.6, y - 0.45), arrowprops={"arrowstyle": "-|>", "color": INK}
        )
    losses = {
        "stopped early": counts.n_pruned,
        "failed, out of memory or diverged": counts.n_failed,
        "not ended": counts.n_pending,
        "completed without a final error": counts.n_missing,
    }
    lost = [f"{number:,} {name}" for name, number in losses.items()]
    axes.annotate("", (5.1, 3.2), (2.6, 3.2), arrowprops={"arrowstyle": "-|>", "color": INK})
    _box(axes, 7.4, 3.2, "\n".join(lost), VERMILION if sum(losses.values()) else GREY, 4.5, 1.9)
    data = pd.DataFrame(
        {
            "stage": ["rows", "total", *losses, "used", "unique"],
            "n": [counts.n_rows, counts.n_total, *losses.values(), counts.n_used, counts.n_unique],
        }
    )
    return Drawing(
        "flow",
        "What became of the runs.",
        f"n = {counts.n_used:,} of {counts.n_total:,} have a final error; counts, so without an interval.",
        figure,
        data,
    )


def _box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 4.4, height: float = 0.85
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor="white",
            edgecolor=colour,
            linewidth=1.4,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK)


def errors(sample: Sample, found: Findings) -> Result:
    """Error of every run by arm, with the axis of relative improvement where there is a random arm."""
    if found.counts.n_used == 0:
        return "no run has a final error"
    figure = plots.error_by_arm(sample.tables)
    figure.suptitle("")
    _raster(figure, found.counts.n_used)
    baseline = sample.tables.baseline
    random = 100 - 100 * sample.error[sample.trials["arm"] == baseline].mean()
    told = ""
    if np.isfinite(random) and random > 0:
        axes = figure.axes[0]
        # Accuracy in percent relative to that of random: both directions of one line.
        above = axes.secondary_xaxis(
            "top",
            functions=(partial(_gain, random), partial(_loss, random)),
        )
        above.set_xlabel("relative improvement over random (%)", fontsize=8.5)
        above.tick_params(labelsize=8)
        told = f" The upper axis is relative to the mean accuracy of random, {random:.2f} %."
    return Drawing(
        "error_by_arm",
        "Final error by arm.",
        f"Every run is a dot; n at the right; 95 % t intervals.{told}",
        figure,
        plots.error_data(sample.tables),
    )


def _gain(random: float, error: Any) -> Any:
    """Relative improvement in percent over the accuracy of random, of an error in percent."""
    return 100 * (100 - error - random) / random


def _loss(random: float, gain: Any) -> Any:
    """The error in percent that has this relative improvement."""
    return 100 - random * (1 + gain / 100)


# Metrics


def overview(sample: Sample, found: Findings) -> Result:
    """Tau-b of every metric, within groups and pooled."""
    if not found.metrics:
        return "no metric can be correlated with a final error"
    order = sorted(found.metrics, key=lambda one: one.headline.value or 0.0)
    figure = blank("", 1.3 + 0.3 * len(order))
    axes = figure.add_subplot()
    for place, one in enumerate(order):
        _interval(axes, place - 0.13, one.headline, BLUE, "o")
        _interval(axes, place + 0.17, one.overall.tau_b, GREY, "s", open_=True)
    _tau_axis(axes, found.ceiling)
    axes.set_ylim(-0.8, len(order) - 0.2)
    axes.set_yticks(range(len(order)), [_star(one) + one.name for one in order], fontsize=8.5)
    n = axes.secondary_yaxis("right")
    n.set_yticks(range(len(order)), [f"n = {one.headline.n:,}" for one in order], fontsize=8, color=GREY)
    n.tick_params(length=0)
    n.spines["right"].set_visible(False)
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="headline: within arms"),
        Line2D([], [], color=GREY, marker="s", markerfacecolor="white", label="pooled over arms"),
        *_ceiling_handle(found.ceiling),
    ]
    legend(figure, handles)
    rows = [_row(one.name, one.headline, "headline") | {"p_adjusted": one.p_adjusted} for one in order]
    rows += [_row(one.name, one.overall.tau_b, "pooled") for one in order]
    stars = " A star marks adjusted p < 0.05." if any(_star(one) for one in order) else ""
    return Drawing(
        "metrics",
        "How search metrics go with the final error.",
        "Kendall's tau-b, 95 % intervals over independent units, n at the right; above 0, a higher metric "
        f"goes with a higher error.{stars}",
        figure,
        pd.DataFrame(rows),
    )


def scatter(one: MetricFinding, sample: Sample, found: Findings) -> Result:
    """A metric against the final error, by arm, with a line per arm and one for all."""
    table = pd.DataFrame(
        {
            "trial_id": sample.trials["trial_id"],
            "arm": sample.trials["arm"],
            "status": sample.trials["status"],
            "search_seed": sample.trials["search_seed"] if "search_seed" in sample.trials else 0,
            "metric": sample.metrics[one.name],
            "error_percent": 100 * sample.error,
        }
    )
    stopped = table[(table["status"] == "pruned") & np.isfinite(table["metric"])]
    table = table[np.isfinite(table["metric"]) & np.isfinite(table["error_percent"])]
    if len(table) < 3:
        return f"{one.name}: fewer than 3 rows with a final error"
    figure = blank("", 4.9)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 6), width_ratios=(7, 1))
    axes = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    arms = [arm for arm in sample.tables.arms if (table["arm"] == arm).any()]
    colours = _colours(arms, sample)
    many = len(table) > _MANY_POINTS
    seeds = {seed: index for index, seed in enumerate(sorted(table["search_seed"].dropna().unique()))}
    for arm in arms:
        runs = table[table["arm"] == arm]
        for seed, part in runs.groupby("search_seed", dropna=False):
            marker = MARKERS[seeds.get(seed, 0) % len(MARKERS)]
            axes.scatter(
                part["metric"],
                part["error_percent"],
                s=6 if many else 30,
                color=colours[arm],
                marker=marker,
                alpha=0.35 if many else 0.8,
                linewidth=0,
                rasterized=many,
            )
        _trend(axes, runs["metric"], runs["error_percent"], colours[arm], "-", 1.4)
    _trend(axes, table["metric"], table["error_percent"], INK, (0, (5, 3)), 1.2)
    if len(stopped):
        y = axes.get_ylim()[1]
        axes.scatter(
            stopped["metric"],
            np.full(len(stopped), y),
            s=26,
            facecolor="none",
            edgecolor=GREY,
            marker="o",
            clip_on=False,
            zorder=5,
        )
    cut = ""
    if many:
        axes.set_ylim(top=float(table["error_percent"].quantile(0.995)))
        cut = " The worst 0.5 % lie above the axis."
    bins = min(40, max(6, int(math.sqrt(len(table)))))
    above.hist(table["metric"], bins=bins, color=PALE)
    beside.hist(table["error_percent"], bins=bins, color=PALE, orientation="horizontal")
    for side in (above, beside):
        side.axis("off")
    axes.set_xlabel(one.name)
    axes.set_ylabel("final error (%)")
    axes.grid(color=PALE, linewidth=0.5)
    handles: list[Any] = [
        Line2D([], [], color=colours[arm], marker="o", markersize=5, label=arm) for arm in arms[:_MOST_GROUPS]
    ]
    handles.append(Line2D([], [], color=INK, linestyle=(0, (5, 3)), label="all rows"))
    if len(stopped):
        handles.append(
            Line2D(
                [],
                [],
                color=GREY,
                marker="o",
                markerfacecolor="none",
                linestyle="",
                label="stopped, no final error",
            )
        )
    _wrapped_legend(figure, handles)
    ceiling = (
        f" Noise ceiling {_number(found.ceiling)}."
        if found.ceiling.value is not None
        else " No noise ceiling: one training per network."
    )
    return Drawing(
        f"scatter_{one.name}",
        f"{one.name} against the final error.",
        f"n = {len(table):,}. Tau-b {_number(one.grouped.within)} within arms and "
        f"{_number(one.overall.tau_b)} pooled.{ceiling}{cut}"
        + (" Markers tell search seeds apart." if 1 < len(seeds) <= len(MARKERS) and not many else ""),
        figure,
        table.drop(columns="status"),
    )


def groups(one: MetricFinding, sample: Sample, found: Findings) -> Result:
    """Tau-b of a metric in each arm, pooled, within, between and the mean of arms: the Simpson view."""
    grouped = one.grouped
    if len(grouped.groups) + grouped.n_small < 2:
        return f"{one.name}: one arm only"
    rows = [(name, estimate, GREY, "o") for name, estimate in grouped.groups]
    rows += [
        ("mean of arms", grouped.heterogeneity.mean, GREEN, "D"),
        ("between arms' means", grouped.between, PURPLE, "D"),
        ("within arms", grouped.within, BLUE, "D"),
        ("pooled", grouped.pooled, VERMILION, "D"),
    ]
    figure = blank("", 1.3 + 0.32 * len(rows))
    axes = figure.add_subplot()
    for place, (_, estimate, colour, marker) in enumerate(rows):
        if estimate.value is None:
            axes.text(0, place, "not defined", ha="center", va="center", fontsize=8, color=GREY)
        _interval(axes, place, estimate, colour, marker)
    _tau_axis(axes, found.ceiling)
    axes.axhline(len(grouped.groups) - 0.5, color=PALE, linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [textwrap.shorten(name, 34) for name, *_ in rows], fontsize=8.5)
    n = axes.secondary_yaxis("right")
    n.set_yticks(
        range(len(rows)), [f"n = {estimate.n:,}" for _, estimate, *_ in rows], fontsize=8, color=GREY
    )
    n.tick_params(length=0)
    n.spines["right"].set_visible(False)
    small = f" {count(grouped.n_small, 'arm')} with fewer than 5 units: no row." if grouped.n_small else ""
    i2 = grouped.heterogeneity.i_squared
    spread = f" I² = {100 * i2:.0f} %." if i2 is not None else ""
    warning = _sentence(grouped.simpson or "no Simpson warning")
    return Drawing(
        f"groups_{one.name}",
        f"{one.name}: tau-b by arm, within, between and pooled.",
        f"n = {grouped.n_used:,}; 95 % intervals.{spread}{small} {warning}",
        figure,
        pd.DataFrame([_row(name, estimate, one.name) for name, estimate, *_ in rows]),
    )


def heat(sample: Sample, found: Findings) -> Result:
    """Within-arm tau-b of metrics by arm, with the pooled column beside it."""
    names = [name for one in found.metrics for name, _ in one.grouped.groups]
    arms = [arm for arm in sample.tables.arms if arm in names]
    if len(arms) < 2 or len(found.metrics) < 2:
        return "fewer than 2 arms of at least 5 units, or fewer than 2 metrics"
    order = sorted(found.metrics, key=lambda one: one.headline.value or 0.0)
    columns = [*arms, "within", "pooled"]
    values, rows = np.full((len(order), len(columns)), np.nan), []
    for row, one in enumerate(order):
        cells = dict(one.grouped.groups) | {"within": one.grouped.within, "pooled": one.grouped.pooled}
        for column, name in enumerate(columns):
            if name in cells and cells[name].value is not None:
                values[row, column] = cells[name].value
                rows.append(_row(one.name, cells[name], name))
    figure = blank("", 1.6 + 0.27 * len(order) + (0.5 if max(map(len, columns)) > 9 else 0))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="PuOr", norm=TwoSlopeNorm(0, -1, 1), aspect="auto")
    for row in range(len(order)):
        for column in range(len(columns)):
            if np.isfinite(values[row, column]):
                value = values[row, column]
                colour = "white" if abs(value) > 0.55 else INK
                axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.axvline(len(arms) - 0.5, color="white", linewidth=3)
    slanted: Any = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 9 else {}
    )
    axes.set_xticks(range(len(columns)), columns, fontsize=8, **slanted)
    axes.set_yticks(range(len(order)), [_star(one) + one.name for one in order], fontsize=8.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("tau-b with error", fontsize=8.5)
    n = ", ".join(
        f"{arm}: {int((sample.trials['arm'] == arm)[sample.error.notna()].sum()):,}" for arm in arms
    )
    return Drawing(
        "heat",
        "Tau-b of metrics with the final error, arm by arm.",
        f"n = {n}. A star marks adjusted p < 0.05 within arms; empty cells are not defined. Intervals are "
        "in the data.",
        figure,
        pd.DataFrame(rows),
    )


def epochs(sample: Sample, found: Findings) -> Result:
    """Tau-b of metrics with the final error over the epochs, with the rows at risk."""
    if not found.curves:
        return "no metric was recorded over epochs, or rows may not be pooled"
    figure = blank("", 3.7)
    axes = figure.add_subplot()
    rows = []
    for curve, colour, marker in zip(found.curves, COLOURS, MARKERS, strict=False):
        at = [_epoch(point) for point in curve.points if point.estimate.value is not None]
        kept = [point.estimate for point in curve.points if point.estimate.value is not None]
        values = [estimate.value or 0.0 for estimate in kept]
        axes.plot(at, values, color=colour, marker=marker, markersize=4, label=curve.name)
        low = [math.nan if e.low is None else e.low for e in kept]
        high = [math.nan if e.high is None else e.high for e in kept]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        rows += [
            _row(curve.name, p.estimate, "epoch") | {"epoch": p.epoch, "at_risk": p.at_risk}
            for p in curve.points
        ]
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    axes.set_ylabel("tau-b with final error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    first = found.curves[0]
    axes.set_xlabel("epoch of the search" if first.stage == "search" else "epoch of retraining")
    for value in _ceilings(found.ceiling):
        axes.axhline(value, color=ORANGE, linewidth=1.1, linestyle=(0, (2, 2)))
    risk = axes.secondary_xaxis(-0.2)
    risk.set_xticks(
        [_epoch(p) for p in first.points], [str(p.at_risk) for p in first.points], fontsize=7.5, color=GREY
    )
    risk.tick_params(length=0)
    risk.spines["bottom"].set_visible(False)
    risk.set_xlabel(f"runs at risk ({first.name})", fontsize=8, color=GREY)
    handles: list[Any] = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=curve.name)
        for curve, colour, marker in zip(found.curves, COLOURS, MARKERS, strict=False)
    ]
    legend(figure, [*handles, *_ceiling_handle(found.ceiling)])
    told = "".join(
        f" {c.name}: best at epoch {c.best.epoch}, p = {c.best.p:.3f} as best of {c.best.n_epochs} epochs."
        for c in found.curves
        if c.best.p is not None
    )
    return Drawing(
        "epochs",
        "How early a metric tells the final error.",
        f"Tau-b pooled over arms, 95 % bands pointwise; n = {first.n:,} with a final error.{told}",
        figure,
        pd.DataFrame(rows),
    )


# Arms


def profiles(sample: Sample, found: Findings) -> Result:
    """Share of runs above each normalised score, by arm."""
    if not found.profiles:
        return "no random arm to normalise by, or no arm better than its mean"
    arms = [arm for arm in found.profiles if arm != sample.tables.baseline]
    random = found.profiles.get(str(sample.tables.baseline))
    figure = blank("", 0.7 + 1.75 * math.ceil(len(arms) / 3))
    rows = []
    for axes, arm in zip(_panels(figure, arms), arms, strict=True):
        for profile, colour, style in ((random, GREY, (0, (4, 2))), (found.profiles[arm], BLUE, "-")):
            if profile is None:
                continue
            axes.step(
                profile.threshold, profile.share, where="post", color=colour, linestyle=style, linewidth=1.5
            )
            if profile.low is not None and profile.high is not None:
                axes.fill_between(
                    profile.threshold,
                    profile.low,
                    profile.high,
                    step="post",
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
        axes.set_ylim(-0.03, 1.03)
        axes.text(
            0.03, 0.06, f"n = {found.profiles[arm].n}", transform=axes.transAxes, fontsize=8, color=GREY
        )
    for arm, profile in found.profiles.items():
        rows.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    "score": profile.threshold,
                    "share": profile.share,
                    "low": profile.low,
                    "high": profile.high,
                }
            )
        )
    figure.supxlabel("normalised score: 0 the mean random architecture, 1 the best run", fontsize=9.5)
    figure.supylabel("share of runs above", fontsize=9.5)
    _legend_above(
        figure,
        [
            Line2D([], [], color=BLUE, label="arm"),
            Line2D(
                [], [], color=GREY, linestyle=(0, (4, 2)), label=f"random (n = {random.n if random else 0})"
            ),
        ],
    )
    note = next((p.restriction for p in found.profiles.values() if p.restriction), None)
    return Drawing(
        "profiles",
        "Performance profiles.",
        f"n in each panel. Bands: 95 %, pointwise.{f' {_sentence(note)}' if note else ''}",
        figure,
        pd.concat(rows),
    )


def improvement(sample: Sample, found: Findings) -> Result:
    """Probability that a run of an arm beats a random one."""
    if not found.improvement:
        return "no random arm to compare with"
    figure = blank("", 1.2 + 0.36 * len(found.improvement))
    axes = figure.add_subplot()
    for place, estimate in enumerate(found.improvement.values()):
        axes.barh(place, estimate.value or 0, height=0.55, color=SKY, alpha=0.7)
        _interval(axes, place, estimate, INK, "D")
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(found.improvement) - 0.4, -0.6)
    axes.set_yticks(
        range(len(found.improvement)),
        [f"{arm} (n = {e.n})" for arm, e in found.improvement.items()],
        fontsize=9,
    )
    axes.set_xlabel("probability that a run errs less than a random architecture")
    rows = [_row(arm, estimate, "probability of improvement") for arm, estimate in found.improvement.items()]
    return Drawing(
        "improvement",
        "Probability of improvement over random.",
        "95 % intervals, none where a side has one or two runs; n counts the runs of both sides; the "
        "dashed line is no difference.",
        figure,
        pd.DataFrame(rows),
    )


def critical(sample: Sample, found: Findings) -> Result:
    """Critical-difference diagram over paired seeds, where it is allowed."""
    diagram = found.critical
    if diagram is None:
        return "seeds are not shared by all arms, so they are no blocks"
    if diagram.restriction and diagram.cd is None:
        return diagram.restriction
    assert diagram.cd is not None
    k = len(diagram.methods)
    figure = blank("", 1.6 + 0.28 * math.ceil(k / 2) + 0.16 * len(diagram.cliques))
    axes = figure.add_subplot()
    inches = 0.085 * max(len(name) + 7 for name in diagram.methods)
    margin = max(1.0, k * inches / max(plots.WIDTH - 2 * inches, 1.5))
    axes.set_xlim(0.6 - margin, k + 0.4 + margin)
    depth = 1.0 + 0.45 * len(diagram.cliques) + 0.75 * math.ceil(k / 2)
    axes.set_ylim(depth, -1.3)
    axes.axis("off")
    axes.plot([1, k], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, -0.18], color=INK, linewidth=1)
        axes.text(tick, -0.3, str(tick), ha="center", va="bottom", fontsize=8.5)
    axes.plot([1, 1 + min(diagram.cd, k - 1)], [-1.0, -1.0], color=VERMILION, linewidth=2)
    axes.text(
        1 + min(diagram.cd, k - 1) + 0.08,
        -1.0,
        f"CD = {diagram.cd:.2f}",
        va="center",
        fontsize=8.5,
        color=VERMILION,
    )
    for index, clique in enumerate(diagram.cliques):
        places = [diagram.mean_ranks[diagram.methods.index(name)] for name in clique]
        axes.plot(
            [min(places) - 0.05, max(places) + 0.05], [0.4 + 0.45 * index] * 2, color=BLUE, linewidth=3.2
        )
    half = math.ceil(k / 2)
    for index, (name, rank) in enumerate(zip(diagram.methods, diagram.mean_ranks, strict=True)):
        left = index < half
        row = index if left else k - 1 - index
        y = 0.9 + 0.45 * len(diagram.cliques) + 0.75 * row
        x = 0.7 if left else k + 0.3
        axes.plot([rank, rank, x], [0, y, y], color=GREY, linewidth=0.9)
        axes.text(
            x - 0.06 if left else x + 0.06,
            y,
            f"{name} ({rank:.2f})",
            ha="right" if left else "left",
            va="center",
            fontsize=8.5,
        )
    p = f" Friedman p = {diagram.friedman.p:.3f}." if diagram.friedman else ""
    return Drawing(
        "critical_difference",
        "Critical-difference diagram over shared seeds.",
        f"n = {diagram.n_blocks} blocks; mean ranks, 1 is best; a bar joins arms that Nemenyi's test does "
        f"not tell apart.{p} "
        f"{_sentence(diagram.restriction)}",
        figure,
        pd.DataFrame({"arm": diagram.methods, "mean_rank": diagram.mean_ranks, "cd": diagram.cd}),
    )


def seeds(sample: Sample, found: Findings) -> Result:
    """Errors of arms seed by seed: whether their order holds from seed to seed."""
    table = by_seed(sample)
    if table is None or len(table) < 2 or len(table.columns) < 2:
        return "fewer than 2 seeds shared by at least 2 arms"
    rank = table.rank(axis=1)
    figure = blank("", 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    colours = _colours([str(arm) for arm in table], sample)
    at = range(len(table))
    for arm, marker in zip(table, MARKERS * 5, strict=False):
        left.plot(at, table[arm], color=colours[str(arm)], marker=marker, markersize=5, linewidth=1.1)
        right.plot(at, rank[arm], color=colours[str(arm)], marker=marker, markersize=5, linewidth=1.1)
    left.set_ylabel("final error (%)")
    right.set_ylabel("rank among arms")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.invert_yaxis()
    for axes in (left, right):
        axes.set_xticks(list(at), [f"{seed:g}" for seed in table.index])
        axes.set_xlabel("search seed")
        axes.grid(axis="y", color=PALE, linewidth=0.5)
    _wrapped_legend(
        figure,
        [
            Line2D([], [], color=colours[str(arm)], marker=m, markersize=5, label=str(arm))
            for arm, m in zip(table, MARKERS * 5, strict=False)
        ],
    )
    whole = table.dropna()
    w = ""
    if len(whole) > 1 and whole.shape[1] > 1:
        pairs = [
            stats.spearmanr(whole.iloc[i], whole.iloc[j]).statistic
            for i in range(len(whole))
            for j in range(i)
        ]
        if np.isfinite(pairs).any():
            w = (
                " Mean Spearman correlation of the arms' order between two seeds: "
                f"{np.nanmean(pairs):+.2f} over {len(pairs)} pairs of seeds, without an interval."
            )
    return Drawing(
        "seeds",
        "Errors and ranks, seed by seed.",
        f"n = {len(table)} seeds of {len(table.columns)} arms.{w}",
        figure,
        table.reset_index(),
    )


def interaction(sample: Sample, found: Findings) -> Result:
    """Final error over two axes of a sweep, with every run."""
    names = swept(sample)
    if len(names) < 2:
        return "the study varies fewer than two axes"
    x, hue = sorted(names, key=lambda name: -sample.trials[name].nunique())[:2]
    table = sample.trials.assign(error_percent=100 * sample.error).dropna(subset=["error_percent", x, hue])
    if table.groupby([x, hue], observed=True).ngroups < 3:
        return "fewer than 3 combinations of two axes have a run"
    figure = blank("", 3.9)
    axes = figure.add_subplot()
    levels = sorted(table[x].unique(), key=lambda v: (isinstance(v, str), v))
    rows = []
    for index, (level, part) in enumerate(table.groupby(hue, observed=True)):
        shift = 0.12 * (index - (table[hue].nunique() - 1) / 2)
        colour = COLOURS[index % len(COLOURS)]
        places, means, margins = [], [], []
        for at, value in enumerate(levels):
            runs = part.loc[part[x] == value, "error_percent"].to_numpy(dtype=float)
            axes.scatter(np.full(len(runs), at + shift), runs, s=16, color=colour, alpha=0.5, linewidth=0)
            if len(runs):
                n, sd = len(runs), runs.std(ddof=1) if len(runs) > 1 else math.nan
                margin = stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n) if n > 1 else math.nan
                places.append(at + shift)
                means.append(runs.mean())
                margins.append(margin)
                rows.append({"x": value, "line": level, "n": n, "mean": runs.mean(), "margin": margin})
        label = f"{hue.removeprefix('axes.')} = {level} (n = {len(part)})"
        axes.errorbar(
            places,
            means,
            yerr=np.nan_to_num(margins),
            color=colour,
            marker=MARKERS[index],
            capsize=3,
            linewidth=1.4,
            label=label,
        )
    axes.set_xticks(range(len(levels)), [str(value) for value in levels])
    axes.set_xlabel(x.removeprefix("axes."))
    axes.set_ylabel("final error (%)")
    low, high = table["error_percent"].min(), table["error_percent"].max()
    axes.set_ylim(low - 0.5 * (high - low) - 0.05, high + 0.5 * (high - low) + 0.05)
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    handles, labels = axes.get_legend_handles_labels()
    _wrapped_legend(
        figure,
        [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i], label=label)
            for i, label in enumerate(labels)
        ],
    )
    del handles
    cells = "; ".join(f"{row['x']} x {row['line']}: {row['n']}" for row in rows)
    return Drawing(
        "interaction",
        f"{x.removeprefix('axes.')} by {hue.removeprefix('axes.')}.",
        f"Means with 95 % t intervals, every run a dot; n in each cell: {cells}.",
        figure,
        pd.DataFrame(rows),
    )


# Variance and power


def variance(sample: Sample, found: Findings) -> Result:
    """How the variance of the final error divides."""
    parts: list[tuple[str, float]] = []
    told = ""
    icc = found.components.icc
    if icc.value is not None and found.components.between is not None and found.components.within is not None:
        parts = [
            ("between networks", found.components.between),
            ("between trainings of one network", found.components.within),
        ]
        told = f"n = {icc.n:,} trainings of {icc.n_units:,} networks; ICC {_number(icc)}."
    elif found.sweep is not None and found.sweep.residual_share is not None:
        parts = [(effect.name, effect.share) for effect in found.sweep.effects] + [
            ("residual", found.sweep.residual_share)
        ]
        told = f"n = {found.sweep.n} runs; type II shares of the sum of squares, without intervals."
    if not parts:
        return "one training per network and no swept axis: the variance cannot be divided"
    total = sum(value for _, value in parts) or 1.0
    figure = blank("", 1.2)
    axes = figure.add_subplot()
    start = 0.0
    for (_, value), colour in zip(parts, COLOURS, strict=False):
        axes.barh(0, value / total, left=start, color=colour, height=0.6)
        start += value / total
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance of the final error")
    _wrapped_legend(
        figure,
        [
            Patch(color=colour, label=f"{name}: {100 * value / total:.1f} %")
            for (name, value), colour in zip(parts, COLOURS, strict=False)
        ],
    )
    return Drawing(
        "variance",
        "Where the variance of the final error comes from.",
        told,
        figure,
        pd.DataFrame(parts, columns=["component", "value"]),
    )


def power(sample: Sample, found: Findings) -> Result:
    """Difference that studies of n runs an arm can find, given the spread seen here."""
    if found.spread is None or found.spread <= 0 or sample.kind != "study":
        return "no spread between runs of one arm"
    ns = np.arange(2, 41)
    unit = np.array([planning.detectable_difference(int(n), int(n)) for n in ns])
    df, sd = found.spread_df, found.spread
    ends = [sd * math.sqrt(df / stats.chi2.ppf(q, df)) for q in (0.975, 0.025)]
    figure = blank("", 3.5)
    axes = figure.add_subplot()
    axes.plot(ns, unit * sd, color=BLUE, linewidth=1.8)
    axes.fill_between(ns, unit * ends[0], unit * ends[1], color=BLUE, alpha=0.15, linewidth=0)
    sizes = sorted({row["n"] for row in found.arms if row["n"] >= 2})
    rows = pd.DataFrame(
        {"runs_per_arm": ns, "detectable": unit * sd, "low": unit * ends[0], "high": unit * ends[1]}
    )
    for n in sizes[:3]:
        axes.axvline(n, color=VERMILION, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_xlabel("runs per arm")
    axes.set_ylabel("difference found with 80 % power\n(percentage points, log scale)")
    _plain_log(axes.yaxis)
    axes.grid(color=PALE, linewidth=0.5)
    handles: list[Any] = [
        Line2D([], [], color=BLUE, linewidth=1.8, label="minimum detectable difference"),
        Patch(color=BLUE, alpha=0.15, label="95 % interval from the spread"),
    ]
    if sizes:
        handles.append(Line2D([], [], color=VERMILION, linestyle=(0, (4, 3)), label="this study"))
    legend(figure, handles)
    return Drawing(
        "power",
        "What a study of n runs per arm can find.",
        f"n = {found.counts.n_used} runs. Two-sided t test at 0.05, before adjustment; standard deviation "
        f"within arms {sd:.2f} points "
        f"[{ends[0]:.2f}, {ends[1]:.2f}] from {df} degrees of freedom.",
        figure,
        rows,
    )


# Cost


def anytime(sample: Sample, found: Findings) -> Result:
    """Error of the incumbent over end-to-end hours, failed and stopped runs paid for."""
    if not found.anytime:
        return "no arm has two finished runs with seconds recorded and a validation error"
    arms = [one for one in found.anytime if one.arm != sample.tables.baseline]
    random = next((one for one in found.anytime if one.arm == sample.tables.baseline), None)
    shown = arms or list(found.anytime)
    figure = blank("", 0.8 + 1.85 * math.ceil(len(shown) / 3))
    rows = []
    for axes, one in zip(_panels(figure, [one.arm for one in shown]), shown, strict=True):
        for curve, colour, style in ((random, GREY, (0, (4, 2))), (one, BLUE, "-")):
            if curve is not None:
                axes.plot(curve.hours, curve.middle, color=colour, linestyle=style, linewidth=1.6)
                axes.fill_between(curve.hours, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        lost = f", {one.n_without} without error" if one.n_without else ""
        axes.text(
            0.97, 0.9, f"n = {one.n}{lost}", transform=axes.transAxes, fontsize=8, color=GREY, ha="right"
        )
    for one in found.anytime:
        rows.append(
            pd.DataFrame(
                {
                    "arm": one.arm,
                    "hours": one.hours,
                    "error_percent": one.middle,
                    "low": one.low,
                    "high": one.high,
                }
            )
        )
    figure.supxlabel("hours of search and retraining, end to end (log scale)", fontsize=9.5)
    figure.supylabel("test error of the incumbent (%)", fontsize=9.5)
    handles = [Line2D([], [], color=BLUE, label="arm")]
    if random is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label=f"random (n = {random.n})"))
    _legend_above(figure, handles)
    return Drawing(
        "anytime",
        "Error against end-to-end cost.",
        "n in each panel. The incumbent is chosen on validation and reported on test. Means and 95 % bands "
        "over 399 sequences of runs drawn with replacement from each arm: what other studies of this size "
        "would see.",
        figure,
        pd.concat(rows),
    )


def front(sample: Sample, found: Findings) -> Result:
    """Error against size with the front of what none is better and smaller than."""
    table = pareto(sample)
    if len(table) < 3 or table["params_m"].nunique() < 2:
        return "fewer than 3 finished runs of different size"
    figure = blank("", 4.2)
    axes = figure.add_subplot()
    arms = [arm for arm in sample.tables.arms if (table["arm"] == arm).any()]
    colours = _colours(arms, sample)
    many = len(table) > _MANY_POINTS
    for arm in arms:
        runs = table[table["arm"] == arm]
        axes.scatter(
            runs["params_m"],
            runs["error"],
            s=6 if many else 28,
            color=colours[arm],
            alpha=0.4 if many else 0.8,
            linewidth=0,
            rasterized=many,
        )
    best = table[table["front"]]
    axes.step(
        [*best["params_m"], table["params_m"].max()],
        [*best["error"], best["error"].iloc[-1]],
        where="post",
        color=INK,
        linewidth=1.3,
    )
    axes.set_xlabel("parameters (millions)")
    measure = table["measure"].iloc[0]
    axes.set_ylabel(f"{measure} (%)")
    axes.grid(color=PALE, linewidth=0.5)
    if many:
        axes.set_ylim(table["error"].min() - 0.5, float(table["error"].quantile(0.995)))
    handles: list[Any] = [
        Line2D([], [], color=colours[arm], marker="o", linestyle="", markersize=5, label=arm)
        for arm in arms[:_MOST_GROUPS]
    ]
    _wrapped_legend(figure, [*handles, Line2D([], [], color=INK, label="front")])
    volume = found.hypervolume
    told = f" Hypervolume {_number(volume)} of the box of all runs." if volume is not None else ""
    cut = " The worst 0.5 % lie above the axis." if many else ""
    return Drawing(
        "front",
        "Error and size.",
        f"n = {len(table):,}; {len(best)} on the front, which is that of the {measure}.{told}{cut}",
        figure,
        table,
    )


# The search


def trajectories(sample: Sample, found: Findings) -> Result:
    """What the searches did, epoch by epoch, coloured by the error they came to."""
    epochs = sample.tables.epochs
    epochs = epochs[(epochs["stage"] == "search") & np.isfinite(epochs["value"].astype(float))]
    keys = [str(key) for key in epochs["key"].unique()]
    # The eigenvalue comes first: it is what early stopping of a search looks at.
    wanted = sorted(key for key in keys if "eigenvalue" in key)[:1] + [
        key for key in ("alpha_entropy", "skips", "valid_error") if key in keys
    ]
    if not wanted:
        return "no search recorded its eigenvalue, entropy, skips or error"
    wanted = wanted[:3]
    error = dict(zip(sample.trials["trial_id"], 100 * sample.error, strict=True))
    known = [value for value in error.values() if np.isfinite(value)]
    scale = (
        Normalize(min(known), max(known) if max(known) > min(known) else min(known) + 1)
        if known
        else Normalize(0, 1)
    )
    palette = mpl.colormaps["cividis"]
    figure = blank("", 1.1 + 1.75 * len(wanted))
    panels = figure.subplots(len(wanted), 1, sharex=True, squeeze=False)[:, 0]
    rows, n = [], 0
    for axes, key in zip(panels, wanted, strict=True):
        part = epochs[epochs["key"] == key].astype({"trial_id": str})
        n = max(n, part["trial_id"].nunique())
        for trial, run in part.groupby("trial_id"):
            run = run.sort_values("epoch")
            value = error.get(trial, math.nan)
            colour = palette(scale(value)) if np.isfinite(value) else GREY
            axes.plot(
                run["epoch"],
                run["value"],
                color=colour,
                linewidth=0.9,
                alpha=0.85,
                linestyle="-" if np.isfinite(value) else (0, (3, 2)),
            )
            axes.plot(
                run["epoch"].iloc[-1:], run["value"].iloc[-1:], color=colour, marker="o", markersize=3.5
            )
        by_epoch = part.groupby("epoch")["value"].agg(["mean", "std", "count"])
        margin = (
            stats.t.ppf(0.975, np.maximum(by_epoch["count"] - 1, 1))
            * by_epoch["std"]
            / np.sqrt(by_epoch["count"])
        )
        axes.plot(by_epoch.index, by_epoch["mean"], color=VERMILION, linewidth=1.8)
        axes.fill_between(
            by_epoch.index,
            by_epoch["mean"] - margin,
            by_epoch["mean"] + margin,
            color=VERMILION,
            alpha=0.18,
            linewidth=0,
        )
        axes.set_ylabel(textwrap.fill(key.replace("_", " "), 16), fontsize=9)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        rows.append(
            part[["trial_id", "epoch", "key", "value"]].assign(
                final_error_percent=part["trial_id"].map(error)
            )
        )
    panels[-1].set_xlabel("epoch of the search")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if known:
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(scale, palette), ax=list(panels), fraction=0.025, pad=0.01
        )
        bar.set_label("final error (%)", fontsize=8.5)
    legend(
        figure,
        [
            Line2D(
                [],
                [],
                color=GREY,
                linewidth=1,
                marker="o",
                markersize=3.5,
                label="one search; it ends at the dot",
            ),
            Line2D([], [], color=VERMILION, linewidth=1.8, label="mean and 95 % interval"),
        ],
    )
    return Drawing(
        "trajectories",
        "The searches, epoch by epoch.",
        f"n = {n} searches; dashed are those without a final error.",
        figure,
        pd.concat(rows),
    )


def learning(sample: Sample, found: Findings) -> Result:
    """Validation error over epochs of search and retraining, by arm."""
    data = plots.curve_data(sample.tables)
    if data.empty or sample.kind != "study":
        return "no validation error was recorded over epochs"
    figure = plots.curves(sample.tables)
    figure.suptitle("")
    n = data["trial_id"].nunique()
    return Drawing(
        "curves",
        "Validation error over epochs.",
        f"n = {n} runs; every run is a line, the strong one their median.",
        figure,
        data,
    )


def cells(sample: Sample, found: Findings) -> Result:
    """How often the searches chose each operation at each node."""
    genotypes = sample.tables.genotypes
    final = genotypes[genotypes["stage"] == "final"] if len(genotypes) else genotypes
    if sample.tables.baseline is not None and len(final):
        random = sample.trials.loc[sample.trials["arm"] == sample.tables.baseline, "trial_id"]
        final = final[~final["trial_id"].isin(random)]
    if final.empty:
        return "no final genotypes of searches were recorded"
    counts: dict[tuple[str, int, str], int] = {}
    for text in final["genotype"]:
        for cell, nodes in json.loads(text).items():
            if not cell.endswith("_concat"):
                for node, inputs in enumerate(nodes, start=2):
                    for op, _ in inputs:
                        counts[cell, node, op] = counts.get((cell, node, op), 0) + 1
    kinds = [cell for cell in ("normal", "reduce") if any(key[0] == cell for key in counts)]
    ops = [op for op in OPERATIONS if any(key[2] == op for key in counts)]
    nodes = sorted({key[1] for key in counts})
    figure = blank("", 1.3 + 0.3 * len(ops))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    rows, widest = [], 0.0
    for axes, cell in zip(panels, kinds, strict=True):
        totals = {node: sum(counts.get((cell, node, op), 0) for op in ops) for node in nodes}
        table = np.array(
            [[counts.get((cell, node, op), 0) / max(totals[node], 1) for node in nodes] for op in ops]
        )
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, op in enumerate(ops):
            for j, node in enumerate(nodes):
                axes.text(
                    j,
                    i,
                    f"{100 * table[i, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if table[i, j] < 0.55 else INK,
                )
                k, n = counts.get((cell, node, op), 0), totals[node]
                if n:
                    ends = stats.binomtest(k, n).proportion_ci(method="wilson")
                    widest = max(widest, (float(ends.high) - float(ends.low)) / 2)
                    rows.append(
                        {
                            "cell": cell,
                            "node": node,
                            "op": op,
                            "share": k / n,
                            "low": float(ends.low),
                            "high": float(ends.high),
                            "n": n,
                        }
                    )
        axes.set_xticks(range(len(nodes)), [str(node) for node in nodes])
        axes.set_xlabel("node")
        axes.set_title(f"{cell} cell", fontsize=9.5)
        axes.set_yticks(range(len(ops)), ops, fontsize=8.5)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.01)
    bar.set_label("share of the node's inputs", fontsize=8.5)
    return Drawing(
        "operations",
        "Operations that the searches chose, node by node.",
        f"n = {len(final)} genotypes, random ones left out; percent of a node's inputs, 95 % intervals "
        "(Wilson) at most "
        f"±{100 * widest:.0f} points, each in the data.",
        figure,
        pd.DataFrame(rows),
    )


# All of them


def draw(sample: Sample, found: Findings) -> tuple[list[Drawing], dict[str, str]]:
    """All figures that the sample supports, and why it does not support the others."""
    makers: dict[str, Callable[[Sample, Findings], Result]] = {
        "flow": flow,
        "error by arm": errors,
        "metrics": overview,
        **{f"scatter of {one.name}": partial(scatter, one) for one in _scattered(found)},
        **{f"groups of {one.name}": partial(groups, one) for one in _grouped(found)},
        "heat map": heat,
        "association over epochs": epochs,
        "interaction of two axes": interaction,
        "seeds": seeds,
        "critical difference": critical,
        "performance profiles": profiles,
        "probability of improvement": improvement,
        "variance": variance,
        "power": power,
        "anytime": anytime,
        "front": front,
        "trajectories": trajectories,
        "learning curves": learning,
        "operations": cells,
    }
    drawn, missing = [], {}
    for name, make in makers.items():
        result = make(sample, found)
        if isinstance(result, Drawing):
            drawn.append(result)
        else:
            missing[name] = result
    return drawn, missing


def _scattered(found: Findings) -> list[MetricFinding]:
    """Metrics whose scatter is drawn: the first two, and the clearest Simpson warning or the third."""
    return list({one.name: one for one in (*top(found, 2), *_grouped(found)[:1], *top(found))}.values())[
        :_TOP
    ]


def _grouped(found: Findings) -> list[MetricFinding]:
    """Metrics whose groups are drawn: the first, and that of the clearest Simpson warning."""
    warned = [
        one for one in found.metrics if one.grouped.simpson and apart(one.grouped.pooled, one.grouped.within)
    ]
    warned.sort(key=lambda one: -abs((one.grouped.pooled.value or 0) - (one.grouped.within.value or 0)))
    first = [one for one in top(found, 3) if not one.pooled][:1]
    return list({one.name: one for one in (*warned[:1], *first)}.values())


def apart(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals have nothing in common; False where one is missing."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


# Parts


def _plain_log(axis: Any) -> None:
    """Labels such as 0.2 and 50 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _epoch(point: EpochAssociation) -> int:
    return int(str(point.epoch))


def _panels(figure: Figure, arms: Sequence[str]) -> list[Axes]:
    """One panel per arm, three in a row, with shared axes."""
    columns = min(3, len(arms))
    grid = figure.subplots(
        math.ceil(len(arms) / columns), columns, sharex=True, sharey=True, squeeze=False
    ).reshape(-1)
    for axes in grid[len(arms) :]:
        axes.axis("off")
    for axes, arm in zip(grid, arms, strict=False):
        axes.set_title(textwrap.shorten(arm, 30), fontsize=9)
        axes.grid(color=PALE, linewidth=0.5)
    return list(grid[: len(arms)])


def _interval(
    axes: Axes, place: float, estimate: Estimate, colour: str, marker: str, *, open_: bool = False
) -> None:
    if estimate.value is None:
        return
    if estimate.low is not None and estimate.high is not None:
        axes.plot(
            [estimate.low, estimate.high],
            [place, place],
            color=colour,
            linewidth=1.5,
            solid_capstyle="butt",
            zorder=3,
        )
    axes.plot(
        [estimate.value],
        [place],
        marker=marker,
        markersize=5,
        color=colour,
        markerfacecolor="white" if open_ else colour,
        zorder=4,
    )


def _tau_axis(axes: Axes, ceiling: Estimate) -> None:
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_xlabel("tau-b with the final error")
    for value in _ceilings(ceiling):
        axes.axvline(value, color=ORANGE, linewidth=1.1, linestyle=(0, (2, 2)))


def _ceilings(ceiling: Estimate) -> list[float]:
    return [] if ceiling.value is None else [ceiling.value, -ceiling.value]


def _ceiling_handle(ceiling: Estimate) -> list[Line2D]:
    if ceiling.value is None:
        return []
    return [
        Line2D(
            [],
            [],
            color=ORANGE,
            linewidth=1.1,
            linestyle=(0, (2, 2)),
            label=f"noise ceiling {ceiling.value:.3g}",
        )
    ]


def _trend(axes: Axes, x: Any, y: Any, colour: str, style: Any, width: float) -> None:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 3 or np.ptp(a) < 1e-12 * max(1e-300, float(np.abs(a).max())):
        return
    slope, at = np.polyfit(a - a.mean(), b, 1)
    ends = np.array([a.min(), a.max()])
    axes.plot(ends, at + slope * (ends - a.mean()), color=colour, linestyle=style, linewidth=width, zorder=4)


def _colours(arms: Sequence[str], sample: Sample) -> Mapping[str, Any]:
    """Colours of arms: random is grey; many arms in order take those of one scale."""
    searched = [arm for arm in arms if arm != sample.tables.baseline]
    plenty = (*COLOURS, *DARKER)
    if sample.kind == "ground truth" or len(searched) > len(plenty):
        palette = mpl.colormaps["cividis"]
        found: dict[str, Any] = {
            arm: palette(0.9 * i / max(len(searched) - 1, 1)) for i, arm in enumerate(searched)
        }
    else:
        found = dict(zip(searched, plenty, strict=False))
    return found | {arm: GREY for arm in arms if arm == sample.tables.baseline}


def _raster(figure: Figure, points: int) -> None:
    if points > _MANY_POINTS:
        for axes in figure.axes:
            for collection in axes.collections:
                collection.set_rasterized(True)


def _wrapped_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Legend below, in as many columns as their texts leave room for."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), int(105 / (longest + 7))))
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )


def _legend_above(figure: Figure, handles: Sequence[Any]) -> None:
    """Legend above the panels: below them stands the label of the axis that they share."""
    figure.legend(
        handles=list(handles), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8.5
    )


def _row(name: str, estimate: Estimate, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        "n_units": estimate.n_units,
    }


def _star(one: MetricFinding) -> str:
    return "* " if one.p_adjusted is not None and one.p_adjusted < planning.ALPHA else ""


def _sentence(text: str | None) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _number(estimate: Estimate) -> str:
    if estimate.value is None:
        return "not known"
    ends = "no interval" if estimate.low is None else f"[{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f} {ends}"
