import json
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from analysis import loaders
from analysis.__main__ import main
from analysis.loaders import Sample
from tests.analysis.conftest import end, epoch, genotype, start, write_rows, write_study, write_trial


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = write_study(tmp_path / "study", preset="tiny")
    for arm, errors in {
        "K=1": [0.10, 0.11, 0.12],
        "K=4": [0.20, 0.21, 0.22],
        "random": [0.3, 0.31, 0.33],
    }.items():
        for seed, error in enumerate(errors):
            write_trial(folder, arm, seed, error)
    return folder


@pytest.mark.parametrize("command", ["report", "compare", "correlate", "plan", "diff-runs"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m analysis {command}" in printed
    assert f"examples:\n  python -m analysis {command} " in printed


def test_report_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study", preset="tiny")
    write_trial(folder, "K=4", 0, 0.2)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out' / 'report.html'} and " in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").is_file()


def test_compare_takes_the_first_from_the_second(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(study), str(study), "--arms", "K=1", "K=4"]) == 0
    printed = capsys.readouterr().out
    assert "means 11.000 and 21.000 %, n = 3 and 3" in printed
    assert "difference -10.000 points [-12.267, -7.733]" in printed
    assert "the first errs less: supported" in printed


def test_compare_refuses_other_data_unless_asked(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_study(tmp_path / "other", provenance={"data_sha256": "b" * 64})
    for seed, epochs in enumerate((3, 3)):
        row = start(f"t{seed}", "K=4", seed)
        row["config"]["retrain"] = {"epochs": epochs}
        write_rows(other, [row, end(f"t{seed}", test_error=0.2 + seed / 100)])
    assert main(["compare", str(study), str(other)]) == 2
    said = capsys.readouterr().err
    assert "data (unknown and bbbbbbbbbbbb)" in said
    assert "config.retrain.epochs" in said
    assert main(["compare", str(study), str(other), "--pool"]) == 0
    assert "pooled over differing" in capsys.readouterr().out


def test_correlate_lists_the_metrics_for_a_wrong_one(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["correlate", str(study), "--metric", "nope"]) == 2
    assert "recorded are params_m, peak_memory_mb, search_seconds" in capsys.readouterr().err
    assert main(["correlate", str(study), "--metric", "search_train_loss"]) == 0
    printed = capsys.readouterr().out
    assert "n = 6 of 9 rows" in printed
    assert "tau-b within arms      1.000" in printed


def test_compare_counts_what_became_of_the_runs(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_study(tmp_path / "other", preset="tiny")
    for seed, status in enumerate(["completed"] * 3 + ["pruned"] * 3 + ["failed"]):
        write_trial(other, "K=4", 10 + seed, 0.3 + seed / 100 if status == "completed" else None, status)
    assert main(["compare", str(study), str(other), "--arms", "K=1", "K=4"]) == 0
    printed = capsys.readouterr().out
    assert "second, K=4: n_total 7, n_used 3, n_pruned 3, n_failed 1, n_pending 0" in printed
    assert "the first errs less: no verdict: 3 of its 7 runs were stopped early" in printed
    assert "hash not recorded" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a second study, or --published"),
        (["{study}", "{study}"], "sets go with --across"),
        (["{study}", "--published", "9"], "give one study, or leave it out"),
        (["{study}", "--across"], "their hashes are unknown, unknown"),
        (["--across"], "--across needs several studies"),
        (["{study}", "--across", "--margin", "1"], "--margin does not go with --across"),
        (["{study}", "--margin", "0"], "--margin 0 must be between 0 and 100"),
        (["{study}", "--margin", "nan"], "--margin nan must be between 0 and 100"),
        (["{study}", "--arms", "K=1"], "--arms names 1 arm"),
        (["{study}", "--arms", "K=1", "K=3"], "'K=3' is no arm; use one of K=1"),
        (["--published", "9", "1"], "give both or neither"),
        (["--published", "9", "1", "2.5"], "N a whole number"),
        (["--published", "9", "--margin", "1"], "--margin does not go with --published"),
        (["--published", "9", "--arms", "K=3"], "'K=3' is no arm"),
    ],
)
def test_compare_says_what_is_wrong(
    arguments: list[str], said: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study), *(each.format(study=study) for each in arguments)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "points" not in printed.out


def test_compare_holds_an_arm_against_a_published_figure(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study), "--published", "10", "1", "4", "--arms", "K=1"]) == 0
    printed = capsys.readouterr().out
    margin = stats.t.ppf(0.975, 2) * (1 + 1 / 3) ** 0.5  # 10, 11 and 12 %
    assert f"a new run of ours falls into [{11 - margin:.3f}, {11 + margin:.3f}]" in printed
    assert "the published mean lies inside" in printed
    assert f"z = {1 / (1 / 4 + 1 / 3) ** 0.5:+.3f}" in printed


