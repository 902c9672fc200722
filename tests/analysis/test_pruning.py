"""Weights undo what pruning does to an association, in simulations of a known truth."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis import resample
from analysis.pruning import (
    association,
    failure_dependence,
    inverse_probability,
    tau_bounds,
    weighted_tau,
    weighted_within,
)
from analysis.resample import Draws, Estimate, Units

Array = NDArray[np.float64]

TRUTH = 0.5
RHO = math.sin(math.pi * TRUTH / 2)

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4)), min_size=3, max_size=12)


def study(
    seed: int, n: int = 150, pi: float = 0.3, rungs: int = 1
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Metric, final error, probability of a final, and whether a rung's rule stopped the run.

    Metric and error are bivariate normal with tau 0.5. The rule stops the worse half by the metric of those
    that reach a rung; a stopped run goes on, to its final error after the last, with probability pi.
    """
    draw = np.random.default_rng(seed)
    x, noise = draw.standard_normal((2, n))
    y = RHO * x + math.sqrt(1 - RHO**2) * noise
    stopped, probability, there = np.zeros(n, bool), np.ones(n), np.ones(n, bool)
    for _ in range(rungs):
        marked = there & (x > np.median(x[there]))
        probability[marked] *= pi
        there &= ~marked | (draw.random(n) < pi)
        stopped |= marked
    return x, np.where(there, y, np.nan), probability, stopped


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


@pytest.mark.slow
def test_the_default_design_covers_the_truth_with_one_rung_and_says_where_two_leave_too_little() -> None:
    repeats, hits, silent = 500, 0, 0
    for seed in range(repeats):
        one, two = (
            _weighted(*study(seed, pi=0.15, rungs=rungs)[:3], Draws(resamples=499, seed=seed))
            for rungs in (1, 2)
        )
        assert one.low is not None
        assert one.high is not None
        hits += one.low <= TRUTH <= one.high
        within = two.low is not None and two.high is not None and two.low <= TRUTH <= two.high
        silent += not within and two.restriction is None
    assert 0.90 <= hits / repeats <= 0.97
    assert silent / repeats <= 0.05


def _weighted(x: Array, y: Array, probability: Array, draws: Draws) -> Estimate:
    """Weighted tau-b as `association` gives it, without what else it computes."""
    return weighted_within(
        x, y, probability, np.zeros(len(x)), draws=replace(draws, permutations=99)
    ).estimate


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


# Within groups, and tests


@given(
    st.lists(
        st.tuples(*[st.integers(0, 4)] * 2, st.sampled_from([0.2, 0.5, 1.0]), st.booleans()),
        min_size=9,
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None)
def test_weighted_tau_within_groups_is_the_sum_over_their_pairs(
    rows: list[tuple[int, int, float, bool]],
) -> None:
    x, y, pi, final = (np.array(side, dtype=np.float64) for side in zip(*rows, strict=True))
    final = (final > 0) | (pi == 1)
    y[~final] = np.nan
    group = np.arange(len(x)) % 2
    above = below = 0.0
    for label in (0, 1):
        score, in_x, in_y = 0.0, 0.0, 0.0
        for i, j in itertools.combinations(np.flatnonzero(final & (group == label)), 2):
            both = 1 / (pi[i] * pi[j])
            score += both * np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
            in_x += both * (x[i] != x[j])
            in_y += both * (y[i] != y[j])
        above, below = above + score, below + math.sqrt(in_x * in_y)
    draws = Draws(resamples=99, permutations=99)
    found = weighted_within(x, y, pi, group, draws=draws)
    if final.sum() < 5 or below == 0:
        assert (found.estimate.value, found.test.p) == (None, None)
        return
    assert found.estimate.value == pytest.approx(above / below)
    assert (found.estimate.n, found.estimate.n_units) == (final.sum(), final.sum())


def standardised(x: Array, y: Array, w: Array, group: Array) -> float:
    """Weighted score of the pairs within groups, over the root of the sum of squares of the runs' shares."""
    shares = [
        sum(
            w[i] * w[j] * np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
            for j in range(len(x))
            if group[i] == group[j]
        )
        for i in range(len(x))
    ]
    return abs(sum(shares) / 2) / math.sqrt(sum(share**2 for share in shares))


def test_the_p_value_goes_through_all_orders_within_groups() -> None:
    x, y = np.array([1.0, 2, 3, 4, 1, 5, 2, 2]), np.array([3.0, 1, 4, 4, 2, 9, 6, 5])
    pi, group = np.array([1, 0.2, 1, 0.5, 0.2, 1, 1, 0.5]), np.repeat([0, 1], 4)
    values = []
    for a in itertools.permutations(range(4)):
        for b in itertools.permutations(range(4, 8)):
            order = [*a, *b]
            values.append(standardised(x, y[order], 1 / pi[order], group))
    expected = np.mean(np.array(values) >= values[0] - 1e-9)
    found = weighted_within(x, y, pi, group).test
    assert (found.p, found.permutations, found.exact) == (pytest.approx(expected), 576, True)


@pytest.mark.parametrize("stopped_by", ["another", "the metric"])
def test_p_values_of_weighted_associations_are_uniform_without_any(stopped_by: str) -> None:
    """Whether the rule goes by the metric, or by what goes with the error, and settings move both."""
    p = []
    for seed in range(300):
        draw = np.random.default_rng(seed)
        x, other, noise = draw.standard_normal((3, 48))
        setting = np.arange(48) % 3
        by, y = (x, noise) if stopped_by == "the metric" else (other, other + noise)
        probability = np.where(by > np.median(by), 0.3, 1.0)
        final = draw.random(48) < probability
        ranks = (resample.dense_ranks(side[final], 1e-6) for side in (x + setting, y + setting))
        units = Units.of(int(final.sum()), strata=setting[final])
        draws = Draws(permutations=99, seed=seed)
        found = resample.permute_weighted(*ranks, 1 / probability[final], units, draws)
        p.append(found.p)
    share = np.mean(np.array(p) <= 0.1)
    assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 300))


