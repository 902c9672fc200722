"""The benchmark of orchestration: what it calls the platform's part, and what it measures it on."""

import math
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest

from benchmarks.orchestration import Spent, Times, growth, job, main, plain, resident_mb, spent


def test_a_trial_is_split_into_what_lies_between_its_epochs_and_all_else() -> None:
    first = Times(epochs=(1.0, 1.5), end=2.0)
    # Half a second until the next trial's first epoch is done, two between its epochs, a quarter to its end.
    second = Times(epochs=(2.5, 3.5, 4.5), end=4.75)
    assert spent([first, second]) == Spent(per_epoch=1.0, per_trial=0.75)


def test_memory_is_followed_once_libraries_are_loaded() -> None:
    # 100 MB in the first 200 trials, then 2 MB per 100.
    assert growth([900, 1000, 1002, 1004, 1006, 1008, 1010, 1012]) == pytest.approx(20)
    assert math.isnan(growth([900]))


def test_the_smallest_trials_search_nothing_and_differ(tmp_path: Path) -> None:
    study = job(tmp_path / "study", trials=3, epochs=2)
    assert len({planned.trial.id for planned in study.planned}) == 3
    assert all(planned.trial.search == () for planned in study.planned)
    found = plain(study)
    assert found.per_epoch > 0
    assert found.per_trial > 0
    assert not (tmp_path / "study").exists()


def test_memory_is_that_of_a_process() -> None:
    before = resident_mb()
    with mmap(-1, 64 * 2**20) as held:  # pages of its own: an allocator may have freed ones at hand
        for page in range(0, len(held), PAGESIZE):
            held[page] = 1
        assert resident_mb() - before > 0.9 * len(held) / 2**20


@pytest.mark.slow
def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rounds", "1", "--each", "3", "--epochs", "3", "--trials", "6"])
    said = capsys.readouterr().out
    assert "| per trial |" in said
    assert said.count("| with MLflow ") == 2


@pytest.mark.parametrize("wrong", [["--each", "1"], ["--epochs", "1"], ["--trials", "1"], ["--rounds", "-1"]])
def test_too_little_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert "must be at least 2" in capsys.readouterr().err
