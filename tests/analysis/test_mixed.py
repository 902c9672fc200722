"""Variance components and mixed models agree with closed forms, dense likelihoods and least squares."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from analysis import mixed
from analysis.mixed import components, factor_sweep, mixed_model, noise_ceiling, within_between
from analysis.resample import Estimate

Array = NDArray[np.float64]


def crossed(settings: int = 8, seeds: int = 6, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Metric, error, setting and seed of a sweep with slopes 0.5 within settings and -0.3 between."""
    draw = np.random.default_rng(seed)
    setting, run = np.repeat(np.arange(settings), seeds), np.tile(np.arange(seeds), settings)
    n = len(setting)
    x = draw.standard_normal(n) + setting
    y = 0.5 * x - 0.8 * setting + 0.7 * draw.standard_normal(settings)[setting]
    y += 0.4 * draw.standard_normal(seeds)[run] + 0.3 * draw.standard_normal(n)
    return x, y, setting, run


# One grouping


def test_components_computed_by_hand() -> None:
    # Means 1, 3, 5 of pairs (0, 2), (2, 4), (4, 6): mean squares 8 between and 2 within.
    found = components([0, 2, 2, 4, 4, 6], ["a", "a", "b", "b", "c", "c"])
    assert (found.between, found.within, found.replicates) == (3, 2, 2)
    assert found.icc.value == pytest.approx(0.6)
    low = 4 / stats.f.ppf(0.975, 2, 3)
    high = 4 / stats.f.ppf(0.025, 2, 3)
    assert found.icc.low == pytest.approx(max(0, (low - 1) / (low + 1)))
    assert found.icc.high == pytest.approx((high - 1) / (high + 1))


def test_the_interval_of_the_icc_holds_the_truth_as_often_as_it_says() -> None:
    group = np.repeat(np.arange(12), 3)
    draw, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        values = draw.standard_normal(12)[group] + draw.standard_normal(36)
        found = components(values, group).icc
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.5 <= found.high
    assert hits / 1000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1000))


def test_balanced_components_are_those_of_reml() -> None:
    _, y, setting, _ = crossed()
    found, model = components(y, setting), mixed_model(y, {}, {"setting": setting})
    variances = [part.variance.value for part in model.components]
    assert (found.between, found.within) == pytest.approx(tuple(variances), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "groups", "said"),
    [
        ([1, 2, 3], ["a", "a", "a"], "one group"),
        ([1, 2, 3], ["a", "b", "c"], "one run in each group"),
        ([1, 1, 1, 1], ["a", "a", "b", "b"], "all values are equal"),
        ([1, 1, 2, 2], ["a", "a", "b", "b"], "runs of a group are all equal"),
        ([1, 3, 3, 1], ["a", "a", "b", "b"], "at its bound, 0"),
        ([1, 2, 5, 4, 6], ["a", "a", "b", "b", "b"], "groups differ in size"),
    ],
)
def test_what_cannot_be_divided_is_said(values: list[float], groups: list[str], said: str) -> None:
    assert said in (components(values, groups).icc.restriction or "")


def test_the_noise_ceiling_is_the_root_of_the_reliability() -> None:
    icc = Estimate(0.6, 0.3, 0.8, 30, 10, "ICC")
    assert noise_ceiling(icc).value == pytest.approx(math.sqrt(0.6))
    three = noise_ceiling(icc, 3)
    assert three.value == pytest.approx(math.sqrt(1.8 / 2.2))
    assert (three.low, three.high) == pytest.approx((math.sqrt(0.9 / 1.6), math.sqrt(2.4 / 2.6)))
    with pytest.raises(ValueError, match="replicates=0 must be at least 1"):
        noise_ceiling(icc, 0)
    assert noise_ceiling(components([1, 2], ["a", "b"]).icc).value is None