def test_a_weighted_association_that_is_there_is_found() -> None:
    x, y, probability, _ = study(0, n=60)
    found = association(x, y, probability=probability, draws=Draws(resamples=99))
    assert found.test.p is not None
    assert found.test.p < 0.01
    assert association(x, y, draws=Draws(resamples=99)).test.p is None


def test_rows_of_one_unit_are_no_further_evidence() -> None:
    x, y, probability, _ = study(3, n=16, pi=0.5)
    copies = np.repeat(np.arange(16), 3)
    draws = Draws(resamples=99, permutations=999)
    once = weighted_within(x, y, probability, np.zeros(16), draws=draws)
    found = weighted_within(
        x[copies], y[copies], probability[copies], np.zeros(48), units=copies, draws=draws
    )
    assert found.test.n_units == once.test.n_units
    assert found.test.p == pytest.approx(once.test.p, abs=0.05)
    across = weighted_within(
        x[copies], y[copies], probability[copies], np.arange(48) % 2, units=copies, draws=draws
    )
    assert across.test.restriction == "units lie in several groups: no permutation within them"


def test_a_stopped_run_without_a_known_chance_means_no_design() -> None:
    x, y, probability, _ = study(0)
    lost = np.flatnonzero(np.isnan(y))[0]
    for chance in (0.0, np.nan):
        probability[lost] = chance
        assert inverse_probability(probability, y) is None
        found = association(x, y, probability=probability, draws=Draws(resamples=99))
        assert (found.weighted, found.headline.value) == ({}, None)
        within = weighted_within(x, y, probability, np.zeros(150))
        assert (within.estimate.value, within.test.p) == (None, None)
    probability[lost] = 1.5
    with pytest.raises(ValueError, match=r"probability=1\.5 of a stopped run must lie in \[0, 1\)"):
        association(x, y, probability=probability)


def test_finals_that_stand_for_few_of_the_runs_are_said() -> None:
    x, y, probability, _ = study(0)
    y[probability < 1] = np.nan  # by bad luck none of the stopped half went on
    found = association(x, y, probability=probability, draws=Draws(resamples=99)).headline
    assert "the finals stand for 50 % of the runs" in (found.restriction or "")


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


def test_runs_stopped_before_they_had_the_metric_are_missing_from_all_that_remain() -> None:
    x, y, _, _ = study(0, n=60, pi=1.0)
    ended = np.arange(60) < 24
    x[ended], y[ended] = np.nan, np.nan
    found = association(x, y, stopped=ended, draws=Draws(resamples=99))
    assert (found.n_used, found.n_stopped, found.n_unseen, found.n_no_metric) == (36, 24, 24, 0)
    assert found.headline.value is None
    assert found.bounds is None
    assert found.model.value is None
    assert "conditional on survival" in (found.survivors.restriction or "")
    assert found.restriction == "24 runs stopped before the metric was measured"
    # With a design, finals stand for them.
    probability = np.where(ended | (np.arange(60) < 30), 0.2, 1.0)
    weighted = association(x, y, stopped=ended, probability=probability, draws=Draws(resamples=99))
    assert weighted.headline.value == pytest.approx(weighted_tau(x[24:], y[24:], 1 / probability[24:]))
    unknown = np.where(ended, np.nan, 1.0)
    assert association(x, y, stopped=ended, probability=unknown).weighted == {}


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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=6), st.integers(1, 2))
def test_bounds_hold_for_ties_of_the_metric_and_of_known_errors(
    rows: list[tuple[int, int]], missing: int
) -> None:
    """Extremes over all errors of the stopped runs that tie with no other."""
    x, y = np.array(rows, dtype=np.float64).T
    known = y[missing:]
    places = np.concatenate(
        [np.unique(known) - 0.4, np.unique(known) - 0.2, [known.max() + 0.2, known.max() + 0.4]]
    )
    found = tau_bounds(x, [*[np.nan] * missing, *known])
    if np.ptp(x) == 0:
        assert found is None
        return
    taus = [
        stats.kendalltau(x, [*values, *known]).statistic for values in itertools.permutations(places, missing)
    ]
    assert found == pytest.approx((min(taus), max(taus)))


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
