"""Figures of a report: one function each, from findings to a drawing, or to the reason for none."""

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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

from analysis import agreement, cells, planning, plots
from analysis.associations import EpochCurve, MetricFinding, ranked, swept
from analysis.compare import mean_interval
from analysis.correlate import EpochAssociation, apart
from analysis.findings import Findings, by_seed, pareto
from analysis.limits import told
from analysis.loaders import Sample
from analysis.mixed import tau_ceiling
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
_MOST_METRICS = 20
"""Metrics of a figure with a row each, besides the declared ones."""

_MOST_NUMBERS = 12
"""Columns of a heat map beyond which its cells are too narrow for their numbers."""

_MOST_LEVELS = 8
"""Levels of an axis beyond which runs are no cells to compare, e.g. of a rate drawn at random."""

_MOST_PAIRS = 6
_MOST_SEARCHES = 400
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

FAILURES: tuple[type[Exception], ...] = (Exception,)
"""With these errors a figure is left out, and the report says so: one figure is not worth all others."""


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
    if counts.n_not_started is not None:
        _box(axes, 7.4, steps[0][1], f"{counts.n_not_started:,} planned, never started", GREY)
    axes.annotate("", (5.1, 3.2), (2.6, 3.2), arrowprops={"arrowstyle": "-|>", "color": INK})
    _box(axes, 7.4, 3.2, "\n".join(lost), VERMILION if sum(losses.values()) else GREY, 4.5, 1.9)
    rows = {"rows": counts.n_rows, "total": counts.n_total, **losses}
    rows |= {"used": counts.n_used, "unique": counts.n_unique}
    if counts.n_not_started is not None:
        rows["planned, never started"] = counts.n_not_started
    data = pd.DataFrame({"stage": list(rows), "n": list(rows.values())})
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
    data = plots.error_data(sample.tables)
    means = data.dropna(subset=["error_mean"]).drop_duplicates("arm").sort_values("error_mean")
    least = means.iloc[0]
    bars = "; bars are 95 % t intervals of the means" if means["error_low"].notna().any() else ""
    return Drawing(
        "error_by_arm",
        "Final error by arm.",
        f"n = {found.counts.n_used:,} runs, each a dot{bars}. Lowest mean: "
        f"{least['arm']}, {least['error_mean']:.2f} % "
        f"{_ends(least['error_low'], least['error_high'])}.{told}",
        figure,
        data,
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
    order, left_out = _listed(found)
    figure = blank("", 1.3 + 0.3 * len(order))
    axes = figure.add_subplot()
    for place, one in enumerate(order):
        _interval(axes, place - 0.13, one.headline, BLUE, "o")
        _interval(axes, place + 0.17, one.grouped.pooled, GREY, "s", open_=True)
    _tau_axis(axes, found.ceiling)
    axes.set_ylim(-0.8, len(order) - 0.2)
    axes.set_yticks(range(len(order)), [_star(one) + _short(one.name) for one in order], fontsize=8.5)
    _right_labels(axes, [f"n = {one.headline.n:,}" for one in order])
    several = len(sample.tables.arms) > 1
    handles = [
        Line2D([], [], color=BLUE, marker="o", label=f"headline{': within arms' if several else ''}"),
        Line2D([], [], color=GREY, marker="s", markerfacecolor="white", label="pooled over arms"),
        *_ceiling_handle(found.ceiling),
    ]
    _wrapped_legend(figure, handles)
    rows = [_row(one.name, one.headline, "headline") | {"p_adjusted": one.p_adjusted} for one in order]
    rows += [_row(one.name, one.grouped.pooled, "pooled") for one in order]
    stars = " A star marks adjusted p < 0.05." if any(_star(one) for one in order) else ""
    first = top(found, 1)[0]
    return Drawing(
        "metrics",
        "How search metrics go with the final error.",
        f"n = {found.counts.n_used:,} runs with a final error, those with the metric at the right. Kendall's "
        "tau-b, 95 % intervals over independent units; above 0, a higher metric goes with a higher error. "
        f"Clearest: {first.name}, {_number(first.headline)}.{stars}{left_out}",
        figure,
        pd.DataFrame(rows),
    )


def scatter(one: MetricFinding, sample: Sample, found: Findings) -> Result:
    """A metric against the final error, by arm, with a line per arm and one for all.

    Stopped runs, which have a metric and no error, are hollow at the upper edge.
    """
    table = _scatter_rows(one, sample)
    final = np.isfinite(table["error_percent"])
    used, stopped = table[final], table[~final]
    if len(used) < 3:
        return f"{one.name}: fewer than 3 rows with a final error"
    figure = blank("", 4.9)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 6), width_ratios=(7, 1))
    axes = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    arms = [arm for arm in sample.tables.arms if (table["arm"] == arm).any()]
    colours = _colours(arms, sample)
    many = len(table) > _MANY_POINTS
    markers = _seed_markers(table["search_seed"])
    for arm in arms:
        runs = used[used["arm"] == arm]
        _finished(axes, runs, colours[arm], markers, many=many)
        _trend(axes, runs["metric"], runs["error_percent"], colours[arm], "-", 1.4)
    _trend(axes, used["metric"], used["error_percent"], INK, (0, (5, 3)), 1.2)
    _stopped(axes, stopped, colours, markers)
    cut = ""
    if many:
        axes.set_ylim(top=float(used["error_percent"].quantile(0.995)))
        cut = " The worst 0.5 % lie above the axis."
    bins = min(40, max(6, int(math.sqrt(len(used)))))
    if _varies(used["metric"]):
        above.hist(used["metric"], bins=bins, color=PALE)
    if _varies(used["error_percent"]):
        beside.hist(used["error_percent"], bins=bins, color=PALE, orientation="horizontal")
    for side in (above, beside):
        side.axis("off")
    taus = {"within arms": one.grouped.within, "pooled": one.grouped.pooled}
    above.set_title(
        "tau-b   " + "   ".join(f"{name} {_number(tau)}" for name, tau in taus.items()),
        loc="left",
        fontsize=8.5,
        color=INK,
    )
    axes.set_xlabel(one.name)
    axes.set_ylabel("final error (%)")
    axes.grid(color=PALE, linewidth=0.5)
    handles = _arm_handles(arms, colours)
    handles.append(Line2D([], [], color=INK, linestyle=(0, (5, 3)), label="all rows"))
    if 1 < len(markers) and not many:
        handles += [
            Line2D([], [], color=GREY, marker=marker, linestyle="", markersize=5, label=f"seed {seed:g}")
            for seed, marker in markers.items()
        ]
    if len(stopped):
        hollow: Any = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}
        handles.append(Line2D([], [], color=GREY, label="stopped, no final error", **hollow))
    _wrapped_legend(figure, handles)
    most = tau_ceiling(found.ceiling)
    ceiling = (
        f" Noise ceiling not known: {most.restriction}."
        if most.value is None
        else f" Noise ceiling of tau-b, under normality: {_number(most)}."
    )
    told = f" {count(len(stopped), 'stopped run')} at the upper edge." if len(stopped) else ""
    return Drawing(
        f"scatter_{_file_name(one.name)}",
        f"{one.name} against the final error.",
        f"n = {len(used):,}. Tau-b {_number(one.grouped.within)} within arms and "
        f"{_number(one.grouped.pooled)} pooled; a line per arm of at least 3 rows.{told}{ceiling}{cut}",
        figure,
        table,
    )