def test_no_metric_correlates_better_than_the_ceiling() -> None:
    draw = np.random.default_rng(0)
    truth = draw.standard_normal(4000)
    group = np.repeat(np.arange(4000), 2)
    runs = truth[group] + draw.standard_normal(8000)
    ceiling = noise_ceiling(components(runs, group).icc, 2).value
    assert ceiling is not None
    means = runs.reshape(-1, 2).mean(axis=1)
    assert np.corrcoef(truth, means)[0, 1] == pytest.approx(ceiling, abs=0.02)


# Crossed random intercepts


def dense_reml(y: Array, design: Array, groups: list[Array]) -> tuple[Array, Array, float]:
    """Coefficients, variances (residual last) and restricted likelihood, from the n x n covariance matrix."""
    n, p = design.shape
    shapes = [np.equal.outer(group, group).astype(float) for group in groups] + [np.eye(n)]

    def fit(logs: Array) -> tuple[float, Array]:
        v = sum(math.exp(log) * shape for log, shape in zip(logs, shapes, strict=True))
        inverse = np.linalg.inv(v)
        info = design.T @ inverse @ design
        beta = np.linalg.solve(info, design.T @ inverse @ y)
        rest = y - design @ beta
        value = (n - p) * math.log(2 * math.pi) + np.linalg.slogdet(v)[1] + np.linalg.slogdet(info)[1]
        return float(value + rest @ inverse @ rest), beta

    best = optimize.minimize(
        lambda logs: fit(logs)[0],
        np.full(len(shapes), -1.0),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-9},
    )
    return fit(best.x)[1], np.exp(best.x), -float(best.fun) / 2


def test_a_mixed_model_is_the_maximum_of_the_dense_likelihood() -> None:
    x, y, setting, run = crossed(settings=6, seeds=5)
    y[7] += 1  # nothing balanced about it
    keep = np.arange(30) != 11
    x, y, setting, run = x[keep], y[keep], setting[keep], run[keep]
    beta, variances, likelihood = dense_reml(y, np.column_stack([np.ones(29), x]), [setting, run])
    found = mixed_model(y, {"x": x}, {"setting": setting, "seed": run})
    assert found.log_likelihood == pytest.approx(likelihood, abs=1e-5)
    assert [part.variance.value for part in found.components] == pytest.approx(list(variances), rel=1e-3)
    assert found.terms[0].slope.value == pytest.approx(beta[1], rel=1e-4)


def dense_deviance(sds: Array, y: Array, design: Array, groups: list[Array]) -> float:
    """Minus twice the restricted likelihood from the n x n covariance matrix."""
    v = sds[-1] ** 2 * np.eye(len(y))
    for sd, group in zip(sds, groups, strict=False):
        v += sd**2 * np.equal.outer(group, group)
    inverse = np.linalg.inv(v)
    info = design.T @ inverse @ design
    rest = y - design @ np.linalg.solve(info, design.T @ inverse @ y)
    free = (len(y) - design.shape[1]) * math.log(2 * math.pi)
    return float(free + np.linalg.slogdet(v)[1] + np.linalg.slogdet(info)[1] + rest @ inverse @ rest)


def random_sweep(seed: int) -> tuple[Array, Array, Array, Array]:
    """Metric, error, setting and seed of a sweep of 6 x 5 runs whose variances are large, small or 0."""
    draw = np.random.default_rng(seed)
    setting, run = np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6)
    x, noise = draw.standard_normal((2, 30))
    spreads = draw.choice([0, 0.3, 1], 2)
    y = 0.5 * x + spreads[0] * draw.standard_normal(6)[setting] + spreads[1] * draw.standard_normal(5)[run]
    return x, y + noise, setting, run


