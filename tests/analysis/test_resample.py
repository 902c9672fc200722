"""Intervals and permutation tests agree with scipy, with brute force and with their promised coverage."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis import resample
from analysis.resample import Draws, Estimate, Permutation, Units, dense_ranks

Kind = str

ties = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=9)


def correlated(n: int, rho: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, rho * x + np.sqrt(1 - rho**2) * noise


# Kernels: a whole number as weight stands for as many copies of the row


@given(ties)
def test_weights_of_kernels_are_copies_of_rows(rows: list[tuple[int, int, int]]) -> None:
    x, y, times = np.array(rows, dtype=np.float64).T
    copies_x, copies_y = (np.repeat(side, times.astype(int)) for side in (x, y))
    a, b = dense_ranks(x, 1e-6), dense_ranks(y, 1e-6)
    found = {
        "tau": resample.tau_kernel(a, b)(times[None])[0],
        "rho": resample.spearman_kernel(a, b)(times[None])[0],
        "r": resample.pearson_kernel(x, y)(times[None])[0],
    }
    if len(np.unique(copies_x)) < 2 or len(np.unique(copies_y)) < 2:
        assert all(np.isnan(value) for value in found.values())
        return
    assert found["tau"] == pytest.approx(stats.kendalltau(copies_x, copies_y).statistic)
    assert found["rho"] == pytest.approx(stats.spearmanr(copies_x, copies_y).statistic)
    assert found["r"] == pytest.approx(stats.pearsonr(copies_x, copies_y).statistic)


@given(ties)
def test_weights_of_middles_are_copies_of_values(rows: list[tuple[int, int, int]]) -> None:
    values, _, times = np.array(rows, dtype=np.float64).T
    copies = np.repeat(values, times.astype(int))
    found = [
        make(values)(times[None])[0]
        for make in (resample.mean_kernel, resample.median_kernel, resample.trimmed_mean_kernel)
    ]
    if not len(copies):
        assert np.isnan(found).all()
        return
    expected = [copies.mean(), np.median(copies), stats.trim_mean(copies, 0.25)]
    assert found == pytest.approx(expected)


def test_tau_in_blocks_is_tau() -> None:
    x, y = correlated(4500, 0.3)
    x, y = np.round(x, 1), np.round(y, 1)
    kernel = resample.tau_kernel(dense_ranks(x, 1e-6), dense_ranks(y, 1e-6))
    weights = np.random.default_rng(0).integers(0, 3, (2, len(x))).astype(np.float64)
    for row in weights:
        copies = np.repeat(np.arange(len(x)), row.astype(int))
        assert kernel(row[None])[0] == pytest.approx(
            stats.kendalltau(x[copies], y[copies]).statistic, abs=1e-12
        )


# Intervals


@pytest.mark.parametrize("kind", ["tau_b", "spearman", "pearson"])
def test_bca_intervals_agree_with_scipys(kind: Kind) -> None:
    x, y = correlated(40, 0.7)
    a, b = dense_ranks(x, 1e-6), dense_ranks(y, 1e-6)
    kernel, statistic = {
        "tau_b": (resample.tau_kernel(a, b), stats.kendalltau),
        "spearman": (resample.spearman_kernel(a, b), stats.spearmanr),
        "pearson": (resample.pearson_kernel(x, y), stats.pearsonr),
    }[kind]
    found = resample.estimate(kernel, Units.of(40), kind)
    draws = [
        resample.estimate(kernel, Units.of(40), kind, Draws(seed=seed, resamples=1999))
        for seed in range(1, 6)
    ]
    reference = stats.bootstrap(
        (x, y),
        lambda u, v: statistic(u, v).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1999,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # Both draw at random: within five standard errors of an end, seen between seeds.
    for end in ("low", "high"):
        spread = np.std([getattr(one, end) for one in draws], ddof=1)
        assert getattr(found, end) == pytest.approx(getattr(reference, end), abs=5 * spread)
    assert found.value == pytest.approx(statistic(x, y).statistic)
    assert found.method == f"{kind}; BCa bootstrap, 9,999 resamples of 40 units"


def test_bca_ends_follow_efrons_formula() -> None:
    draw = np.random.default_rng(0)
    values = draw.exponential(size=30)
    draws = draw.choice(values, (5000, 30)).mean(axis=1)
    deleted = np.array([np.delete(values, index).mean() for index in range(30)])
    z0 = stats.norm.ppf(np.mean(draws < values.mean()))
    influence = deleted.mean() - deleted
    a = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    z = stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(draws, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))
    assert resample.bca_ends(values.mean(), draws, deleted, 0.95) == pytest.approx(tuple(expected))


def test_draws_that_tie_with_the_value_count_half_below_it() -> None:
    draws, deleted = np.repeat([-1.0, 0.0, 1.0], 40), np.array([-0.1, 0.0, 0.1])
    low, high = np.quantile(draws, [0.2, 0.8])
    assert resample.bca_ends(0.0, draws, deleted, 0.6) == pytest.approx((low, high))
    uneven = np.concatenate([draws, np.linspace(-2, 2, 81)])
    assert resample.bca_ends(0.0, uneven, deleted, 0.6) == pytest.approx(
        tuple(np.quantile(uneven, [0.2, 0.8])), abs=1e-9
    )


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_intervals_of_tau_hold_the_truth_about_as_often_as_they_say(rho: float) -> None:
    truth, hits, repeats = 2 / np.pi * np.arcsin(rho), 0, 400
    for seed in range(repeats):
        x, y = correlated(40, rho, seed)
        kernel = resample.tau_kernel(dense_ranks(x, 1e-6), dense_ranks(y, 1e-6))
        found = resample.estimate(kernel, Units.of(40), "tau", Draws(resamples=499, seed=seed))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    # 95 %, within four standard errors of the simulation and a point for the few units.
    assert hits / repeats == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / repeats) + 0.01)


def test_intervals_of_clusters_hold_the_truth_and_those_of_rows_do_not() -> None:
    hits = {"clusters": 0, "rows": 0}
    labels = np.repeat(np.arange(25), 6)
    for seed in range(200):
        draw = np.random.default_rng(seed)
        values = draw.standard_normal(25)[labels] + 0.3 * draw.standard_normal(len(labels))
        kernel = resample.mean_kernel(values)
        for name, units in {"clusters": Units.of(150, labels), "rows": Units.of(150)}.items():
            found = resample.estimate(kernel, units, "mean", Draws(resamples=299, seed=seed))
            assert found.low is not None
            assert found.high is not None
            hits[name] += found.low <= 0 <= found.high
    assert hits["clusters"] > 0.88 * 200
    assert hits["rows"] < 0.7 * 200


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    x, y = correlated(30, 0.5)
    kernel = resample.pearson_kernel(x, y)
    one, two, other = (resample.estimate(kernel, Units.of(30), "r", Draws(seed=seed)) for seed in (0, 0, 1))
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    ("n", "said"),
    [(4, "4 independent units, fewer than 5"), (9, "too few for BCa"), (10, None)],
)
def test_few_units_are_said(n: int, said: str | None) -> None:
    x, y = correlated(n, 0.3)
    found = resample.estimate(resample.pearson_kernel(x, y), Units.of(n), "r")
    assert found.value is not None
    assert (found.low is None) == (n < 5)
    assert found.restriction is None if said is None else said in (found.restriction or "")
    assert ("BCa" in found.method) == (n >= 10)


def test_a_statistic_that_never_varies_gets_no_interval() -> None:
    x = np.arange(12.0)
    found = resample.estimate(resample.tau_kernel(*[dense_ranks(x, 1e-6)] * 2), Units.of(12), "tau")
    assert (found.value, found.low) == (1.0, None)
    assert found.restriction == "every resample gives the same value; no interval"


def test_units_in_strata_are_drawn_within_them() -> None:
    strata = np.repeat([0, 1], [3, 7])
    counts = Units.of(10, strata=strata).counts(50, np.random.default_rng(0))
    assert (counts[:, :3].sum(axis=1) == 3).all()
    assert (counts[:, 3:].sum(axis=1) == 7).all()


def test_units_are_checked() -> None:
    with pytest.raises(ValueError, match="units has 2 labels for 3 rows"):
        Units.of(3, ["a", "b"])
    with pytest.raises(ValueError, match="units: row 1 has no label"):
        Units.of(3, ["a", None, "b"])
    with pytest.raises(ValueError, match="rows in several strata"):
        Units.of(3, ["a", "a", "b"], [0, 1, 1])


def test_fewer_resamples_are_drawn_from_many_rows_and_never_fewer_than_999() -> None:
    assert [resample.resamples_for(n) for n in (10, 600, 3000, 10**6)] == [9_999, 9_999, 2_000, 999]


def test_an_estimate_without_interval_must_say_why() -> None:
    with pytest.raises(ValueError, match="a restriction must say why"):
        Estimate(0.5, None, None, 3, 3, "tau")
    with pytest.raises(ValueError, match="not finite"):
        Estimate(float("nan"), None, None, 3, 3, "tau", restriction="few")
    with pytest.raises(ValueError, match="use at least 99"):
        Draws(resamples=10)


# Permutation tests


def every_p(x: NDArray[np.float64], y: NDArray[np.float64], statistic: object) -> float:
    """Two-sided p over all permutations, one by one."""
    observed = abs(statistic(x, y).statistic)  # type: ignore[operator]
    found = [abs(statistic(x, np.array(order)).statistic) for order in itertools.permutations(y)]  # type: ignore[operator]
    return float(np.mean([value >= observed - 1e-9 for value in found]))


def permuted(x: NDArray[np.float64], y: NDArray[np.float64], units: Units, **settings: object) -> Permutation:
    (found,) = resample.permute_association(x[:, None], y, units, **settings)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("kind", ["tau_b", "spearman", "pearson"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), n=st.integers(4, 6))
def test_exact_permutation_tests_go_through_all_orders(kind: Kind, seed: int, n: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 4, (2, n)).astype(np.float64)
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return
    statistic = {"tau_b": stats.kendalltau, "spearman": stats.spearmanr, "pearson": stats.pearsonr}[kind]
    found = permuted(x, y, Units.of(n), kind=kind)
    assert found.exact
    assert found.p == pytest.approx(every_p(x, y, statistic))


def test_eight_units_are_tested_exactly_and_nine_at_random() -> None:
    for n, number in ((8, 40_320), (9, 10_000)):
        found = permuted(*correlated(n, 0.5), Units.of(n))
        assert (found.exact, found.permutations) == (n == 8, number)


def test_sampled_p_values_are_near_those_of_kendalls_distribution() -> None:
    x, y = correlated(30, 0.35, seed=3)
    expected = stats.kendalltau(x, y, method="exact").pvalue
    found = permuted(x, y, Units.of(30)).p
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected / 10_000) + 1e-4)


def test_a_sampled_p_value_is_never_zero() -> None:
    x = np.arange(20.0)
    assert permuted(x, x, Units.of(20), draws=Draws(permutations=499)).p == 1 / 500


def test_p_values_are_uniform_without_association() -> None:
    p = [
        permuted(*correlated(12, 0, seed), Units.of(12), draws=Draws(permutations=199)).p
        for seed in range(300)
    ]
    share = np.mean(np.array(p) <= 0.1)
    assert share == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 300))


def test_what_differs_between_strata_only_is_no_association() -> None:
    strata = np.repeat(np.arange(6), 8)
    draw = np.random.default_rng(0)
    x, y = (5 * strata + draw.standard_normal(48) for _ in range(2))
    pooled = permuted(x, y, Units.of(48))
    within = permuted(x, y, Units.of(48, strata=strata))
    assert pooled.p is not None
    assert within.p is not None
    assert pooled.p < 0.001
    assert within.p > 0.05


def test_p_values_within_strata_agree_with_brute_force() -> None:
    strata = np.repeat([0, 1], 3)
    x, y = np.array([1.0, 2, 3, 1, 2, 4]), np.array([2.0, 3, 5, 9, 7, 8])

    def score(order: NDArray[np.float64]) -> float:
        return float(
            sum(
                np.sign(x[i] - x[j]) * np.sign(order[i] - order[j])
                for i in range(6)
                for j in range(i)
                if strata[i] == strata[j]
            )
        )

    orders = [
        np.array([*a, *b]) for a in itertools.permutations(y[:3]) for b in itertools.permutations(y[3:])
    ]
    expected = np.mean([abs(score(order)) >= abs(score(y)) for order in orders])
    found = permuted(x, y, Units.of(6, strata=strata))
    assert (found.p, found.permutations, found.exact) == (pytest.approx(expected), 36, True)


@pytest.mark.parametrize("side", ["x", "y"])
def test_units_of_several_rows_are_exchanged_as_wholes(side: str) -> None:
    """Rows of a unit that share one value of a side are no further evidence: the p-value is that of units."""
    unit = np.repeat(np.arange(6), 4)
    x, y = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 4, 3, 6, 5])
    noise = 0.01 * np.tile(np.arange(4), 6)
    rows = (x[unit], y[unit] + noise) if side == "x" else (x[unit] + noise, y[unit])
    found = permuted(*rows, Units.of(24, unit))
    assert found.permutations == 720
    assert found.p == pytest.approx(every_p(x, y, stats.kendalltau), abs=0.02)


def test_without_units_to_exchange_there_is_no_test() -> None:
    x, y = correlated(3, 0)
    found = permuted(x, y, Units.of(3, strata=["a", "b", "c"]))
    assert (found.p, found.restriction) == (
        None,
        "no two units can be exchanged, so there is no permutation test",
    )
    assert permuted(np.ones(4), np.arange(4.0), Units.of(4)).p is None


def test_the_largest_of_several_columns_is_judged_as_such() -> None:
    draw = np.random.default_rng(0)
    y = draw.standard_normal(25)
    noise = draw.standard_normal((25, 20))
    alone = resample.permute_association(noise[:, [0]], y, Units.of(25), draws=Draws(permutations=999))
    together = resample.permute_association(noise, y, Units.of(25), draws=Draws(permutations=999))
    assert alone[0].p is not None
    assert together[0].p is not None
    assert together[0].p >= alone[0].p
    found = Counter(
        min(
            one.p or 1
            for one in resample.permute_association(
                np.random.default_rng(seed).standard_normal((12, 8)),
                np.random.default_rng(seed + 10_000).standard_normal(12),
                Units.of(12),
                kind="spearman",
                draws=Draws(permutations=199),
            )
        )
        <= 0.1
        for seed in range(200)
    )
    assert found[True] / 200 == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 200))


def test_the_same_seed_gives_the_same_p() -> None:
    x, y = correlated(40, 0.2)
    assert permuted(x, y, Units.of(40)) == permuted(x, y, Units.of(40))