def _scatter_rows(one: MetricFinding, sample: Sample) -> pd.DataFrame:
    """Rows that have the metric and either a final error or were stopped."""
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
    wanted = np.isfinite(table["error_percent"]) | (table["status"] == "pruned")
    rows: pd.DataFrame = table[np.isfinite(table["metric"]) & wanted]
    return rows


def _finished(axes: Axes, runs: pd.DataFrame, colour: Any, markers: Mapping[Any, str], *, many: bool) -> None:
    """Runs of an arm, with a marker by search seed."""
    for seed, part in runs.groupby("search_seed", dropna=False):
        axes.scatter(
            part["metric"],
            part["error_percent"],
            s=6 if many else 30,
            color=colour,
            marker=markers.get(seed, "o"),
            alpha=0.35 if many else 0.8,
            linewidth=0,
            rasterized=many,
        )


def _stopped(axes: Axes, runs: pd.DataFrame, colours: Mapping[str, Any], markers: Mapping[Any, str]) -> None:
    """Runs without a final error, hollow at the upper edge."""
    for (arm, seed), part in runs.groupby(["arm", "search_seed"], dropna=False):
        axes.scatter(
            part["metric"],
            np.ones(len(part)),
            s=26,
            facecolor="none",
            edgecolor=colours[str(arm)],
            marker=markers.get(seed, "o"),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
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
    axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows], fontsize=8.5)
    _right_labels(axes, [f"n = {estimate.n:,}" for _, estimate, *_ in rows])
    if handles := _ceiling_handle(found.ceiling):
        legend(figure, handles)
    small = f" {count(grouped.n_small, 'arm')} with fewer than 5 units: no row." if grouped.n_small else ""
    i2 = grouped.heterogeneity.i_squared
    spread = f" I² = {100 * i2:.0f} %." if i2 is not None else ""
    warning = _sentence(grouped.simpson or "no Simpson warning")
    return Drawing(
        f"groups_{_file_name(one.name)}",
        f"{one.name}: tau-b by arm, within, between and pooled.",
        f"n = {grouped.n_used:,}; 95 % intervals. Within arms {_number(grouped.within)}, pooled "
        f"{_number(grouped.pooled)}.{spread}{small} {warning}",
        figure,
        pd.DataFrame([_row(name, estimate, one.name) for name, estimate, *_ in rows]),
    )


