import hashlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import associations, checklist, findings, loaders, page, report
from analysis.loaders import Sample
from analysis.resample import Draws, Estimate
from tests.analysis.conftest import Build, end, epoch, genotype, start, write_rows, write_study, write_trial

MACRO = Path(__file__).parents[3] / "shared" / "data" / "nas-bench-macro" / "nas-bench-macro_cifar10.json"
QUICK = Draws(resamples=199, permutations=199)

PROVENANCE = {
    "git_commit": "f" * 40,
    "git_dirty": False,
    "packages": {"torch": "2"},
    "data_name": "digits",
    "data_sha256": "a" * 64,
    "config_hash": "abc",
}


def sweep(folder: Path, runs: int = 5, effect: float = 0.05, **fields: Any) -> Path:
    """A tiny study of two arms and a random one, in which the arm and the metric both move the error.

    Within arms a higher metric goes with a higher error, between arms with a lower one.
    """
    write_study(folder, preset="tiny", provenance=PROVENANCE, **fields)
    draw = np.random.default_rng(0)
    for arm, shift in (("K=1", 0.0), ("K=4", effect), ("random", 0.2)):
        for seed in range(runs):
            trial, quality = f"{arm}-{seed}".replace("=", ""), draw.normal()
            error = 0.2 + shift + 0.01 * quality
            rows = [start(trial, arm, seed)]
            metric = 0.5 + 0.02 * quality - 10 * shift
            for number in range(0 if arm == "random" else 4):
                values = {"valid_error": 0.9 - 0.1 * number, "alpha_margin": metric * (number + 1) / 4}
                rows.append(epoch(trial, number, values | {"seconds": 30.0}, genotype=genotype(seed % 3)))
            rows += [
                epoch(trial, number, {"valid_error": error, "seconds": 60.0}, "retrain") for number in (0, 1)
            ]
            found = {
                "test_error": error,
                "valid_error": error + 0.001 * draw.normal(),
                "params_m": 1 + draw.random(),
            }
            found |= {} if arm == "random" else {"search_alpha_margin": metric}
            rows.append(end(trial, metrics=found, genotype=genotype(seed)))
            write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A report of `sweep`, and its files."""
    folder = tmp_path_factory.mktemp("report")
    return folder, report.write(sweep(folder / "study"), folder / "out")


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The whole


@pytest.mark.parametrize("runs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_the_same_study_gives_the_same_bytes(tmp_path: Path, runs: int) -> None:
    folder = sweep(tmp_path / "study", runs=runs)
    files = report.write(folder, tmp_path / "a")
    assert [path.name for path in report.write(folder, tmp_path / "b")] == [path.name for path in files]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert set(digests(tmp_path / "a")) == {path.relative_to(tmp_path / "a").as_posix() for path in files}


def test_the_page_needs_nothing_beside_it(written: tuple[Path, list[Path]]) -> None:
    text = (written[0] / "out" / "report.html").read_text()
    assert "<script" not in text
    bare = re.sub(r'src="data:image/svg\+xml;base64,[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!#)', bare)
    assert "http" not in bare
    assert str(written[0]) not in text
    assert 'name="viewport"' in text


def test_every_figure_is_well_formed_and_has_the_rows_that_drew_it(written: tuple[Path, list[Path]]) -> None:
    drawn = results(written[0] / "out")["figures"]
    assert {"flow", "error_by_arm", "metrics", "power", "anytime", "front", "operations"} <= set(drawn)
    for stem in drawn:
        ET.parse(written[0] / "out" / "figures" / f"{stem}.svg")
        assert len(pd.read_csv(written[0] / "out" / "figures" / f"{stem}.csv")) > 0


def test_claims_have_a_verdict_and_what_the_study_could_have_found(written: tuple[Path, list[Path]]) -> None:
    found = results(written[0] / "out")
    claims = {one["claim"]: one for one in found["claims"]}
    assert claims["K=4 errs less than K=1"]["verdict"] == "not supported"
    assert claims["K=1 errs less than random"]["verdict"] == "supported"
    assert "Minimum detectable difference" in claims["K=1 errs less than random"]["rests_on"]
    assert found["counts"] | {"n_total": 15, "n_used": 15, "n_pruned": 0} == found["counts"]
    assert found["seeds"]["search_seed"] == [0, 1, 2, 3, 4]
    assert found["provenance"]["data_sha256"] == "a" * 64


def test_the_agreement_of_searches_stands_beside_that_of_random(written: tuple[Path, list[Path]]) -> None:
    found = results(written[0] / "out")["agreement"]
    assert [(one["arm"], one["n"], one["baseline"]) for one in found] == [
        ("K=1", 5, False),
        ("K=4", 5, False),
        ("random", 5, True),
    ]
    # All arms end with the same five cells, whatever they had over their epochs.
    assert len({json.dumps([one[name] for name in ("jaccard", "kappa", "edits")]) for one in found}) == 1
    assert all(one["jaccard"]["low"] < one["jaccard"]["value"] < one["jaccard"]["high"] for one in found)
    assert [(one["kept_from"]["value"], one["last_epoch"]) for one in found] == [(0, 3), (0, 3), (None, None)]
    text = (written[0] / "out" / "report.md").read_text().partition("Do searches find the same cells?")[2]
    assert "| random | 5 of 5 |" in text
    assert "High agreement does not mean good cells" in text


def test_a_sweep_that_makes_its_own_association_is_warned_of(written: tuple[Path, list[Path]]) -> None:
    found = {one["name"]: one for one in results(written[0] / "out")["metrics"]}["search_alpha_margin"]
    assert found["grouped"]["within"]["value"] == pytest.approx(1)
    assert found["overall"]["tau_b"]["value"] < 0
    assert "Simpson warning" in (written[0] / "out" / "report.md").read_text()
    assert found["verdict"] == "supported"


def test_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny")
    write_trial(folder, "K=4", 0, None, "pruned")
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "results.json").write_text('{"figures": ["scatter_of_old"]}')
    for name in ("scatter_of_old.svg", "mine.svg"):
        (tmp_path / "out" / "figures" / name).write_text("<svg/>")
    report.write(folder, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert "mine.svg" in left
    assert "scatter_of_old.svg" not in left


@pytest.mark.slow
@pytest.mark.skipif(not MACRO.is_file(), reason="needs the file of NAS-Bench-Macro")
def test_the_report_of_nas_bench_macro_warns_counts_and_knows_its_ceiling(tmp_path: Path) -> None:
    report.write(MACRO, tmp_path / "out")
    found = results(tmp_path / "out")
    assert (found["counts"]["n_rows"], found["counts"]["n_unique"]) == (6561, 3969)
    metrics = {one["name"]: one for one in found["metrics"]}
    params = metrics["params_m"]
    assert params["grouped"]["simpson"].startswith("Simpson warning: tau-b is -0.2")
    assert params["grouped"]["within"]["low"] > 0 > params["grouped"]["pooled"]["high"]
    assert metrics["blocks"]["verdict"] == "no verdict: constant within arms"
    assert 0.99 < found["ceiling"]["value"] < 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Noise ceiling: no metric can correlate" in text
    tau = 2 / np.pi * np.arcsin(found["ceiling"]["value"])
    assert f"r = {found['ceiling']['value']:.3f}" in text
    assert f"which is tau-b {tau:.3f} [" in text
    assert "499 resamples" in text


# What limits a report


def sample(folder: Path) -> Sample:
    return loaders.load(folder)


def test_nothing_but_stopped_trials_gives_a_report_without_numbers(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny")
    for seed in range(3):
        write_trial(folder, "K=4", seed, None, "pruned")
    report.write(folder, tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["counts"]["n_pruned"] == 3
    assert found["metrics"] == []
    assert any("All trials were stopped early" in text for text in found["restrictions"])
    assert found["figures_not_drawn"]["error by arm"] == "no run has a final error"


def test_survivors_get_no_verdict_and_weights_are_used_where_they_were_recorded(tmp_path: Path) -> None:
    for designed in (False, True):
        folder = write_study(
            tmp_path / str(designed), preset="tiny", arms=["K=4"], reference=None, baseline=None
        )
        draw = np.random.default_rng(1)
        for seed in range(24):
            metric, trial = draw.random(), f"t{seed}"
            stopped = metric > 0.5 and seed % 3 > 0
            rows = [start(trial, seed=seed)]
            rows += [epoch(trial, 0, {"valid_loss": metric}), epoch(trial, 0, {"lr": 0.1}, "retrain")]
            if designed and metric > 0.5:
                mark = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 120.0, "rung": 1.0}
                rows.append(mark | {"probability": 1 / 3, "goes_on": not stopped, "audit": False})
            last = (
                end(trial, "pruned", None, metrics={})
                if stopped
                else end(trial, test_error=metric + 0.1 * draw.random())
            )
            write_rows(folder, [*rows, last])
        one = associations.metric_finding(sample(folder), "search_valid_loss", QUICK)
        assert one.pruned is not None
        assert bool(one.pruned.weighted) is designed
        found = {m.name: m for m in findings.find(sample(folder)).metrics}["search_valid_loss"]
        assert (found.verdict == "no verdict: survivors only") is not designed
        if designed:
            assert found.headline.value == one.pruned.weighted["tau_b"].value


def test_rows_of_several_protocols_are_not_correlated_unless_asked(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny")
    for seed in range(4):
        row = start(f"t{seed}", seed=seed)
        row["config"]["retrain"] = {"epochs": 3 + seed % 2}
        metrics = {"test_error": 0.1 * seed, "params_m": float(seed)}
        write_rows(folder, [row, end(f"t{seed}", metrics=metrics)])
    found = findings.find(sample(folder))
    assert found.metrics == ()
    assert any("config.retrain.epochs: 3, 4" in text and "--pool" in text for text in found.restrictions)
    asked = findings.find(sample(folder), pool=True)
    assert [one.name for one in asked.metrics] == ["params_m"]
    assert any("pooled, as asked" in text for text in asked.restrictions)


def test_metrics_that_are_not_finite_are_counted_and_left_out(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.2, 0.3, 0.15, 0.25]}, baseline=None)
    trials = tables.trials.assign(search_margin=[1.0, np.nan, np.inf, 2.0, 3.0])
    whole = loaders.of_tables(type(tables)(tables.study, trials, tables.epochs, tables.genotypes), {})
    one = associations.metric_finding(whole, "search_margin", QUICK)
    assert (one.overall.n_used, one.overall.n_no_metric) == (3, 2)
    assert any("search_margin (2)" in text for text in findings.find(whole).restrictions)


def test_one_seed_says_nothing_of_the_spread_between_searches(build: Build) -> None:
    tables = build({"K=1": [0.1], "K=4": [0.2]}, baseline=None, preset="tiny")
    found = findings.find(loaders.of_tables(tables, {}))
    assert any("One search seed only" in text for text in found.restrictions)
    assert found.spread is None
    assert found.versus[0].claim.verdict == "undecided at n=1"
    assert found.components.icc.value is None


def test_a_metric_that_only_tells_arms_apart_gets_no_verdict(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.11, 0.12], "K=4": [0.2, 0.21, 0.22]}, baseline=None, preset="tiny")
    trials = tables.trials.assign(search_cost=[1.0] * 3 + [2.0] * 3)
    whole = loaders.of_tables(type(tables)(tables.study, trials, tables.epochs, tables.genotypes), {})
    found = {one.name: one for one in findings.find(whole).metrics}["search_cost"]
    assert found.verdict == "no verdict: constant within arms"
    assert found.p_adjusted is None


def test_the_rule_of_verdicts_is_the_one_on_the_page(
    tmp_path: Path, written: tuple[Path, list[Path]]
) -> None:
    one = associations.metric_finding(sample(sweep(tmp_path / "study")), "search_alpha_margin", QUICK)

    def verdict(low: float | None, high: float | None, p: float | None) -> str:
        headline = Estimate(0.05, low, high, 99, 99, "tau-b", restriction=None if low is not None else "few")
        return associations._judged(replace(one, headline=headline), p, "Holm").verdict

    assert verdict(0.01, 0.09, 0.001) == "not supported"  # however small p is
    assert verdict(0.01, 0.09, 0.6) == "not supported"
    assert verdict(0.01, 0.11, 0.001) == "supported"
    assert verdict(None, None, 0.001) == "supported"
    assert verdict(-0.2, 0.2, 0.6) == "undecided at n=99"
    text = (written[0] / "out" / "report.md").read_text()
    assert "not supported where its interval lies within -0.1 and +0.1, whatever its p-value says" in text


def test_a_claim_holds_what_became_of_the_runs_behind_it(written: tuple[Path, list[Path]]) -> None:
    found = {one["claim"]: one for one in results(written[0] / "out")["claims"]}
    whole = {"n_total": 10, "n_used": 10, "n_pruned": 0, "n_failed": 0, "n_pending": 0}
    assert found["K=4 errs less than K=1"]["flow"] == whole
    assert found["K=4 errs less than K=1"]["kind"] == "arm"


def test_declared_metrics_form_a_family_of_their_own(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "study", primary_metrics=["search_alpha_margin"])
    found = {one.name: one for one in findings.find(sample(folder)).metrics}
    assert found["search_alpha_margin"].adjustment == "Holm over 1"
    assert found["params_m"].adjustment.startswith("Benjamini-Hochberg")
    assert next(iter(associations.ranked(list(found.values())))).name == "search_alpha_margin"


def test_runs_that_found_one_network_are_one_unit(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, baseline=None, preset="tiny")
    found = findings.find(loaders.of_tables(tables, {}))
    assert (found.counts.n_used, found.counts.n_unique) == (6, 3)
    assert any("3 runs found a network" in text for text in found.restrictions)


def test_many_rows_are_drawn_less_often_and_that_is_said(build: Build) -> None:
    tables = build({"K=1": [0.1]}, baseline=None)
    many = pd.concat([tables.trials] * 1001, ignore_index=True)
    many = many.assign(search_id=[str(number) for number in range(1001)])
    whole = loaders.of_tables(type(tables)(tables.study, many, tables.epochs, tables.genotypes), {})
    draws, note = associations.draws_for(whole)
    assert (draws.resamples, draws.permutations) == (499, 499)
    assert "499 resamples" in note


def test_values_are_plain_and_rounded() -> None:
    found = findings.plain({("a", "b"): [np.float64(1 / 3), np.nan, np.int64(2), True, None, -0.0]})
    assert found == {"a x b": [0.333333, None, 2, True, None, 0.0]}
    assert json.dumps(found) == '{"a x b": [0.333333, null, 2, true, null, 0.0]}'


# Parts


def test_the_checklist_answers_from_records_only(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "study", runs=2, checklist={"1": "see the repository"})
    whole = sample(folder)
    items = {item.number: item for item in checklist.checklist(whole, findings.find(whole))}
    assert len(items) == 16
    assert items[11].answer == "yes"
    assert "2 random architectures" in items[11].evidence
    assert items[1].answer == "unknown"  # that code is public no record can tell
    assert items[1].said == "see the repository"
    assert items[15].answer == "unknown"  # what tuning cost no record tells
    assert "hours of search and retraining over all trials" in items[15].evidence
    assert items[13].answer == "no"
    assert (items[8].answer, items[8].evidence) == ("yes", "2 arms along K")
    trainings = pd.concat([whole.finals, whole.finals.assign(retrain_seed=7)])
    assert replace(whole, finals=trainings).seeds["retrain_seed"] == [0, 1, 7], "of every training"


def test_the_front_is_that_of_the_validation_error(tmp_path: Path) -> None:
    whole = sample(sweep(tmp_path / "study", runs=3))
    table = findings.pareto(whole)
    assert set(table["measure"]) == {"valid error"}
    front = table[table["front"]]
    for row in front.itertuples():
        smaller = table[table["params_m"] <= row.params_m]
        assert smaller["error"].min() == row.error


def test_the_hypervolume_is_the_area_above_the_front() -> None:
    frame = pd.DataFrame(
        {"trial_id": list("abc"), "arm": "x", "params_m": [1.0, 2.0, 3.0], "status": "completed"}
    )
    frame["test_error"], frame["valid_error"] = [0.3, 0.2, 0.1], np.nan
    study = {"preset": None, "arms": ["x"], "baseline": None, "reference": None}
    tables = loaders.Tables(study, frame, pd.DataFrame(), pd.DataFrame())
    whole = Sample(tables, "study", "", pd.DataFrame(), pd.DataFrame(), {}, 3)
    found = findings.hypervolume(whole, QUICK)
    assert found is not None
    assert found.value == pytest.approx(0.25)  # steps at 0.5 of both ranges: 0.5 x 0.5


def test_markup_in_names_is_escaped_and_tables_keep_their_columns(tmp_path: Path) -> None:
    blocks = [page.Table(["a|b", "c"], [["<i>", "1.50"]]), page.Cards([("x < y", "not supported", "n = 3")])]
    text = page.to_html("<b>", "s", blocks)
    assert "&lt;i&gt;" in text
    assert '<td class="n">1.50</td>' in text
    assert '<span class="not">not supported</span>' in text
    assert "| a\\|b | c |" in page.to_markdown("t", "s", blocks, tmp_path)


def test_captions_state_n(written: tuple[Path, list[Path]]) -> None:
    lines = (written[0] / "out" / "report.md").read_text().splitlines()
    captions = [line for line in lines if re.search(r" Data: \[.*\.csv\]", line)]
    assert len(captions) > 12
    for caption in captions:
        assert re.search(r"\bn = [\d,]+", caption)


def test_weights_are_taken_within_arms(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", preset="tiny", baseline=None)
    draw = np.random.default_rng(2)
    expected = np.zeros(2)
    for arm, shift in (("K=1", 0.0), ("K=4", 0.3)):
        finals = []
        for seed in range(14):
            metric, trial = draw.random(), f"{arm}-{seed}".replace("=", "")
            marked = metric > 0.4
            stopped, error = marked and seed % 2 == 0, metric - shift + 0.5 * draw.random()
            rows = [start(trial, arm, seed), epoch(trial, 0, {"valid_loss": metric + shift})]
            rows.append(epoch(trial, 0, {"lr": 0.1}, "retrain"))
            if marked:
                mark = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 120.0, "rung": 1.0}
                rows.append(mark | {"probability": 0.5, "goes_on": not stopped, "audit": False})
            last = end(trial, "pruned", None, metrics={}) if stopped else end(trial, test_error=error)
            write_rows(folder, [*rows, last | {"genotype": None}])
            if not stopped:
                finals.append((metric, error, 2.0 if marked else 1.0))
        pairs = [(a, b) for i, a in enumerate(finals) for b in finals[:i]]
        for a, b in pairs:
            weight = a[2] * b[2]
            expected += weight * np.sign((a[0] - b[0]) * (a[1] - b[1])), weight
    found = associations.metric_finding(sample(folder), "search_valid_loss", QUICK)
    assert found.headline.value == pytest.approx(expected[0] / expected[1])
    assert not found.pooled
    assert found.pruned is not None
    assert found.headline.value != pytest.approx(found.pruned.weighted["tau_b"].value)
