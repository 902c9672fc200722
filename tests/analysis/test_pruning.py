"""Weights undo what pruning does to an association, in simulations of a known truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis import resample
from analysis.pruning import (
    association,
    completion_probability,
    failure_dependence,
    tau_bounds,
    weighted_tau,
)
from analysis.resample import Draws

Array = NDArray[np.float64]

TRUTH = 0.5
RHO = math.sin(math.pi * TRUTH / 2)

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4)), min_size=3, max_size=12)


def study(seed: int, n: int = 150, pi: float = 0.3) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Metric, final error, probability of a final, and whether the rung's rule stopped the run.

    Metric and error are bivariate normal with tau 0.5. The rule stops the worse half by the metric; a stopped
    run goes on to its final error with probability pi.
    """
    draw = np.random.default_rng(seed)
    x, noise = draw.standard_normal((2, n))
    y = RHO * x + math.sqrt(1 - RHO**2) * noise
    stopped = x > np.median(x)
    probability = np.where(stopped, pi, 1.0)
    y[draw.random(n) >= probability] = np.nan
    return x, y, probability, stopped


# The estimator


@given(pairs)
def test_equal_weights_give_tau_b_and_their_size_does_not_matter(rows: list[tuple[int, int, int]]) -> None:
    x, y, w = np.array(rows, dtype=np.float64).T
    plain = weighted_tau(x, y, np.full(len(x), 0.7))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert plain is None
        return
    assert plain == pytest.approx(stats.kendalltau(x, y).statistic)
    assert weighted_tau(x, y, 2 * w) == pytest.approx(weighted_tau(x, y, w))


@given(pairs)
def test_weighted_tau_is_the_sum_over_pairs(rows: list[tuple[int, int, int]]) -> None:
    x, y, w = np.array(rows, dtype=np.float64).T
    above = in_x = in_y = 0.0
    for i, j in itertools.combinations(range(len(x)), 2):
        both = w[i] * w[j]
        above += both * np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        in_x += both * (x[i] != x[j])
        in_y += both * (y[i] != y[j])
    found = weighted_tau(x, y, w)
    assert found == (None if in_x * in_y == 0 else pytest.approx(above / math.sqrt(in_x * in_y)))


def test_weighted_tau_checks_its_input() -> None:
    with pytest.raises(ValueError, match="give one weight per pair"):
        weighted_tau([1, 2], [1, 2], [1])
    with pytest.raises(ValueError, match="weights not negative"):
        weighted_tau([1, 2], [1, 2], [1, -1])


# The simulation


def test_survivors_underestimate_and_weights_recover_the_truth() -> None:
    repeats = 500
    naive, weighted, hits = np.empty(repeats), np.empty(repeats), 0
    for seed in range(repeats):
        x, y, probability, stopped = study(seed)
        survived = ~stopped
        naive[seed] = stats.kendalltau(x[survived], y[survived]).statistic
        found = _weighted_only(x, y, probability, Draws(resamples=499, seed=seed))
        weighted[seed] = found[0]
        hits += found[1] <= TRUTH <= found[2]
    error = weighted.std(ddof=1) / math.sqrt(repeats)
    assert naive.mean() < TRUTH - 0.1
    assert weighted.mean() == pytest.approx(TRUTH, abs=4 * error)
    assert 0.92 <= hits / repeats <= 0.97


def _weighted_only(x: Array, y: Array, probability: Array, draws: Draws) -> tuple[float, float, float]:
    """Weighted tau and its interval by the parts that `association` is made of."""
    final = np.isfinite(y)
    weights = np.where(final, 1 / probability, 0.0)
    ranks = resample.dense_ranks(x, 1e-6), resample.dense_ranks(np.where(final, y, 0.0), 1e-6)
    found = resample.estimate(resample.tau_kernel(*ranks, weights), resample.Units.of(len(x)), "tau", draws)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


def test_the_parts_above_are_those_of_the_association() -> None:
    x, y, probability, _ = study(0)
    draws = Draws(resamples=499, seed=3)
    found = association(x, y, probability=probability, draws=draws).headline
    assert (found.value, found.low, found.high) == _weighted_only(x, y, probability, draws)