def heat(sample: Sample, found: Findings) -> Result:
    """Within-arm tau-b of metrics by arm, with the pooled column beside it."""
    order, left_out = _listed(found)
    names = {name for one in order for name, _ in one.grouped.groups}
    arms = [arm for arm in sample.tables.arms if arm in names]
    if len(arms) < 2 or len(found.metrics) < 2:
        return "fewer than 2 arms of at least 5 units, or fewer than 2 metrics"
    columns = [*arms, "within", "pooled"]
    values, rows = np.full((len(order), len(columns)), np.nan), []
    for row, one in enumerate(order):
        cells = dict(one.grouped.groups) | {"within": one.grouped.within, "pooled": one.grouped.pooled}
        for column, name in enumerate(columns):
            if name in cells and cells[name].value is not None:
                values[row, column] = cells[name].value
                rows.append(_row(one.name, cells[name], name) | {"p_adjusted": None})
                if name == "within" and _tested_within(one):
                    rows[-1]["p_adjusted"] = one.p_adjusted
    figure = blank("", 1.6 + 0.27 * len(order) + (0.5 if max(map(len, columns)) > 9 else 0))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="PuOr", norm=TwoSlopeNorm(0, -1, 1), aspect="auto")
    written = len(columns) <= _MOST_NUMBERS
    for row, one in enumerate(order):
        for column, name in enumerate(columns):
            value = values[row, column]
            if not np.isfinite(value):
                continue
            dot = "\u2022 " if name == "within" and _star(one) and _tested_within(one) else ""
            if written or dot:
                axes.text(
                    column,
                    row,
                    f"{dot}{value:+.2f}" if written else dot.strip(),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if abs(value) > 0.55 else INK,
                )
    axes.axvline(len(arms) - 0.5, color="white", linewidth=3)
    slanted: Any = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, columns)) > 9 or not written
        else {}
    )
    axes.set_xticks(range(len(columns)), [_short(name, 24) for name in columns], fontsize=8, **slanted)
    axes.set_yticks(range(len(order)), [_short(one.name) for one in order], fontsize=8.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("tau-b with error", fontsize=8.5)
    for value in _ceilings(found.ceiling):
        bar.ax.axhline(value, color=ORANGE, linewidth=1.6)
    most = tau_ceiling(found.ceiling)
    ceiling = (
        ""
        if most.value is None
        else f" The noise ceiling, under normality, is {_number(most)}: on the scale, orange."
    )
    n = ", ".join(f"{arm} {int((sample.trials['arm'] == arm)[sample.error.notna()].sum()):,}" for arm in arms)
    first = max(order, key=lambda one: abs(one.grouped.within.value or 0))
    return Drawing(
        "heat",
        "Tau-b of metrics with the final error, arm by arm.",
        f"n = {found.counts.n_used:,} ({n}). A dot marks adjusted p < 0.05 within arms; empty cells are not "
        f"defined. Strongest within: {first.name}, {_number(first.grouped.within)}; all intervals are in the "
        f"data.{ceiling}{left_out}",
        figure,
        pd.DataFrame(rows),
    )


def epochs(sample: Sample, found: Findings) -> Result:
    """Tau-b of metrics with the final error over the epochs, within arms and pooled, and the rows at risk."""
    if not found.curves:
        return "no metric was recorded over epochs, or rows may not be pooled"
    figure = blank("", 0.6 + 2.6 * len(found.curves))
    panels = figure.subplots(len(found.curves), 1, squeeze=False)[:, 0]
    rows, told, several = [], "", any(curve.pooled is not curve.points for curve in found.curves)
    for axes, curve in zip(panels, found.curves, strict=True):
        _over_epochs(axes, curve.points, BLUE, "-", "o")
        if several:
            _over_epochs(axes, curve.pooled, GREY, (0, (4, 2)), "s")
        for kind, points in (("within", curve.points), ("pooled", curve.pooled))[: 1 + several]:
            rows += [
                _row(curve.name, point.estimate, kind if several else "all rows")
                | {"epoch": _epoch(point), "at_risk": point.at_risk}
                for point in points
            ]
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylim(-1.05, 1.05)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_title(_short(curve.name, 60), fontsize=9.5, loc="left")
        axes.set_ylabel("tau-b with final error", fontsize=9)
        for value in _ceilings(found.ceiling):
            axes.axhline(value, color=ORANGE, linewidth=1.1, linestyle=(0, (2, 2)))
        at = [_epoch(point) for point in curve.points]
        axes.set_xticks(at)
        axes.set_xlabel("epoch of the search" if curve.stage == "search" else "epoch of training", fontsize=9)
        risk = axes.secondary_xaxis(-0.3)
        risk.set_xticks(at, [f"{point.at_risk:,}" for point in curve.points], fontsize=7.5, color=GREY)
        risk.tick_params(length=0)
        risk.spines["bottom"].set_visible(False)
        risk.set_xlabel("runs at risk", fontsize=8, color=GREY)
        told += f" {curve.name}: {_best_epoch(curve)}."
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="within arms" if several else "all rows")
    ]
    if several:
        handles.append(
            Line2D(
                [], [], color=GREY, linestyle=(0, (4, 2)), marker="s", markersize=4, label="pooled over arms"
            )
        )
    _wrapped_legend(figure, [*handles, *_ceiling_handle(found.ceiling)])
    pooled = " within arms, and dashed pooled," if several else ""
    return Drawing(
        "epochs",
        "How early a metric tells the final error.",
        f"n = {found.curves[0].n:,} with a final error; tau-b{pooled} with 95 % bands, pointwise.{told}",
        figure,
        pd.DataFrame(rows),
    )


def _over_epochs(
    axes: Axes, points: Sequence[EpochAssociation], colour: str, style: Any, marker: str
) -> None:
    defined = [point for point in points if point.estimate.value is not None]
    at, kept = [_epoch(point) for point in defined], [point.estimate for point in defined]
    values, low, high = (
        np.array([getattr(one, end) for one in kept], dtype=float) for end in ("value", "low", "high")
    )
    axes.plot(at, values, color=colour, linestyle=style, marker=marker, markersize=4)
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _best_epoch(curve: EpochCurve) -> str:
    """The strongest epoch with its interval, and its p-value as the best of all."""
    best = next((one for one in curve.points if one.epoch == curve.best.epoch), None)
    if best is None:
        return "no epoch stands out"
    p = "" if curve.best.p is None else f", p = {curve.best.p:.3f} as best of {curve.best.n_epochs} epochs"
    return f"strongest at epoch {best.epoch}, {_number(best.estimate)}{p}"


# Arms


def profiles(sample: Sample, found: Findings) -> Result:
    """Share of runs above each normalised score, by arm."""
    if not found.profiles:
        return found.shared or "no random arm to normalise by, or no arm better than its mean"
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
    above = []
    for arm in arms[:3]:
        profile = found.profiles[arm]
        at = int(np.searchsorted(profile.threshold, 0.0))
        low, high = (None if end is None else float(end[at]) for end in (profile.low, profile.high))
        above.append(f"{arm} {profile.share[at]:.2f} {_ends(low, high)}")
    note = next((p.restriction for p in found.profiles.values() if p.restriction), None)
    return Drawing(
        "profiles",
        "Performance profiles.",
        f"n = {_n_scored(found):,} runs, by arm in each panel; bands: 95 %, pointwise. Share of runs "
        f"better than the mean of random: {'; '.join(above)}.{f' {_sentence(note)}' if note else ''}",
        figure,
        pd.concat(rows),
    )


def _n_scored(found: Findings) -> int:
    """Runs that have a normalised score, those of the random arm included."""
    return sum(profile.n for profile in found.profiles.values())


def improvement(sample: Sample, found: Findings) -> Result:
    """Probability that a run of an arm beats a random one."""
    if not found.improvement:
        return found.shared or "no random arm to compare with"
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
        [f"{_short(arm)} (n = {e.n})" for arm, e in found.improvement.items()],
        fontsize=9,
    )
    axes.set_xlabel("probability that a run errs less than a random architecture")
    rows = [_row(arm, estimate, "probability of improvement") for arm, estimate in found.improvement.items()]
    return Drawing(
        "improvement",
        "Probability of improvement over random.",
        f"n = {_n_scored(found):,} runs, by pair at the left; 95 % intervals, none where a side has one "
        f"or two runs. {_named_estimates(found.improvement)}; the dashed line is no difference.",
        figure,
        pd.DataFrame(rows),
    )


