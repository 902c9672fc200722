"""Figures of a study: one function per figure from its tables, one for the rows that it draws, and `save`."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from analysis.records import Tables
from analysis.summary import by_search, rows, summarise

# Of the Okabe-Ito palette, which colour-blind readers can tell apart; also apart in lightness.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"

WIDTH = 8.0
"""Inches, so that text of the figures matches that of a page of ordinary width."""

_STAGES = ("search", "retrain")


def error_by_arm(tables: Tables) -> Figure:
    """Test error of every finished run by arm, with means, 95 % intervals and the band of random behind.

    An arm without an interval in `summarise` has its mean alone.
    """
    tables = by_search(tables)
    summary = summarise(tables)
    figure = blank(_title(tables), 1.1 + 0.62 * max(len(summary), 1))
    axes = figure.add_subplot()
    axes.set_xlabel("test error (%)")
    axes.set_ylim(len(summary) - 0.4, -0.6)
    axes.set_yticks(range(len(summary)), [_arm_label(row.arm, row.role) for row in rows(summary)])
    runs = axes.secondary_yaxis("right")
    runs.set_yticks(range(len(summary)), [_runs_label(row) for row in rows(summary)])
    runs.tick_params(length=0, labelsize=8.5, labelcolor=GREY)
    runs.spines["right"].set_visible(False)
    limits = _error_limits(tables, summary)
    if limits is None:
        axes.set_xticks([])
        say(axes, "no finished run yet")
        return figure
    axes.set_xlim(limits)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    for place, row in enumerate(rows(summary)):
        errors = 100 * tables.finals(row.arm)["test_error"].to_numpy(dtype=float)
        colour = GREY if row.role == "baseline" else BLUE
        axes.scatter(
            errors, place - _jitter(len(errors)), s=26, color=colour, alpha=0.75, linewidth=0, zorder=3
        )
        _draw_mean(axes, place + 0.17, row.error_mean, row.error_low, row.error_high)
        if row.role == "baseline" and row.n:
            _draw_band(axes, row.error_mean, row.error_low, row.error_high)
    legend(figure, _error_handles(summary, limits))
    return figure


def error_data(tables: Tables) -> pd.DataFrame:
    """What `error_by_arm` draws: a row per trial with its arm's summary, one for an arm without trials."""
    tables = by_search(tables)
    trials = tables.trials[["arm", "trial_id", "name", "status"]].copy()
    trials["test_error_percent"] = 100 * tables.finals()["test_error"]
    columns = ["arm", "role", "n", "n_total", "error_mean", "error_low", "error_high"]
    return summarise(tables)[columns].merge(trials, on="arm", how="left")


def curves(tables: Tables) -> Figure:
    """Validation error per epoch by arm, in search and in retraining: its runs and medians of all arms."""
    data = curve_data(tables)
    arms = tables.arms
    figure = blank(_title(tables), 1.1 + 1.25 * max(len(arms), 1))
    grid = figure.subplots(max(len(arms), 1), len(_STAGES), sharex="col", sharey="col", squeeze=False)
    medians = {(arm, stage): _median(data, arm, stage) for arm in arms for stage in _STAGES}
    for row, arm in enumerate(arms):
        for axes, stage in zip(grid[row], _STAGES, strict=True):
            axes.grid(axis="y", color=PALE, linewidth=0.5)
            runs = data[(data["arm"] == arm) & (data["stage"] == stage)]
            if runs.empty:
                say(axes, "no epochs")
                continue
            for other in arms:
                axes.plot(medians[other, stage], color=PALE, linewidth=1, zorder=1)
            _draw_runs(axes, runs, medians[arm, stage])
        grid[row][0].set_ylabel(_arm_label(arm, ""), rotation=0, ha="right", va="center")
    for axes, stage, word in zip(grid[0], _STAGES, ("search", "retraining"), strict=True):
        scale = _scale_errors(axes, data.loc[data["stage"] == stage, "valid_error_percent"])
        axes.set_title(f"{word}: validation error (%){scale}", fontsize=9.5)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.9, label="median of completed runs"),
        Line2D([], [], color=BLUE, linewidth=0.7, alpha=0.6, label="completed run"),
        Line2D([], [], color=VERMILION, linewidth=0.9, linestyle=(0, (4, 2)), label="run not completed"),
        Line2D([], [], color=PALE, linewidth=1.5, label="medians of the other arms"),
    ]
    legend(figure, handles)
    return figure


