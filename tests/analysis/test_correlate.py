"""Associations agree with hand computations, with scipy and brute force, and say what limits them."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis import correlate, pruning
from analysis.correlate import (
    association,
    best_epoch,
    bonett_wright,
    by_group,
    compare_metrics,
    in_the_best,
    over_epochs,
    partial,
    predictive_gain,
    unrestricted,
)
from analysis.resample import Draws, Estimate

Array = NDArray[np.float64]

X, Y, Z = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], [1, 1, 2, 2, 3, 3]

columns = st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=5, max_size=20)


def sweep(groups: int = 5, runs: int = 12, shift: float = 3, slope: float = -1) -> tuple[Array, Array, Array]:
    """Metric, error and setting of a sweep whose setting moves both up, while they fall within settings."""
    draw = np.random.default_rng(0)
    setting = np.repeat(np.arange(groups), runs)
    x = draw.standard_normal(groups * runs)
    y = slope * x + 0.5 * draw.standard_normal(groups * runs)
    return x + shift * setting, y + shift * setting, setting


# Coefficients


def test_coefficients_computed_by_hand() -> None:
    assert correlate.tau_b([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.6)
    assert correlate.tau_b([1, 2, 2, 3], [1, 3, 2, 3]) == pytest.approx(0.8)
    assert correlate.spearman([1, 2, 2, 3], [1, 3, 2, 3]) == pytest.approx(0.833333, abs=5e-7)
    assert correlate.pearson(X, Y) == pytest.approx(0.828571, abs=5e-7)
    assert correlate.tau_b(X, Y) == pytest.approx(0.6)


@settings(max_examples=40)
@given(columns)
def test_coefficients_agree_with_scipy(rows: list[tuple[int, ...]]) -> None:
    x, y = np.array(rows, dtype=np.float64).T[:2]
    found = correlate.tau_b(x, y), correlate.spearman(x, y), correlate.pearson(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert found == (None, None, None)
        return
    expected = [test(x, y).statistic for test in (stats.kendalltau, stats.spearmanr, stats.pearsonr)]
    assert found == pytest.approx(tuple(expected))


def test_values_within_the_resolution_are_ties() -> None:
    collapsed = [0.1 + 0.2, 0.3, 0.5, 0.7]
    assert collapsed[0] != collapsed[1]
    assert correlate.tau_b(collapsed, [2, 1, 3, 4]) == stats.kendalltau([1, 1, 2, 3], [2, 1, 3, 4]).statistic


def test_sparse_tau_rounds_the_error_to_a_tenth_of_a_percent() -> None:
    draw = np.random.default_rng(0)
    x, error = draw.standard_normal(30), 0.05 + 0.003 * draw.random(30)
    found = association(x, error, error_resolution=1e-3)
    assert found.tau_b.value == pytest.approx(stats.kendalltau(x, np.round(error, 3)).statistic)


def test_fisher_interval_of_bonett_and_wright_computed_by_hand() -> None:
    # atanh(0.5) = 0.549306, standard error sqrt(1.125 / 27) = 0.204124.
    low, high = math.tanh(0.549306 - 1.959964 * 0.204124), math.tanh(0.549306 + 1.959964 * 0.204124)
    assert bonett_wright(0.5, 30) == pytest.approx((low, high), abs=1e-6)
    assert bonett_wright(0.5, 3) is None
    assert bonett_wright(1.0, 30) is None


def test_the_bootstrap_of_rho_is_near_bonett_and_wright() -> None:
    draw = np.random.default_rng(1)
    x, noise = draw.standard_normal((2, 200))
    found = association(x, 0.6 * x + 0.8 * noise).spearman
    assert found.value is not None
    assert (found.low, found.high) == pytest.approx(bonett_wright(found.value, 200), abs=0.03)


def test_range_restriction_is_undone_where_the_line_holds() -> None:
    draw = np.random.default_rng(0)
    x, noise = draw.standard_normal((2, 200_000))
    y = 0.6 * x + 0.8 * noise
    kept = x > 0.5
    restricted = correlate.pearson(x[kept], y[kept])
    assert restricted is not None
    assert restricted < 0.4
    assert unrestricted(restricted, x.std() / x[kept].std()) == pytest.approx(0.6, abs=0.01)
    assert unrestricted(0.37, 1.0) == pytest.approx(0.37)
    with pytest.raises(ValueError, match="must lie in"):
        unrestricted(1.2, 1.0)


# One metric


def test_an_association_counts_what_is_missing() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal(20)
    y = x + draw.standard_normal(20)
    x[0], x[1], y[1], y[2], y[3] = np.nan, np.inf, np.nan, np.nan, np.nan
    found = association(x, y)
    assert (found.n_total, found.n_used, found.n_no_metric, found.n_no_error) == (20, 16, 2, 2)
    assert found.restriction == (
        "2 rows without the metric left out; 2 rows without a final error left out: conditional on having one"
    )
    assert found.tau_b.value == pytest.approx(stats.kendalltau(x[4:], y[4:]).statistic)
    assert found.tau_b.n == 16


def test_repeats_of_an_architecture_widen_the_interval_rather_than_n() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal(15)
    y = x + draw.standard_normal(15)
    labels = np.repeat(np.arange(15), 10)
    rows, units = association(x[labels], y[labels]), association(x[labels], y[labels], units=labels)
    once = association(x, y)
    assert (units.n_used, units.n_unique) == (150, 15)
    width = {name: one.tau_b.high - one.tau_b.low for name, one in locals().items() if hasattr(one, "tau_b")}  # type: ignore[operator]
    assert width["rows"] < 0.6 * width["units"]
    assert width["units"] == pytest.approx(width["once"], rel=0.15)
    assert units.test.n_units == 15
    assert units.test.p == pytest.approx(once.test.p, abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([], [], "0 independent units, fewer than 3: no association"),
        ([0.1], [0.2], "1 independent unit, fewer than 3: no association"),
        ([np.nan] * 5, [1.0, 2, 3, 4, 5], "0 independent units, fewer than 3: no association"),
        ([1.0, 2, 3, 4, 5], [np.nan] * 5, "0 independent units, fewer than 3: no association"),
        ([0.3] * 6, [1.0, 2, 3, 4, 5, 6], "not defined: no rows, or values that are all equal"),
        ([1.0, 2, 3, 4, 5, 6], [0.1 + 0.2, 0.3] * 3, "not defined: no rows, or values that are all equal"),
    ],
)
def test_what_says_nothing_gets_no_number(x: list[float], y: list[float], said: str) -> None:
    found = association(x, y)
    assert found.tau_b.value is None
    assert found.tau_b.restriction == said
    assert found.test.p is None
    assert found.words == "association not known"


def test_one_seed_is_one_unit_however_many_rows_it_has() -> None:
    found = association(np.arange(20.0), np.arange(20.0), units=["seed 0"] * 20)
    assert found.tau_b.restriction == "1 independent unit, fewer than 3: no association"


def test_four_units_have_a_number_without_an_interval() -> None:
    found = association([1, 2, 2, 3], [1, 3, 2, 3])
    assert (found.tau_b.value, found.tau_b.low) == (pytest.approx(0.8), None)
    assert found.tau_b.restriction == "4 independent units, fewer than 5; no interval"
    assert found.words == "direction undecided"


def test_the_direction_is_said_in_words_and_the_sign_is_kept() -> None:
    x = np.arange(30.0)
    wave = 10 * np.sin(x)
    assert association(x, wave - x).words == "higher metric ↔ lower error"
    assert association(x, wave + x).words == "higher metric ↔ higher error"
    rho = association(x, wave - x).spearman.value
    assert rho is not None
    assert rho < 0


def test_a_metric_below_its_resolution_is_said() -> None:
    found = association(np.linspace(1e-9, 2e-8, 20), np.arange(20.0))
    assert found.tau_b.value is None
    assert found.restriction == "20 values of the metric are 1 at its resolution of 1e-06"
    assert association(np.linspace(1e-9, 2e-8, 20), np.arange(20.0), resolution=1e-12).tau_b.value == 1


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="columns differ in length"):
        association([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="units has 2 labels for 3 rows"):
        association([1, 2, 3], [1, 2, 3], units=["a", "b"])


def test_the_same_input_gives_the_same_numbers() -> None:
    x, y, _ = sweep()
    assert repr(association(x, y)) == repr(association(x, y))
    assert repr(by_group(x, y, sweep()[2])) == repr(by_group(x, y, sweep()[2]))


# Two metrics


def test_metrics_are_compared_on_the_same_rows() -> None:
    draw = np.random.default_rng(0)
    error = draw.standard_normal(60)
    good, poor = error + 0.3 * draw.standard_normal(60), error + 3 * draw.standard_normal(60)
    poor[0] = np.nan
    found = compare_metrics(good, poor, error)
    expected = (
        stats.kendalltau(good[1:], error[1:]).statistic - stats.kendalltau(poor[1:], error[1:]).statistic
    )
    assert found.value == pytest.approx(expected)
    assert found.low is not None
    assert found.low > 0
    assert found.restriction == "1 row with a missing value left out"


def test_intervals_of_differences_and_partial_correlations_agree_with_scipys() -> None:
    draw = np.random.default_rng(0)
    error, size = draw.standard_normal((2, 40))
    first, second = error + draw.standard_normal(40) + size, error + 2 * draw.standard_normal(40)

    def rho(x: Array, y: Array, z: Array) -> float:
        (_, xy, xz), (_, _, yz), _ = np.corrcoef(stats.rankdata([x, y, z], axis=1))
        return float((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))

    def gap(x: Array, y: Array, z: Array) -> float:
        (_, _, xz), (_, _, yz), _ = np.corrcoef(stats.rankdata([x, y, z], axis=1))
        return float(xz - yz)

    pairs = {
        gap: (first, second, error),
        rho: (first, error, size),
    }
    found = {
        gap: compare_metrics(first, second, error, kind="spearman"),
        rho: partial(first, error, {"params": size}).partial,
    }
    for statistic, data in pairs.items():
        reference = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=999,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
        # An end of 999 draws moves by about 0.02 from seed to seed.
        assert (found[statistic].low, found[statistic].high) == pytest.approx(tuple(reference), abs=0.05)


def test_a_metric_does_not_differ_from_itself() -> None:
    x, y, _ = sweep()
    found = compare_metrics(x, x, y)
    assert (found.value, found.low) == (0, None)


def test_comparing_two_metrics_is_paired() -> None:
    """Of two metrics that share their noise, the interval of the difference is far below that of either."""
    draw = np.random.default_rng(0)
    error = draw.standard_normal(50)
    first = error + draw.standard_normal(50)
    second = first + 0.05 * draw.standard_normal(50)
    difference, alone = compare_metrics(first, second, error), association(first, error).tau_b
    assert difference.high - difference.low < 0.4 * (alone.high - alone.low)  # type: ignore[operator]


def test_metrics_are_compared_within_groups() -> None:
    x, y, group = sweep()
    other = np.random.default_rng(1).permutation(x)
    found = compare_metrics(x, other, y, groups=group)
    one, two = (by_group(side, y, group).within.value for side in (x, other))
    assert found.value == pytest.approx((one or 0) - (two or 0))
    with pytest.raises(ValueError, match="within groups is not defined"):
        compare_metrics(x, other, y, groups=group, kind="spearman")


# Epochs


def test_over_epochs_counts_rows_at_risk() -> None:
    draw = np.random.default_rng(0)
    error = draw.standard_normal(30)
    curves = pd.DataFrame({epoch: error + draw.standard_normal(30) for epoch in (1, 5, 10)})
    curves.loc[20:, 10] = np.nan
    error[25:] = np.nan
    first, _, last = over_epochs(curves, error)
    assert (first.epoch, first.at_risk, first.estimate.n) == (1, 30, 25)
    assert first.estimate.restriction == "5 of 30 rows at risk have no final error, so survivors only"
    assert (last.epoch, last.at_risk, last.estimate.n, last.estimate.restriction) == (10, 20, 20, None)
    expected = stats.kendalltau(curves[10][:20], error[:20]).statistic
    assert last.estimate.value == pytest.approx(expected)


def test_the_best_epoch_is_judged_as_the_best_of_all() -> None:
    draw = np.random.default_rng(3)
    noise = pd.DataFrame(draw.standard_normal((25, 30)))
    error = draw.standard_normal(25)
    found = best_epoch(noise, error)
    taus = [stats.kendalltau(noise[epoch], error) for epoch in noise]
    strongest = int(np.argmax([abs(tau.statistic) for tau in taus]))
    assert found.epoch == strongest
    assert found.value == pytest.approx(taus[strongest].statistic)
    assert found.p is not None
    assert found.p > 3 * taus[strongest].pvalue
    real = noise.assign(**{"17": error + 0.3 * noise[17]})
    found = best_epoch(real, error)
    assert found.epoch == "17"
    assert found.p is not None
    assert found.p < 0.01


def shifted(arms: int = 4, runs: int = 8, seed: int = 0) -> tuple[pd.DataFrame, Array, Array]:
    """Curves of three epochs, error and arm, where arms move both and nothing goes with anything within."""
    draw = np.random.default_rng(seed)
    arm = np.repeat(np.arange(arms), runs)
    curves = pd.DataFrame({epoch: 3 * arm + draw.standard_normal(len(arm)) for epoch in (1, 2, 3)})
    return curves, 3 * arm + draw.standard_normal(len(arm)), arm


def test_epochs_within_arms_are_those_of_the_groups() -> None:
    curves, error, arm = shifted()
    curves.loc[[3, 9, 20], 3] = np.nan
    few = Draws(resamples=199, permutations=199)
    found = over_epochs(curves, error, groups=arm, draws=few)
    for one in found:
        rows = curves[one.epoch].notna().to_numpy()
        expected = by_group(curves[one.epoch][rows], error[rows], arm[rows], draws=few).within
        assert (one.estimate.value, one.estimate.low, one.estimate.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )
    pooled = over_epochs(curves, error, draws=few)
    assert min(one.estimate.value or 0 for one in pooled) > 0.5
    with pytest.raises(ValueError, match="'spearman' within groups is not defined here"):
        over_epochs(curves, error, kind="spearman", groups=arm)


def test_epochs_of_a_study_with_stopped_runs_are_weighted() -> None:
    curves, error, arm = shifted(arms=2, runs=15)
    draw = np.random.default_rng(1)
    probability = np.where(draw.random(30) < 0.5, 0.5, 1.0)
    error = np.where(draw.random(30) < probability, error, np.nan)
    weights = pruning.inverse_probability(probability, error)
    assert weights is not None
    few = Draws(resamples=199, permutations=199)
    final = np.isfinite(error)
    pooled = over_epochs(curves, error, weights=weights, draws=few)
    within = over_epochs(curves, error, weights=weights, groups=arm, draws=few)
    for epoch, one, two in zip(curves, pooled, within, strict=True):
        x = curves[epoch].to_numpy()
        assert one.at_risk == 30
        assert one.estimate.n == final.sum()
        assert one.estimate.value == pytest.approx(
            pruning.weighted_tau(x[final], error[final], 1 / probability[final])
        )
        expected = pruning.weighted_within(x, error, probability, arm, draws=few).estimate
        assert two.estimate.value == pytest.approx(expected.value)
        assert (two.estimate.low, two.estimate.high) == pytest.approx((expected.low, expected.high))
        assert "survivors" not in (one.estimate.restriction or "")
    with pytest.raises(ValueError, match="weights must be positive where there is a final error"):
        over_epochs(curves, error, weights=np.zeros(30))


def test_the_best_epoch_of_arms_that_differ_is_no_finding() -> None:
    few = Draws(permutations=199)
    p = []
    for seed in range(60):
        curves, error, arm = shifted(seed=seed)
        p.append(best_epoch(curves, error, groups=arm, draws=few).p)
        if seed < 5:
            assert (best_epoch(curves, error, draws=few).p or 1) < 0.05
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 60))


def strongest(curves: Array, error: Array, group: Array) -> float:
    """Largest association within groups of all epochs, scaled by all pairs of a group that are not tied."""
    found = []
    for column in curves.T:
        score = in_x = in_y = 0.0
        for i, j in itertools.combinations(range(len(error)), 2):
            if group[i] == group[j]:
                a, b = np.sign(column[i] - column[j]), np.sign(error[i] - error[j])
                score, in_x, in_y = score + a * b, in_x + abs(a), in_y + abs(b)
        found.append(abs(score) / math.sqrt(in_x * in_y))
    return max(found)


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 1]])
def test_the_p_value_of_the_best_epoch_goes_through_all_orders(groups: list[int] | None) -> None:
    curves = np.array([[1.0, 2, 6], [2, 1, 5], [3, 4, 1], [2, 3, 4], [5, 6, 2], [6, 4, 3]])
    error, group = np.array([2.0, 1, 4, 6, 5, 9]), np.array(groups or [0] * 6)
    parts = [np.flatnonzero(group == label) for label in np.unique(group)]
    orders = [np.concatenate(order) for order in itertools.product(*map(itertools.permutations, parts))]
    values = [strongest(curves, error[order.astype(int)], group) for order in orders]
    expected = np.mean(np.array(values) >= values[0] - 1e-9)
    found = best_epoch(pd.DataFrame(curves), error, groups=groups)
    assert found.p == pytest.approx(expected)
    assert f"all {len(orders)} permutations" in found.method


def test_each_side_of_the_best_epoch_has_its_own_resolution() -> None:
    """A metric in millions of its unit is ranked by steps of one, the error by millionths all the same."""
    draw = np.random.default_rng(0)
    error = 0.05 + 0.01 * draw.random(12)
    curves = pd.DataFrame({1: 1e6 * error + draw.standard_normal(12), 2: draw.standard_normal(12)})
    for kind in ("tau_b", "spearman"):
        found = best_epoch(curves, error, kind=kind, resolution=1.0)  # type: ignore[arg-type]
        assert found.epoch == 1
        assert found.p is not None
        assert found.p < 0.01


def test_the_best_epoch_needs_units_that_lie_in_one_arm_each() -> None:
    curves, error, arm = shifted()
    found = best_epoch(curves, error, groups=arm, units=np.tile(np.arange(8), 4))
    assert found.p is None
    assert found.value is not None
    assert found.restriction == "units lie in several groups: no permutation within them"


def test_the_best_epoch_needs_complete_rows_and_values_that_differ() -> None:
    curves = pd.DataFrame({1: [1.0, 2, np.nan, 4, 5, 6], 2: [1.0, 3, 2, 5, 4, 6]})
    found = best_epoch(curves, [1, 2, 3, 4, 5, 6])
    assert (found.n, found.restriction) == (5, "1 row without some epoch or the error left out")
    assert best_epoch(curves, [1] * 6).value is None
    assert best_epoch(curves[:2], [1, 2]).p is None


# Controls


def test_partial_correlation_computed_by_hand() -> None:
    found = partial(X, Y, {"group": Z}, kind="pearson")
    assert found.raw.value == pytest.approx(0.828571, abs=5e-7)
    assert found.partial.value == pytest.approx(-1)


@settings(max_examples=40)
@given(columns)
def test_partial_correlation_is_that_of_residuals(rows: list[tuple[int, ...]]) -> None:
    x, y, *controls = np.array(rows, dtype=np.float64).T
    ranked = [stats.rankdata(side) for side in (x, y, *controls)]
    design = np.column_stack([np.ones(len(x)), *ranked[2:]])
    rest = [side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in ranked[:2]]
    if np.linalg.matrix_rank(design) < 3 or min(np.ptp(side) for side in rest) < 1e-6:
        return
    draws = Draws(resamples=99)
    found = partial(x, y, {"a": controls[0], "b": controls[1]}, draws=draws).partial
    assert found.value == pytest.approx(stats.pearsonr(*rest).statistic, abs=1e-9)


def test_partial_correlation_of_one_control_is_the_formula() -> None:
    x, y, z = np.random.default_rng(0).standard_normal((3, 40))
    x, y = x + z, y - z
    xy, xz, yz = (stats.spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial(x, y, {"params": z}).partial.value == pytest.approx(expected)


def test_a_metric_that_is_size_in_disguise_shrinks_under_control() -> None:
    draw = np.random.default_rng(0)
    size = draw.standard_normal(80)
    metric, error = size + 0.3 * draw.standard_normal(80), size + 0.3 * draw.standard_normal(80)
    found = partial(metric, error, {"params": size})
    assert found.words.startswith("the association shrinks")
    assert found.raw.value is not None
    assert found.raw.value > 0.8
    assert found.change.value == pytest.approx(found.partial.value - found.raw.value)  # type: ignore[operator]


def test_an_association_that_size_hides_grows_under_control() -> None:
    draw = np.random.default_rng(0)
    size, signal = draw.standard_normal((2, 80))
    noise = 0.2 * draw.standard_normal(80)
    found = partial(signal + size, signal - size + noise, {"params": size})
    assert found.words == "suppression: the association shows under control only"
    found = partial(2 * signal + size, 2 * signal - size + noise, {"params": size})
    assert found.words == "suppression: the association grows under control"
    found = partial(signal + 2 * size, 2 * size - signal + noise, {"params": size})
    assert found.words == "the association turns under control"


def test_a_partial_correlation_needs_a_control() -> None:
    with pytest.raises(ValueError, match="controls is empty"):
        partial(X, Y, {})
    same = partial(X, Y, {"copy": X})
    assert same.partial.value is None


def test_predictive_gain_is_that_of_squared_errors_left_out() -> None:
    draw = np.random.default_rng(0)
    x, z, noise = draw.standard_normal((3, 200))
    gain = predictive_gain(x, x + z + noise, {"params": z})
    # Of the variance 3, the control explains 1 and the metric 1.
    assert gain.value == pytest.approx(1 / 3, abs=0.08)
    assert gain.low is not None
    assert gain.low > 0.2
    none = predictive_gain(draw.standard_normal(200), x + z, {"params": z})
    assert none.value == pytest.approx(0, abs=0.02)
    assert predictive_gain(X, Y, {"params": Z}).value is None


# Groups


def test_pooled_and_within_group_association_computed_by_hand() -> None:
    found = by_group(X, Y, Z)
    assert found.pooled.value == pytest.approx(0.6)
    assert found.within.value == -1
    assert found.between.value == 1
    assert found.headline is found.within
    assert found.simpson is not None
    assert found.simpson.startswith("Simpson warning: tau-b is +0.600 pooled and -1.000 within groups")
    assert found.groups == ()
    assert found.n_small == 3


def test_a_sweep_that_moves_both_gets_the_warning() -> None:
    x, y, setting = sweep()
    found = by_group(x, y, setting)
    assert found.pooled.value is not None
    assert found.within.high is not None
    assert found.pooled.value > 0.4
    assert found.within.high < -0.4
    assert found.simpson is not None
    assert len(found.groups) == 5
    assert found.heterogeneity.mean.high is not None
    assert found.heterogeneity.mean.high < -0.4


def test_groups_that_agree_get_no_warning() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal(60)
    found = by_group(x, x + draw.standard_normal(60), np.arange(60) % 4)
    assert found.simpson is None
    assert found.heterogeneity.p is not None
    assert found.test.p is not None
    assert found.heterogeneity.p > 0.05
    assert found.test.p < 0.01


def test_a_sweep_is_resampled_within_its_settings() -> None:
    """Of settings far apart, the pooled association varies less than if runs were drawn from all of them."""
    x, y, setting = sweep(shift=20)
    inside, across = by_group(x, y, setting).pooled, association(x, y).tau_b
    assert inside.value == across.value
    assert inside.high - inside.low < 0.7 * (across.high - across.low)  # type: ignore[operator]


def test_intervals_apart_get_the_warning_even_with_one_sign() -> None:
    x, y, setting = sweep(shift=6, slope=0.2)
    found = by_group(x, y, setting)
    assert found.within.value is not None
    assert found.within.value > 0
    assert "the intervals do not overlap" in (found.simpson or "")


@settings(max_examples=40)
@given(columns)
def test_within_group_association_is_the_sum_over_pairs_of_groups(rows: list[tuple[int, ...]]) -> None:
    x, y, group, _ = np.array(rows, dtype=np.float64).T
    group = group % 3
    above = below = 0.0
    for label in np.unique(group):
        signs = [
            (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
            for i, j in itertools.combinations(np.flatnonzero(group == label), 2)
        ]
        above += sum(a * b for a, b in signs)
        below += math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    found = by_group(x, y, group, draws=Draws(resamples=99, permutations=99)).within
    assert found.value == (None if below == 0 else pytest.approx(above / below))


def test_the_association_of_group_means() -> None:
    x, y, setting = sweep(groups=6)
    means = [pd.Series(side).groupby(setting).mean() for side in (x, y)]
    assert by_group(x, y, setting).between.value == pytest.approx(stats.kendalltau(*means).statistic)


def test_the_mean_of_groups_follows_dersimonian_and_laird() -> None:
    def one(value: float, n: int) -> Estimate:
        return Estimate(value, value - 0.01, value + 0.01, n, n, "tau")

    found = correlate._heterogeneity([one(0.1, 24), one(0.5, 14), one(0.7, 34)], 0.95)
    z, v = np.arctanh([0.1, 0.5, 0.7]), 0.437 / np.array([20, 10, 30])
    w = 1 / v
    q = float((w * (z - (w * z).sum() / w.sum()) ** 2).sum())
    tau_squared = (q - 2) / (w.sum() - (w**2).sum() / w.sum())
    w = 1 / (v + tau_squared)
    mean, error = (w * z).sum() / w.sum(), 1 / math.sqrt(w.sum())
    assert found.tau_squared == pytest.approx(tau_squared)
    assert found.i_squared == pytest.approx((q - 2) / q)
    assert found.p == pytest.approx(stats.chi2.sf(q, 2))
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx(
        tuple(np.tanh([mean, mean - 1.959964 * error, mean + 1.959964 * error])), abs=1e-6
    )


def test_rows_without_a_group_form_one_and_few_units_are_said() -> None:
    x, y, _ = sweep(groups=1, runs=12)
    found = by_group(x, y, ["K=1"] * 6 + [None] * 6)
    assert [name for name, _ in found.groups] == ["K=1", "(none)"]
    alone = by_group(x, y, ["K=1"] * 12)
    assert alone.headline is alone.pooled
    assert alone.simpson is None
    assert "one group only" in (alone.within.restriction or "")


def test_units_across_groups_are_resampled_as_wholes_and_not_exchanged() -> None:
    x, y, setting = sweep()
    found = by_group(x, y, setting, units=np.tile(np.arange(12), 5))
    assert found.within.n_units == 12
    assert found.test.restriction == "units lie in several groups: no permutation within them"


# The best only


def test_in_the_best_takes_the_shares_by_the_selector() -> None:
    draw = np.random.default_rng(0)
    truth = draw.standard_normal(100)
    first, second, metric = (truth + 0.3 * draw.standard_normal(100) for _ in range(3))
    found = in_the_best(metric, second, first)
    for share, n in ((1.0, 100), (0.5, 50), (0.2, 20), (0.1, 10)):
        best = np.argsort(first)[:n]
        assert found[share].n == n
        assert found[share].value == pytest.approx(stats.kendalltau(metric[best], second[best]).statistic)
        assert found[share].restriction is None or "BCa" in (found[share].restriction or "")


def test_selecting_by_the_measurement_itself_is_said() -> None:
    x, y, _ = sweep()
    found = in_the_best(x, y, y, shares=(1, 0.5))
    assert found[1].restriction is None
    assert "selected by the very measurement" in (found[0.5].restriction or "")
    with pytest.raises(ValueError, match=r"use 0\.1 for the best tenth"):
        in_the_best(x, y, y, shares=(10,))
