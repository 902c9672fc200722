"""Figures show every run, fit their page and come with the rows that drew them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.plots import curve_data, curves, error_by_arm, error_data, save
from analysis.records import export, read_tables

from .conftest import Build, draws, end, epoch, start, write_rows, write_study

STUDY = {
    "K=1": [*draws(0.06, 0.002, 3, seed=1), "failed"],
    "K=4": draws(0.05, 0.004, 3, seed=2),
    "K=8": ["pending"],
    "random": draws(0.07, 0.003, 3, seed=3),
}
QUESTION = (
    "What does partially connected search lose in final test error when only 1/K of the channels take part? "
    * 3
)
NAMES = [f"K={k}, edge normalisation {'on' if k % 2 else 'off'}, warm-up of {k} epochs" for k in range(10)]
TEN: dict[str, Sequence[float | str]] = {name: [0.05, 0.06, "oom", "pending", "pruned"] for name in NAMES}


def texts(figure: Figure) -> list[Text]:
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text()
    ]


def dots(figure: Figure) -> list[float]:
    """Errors of the runs drawn."""
    scatters = [artist for artist in figure.axes[0].collections if isinstance(artist, PathCollection)]
    return [float(x) for scatter in scatters for x, _ in np.asarray(scatter.get_offsets())]


@pytest.mark.parametrize(
    ("outcomes", "fields"),
    [
        (STUDY, {}),
        (TEN | {"random": [0.07, 0.08]}, {"question": QUESTION, "reference": NAMES[0]}),
        ({"K=1": [0.05], "random": ["failed"]}, {}),
        ({"K=1": [], "K=4": []}, {"baseline": None}),
    ],
)
@pytest.mark.parametrize("draw", [error_by_arm, curves])
def test_nothing_is_cut_off(
    build: Build, draw: object, outcomes: Mapping[str, object], fields: dict[str, object]
) -> None:
    figure: Figure = draw(build(outcomes, **fields))  # type: ignore[operator]
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    assert drawn is not None
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= figure.get_figwidth()
    assert drawn.y1 <= figure.get_figheight()


def test_every_finished_run_is_a_dot_within_the_axis(build: Build) -> None:
    tables = build(STUDY)
    figure = error_by_arm(tables)
    assert sorted(dots(figure)) == pytest.approx(sorted(100 * tables.finals()["test_error"]))
    low, high = figure.axes[0].get_xlim()
    assert low < min(dots(figure))
    assert max(dots(figure)) < high


def test_the_figure_states_question_axis_n_and_what_is_missing(build: Build) -> None:
    figure = error_by_arm(build(STUDY))
    found = [text.get_text() for text in texts(figure)]
    assert "What does PC-DARTS lose in final error for searching on 1/K of the channels?" in found
    assert "test error (%)" in found
    assert {"K=1\n(reference)", "K=4", "K=8", "random\n(baseline)"} <= set(found)
    assert {"n = 3\n1 failed", "n = 3", "n = 0\n1 not ended"} <= set(found)


@pytest.mark.parametrize("errors", [[0.04, 0.09], [0.64, 0.69]])
def test_a_wide_interval_does_not_squeeze_the_runs(build: Build, errors: list[float]) -> None:
    figure = error_by_arm(build({"K=1": errors, "random": [errors[0] + 0.02, errors[0] + 0.021]}))
    low, high = figure.axes[0].get_xlim()
    assert low >= 0
    assert max(dots(figure)) - min(dots(figure)) >= (high - low) / 3
    assert "reaches further" in [text.get_text() for text in texts(figure)]


def test_an_arm_whose_runs_depend_on_one_another_has_a_mean_alone(build: Build) -> None:
    figure = error_by_arm(
        build({"searched": [0.05, 0.07], "random": [0.109, 0.11, 0.111]}, reference=None, joint=True)
    )
    drawn = [np.asarray(line.get_xdata(), dtype=float) for line in figure.axes[0].lines]
    means = [float(xs[0]) for xs in drawn if len(xs) == 1]
    assert means == pytest.approx([6.0, 11.0])
    assert sum(len(xs) == 2 and xs[0] < xs[1] for xs in drawn) == 1  # random's interval
    assert "mean and 95 % interval" in [text.get_text() for text in texts(figure)]


def test_a_figure_without_intervals_does_not_explain_them(build: Build) -> None:
    figure = error_by_arm(build({"K=1": [0.05, 0.07], "random": [0.1, 0.12]}, scheduler="pbt"))
    figure.draw_without_rendering()
    found = [text.get_text() for text in texts(figure)]
    assert "mean" in found
    assert not any("interval" in text for text in found)


def test_a_study_without_finished_runs_says_so(build: Build) -> None:
    figure = error_by_arm(build({"K=1": ["pending"], "K=4": ["failed"]}, baseline=None))
    assert "no finished run yet" in [text.get_text() for text in texts(figure)]


def test_curves_draw_each_run_and_the_median_of_completed_ones(build: Build) -> None:
    tables = build({"K=1": [0.05, 0.06, 0.08, "failed"], "random": [0.07]})
    figure = curves(tables)
    data = curve_data(tables)
    left = figure.axes[0]
    drawn = [np.asarray(line.get_ydata(), dtype=float).round(6).tolist() for line in left.lines]
    searched = data[(data["arm"] == "K=1") & (data["stage"] == "search")]
    for _, run in searched.groupby("trial_id"):
        assert run["valid_error_percent"].round(6).tolist() in drawn
    middle = searched.loc[
        searched["trial_id"] == "K1-1", "valid_error_percent"
    ]  # its errors lie between the others
    bold = max(left.lines, key=lambda line: line.get_linewidth())
    assert np.asarray(bold.get_ydata(), dtype=float).tolist() == pytest.approx(middle.tolist())
    assert "no epochs" in [text.get_text() for text in figure.axes[2].texts]


@pytest.mark.parametrize("last", [0.4, 0.2, 0.02, 0.002, 0.00002, 0.0])
def test_the_error_axis_has_labels_whatever_its_range(tmp_path: Path, last: float) -> None:
    rows = [epoch("t", number, {"valid_error": error}) for number, error in enumerate((0.9, 0.5, last))]
    write_rows(write_study(tmp_path), [start("t"), *rows, end("t")])
    export(tmp_path)
    figure = curves(read_tables(tmp_path))
    figure.draw_without_rendering()
    axes = figure.axes[2]
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(shown) <= 8


def test_a_run_of_one_epoch_is_a_point(tmp_path: Path) -> None:
    write_rows(write_study(tmp_path), [start("t"), epoch("t", 0, {"valid_error": 0.5}), end("t")])
    export(tmp_path)
    axes = curves(read_tables(tmp_path)).axes[2]
    assert len(axes.lines) >= 2
    assert {line.get_marker() for line in axes.lines if len(np.asarray(line.get_xdata()))} == {"o"}


def test_the_rows_of_a_figure_hold_every_trial_and_every_arm(build: Build) -> None:
    tables = build(STUDY | {"none": []})
    data = error_data(tables)
    assert sorted(data["trial_id"].dropna()) == sorted(tables.trials["trial_id"])
    assert data["test_error_percent"].notna().sum() == len(tables.finals())
    assert list(dict.fromkeys(data["arm"])) == list(tables.arms)


def test_saved_files_are_the_same_each_time(build: Build, tmp_path: Path) -> None:
    tables = build(STUDY)
    for draw, rows in ((error_by_arm, error_data), (curves, curve_data)):
        first = save(draw(tables), tmp_path / "a" / "fig.one", rows(tables))
        second = save(draw(tables), tmp_path / "b" / "fig.one", rows(tables))
        assert [path.name for path in first.values()] == ["fig.one.svg", "fig.one.png", "fig.one.csv"]
        for ending, path in first.items():
            assert path.read_bytes() == second[ending].read_bytes()


def test_saved_files_are_of_their_kind(build: Build, tmp_path: Path) -> None:
    tables = build(STUDY)
    data = error_data(tables)
    paths = save(error_by_arm(tables), tmp_path / "error", data)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths["svg"].read_text()
    again = pd.read_csv(io.StringIO(paths["csv"].read_text()))
    assert again["test_error_percent"].tolist() == pytest.approx(
        data["test_error_percent"].tolist(), nan_ok=True
    )
