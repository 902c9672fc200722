"""An epoch that a resumed trial computes again is known for what it is."""

import json
import math
import tracemalloc
from typing import Any

import pytest

from analysis.records import is_measured
from experiments.repeats import Repeats, difference
from nas.metrics import METRICS
from nas.trial import SEARCH_SUMMARY


def epoch(
    number: int = 0, trial: str = "t", stage: str = "search", **metrics: float | None
) -> dict[str, Any]:
    told = {"valid_error": 0.25, "beta_entropy": None, "seconds": 1.0, "peak_memory_mb": 100.0} | metrics
    row = {"kind": "epoch", "trial": trial, "attempt": "a1", "time": 1.0, "stage": stage, "part": 0}
    return row | {"epoch": number, "metrics": told, "genotype": "G"}


START = {"kind": "start", "trial": "t", "attempt": "a1", "time": 0.0, "host": "here"}
MARK = {"kind": "mark", "trial": "t", "attempt": "a1", "time": 0.0, "rung": 8}
MARK |= {"probability": 0.5, "goes_on": True, "audit": None}


@pytest.mark.parametrize(
    ("row", "later", "verdict"),
    [
        (START, START | {"attempt": "a2", "host": "there"}, "repeat"),
        (epoch(), epoch() | {"attempt": "a2", "time": 9.0}, "repeat"),
        (epoch(), epoch(seconds=7.0, peak_memory_mb=3.0), "repeat"),
        (epoch(), epoch(valid_error=math.nextafter(0.25, 1)), "differs"),
        (epoch(), epoch(another=1.0), "differs"),
        (epoch(), epoch() | {"genotype": "H"}, "differs"),
        (epoch(), epoch(1), "new"),
        (epoch(), epoch(stage="retrain"), "new"),
        (epoch(), epoch(trial="u"), "new"),
        (MARK, MARK | {"attempt": "a2", "time": 9.0}, "repeat"),
        (MARK, MARK | {"goes_on": False}, "differs"),
        (MARK, MARK | {"rung": 16}, "new"),
        ({"kind": "pause", "trial": "t"}, {"kind": "pause", "trial": "t"}, "new"),
    ],
)
def test_a_row_repeats_what_is_equal_but_for_measurements(
    row: dict[str, Any], later: dict[str, Any], verdict: str
) -> None:
    repeats = Repeats()
    assert repeats.check(row) == "new"
    assert repeats.check(later) == verdict
    assert repeats.differing("t") == (verdict == "differs")


def test_rows_read_from_a_file_count_like_those_that_were_told() -> None:
    """Floats survive JSON to the bit, and a number that is not finite has become null there."""
    told, null = epoch(valid_error=0.1 + 0.2, valid_loss=math.nan), {"valid_loss": None}
    held = json.loads(json.dumps(told | {"metrics": told["metrics"] | null}))
    repeats = Repeats()
    repeats.load([START, held, {"kind": "end", "trial": "t", "metrics": {}}])
    assert repeats.check(START) == "repeat"
    assert repeats.check(told) == "repeat"


def test_an_epoch_is_compared_with_the_last_of_its_kind() -> None:
    repeats = Repeats()
    rows = [epoch(), epoch(valid_error=0.5), epoch(valid_error=0.5), epoch()]
    assert [repeats.check(row) for row in rows] == ["new", "differs", "repeat", "differs"]
    assert repeats.differing("t") == 2


def test_a_trial_that_ended_leaves_nothing_behind() -> None:
    repeats = Repeats()
    repeats.check(epoch())
    repeats.check(epoch(valid_error=0.5))
    repeats.forget("t")
    assert (repeats.check(epoch()), repeats.differing("t")) == ("new", 0)


def test_memory_does_not_grow_with_the_metrics() -> None:
    """A thousand epochs of a kilobyte each are remembered in less than a third of that."""
    repeats, names = Repeats(), [f"metric_{i}" for i in range(60)]
    tracemalloc.start()
    for number in range(1000):
        repeats.check(epoch(number, **{name: number / 7 for name in names}))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 300_000, held


def test_difference_names_the_metrics_and_not_the_measured_ones() -> None:
    rows = [START, epoch(valid_error=0.75), epoch(), epoch(1)]
    assert difference(rows, epoch(valid_error=0.5, seconds=9.0)) == "valid_error was 0.25 and is 0.5"
    assert difference(rows, epoch() | {"genotype": "H"}) == "genotype was 'G' and is 'H'"
    assert difference(rows, epoch(5)) == "nothing to compare with"


def test_measured_metrics_are_those_of_the_machine() -> None:
    named = [*METRICS, *(f"search_{name}" for name in SEARCH_SUMMARY), "search_seconds", "retrain_seconds"]
    assert {name for name in named if is_measured(name)} == {
        "seconds",
        "discretisation_gap_seconds",
        "peak_memory_mb",
        "search_peak_memory_mb",
        "search_seconds",
        "retrain_seconds",
    }
