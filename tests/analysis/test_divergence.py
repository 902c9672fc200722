from pathlib import Path

import pytest

from analysis import divergence
from tests.analysis.conftest import end, epoch, start, write_rows, write_study


def run(folder: Path, valid: list[float], trial: str = "t", seconds: float = 1.0, **fields: object) -> Path:
    """A trial with these validation errors over the epochs of its search, and two epochs of retraining."""
    rows = [start(trial, **fields)]  # type: ignore[arg-type]
    for stage, values in (("search", valid), ("retrain", [0.5, 0.4])):
        for number, value in enumerate(values):
            metrics = {"valid_error": value, "train_loss": 1.0, "seconds": seconds, "peak_memory_mb": seconds}
            rows.append(epoch(trial, number, metrics, stage))
    write_rows(folder, [*rows, end(trial)])
    return folder / "trials" / f"{trial}.jsonl"


def test_the_first_differing_epoch_is_named_with_both_values(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [0.9, 0.8, 0.7])
    b = run(tmp_path / "b", [0.9, 0.81, 0.6], seconds=2.0)
    (found,) = divergence.compare(a, b).first
    assert found.where == "search, epoch 1"
    assert found.differences == (("valid_error", "0.8", "0.81"),)
    assert found.same_steps == 1
    assert "t: differs first at search, epoch 1, after 1 equal step" in divergence.render(
        divergence.compare(a, b)
    )


def test_what_a_clock_measured_is_set_aside(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", [0.9]), run(tmp_path / "b", [0.9], seconds=7.0)
    found = divergence.compare(a, b)
    assert found.same
    assert found.alike == ("t",)
    assert found.set_aside == ("peak_memory_mb", "search_seconds", "seconds")


def test_search_comes_before_retraining_and_a_missing_epoch_is_a_difference(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", [0.9, 0.8]), run(tmp_path / "b", [0.9])
    (found,) = divergence.compare(a, b).first
    assert (found.where, found.differences) == ("search, epoch 1", (("step", "recorded", "missing"),))


def test_a_differing_configuration_is_told_beside_the_first_step(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", [0.9]), run(tmp_path / "b", [0.8], seed=3)
    (found,) = divergence.compare(a, b).first
    assert ("config.seeds.search", "0", "3") in found.config
    assert found.where == "search, epoch 0"


def test_an_epoch_that_was_tried_again_counts_as_last_recorded(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [0.9, 0.8])
    b = run(tmp_path / "b", [0.7, 0.8])
    write_rows(tmp_path / "b", [epoch("t", 0, {"valid_error": 0.9, "train_loss": 1.0}, attempt="a1")])
    assert divergence.compare(a, b).same


def test_studies_are_matched_by_trial_and_then_by_name(tmp_path: Path) -> None:
    for folder, trial in (("a", "one"), ("b", "two")):
        write_study(tmp_path / folder)
        run(tmp_path / folder, [0.9], trial)
        run(tmp_path / folder, [0.9], f"only-{folder}", seed=5 if folder == "a" else 6)
    found = divergence.compare(tmp_path / "a", tmp_path / "b")
    assert (found.alike, found.only_a, found.only_b) == (("K=4 seed=0",), ("K=4 seed=5",), ("K=4 seed=6",))
    assert not found.same


def test_a_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    path = run(tmp_path / "a", [0.9])
    with pytest.raises(ValueError, match="two study folders, or the JSONL files of two trials"):
        divergence.compare(tmp_path / "a", path)
    with pytest.raises(FileNotFoundError, match=r"no study\.json"):
        divergence.compare(tmp_path / "a", tmp_path / "missing")