def test_the_search_for_the_maximum_ends_at_it_on_ordinary_data() -> None:
    """Without an upper bound a line search jumps to deviations where nothing can be computed."""
    for seed in range(60):
        x, y, setting, run = random_sweep(seed)
        y = y / y.std()
        design = np.column_stack([np.ones(30), x])
        fit = mixed._Fit(y, design, [mixed._indicators(setting), mixed._indicators(run)])
        sds, least = fit.best()
        assert least == pytest.approx(dense_deviance(sds, y, design, [setting, run]))
        for other in np.random.default_rng(seed).uniform([0, 0, 0.2], [1.5, 1.5, 1.5], (20, 3)):
            assert least < dense_deviance(other, y, design, [setting, run]) + 1e-6
        slopes = fit.deviance(sds)[1]
        assert np.abs(slopes[sds > 0.01]).max() < 0.01
        lifted = np.maximum(sds, 1e-3)
        assert (fit.deviance(lifted)[1][sds <= 0.01] > -1e-3).all()  # no way down from a bound


@pytest.mark.parametrize("restricted", [True, False])
def test_derivatives_of_the_likelihood_are_those_of_differences(restricted: bool) -> None:
    x, y, setting, run = random_sweep(1)
    blocks = [mixed._indicators(setting), mixed._indicators(run)]
    fit = mixed._Fit(y, np.column_stack([np.ones(30), x]), blocks)
    at = np.array([0.4, 0.2, 0.7])
    found = fit.deviance(at, restricted)[1]
    for index in range(3):
        step = 1e-5 * (np.arange(3) == index)
        ends = fit.deviance(at + step, restricted)[0] - fit.deviance(at - step, restricted)[0]
        assert found[index] == pytest.approx(ends / 2e-5, rel=1e-5)


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow), 5])
def test_profile_intervals_are_those_of_the_dense_likelihood(seed: int) -> None:
    """At an end, the best deviance with that variance fixed is chi-squared's quantile above the least."""
    x, y, setting, run = random_sweep(seed)
    design = np.column_stack([np.ones(30), x])
    found = mixed_model(y, {"x": x}, {"setting": setting, "seed": run})
    variances = [part.variance for part in found.components]
    assert found.log_likelihood is not None

    def excess(index: int, variance: float) -> float:
        def fixed(rest: Array) -> float:
            return dense_deviance(
                np.insert(np.abs(rest), index, math.sqrt(variance)), y, design, [setting, run]
            )

        starts = ([0.02, 0.02], [0.02, 0.8], [0.8, 0.02], [0.8, 0.8])
        tried = [optimize.minimize(fixed, start, method="Nelder-Mead").fun for start in starts]
        return float(min(tried)) + 2 * found.log_likelihood

    limit = float(stats.chi2.ppf(0.95, 1))
    for index, one in enumerate(variances):
        assert one.low is not None
        assert one.high is not None
        assert excess(index, one.high) == pytest.approx(limit, abs=0.02)
        if one.low > 0:
            assert excess(index, one.low) == pytest.approx(limit, abs=0.05)
        else:
            assert excess(index, 0.0) <= limit + 0.02