def critical(sample: Sample, found: Findings) -> Result:
    """Critical-difference diagram over paired seeds, where it is allowed."""
    diagram = found.critical
    if isinstance(diagram, str):
        return diagram
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
    if isinstance(table, str):
        return table
    if len(table) < 2 or len(table.columns) < 2:
        return "fewer than 2 seeds shared by at least 2 arms"
    whole = table.dropna()
    if len(whole) < 2:
        return "fewer than 2 seeds shared by all arms that have usable runs"
    # Ranks among other arms than all are no ranks to compare from seed to seed.
    rank = whole.rank(axis=1).reindex(table.index)
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
    w = ""
    ordered = [errors for _, errors in whole.iterrows() if errors.nunique() > 1]
    pairs = [stats.spearmanr(a, b).statistic for a, b in itertools.combinations(ordered, 2)]
    if pairs:
        w = (
            " Mean Spearman correlation of the arms' order between two seeds: "
            f"{np.mean(pairs):+.2f} over {len(pairs)} pairs of seeds, without an interval."
        )
    partly = len(table) - len(whole)
    lost = f" {count(partly, 'seed')} more that some arm lacks: errors without ranks." if partly else ""
    return Drawing(
        "seeds",
        "Errors and ranks, seed by seed.",
        f"n = {len(whole)} seeds shared by {len(table.columns)} arms.{lost}{w}",
        figure,
        table.reset_index(),
    )


def interaction(sample: Sample, found: Findings) -> Result:
    """Final error over each pair of axes of a sweep that have few levels, with every run."""
    if sample.tables.study.get("joint"):
        return "a joint search chose its settings itself: they are no grid whose cells could be compared"
    if found.unlike is not None:
        return found.unlike
    names = [name for name in swept(sample) if sample.trials[name].nunique() <= _MOST_LEVELS]
    if len(names) < 2:
        return f"fewer than two axes of at most {_MOST_LEVELS} levels are varied"
    names.sort(key=lambda name: -sample.trials[name].nunique())
    runs = sample.trials.assign(error_percent=100 * sample.error).dropna(subset=["error_percent"])
    if "search_seed" not in runs:
        runs["search_seed"] = 0
    pairs = [(x, line, runs.dropna(subset=[x, line])) for x, line in itertools.combinations(names, 2)]
    pairs = [pair for pair in pairs if pair[2].groupby([pair[0], pair[1]], observed=True).ngroups >= 3]
    if not pairs:
        return "fewer than 3 combinations of two axes have a run"
    left_out = len(pairs) - _MOST_PAIRS
    pairs = pairs[:_MOST_PAIRS]
    figure = blank("", 0.4 + 2.9 * len(pairs))
    panels = figure.subplots(len(pairs), 1, squeeze=False)[:, 0]
    doubts = {found.doubts[arm] for *_, drawn in pairs for arm in drawn["arm"] if arm in found.doubts}
    rows = [_crossed(axes, *pair, intervals=not doubts) for axes, pair in zip(panels, pairs, strict=True)]
    data = pd.concat(rows)
    cells = data.drop_duplicates(["x", "x_level", "line", "line_level"])
    best = cells.sort_values("mean").iloc[0]
    where = " and ".join(f"{_axis(best[name])} = {best[f'{name}_level']}" for name in ("x", "line"))
    more = f" {count(left_out, 'pair')} of axes more in the tables." if left_out > 0 else ""
    if len(swept(sample)) > 2:
        more = f" Each cell is over all levels of the other axes.{more}"
    if doubts:
        more += f" No intervals: {'; '.join(sorted(doubts))}."
        means, end = "means", ""
    else:
        means = "means with 95 % t intervals, none of a cell of one run"
        end = f" {_ends(best['low'], best['high'])}"
    return Drawing(
        "interaction",
        f"{', '.join(f'{_axis(x)} by {_axis(line)}' for x, line, _ in pairs)}.",
        f"n = {data['trial_id'].nunique()} runs, each a dot with a marker by search seed; {means}; n of each "
        f"cell below, in the order of the lines. Lowest mean: {where}, {best['mean']:.2f} %{end}, "
        f"n = {best['n']}.{more}",
        figure,
        data,
    )


def _crossed(axes: Axes, x: str, line: str, runs: pd.DataFrame, *, intervals: bool) -> pd.DataFrame:
    """Draw the runs of two crossed axes, with a line per level of the second; returns a row per run."""
    levels, lines = (sorted(runs[name].unique(), key=_in_order) for name in (x, line))
    markers, parts = _seed_markers(runs["search_seed"]), []
    sizes: dict[Any, list[str]] = {level: [] for level in levels}
    for index, value in enumerate(lines):
        shift, colour = 0.5 / len(lines) * (index - (len(lines) - 1) / 2), COLOURS[index % len(COLOURS)]
        places, means = [], []
        for at, level in enumerate(levels):
            cell = runs[(runs[line] == value) & (runs[x] == level)]
            sizes[level].append(str(len(cell)))
            if cell.empty:
                continue
            for seed, part in cell.groupby("search_seed", dropna=False):
                axes.scatter(
                    np.full(len(part), at + shift),
                    part["error_percent"],
                    s=16,
                    color=colour,
                    marker=markers.get(seed, "o"),
                    alpha=0.5,
                    linewidth=0,
                )
            mean = mean_interval(cell["error_percent"])
            mean = mean if intervals else replace(mean, low=None, high=None)
            places.append(at + shift)
            means.append(mean)
            parts.append(
                cell[["trial_id", "search_seed", "error_percent"]]
                .assign(x=x, x_level=level, line=line, line_level=value, n=mean.n)
                .assign(mean=mean.mean, low=mean.low, high=mean.high)
            )
        axes.plot(
            places,
            np.array([mean.mean for mean in means], dtype=float),
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            linewidth=1.4,
            label=f"{_axis(line)} = {value}",
        )
        for place, mean in zip(places, means, strict=True):
            if mean.low is not None and mean.high is not None:
                axes.plot([place, place], [mean.low, mean.high], color=colour, linewidth=1.4)
    axes.set_xticks(
        range(len(levels)), [f"{level}\nn = {', '.join(sizes[level])}" for level in levels], fontsize=8.5
    )
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.set_xlabel(_axis(x))
    axes.set_ylabel("final error (%)")
    low, high = runs["error_percent"].min(), runs["error_percent"].max()
    axes.set_ylim(low - 0.5 * (high - low) - 0.05, high + 0.5 * (high - low) + 0.05)
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
    found: pd.DataFrame = pd.concat(parts)
    return found


