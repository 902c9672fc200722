from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.analysis.conftest import end, start, write_rows, write_study, write_trial


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
    assert f"usage: python -m analysis {command}" in capsys.readouterr().out


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


def test_plan_counts_runs_and_divides_a_budget(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--difference", "1", "--sd", "1"]) == 0
    assert "17 runs per arm find a difference of 1" in capsys.readouterr().out
    assert main(["plan", "--budget", "20", "--sds", "1", "1", "--costs", "1", "1"]) == 0
    assert "10 searches with 1 retraining each, cost 20" in capsys.readouterr().out
    assert main(["plan", "--correlation", "0.4"]) == 0
    assert "51 runs tell a rank correlation of 0.4 from 0" in capsys.readouterr().out
    assert main(["plan", "--difference", "1", "--pilot", str(study)]) == 0
    assert "standard deviation within arms 1.202 points, 6 degrees of freedom" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --difference, --correlation and --budget"),
        (["--difference", "1"], "--difference needs one of --sd and --pilot"),
        (["--budget", "9"], "--budget needs --sds SEARCH RETRAIN and --costs"),
        (["--correlation", "2"], "must lie between 0 and 1"),
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