@pytest.mark.slow
def test_all_weighted_associations_and_the_audit_subset_hold_the_truth() -> None:
    truth = {"tau_b": TRUTH, "spearman": 6 / math.pi * math.asin(RHO / 2), "pearson": RHO}
    hits = dict.fromkeys((*truth, "audit", "model"), 0)
    repeats = 500
    for seed in range(repeats):
        x, y, probability, _ = study(seed, n=200)
        audit = np.random.default_rng(seed + 10**6).random(200) < 0.2
        full = study(seed, n=200, pi=1.0)[1]
        y, probability = np.where(audit, full, y), np.where(audit, 1.0, probability)
        # Marginal over the audit draw, a stopped run finishes with probability 0.2 + 0.8 x 0.3.
        probability = np.where(x > np.median(x), 0.2 + 0.8 * 0.3, 1.0)
        found = association(x, y, probability=probability, audit=audit, draws=Draws(resamples=499, seed=seed))
        for name, one in {**found.weighted, "audit": found.audit, "model": found.model}.items():
            assert one.low is not None
            assert one.high is not None
            hits[name] += one.low <= truth.get(name, TRUTH) <= one.high
    assert all(0.91 <= hit / repeats <= 0.98 for hit in hits.values()), hits


# What a study says


def test_a_design_gives_the_headline_and_the_effective_number() -> None:
    x, y, probability, _ = study(1)
    found = association(x, y, probability=probability)
    w = 1 / probability[np.isfinite(y)]
    assert found.headline == found.weighted["tau_b"]
    assert found.effective_n == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert (found.n_total, found.n_used, found.n_stopped) == (150, len(w), 150 - len(w))
    assert found.headline.n == len(w)
    final = np.isfinite(y)
    assert found.survivors.value == pytest.approx(stats.kendalltau(x[final], y[final]).statistic)
    assert "conditional on survival" in (found.survivors.restriction or "")


def test_weighted_pearson_and_spearman_agree_with_copies_of_rows() -> None:
    x, y, probability, _ = study(2, pi=0.25)
    final = np.isfinite(y)
    copies = np.repeat(np.flatnonzero(final), np.rint(1 / probability[final]).astype(int))
    found = association(x, y, probability=probability).weighted
    assert found["pearson"].value == pytest.approx(stats.pearsonr(x[copies], y[copies]).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x[copies], y[copies]).statistic)


def test_without_a_design_there_is_no_headline() -> None:
    x, y, _, _ = study(0)
    found = association(x, y)
    assert found.headline.value is None
    assert "without recorded probabilities" in (found.headline.restriction or "")
    assert found.weighted == {}
    assert found.survivors.value is not None
    assert found.bounds is not None
    assert found.bounds[0] < found.survivors.value < found.bounds[1]
    assert found.model.method.startswith("Kendall's tau-b, model-based (bivariate normal")


def test_without_pruning_the_headline_is_plain() -> None:
    x, y, _, _ = study(0, pi=1.0)
    found = association(x, y)
    assert found.headline == found.survivors
    assert found.headline.restriction is None
    assert found.bounds == pytest.approx((stats.kendalltau(x, y).statistic,) * 2)
    assert found.model.value is None
    assert found.audit.restriction == "no audit subset"
    assert association(x, y, probability=np.ones(150)).headline.value == pytest.approx(found.headline.value)


def test_the_model_undoes_selection_where_it_holds() -> None:
    x, y, _, stopped = study(5, n=3_000)
    y[stopped] = np.nan
    found = association(x, y, draws=Draws(resamples=99))
    assert found.survivors.value is not None
    assert found.survivors.value < 0.36
    assert found.model.value == pytest.approx(TRUTH, abs=0.04)


def test_all_stopped_says_so() -> None:
    x = np.arange(10.0)
    found = association(x, np.full(10, np.nan), probability=np.full(10, 0.2))
    assert found.headline.value is None
    assert found.headline.restriction == "0 independent units with a final error, fewer than 5"
    assert found.restriction == "all runs were stopped"
    assert found.effective_n is None
    assert found.bounds == (-1, 1)