def curve_data(tables: Tables) -> pd.DataFrame:
    """What `curves` draws: validation error in percent per arm, trial, stage and epoch."""
    epochs = tables.epochs[tables.epochs["key"] == "valid_error"]
    data = epochs[["trial_id", "stage", "epoch", "value"]].astype({"trial_id": str, "stage": str})
    data = data.merge(tables.trials[["trial_id", "arm", "status"]], on="trial_id", how="left")
    data["valid_error_percent"] = 100 * data["value"]
    return data[["arm", "trial_id", "status", "stage", "epoch", "valid_error_percent"]]


def error_by_size(tables: Tables) -> Figure:
    """Validation error of every finished run against its size, with the front of what none is better than."""
    data = size_data(tables)
    figure = blank(_title(tables), 4.6)
    axes = figure.add_subplot()
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("validation error (%)")
    if data.empty:
        say(axes, "no finished run yet")
        return figure
    axes.grid(color=PALE, linewidth=0.6)
    for random, colour, marker in ((False, BLUE, "o"), (True, GREY, "s")):
        runs = data[(data["arm"] == tables.baseline) == random]
        axes.scatter(
            runs["params_m"], runs["valid_error_percent"], s=28, color=colour, marker=marker, alpha=0.75
        )
    front = data[data["front"]].sort_values("params_m")
    axes.step(
        front["params_m"],
        front["valid_error_percent"],
        where="post",
        color=VERMILION,
        linewidth=1.2,
        zorder=1,
    )
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="none", label=f"searched (n = {len(data)})"),
        Line2D([], [], color=VERMILION, linewidth=1.2, label="front: no run is better and smaller"),
    ]
    baseline = int((data["arm"] == tables.baseline).sum())
    if baseline:
        handles[0].set_label(f"searched (n = {len(data) - baseline})")
        label = f"random (n = {baseline})"
        handles.insert(1, Line2D([], [], color=GREY, marker="s", linestyle="none", label=label))
    legend(figure, handles)
    return figure


def size_data(tables: Tables) -> pd.DataFrame:
    """What `error_by_size` draws: a row per finished trial that was validated."""
    finals = (
        by_search(tables)
        .finals()
        .dropna(subset=["valid_error", "params_m"])
        .sort_values(["valid_error", "params_m"])
    )
    data = finals[["arm", "trial_id", "name", "params_m"]].copy()
    data["valid_error_percent"] = 100 * finals["valid_error"]
    data["test_error_percent"] = 100 * finals["test_error"]
    data["front"] = finals["params_m"] < finals["params_m"].cummin().shift(fill_value=np.inf)
    return data


def save(figure: Figure, stem: Path, data: pd.DataFrame) -> dict[str, Path]:
    """Write a figure as `.svg` and `.png` and the rows that drew it as `.csv`; equal input, equal bytes.

    Returns:
        The files by ending: `svg`, `png` and `csv`.
    """
    vector, png = save_vector(figure, stem, data), stem.with_name(f"{stem.name}.png")
    with _literal(figure):
        figure.savefig(png, dpi=160, metadata={"Software": None})
    return {"svg": vector["svg"], "png": png, "csv": vector["csv"]}


def save_vector(figure: Figure, stem: Path, data: pd.DataFrame) -> dict[str, Path]:
    """Write a figure as `.svg` and the rows that drew it as `.csv`; equal input, equal bytes.

    Where one cannot be written, neither is left.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {ending: stem.with_name(f"{stem.name}.{ending}") for ending in ("svg", "csv")}
    try:
        with _literal(figure), mpl.rc_context({"svg.hashsalt": "nas", "svg.fonttype": "path"}):
            figure.savefig(paths["svg"], metadata={"Date": None, "Creator": None})
        data.to_csv(paths["csv"], index=False, lineterminator="\n")
    except Exception:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise
    return paths


@contextmanager
def _literal(figure: Figure) -> Iterator[None]:
    """Text as it stands: names of arms and metrics may hold a dollar sign, which is no formula there."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
    with mpl.rc_context(
        {"text.parse_math": False}
    ):  # for labels of ticks, which are made when they are drawn
        yield


# Parts of figures


