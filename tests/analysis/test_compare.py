"""The statistics agree with numbers computed by hand, with scipy and with simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis.compare import (
    Difference,
    benjamini_hochberg,
    compare_arms,
    difference,
    equivalence,
    family,
    holm,
    mean_interval,
    paired_difference,
    relative_improvement,
    relative_improvement_interval,
    reproduction,
    verdict,
)
from analysis.resample import Draws

A = [97.2, 97.4, 97.3, 97.5]
B = [97.0, 97.1, 96.9, 97.2]

samples = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=8)


def with_spread(n: int, mean: float = 0.0, spread: float = 1.0) -> NDArray[np.float64]:
    """A sample of exactly this mean and standard deviation."""
    raw = np.arange(n, dtype=np.float64)
    sample: NDArray[np.float64] = mean + spread * (raw - raw.mean()) / raw.std(ddof=1)
    return sample


# Means


@given(samples, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_mean_is_students(values: list[float], level: float) -> None:
    found = mean_interval(values, level)
    assert found.mean == pytest.approx(np.mean(values))
    if np.ptp(values) == 0:
        assert (found.low, found.high, found.reason) == (None, None, f"{len(values)} equal runs")
    else:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_one_run_has_a_mean_and_no_interval() -> None:
    found = mean_interval([0.25])
    assert (found.mean, found.low, found.high, found.n, found.reason) == (0.25, None, None, 1, "one run")


def test_no_run_has_no_mean() -> None:
    found = mean_interval([])
    assert (found.mean, found.low, found.n, found.reason) == (None, None, 0, "no finished run")


def test_equal_runs_that_differ_in_the_last_bits_have_no_interval() -> None:
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]).reason == "3 equal runs"


def test_values_that_are_not_finite_and_wrong_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([0.1, math.nan])
    with pytest.raises(ValueError, match=r"level=95 is not between 0 and 1; use 0\.95"):
        mean_interval(A, level=95)


# Differences


def test_difference_computed_by_hand() -> None:
    found = difference(A, B)
    assert found.mean_difference == pytest.approx(0.3)
    assert (found.t, found.df) == pytest.approx((3.286335, 6), abs=5e-7)
    assert found.p == pytest.approx(0.016690, abs=5e-7)
    assert found.cohens_d == pytest.approx(2.323790, abs=5e-7)
    assert found.hedges_g == pytest.approx(2.020687, abs=5e-7)
    assert found.a12 == 0.96875
    assert found.cliff_delta == 0.9375
    # t = 3.286335 at 6 degrees of freedom, so the standard error is 0.3 / t and the margin 2.446912 of them.
    margin = 2.446912 * 0.3 / 3.286335
    assert (found.low, found.high) == pytest.approx((0.3 - margin, 0.3 + margin), abs=1e-6)


# One side may be constant, which scipy warns of and Welch's test allows.
@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
@given(samples, samples)
def test_difference_agrees_with_scipy(a: list[float], b: list[float]) -> None:
    found = difference(a, b)
    assert found.a12 == pytest.approx(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    if np.ptp(a) == np.ptp(b) == 0:
        assert found.p is None
        return
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert found.p == pytest.approx(test.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high))


@given(samples, samples)
def test_swapping_the_sides_changes_signs_only(a: list[float], b: list[float]) -> None:
    one, two = difference(a, b), difference(b, a)
    assert one.mean_difference == -two.mean_difference
    assert one.a12 == pytest.approx(1 - two.a12)
    assert one.minimum_detectable == (None if two.p is None else pytest.approx(two.minimum_detectable))
    if one.low is not None and two.high is not None and one.hedges_g is not None and two.hedges_g is not None:
        assert one.low == pytest.approx(-two.high)
        assert one.hedges_g == pytest.approx(-two.hedges_g)


def test_effect_sizes_ignore_the_unit_and_the_detectable_difference_has_it() -> None:
    fraction = difference([0.031, 0.035, 0.034], [0.041, 0.039, 0.045, 0.040])
    percent = difference([3.1, 3.5, 3.4], [4.1, 3.9, 4.5, 4.0])
    assert (percent.p, percent.hedges_g, percent.a12) == pytest.approx(
        (fraction.p, fraction.hedges_g, fraction.a12)
    )
    assert fraction.minimum_detectable is not None
    assert percent.minimum_detectable == pytest.approx(100 * fraction.minimum_detectable)


def test_ties_within_the_resolution_count_half() -> None:
    assert difference([0.3, 0.5], [0.1 + 0.2, 0.2]).a12 == 0.875


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([0.1], [0.2, 0.3], "one run on a side"),
        ([0.1], [0.2], "one run on each side"),
        ([0.1, 0.1], [0.2, 0.2], "equal runs on each side"),
    ],
)
def test_without_a_spread_only_the_difference_and_a12_are_known(
    a: list[float], b: list[float], reason: str
) -> None:
    found = difference(a, b)
    assert found.reason == reason
    assert found.mean_difference == pytest.approx(np.mean(a) - np.mean(b))
    assert found.a12 == 0.0
    assert found.low is found.high is found.p is found.hedges_g is found.minimum_detectable is None


def test_a_side_without_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="n_a=0, n_b=2: a difference needs a run on both sides"):
        difference([], [1.0, 2.0])


# Minimum detectable difference


def detectable(n_a: int, n_b: int | None = None) -> float:
    found = difference(with_spread(n_a), with_spread(n_b or n_a, mean=3.0)).minimum_detectable
    assert found is not None
    return found


@pytest.mark.parametrize(("n", "shift"), [(17, 1.0), (6, 2.0)])
def test_runs_needed_per_arm_for_a_difference_in_standard_deviations(n: int, shift: float) -> None:
    assert detectable(n) <= shift < detectable(n - 1)


def test_four_runs_per_arm_detect_two_standard_deviations_and_a_third() -> None:
    assert detectable(4) == pytest.approx(2.38, abs=0.005)


@pytest.mark.parametrize(("n_a", "n_b", "spread_a"), [(3, 3, 1.0), (2, 2, 1.0), (5, 3, 1.0), (8, 8, 3.0)])
def test_the_detectable_difference_is_found_four_times_in_five(n_a: int, n_b: int, spread_a: float) -> None:
    # Draws of Welch's statistic, its degrees of freedom those of the sample.
    error = math.sqrt(spread_a**2 / n_a + 1 / n_b)
    found = difference(with_spread(n_a, spread=spread_a), with_spread(n_b))
    assert found.minimum_detectable is not None
    df = error**4 / ((spread_a**2 / n_a) ** 2 / (n_a - 1) + (1 / n_b) ** 2 / (n_b - 1))
    draw = np.random.default_rng(0)
    runs = 100_000
    t = (found.minimum_detectable / error + draw.standard_normal(runs)) / np.sqrt(
        draw.chisquare(df, runs) / df
    )
    found_share = np.mean(2 * stats.t.sf(np.abs(t), df) < 0.05)
    assert found_share == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / runs))


# Several claims


def test_holm_computed_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float], alpha: float) -> None:
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_not_a_p_value(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        holm([0.5, wrong])


LOWER, HIGHER = difference(B, A), difference(A, B)


@pytest.mark.parametrize(
    ("result", "adjusted_p", "claim", "expected"),
    [
        (LOWER, 0.02, "lower", "supported"),
        (HIGHER, 0.02, "lower", "not supported"),
        (HIGHER, 0.02, "higher", "supported"),
        (LOWER, 0.02, "higher", "not supported"),
        (LOWER, 0.05, "lower", "undecided at n=4"),
        (HIGHER, 0.2, "lower", "undecided at n=4"),
        (difference([0.1], [0.2, 0.3]), None, "lower", "undecided at n=1 and 2"),
    ],
)
def test_verdicts(result: Difference, adjusted_p: float | None, claim: str, expected: str) -> None:
    assert verdict(result, adjusted_p, claim) == expected  # type: ignore[arg-type]


def test_a_supported_claim_has_an_interval_without_zero() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        result = difference(draw.normal(0, 1, 4), draw.normal(1.5, 2, 5))
        assert result.p is not None
        assert result.low is not None
        assert result.high is not None
        decided = verdict(result, result.p) != "undecided at n=4 and 5"
        assert decided == (not result.low <= 0 <= result.high)


# Relative improvement


def test_relative_improvement_computed_by_hand() -> None:
    assert relative_improvement(A, B) == pytest.approx(0.309119, abs=5e-7)


def test_relative_improvement_needs_runs_and_a_positive_denominator() -> None:
    with pytest.raises(ValueError, match="positive mean accuracy"):
        relative_improvement([90.0], [0.0])
    with pytest.raises(ValueError, match="runs on both sides"):
        relative_improvement([], [90.0])


def test_relative_improvement_has_an_interval_that_resamples_both_sides() -> None:
    draw = np.random.default_rng(0)
    method, random = 97.3 + 0.1 * draw.standard_normal(8), 97.0 + 0.3 * draw.standard_normal(8)
    found = relative_improvement_interval(method, random)
    assert found.percent.value == pytest.approx(relative_improvement(method, random))
    assert (found.method_mean, found.random_mean) == pytest.approx((method.mean(), random.mean()))
    means = [draw.choice(side, (20_000, 8)).mean(axis=1) for side in (method, random)]
    expected = np.quantile(100 * (means[0] / means[1] - 1), [0.025, 0.975])
    assert (found.percent.low, found.percent.high) == pytest.approx(tuple(expected), abs=0.03)
    assert found.percent.restriction == (
        "8 units of a sample are too few for BCa: percentile interval, which may be too narrow"
    )
    assert relative_improvement_interval(A, B).percent.low is None
    few = relative_improvement_interval([*A, 97.6], [*B, 97.3]).percent
    assert "fewer than the 8 runs" in (few.restriction or "")


# Two arms in every way


def test_a_comparison_computed_by_hand() -> None:
    found = compare_arms(A, B)
    assert found.u == 15.5
    assert found.difference.t == pytest.approx(3.286335, abs=5e-7)
    assert found.difference.df == pytest.approx(6)
    assert found.difference.cohens_d == pytest.approx(2.323790, abs=5e-7)
    assert found.a12.value == 0.96875
    assert found.bootstrap.value == pytest.approx(0.3)
    assert found.bootstrap.restriction == "fewer than 5 runs in an arm: no bootstrap interval"


@settings(max_examples=40, deadline=None)
@given(samples, samples)
@example([0.0, 0.0, 0.03, 0.033, 0.282], [0.0, 0.0, 0.0, 0.036, 0.312])  # 0.282 + 0.03 + 0.033 is a tie
def test_tests_of_two_arms_agree_with_scipy(a: list[float], b: list[float]) -> None:
    found = compare_arms(a, b, Draws(resamples=99))
    expected = stats.mannwhitneyu(a, b)
    assert found.u == pytest.approx(expected.statistic)
    assert found.p_mann_whitney == pytest.approx(expected.pvalue)
    pooled = np.array([*a, *b])
    sums = [sum(pooled[list(part)]) for part in itertools.combinations(range(len(pooled)), len(a))]
    above, below = np.mean(np.array(sums) >= sum(a) - 1e-9), np.mean(np.array(sums) <= sum(a) + 1e-9)
    assert found.p_permutation == pytest.approx(min(1, 2 * min(above, below)))
    if found.p_brunner_munzel is not None:
        assert found.p_brunner_munzel == pytest.approx(stats.brunnermunzel(a, b).pvalue)


def test_arms_wholly_apart_have_no_brunner_munzel() -> None:
    found = compare_arms([1.0, 2, 3], [4.0, 5, 6])
    assert (found.p_brunner_munzel, found.difference.a12) == (None, 0)


def test_bootstrap_intervals_of_arms_agree_with_scipys() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.exponential(size=15), 1 + draw.exponential(size=12)
    found = compare_arms(a, b)
    reference = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        rng=np.random.default_rng(0),
    ).confidence_interval
    # scipy's jackknife of two samples leaves out one run of one, too: ends differ by the draws only.
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx(tuple(reference), abs=0.03)
    assert found.a12.low is not None
    assert found.a12.value is not None
    assert found.a12.low < found.a12.value


@pytest.mark.parametrize(("n_a", "n_b", "bca"), [(5, 5, False), (20, 9, False), (10, 10, True)])
def test_the_smaller_arm_decides_whether_there_are_enough_runs(n_a: int, n_b: int, bca: bool) -> None:
    draw = np.random.default_rng(0)
    found = compare_arms(draw.standard_normal(n_a), draw.standard_normal(n_b), Draws(resamples=199))
    for one in (found.bootstrap, found.a12):
        assert ("BCa bootstrap" in one.method) == bca
        few = f"{min(n_a, n_b)} units of a sample are too few for BCa: percentile interval"
        assert one.restriction is None if bca else few in (one.restriction or "")


def test_one_bad_run_separates_the_mean_from_a12() -> None:
    found = compare_arms([3.0, 3.1, 3.2, 3.3, 3.0, 9.0], [3.4, 3.5, 3.6, 3.7, 3.5, 3.4])
    assert found.difference.mean_difference > 0
    assert found.difference.a12 < 0.2


def test_one_run_on_a_side_is_compared_without_a_verdict() -> None:
    found = compare_arms([0.1], [0.2, 0.3])
    assert found.difference.reason == "one run on a side"
    assert (found.p_brunner_munzel, found.p_permutation, found.bootstrap.low) == (None, None, None)


# Pairs


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=8))
def test_pairs_agree_with_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=np.float64).T / 10
    found = paired_difference(a, b, Draws(resamples=99))
    gaps = a - b
    assert found.mean_difference == pytest.approx(gaps.mean())
    assert found.share_higher == pytest.approx(np.mean((gaps > 1e-9) + 0.5 * (abs(gaps) < 1e-9)))
    if np.ptp(gaps) < 1e-9:
        assert (found.p, found.low) == (None, None)
        assert found.reason is not None
        return
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval()
    assert (found.t, found.p) == pytest.approx((test.statistic, test.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    flips = np.array(list(itertools.product([-1, 1], repeat=len(gaps)))) @ gaps
    above, below = np.mean(flips >= gaps.sum() - 1e-9), np.mean(flips <= gaps.sum() + 1e-9)
    assert found.p_permutation == pytest.approx(min(1, 2 * min(above, below)))


def test_pairs_remove_what_both_sides_share() -> None:
    draw = np.random.default_rng(0)
    seed = draw.standard_normal(8)
    a, b = seed + 0.2 + 0.1 * draw.standard_normal(8), seed
    apart, paired = difference(a, b), paired_difference(a, b)
    assert apart.p is not None
    assert paired.p is not None
    assert paired.p < 0.01 < 0.3 < apart.p
    assert paired.bootstrap.n_units == 8


def test_wilcoxon_is_of_the_differences() -> None:
    a, b = [3.1, 3.4, 2.9, 3.8, 3.3, 3.7], [3.0, 3.1, 3.1, 3.2, 2.8, 3.3]
    gaps = np.round(np.subtract(a, b), 6)  # 3.4 - 3.1 and 3.1 - 2.8 are one tie
    assert paired_difference(a, b).p_wilcoxon == pytest.approx(stats.wilcoxon(gaps).pvalue, abs=1e-12)


def test_pairs_need_two_sides_of_one_length() -> None:
    with pytest.raises(ValueError, match="as many runs on both sides"):
        paired_difference([1, 2], [1])
    assert paired_difference([1.0], [2.0]).reason == "one pair"
    assert paired_difference([1.0, 2.0], [0.5, 1.5]).reason == "2 equal differences"


# Equivalence


@settings(max_examples=40, deadline=None)
@given(samples, samples, st.sampled_from([0.02, 0.2, 1.0]))
def test_equivalence_is_two_one_sided_tests(a: list[float], b: list[float], margin: float) -> None:
    found = equivalence(a, b, margin)
    if found.p is None:
        assert found.verdict == "undecided"
        assert found.reason == "equal runs on each side"
        return
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return  # scipy warns of the side without spread
    above = stats.ttest_ind(np.array(a) + margin, b, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(np.array(a) - margin, b, equal_var=False, alternative="less").pvalue
    assert found.p == pytest.approx(max(above, below), abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    inside = -margin < found.low and found.high < margin
    assert (found.verdict == "equivalent") == inside
    assert (found.verdict == "different") == (found.low > margin or found.high < -margin)


def test_no_difference_shown_is_not_equivalence() -> None:
    few = equivalence([3.0, 3.4, 2.8], [3.1, 3.3, 2.9])
    assert few.verdict == "undecided"
    many = equivalence(with_spread(50, 3.0, 0.1), with_spread(50, 3.01, 0.1))
    assert many.verdict == "equivalent"
    assert equivalence(with_spread(50, 3.0, 0.1), with_spread(50, 4.0, 0.1)).verdict == "different"
    with pytest.raises(ValueError, match="margin=0 must be positive"):
        equivalence(A, B, margin=0)


def test_equivalence_of_pairs() -> None:
    a, b = np.array([3.0, 3.4, 2.8, 3.9]), np.array([3.01, 3.38, 2.8, 3.91])
    assert equivalence(a, b).verdict == "undecided"
    found = equivalence(a, b, paired=True)
    assert found.verdict == "equivalent"
    above = stats.ttest_rel(a + 0.1, b, alternative="greater").pvalue
    below = stats.ttest_rel(a - 0.1, b, alternative="less").pvalue
    assert found.p == pytest.approx(max(above, below))
    assert equivalence([1.0], [1.0], paired=True).reason == "one pair"


# Reproductions


def test_a_reproduction_computed_by_hand() -> None:
    # Mean 97.35, sd 0.129099, t(3) = 3.182446: the margin of a new run is 3.182446 x 0.129099 x sqrt(1.25).
    found = reproduction(A, 97.43, published_sd=0.07, published_n=4)
    assert found.difference == pytest.approx(-0.08)
    assert found.high == pytest.approx(97.35 + 3.182446 * 0.129099 * math.sqrt(1.25), abs=1e-5)
    assert found.inside is True
    assert found.z == pytest.approx(-0.08 / (0.07 * math.sqrt(1 / 4 + 1 / 4)))
    assert reproduction(A, 98).inside is False


def test_a_prediction_interval_holds_a_new_run_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = [reproduction(sample[:4], sample[4]).inside for sample in draw.standard_normal((2000, 5))]
    assert np.mean(hits) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_a_reproduction_of_one_run_has_no_interval() -> None:
    found = reproduction([97.0], 97.4, 0.1, 10)
    assert (found.inside, found.reason) == (None, "one run")
    assert found.z == pytest.approx(-0.4 / (0.1 * math.sqrt(1.1)))
    with pytest.raises(ValueError, match="give both or neither"):
        reproduction(A, 97.4, 0.1)


# Families


def test_benjamini_hochberg_computed_by_hand() -> None:
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert benjamini_hochberg([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.booleans())
def test_benjamini_hochberg_is_its_step_up_procedure(p_values: list[float], dependent: bool) -> None:
    n = len(p_values)
    factor = n * (sum(1 / i for i in range(1, n + 1)) if dependent else 1)
    ordered = sorted(p_values)
    expected = [
        min(1, min(factor * ordered[j] / (j + 1) for j in range(n) if ordered[j] >= p)) for p in p_values
    ]
    assert benjamini_hochberg(p_values, dependent) == pytest.approx(expected)


def test_a_family_counts_only_tests_that_have_a_p_value() -> None:
    found = family({"a": 0.01, "b": None, "c": 0.04}, "primary")
    assert found.adjusted == (0.02, None, 0.04)
    assert (found.n_tests, found.method) == (2, "Holm")
    assert family({"a": 0.01, "b": 0.04}, "exploratory").adjusted == pytest.approx((0.02, 0.04))
    assert family({"a": 0.01, "b": 0.04}, "dependent").method == "Benjamini-Yekutieli"
    assert family({}, "primary").n_tests == 0
