"""Figures of reports: each source has those it supports, drawn from the rows beside them."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from scipy import stats

from analysis import agreement, associations, cells, figures, findings, loaders, mixed, plots, report
from analysis.figures import Drawing
from analysis.findings import Findings
from analysis.loaders import Sample
from analysis.resample import Estimate, missing
from tests.analysis.conftest import end, epoch, genotype, start, write_rows, write_study

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3", "dil_conv_5x5")


def drawn_genotype(draw: np.random.Generator) -> str:
    """A cell of four nodes, each with two inputs drawn from all before it."""
    flat = [
        (str(draw.choice(OPERATIONS)), int(pred))
        for node in range(2, 6)
        for pred in draw.choice(node, 2, replace=False)
    ]
    return f"Genotype(normal={flat}, normal_concat=[2, 3, 4, 5], reduce={flat}, reduce_concat=[3, 4, 5])"


def searched(trial: str, arm: str, seed: int, draw: np.random.Generator, **axes: Any) -> list[dict[str, Any]]:
    """Start and search of a trial: four epochs, of which the last stops it and goes back to the second."""
    first = start(trial, arm, seed)
    first["axes"] |= axes
    rows = [first]
    for number in range(4):
        values: dict[str, float | None] = {
            "valid_error": 0.9 - 0.1 * number + 0.05 * draw.random(),
            "stop_eigenvalue": 1 + number + draw.random(),
            "alpha_entropy": 1 - 0.1 * number + 0.05 * draw.random(),
            "skips": float(draw.integers(4)),
            "seconds": 30.0,
            "stop_epoch": 3.0 if number == 3 else None,
            "stop_back_to": 1.0 if number == 3 else None,
        }
        rows.append(epoch(trial, number, values, genotype=genotype(number)))
    return rows


def measured(draw: np.random.Generator, error: float) -> dict[str, float | None]:
    """End metrics of a trial."""
    return {
        "test_error": error,
        "valid_error": error + 0.01 * draw.normal(),
        "params_m": 1 + draw.random(),
        "search_margin": error + 0.004 * draw.normal(),
        "skips": float(draw.integers(4)),
        "latency_ms": 5 + draw.random(),
    }


def one_phase(folder: Path, runs: int = 5) -> Path:
    """K x edge normalisation x seeds, and a random arm."""
    arms = {f"K={k} norm={norm}": (k, norm) for k in (1, 4) for norm in (False, True)}
    write_study(folder, preset="tiny", arms=[*arms, "random"], reference="K=1 norm=False")
    draw = np.random.default_rng(0)
    for arm, (k, norm) in arms.items():
        for seed in range(runs):
            trial, error = f"k{k}{norm}{seed}", 0.1 + 0.01 * k + 0.02 * norm + 0.02 * draw.normal()
            rows = searched(trial, arm, seed, draw, K=k, norm=norm)
            rows += [epoch(trial, 0, {"valid_error": error, "seconds": 60.0}, "retrain")]
            rows += [end(trial, metrics=measured(draw, error), genotype=drawn_genotype(draw))]
            write_rows(folder, rows)
    for seed in range(runs):
        trial, error = f"random{seed}", 0.15 + 0.03 * draw.normal()
        metrics = {name: value for name, value in measured(draw, error).items() if name != "search_margin"}
        rows = [epoch(trial, 0, {"valid_error": error, "seconds": 60.0}, "retrain")]
        rows += [end(trial, metrics=metrics, genotype=drawn_genotype(draw))]
        write_rows(folder, [start(trial, "random", seed), *rows])
    return folder


def two_phase(folder: Path) -> Path:
    """Six searches of two arms, and two retrainings of what each of them found."""
    write_study(folder, preset="tiny", baseline=None, arms=["K=1", "K=4"])
    draw = np.random.default_rng(1)
    for index, (arm, seed) in enumerate(itertools.product(("K=1", "K=4"), range(6))):
        trial, text = f"s{index}", drawn_genotype(draw)
        rows = searched(trial, arm, seed, draw)
        rows[0]["config"] |= {"space": {}, "data": {}, "retrain": {"epochs": 0}}
        quality = draw.random()
        found = {"params_m": 1 + draw.random(), "search_margin": quality, "search_seconds": 120.0}
        write_rows(folder, [*rows, end(trial, metrics=found, genotype=text)])
        for again in range(2):
            name = f"r{index}{again}"
            first = start(name, "retraining", 0) | {"found_by": [trial]}
            first["config"] |= {"space": {}, "data": {}, "retrain": {"epochs": 1}}
            first["config"]["method"] = {"name": "fixed", "searcher": {"genotype": text}}
            first["config"]["seeds"] = {"split": 0, "search": 0, "retrain": again}
            error = 0.1 + 0.1 * quality + 0.01 * draw.normal()
            rows = [first, epoch(name, 0, {"valid_error": error, "seconds": 60.0}, "retrain")]
            metrics = {"test_error": error, "valid_error": error, "retrain_seconds": 60.0}
            write_rows(folder, [*rows, end(name, metrics=metrics, genotype=text)])
    return folder


CHANCES = (0.5, 0.25, 0.8)
"""Of the trials of `pruned` to go on, by seed."""


def pruned(folder: Path) -> Path:
    """Two arms of which every third run is stopped, by chances that are known and differ."""
    write_study(folder, preset="tiny", baseline=None, arms=["K=1", "K=4"])
    draw = np.random.default_rng(2)
    for arm, seed in itertools.product(("K=1", "K=4"), range(9)):
        trial, stopped = f"{arm}{seed}".replace("=", ""), seed % 3 == 0
        rows = searched(trial, arm, seed, draw)
        rows.append(epoch(trial, 0, {"lr": 0.1}, "retrain"))
        mark = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 120.0, "rung": 1.0}
        rows.append(mark | {"probability": CHANCES[seed % 3], "goes_on": not stopped, "audit": False})
        metrics = measured(draw, 0.1 + 0.05 * draw.random())
        if stopped:
            metrics = {"search_margin": metrics["search_margin"]}
        status, text = ("pruned", None) if stopped else ("completed", drawn_genotype(draw))
        rows.append(end(trial, status, metrics=metrics, genotype=text))
        write_rows(folder, rows)
    return folder


def joint(folder: Path, trials: int = 14) -> Path:
    """A joint search of one axis that takes two values, and two that never take one twice."""
    fields = {"arms": ["searched"], "reference": None, "baseline": None, "joint": True}
    write_study(folder, preset="tiny", **fields)
    draw = np.random.default_rng(3)
    for seed in range(trials):
        trial, error = f"t{seed}", 0.1 + 0.05 * draw.random()
        rows = searched(trial, "searched", 0, draw, K=1 + seed % 2, lr=draw.random(), wd=draw.random())
        write_rows(folder, [*rows, end(trial, metrics=measured(draw, error), genotype=drawn_genotype(draw))])
    return folder


def macro(folder: Path, networks: int = 120) -> Path:
    """Ground truth in the form of NAS-Bench-Macro, three trainings each."""
    draw, entries = np.random.default_rng(4), {}
    while len(entries) < networks:
        key = loaders.canonical_macro("".join(map(str, draw.integers(0, 3, 8))))
        quality = 80 + sum(map(int, key)) + draw.normal()
        accuracies = [float(quality + 0.5 * draw.normal()) for _ in range(3)]
        price = 1000 * sum(int(digit) + 1 for digit in key) + int(draw.integers(500))
        entries[key] = {"test_acc": accuracies, "params": 100 * price, "flops": 9000 * price}
    folder.mkdir()
    (folder / "macro.json").write_text(json.dumps(entries))
    return folder / "macro.json"


def curves(folder: Path, networks: int = 30) -> Path:
    """Ground truth as learning curves, with the genotypes of the networks."""
    draw = np.random.default_rng(5)
    folder.mkdir()
    rise = 90 - 60 * 0.9 ** np.arange(40)
    array = rise + draw.normal(size=(networks, 1)) + 0.5 * draw.normal(size=(networks, 40))
    np.save(folder / "curves.npy", array)
    (folder / "genotypes.txt").write_text("\n".join(drawn_genotype(draw) for _ in range(networks)))
    return folder


SOURCES = {
    "one phase": one_phase,
    "two phases": two_phase,
    "pruned": pruned,
    "joint": joint,
    "macro": macro,
    "curves": curves,
}

ALWAYS = {"flow", "error_by_arm", "metrics"}
STUDY = ALWAYS | {"power", "trajectories", "curves", "epochs", "operations", "distances"}
DRAWN = {
    "one phase": STUDY
    | {"heat", "interaction", "seeds", "critical_difference", "profiles", "improvement", "variance"}
    | {"anytime", "front"}
    | {f"cells_K={k}_norm={norm}" for k in (1, 4) for norm in (False, True)},
    "two phases": STUDY | {"heat", "seeds", "variance", "anytime", "front"} | {"cells_K=1", "cells_K=4"},
    # Runs that were selected, or chosen one in view of another, tell nothing of the spread between runs.
    "pruned": STUDY - {"power"} | {"heat", "anytime", "front", "cells_K=1", "cells_K=4"},
    "joint": STUDY - {"power"} | {"front", "cells_searched"},
    "macro": ALWAYS | {"heat", "variance", "front"},
    "curves": ALWAYS | {"epochs", "heat"},
}
"""Figures of each source besides scatters and groups."""

WITHOUT_ESTIMATE = {"flow", "seeds", "critical_difference", "curves", "trajectories"}
"""Figures of runs, ranks and means of what happens to be there, which estimate nothing."""

WITHOUT_INTERVAL = {
    ("one phase", "variance"),  # shares of a sum of squares
    ("pruned", "error_by_arm"),  # the mean of survivors
    ("joint", "error_by_arm"),  # runs that are not independent
    ("pruned", "distances"),
    ("joint", "distances"),
}


@dataclass(frozen=True)
class Drawn:
    """A source with its figures."""

    sample: Sample
    found: Findings
    drawings: Mapping[str, Drawing]
    reasons: Mapping[str, str]

    def metric(self, stem: str) -> associations.MetricFinding:
        """The metric of a figure."""
        return next(one for one in self.found.metrics if stem.partition("_")[2] == one.name)


def draw_all(sample: Sample) -> Drawn:
    found = findings.find(sample)
    results = {name: make(sample, found) for name, make in figures.makers(sample, found).items()}
    drawings = {one.stem: one for one in results.values() if isinstance(one, Drawing)}
    return Drawn(sample, found, drawings, {n: why for n, why in results.items() if isinstance(why, str)})


class Sources(dict[str, Drawn]):
    """Each source with its figures, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> Drawn:
        self[name] = draw_all(loaders.load(SOURCES[name](self.folder / name.replace(" ", "_"))))
        return self[name]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(associations, "_MODELS", 0)  # mixed models take seconds, and no figure shows them
        yield Sources(tmp_path_factory.mktemp("sources"))