def test_correlate_of_stopped_runs_begins_with_what_they_forbid(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3, 6):
        write_trial(study, "K=4", seed, None, "pruned")
    assert main(["correlate", str(study), "--metric", "search_train_loss"]) == 0
    printed = capsys.readouterr().out
    order = [
        "n_total 12, n_used 9, n_pruned 3, n_failed 0, n_pending 0",
        "3 of 12 trials were stopped early",
        "tau-b of all runs: none",
        "bounds of tau-b",
        "model-based",
        "conditional on survival",
        "tau-b within arms",
    ]
    found = [printed.index(text) for text in order]
    assert found == sorted(found)
    assert " p = " not in printed
    assert "higher metric" not in printed


def test_correlate_of_stopped_runs_with_chances_leads_with_the_corrected_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "study", arms=["K=4"], baseline=None, reference=None, preset="tiny")
    for seed in range(16):
        trial, goes_on = f"t{seed}", seed % 4 != 3
        mark = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 150.0, "rung": 2}
        rows = [start(trial, "K=4", seed), epoch(trial, 0, {"valid_error": 0.2 + seed / 50}), mark]
        mark |= {"probability": 0.5, "goes_on": goes_on, "audit": False}
        rows.append(epoch(trial, 0, {"valid_error": 0.5}, "retrain"))
        level = 0.1 + seed / 100 + seed % 3 / 20
        rows.append(end(trial, test_error=level) if goes_on else end(trial, "pruned", None))
        write_rows(folder, rows)
    assert main(["correlate", str(folder), "--metric", "search_valid_error"]) == 0
    printed = capsys.readouterr().out
    order = ["corrected for stopped runs", "tau-b, headline", "effective n", "conditional on survival"]
    found = [printed.index(text) for text in order]
    assert found == sorted(found)
    assert "effective n            12.0" in printed