def test_failed_runs_and_missing_metrics_are_counted_apart() -> None:
    x, y, probability, _ = study(0)
    x[:3], y[3:7] = np.nan, np.nan
    failed = np.arange(150) // 4 == 1
    found = association(
        x, y, probability=np.where(failed, np.nan, np.minimum(probability, 0.99)), failed=failed
    )
    assert (found.n_total, found.n_no_metric, found.n_failed) == (150, 3, 4)
    assert found.n_used + found.n_stopped == 143
    assert "4 failed runs left out" in (found.restriction or "")


def test_an_audit_subset_is_unweighted_and_must_be_complete() -> None:
    x, y, _, _ = study(0, pi=1.0)
    audit = np.arange(150) < 40
    y[60:] = np.nan
    found = association(x, y, audit=audit).audit
    assert found.value == pytest.approx(stats.kendalltau(x[:40], y[:40]).statistic)
    assert found.restriction is None
    y[:2] = np.nan
    assert "2 runs of the audit subset without" in (association(x, y, audit=audit).audit.restriction or "")


def test_a_few_heavy_weights_are_said() -> None:
    x, y, _, _ = study(0, n=30, pi=1.0)
    found = association(x, y, probability=np.where(np.arange(30) < 3, 0.001, 1.0))
    assert found.effective_n is not None
    assert found.effective_n < 4
    assert "effective runs" in (found.headline.restriction or "")


@pytest.mark.parametrize("wrong", [0.0, np.nan, 1.5])
def test_probabilities_of_finals_are_checked(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        association([1, 2, 3], [1, 2, 3], probability=[1, wrong, 1])


def test_a_certain_final_must_be_there() -> None:
    with pytest.raises(ValueError, match="has probability 1, so it should have one"):
        association([1, 2, 3], [1, np.nan, 3], probability=[1, 1, 1])


def test_probabilities_of_rungs_multiply() -> None:
    found = completion_probability([[1, 1], [0.15, 1], [0.15, 0.2], [0.15, np.nan]])
    assert found == pytest.approx([1, 0.15, 0.03, 0.15])
    with pytest.raises(ValueError, match=r"probability 0\.0 must lie in"):
        completion_probability([[0.0]])


# Bounds


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)), st.permutations(range(5)), st.integers(1, 2))
def test_bounds_are_the_extremes_over_all_orders(x: list[int], y: list[int], missing: int) -> None:
    known = np.array(y[missing:], dtype=np.float64)
    places = np.concatenate([known - 0.4, known - 0.2, known + 0.2, known + 0.4])
    taus = [
        stats.kendalltau(x, [*values, *known]).statistic for values in itertools.permutations(places, missing)
    ]
    assert (min(taus), max(taus)) == pytest.approx(tau_bounds(x, [*[np.nan] * missing, *known]))


def test_bounds_without_a_spread_of_the_metric_do_not_exist() -> None:
    assert tau_bounds([1, 1, 1], [1, 2, np.nan]) is None


# Failures


def test_failing_by_config_is_found_and_failing_at_random_is_not() -> None:
    channels = np.repeat([16, 32, 64], 20)
    seed = np.tile(np.arange(20), 3)
    failed = (channels == 64) & (seed < 12)
    tests, found = failure_dependence(failed, {"channels": channels, "seed": seed, "data": ["cifar10"] * 60})
    table = [[20, 0], [20, 0], [8, 12]]
    assert tests["channels"].p is not None
    assert tests["channels"].p <= 0.001
    assert stats.chi2_contingency(table).pvalue < 0.001
    assert tests["seed"].p is not None
    assert tests["seed"].p > 0.05
    assert tests["data"].restriction == "one value only"
    assert found.n_tests == 2
    assert failure_dependence(np.zeros(60, bool), {"channels": channels})[0]["channels"].p is None


def test_p_of_failure_agrees_with_fishers_exact_test() -> None:
    failed = np.array([1] * 5 + [0] * 7 + [1] * 1 + [0] * 7, dtype=bool)
    arm = ["a"] * 12 + ["b"] * 8
    tests, _ = failure_dependence(failed, {"arm": arm})
    # Of all tables with these margins, those at least as far from independence; of 2 x 2 that is a tail sum.
    totals = stats.hypergeom(20, 6, 12)
    far = [k for k in range(7) if abs(k - 3.6) >= abs(5 - 3.6) - 1e-9]
    assert tests["arm"].p == pytest.approx(totals.pmf(far).sum(), abs=0.02)