def lines(axes: Axes) -> list[np.ndarray[Any, Any]]:
    """The lines drawn, as (points, 2)."""
    return [np.asarray(line.get_xydata(), dtype=float) for line in axes.lines]


def dots(axes: Axes, *, hollow: bool = False) -> np.ndarray[Any, Any]:
    """Points of all scatters, (points, 2)."""
    found = [one for one in axes.collections if isinstance(one, PathCollection)]
    chosen = [np.asarray(one.get_offsets()) for one in found if (len(one.get_facecolor()) == 0) == hollow]
    return np.concatenate([*chosen, np.empty((0, 2))])


# All of them


@pytest.mark.parametrize("name", SOURCES)
def test_each_source_has_its_figures(sources: Sources, name: str) -> None:
    stems = set(sources[name].drawings)
    named = {stem for stem in stems if stem.startswith(("scatter_", "groups_"))}
    if sources[name].sample.kind == "study":
        assert stems - named == DRAWN[name]
    assert stems >= DRAWN[name]
    assert sum(stem.startswith("scatter_") for stem in named) >= 1
    assert any(stem.startswith("groups_") for stem in named) is (len(sources[name].sample.tables.arms) > 1)


@pytest.mark.parametrize("name", SOURCES)
def test_captions_state_n_and_the_interval_of_an_estimate(sources: Sources, name: str) -> None:
    for stem, drawing in sources[name].drawings.items():
        assert re.search(r"\bn = [\d,]+", drawing.caption), stem
        without = stem in WITHOUT_ESTIMATE or (name, stem) in WITHOUT_INTERVAL
        interval = re.search(r"\[-?[\d.e]+, -?[\d.e]+\]", drawing.caption)
        assert (interval is None) is without, (stem, drawing.caption)


