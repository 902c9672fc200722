"""Values over training against those of the papers' recipes, and the limits of every schedule."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.papers import PAPERS, RECIPES
from nas.schedule import Constant, Cosine, Exponential, Linear, LinearTail, Ramp, Schedule, SkipDropout

sizes = st.just(0.0) | st.floats(1e-6, 100)
lengths = st.integers(1, 300)

ALL: list[Schedule] = [
    Constant(0.3),
    Linear(10.0, 0.1),
    Ramp(0.3),
    Cosine(0.1, 0.001, warmup=5),
    Cosine(0.1, warmup=5, warmup_of="current"),
    LinearTail(0.5, warmup=5),
    Exponential(0.1, 0.97),
    SkipDropout(0.7),
]


# The recipes' values, to the digits that the public code gives.


def test_skip_dropout_of_p_darts() -> None:
    dropout = SkipDropout(1 - 1e-12, frozen_epochs=10)
    expected = [0.96, 0.92, 0.88, 0.84, 0.80, 0.76, 0.72, 0.68, 0.64, 0.60]
    expected += [1, 0.819, 0.670, 0.549, 0.449, 0.368, 0.301, 0.247, 0.202, 0.165]
    expected += [0.135, 0.111, 0.091, 0.074, 0.061]
    assert [dropout.at(epoch, 25) for epoch in range(25)] == pytest.approx(expected, abs=5e-4)


def test_skip_dropout_of_every_stage_is_a_multiple_of_it() -> None:
    one = SkipDropout(0.5)
    for stage, start in zip(PAPERS["p_darts"].search, (0.0, 0.4, 0.7), strict=True):
        found = [stage.skip_dropout.at(epoch, stage.epochs) for epoch in range(stage.epochs)]
        expected = [start / 0.5 * one.at(epoch, 25) for epoch in range(25)]
        assert found == pytest.approx(expected)


def test_linear_tail_of_imagenet() -> None:
    lr = RECIPES["pc_darts_imagenet"].lr
    expected = {
        5: 0.48980,
        100: 0.29592,
        243: 0.00408,
        244: 0.00204,
        245: 0.00204,
        246: 0.00163,
        249: 0.00041,
    }
    assert {epoch: round(lr.at(epoch, 250), 5) for epoch in expected} == expected


def test_cosine_of_darts_and_pc_darts() -> None:
    expected = {"darts_1st": (0.025, 0.02005, 0.013, 0.00102), "pc_darts": (0.1, 0.07939, 0.05, 0.0001)}
    # PC-DARTS's 0.0794 at epoch 15 is where its alphas begin to learn.
    for name, values in expected.items():
        (stage,) = PAPERS[name].search
        found = [stage.lr.at(epoch, stage.epochs) for epoch in (0, 15, 25, 49)]
        assert found == pytest.approx(values, abs=6e-6)


def test_warm_up_of_pc_darts_and_of_p_darts() -> None:
    ours, theirs = RECIPES["pc_darts_imagenet"].lr, RECIPES["p_darts_imagenet"].lr
    bare = LinearTail(0.5)
    for epoch in range(5):
        assert ours.at(epoch, 250) == pytest.approx(0.5 * (epoch + 1) / 5)
        assert theirs.at(epoch, 250) == pytest.approx(bare.at(epoch, 250) * (epoch + 1) / 5)
    for epoch in range(5, 250):
        assert ours.at(epoch, 250) == theirs.at(epoch, 250) == bare.at(epoch, 250)


def test_temperature_of_gdas() -> None:
    tau = Linear(10.0, 0.1)
    assert [tau.at(epoch, 250) for epoch in (0, 249)] == pytest.approx([10.0, 0.1])
    assert tau.at(124.5, 250) == pytest.approx(5.05)


# Limits


@given(sizes, sizes, lengths)
def test_linear_goes_from_the_first_to_the_last_epoch(start: float, end: float, epochs: int) -> None:
    values = [Linear(start, end).at(epoch, epochs) for epoch in range(epochs)]
    assert values[0] == start
    assert values[-1] == pytest.approx(end if epochs > 1 else start)
    assert min(start, end) - 1e-9 <= min(values)
    assert max(values) <= max(start, end) + 1e-9


@given(sizes, lengths)
def test_ramp_starts_at_nothing_and_does_not_reach_its_end(end: float, epochs: int) -> None:
    ramp = Ramp(end)
    assert ramp.at(0, epochs) == 0
    assert ramp.at(epochs - 1, epochs) == pytest.approx(end * (1 - 1 / epochs))
    assert ramp.at(epochs, epochs) == pytest.approx(end)


@given(sizes, sizes, lengths)
def test_cosine_falls_from_start_to_end(one: float, two: float, epochs: int) -> None:
    start, end = max(one, two), min(one, two)
    values = [Cosine(start, end).at(epoch, epochs) for epoch in range(epochs + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(values))
    assert Cosine(start, end).at(epochs / 2, epochs) == pytest.approx((start + end) / 2)


@given(sizes, st.integers(1, 10), lengths)
def test_linear_tail_reaches_no_zero_before_the_end(start: float, tail: int, epochs: int) -> None:
    schedule = LinearTail(start, tail)
    assert schedule.at(epochs, epochs) == 0
    for epoch in range(epochs):
        assert schedule.at(epoch, epochs) > 0 or start == 0


def test_linear_tail_has_no_jump() -> None:
    schedule = LinearTail(0.5)
    # The last step of the body ends where the tail begins: at 1 / E' of the start.
    assert schedule.at(244, 250) == pytest.approx(0.5 / 245)
    assert schedule.at(245, 250) == pytest.approx(0.5 / 245)


def test_exponential_changes_once_per_epoch() -> None:
    schedule = Exponential(0.1, 0.97)
    assert [schedule.at(epoch, 250) for epoch in (0, 1, 1.9, 10)] == pytest.approx(
        [0.1, 0.097, 0.097, 0.1 * 0.97**10]
    )


def test_skip_dropout_without_frozen_epochs_starts_at_its_start() -> None:
    dropout = SkipDropout(0.4, frozen_epochs=0)
    assert dropout.at(0, 25) == 0.4
    assert dropout.at(5, 25) == pytest.approx(0.4 * math.exp(-1))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("epochs", [1, 2, 3, 6, 25, 600])
def test_every_schedule_is_finite_and_not_negative(schedule: Schedule, epochs: int) -> None:
    for epoch in range(epochs):
        assert 0 <= schedule.at(epoch, epochs) < math.inf


# Errors


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("make", [Constant, Ramp, Cosine, LinearTail, SkipDropout])
def test_values_below_zero_or_not_finite_are_refused(make: type[Constant], value: float) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__}\.\w+={value} must be a finite number >= 0"):
        make(value)


def test_values_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear\.end=-1 must be"):
        Linear(1.0, -1)
    with pytest.raises(ValueError, match=r"Exponential\.decay=-1 must be"):
        Exponential(1.0, -1)
    with pytest.raises(ValueError, match=r"LinearTail\.tail=0 must be at least 1"):
        LinearTail(0.5, tail=0)
    with pytest.raises(ValueError, match=r"SkipDropout\.start=1\.0 is a probability"):
        SkipDropout(1.0)
