"""The benchmark of packing on two steps: that it measures what it says, not what comes out."""

import pytest

from benchmarks import packing
from benchmarks.measure import Timing


def test_workers_side_by_side_do_so_many_times_more() -> None:
    assert packing.side_by_side(Timing((2.0, 4.0)), 2) == Timing((1.0, 2.0))


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_a_study_unasked_runs_a_trial_of_one_thread_on_every_core(cores: int) -> None:
    said = packing.default_packing(packing.digits_trial(), cores)
    assert said.startswith(f"a study unasked: {cores} trials at once, 1 thread each")


def test_it_runs_both_forms_and_says_what_came_out(capsys: pytest.CaptureFixture[str]) -> None:
    packing.main("--workers 1 --rounds 1 --steps 1 --batch 8 --limit 100".split())
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "s/s" in line]
    assert [row[0].strip("| ") for row in rows] == ["search", "retrain"]
    assert all(float(row[1].split()[0]) > 0 for row in rows)


def test_a_worker_that_dies_ends_the_measurement() -> None:
    with pytest.raises(EOFError):
        packing.Workers(1, 1, {"no.such.field": 1})


@pytest.mark.parametrize("wrong", ["--workers 0", "--steps 0", "--rounds 0"])
def test_nothing_to_measure_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        packing.main(wrong.split())
    assert "must be at least 1" in capsys.readouterr().err