@pytest.mark.parametrize("name", ["one phase", "curves"])
def test_no_figure_reaches_over_its_edge(sources: Sources, name: str) -> None:
    for stem, drawing in sources[name].drawings.items():
        figure = drawing.figure
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box is not None
        assert min(box.x0, box.y0) >= -0.02, stem
        assert box.x1 <= figure.get_figwidth() + 0.02, stem
        assert box.y1 <= figure.get_figheight() + 0.02, stem


def test_files_are_vectors_with_the_rows_that_drew_them(sources: Sources, tmp_path: Path) -> None:
    for stem, drawing in sources["one phase"].drawings.items():
        paths = plots.save_vector(drawing.figure, tmp_path / stem, drawing.data)
        assert ET.parse(paths["svg"]).getroot().tag.endswith("svg")
        assert len(pd.read_csv(paths["csv"])) == len(drawing.data) > 0


def test_a_figure_that_fails_leaves_the_others(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Drawing:
        raise ZeroDivisionError("no such luck")

    source = sources["macro"]
    monkeypatch.setattr(figures, "flow", broken)
    with pytest.raises(ZeroDivisionError):  # tests are strict
        figures.write(source.sample, source.found, tmp_path)
    monkeypatch.setattr(figures, "FAILURES", (Exception,))
    drawn, missing = figures.write(source.sample, source.found, tmp_path)
    assert missing["flow"] == "could not be drawn: ZeroDivisionError: no such luck"
    assert {drawing.stem for drawing, _ in drawn} == set(source.drawings) - {"flow"}
    assert all(path.is_file() for _, paths in drawn for path in paths.values())


def test_a_full_disk_is_no_fault_of_a_figure(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source = sources["macro"]
    monkeypatch.setattr(figures, "FAILURES", (Exception,))
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left"):
        figures.write(source.sample, source.found, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_joint_search_of_many_trials_has_a_report(tmp_path: Path) -> None:
    files = report.write(joint(tmp_path / "study"), tmp_path / "out")
    missing = json.loads((tmp_path / "out" / "results.json").read_text())["figures_not_drawn"]
    assert "a joint search chose its settings itself" in missing["interaction of axes"]
    assert any(path.name == "scatter_search_margin.svg" for path in files)


def test_names_may_hold_what_is_no_text_of_a_formula_or_a_file(tmp_path: Path) -> None:
    arms = ["$K^{", "lr=$1 or $2", "a/b"]
    folder = write_study(tmp_path / "study", preset="tiny", baseline=None, reference=None, arms=arms)
    draw = np.random.default_rng(0)
    for arm, seed in itertools.product(arms, range(5)):
        trial, error = f"t{arms.index(arm)}{seed}", 0.1 + 0.1 * draw.random()
        rows = searched(trial, arm, seed, draw)
        metrics = {"test_error": error, "$\\frac{": error + draw.random(), "x/y": draw.random()}
        rows.append(end(trial, metrics=metrics, genotype=drawn_genotype(draw)))
        write_rows(folder, rows)
    sample = loaders.load(folder)
    drawn, missing = figures.write(sample, findings.find(sample), tmp_path / "out")
    assert len({drawing.stem for drawing, _ in drawn}) == len(drawn) > 10
    assert not any("could not" in why for why in missing.values())
    assert {path.parent for _, paths in drawn for path in paths.values()} == {tmp_path / "out"}


# Metrics


def test_the_ceiling_of_tau_is_that_of_a_normal_pair() -> None:
    half = mixed.tau_ceiling(Estimate(0.5, 0.0, 1.0, 9, 9, "r"))
    assert (half.value, half.low, half.high) == pytest.approx((1 / 3, 0, 1))
    draw = np.random.default_rng(0)
    x, noise = draw.normal(size=(2, 20_000))
    y = 0.8 * x + 0.6 * noise
    tau = stats.kendalltau(x, y).statistic
    assert mixed.tau_ceiling(Estimate(0.8, None, None, 9, 9, "r", restriction="-")).value == pytest.approx(
        tau, abs=0.01
    )
    assert mixed.tau_ceiling(missing("r", "unknown")).value is None


def test_the_ceiling_drawn_is_that_of_tau(sources: Sources) -> None:
    source = sources["macro"]
    ceiling = source.found.ceiling.value
    assert ceiling is not None
    expected = 2 / math.pi * math.asin(ceiling)
    dashed = [
        line[0, 0] for line in lines(source.drawings["metrics"].figure.axes[0]) if np.ptp(line[:, 0]) == 0
    ]
    assert sorted(dashed)[-1] == pytest.approx(expected)
    assert f"Noise ceiling of tau-b, under normality: {expected:.2f}" in next(
        one.caption for stem, one in source.drawings.items() if stem.startswith("scatter_")
    )


def test_many_metrics_are_cut_to_the_declared_and_the_clearest(sources: Sources) -> None:
    source = sources["one phase"]
    one = source.found.metrics[0]
    many = [replace(one, name=f"a_metric_with_a_name_of_{i:02d}_and_much_more_to_say") for i in range(50)]
    many[49] = replace(many[49], primary=True, test=replace(one.test, p=1.0))
    found = replace(source.found, metrics=tuple(many))
    for make in (figures.overview, figures.heat):
        drawing = make(source.sample, found)
        assert isinstance(drawing, Drawing)
        labels = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
        assert len(labels) == 21 == drawing.data["name"].nunique()
        assert many[49].name in set(drawing.data["name"])
        assert "29 less clear metrics left out" in drawing.caption
        assert max(map(len, labels)) <= 36


def test_an_interval_is_drawn_per_metric_and_kind(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["metrics"]
    drawn = [line for line in lines(drawing.figure.axes[0]) if len(line) == 2 and np.ptp(line[:, 1]) == 0]
    rows = drawing.data.dropna(subset=["low"])[["low", "high"]].to_numpy()
    assert np.sort(np.array([line[:, 0] for line in drawn]), axis=0) == pytest.approx(np.sort(rows, axis=0))


@pytest.mark.parametrize("name", SOURCES)
def test_a_scatter_shows_each_run_and_hollow_those_stopped(sources: Sources, name: str) -> None:
    source = sources[name]
    for stem, drawing in source.drawings.items():
        if not stem.startswith("scatter_"):
            continue
        axes, rows = drawing.figure.axes[0], drawing.data
        final, stopped = rows.dropna(subset=["error_percent"]), rows[rows["error_percent"].isna()]
        shown = pd.DataFrame(dots(axes), columns=["metric", "error_percent"])
        order = ["metric", "error_percent"]
        assert shown.sort_values(order).to_numpy() == pytest.approx(
            final[order].sort_values(order).to_numpy()
        )
        assert sorted(dots(axes, hollow=True)[:, 0]) == pytest.approx(sorted(stopped["metric"]))
        assert set(stopped["status"]) <= {"pruned"}
        sloped = [
            arm for arm, runs in final.groupby("arm") if len(runs) >= 3 and runs["metric"].nunique() > 1
        ]
        assert len(axes.lines) == len(sloped) + 1
        told = drawing.figure.axes[1].get_title(loc="left")
        one = source.metric(stem)
        for tau in (one.grouped.within, one.grouped.pooled):
            if tau.value is not None:
                assert f"{tau.value:.2f}" in told


def test_some_stopped_runs_are_drawn(sources: Sources) -> None:
    scatters = sources["pruned"].drawings.items()
    drawing = next(one for stem, one in scatters if stem.startswith("scatter_search_"))
    assert len(dots(drawing.figure.axes[0], hollow=True)) == 6
    assert "6 stopped runs at the upper edge" in drawing.caption


def test_lines_of_a_scatter_are_least_squares(sources: Sources) -> None:
    drawing = next(one for stem, one in sources["one phase"].drawings.items() if stem.startswith("scatter_"))
    rows = drawing.data.dropna(subset=["error_percent"])
    (x0, y0), (x1, y1) = lines(drawing.figure.axes[0])[-1]
    fit = stats.linregress(rows["metric"], rows["error_percent"])
    assert (y1 - y0) / (x1 - x0) == pytest.approx(fit.slope)
    assert y0 == pytest.approx(fit.intercept + fit.slope * x0)


def test_a_metric_that_all_but_stands_still_has_a_scatter(sources: Sources) -> None:
    source = sources["one phase"]
    one = source.found.metrics[0]
    flat = 1e9 + 1e-7 * np.arange(len(source.sample.trials))
    sample = replace(source.sample, metrics=source.sample.metrics.assign(**{one.name: flat}))
    drawing = figures.scatter(one, sample, source.found)
    assert isinstance(drawing, Drawing)
    drawing.figure.draw_without_rendering()


def test_the_heat_map_writes_every_number_and_marks_tests_within_arms(sources: Sources) -> None:
    source = sources["one phase"]
    drawing = source.drawings["heat"]
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    values = [f"{value:+.2f}" for value in drawing.data["value"]]
    assert Counter(text.removeprefix("\u2022 ") for text in texts) == Counter(values)
    within = drawing.data[drawing.data["kind"] == "within"]
    significant = within[within["p_adjusted"] < 0.05]
    assert 0 < len(significant) == sum(text.startswith("\u2022") for text in texts)
    by_name = {one.name: one for one in source.found.metrics}
    for row in within.to_dict("records"):
        assert row["p_adjusted"] == pytest.approx(by_name[row["name"]].p_adjusted)


def weighted_tau(groups: list[pd.DataFrame]) -> float:
    """Tau-b by its definition over the pairs of each group; a pair counts the product of its weights."""
    concordance = scale = 0.0
    for rows in groups:
        untied_x = untied_y = 0.0
        for a, b in itertools.combinations(rows[["x", "y", "weight"]].to_numpy(dtype=float), 2):
            weight, sign = a[2] * b[2], np.sign(np.round(a[:2] - b[:2], 9))
            concordance += weight * sign[0] * sign[1]
            untied_x += weight * abs(sign[0])
            untied_y += weight * abs(sign[1])
        scale += math.sqrt(untied_x * untied_y)
    return concordance / scale


def test_epochs_are_those_within_arms_with_the_pooled_beside(sources: Sources) -> None:
    for name in ("one phase", "two phases", "pruned", "curves"):
        drawing, sample = sources[name].drawings["epochs"], sources[name].sample
        for axes, curve in zip(drawing.figure.axes, sources[name].found.curves, strict=False):
            within, pooled = lines(axes)[:2]
            rows = drawing.data[drawing.data["name"] == curve.name].dropna(subset=["value"])
            for line, kind in ((within, "within"), (pooled, "pooled")):
                mine = rows[rows["kind"] == kind]
                assert line == pytest.approx(mine[["epoch", "value"]].to_numpy(dtype=float))
            # The last points, by hand: pairs of one arm, and of all.
            part = sample.tables.epochs
            part = part[(part["key"] == curve.name) & (part["stage"] == curve.stage)]
            last = part[part["epoch"] == rows["epoch"].max()].set_index("trial_id")["value"]
            table = sample.trials.assign(x=sample.trials["trial_id"].map(last), y=sample.error).dropna(
                subset=["x", "y"]
            )
            table["weight"] = 1.0
            if name == "pruned":
                table["weight"] = [1 / CHANCES[int(seed) % 3] for seed in table["search_seed"]]
            assert pooled[-1, 1] == pytest.approx(weighted_tau([table]))
            if name != "curves":
                assert within[-1, 1] == pytest.approx(
                    weighted_tau([runs for _, runs in table.groupby("arm", observed=True)])
                )
            at_risk = sample.trials["trial_id"].isin(last.dropna().index).sum()
            assert rows["at_risk"].iloc[-1] == at_risk


# Arms


def test_crossed_axes_show_every_run_and_the_means_of_cells(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["interaction"]
    (axes,) = drawing.figure.axes
    rows = drawing.data
    assert len(rows) == 20
    assert sorted(dots(axes)[:, 1]) == pytest.approx(sorted(rows["error_percent"]))
    means = rows.groupby(["line_level", "x_level"])["error_percent"].mean()
    shown = [line[:, 1] for line in lines(axes) if len(line) == 2 and np.ptp(line[:, 0]) > 0]
    assert sorted(np.concatenate(shown)) == pytest.approx(sorted(means))
    for _, cell in rows.groupby(["line_level", "x_level"]):
        ends = stats.t.interval(
            0.95, len(cell) - 1, cell["error_percent"].mean(), stats.sem(cell["error_percent"])
        )
        assert (cell["low"].iloc[0], cell["high"].iloc[0]) == pytest.approx(ends)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\nn = 5, 5", "4\nn = 5, 5"]


def doubted(folder: Path) -> Sample:
    """K x edge normalisation, of which a rule stopped two runs in five of every arm."""
    settings = list(itertools.product((1, 4), (False, True)))
    arms = [f"K={k} norm={norm}" for k, norm in settings]
    write_study(folder, preset="tiny", arms=arms, reference=None, baseline=None)
    draw = np.random.default_rng(0)
    for (arm, (k, norm)), seed in itertools.product(zip(arms, settings, strict=True), range(5)):
        trial = f"k{k}{norm}{seed}"
        first = start(trial, arm, seed)
        first["axes"] |= {"K": k, "norm": norm}
        error = 0.1 + 0.05 * draw.random()
        write_rows(folder, [first, end(trial, "pruned", None) if seed < 2 else end(trial, test_error=error)])
    return loaders.load(folder)


def test_cells_of_selected_runs_have_no_intervals(tmp_path: Path) -> None:
    sample = doubted(tmp_path / "study")
    found = findings.find(sample)
    assert set(found.doubts) == set(sample.tables.arms)
    drawing = figures.interaction(sample, found)
    assert isinstance(drawing, Drawing)
    assert drawing.data["low"].isna().all()
    assert drawing.data["high"].isna().all()
    assert "[" not in drawing.caption
    assert drawing.caption.endswith(f"No intervals: {'; '.join(sorted(set(found.doubts.values())))}.")
    assert not [line for line in lines(drawing.figure.axes[0]) if len(line) == 2 and np.ptp(line[:, 0]) == 0]


def test_rows_measured_unlike_are_not_crossed(sources: Sources) -> None:
    source = sources["one phase"]
    found = replace(source.found, unlike="measured under different protocols (retrain.epochs: 3, 4)")
    assert figures.interaction(source.sample, found) == found.unlike


def test_axes_without_few_levels_are_left_out_and_pairs_of_all_others_are_drawn(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny", baseline=None, reference=None, arms=["a"])
    draw = np.random.default_rng(0)
    for seed, (k, m, norm) in enumerate(itertools.product((1, 2, 4), range(2), range(2))):
        rows = searched(f"t{seed}", "a", seed, draw, K=k, M=m, norm=norm, lr=draw.random())
        write_rows(folder, [*rows, end(f"t{seed}", metrics=measured(draw, draw.random()))])
    sample = loaders.load(folder)
    drawing = figures.interaction(sample, findings.find(sample))
    assert isinstance(drawing, Drawing)
    assert {tuple(sorted(pair)) for pair in zip(drawing.data["x"], drawing.data["line"], strict=True)} == {
        ("axes.K", "axes.M"),
        ("axes.K", "axes.norm"),
        ("axes.M", "axes.norm"),
    }
    assert len(drawing.figure.axes) == 3
    assert len(drawing.data) == 36
    assert "over all levels of the other axes" in drawing.caption


def test_lines_over_arms_are_the_rows_beside_them(sources: Sources) -> None:
    source = sources["one phase"]
    random = source.sample.tables.baseline
    for stem, x, y in (("profiles", "score", "share"), ("anytime", "hours", "error_percent")):
        drawing = source.drawings[stem]
        arms = [arm for arm in source.sample.tables.arms if arm != random]
        for axes, arm in zip(drawing.figure.axes, arms, strict=False):
            for line, name in zip(lines(axes), (random, arm), strict=True):
                mine = drawing.data.loc[drawing.data["arm"] == name, [x, y]]
                assert line == pytest.approx(mine.to_numpy(dtype=float), nan_ok=True)
    scored = source.sample.error.notna().sum()
    for stem in ("profiles", "improvement"):
        assert f"n = {scored} runs" in source.drawings[stem].caption
    lost = replace(source.found, profiles=dict(list(source.found.profiles.items())[1:]))
    for make in (figures.profiles, figures.improvement):  # n is that of what is drawn
        drawing = make(source.sample, lost)
        assert isinstance(drawing, Drawing)
        assert f"n = {scored - 5} runs" in drawing.caption
    bars = [patch.get_width() for patch in source.drawings["improvement"].figure.axes[0].patches]
    assert bars == pytest.approx(source.drawings["improvement"].data["value"].tolist())
    for arm, (_, share) in zip(arms, enumerate(bars), strict=True):
        a, b = (findings.percent(source.sample, name) for name in (arm, str(random)))
        assert share == pytest.approx(np.mean([(y > x) + 0.5 * (x == y) for x in a for y in b]))


def test_shares_of_the_variance_are_drawn_as_they_are(sources: Sources) -> None:
    source = sources["one phase"]
    assert source.found.sweep is not None
    effects = [
        replace(one, share=share) for one, share in zip(source.found.sweep.effects, (0.3, 0.2), strict=False)
    ]
    sweep = replace(source.found.sweep, effects=tuple(effects), residual_share=0.4)
    drawing = figures.variance(source.sample, replace(source.found, sweep=sweep))
    assert isinstance(drawing, Drawing)
    widths = [patch.get_width() for patch in drawing.figure.axes[0].patches]
    assert widths == pytest.approx([0.3, 0.2, 0.4]) == drawing.data["share"].tolist()
    assert "add up to 90.0 %" in drawing.caption
    assert "add up" not in source.drawings["variance"].caption


def test_seeds_are_ranked_seed_by_seed(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["seeds"]
    errors = drawing.data.set_index("search_seed")
    left, right = drawing.figure.axes
    for arm, error, rank in zip(errors, lines(left), lines(right), strict=True):
        assert error[:, 1] == pytest.approx(errors[arm].tolist())
        assert rank[:, 1] == pytest.approx(
            [stats.rankdata(row)[list(errors).index(arm)] for row in errors.to_numpy()]
        )


def test_seeds_that_an_arm_lacks_have_no_ranks(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "study", preset="tiny", baseline=None, reference=None, arms=["a", "b", "c"]
    )
    errors = {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.2, 0.1, 0.2, 0.1], "c": [0.3, 0.3, 0.1]}
    for arm, values in errors.items():
        for seed, error in enumerate(values):
            write_rows(folder, [start(f"{arm}{seed}", arm, seed), end(f"{arm}{seed}", test_error=error)])
    sample = loaders.load(folder)
    drawing = figures.seeds(sample, findings.find(sample))
    assert isinstance(drawing, Drawing)
    assert "n = 3 seeds shared by 3 arms. 1 seed more" in drawing.caption
    left, right = drawing.figure.axes
    for arm, error, rank in zip(errors, lines(left), lines(right), strict=True):
        assert error[: len(errors[arm]), 1] == pytest.approx(100 * np.array(errors[arm]))
        assert np.isnan(rank[3, 1])
        assert rank[:3, 1] == pytest.approx(
            [
                stats.rankdata([errors[name][seed] for name in errors])[list(errors).index(arm)]
                for seed in range(3)
            ]
        )


def test_seeds_on_which_all_arms_agree_are_no_warning(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny", baseline=None, arms=["K=1", "K=4"])
    for arm, seed in itertools.product(("K=1", "K=4"), range(3)):
        write_rows(
            folder,
            [
                start(f"{arm}{seed}", arm, seed),
                end(f"{arm}{seed}", test_error=0.1 + 0.01 * (seed > 0) * (arm == "K=4")),
            ],
        )
    sample = loaders.load(folder)
    assert isinstance(figures.seeds(sample, findings.find(sample)), Drawing)  # warnings are errors


def test_the_flow_counts_every_row(sources: Sources) -> None:
    rows = sources["pruned"].drawings["flow"].data.set_index("stage")["n"]
    assert "planned, never started" not in rows
    source = sources["pruned"]
    counts = replace(source.found.counts, n_not_started=5)
    planned = figures.flow(source.sample, replace(source.found, counts=counts))
    assert isinstance(planned, Drawing)
    assert planned.data.set_index("stage")["n"]["planned, never started"] == 5
    assert any(text.get_text().startswith("5 planned") for text in planned.figure.axes[0].texts)
    assert rows["stopped early"] == 6
    assert rows["total"] == 18 == rows["used"] + rows[["stopped early", "not ended"]].sum()


# Cost


def test_fronts_are_of_runs_that_none_is_better_and_cheaper_than(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["front"]
    table = drawing.data
    assert [axes.get_xlabel() for axes in drawing.figure.axes] == ["parameters (millions)", "latency (ms)"]
    for price, front in (("params_m", "front"), ("latency_ms", "front_latency_ms")):
        for row in table.to_dict("records"):
            better = table[(table[price] <= row[price]) & (table["error"] < row["error"])]
            assert row[front] == better.empty
    assert all(len(dots(axes)) == len(table) for axes in drawing.figure.axes)
    assert len(sources["macro"].drawings["front"].figure.axes) == 1  # no latency recorded


# The search


def test_each_search_is_a_line_with_its_stop(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["trajectories"]
    first = drawing.figure.axes[0]
    rows = drawing.data[drawing.data["key"] == "stop_eigenvalue"]
    drawn = {tuple(line[:, 1].round(9)) for line in lines(first) if len(line) == 4}
    runs = rows.groupby("trial_id")["value"].apply(lambda run: tuple(run.round(9)))
    assert set(runs) <= drawn
    assert len(runs) == 20
    for marker, at in (("X", 3), ("D", 1)):
        marked = [line for line in first.lines if line.get_marker() == marker]
        shown = sorted(float(np.asarray(line.get_ydata())[0]) for line in marked)
        assert shown == pytest.approx(sorted(rows.loc[rows["epoch"] == at, "value"]))
    assert (rows["stop_epoch"] == 3).all()


def test_means_over_searches_say_of_how_many(sources: Sources) -> None:
    source = sources["one phase"]
    epochs = source.sample.tables.epochs
    gone = (epochs["epoch"] == 3) & epochs["trial_id"].isin(list(epochs["trial_id"].unique())[:4])
    tables = replace(source.sample.tables, epochs=epochs[~gone])
    drawing = figures.trajectories(replace(source.sample, tables=tables), source.found)
    assert isinstance(drawing, Drawing)
    rows = drawing.data[drawing.data["key"] == "alpha_entropy"].groupby("epoch")["value"]
    left = 20 - sum(1 for trial in list(epochs["trial_id"].unique())[:4] if not trial.startswith("random"))
    first, last = rows.mean()[0], rows.mean()[3]
    assert f"Mean alpha entropy {first:.3g} at epoch 0 (n = 20) and {last:.3g} at epoch 3 (n = {left})." in (
        drawing.caption
    )
    assert not any(len(axes.collections) for axes in drawing.figure.axes[:3])  # no bands


def final_edges(sample: Sample) -> pd.DataFrame:
    """Edges of the genotypes that searches ended with, read from the trials."""
    found = []
    for row in sample.trials.to_dict("records"):
        if row["arm"] != sample.tables.baseline and isinstance(row["genotype"], str):
            text = json.loads(
                sample.tables.genotypes.set_index(["stage", "trial_id"]).loc[
                    ("final", row["trial_id"]), "genotype"
                ]
            )
            for cell in ("normal", "reduce"):
                for node, inputs in enumerate(text[cell], start=2):
                    found += [(row["arm"], row["trial_id"], cell, node, source, op) for op, source in inputs]
    return pd.DataFrame(found, columns=["arm", "trial", "cell", "node", "source", "operation"])


@pytest.mark.parametrize("name", ["one phase", "two phases", "pruned", "joint"])
def test_shares_of_operations_are_of_searches(sources: Sources, name: str) -> None:
    drawing, edges = sources[name].drawings["operations"], final_edges(sources[name].sample)
    n = edges["trial"].nunique()
    assert n == {"one phase": 20, "two phases": 12, "pruned": 12, "joint": 14}[name]
    assert (drawing.data["n"] == n).all()
    counts = edges.groupby(["cell", "node", "operation"])["trial"].nunique()
    for row in drawing.data.to_dict("records"):
        assert row["share"] == pytest.approx(counts.get((row["cell"], row["node"], row["operation"]), 0) / n)
    shown = [text.get_text() for axes in drawing.figure.axes[:2] for text in axes.texts]
    assert Counter(shown) == Counter(f"{100 * share:.0f}" for share in drawing.data["share"])


@pytest.mark.parametrize("name", ["one phase", "two phases", "pruned", "joint"])
def test_cells_have_every_edge_with_the_share_of_searches_that_agree(sources: Sources, name: str) -> None:
    source = sources[name]
    edges = final_edges(source.sample)
    for arm, mine in edges.groupby("arm"):
        drawing = source.drawings[f"cells_{figures._file_name(str(arm))}"]
        n, same = mine["trial"].nunique(), ["cell", "node", "source", "operation"]
        shares = mine.groupby(same)["trial"].nunique() / n
        assert len(drawing.data) == len(mine)
        for row in drawing.data.to_dict("records"):
            assert row["agreement"] == pytest.approx(shares[tuple(row[key] for key in same)])
        panels = [axes for axes in drawing.figure.axes if axes.get_title(loc="left")]
        shown = drawing.data[drawing.data["drawn"]]
        assert len(panels) == 2 * min(n, cells.MOST) == 2 * shown["search"].nunique()
        names = Counter(text.get_text() for axes in panels for text in axes.texts)
        written = Counter(shown["operation"].map(cells.short))
        assert names == written + Counter({"in 0": len(panels), "in 1": len(panels)})
        assert sum(len(axes.lines) for axes in panels) == 2 * len(shown)  # a line and its head


@pytest.mark.parametrize("name", ["one phase", "two phases"])
def test_distances_are_of_every_pair_of_searches_arm_by_arm(sources: Sources, name: str) -> None:
    drawing, sample = sources[name].drawings["distances"], sources[name].sample
    final = agreement.finals(sample.tables).set_index("trial_id")
    assert len(final) == sample.trials["search_id"].nunique(), "a search that was retrained twice is one"
    assert list(dict.fromkeys(final["arm"])) == list(sample.tables.arms)
    (image,) = drawing.figure.axes[0].images
    shown = np.asarray(image.get_array())
    assert len(drawing.data) == len(final) * (len(final) - 1) / 2
    for row in drawing.data.itertuples():
        pair = (str(row.trial_id), str(row.other_trial_id))
        expected = agreement.edit_distance(*(final.at[trial, "genotype"] for trial in pair))
        i, j = (final.index.get_loc(trial) for trial in pair)
        assert row.edit_distance == expected == shown[i, j] == shown[j, i]


def test_lines_of_a_cell_end_at_their_node_and_never_overlap(sources: Sources) -> None:
    drawing = sources["one phase"].drawings["cells_K=1_norm=False"]
    for axes in drawing.figure.axes[:10]:
        paths = [line for line in lines(axes) if len(line) == 3]
        falls = [(path[0, 0], path[0, 1], path[1, 1]) for path in paths]
        heights = [round(path[2, 1], 6) for path in paths]
        assert len(set(heights)) == len(heights)  # a row each
        assert len({round(x, 6) for x, *_ in falls}) == len(falls)  # a lane each
        for x, top, bottom in falls:
            for patch in axes.patches:
                left, low, width, height = patch.get_bbox().bounds  # type: ignore[attr-defined]
                inside = left < x < left + width and bottom < low + height - 1e-9 and low < top - 1e-9
                assert not inside


def test_the_agreement_of_searches_counts_a_search_once() -> None:
    twice = {"normal": [[["skip_connect", 0], ["skip_connect", 0]]], "normal_concat": [2]}
    twice |= {"reduce": twice["normal"], "reduce_concat": [2]}
    other = {"normal": [[["skip_connect", 1], ["none", 0]]], "normal_concat": [2]}
    other |= {"reduce": other["normal"], "reduce_concat": [2]}
    table = cells.edges([("a", json.dumps(twice)), ("b", json.dumps(other))])
    assert len(table) == 8
    assert (table["agreement"] == 0.5).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sep_conv_3x3", "sep 3x3"),
        ("skip_connect", "skip"),
        ("max_pool_3x3_bn", "max 3x3 bn"),
        ("none", "none"),
    ],
)
def test_operations_have_short_names(name: str, expected: str) -> None:
    assert cells.short(name) == expected