# Variance and power


def variance(sample: Sample, found: Findings) -> Result:
    """How the variance of the final error divides."""
    parts: list[tuple[str, float]] = []
    told = ""
    icc = found.components.icc
    if icc.value is not None and found.components.between is not None and found.components.within is not None:
        total = found.components.between + found.components.within or 1.0
        parts = [
            ("between networks", found.components.between / total),
            ("between trainings of one network", found.components.within / total),
        ]
        told = f"n = {icc.n:,} trainings of {icc.n_units:,} networks; ICC {_number(icc)}."
    elif found.sweep is not None and found.sweep.residual_share is not None:
        parts = [(effect.name, effect.share) for effect in found.sweep.effects] + [
            ("residual", found.sweep.residual_share)
        ]
        told = f"n = {found.sweep.n} runs; type II shares of the sum of squares, without intervals."
        total = sum(share for _, share in parts)
        if abs(total - 1) > 5e-4:
            told += (
                f" They add up to {100 * total:.1f} %: runs are not balanced over the axes, so part of the "
                "sum of squares belongs to no axis alone."
            )
    if not parts:
        return f"{icc.restriction}, and no sweep of independent runs divides the variance"
    figure = blank("", 1.2)
    axes = figure.add_subplot()
    start = 0.0
    for (_, share), colour in zip(parts, itertools.cycle(COLOURS), strict=False):
        axes.barh(0, share, left=start, color=colour, height=0.6)
        start += share
    axes.set_yticks([])
    axes.set_xlim(0, max(1.0, start))
    axes.set_xlabel("share of the variance of the final error")
    _wrapped_legend(
        figure,
        [
            Patch(color=colour, label=f"{name}: {100 * share:.1f} %")
            for (name, share), colour in zip(parts, itertools.cycle(COLOURS), strict=False)
        ],
    )
    return Drawing(
        "variance",
        "Where the variance of the final error comes from.",
        told,
        figure,
        pd.DataFrame(parts, columns=["component", "share"]),
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
        f"Two-sided t test at 0.05, before adjustment; standard deviation within arms {sd:.2f} points "
        f"[{ends[0]:.2f}, {ends[1]:.2f}] from n = {df} degrees of freedom: the independent runs of each arm "
        "less one.",
        figure,
        rows,
    )


# Cost


def anytime(sample: Sample, found: Findings) -> Result:
    """Error of the incumbent over end-to-end hours, failed and stopped runs paid for."""
    if not found.anytime:
        return told(found.no_anytime)
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
    last = [
        f"{one.arm} {one.middle[-1]:.2f} % {_ends(one.low[-1], one.high[-1])}"
        for one in shown[:3]
        if np.isfinite(one.middle[-1])
    ] or ["not known"]
    handles = [Line2D([], [], color=BLUE, label="arm")]
    if random is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label=f"random (n = {random.n})"))
    _legend_above(figure, handles)
    return Drawing(
        "anytime",
        "Error against end-to-end cost.",
        f"n = {sum(one.n for one in found.anytime):,} runs, by arm in each panel. The incumbent is chosen on "
        f"validation and reported on test. Medians and 95 % bands over {shown[0].n_sequences} sequences of "
        "runs drawn with replacement from each arm: what other studies of this size would see. At the end of "
        "its cost: "
        f"{'; '.join(last)}.",
        figure,
        pd.concat(rows),
    )


def front(sample: Sample, found: Findings) -> Result:
    """Error against size, and latency where it was recorded, with the front of what none is better than."""
    table = pareto(sample)
    if len(table) < 3 or table["params_m"].nunique() < 2:
        return "fewer than 3 finished runs of different size"
    prices = {"params_m": "parameters (millions)"}
    for name in sorted(name for name in map(str, sample.metrics) if name.endswith("latency_ms")):
        table[name] = sample.metrics[name].reindex(table.index)
        if table[name].notna().sum() >= 3 and table[name].nunique() > 1:
            table[f"front_{name}"] = _front(table[name], table["error"])
            prices[name] = f"{name.removesuffix('_ms').replace('_', ' ')} (ms)"
    figure = blank("", 4.2)
    panels = figure.subplots(1, len(prices), sharey=True, squeeze=False)[0]
    arms = [arm for arm in sample.tables.arms if (table["arm"] == arm).any()]
    colours = _colours(arms, sample)
    many = len(table) > _MANY_POINTS
    for axes, (price, label) in zip(panels, prices.items(), strict=True):
        for arm in arms:
            runs = table[table["arm"] == arm]
            axes.scatter(
                runs[price],
                runs["error"],
                s=6 if many else 28,
                color=colours[arm],
                alpha=0.4 if many else 0.8,
                linewidth=0,
                rasterized=many,
            )
        best = table[table["front" if price == "params_m" else f"front_{price}"]].sort_values(price)
        axes.step(
            [*best[price], table[price].max()],
            [*best["error"], best["error"].iloc[-1]],
            where="post",
            color=INK,
            linewidth=1.3,
        )
        axes.set_xlabel(label)
        axes.grid(color=PALE, linewidth=0.5)
    measure = table["measure"].iloc[0]
    panels[0].set_ylabel(f"{measure} (%)")
    if many:
        panels[0].set_ylim(table["error"].min() - 0.5, float(table["error"].quantile(0.995)))
    handles = _arm_handles(arms, colours, "")
    _wrapped_legend(figure, [*handles, Line2D([], [], color=INK, label="front")])
    volume = found.hypervolume
    told = (
        f" Hypervolume of error and size {_number(volume)} of the box of all runs."
        if volume is not None
        else ""
    )
    cut = " The worst 0.5 % lie above the axis." if many else ""
    return Drawing(
        "front",
        "Error and size." if len(prices) == 1 else "Error, size and latency.",
        f"n = {len(table):,}; {int(table['front'].sum())} on the front of size, which is that of the "
        f"{measure}.{told}{cut}",
        figure,
        table,
    )


