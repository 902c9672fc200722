"""Trials are stopped by those they may be compared with, and who goes on by chance is on record."""

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from experiments.stopping import Asha, Judge, Ladder, Median, Rungs, Stopping

Row = dict[str, Any]
SPACE = {"name": "cell", "nodes": 4}


def start(trial: str, stages: Sequence[tuple[int, int]] = ((4, 8),), space: Row = SPACE) -> Row:
    """The start of a trial whose search has stages of (epochs, cells)."""
    search = [{"epochs": epochs, "cells": cells, "channels": 16} for epochs, cells in stages]
    row = {"kind": "start", "trial": trial, "attempt": "a", "time": 0.0}
    return row | {"config": {"space": space, "search": search}}


def epoch(trial: str, number: int, error: float | None, stage: str = "retrain", **fields: Any) -> Row:
    """The row of an epoch, counted from 0, a second after the one before."""
    metrics = {"valid_error": error, "seconds": fields.pop("seconds", 1.0)}
    row = {"kind": "epoch", "trial": trial, "attempt": "a", "time": number + 1.0, "stage": stage, "part": 0}
    return row | {"epoch": number, "metrics": metrics, "genotype": None} | fields


def judged(judge: Judge, rows: Sequence[Row]) -> list[Row]:
    """The marks that rows lead to, where a stopped trial reports no more."""
    marks = []
    for row in rows:
        if not judge.stopped(row["trial"]):
            marks += judge.judge(row)
    return marks


def told(marks: Sequence[Row]) -> list[tuple[str, float, bool]]:
    return [(mark["trial"], mark["rung"], mark["goes_on"]) for mark in marks]


def course(errors: Sequence[float], epochs: int) -> list[Row]:
    """Epoch by epoch the rows of trials that run side by side, each at its own error."""
    return [epoch(f"{name}", n, error) for n in range(epochs) for name, error in enumerate(errors)]


# Rules


