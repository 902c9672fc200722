"""Plans agree with numbers computed by hand, with simulation and with brute force over all designs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.correlate import bonett_wright
from analysis.planning import (
    best_split,
    detectable_correlation,
    detectable_difference,
    detectable_shift,
    power_of_mann_whitney,
    power_of_t,
    power_of_tau,
    runs_for_correlation,
    runs_for_difference,
    runs_for_paired_difference,
)

# Two arms


@pytest.mark.parametrize(("effect", "runs"), [(1.0, 17), (2.0, 6)])
def test_runs_for_a_difference_in_standard_deviations(effect: float, runs: int) -> None:
    plan = runs_for_difference(effect)
    assert plan.runs == runs
    assert plan.power >= 0.8
    assert power_of_t(effect * math.sqrt((runs - 1) / 2), 2 * runs - 4) < 0.8


def test_four_runs_an_arm_detect_two_standard_deviations_and_a_third() -> None:
    assert detectable_difference(4, 4) == pytest.approx(2.38, abs=0.005)


def test_three_runs_an_arm_detect_about_three_standard_deviations() -> None:
    assert detectable_difference(3, 3) == pytest.approx(3.07, abs=0.005)


def test_the_unit_is_that_of_the_spread() -> None:
    assert detectable_difference(5, 7, sd=0.3) == pytest.approx(0.3 * detectable_difference(5, 7))
    assert runs_for_difference(-0.3, sd=0.3).runs == 17


@pytest.mark.parametrize(("n_a", "n_b"), [(3, 3), (4, 9), (40, 40)])
def test_a_detectable_difference_is_found_four_times_in_five(n_a: int, n_b: int) -> None:
    draw, runs = np.random.default_rng(0), 20_000
    a = draw.standard_normal((runs, n_a)) + detectable_difference(n_a, n_b)
    found = stats.ttest_ind(a, draw.standard_normal((runs, n_b)), axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / runs))


@pytest.mark.parametrize(("shift", "df"), [(0.0, 5), (0.5, 5), (3.0, 2), (4.9, 30), (5.1, 30)])
def test_power_agrees_with_simulation(shift: float, df: int) -> None:
    draw, runs = np.random.default_rng(1), 100_000
    t = (shift + draw.standard_normal(runs)) / np.sqrt(draw.chisquare(df, runs) / df)
    share = np.mean(np.abs(t) > stats.t.ppf(0.975, df))
    assert power_of_t(shift, df) == pytest.approx(share, abs=4 * math.sqrt(0.25 / runs))


@given(st.integers(1, 200), st.floats(0.001, 0.2), st.floats(0.3, 0.99))
def test_a_detectable_shift_has_the_wanted_power(df: int, alpha: float, power: float) -> None:
    assert power_of_t(detectable_shift(df, alpha, power), df, alpha) == pytest.approx(power, abs=1e-6)


def test_pairs_need_fewer_runs() -> None:
    plan = runs_for_paired_difference(1.0)
    assert plan.runs == 10  # e.g. Cohen (1988): a paired d of 1 needs 10 pairs
    assert runs_for_difference(1.0).runs > plan.runs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: runs_for_difference(0), "difference=0.0 must be positive"),
        (lambda: runs_for_difference(1, sd=-1), "sd=-1 must be positive"),
        (lambda: runs_for_difference(1, power=80), "power=80 is not between 0 and 1; use 0.8"),
        (lambda: runs_for_difference(1e-4), "runs are needed"),
        (lambda: detectable_difference(1, 1), "use at least 2 runs in an arm"),
        (lambda: detectable_shift(5, power=0.01), "needs no difference"),
        (lambda: runs_for_correlation(0), "rho=0 must lie between"),
        (lambda: runs_for_correlation(1), "rho=1 must lie between"),
        (lambda: detectable_correlation(3), "use at least 4"),
        (lambda: power_of_tau(10, 1), "must lie between -1 and 1"),
        (lambda: best_split(1, 1, 1, 1, 1), "buys no search with one retraining"),
        (lambda: best_split(0, 0, 1, 1, 10), "one above 0"),
        (lambda: best_split(1, 1, 0, 1, 10), "cost_search=0 must be positive"),
    ],
)
def test_impossible_plans_are_refused(wrong: object, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        wrong()  # type: ignore[operator]


# Correlations


def test_runs_for_a_correlation_computed_by_hand() -> None:
    # (1.959964 + 0.841621)^2 (1 + 0.25 / 2) / 0.549306^2 + 3 = 7.848880 x 1.125 / 0.301737 + 3 = 32.26.
    assert runs_for_correlation(0.5).runs == 33
    assert runs_for_correlation(-0.5) == runs_for_correlation(0.5)


@given(st.floats(0.05, 0.95))
def test_a_correlation_is_detectable_with_the_runs_planned_for_it(rho: float) -> None:
    plan = runs_for_correlation(rho)
    assert plan.power >= 0.8 - 1e-9
    if plan.runs > 4:
        assert detectable_correlation(plan.runs) <= rho + 1e-9
        assert detectable_correlation(plan.runs - 1) > rho - 1e-9


def test_planned_correlations_are_found_about_four_times_in_five() -> None:
    runs = runs_for_correlation(0.5).runs
    rho = 2 * math.sin(math.pi * 0.5 / 6)  # of a normal pair whose Spearman's rho is 0.5
    draw = np.random.default_rng(0)
    x, noise = draw.standard_normal((2, 2000, runs))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    intervals = [bonett_wright(stats.spearmanr(a, b).statistic, runs) for a, b in zip(x, y, strict=True)]
    found = [low > 0 for low, _ in filter(None, intervals)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


# Simulated power


def test_power_of_mann_whitney_is_near_that_of_t() -> None:
    found = power_of_mann_whitney(17, 17, 1.0)
    assert found.value is not None
    assert 0.72 < found.value < 0.82
    assert found == power_of_mann_whitney(17, 17, 1.0)


def test_three_runs_an_arm_never_give_mann_whitney_a_small_p() -> None:
    found = power_of_mann_whitney(3, 3, 10.0)
    assert (found.value, found.low) == (0, 0)
    assert found.high is not None
    assert found.high < 0.003


def test_power_of_tau_is_its_level_without_association_and_grows_with_it() -> None:
    none, some = power_of_tau(12, 0.0, simulations=1000), power_of_tau(12, 0.6, simulations=1000)
    assert none.low is not None
    assert none.value is not None
    assert none.low < 0.05
    assert none.value < 0.07
    assert some.value is not None
    assert some.value > 0.7


# Splits


def test_equal_spreads_and_costs_are_best_split_one_to_one() -> None:
    found = best_split(1, 1, 1, 1, 40)
    assert (found.best_retrainings, found.searches, found.retrainings, found.cost) == (1, 20, 1, 40)
    assert found.standard_error == pytest.approx(math.sqrt(2 / 20))
    assert found.detectable == pytest.approx(found.standard_error * math.sqrt(2) * detectable_shift(38))


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.floats(0.2, 9), st.floats(0.2, 9), st.floats(20, 200))
def test_no_other_design_within_the_budget_is_better(
    sd_s: float, sd_r: float, c_s: float, c_r: float, budget: float
) -> None:
    found = best_split(sd_s, sd_r, c_s, c_r, budget)
    assert found.cost <= budget * (1 + 1e-6)
    variances = [
        sd_s**2 / a + sd_r**2 / (a * b)
        for a in range(1, int(budget / c_s) + 1)
        for b in range(1, int(budget / c_r) + 1)
        if a * (c_s + b * c_r) <= budget
    ]
    assert found.standard_error**2 <= min(variances) * (1 + 1e-9)
    # The rule without rounding is the minimum of (sd_s^2 + sd_r^2 / b) (c_s + b c_r) over b.
    b = found.best_retrainings
    price = [(sd_s**2 + sd_r**2 / at) * (c_s + at * c_r) for at in (0.9 * b, b, 1.1 * b)]
    assert price[1] < min(price[0], price[2])


def test_without_search_variance_all_goes_into_retraining_one_search() -> None:
    found = best_split(0, 1, 10, 1, 100)
    assert (found.searches, found.retrainings, found.best_retrainings, found.detectable) == (
        1,
        90,
        math.inf,
        None,
    )