def _front(price: "pd.Series[float]", error: "pd.Series[float]") -> "pd.Series[bool]":
    """Whether no other row is cheaper and errs no more; rows without a price are on no front."""
    order = pd.DataFrame({"price": price, "error": error}).dropna().sort_values(["price", "error"])
    found: pd.Series[bool] = order["error"] < order["error"].cummin().shift(fill_value=np.inf)
    return found.reindex(price.index, fill_value=False)


# The search


def trajectories(sample: Sample, found: Findings) -> Result:
    """What the searches did, epoch by epoch, coloured by the error they came to."""
    epochs = sample.tables.epochs.astype({"trial_id": str, "stage": str, "key": str})
    epochs = epochs[(epochs["stage"] == "search") & np.isfinite(epochs["value"].astype(float))]
    wanted = _watched(sorted(epochs["key"].unique()))
    if not wanted:
        return "no search recorded its eigenvalue, entropy, skips or error"
    error = dict(zip(sample.trials["trial_id"], 100 * sample.error, strict=True))
    known = [value for value in error.values() if np.isfinite(value)]
    least, most = (min(known), max(known)) if known else (0.0, 1.0)
    scale, palette = Normalize(least, most if most > least else least + 1), mpl.colormaps["cividis"]
    stops = {
        key: epochs[epochs["key"] == key].groupby("trial_id")["value"].last().to_dict()
        for key in ("stop_epoch", "stop_back_to")
    }
    figure = blank("", 1.1 + 1.75 * len(wanted))
    panels = figure.subplots(len(wanted), 1, sharex=True, squeeze=False)[:, 0]
    rows, n, told = [], 0, ""
    for axes, key in zip(panels, wanted, strict=True):
        part = epochs[epochs["key"] == key]
        n = max(n, part["trial_id"].nunique())
        for trial, run in part.groupby("trial_id"):
            value = error.get(str(trial), math.nan)
            colour = palette(scale(value)) if np.isfinite(value) else GREY
            style: Any = "-" if np.isfinite(value) else (0, (3, 2))
            _search(
                axes, run.sort_values("epoch"), {key: stops[key].get(trial) for key in stops}, colour, style
            )
        by_epoch = part.groupby("epoch")["value"].agg(["mean", "count"])
        axes.plot(by_epoch.index, by_epoch["mean"], color=VERMILION, linewidth=1.8)
        axes.set_ylabel(textwrap.fill(key.replace("_", " "), 16), fontsize=9)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        ends = [
            f"{by_epoch['mean'][at]:.3g} at epoch {at} (n = {by_epoch['count'][at]:,})"
            for at in dict.fromkeys((by_epoch.index[0], by_epoch.index[-1]))
        ]
        told += f" Mean {key.replace('_', ' ')} {' and '.join(ends)}."
        rows.append(
            part[["trial_id", "epoch", "key", "value"]].assign(
                final_error_percent=part["trial_id"].map(error),
                **{name: part["trial_id"].map(at).astype(float) for name, at in stops.items() if at},
            )
        )
    panels[-1].set_xlabel("epoch of the search")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if known:
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(scale, palette), ax=list(panels), fraction=0.025, pad=0.01
        )
        bar.set_label("final error (%)", fontsize=8.5)
    ended: Any = {"color": GREY, "linewidth": 1, "marker": "o", "markersize": 3.5}
    handles = [
        Line2D([], [], label="one search; it ends at the dot", **ended),
        Line2D(
            [], [], color=VERMILION, linewidth=1.8, label="mean over all arms, of searches that got there"
        ),
    ]
    if stops["stop_epoch"]:
        hollow: Any = {"marker": "D", "markerfacecolor": "white", "linestyle": ""}
        handles += [
            Line2D([], [], color=GREY, marker="X", linestyle="", label="stopped by its rule"),
            Line2D([], [], color=GREY, label="went back to", **hollow),
        ]
    _wrapped_legend(figure, handles)
    return Drawing(
        "trajectories",
        "The searches, epoch by epoch.",
        f"n = {n} searches; dashed are those without a final error. Means are over all arms, of the searches "
        f"that got there, without intervals.{told}",
        figure,
        pd.concat(rows),
    )


def _watched(keys: Sequence[str]) -> list[str]:
    """Up to three keys to draw: the eigenvalue first, above all the one by which searches were stopped."""
    eigenvalues = sorted(
        (key for key in keys if "eigenvalue" in key), key=lambda key: key != "stop_eigenvalue"
    )
    others = [key for key in ("alpha_entropy", "skips", "valid_error") if key in keys]
    return [*eigenvalues[:1], *others][:3]


def _search(axes: Axes, run: pd.DataFrame, stops: Mapping[str, Any], colour: Any, style: Any) -> None:
    """Draw one search up to its end, with the epochs at which it was stopped and to which it went back."""
    axes.plot(run["epoch"], run["value"], color=colour, linewidth=0.9, alpha=0.85, linestyle=style)
    axes.plot(run["epoch"].iloc[-1:], run["value"].iloc[-1:], color=colour, marker="o", markersize=3.5)
    for event, marker, face in (("stop_epoch", "X", colour), ("stop_back_to", "D", "white")):
        at = run[run["epoch"] == stops[event]]
        mark: Any = {"marker": marker, "markersize": 6, "markeredgecolor": colour, "markerfacecolor": face}
        axes.plot(at["epoch"], at["value"], linestyle="", zorder=5, **mark)


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