def blank(title: str, height: float) -> Figure:
    """Empty figure of this height in inches, not counting its title; without a title if that is empty."""
    figure = Figure(
        figsize=(WIDTH, height + 0.2 * (title.count("\n") + 2)), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def _title(tables: Tables) -> str:
    return textwrap.fill(str(tables.study["question"]), 92)


def _arm_label(arm: str, role: str) -> str:
    lines = textwrap.wrap(arm, 26) or [arm]
    return "\n".join([*lines, *([f"({role})"] if role and role != arm else [])])


def _runs_label(row: Any) -> str:
    """The n of an arm, and the runs that have no dot."""
    counts = {
        "pruned": row.n_pruned,
        "failed": row.n_failed,
        "not ended": row.n_pending,
        "no test error": row.n_missing,
    }
    rest = [f"{count} {outcome}" for outcome, count in counts.items() if count]
    return "\n".join([f"n = {row.n}", *rest])


def _error_limits(tables: Tables, summary: pd.DataFrame) -> tuple[float, float] | None:
    """Range of the error axis: all runs, and intervals as long as the runs keep a third of it."""
    errors = 100 * tables.finals()["test_error"]
    if errors.empty:
        return None
    low, high = errors.min(), errors.max()
    span = max(high - low, 0.1)
    ends = [low, high, *summary["error_low"].dropna(), *summary["error_high"].dropna()]
    pad = 0.12 * span
    return max(min(ends) - pad, low - span, 0.0 if low > 0 else -pad), min(max(ends) + pad, high + span)


def _jitter(runs: int) -> NDArray[np.float64]:
    """Vertical offsets that keep equal values apart: the same for the same number of runs."""
    golden = (math.sqrt(5) - 1) / 2
    return 0.26 * (np.arange(runs, dtype=np.float64) * golden % 1) - 0.03


def _draw_mean(axes: Axes, place: float, mean: float, low: float, high: float) -> None:
    first, last = axes.get_xlim()
    axes.plot([max(low, first), min(high, last)], [place, place], color=INK, linewidth=1.8, zorder=4)
    for end, beyond, arrow in ((first, low < first, "<"), (last, high > last, ">")):
        if beyond:
            axes.plot([end], [place], marker=arrow, markersize=6, color=INK, clip_on=False, zorder=5)
    axes.plot([mean], [place], marker="D", markersize=5.5, color=INK, zorder=5)


def _draw_band(axes: Axes, mean: float, low: float, high: float) -> None:
    if not np.isnan(low):
        axes.axvspan(low, high, color=PALE, alpha=0.6, linewidth=0, zorder=0)
    axes.axvline(mean, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _error_handles(summary: pd.DataFrame, limits: tuple[float, float]) -> list[Artist]:
    has_interval = summary["error_low"].notna().any()
    mean = Line2D([], [], color=INK, marker="D", markersize=5.5, linewidth=1.8 if has_interval else 0)
    mean.set_label("mean and 95 % interval" if has_interval else "mean")
    handles: list[Artist] = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=5, alpha=0.75, label="one run"),
        mean,
    ]
    baseline = summary[summary["role"] == "baseline"]
    if baseline["n"].sum():
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="mean of random"))
    if baseline["error_low"].notna().any():
        handles.append(Patch(color=PALE, alpha=0.6, label="its 95 % interval"))
    if (summary["error_low"] < limits[0]).any() or (summary["error_high"] > limits[1]).any():
        handles.append(
            Line2D([], [], color=INK, marker=">", markersize=6, linestyle="", label="reaches further")
        )
    return handles


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Legend below the axes, in one line."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5
    )


def say(axes: Axes, text: str) -> None:
    """Text in the middle of axes that have nothing to show."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 3.0}
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9, bbox=box
    )


def _median(data: pd.DataFrame, arm: str, stage: str) -> "pd.Series[float]":
    """Median over completed runs by epoch: over all runs it would jump where one of them stops."""
    used = data[(data["arm"] == arm) & (data["stage"] == stage) & (data["status"] == "completed")]
    return used.groupby("epoch")["valid_error_percent"].median()


def _scale_errors(axes: Axes, errors: "pd.Series[float]") -> str:
    """Words for the title of an error axis, made logarithmic if the first epochs would flatten the last."""
    positive = errors[errors > 0]
    ratio = positive.max() / positive.min() if len(positive) else 1
    if ratio < 3:
        return ""
    axes.set_yscale("log")
    labels = {10: (1, 2, 3, 5, 7), 50: (1, 2, 5), 500: (1, 3), math.inf: (1,)}
    subs = next(digits for limit, digits in labels.items() if ratio <= limit)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))  # few ticks asked for may be none given
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    return ", log scale"


def _draw_runs(axes: Axes, data: pd.DataFrame, median: "pd.Series[float]") -> None:
    for _, run in data.groupby("trial_id"):
        done = (run["status"] == "completed").all()
        (line,) = axes.plot(
            run["epoch"], run["valid_error_percent"], color=BLUE, linewidth=0.7, alpha=0.6, zorder=2
        )
        if not done:
            line.set(color=VERMILION, linewidth=0.9, linestyle=(0, (4, 2)), alpha=0.9)
    axes.plot(median, color=BLUE, linewidth=1.9, zorder=3)
    for line in axes.lines:
        if len(np.asarray(line.get_xdata())) == 1:  # a line of one epoch would not show
            line.set(marker="o", markersize=2 + 2 * line.get_linewidth())
