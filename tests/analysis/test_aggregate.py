"""Aggregates, profiles and ranks agree with numbers computed by hand, with scipy and with brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.aggregate import (
    _cliques,
    aggregate,
    critical_difference,
    friedman,
    iqm,
    nemenyi_cd,
    normalised,
    performance_profile,
    probability_of_improvement,
)
from analysis.resample import Draws

RANKS = [[1, 2, 3], [1, 3, 2], [1, 2, 3], [2, 1, 3]]

samples = st.lists(st.integers(0, 20), min_size=1, max_size=13)


def scores(seed: int = 0, runs: int = 8, datasets: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {f"data {index}": draw.random(runs) + index / 10 for index in range(datasets)}


# Scores


def test_iqm_computed_by_hand() -> None:
    assert iqm(range(8)) == 3.5


@given(samples)
def test_iqm_is_the_trimmed_mean(values: list[int]) -> None:
    assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25))


def test_scores_run_from_random_to_target() -> None:
    assert normalised([10, 15, 20, 25], 10, 20) == pytest.approx([0, 0.5, 1, 1.5])
    with pytest.raises(ValueError, match="no scale between them"):
        normalised([1], 5, 5)


def test_aggregates_are_over_all_runs_of_all_datasets() -> None:
    runs = scores()
    flat = np.concatenate(list(runs.values()))
    expected = {
        "iqm": stats.trim_mean(flat, 0.25),
        "mean": flat.mean(),
        "median": np.median(flat),
        "optimality_gap": np.mean(np.maximum(1 - flat, 0)),
    }
    for name, value in expected.items():
        found = aggregate(runs, name)  # type: ignore[arg-type]
        assert found.value == pytest.approx(value)
        assert found.low is not None
        assert found.high is not None
        assert found.low < value < found.high
        assert found.n == 24
    with pytest.raises(ValueError, match="use one of iqm, mean, median, optimality_gap"):
        aggregate(runs, "sum")  # type: ignore[arg-type]


def test_the_interval_of_the_iqm_agrees_with_runs_drawn_within_datasets() -> None:
    runs = scores(runs=12)
    draw = np.random.default_rng(1)
    drawn = np.concatenate([draw.choice(sample, (20_000, 12)) for sample in runs.values()], axis=1)
    expected = np.quantile(stats.trim_mean(drawn, 0.25, axis=1), [0.025, 0.975])
    found = aggregate(runs)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.01)
    assert "percentile bootstrap" in found.method


def test_differences_between_datasets_do_not_widen_the_interval() -> None:
    apart = {name: values + 100 * index for index, (name, values) in enumerate(scores().items())}
    near, far = aggregate(scores(), "mean"), aggregate(apart, "mean")
    assert far.high - far.low == pytest.approx(near.high - near.low)  # type: ignore[operator]


def test_single_runs_and_missing_datasets_are_said() -> None:
    assert aggregate({"a": [1.0], "b": [1.0, 2.0]}).restriction == "a dataset with a single run: no interval"
    assert "may be too narrow" in (aggregate(scores(runs=3)).restriction or "")
    with pytest.raises(ValueError, match="no run on"):
        aggregate({"a": []})
    with pytest.raises(ValueError, match="not finite"):
        aggregate({"a": [1.0, np.nan]})
    with pytest.raises(ValueError, match=r"datasets differ: \['b'\]"):
        probability_of_improvement({"a": [1.0]}, {"a": [1.0], "b": [2.0]})


def test_probability_of_improvement_is_the_mean_of_a12_over_datasets() -> None:
    a, b = scores(0, runs=7), scores(1, runs=9)
    expected = np.mean([stats.mannwhitneyu(a[name], b[name]).statistic / 63 for name in a])
    found = probability_of_improvement(a, {name: b[name] for name in reversed(b)})
    assert found.value == pytest.approx(expected)
    other = probability_of_improvement(b, a)
    assert other.value == pytest.approx(1 - expected)
    assert other.low == pytest.approx(1 - found.high, abs=0.02)  # type: ignore[operator]


def test_a_performance_profile_is_the_share_of_runs_above() -> None:
    runs = {"a": [0.2, 0.4, 0.6, 0.8], "b": [0.5, 0.9]}
    found = performance_profile(runs, [0.0, 0.5, 0.85, 1.0])
    assert found.share == pytest.approx([1, (0.5 + 0.5) / 2, (0 + 0.5) / 2, 0])
    assert found.low is not None
    assert found.high is not None
    assert (found.low <= found.share).all()
    assert (found.share <= found.high).all()
    assert (found.n, found.n_datasets) == (6, 2)
    assert found.restriction == "a dataset with 2 runs: the band may be too narrow"
    assert performance_profile({"a": [0.2]}, [0.1]).low is None
    assert performance_profile(scores(runs=9), [0.5]).restriction is not None
    assert performance_profile(scores(runs=10), [0.5]).restriction is None


def test_intervals_of_improvement_and_profiles_are_the_bootstrap_of_runs_within_datasets() -> None:
    a, b = scores(0, runs=12), scores(1, runs=10)
    draw = np.random.default_rng(1)
    repeats, taus = 4_000, np.array([0.3, 0.6])
    wins, shares = np.zeros(repeats), np.zeros((repeats, 2))
    for name in a:
        x, y = (draw.choice(side[name], (repeats, len(side[name]))) for side in (a, b))
        wins += (x[:, :, None] > y[:, None, :]).mean(axis=(1, 2)) / len(a)
        wins += 0.5 * (x[:, :, None] == y[:, None, :]).mean(axis=(1, 2)) / len(a)
        shares += (x[:, :, None] > taus).mean(axis=1) / len(a)
    tails = [0.025, 0.975]
    found = probability_of_improvement(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(wins, tails)), abs=0.012)
    profile = performance_profile(a, taus)
    assert profile.low == pytest.approx(np.quantile(shares, tails[0], axis=0), abs=0.03)
    assert profile.high == pytest.approx(np.quantile(shares, tails[1], axis=0), abs=0.03)


def test_the_area_under_a_profile_is_the_mean_score() -> None:
    runs = {name: np.minimum(values, 1) for name, values in scores().items()}
    taus = np.linspace(0, 1, 20_001)
    share = performance_profile(runs, taus, draws=Draws(resamples=99)).share
    assert np.trapezoid(share, taus) == pytest.approx(np.mean([v.mean() for v in runs.values()]), abs=1e-4)


# Ranks


def test_friedman_and_nemenyi_computed_by_hand() -> None:
    found = friedman(RANKS)
    assert found.mean_ranks == (1.25, 2, 2.75)
    assert found.chi_squared == pytest.approx(4.5)
    assert found.p == pytest.approx(0.105399, abs=5e-7)
    # Iman and Davenport: (N - 1) chi^2 / (N (k - 1) - chi^2) = 3 x 4.5 / 3.5.
    assert found.iman_davenport == pytest.approx(13.5 / 3.5)
    assert found.p_iman_davenport == pytest.approx(stats.f.sf(13.5 / 3.5, 2, 6))
    assert nemenyi_cd(3, 4) == pytest.approx(1.657247, abs=5e-7)
    assert nemenyi_cd(3, 4) == pytest.approx(2.343701 * np.sqrt(0.5), abs=5e-7)


# Demšar (2006), table 5: critical values of Nemenyi's test at 0.05.
@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_values_are_the_published_ones(k: int, q: float) -> None:
    assert nemenyi_cd(k, 10) == pytest.approx(q * np.sqrt(k * (k + 1) / 60), abs=1.1e-3)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=2, max_size=8))
def test_friedman_agrees_with_scipy_ties_included(rows: list[tuple[int, ...]]) -> None:
    table = np.array(rows, dtype=np.float64)
    if not np.ptp(table, axis=1).any():
        with pytest.raises(ValueError, match="all methods tie"):
            friedman(table)
        return
    expected = stats.friedmanchisquare(*table.T)
    found = friedman(table)
    assert (found.chi_squared, found.p) == pytest.approx((expected.statistic, expected.pvalue))


def test_friedman_needs_a_complete_table() -> None:
    with pytest.raises(ValueError, match="complete table"):
        friedman([[1, 2, np.nan], [1, 2, 3]])
    with pytest.raises(ValueError, match="needs 2 blocks and 3 methods"):
        friedman([[1, 2], [2, 1]])


def table(n: int, *shifts: float) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    block = draw.standard_normal(n)
    return {f"m{i}": block + shift + 0.5 * draw.standard_normal(n) for i, shift in enumerate(shifts)}


def test_the_numbers_of_a_critical_difference_diagram() -> None:
    errors = table(20, 5, 0, 0.1, 2.5)
    found = critical_difference(errors)
    order = ["m1", "m2", "m3", "m0"]
    assert sorted(found.methods[:2]) == order[:2]
    assert list(found.methods[2:]) == order[2:]
    assert list(found.mean_ranks) == sorted(found.mean_ranks)
    assert found.cd == pytest.approx(nemenyi_cd(4, 20))
    for first, second, p, adjusted in found.wilcoxon:
        assert p == pytest.approx(stats.wilcoxon(errors[first] - errors[second]).pvalue, rel=0.05, abs=1e-6)
        assert adjusted is not None
        assert adjusted >= p
    assert len(found.wilcoxon) == 6
    for clique in found.cliques:
        ranks = [found.mean_ranks[found.methods.index(name)] for name in clique]
        assert max(ranks) - min(ranks) < nemenyi_cd(4, 20)
    assert found.methods[:2] in found.cliques
    assert not any({"m0", "m1"} <= set(clique) for clique in found.cliques)
    assert found.restriction is None


def test_bars_join_the_largest_sets_only() -> None:

    assert _cliques([1.0, 1.5, 2.0, 3.5, 4.0], 1.2) == [(0, 2), (3, 4)]
    assert _cliques([1.0, 2.0, 3.0], 1.5) == [(0, 1), (1, 2)]
    assert _cliques([1.0, 3.0], 1.5) == []


@pytest.mark.parametrize(
    ("errors", "blocks", "said"),
    [
        (table(4, 0, 1, 2), "datasets", "4 blocks, fewer than 5: no diagram"),
        (table(12, 0, 1, 2), "seeds", "seeds of one dataset are replicates, not blocks"),
        (table(12, 0, 1), "datasets", "2 methods: no diagram"),
        ({name: np.ones(6) for name in "abc"}, "datasets", "all methods tie in every block"),
        ({}, "datasets", "0 blocks, fewer than 5"),
    ],
)
def test_what_is_no_diagram_gets_none(errors: dict[str, np.ndarray], blocks: str, said: str) -> None:
    found = critical_difference(errors, blocks)  # type: ignore[arg-type]
    assert (found.cd, found.cliques, found.wilcoxon) == (None, (), ())
    assert said in (found.restriction or "")


def test_weak_diagrams_say_so() -> None:
    assert "9 blocks, fewer than 10" in (critical_difference(table(9, 0, 1, 2)).restriction or "")
    paired = critical_difference(table(12, 0, 1, 2), "paired seeds")
    assert paired.cd is not None
    assert paired.restriction == "of one dataset only: the blocks are its seeds"
    with pytest.raises(ValueError, match="different numbers of blocks"):
        critical_difference({"a": [1, 2], "b": [1]})
