"""Incumbents are chosen on validation and paid for end to end; curves and times agree with scipy."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.anytime import Trace, anytime, area, incumbents, time_to_target
from analysis.resample import Draws

NAN = float("nan")


def flat(at: float, error: float, total: float) -> Trace:
    """A run whose only incumbent comes at a cost."""
    return Trace(np.array([at]), np.array([error]), total, 1, 0)


def runs(n: int = 8, seed: int = 0) -> list[Trace]:
    draw = np.random.default_rng(seed)
    valid = draw.random((n, 30))
    return [incumbents(np.full(30, 1.0), row, row + 0.05 * draw.standard_normal(30)) for row in valid]


# Incumbents


def test_the_incumbent_is_chosen_on_validation_and_paid_with_all_trials() -> None:
    cost = [2, 1, 3, 1, 5]
    valid = [0.3, NAN, 0.2, 0.25, 0.1]
    test = [0.1, NAN, 0.4, 0.0, 0.35]
    found = incumbents(cost, valid, test)
    assert found.cost.tolist() == [2, 6, 12]
    assert found.error.tolist() == [0.1, 0.4, 0.35]  # worse on test is still what validation takes
    assert (found.total, found.n_trials, found.n_without) == (12, 5, 1)


def test_a_trace_is_a_step_function_between_its_first_incumbent_and_its_end() -> None:
    found = incumbents([2, 1, 3], [0.3, NAN, 0.2], [0.1, NAN, 0.4])
    at = found.at(np.array([1.9, 2, 5.9, 6, 6.1]))
    assert at == pytest.approx([NAN, 0.1, 0.1, 0.4, NAN], nan_ok=True)


def test_a_run_without_any_error_has_no_incumbent_and_still_costs() -> None:
    found = incumbents([2, 3], [NAN, NAN], [NAN, NAN])
    assert (len(found.cost), found.total, found.n_without) == (0, 5, 2)
    assert np.isnan(found.at(np.array([1.0, 5.0]))).all()


@pytest.mark.parametrize("cost", [[1, NAN], [1, -1]])
def test_every_cost_is_needed(cost: list[float]) -> None:
    with pytest.raises(ValueError, match="a cost is missing or negative"):
        incumbents(cost, [0.1, 0.2], [0.1, 0.2])


def test_traces_are_checked() -> None:
    with pytest.raises(ValueError, match="must be equal, and at least 1"):
        incumbents([], [], [])
    with pytest.raises(ValueError, match="is less than the cost"):
        flat(5, 0.1, 4)
    with pytest.raises(ValueError, match="cost must ascend"):
        Trace(np.array([2.0, 1]), np.array([0.1, 0.2]), 3, 2, 0)


# Curves


@pytest.mark.parametrize("statistic", ["median", "iqm", "mean"])
def test_a_curve_is_the_middle_of_the_runs_at_each_cost(statistic: str) -> None:
    traces = runs()
    found = anytime(traces, statistic=statistic, grid=[0.5, 1, 10, 30, 31], draws=Draws(resamples=999))  # type: ignore[arg-type]
    middle = {"median": np.median, "iqm": lambda v: stats.trim_mean(v, 0.25), "mean": np.mean}[statistic]
    for column, cost in ((1, 1), (2, 10), (3, 30)):
        values = [trace.at(np.array([cost]))[0] for trace in traces]
        assert found.middle[column] == pytest.approx(middle(values))
        assert found.low[column] <= found.middle[column] <= found.high[column]
    assert np.isnan(found.middle[[0, 4]]).all()
    assert found.at_risk.tolist() == [0, 8, 8, 8, 0]
    assert found.restriction is None


def test_the_band_is_the_bootstrap_of_runs() -> None:
    values = np.random.default_rng(0).random(12)
    found = anytime([flat(1, value, 2) for value in values], statistic="mean", grid=[1.5])
    drawn = np.random.default_rng(1).choice(values, (50_000, 12)).mean(axis=1)
    assert (found.low[0], found.high[0]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_a_curve_is_not_that_of_the_fast_runs() -> None:
    found = anytime([flat(1, 0.1, 10), flat(5, 0.5, 10)], statistic="mean", grid=[2, 6])
    assert np.isnan(found.middle[0])
    assert found.middle[1] == pytest.approx(0.3)
    assert found.at_risk.tolist() == [1, 2]
    assert found.restriction == "2 runs, fewer than 5: no band"
    fast = [flat(1, error, 10) for error in (0.1, 0.2, 0.3)]
    assert np.isnan(anytime([*fast, flat(5, 0.9, 10)], statistic="median", grid=[2]).middle).all()
    never = anytime([flat(1, 0.1, 2), flat(5, 0.5, 10)])
    assert "at no cost do all runs have an incumbent" in (never.restriction or "")


def test_the_default_grid_goes_from_the_first_incumbent_to_the_first_end() -> None:
    found = anytime(runs(), points=7)
    assert len(found.cost) == 7
    assert (found.cost[0], found.cost[-1]) == pytest.approx((1, 30))
    with pytest.raises(ValueError, match="needs at least one run"):
        anytime([])
    with pytest.raises(ValueError, match="use one of median, iqm, mean"):
        anytime(runs(), statistic="mode")  # type: ignore[arg-type]


def test_the_same_runs_give_the_same_curve() -> None:
    one, two = anytime(runs()), anytime(runs())
    assert one.low.tobytes() == two.low.tobytes()


def test_the_area_computed_by_hand() -> None:
    # From 2, where the later run starts, to 10: 0.4 for 4 and 0.2 for 4, and 0.3 all along.
    first = Trace(np.array([1.0, 6.0]), np.array([0.4, 0.2]), 10, 2, 0)
    found = area([first, flat(2, 0.3, 12)], 10)
    assert found.value == pytest.approx((0.3 + 0.3) / 2)
    assert found.method == "mean error over cost from 2 to 10"
    log = area([first, flat(2, 0.3, 12)], 10, log=True)
    first_log = (0.4 * np.log(6 / 2) + 0.2 * np.log(10 / 6)) / np.log(10 / 2)
    assert log.value == pytest.approx((first_log + 0.3) / 2)


def test_the_area_agrees_with_a_fine_grid() -> None:
    traces = runs(12)
    grid = np.linspace(1, 25, 240_001)[:-1]
    found = area(traces, 25)
    assert found.value == pytest.approx(np.mean([trace.at(grid).mean() for trace in traces]), abs=1e-4)
    assert found.low is not None
    assert "BCa" in found.method


def test_an_area_beyond_a_run_is_none() -> None:
    found = area([flat(1, 0.1, 5), flat(1, 0.1, 20)], 10)
    assert found.value is None
    assert found.restriction == "not all runs have an incumbent and reach the cost 10: no area"
    assert area([], 10).value is None


# Time to target


@pytest.mark.filterwarnings("ignore:The confidence interval is undefined:RuntimeWarning")  # at 0 and 1
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=15))
def test_the_share_missing_is_kaplan_and_meiers(outcomes: list[tuple[int, bool]]) -> None:
    traces = [flat(time, 0.1 if reached else 0.9, time) for time, reached in outcomes]
    found = time_to_target(traces, 0.5)
    hit = [time for time, reached in outcomes if reached]
    lost = [time for time, reached in outcomes if not reached]
    assert (found.n, found.n_reached, found.n_censored) == (len(outcomes), len(hit), len(lost))
    if not hit:
        assert len(found.cost) == 0
        assert found.median.value is None
        return
    reference = stats.ecdf(stats.CensoredData(uncensored=hit, right=lost)).sf
    at = np.searchsorted(reference.quantiles, found.cost)
    assert found.missing == pytest.approx(reference.probabilities[at])
    inside = (found.missing > 0) & (found.missing < 1)
    interval = reference.confidence_interval(method="log-log")
    assert found.low[inside] == pytest.approx(interval.low.probabilities[at][inside])
    assert found.high[inside] == pytest.approx(interval.high.probabilities[at][inside])


def test_the_median_counts_runs_that_never_reach_the_target() -> None:
    traces = [flat(time, 0.1, 100) for time in (1, 2, 3)] + [flat(1, 0.9, 100)] * 4
    found = time_to_target(traces, 0.5)
    assert found.median.restriction == "3 of 7 runs reached the target: no median"
    found = time_to_target([flat(time, 0.1, 100) for time in range(1, 21)] + [flat(1, 0.9, 100)] * 5, 0.5)
    assert found.median.value == 13
    assert found.median.low is not None
    assert found.median.high is not None
    assert found.median.low < 13 < found.median.high


def test_the_interval_of_the_median_holds_the_times_at_which_one_half_is_not_refused() -> None:
    """Brookmeyer and Crowley: times where the interval of the share, here scipy's, holds one half."""
    draw = np.random.default_rng(0)
    time, reached = draw.permutation(np.arange(1, 31)), draw.random(30) < 0.8
    found = time_to_target(
        [flat(t, 0.1 if hit else 0.9, t) for t, hit in zip(time, reached, strict=True)], 0.5
    )
    reference = stats.ecdf(stats.CensoredData(uncensored=time[reached], right=time[~reached])).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an interval at 0 and 1
        interval = reference.confidence_interval(method="log-log")
    events = np.sort(time[reached])
    low, high = (side.evaluate(events) for side in (interval.low, interval.high))
    held = events[(low <= 0.5) & (high > 0.5)]
    assert found.median.value == events[reference.evaluate(events) <= 0.5][0]
    # The share holds from one event to the next, at which the upper end falls to one half.
    assert (found.median.low, found.median.high) == (held[0], events[high <= 0.5][0])


def test_the_target_is_reached_by_the_incumbent_and_not_by_a_lucky_test_error() -> None:
    trace = incumbents([1, 1, 1], [0.3, 0.4, 0.2], [0.5, 0.1, 0.1])
    found = time_to_target([trace], 0.2)
    assert found.cost.tolist() == [3]
    with pytest.raises(ValueError, match="needs at least one run"):
        time_to_target([], 0.1)