def test_a_likelihood_that_cannot_be_computed_is_a_restriction(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(mixed._Fit, "best", fail)
    x, y, setting, run = random_sweep(0)
    found = mixed_model(y, {"x": x}, {"setting": setting, "seed": run})
    assert found.restriction == "columns and factors give the response nearly exactly: no model"
    assert found.terms[0].slope.value is None
    assert [part.name for part in found.components] == ["setting", "seed", "residual"]


def test_a_mixed_model_agrees_with_published_software() -> None:
    """Values of MixedLM of statsmodels 0.15: crossed variance components by REML, tests by ML."""
    found = within_between(*crossed())
    within, between = (term.slope for term in found.terms)
    assert (within.value, between.value) == pytest.approx((0.376516, -0.307416), abs=1e-5)
    variances = [part.variance.value for part in found.components]
    assert variances == pytest.approx([0.719030, 0.077744, 0.082293], rel=1e-3)
    assert found.log_likelihood == pytest.approx(-31.774029, abs=1e-4)
    assert [term.p for term in found.terms] == pytest.approx([1.624e-9, 0.004514], rel=1e-2)
    # Its standard errors, here with t: 48 rows less 8 + 6 levels, and 8 settings less intercept and slope.
    assert within.high == pytest.approx(0.376516 + stats.t.ppf(0.975, 34) * 0.048660, abs=1e-4)
    assert between.high == pytest.approx(-0.307416 + stats.t.ppf(0.975, 6) * 0.094177, abs=1e-3)


def test_slopes_within_and_between_settings_are_told_apart() -> None:
    x, y, setting, run = crossed(settings=40, seeds=5)
    found = within_between(x, y, setting, run)
    within, between = (term.slope for term in found.terms)
    means = np.bincount(setting, x) / 5
    spread = math.sqrt(((x - means[setting]) ** 2).sum() / (200 - 40))
    assert within.value == pytest.approx(0.5 * spread, abs=0.06)
    assert between.value == pytest.approx(-0.3 * spread, abs=0.06)
    assert (within.n_units, between.n_units) == (200, 40)
    assert "t with 38 df" in between.method
    assert found.terms[0].p is not None
    assert found.terms[0].p < 1e-6
    assert found.restriction is None


def test_shares_and_profile_intervals_hold_the_estimates() -> None:
    found = within_between(*crossed())
    assert sum(part.share or 0 for part in found.components) == pytest.approx(1)
    for part in found.components:
        one = part.variance
        assert one.low is not None
        assert one.value is not None
        assert one.high is not None
        assert one.low < one.value < one.high
    # Of a residual alone, the interval is near that of chi-squared.
    y = np.random.default_rng(0).standard_normal(60)
    residual = mixed_model(y, {}, {}).components[0].variance
    assert residual.value == pytest.approx(y.var(ddof=1), rel=1e-3)
    expected = 59 * y.var(ddof=1) / stats.chi2.ppf([0.975, 0.025], 59)
    assert (residual.low, residual.high) == pytest.approx(tuple(expected), rel=0.05)


def test_a_variance_at_its_bound_is_said() -> None:
    draw = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 5)
    y = draw.standard_normal(30)
    y -= (np.bincount(group, y) / 5)[group]  # no difference between groups at all
    found = mixed_model(y, {}, {"setting": group})
    part = found.components[0].variance
    assert (part.value, part.low, part.restriction) == (0, 0, "at its bound, 0")
    assert found.restriction == "the variance of setting is at its bound, 0"


def test_few_levels_are_fixed_effects() -> None:
    x, y, setting, run = crossed(settings=3, seeds=6)
    found = mixed_model(y, {"x": x}, {"setting": setting, "seed": run})
    assert found.as_fixed == ("setting",)
    assert [part.name for part in found.components] == ["seed", "residual"]
    assert "setting has 3 levels, fewer than 5" in (found.restriction or "")
    model = within_between(x, y, setting, run)
    assert model.terms[0].slope.value is not None
    assert model.terms[1].slope.value is None
    assert "fixed by the levels of setting" in (model.terms[1].slope.restriction or "")


def test_one_seed_is_no_random_effect() -> None:
    x, y, setting, _ = crossed()
    found = within_between(x, y, setting, np.zeros(48))
    assert found.as_fixed == ("seed",)
    assert found.terms[0].slope.value is not None


def test_what_cannot_be_fitted_says_why() -> None:
    flat = within_between([1, 1, 2, 2], [1, 2, 3, 4], ["a", "a", "b", "b"])
    assert flat.restriction == "the metric does not vary within settings: no slope within"
    assert flat.terms[0].slope.value is None
    assert mixed_model([1, 1, 1, 1, 1, 1], {}, {}).restriction == "all responses are equal: no model"
    assert mixed_model([1.0], {}, {}).restriction == "1 row leave no residual: no model"
    with pytest.raises(ValueError, match="response holds a value that is not finite"):
        mixed_model([1, math.nan], {}, {})
    with pytest.raises(ValueError, match="x has 1 values for 2 rows"):
        mixed_model([1, 2], {"x": [1]}, {})


# Sweeps