def test_correlate_compares_two_metrics_by_one_bootstrap(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["correlate", str(study), "--metric", "search_train_loss", "--against"]
    assert main([*words, "search_valid_error"]) == 0
    printed = capsys.readouterr().out
    assert "within arms            0.000" in printed
    assert "pooled                 0.000" in printed
    assert main([*words, "nope"]) == 2
    assert "--against nope was not recorded; recorded are" in capsys.readouterr().err


def test_correlate_turns_a_metric_round_that_goes_the_other_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "study", preset="tiny")
    for seed, error in enumerate((0.1, 0.13, 0.11, 0.14, 0.12)):
        found = {"valid_error": error, "margin": 1e-8 * (1 - error)}
        steps = [epoch(f"t{seed}", 0, found, stage) for stage in ("search", "retrain")]
        last = end(f"t{seed}", test_error=error, genotype=genotype(seed))
        write_rows(folder, [start(f"t{seed}", "K=4", seed), *steps, last])
    words = ["correlate", str(folder), "--metric", "search_valid_error", "--against", "search_margin"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("search_margin turned round, as it goes the other way") == 2
    assert printed.count(" 0.000 no interval (n = 5)") == 2


def test_plan_counts_runs_and_divides_a_budget(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--difference", "1", "--sd", "1"]) == 0
    assert "17 runs per arm find a difference of 1" in capsys.readouterr().out
    assert main(["plan", "--budget", "20", "--sds", "1", "1", "--costs", "1", "1"]) == 0
    printed = capsys.readouterr().out
    assert "b* = 1 retrainings of each search" in printed
    assert "10 searches with 1 retraining each, cost 20" in printed
    assert main(["plan", "--correlation", "0.4"]) == 0
    assert "51 runs tell a rank correlation of 0.4 from 0" in capsys.readouterr().out
    assert main(["plan", "--difference", "1", "--pilot", str(study)]) == 0
    assert "standard deviation within arms 1.202 points, 6 degrees of freedom" in capsys.readouterr().out


def _retrained(folder: Path, epochs: dict[str, list[int]], status: str = "completed") -> Path:
    """A study whose runs, by arm, were retrained for so many epochs; the last of each arm has the status."""
    study = write_study(folder, preset="tiny", arms=list(epochs), baseline=None, reference=None)
    for arm, values in epochs.items():
        for seed, value in enumerate(values):
            row = start(f"{arm[-1]}-{seed}", arm, seed)
            row["config"]["retrain"] = {"epochs": value}
            last = status if seed == len(values) - 1 else "completed"
            error = int(arm[-1]) / 10 + seed**2 / 100 if last == "completed" else None
            found = genotype(seed % 4) if last == "completed" else None
            write_rows(study, [row, end(row["trial"], last, error, genotype=found)])
    return study


def test_plan_takes_the_spread_of_arms_that_differ_in_their_retraining(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = _retrained(tmp_path / "swept", {"K=1": [3] * 3, "K=4": [5] * 3})
    assert main(["plan", "--difference", "1", "--pilot", str(swept)]) == 0
    # 0, 1 and 4 points of each arm: a variance of 13/3.
    assert "standard deviation within arms 2.082 points, 4 degrees" in capsys.readouterr().out


def test_plan_gives_the_true_reason_why_a_pilot_has_no_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = _retrained(tmp_path / "stopped", {"K=1": [3] * 3}, status="pruned")
    assert main(["plan", "--difference", "1", "--pilot", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert "left out: 1 of its 3 runs was stopped early" in said
    assert said.endswith("(K=1); give --sd\n")
    mixed = _retrained(tmp_path / "mixed", {"K=1": [3, 4, 5], "K=4": [3, 4, 3]})
    assert main(["plan", "--difference", "1", "--pilot", str(mixed)]) == 2
    said = capsys.readouterr().err
    assert "measured under different protocols (config.retrain.epochs: 3, 4, 5) (K=1)" in said
    assert said.endswith("give --sd or --pool\n")
    assert main(["plan", "--n", "3", "--pilot", str(mixed), "--pool"]) == 0
    assert "within arms 2.082 points, 4 degrees" in capsys.readouterr().out


def test_studies_of_a_store_are_named_in_their_order(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "runs.db"
    store.touch()
    asked = []

    def load(path: Path, *, study: str | None = None) -> Sample:
        asked.append((path.name, study))
        return loaders.from_study(folder)

    folder = study
    monkeypatch.setattr(loaders, "load", load)
    assert main(["compare", str(store), str(study), str(store), "--study", "a", "--study", "b", "--across"])
    assert asked == [("runs.db", "a"), ("study", None), ("runs.db", "b")]
    assert main(["compare", str(store), str(store), "--study", "a"]) == 2
    assert "--study is given 1 time, and there are 2 MLflow stores" in capsys.readouterr().err
    asked.clear()
    assert main(["plan", "--difference", "1", "--pilot", str(store), "--study", "a"]) == 0
    assert asked == [("runs.db", "a")]


def test_plan_says_what_a_number_of_runs_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--n", "4", "--sd", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs per arm find a difference of 1.19 points" in printed  # 2.38 standard deviations
    assert "4 runs in all tell a rank correlation of 0.99" in printed
    assert main(["plan", "--n", "51"]) == 0
    assert "51 runs in all tell a rank correlation of 0.39" in capsys.readouterr().out
    assert main(["plan", "--n", "3", "--paired"]) == 0
    assert "3 runs say nothing about a correlation" in capsys.readouterr().out


def test_plan_simulates_other_tests(capsys: pytest.CaptureFixture[str]) -> None:
    # No fewer than 6 per arm, what the t test needs; 1/0.955 times as many in large samples.
    assert main(["plan", "--difference", "2", "--sd", "1", "--test", "mann-whitney"]) == 0
    assert capsys.readouterr().out.startswith(("6 runs per arm find", "7 runs per arm find"))
    # By Fieller's z, 0.437 (1.960 + 0.842)^2 / atanh(0.9)^2 + 4 = 5.6.
    assert main(["plan", "--correlation", "0.9", "--test", "tau"]) == 0
    assert capsys.readouterr().out.startswith(("5 runs tell a tau of 0.9", "6 runs tell a tau of 0.9"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --difference, --correlation and --budget"),
        (["--difference", "1"], "--difference needs one of --sd and --pilot"),
        (["--difference", "1", "--sd", "1", "--pool"], "--pool goes with --pilot"),
        (["--difference", "1", "--sd", "1", "--study", "a"], "--study goes with --pilot"),
        (["--correlation", "0.4", "--study", "a"], "--study does not go with --correlation"),
        (["--budget", "9"], "--budget needs --sds SEARCH RETRAIN and --costs"),
        (["--correlation", "2"], "must lie between 0 and 1"),
        (["--difference", "0", "--sd", "1"], "--difference 0 must be above 0"),
        (["--difference", "-1", "--sd", "1"], "--difference -1 must be above 0"),
        (["--difference", "nan", "--sd", "1"], "--difference nan must be above 0"),
        (["--difference", "1", "--sd", "1", "--test", "tau"], "--test tau is of a correlation"),
        (["--difference", "1", "--sd", "1", "--test", "mann-whitney", "--paired"], "do not come in pairs"),
        (["--difference", "0.01", "--sd", "1", "--test", "mann-whitney"], "leave the simulation out"),
        (["--correlation", "0.4", "--test", "t"], "--test t is of a difference"),
        (["--correlation", "0.4", "--sd", "1"], "--sd does not go with --correlation"),
        (["--budget", "9", "--n", "4"], "give one of"),
        (["--n", "1"], "--n 1 says nothing"),
    ],
)
def test_plan_says_what_it_lacks(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_diff_runs_ends_with_one_if_anything_differs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff-runs", str(study), str(study)]) == 0
    a, b = study / "trials" / "K4-0.jsonl", study / "trials" / "K4-1.jsonl"
    assert main(["diff-runs", str(a), str(b)]) == 1
    assert "K4-0 and K4-1: differs first at search, epoch 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{study}", "--out", "{file}/out"],
        ["report", "{file}/study", "--out", "{folder}/out"],
        ["correlate", "{folder}/missing", "--metric", "skips"],
        ["compare", "{study}", "{folder}/missing"],
        ["diff-runs", "{file}", "{folder}/missing.jsonl"],
        ["diff-runs", "{folder}/missing.jsonl", "{file}"],
        ["diff-runs", "{file}", "{file}"],
        ["plan", "--difference", "1", "--pilot", "{file}"],
    ],
)
def test_wrong_paths_end_with_one_sentence(
    arguments: list[str], study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text('{"metrics": 1}\n')
    assert main([each.format(study=study, file=file, folder=tmp_path) for each in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def _wrong_hash(folder: Path) -> Path:
    """A space of three networks, which have other bytes than those asked for."""
    entries = {
        key: {"test_acc": [90.0 + i, 90.5 + i, 91.0 + i], "params": 1e6 * (1 + i), "flops": 1e7 * (1 + i)}
        for i, key in enumerate(("00000000", "10000000", "11000000"))
    }
    path = folder / "macro.json"
    path.write_text(json.dumps(entries))
    return path


def _missing_column(folder: Path) -> Path:
    """A study whose second trial has lost the genotype it ended with."""
    study = _runs(folder, {"K=1": [0.1, 0.11], "K=4": [0.2, 0.21]})
    path = study / "trials" / "K1-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[-1]["genotype"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return study


def _mixed_protocols(folder: Path) -> Path:
    """A study whose trials were retrained for different numbers of epochs."""
    study = write_study(folder / "study", preset="tiny")
    for arm in ("K=1", "K=4"):
        for seed in range(3):
            trial = f"{arm[-1]}-{seed}"
            row = start(trial, arm, seed)
            row["config"]["retrain"] = {"epochs": 3 + seed}
            steps = [
                epoch(trial, 0, {"train_loss": 0.3 + seed / 9}, stage) for stage in ("search", "retrain")
            ]
            write_rows(study, [row, *steps, end(trial, test_error=int(arm[-1]) / 10 + seed / 100)])
    return study


def _nan_metrics(folder: Path) -> Path:
    """A study in which one trial has no validation error of its search, and one no test error."""
    study = _runs(folder, {"K=1": [0.1, 0.11, 0.12, None], "K=4": [0.2, 0.21, 0.22]})
    lost = {"valid_error": None, "train_loss": None}
    write_rows(study, [epoch("K1-0", number, lost, attempt="a1") for number in range(3)])
    return study


def _one_seed(folder: Path) -> Path:
    return _runs(folder, {"K=1": [0.1], "K=4": [0.2]})


def _all_pruned(folder: Path) -> Path:
    return _runs(folder, {"K=1": ["pruned"] * 3, "K=4": ["pruned"] * 3})


def _runs(folder: Path, outcomes: dict[str, list[float | str | None]]) -> Path:
    study = write_study(folder / "study", preset="tiny")
    for arm, results in outcomes.items():
        for seed, result in enumerate(results):
            lost = isinstance(result, str)
            write_trial(study, arm, seed, None if lost else result, result if lost else "completed")  # type: ignore[arg-type]
    return study


_HASH = "0" * 64
_REFUSED = "errors are not measured alike: config.retrain.epochs"


@pytest.mark.parametrize(
    ("flaw", "command", "code", "said"),
    [
        (_wrong_hash, "report", 2, f"not {_HASH}; it is not the file that was meant"),
        (_wrong_hash, "correlate", 2, f"not {_HASH}; it is not the file that was meant"),
        (_missing_column, "report", 2, "(end) lacks genotype"),
        (_missing_column, "compare", 2, "(end) lacks genotype"),
        (_missing_column, "correlate", 2, "(end) lacks genotype"),
        (
            _mixed_protocols,
            "report",
            0,
            "measured under different protocols (config.retrain.epochs: 3, 4, 5)",
        ),
        (_mixed_protocols, "compare", 2, _REFUSED),
        (_mixed_protocols, "correlate", 2, "measured under different protocols (config.retrain.epochs: 3, 4"),
        (_nan_metrics, "report", 0, "search_train_loss (1)"),
        (
            _nan_metrics,
            "compare",
            0,
            "n_total 4, n_used 3, n_pruned 0, n_failed 0, n_pending 0, ended without",
        ),
        (_nan_metrics, "correlate", 0, "1 row without the metric left out"),
        (_one_seed, "report", 0, "One search seed only"),
        (_one_seed, "compare", 0, "one run on each side"),
        (_one_seed, "correlate", 0, "2 independent units, fewer than 3: no association"),
        (_all_pruned, "report", 0, "All trials were stopped early: there is no final error"),
        (_all_pruned, "compare", 0, "no comparison: an arm has no finished run"),
        (_all_pruned, "correlate", 0, "All trials were stopped early: there is no final error"),
    ],
)
def test_flawed_records_are_refused_or_restricted(
    flaw: Callable[[Path], Path],
    command: str,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = flaw(tmp_path)
    hashed = ["--sha256", _HASH] if flaw is _wrong_hash else []
    arguments = {
        "report": [str(path), "--out", str(tmp_path / "out"), *hashed],
        "compare": [str(path), str(path), "--arms", "K=1", "K=4"],
        "correlate": [str(path), "--metric", "skips" if hashed else "search_train_loss", *hashed],
    }[command]
    assert main([command, *arguments]) == code
    printed = capsys.readouterr()
    if code:
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert said in printed.err
    elif command == "report":
        assert said in (tmp_path / "out" / "report.md").read_text()
    else:
        assert said in printed.out
        assert "supported" not in printed.out or flaw is _nan_metrics