def operations(sample: Sample, found: Findings) -> Result:
    """Share of the genotypes that have each operation at each node."""
    final = genotypes(sample)
    if final.empty:
        return "no final genotypes of searches were recorded"
    edges = cells.edges(list(zip(final["trial_id"], final["genotype"], strict=True)))
    kinds = [kind for kind in cells.KINDS if (edges["cell"] == kind).any()]
    ops = [op for op in OPERATIONS if (edges["operation"] == op).any()]
    nodes, n = sorted(edges["node"].unique()), len(final)
    figure = blank("", 1.3 + 0.3 * len(ops))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    rows: list[dict[str, Any]] = []
    for axes, kind in zip(panels, kinds, strict=True):
        # An operation may stand at both inputs of a node, and it is still one genotype that has it.
        mine = edges[edges["cell"] == kind].drop_duplicates(["search", "node", "operation"])
        counts = mine.groupby(["operation", "node"]).size().unstack(fill_value=0)
        table = counts.reindex(index=ops, columns=nodes, fill_value=0).to_numpy()
        image = axes.imshow(table / n, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (i, op), (j, node) in itertools.product(enumerate(ops), enumerate(nodes)):
            k = int(table[i, j])
            colour = "white" if k / n < 0.55 else INK
            axes.text(j, i, f"{100 * k / n:.0f}", ha="center", va="center", fontsize=8, color=colour)
            ends = stats.binomtest(k, n).proportion_ci(method="wilson")
            row = {"cell": kind, "node": node, "operation": op, "share": k / n, "n": n}
            rows.append(row | {"low": float(ends.low), "high": float(ends.high)})
        axes.set_xticks(range(len(nodes)), [str(node) for node in nodes])
        axes.set_xlabel("node")
        axes.set_title(f"{cells.KINDS[kind]} cell", fontsize=9.5)
        axes.set_yticks(range(len(ops)), ops, fontsize=8.5)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.01)
    bar.set_label("share of the genotypes", fontsize=8.5)
    most = max(rows, key=lambda row: row["share"])
    return Drawing(
        "operations",
        "Operations that the searches chose, node by node.",
        f"n = {n:,} genotypes, random ones left out; percent of them that have the operation at an input of "
        f"the node. Most often: {most['operation']} at node {most['node']} of the "
        f"{cells.KINDS[most['cell']]} cell, {100 * most['share']:.0f} % "
        f"[{100 * most['low']:.0f}, {100 * most['high']:.0f}]; 95 % intervals (Wilson) of all in the data.",
        figure,
        pd.DataFrame(rows),
    )


def found_cells(arm: str, sample: Sample, found: Findings) -> Result:
    """The cells that the searches of an arm found, and how far they agree."""
    final = genotypes(sample).merge(sample.trials[["trial_id", "arm", "name", *_seed(sample)]], on="trial_id")
    final = final[final["arm"] == arm].sort_values([*_seed(sample), "trial_id"], kind="stable")
    names = final["name" if final["name"].is_unique else "trial_id"].astype(str)
    if sample.kind == "study" and _seed(sample) and final["search_seed"].is_unique:
        names = "seed " + final["search_seed"].map("{:g}".format)
    table = cells.edges(list(zip(names, final["genotype"], strict=True)))
    shown = set(names[: cells.MOST])
    table["drawn"] = table["search"].isin(shown)
    most = table.sort_values("agreement", kind="stable").iloc[-1]
    left_out = len(final) - len(shown)
    return Drawing(
        f"cells_{_file_name(arm)}",
        f"Cells found: {arm}.",
        f"n = {len(final):,} {'searches' if sample.kind == 'study' else 'networks'}. Each row of a node is "
        "an input: its operation, and a line from where it comes; the darker, the more share this edge. "
        f"Most agreed on: {most['operation']} from {most['source']} to {most['node']} in the "
        f"{cells.KINDS[most['cell']]} cell, {most['agreement']:.2f} {_ends(most['low'], most['high'])}"
        + (f"; {left_out:,} more are in the data alone." if left_out else "."),
        cells.grid(table[table["drawn"]]),
        table,
    )


def _seed(sample: Sample) -> list[str]:
    return ["search_seed"] if "search_seed" in sample.trials else []


def genotypes(sample: Sample) -> pd.DataFrame:
    """Genotypes that searches ended with, a row each, without random ones: `trial_id`, `genotype` as JSON."""
    final = sample.tables.genotypes
    searched = sample.trials.loc[sample.trials["arm"] != sample.tables.baseline, "trial_id"]
    # A search that was retrained several times has a genotype for each of its retrainings.
    return final[(final["stage"] == "final") & final["trial_id"].isin(searched)]


# All of them


def write(
    sample: Sample, found: Findings, folder: Path
) -> tuple[list[tuple[Drawing, dict[str, Path]]], dict[str, str]]:
    """Draw all figures that the sample supports into a folder, with their files, and why there are no others.

    A figure that cannot be drawn is left out with its error as the reason.

    Raises:
        OSError: a file cannot be written.
    """
    drawn: list[tuple[Drawing, dict[str, Path]]] = []
    missing: dict[str, str] = {}
    for name, make in makers(sample, found).items():
        try:
            result = make(sample, found)
            if isinstance(result, str):
                missing[name] = (found.unlike if name in _POOLED else None) or result
                continue
            if any(result.stem == other.stem for other, _ in drawn):
                result = replace(result, stem=f"{result.stem}_{len(drawn)}")
            drawn.append((result, plots.save_vector(result.figure, folder / result.stem, result.data)))
        except OSError:  # a full disk is no fault of one figure
            raise
        except FAILURES as problem:
            missing[name] = f"could not be drawn: {type(problem).__name__}: {problem}"
    return drawn, missing


_POOLED = {
    "metrics",
    "heat map",
    "association over epochs",
    "seeds",
    "critical difference",
    "performance profiles",
    "probability of improvement",
    "variance",
    "power",
    "anytime",
    "front",
}
"""Figures that pool rows, so that there is none where these were not measured alike."""


def makers(sample: Sample, found: Findings) -> dict[str, Callable[[Sample, Findings], Result]]:
    """Every figure by the name under which a report says why it is missing."""
    known = sample.trials["trial_id"].isin(genotypes(sample)["trial_id"])
    searched = [arm for arm in sample.tables.arms if (known & (sample.trials["arm"] == arm)).any()]
    return {
        "flow": flow,
        "error by arm": errors,
        "metrics": overview,
        **{f"scatter of {one.name}": partial(scatter, one) for one in _scattered(found)},
        **{f"groups of {one.name}": partial(groups, one) for one in _grouped(found)},
        "heat map": heat,
        "association over epochs": epochs,
        "interaction of axes": interaction,
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
        "operations": operations,
        **{f"cells of {arm}": partial(found_cells, arm) for arm in searched[:_MOST_GROUPS]},
        "distances between searches": distances,
    }


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
        axes.set_title(_short(arm, 30), fontsize=9)
        axes.grid(color=PALE, linewidth=0.5)
    return list(grid[: len(arms)])