def grid(runs: int = 4) -> tuple[Array, dict[str, Array], Array]:
    draw = np.random.default_rng(0)
    k, norm, run = (side.ravel() for side in np.meshgrid([1, 2, 4], [0, 1], np.arange(runs), indexing="ij"))
    y = 0.5 * (k == 4) + 0.3 * norm * (k == 1) + 0.4 * draw.standard_normal(runs)[run]
    return y + 0.1 * draw.standard_normal(len(y)), {"K": k, "edge_norm": norm}, run


def test_a_balanced_sweep_is_the_classical_analysis_of_variance() -> None:
    y, factors, run = grid()
    found = factor_sweep(y, factors, run)
    cube = y.reshape(3, 2, 4)
    total = ((y - y.mean()) ** 2).sum()
    squares = {
        "K": 8 * ((cube.mean(axis=(1, 2)) - y.mean()) ** 2).sum(),
        "edge_norm": 12 * ((cube.mean(axis=(0, 2)) - y.mean()) ** 2).sum(),
        "seed": 6 * ((cube.mean(axis=(0, 1)) - y.mean()) ** 2).sum(),
    }
    squares["K x edge_norm"] = (
        4 * ((cube.mean(axis=2) - y.mean()) ** 2).sum() - squares["K"] - squares["edge_norm"]
    )
    noise = (total - sum(squares.values())) / 15
    degrees = {"K": 2, "edge_norm": 1, "seed": 3, "K x edge_norm": 2}
    assert found.residual_share == pytest.approx(15 * noise / total)
    assert sum(effect.share for effect in found.effects) + (found.residual_share or 0) == pytest.approx(1)
    for effect in found.effects:
        assert effect.df == degrees[effect.name]
        assert effect.share == pytest.approx(squares[effect.name] / total)
        f = squares[effect.name] / effect.df / noise
        assert (effect.f, effect.p) == pytest.approx((f, stats.f.sf(f, effect.df, 15)))
    assert found.cells["1", "0"] == 4
    means = {(one.factor, one.level): one.mean for one in found.means}
    assert means["K", "4"].value == pytest.approx(cube[2].mean())
    # Four seeds in six cells each: the variance between them is (mean square - noise) / 6.
    between = squares["seed"] / 3
    parts = between / 24, (1 / 8 - 1 / 24) * noise
    assert sum(parts) == pytest.approx(noise / 8 + (between - noise) / 6 / 4)
    df = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 15)
    margin = stats.t.ppf(0.975, df) * math.sqrt(sum(parts))
    assert means["K", "4"].high == pytest.approx(cube[2].mean() + margin)
    alone = {(one.factor, one.level): one.mean for one in factor_sweep(y, factors).means}
    pure = ((cube - cube.mean(axis=2, keepdims=True)) ** 2).sum() / 18
    margin = stats.t.ppf(0.975, 18) * math.sqrt(pure / 8)
    assert alone["K", "4"].high == pytest.approx(cube[2].mean() + margin)


def test_main_effects_of_an_unbalanced_sweep_are_those_without_interactions() -> None:
    y, factors, run = grid()
    keep = np.arange(24) % 7 != 3
    y, k, norm, run = y[keep], factors["K"][keep], factors["edge_norm"][keep], run[keep]

    def rss(*groups: Array) -> float:
        design = np.hstack([np.ones((len(y), 1)), *(np.equal.outer(g, np.unique(g)) for g in groups)])
        return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())

    found = {effect.name: effect for effect in factor_sweep(y, {"K": k, "edge_norm": norm}, run).effects}
    total = ((y - y.mean()) ** 2).sum()
    assert found["K"].share == pytest.approx((rss(norm, run) - rss(k, norm, run)) / total)
    assert found["K x edge_norm"].share == pytest.approx(
        (rss(k, norm, run) - rss(10 * k + norm, run)) / total
    )
    # The seed has no interaction that would contain it, so it is judged next to all other terms.
    assert found["seed"].share == pytest.approx((rss(10 * k + norm) - rss(10 * k + norm, run)) / total)