class Tuned:
    """A trial as a scheduler of Ray sees it."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, "RUNNING"


RAY = SimpleNamespace(get_live_trials=lambda: [])


@st.composite
def reports(draw: st.DrawFn, whole: bool = True) -> list[tuple[str, float, float]]:
    """Trial, time and error in the order of arrival; times of a trial grow; errors are often equal."""
    steps = st.just(1.0) if whole else st.floats(0.1, 9.0)
    ages: dict[str, float] = {}
    found = []
    for _ in range(draw(st.integers(0, 60))):
        name = draw(st.sampled_from("abcdefg"))
        ages[name] = ages.get(name, 0.0) + draw(steps)
        found.append((name, ages[name], draw(st.integers(0, 20)) / 10))
    return found


@settings(max_examples=50, deadline=None)
@given(reports(), st.integers(1, 3), st.integers(4, 20), st.sampled_from([2, 3, 4]))
def test_asha_decides_as_rays_does(
    sequence: list[tuple[str, float, float]], first: int, last: int, reduction: int
) -> None:
    theirs: Any = ASHAScheduler("t", "e", "min", last, first, reduction, stop_last_trials=False)
    agrees_with_ray(theirs, Asha(first, last, reduction), sequence)


@settings(max_examples=50, deadline=None)
@given(reports(whole=False), st.floats(0.5, 5.0), st.sampled_from([2, 3, 4]))
def test_asha_decides_as_rays_does_where_times_jump_over_rungs(
    sequence: list[tuple[str, float, float]], first: float, reduction: int
) -> None:
    theirs: Any = ASHAScheduler("t", "e", "min", 1e6, first, reduction, stop_last_trials=False)  # type: ignore[arg-type]
    agrees_with_ray(theirs, Asha(first, 1e6, reduction), sequence)


@settings(max_examples=50, deadline=None)
@given(reports(whole=False), st.floats(0.5, 9.0), st.integers(1, 4))
def test_median_stopping_decides_as_rays_does(
    sequence: list[tuple[str, float, float]], first: float, least: int
) -> None:
    theirs: Any = MedianStoppingRule("t", "e", "min", first, least)
    agrees_with_ray(theirs, Median(first, least), sequence)


def agrees_with_ray(theirs: Any, ours: Any, sequence: list[tuple[str, float, float]]) -> None:
    trials = {name: Tuned(name) for name, _, _ in sequence}
    for trial in trials.values():
        theirs.on_trial_add(RAY, trial)
    stopped = set()
    for name, time, error in sequence:
        if name not in stopped:
            decision = theirs.on_trial_result(RAY, trials[name], {"t": time, "e": error})
            assert ours.stops(name, time, error) == (decision == "STOP")
            stopped |= {name} if decision == "STOP" else set()


def test_asha_lets_the_best_half_of_a_rung_go_on() -> None:
    rule = Asha(first=2)
    assert [rule.stops(name, 1, 0.9) for name in "abcd"] == [False] * 4  # before the rung
    errors = {"a": 0.5, "b": 0.4, "c": 0.45, "d": 0.43}
    assert [rule.stops(name, 2, error) for name, error in errors.items()] == [False, False, False, False]
    assert rule.stops("e", 2, 0.46)
    assert not rule.stops("e", 3, 0.99)  # asked once at a rung


def test_a_result_that_jumps_over_rungs_counts_at_the_highest_alone() -> None:
    rule = Asha(first=1)
    rule.stops("fast", 1, 0.5)
    assert not rule.stops("slow", 9, 0.9)  # nobody else has been there
    assert not rule.stops("slow", 10, 0.9)
    assert set(rule.results) == {1.0, 8.0}


def test_median_stopping_by_the_numbers() -> None:
    rule = Median(first=2, least=2)
    for name, errors in {"a": (0.9, 0.5, 0.3), "b": (0.9, 0.6, 0.2)}.items():
        assert not any(rule.stops(name, time, error) for time, error in enumerate(errors, 1))
    # Running means from time 2 on are 0.5 and 0.6 at time 2, both 0.4 at time 3; medians 0.55 and 0.4.
    assert not rule.stops("c", 2, 0.55)
    assert rule.stops("c", 3, 0.41)
    assert not rule.stops("d", 2, 0.3)
    assert not rule.stops("d", 3, 0.9)  # its best stays 0.3


def test_rungs_grow_by_a_factor_up_to_the_last() -> None:
    ladder = Ladder(1.5, last=6)
    assert [ladder.reached(time) for time in (1, 1.5, 2.9, 3, 5.9, 6, 100)] == [None, 1.5, 1.5, 3, 3, 6, 6]


# Like with like

RETRAINING: tuple[Rungs, ...] = ("retrain_epoch", "compute_seconds")


def test_a_search_result_is_never_compared_with_a_retraining_result() -> None:
    """The trap is in test_schedulers.py: a scheduler that counts iterations falls into it."""
    searching = [epoch("k", n, 0.9, stage="search") for n in range(8)]
    retraining = course([0.1, 0.2], 8)
    for rungs in RETRAINING:
        judge = Judge(Stopping("asha", rungs, first=1), epochs=8, seed=0)
        # Of the two that retrain the worse is stopped, whether or not a third one searches.
        expected = told(judged(Judge(judge.stopping, 8, 0), retraining))
        assert told(judged(judge, [*retraining, start("k"), *searching])) == expected
        assert {trial for trial, _, _ in expected} == {"1"}


def test_search_rungs_leave_retraining_alone() -> None:
    judge = Judge(Stopping("asha", "search_epoch", first=1), epochs=8, seed=0)
    assert judged(judge, [start("0"), start("1"), *course([0.1, 0.9], 8)]) == []


@pytest.mark.parametrize(
    ("other", "compared"),
    [
        (start("b"), True),
        (start("b", space={"name": "cell", "nodes": 2}), False),
        (start("b", stages=[(4, 5)]), False),  # a supernet of other depth
        (start("b", stages=[(9, 8)]), False),  # another point of the schedule
    ],
)
def test_search_rungs_compare_one_space_and_stage(other: Row, compared: bool) -> None:
    judge = Judge(Stopping("asha", "search_epoch", first=1), epochs=8, seed=0)
    rows = [start("a"), epoch("a", 0, 0.1, "search"), other, epoch("b", 0, 0.9, "search")]
    assert told(judged(judge, rows)) == [("b", 1.0, False)] * compared


def test_stages_of_p_darts_never_meet() -> None:
    """The second stage, deeper and with fewer operations, errs less; its epochs are counted anew."""
    judge = Judge(Stopping("asha", "search_epoch", first=1), epochs=8, seed=0)
    stages = [(3, 5), (3, 5)]
    rows = [start("a", stages), start("b", stages)]
    for number in range(3, 6):
        rows.append(epoch("a", number, 0.1, "search", part=1))
    rows += [epoch("b", number, 0.5, "search") for number in range(3)]
    assert judged(judge, rows) == []
    (mark,) = judge.judge(epoch("b", 3, 0.2, "search", part=1))
    assert mark["rung"] == 4.0  # the first epoch of the second stage, counted over both


def test_compute_seconds_compare_what_cost_the_same() -> None:
    """K=1 takes 4 s an epoch, K=4 takes 1 s: K=1 is better after equal seconds, worse after equal epochs."""
    arms = {"K=4": (1.0, [0.5] * 16), "K=1": (4.0, [0.6, 0.45, 0.3, 0.15])}

    def stopped(stopping: Stopping) -> set[str]:
        judge = Judge(stopping, epochs=16, seed=0)
        for name, (seconds, errors) in arms.items():
            judged(judge, [epoch(name, n, error, seconds=seconds) for n, error in enumerate(errors)])
        return {name for name in arms if judge.stopped(name)}

    assert stopped(Stopping("asha", "retrain_epoch", first=1)) == {"K=1"}
    assert stopped(Stopping("asha", "compute_seconds", first=8.0)) == set()


def test_compute_seconds_are_those_of_search_and_retraining_each_epoch_once() -> None:
    judge = Judge(Stopping("asha", "compute_seconds", first=10.0), epochs=8, seed=0)
    judge.judge(start("a"))
    for number in (0, 1, 0, 1):  # the second attempt repeats what the first one did
        assert judge.judge(epoch("a", number, 0.9, "search", seconds=4.0)) == []
    judge.judge(epoch("a", 0, 0.5, seconds=1.0))  # 9 s
    assert not judge.rules[("retrain",)].results  # type: ignore[attr-defined]
    judge.judge(epoch("a", 1, 0.5, seconds=1.0))
    assert judge.rules[("retrain",)].results == {10.0: {"a": 0.5}}  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [None, math.nan, math.inf])
def test_an_epoch_without_an_error_is_not_compared(error: float | None) -> None:
    judge = Judge(Stopping("asha", first=1), epochs=8, seed=0)
    assert judged(judge, [epoch("a", 0, error), epoch("b", 0, 0.9), epoch("c", 0, 0.8)]) == []


# Those that go on


def test_a_spared_trial_is_asked_again_at_the_next_rung() -> None:
    seeds = [seed for seed in range(40) if len(marks_of_the_worse("asha", seed)) > 1]
    assert seeds  # somebody was spared at the first rung
    for seed in seeds:
        rungs = [mark["rung"] for mark in marks_of_the_worse("asha", seed)]
        assert rungs == [1.0, 2.0, 4.0, 8.0, 16.0][: len(rungs)]
        assert [mark["goes_on"] for mark in marks_of_the_worse("asha", seed)][:-1] == [True] * (
            len(rungs) - 1
        )


def marks_of_the_worse(scheduler: Any, seed: int) -> list[Row]:
    judge = Judge(Stopping(scheduler, first=1, random_completion=0.5), epochs=17, seed=seed)
    return judged(judge, course([0.1, 0.1, 0.1, 0.9], 16))


def test_median_stopping_asks_a_spared_trial_once_a_rung_not_once_an_epoch() -> None:
    longest = max((marks_of_the_worse("median", seed) for seed in range(40)), key=len)
    assert [mark["rung"] for mark in longest] == [1.0, 2.0, 4.0, 8.0, 16.0][: len(longest)]
    assert len(longest) > 2


def test_the_share_that_goes_on_is_the_probability_on_record() -> None:
    judge = Judge(Stopping("asha", first=1, random_completion=0.15), epochs=8, seed=3)
    judge.judge(epoch("best", 0, 0.0))
    marks = judged(judge, [epoch(f"t{n}", 0, 0.5 + n) for n in range(2000)])
    assert {mark["probability"] for mark in marks} == {0.15}
    assert not any(mark["audit"] for mark in marks)
    spread = math.sqrt(len(marks) * 0.15 * 0.85)
    assert abs(sum(mark["goes_on"] for mark in marks) - 0.15 * len(marks)) < 4 * spread


def test_chance_is_a_function_of_trial_rung_and_seed_alone() -> None:
    names = [f"t{n}" for n in range(200)]

    def spared(seed: int, order: Sequence[str]) -> set[str]:
        judge = Judge(Stopping("asha", first=1, random_completion=0.5), epochs=8, seed=seed)
        judge.judge(epoch("best", 0, 0.0))
        # All have one error, so the rule would stop each, whoever came before.
        marks = judged(judge, [epoch(name, 0, 0.5 + place) for place, name in enumerate(order)])
        assert len(marks) == len(order)
        return {mark["trial"] for mark in marks if mark["goes_on"]}

    assert spared(0, names) == spared(0, names[::-1])
    assert spared(0, names) != spared(1, names)


def test_draws_at_two_rungs_are_independent() -> None:
    pairs = []
    for seed in range(400):
        marks = marks_of_the_worse("asha", seed)
        if len(marks) > 1:
            pairs.append(marks[1]["goes_on"])
    assert abs(np.mean(pairs) - 0.5) < 4 * math.sqrt(0.25 / len(pairs))


def test_the_audit_subset_is_uniform_known_from_the_start_and_never_stopped() -> None:
    judge = Judge(Stopping("asha", first=2, audit=0.3), epochs=8, seed=0)
    errors = [random.Random(n).random() for n in range(300)]
    marks = judged(judge, course(errors, 7))
    audited = {mark["trial"] for mark in marks if mark["audit"]}
    assert audited == {mark["trial"] for mark in marks if mark["rung"] == 0}  # the good ones as well
    assert not any(judge.stopped(trial) for trial in audited)
    assert {(m["probability"], m["goes_on"]) for m in marks if m["audit"]} == {(1.0, True)}
    assert {m["trial"] for m in marks if m["audit"] and m["rung"] > 0} < audited
    assert abs(len(audited) - 90) < 4 * math.sqrt(300 * 0.3 * 0.7)
    place = np.argsort(np.argsort(errors))
    low = sum(place[int(trial)] < 150 for trial in audited)
    assert abs(low - len(audited) / 2) < 4 * math.sqrt(len(audited) / 4)


# Resumes

STAGES = [(2, 5), (3, 8)]


@st.composite
def studies(draw: st.DrawFn) -> tuple[Stopping, list[Row]]:
    """A stopping and the rows that its trials would report, interleaved, each at its own time."""
    rungs = draw(st.sampled_from(get_args(Rungs)))
    scheduler: Any = draw(st.sampled_from(["asha", "median"]))
    design = {
        "random_completion": draw(st.sampled_from([0.0, 0.5])),
        "audit": draw(st.sampled_from([0.0, 0.3])),
    }
    stopping = Stopping(scheduler, rungs, first=draw(st.sampled_from([1.0, 2.0])), **design)
    counts = draw(st.lists(st.integers(1, 14), min_size=2, max_size=7))
    order = draw(st.permutations([name for name, count in enumerate(counts) for _ in range(count)]))
    done = [0] * len(counts)
    rows = [start(f"{name}", STAGES) for name in range(len(counts))]
    for moment, name in enumerate(order):
        number = done[name]
        done[name] += 1
        stage, within = ("search", number) if number < 5 else ("retrain", number - 5)
        error = draw(st.integers(0, 9)) / 10
        row = epoch(f"{name}", within, error, stage, part=int(2 <= number < 5), time=float(moment + 1))
        rows.append(row)
    return stopping, rows


@settings(max_examples=100, deadline=None)
@given(studies(), st.data())
def test_a_study_cut_anywhere_goes_on_as_if_it_had_not_been(
    study: tuple[Stopping, list[Row]], data: st.DataObject
) -> None:
    stopping, rows = study
    whole = Judge(stopping, epochs=9, seed=5)
    recorded: list[Row] = []
    for row in rows:
        if not whole.stopped(row["trial"]):
            recorded += [row, *whole.judge(row)]
    before_marks = [number for number, row in enumerate(recorded) if row["kind"] == "mark"]
    anywhere = st.integers(0, len(recorded))
    cut = data.draw(anywhere | st.sampled_from(before_marks) if before_marks else anywhere)
    past = recorded[:cut]
    resumed = Judge(stopping, epochs=9, seed=5)
    resumed.replay(sorted(past, key=lambda row: row["trial"]))  # as files hold them
    back = data.draw(st.integers(0, 3))  # how many epochs behind the last checkpoints were
    live = [
        row for trial in dict.fromkeys(row["trial"] for row in past) for row in repeats(past, trial, back)
    ]
    live += [row for row in rows if row not in past]
    marks = [*(row for row in past if row["kind"] == "mark"), *judged(resumed, live)]
    # The mark that the cut prevented is made up if its trial has anything more to say.
    silent = [
        row
        for row in recorded[cut : cut + 1]
        if row["trial"] not in {row["trial"] for row in live if row["kind"] == "epoch"}
    ]
    expected = [row for row in recorded if row["kind"] == "mark" and row not in silent]
    assert sorted(map(essence, marks)) == sorted(map(essence, expected))
    assert len({(mark["trial"], mark["attempt"], mark["time"]) for mark in marks}) == len(marks)
    assert all(resumed.stopped(mark["trial"]) for mark in expected if not mark["goes_on"])


def repeats(past: Sequence[Row], trial: str, count: int) -> list[Row]:
    """What a trial reports that starts again from a checkpoint `count` epochs ago."""
    epochs = [row for row in past if row["trial"] == trial and row["kind"] == "epoch"]
    return [row | {"attempt": "b"} for row in (start(trial, STAGES), *epochs[len(epochs) - count :])]


def essence(mark: Row) -> tuple[Any, ...]:
    return tuple(mark[name] for name in ("trial", "rung", "probability", "goes_on", "audit"))


def test_a_trial_stopped_before_the_driver_died_stays_stopped() -> None:
    rows = [epoch("a", 0, 0.1), epoch("b", 0, 0.9)]
    judge = Judge(Stopping("asha", first=1), epochs=8, seed=0)
    marks = judged(judge, rows)
    resumed = Judge(judge.stopping, epochs=8, seed=0)
    resumed.replay([*rows, *marks])
    assert resumed.stopped("b")
    assert resumed.judge(epoch("b", 0, 0.9, attempt="b")) == []
    assert resumed.stopped("b")


def test_epochs_of_a_retry_count_once_whatever_its_clock_says() -> None:
    """The second attempt ran on a machine whose clock is hours behind; its first epochs are repeats."""
    judge = Judge(Stopping("asha", "compute_seconds", first=2.0), epochs=8, seed=0)
    first = [epoch("a", n, 0.5, time=1000.0 + n) for n in range(3)]
    second = [epoch("a", n, 0.5, time=1.0 + n, attempt="b") for n in (1, 2, 3)]
    judge.replay([*first, *second])
    assert judge.trials["a"].seconds == 4.0
    assert judge.rules[("retrain",)].results == {2.0: {"a": 0.5}, 4.0: {"a": 0.5}}  # type: ignore[attr-defined]


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduler": "bohb"}, "scheduler='bohb' is not one of fifo, asha"),
        ({"scheduler": "asha", "rungs": "batches"}, "rungs='batches' is not one of retrain_epoch"),
        (
            {"scheduler": "hyperband", "rungs": "search_epoch"},
            "hyperband works with retrain_epoch or compute",
        ),
        (
            {"scheduler": "pbt", "rungs": "search_epoch"},
            "pbt works with retrain_epoch or compute_seconds only",
        ),
        ({"rungs": "search_epoch"}, "fifo works with retrain_epoch only"),
        ({"first": 2}, "first=2: fifo has no use for it"),
        (
            {"scheduler": "hyperband", "first": 2},
            "first=2: hyperband has no use for it; leave it out, or use asha",
        ),
        ({"scheduler": "median", "last": 9}, "last=9: median has no use for it"),
        ({"scheduler": "asha", "first": 0.5}, "first=0.5 must be at least 1 epoch"),
        ({"scheduler": "asha", "last": math.inf}, "last=inf must be at least 1 epoch"),
        ({"scheduler": "asha", "first": math.nan}, "first=nan must be at least 1 epoch"),
        (
            {"scheduler": "asha", "rungs": "compute_seconds", "first": 0},
            "first=0 must be a number of seconds",
        ),
        ({"scheduler": "asha", "first": 9, "last": 4}, "first=9 lies after last=4"),
        ({"scheduler": "asha", "rungs": "compute_seconds"}, "asha needs first; give it in seconds"),
        ({"scheduler": "pbt", "rungs": "compute_seconds"}, "pbt needs first; give it in seconds"),
        ({"scheduler": "hyperband", "rungs": "compute_seconds"}, "hyperband needs last; give it in seconds"),
        ({"scheduler": "asha", "random_completion": 1}, r"random_completion=1 must be in \[0, 1\)"),
        ({"scheduler": "asha", "random_completion": -0.1}, r"random_completion=-0.1 must be in \[0, 1\)"),
        ({"scheduler": "median", "audit": math.nan}, r"audit=nan must be in \[0, 1\)"),
        ({"random_completion": 0.1}, "fifo stops no trial; use asha or median"),
        ({"scheduler": "hyperband", "audit": 0.1}, "hyperband stops trials while they are paused"),
        ({"scheduler": "pbt", "random_completion": 0.1}, "pbt copies trials"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(fields: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stopping(**fields)


def test_a_first_rung_that_nobody_reaches_in_time_is_refused() -> None:
    Stopping("asha", first=7).check(epochs=8)
    Stopping("asha", "compute_seconds", first=1000).check(epochs=8)
    with pytest.raises(ValueError, match="first=8 is not before the last of 8 epochs"):
        Stopping("asha", first=8).check(epochs=8)


@pytest.mark.parametrize("name", ["fifo", "hyperband", "pbt"])
def test_a_judge_is_of_a_rule(name: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is no rule"):
        Judge(Stopping(name), epochs=8, seed=0)


def test_rungs_begin_at_a_part_of_the_epochs() -> None:
    spans = {name: Stopping(name).span(40) for name in ("asha", "median", "pbt")}
    assert spans == {"asha": (5, 40), "median": (10, 40), "pbt": (8, 40)}
    assert Stopping("asha").span(4) == (1, 4)
    assert Stopping("asha", "compute_seconds", first=60).span(40) == (60, math.inf)