def _listed(found: Findings) -> tuple[list[MetricFinding], str]:
    """Metrics that a figure of one row each can label, weakest first: the declared ones and the clearest.

    And the sentence that says how many are left out.
    """
    order = ranked(found.metrics)
    kept = [one for one in order if one.primary]
    kept += [one for one in order if not one.primary][:_MOST_METRICS]
    left_out = len(order) - len(kept)
    told = f" {count(left_out, 'less clear metric')} left out here: see the table." if left_out else ""
    return sorted(kept, key=lambda one: one.headline.value or 0.0), told


def _tested_within(one: MetricFinding) -> bool:
    """Whether the metric's p-value is that of the association within arms."""
    return not one.pooled and len(one.grouped.groups) + one.grouped.n_small > 1


def _seed_markers(seeds: "pd.Series[Any]") -> dict[Any, str]:
    """A marker per seed, in the order of the seeds; none where there are more seeds than markers."""
    found = sorted(seeds.dropna().unique())
    return dict(zip(found, MARKERS, strict=False)) if len(found) <= len(MARKERS) else {}


def _arm_handles(arms: Sequence[str], colours: Mapping[str, Any], line: Any = "-") -> list[Any]:
    """Entries of a legend for the first arms, and how many more there are."""
    handles = [
        Line2D([], [], color=colours[arm], marker="o", markersize=5, linestyle=line, label=_short(arm))
        for arm in arms[:_MOST_GROUPS]
    ]
    if len(arms) > _MOST_GROUPS:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(arms) - _MOST_GROUPS} more"))
    return handles


def _in_order(level: Any) -> tuple[bool, Any]:
    """Sorts levels of an axis: numbers before texts."""
    return isinstance(level, str), level


def _axis(column: str) -> str:
    return column.removeprefix("axes.")


def _right_labels(axes: Axes, texts: Sequence[str]) -> None:
    """A text at the right of each row."""
    side = axes.secondary_yaxis("right")
    side.set_yticks(range(len(texts)), list(texts), fontsize=8, color=GREY)
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)


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
    most = tau_ceiling(ceiling).value
    return [] if most is None else [most, -most]


def _ceiling_handle(ceiling: Estimate) -> list[Line2D]:
    most = tau_ceiling(ceiling).value
    if most is None:
        return []
    return [
        Line2D(
            [],
            [],
            color=ORANGE,
            linewidth=1.1,
            linestyle=(0, (2, 2)),
            label=f"noise ceiling {most:.2f}, under normality",
        )
    ]


def _trend(axes: Axes, x: Any, y: Any, colour: str, style: Any, width: float) -> None:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 3 or not _varies(a):
        return
    slope, at = np.polyfit(a - a.mean(), b, 1)
    ends = np.array([a.min(), a.max()])
    axes.plot(ends, at + slope * (ends - a.mean()), color=colour, linestyle=style, linewidth=width, zorder=4)


def _varies(values: Any) -> bool:
    """Whether values lie apart by more than rounding, so that they have bins and a slope."""
    a = np.asarray(values, dtype=float)
    return bool(np.ptp(a) > 1e-12 * np.abs(a).max())


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
    return (
        "not known"
        if estimate.value is None
        else f"{estimate.value:.2f} {_ends(estimate.low, estimate.high)}"
    )


def _ends(low: float | None, high: float | None, form: str = ".2f") -> str:
    """An interval in brackets, or that there is none."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "(no interval)"
    return f"[{low:{form}}, {high:{form}}]"


def _named_estimates(estimates: Mapping[str, Estimate], most: int = 3) -> str:
    """The first few estimates with their names and intervals, as text."""
    named = [f"{name} {_number(estimate)}" for name, estimate in list(estimates.items())[:most]]
    return "; ".join([*named, *(["others in the data"] if len(estimates) > most else [])])


def _short(text: str, most: int = 34) -> str:
    """Text cut in its middle: what tells names apart stands at either end."""
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"


def _file_name(text: str) -> str:
    """Text as part of the name of a file."""
    return re.sub(r"[^\w.=+-]+", "_", text)[:80]


def distances(sample: Sample, found: Findings) -> Result:
    """Edit distances between the cells that all searches ended with, arm by arm."""
    if sample.kind != "study":
        return "networks of ground truth are of no search"
    final = agreement.finals(sample.tables)
    n = len(final)
    if n < 2:
        return "fewer than 2 searches with a final genotype"
    if n > _MOST_SEARCHES:
        return f"{n:,} searches are more than {_MOST_SEARCHES}, too many to tell apart"
    table = agreement.distances(list(final["genotype"]))
    sizes = final.groupby("arm", sort=False).size()
    ends = sizes.cumsum().to_numpy()
    figure = blank("", 5.8)
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="cividis_r", vmin=0, vmax=max(table.max(), 1), aspect="auto")
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="white", linewidth=1.5)
        axes.axhline(end - 0.5, color="white", linewidth=1.5)
    middles, names = ends - (sizes.to_numpy() + 1) / 2, [_short(str(arm), 24) for arm in sizes.index]
    axes.set_xticks(middles, names, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        middles, [f"{name}\nn = {size}" for name, size in zip(names, sizes, strict=True)], fontsize=8
    )
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.01)
    bar.set_label("edit distance: operations and sources to change", fontsize=8.5)
    bar.locator = MaxNLocator(integer=True)
    first, second = np.triu_indices(n, 1)
    rows = final.drop(columns="genotype").reset_index(drop=True)
    data = pd.concat(
        [
            rows.iloc[first].reset_index(drop=True),
            rows.iloc[second].reset_index(drop=True).add_prefix("other_"),
            pd.Series(table[first, second].astype(int), name="edit_distance"),
        ],
        axis=1,
    )
    first_named = sorted(found.agreement, key=lambda one: not one.baseline)[:_TOP]
    told = "; ".join(f"{one.arm} {_number(one.edits)}" for one in first_named)
    told += "; others in the table" if len(found.agreement) > _TOP else ""
    return Drawing(
        "distances",
        "How far apart the cells are that the searches found.",
        f"n = {n:,} searches, each a row and a column, by arm and seed; darker is further apart, and the "
        f"diagonal is each search with itself. Means over pairs within arms: {told or 'none'}. Searches that "
        "are close need not be good.",
        figure,
        data,
    )
