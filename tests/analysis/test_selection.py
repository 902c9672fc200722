"""The quality of a top k agrees with brute force over all tie-breaks and all random draws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.resample import Draws
from analysis.selection import expected_best, random_policy, selection, share_at_least_as_good

pools = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=6)
FEW = Draws(resamples=99)


@settings(max_examples=60, deadline=None)
@given(pools, st.data())
def test_every_number_is_the_mean_over_tie_breaks_and_random_draws(
    pool: list[tuple[int, int]], data: st.DataObject
) -> None:
    metric, error = (list(side) for side in zip(*pool, strict=True))
    n = len(pool)
    k = data.draw(st.integers(1, n))
    found = selection(metric, error, k, draws=FEW)
    results = []
    for order in itertools.permutations(range(n)):  # breaks ties in every way
        chosen = sorted(range(n), key=lambda i: (metric[i], order[i]))[:k]
        best = min(error[i] for i in chosen)
        draws = [min(error[i] for i in draw) for draw in itertools.combinations(range(n), k)]
        results.append(
            (
                best - min(error),
                1 + sum(value < best for value in error),
                np.mean([best < value for value in draws]),
                np.mean([best == value for value in draws]),
            )
        )
    expected = np.mean(results, axis=0)
    parts = (found.regret, found.rank, found.beats_random, found.ties_random)
    assert [part.value for part in parts] == pytest.approx(list(expected), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=5), st.data())
def test_precision_and_recall_share_out_ties_of_both_sides(
    pool: list[tuple[int, int]], data: st.DataObject
) -> None:
    metric, error = (list(side) for side in zip(*pool, strict=True))
    n = len(pool)
    k, top = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    orders = list(itertools.permutations(range(n)))

    def best(values: list[int], order: tuple[int, ...], size: int) -> set[int]:
        return set(sorted(range(n), key=lambda i: (values[i], order[i]))[:size])

    chosen = [best(metric, order, k) for order in orders]
    good = [best(error, order, top) for order in orders]
    # Both sides break their ties independently, so the mean overlap is a sum over runs of two shares.
    hits = sum(np.mean([i in one for one in chosen]) * np.mean([i in one for one in good]) for i in range(n))
    found = selection(metric, error, k, top=top, draws=FEW)
    assert found.precision.value == pytest.approx(hits / k)
    assert found.recall.value == pytest.approx(hits / top)


def test_a_perfect_metric_and_its_opposite() -> None:
    error = np.arange(20.0)
    found = selection(error, error, 5)
    assert (found.precision.value, found.recall.value, found.regret.value, found.rank.value) == (1, 1, 0, 1)
    assert found.beats_random.value == pytest.approx(1 - 5 / 20)
    assert found.ties_random.value == pytest.approx(5 / 20)
    other = selection(error, error, 5, lowest=False)
    assert (other.precision.value, other.regret.value, other.rank.value) == (0, 15, 16)
    assert selection(-error, error, 5, lowest=False).precision.value == 1


def test_a_metric_that_ties_all_is_a_random_draw() -> None:
    error = np.arange(10.0)
    found = selection(np.zeros(10), error, 3)
    assert found.precision.value == pytest.approx(0.3)
    assert found.regret.value == pytest.approx(expected_best(error, 3, lowest=True))
    assert found.beats_random.value == pytest.approx((1 - found.ties_random.value) / 2)  # type: ignore[operator]


def test_file_order_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    metric, error = draw.integers(0, 4, 30), draw.integers(0, 9, 30) / 100
    order = draw.permutation(30)
    one, two = (selection(metric[o], error[o], 7, draws=FEW) for o in (np.arange(30), order))
    for name in ("precision", "recall", "regret", "rank", "beats_random", "ties_random"):
        assert getattr(one, name).value == pytest.approx(getattr(two, name).value)


def test_selection_has_intervals_over_units_and_says_where_it_has_none() -> None:
    draw = np.random.default_rng(0)
    error = draw.standard_normal(40)
    found = selection(error + draw.standard_normal(40), error, 5).precision
    assert found.low is not None
    assert found.value is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.n_units == 40
    assert selection([1, 2, 3], [1, 2, 3], 1).regret.restriction == (
        "3 independent units, fewer than 5: no interval"
    )
    assert selection(error, error, 5).regret.restriction == "every resample gives the same value: no interval"


def test_resamples_with_too_few_rows_are_tolerated_up_to_one_in_twenty_and_said_beyond() -> None:
    draw = np.random.default_rng(0)
    units = np.repeat(np.arange(10), [1] * 9 + [11])  # most rows are one unit's
    error = draw.standard_normal(20)
    metric = error + draw.standard_normal(20)
    few = selection(metric, error, 15, units=units).regret
    assert few.low is None
    assert "of the resamples hold too few rows: no interval" in (few.restriction or "")
    even = np.repeat(np.arange(10), [1] * 5 + [3] * 5)
    some = selection(metric, error, 12, units=even)
    assert some.precision.low is not None
    drawn = np.random.default_rng(1).choice([1] * 5 + [3] * 5, (10_000, 10)).sum(axis=1)
    assert 0 < np.mean(drawn < 12) < 0.05


def test_k_and_values_are_checked() -> None:
    with pytest.raises(ValueError, match="k=4 and top=4 must lie within 1 and the 3 runs"):
        selection([1, 2, 3], [1, 2, 3], 4)
    with pytest.raises(ValueError, match="error holds a value that is not finite"):
        selection([1, 2, 3], [1, math.nan, 3], 1)
    with pytest.raises(ValueError, match="metric has 2 values and error 3"):
        selection([1, 2], [1, 2, 3], 1)


# Random draws


@pytest.mark.parametrize(("n", "best"), [(1, 93), (2, 94.833333), (3, 96), (4, 97)])
def test_best_of_n_computed_by_hand(n: int, best: float) -> None:
    assert expected_best([90, 92, 93, 97], n) == pytest.approx(best, abs=5e-7)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_best_of_n_is_the_mean_over_all_draws(values: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(values)))
    draws = list(itertools.combinations(values, n))
    assert expected_best(values, n) == pytest.approx(np.mean([max(draw) for draw in draws]))
    assert expected_best(values, n, lowest=True) == pytest.approx(np.mean([min(draw) for draw in draws]))


def test_best_of_n_of_a_large_space() -> None:
    assert expected_best(np.arange(6561), 100) == pytest.approx(100 * 6562 / 101 - 1)
    with pytest.raises(ValueError, match="n=5 must lie within 1 and the 4 values"):
        expected_best([1, 2, 3, 4], 5)


def test_random_policy() -> None:
    assert random_policy(0.1, 10) == pytest.approx(0.9**10)
    with pytest.raises(ValueError, match="must lie in"):
        random_policy(1.1, 1)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(1, 3))
def test_the_share_at_least_as_good_gives_the_chance_against_random_draws(space: list[int], n: int) -> None:
    own = space[0]
    share = share_at_least_as_good(own / 10, [error / 10 for error in space])
    assert share == sum(error <= own for error in space) / len(space)
    draws = list(itertools.product(space, repeat=n))
    assert random_policy(share, n) == pytest.approx(np.mean([min(draw) > own for draw in draws]))


def test_the_share_needs_a_space() -> None:
    assert share_at_least_as_good(0.1 + 0.2, [0.3, 0.4]) == 0.5
    with pytest.raises(ValueError, match="space is empty"):
        share_at_least_as_good(0.1, [])