def test_marginal_means_weigh_combinations_alike_however_many_runs_they_hold() -> None:
    # One cell has ten runs; the mean at its level is still that of the cells' means.
    y = np.array([1.0, 1.1, 3, 3.1, *np.full(10, 5.0), 7, 7.1]) + np.tile([0, 0.01], 8)
    a = [0] * 4 + [1] * 12
    b = [0, 0, 1, 1] + [0] * 10 + [1, 1]
    found = factor_sweep(y, {"a": a, "b": b})
    cells = [y[4:14].mean(), y[14:].mean()]
    means = {(one.factor, one.level): one.mean.value for one in found.means}
    assert means["a", "1"] == pytest.approx(np.mean(cells))


def test_marginal_means_of_an_unbalanced_sweep_are_those_of_least_squares() -> None:
    y, factors, run = grid()
    keep = np.arange(24) % 7 != 3
    y, k, norm, run = y[keep], factors["K"][keep], factors["edge_norm"][keep], run[keep]
    n = len(y)
    cell = 10 * k + norm
    cells, seeds = (np.equal.outer(side, np.unique(side)).astype(float) for side in (cell, run))
    design = np.hstack([cells, seeds[:, 1:]])
    inverse = np.linalg.inv(design.T @ design)
    rest = y - design @ inverse @ design.T @ y
    spare = n - design.shape[1]
    noise = rest @ rest / spare
    outside = np.eye(n) - cells @ np.linalg.inv(cells.T @ cells) @ cells.T  # what cells do not explain
    df = seeds.shape[1] - 1
    square = (y @ outside @ y - rest @ rest) / df
    between = (square - noise) / (np.trace(seeds.T @ outside @ seeds) / df)
    assert between > 0
    means = {(one.factor, one.level): one.mean for one in factor_sweep(y, {"K": k, "norm": norm}, run).means}
    for level in (1, 2, 4):
        # The mean of the cells at this level, and of the four seeds.
        wanted = np.array([*(0.5 * (np.unique(cell) // 10 == level)), 0.25, 0.25, 0.25])
        w = wanted @ inverse @ design.T
        found = means["K", str(level)]
        assert found.value == pytest.approx(w @ y)
        variance = noise * w @ w + between * ((w @ seeds) ** 2).sum()
        share = ((w @ seeds) ** 2).sum() / (square - noise) * between
        parts = share * square, (w @ w - share) * noise
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / df + parts[1] ** 2 / spare)
        assert found.high == pytest.approx(w @ y + stats.t.ppf(0.975, freedom) * math.sqrt(variance))


def test_the_interval_of_a_marginal_mean_holds_that_of_other_seeds() -> None:
    """Five seeds that all settings share are five draws, however many runs there are."""
    setting, run = np.repeat(np.arange(4), 5), np.tile(np.arange(5), 4)
    hits = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        y = draw.standard_normal(5)[run] + 0.2 * draw.standard_normal(20)
        mean = factor_sweep(y, {"K": setting}, run).means[0].mean
        assert mean.low is not None
        assert mean.high is not None
        hits.append(mean.low <= 0 <= mean.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 200))


def test_sweeps_say_what_they_lack() -> None:
    y, factors, run = grid(runs=1)
    found = factor_sweep(y, factors)
    assert found.restriction == "too few runs for interactions: main effects only"
    assert [effect.name for effect in found.effects] == ["K", "edge_norm"]
    y, factors, run = grid()
    keep = ~((factors["K"] == 4) & (factors["edge_norm"] == 1))
    found = factor_sweep(y[keep], {name: side[keep] for name, side in factors.items()}, run[keep])
    assert found.restriction == "1 combination of settings without a run"
    means = {(one.factor, one.level): one.mean for one in found.means}
    assert means["K", "4"].value is None
    assert means["K", "1"].value is not None
    assert factor_sweep([1, 1, 1, 1], {"a": [0, 0, 1, 1]}).restriction == "all responses are equal"
    assert "too few runs" in (factor_sweep([1, 2], {"a": [0, 1]}).restriction or "")
    with pytest.raises(ValueError, match="name at least one"):
        factor_sweep(y, {})
