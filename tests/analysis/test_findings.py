"""Findings hold what they say: nothing without its reason, nothing from rows that do not stand for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import (
    associations,
    checklist,
    findings,
    limits,
    loaders,
    page,
    pruning,
    records,
    sections,
    selection,
    summary,
)
from analysis.loaders import Sample
from analysis.resample import Draws

QUICK = Draws(resamples=199, permutations=199)


def made(errors: dict[str, Any], *, study: dict[str, Any] | None = None, **columns: Any) -> Sample:
    """A sample of completed runs: `made({arm: errors}, metric=values, ...)`, one value per run in order."""
    arms = [arm for arm, values in errors.items() for _ in range(len(values))]
    n = len(arms)
    trials = pd.DataFrame(
        {
            "trial_id": [f"t{row}" for row in range(n)],
            "search_id": [f"t{row}" for row in range(n)],
            "retraining_id": [f"t{row}" for row in range(n)],
            "arm": arms,
            "name": arms,
            "status": "completed",
            "reason": None,
            "ended": pd.NaT,
            "attempts": 1,
            "test_error": np.concatenate([np.asarray(values, dtype=float) for values in errors.values()]),
            "genotype": None,
            "genotype_key": [f"g{row}" for row in range(n)],
        }
    ).assign(**columns)
    about = {
        "name": "made",
        "question": "What?",
        "preset": "tiny",
        "arms": list(errors),
        "baseline": None,
        "reference": None,
    }
    epochs = pd.DataFrame({"trial_id": [], "stage": [], "epoch": [], "key": [], "value": np.zeros(0)})
    genotypes = pd.DataFrame({"trial_id": [], "stage": [], "epoch": [], "genotype": []})
    return loaders.of_tables(records.Tables(about | (study or {}), trials, epochs, genotypes), {})


def claims(found: Sample) -> dict[str, sections.Answer]:
    return {one.claim.split()[0]: one for one in sections.claims(found, findings.find(found))}


# Rounding is no order


def test_metrics_that_differ_in_their_last_bits_are_constant() -> None:
    error = np.linspace(0.1, 0.2, 14)
    noise = 0.5 + 5.5e-17 * np.arange(14)
    assert len(np.unique(noise)) > 1
    runs = made({"a": error}, margin=noise)
    assert [one.name for one in findings.find(runs).metrics] == []
    one = associations.metric_finding(runs, "margin", QUICK)
    assert (one.headline.value, one.test.p) == (None, None)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6, 1e12])
def test_the_unit_of_a_metric_changes_nothing(scale: float) -> None:
    draw = np.random.default_rng(0)
    error, metric = draw.random(20), draw.random(20)
    one = associations.metric_finding(made({"a": error}, margin=scale * metric), "margin", QUICK)
    assert one.headline.value == pytest.approx(stats.kendalltau(metric, error).statistic)


# Networks shared between arms


def shared(n: int = 4) -> dict[str, Any]:
    """Columns of three arms that found the same networks, each of which was retrained once."""
    keys = [f"g{network}" for network in range(n)] * 3
    return {"genotype_key": keys, "retraining_id": keys, "search_id": [f"s{row}" for row in range(3 * n)]}


def test_a_network_of_several_arms_with_one_final_error_is_one_unit() -> None:
    error = [0.1, 0.12, 0.14, 0.16]
    runs = made({arm: error for arm in "abc"}, **shared(), margin=[1.0, 2.0, 3.0, 4.0] * 3)
    one = {one.name: one for one in findings.find(runs).metrics}["margin"]
    assert (one.headline.value, one.headline.n_units) == (1.0, 4)
    assert one.verdict == "no verdict: networks shared between arms"
    assert one.p_adjusted is None
    apart = made({arm: np.add(error, shift) for arm, shift in zip("abc", (0, 0.01, 0.02), strict=True)})
    apart = replace(apart, metrics=pd.DataFrame({"margin": [1.0, 2.0, 3.0, 4.0] * 3}))
    assert associations.metric_finding(apart, "margin", QUICK).headline.n_units == 12


def collapsed(n: int = 4) -> Sample:
    """Two arms whose searches found the same networks, retrained once, and a random arm of its own."""
    error = 0.1 + 0.02 * np.arange(n)
    keys = [f"g{network}" for network in range(n)] * 2 + [f"r{network}" for network in range(n)]
    return made(
        {"K=1": error, "K=4": error, "random": error + 0.1 * np.arange(1, n + 1)},
        study={"reference": "K=1", "baseline": "random"},
        genotype_key=keys,
        retraining_id=keys,
        search_seed=list(range(n)) * 3,
        **{"axes.K": [1.0] * n + [4.0] * n + [np.nan] * n},
    )


def test_one_final_error_of_several_arms_is_not_counted_as_several() -> None:
    runs = collapsed(6)
    found = findings.find(runs)
    distinct = [findings.percent(runs, arm) for arm in ("K=1", "random")]
    assert found.spread == pytest.approx(np.sqrt(np.mean([np.var(errors, ddof=1) for errors in distinct])))
    assert found.spread_df == 10
    assert found.doubts == {}
    assert str(found.shared).startswith("12 of their searches found one network and share its retrainings")
    assert found.critical == found.shared
    assert (found.sweep, found.profiles, found.aggregates, found.improvement) == (None, {}, {}, {})
    apart = replace(runs, tables=replace(runs.tables, trials=runs.trials.assign(retraining_id=range(18))))
    found = findings.find(apart)
    assert (found.spread_df, found.shared) == (15, None)
    assert found.sweep is not None
    assert found.sweep.n == 12
    assert set(found.aggregates) == {"K=1", "K=4", "random"}
    assert not isinstance(found.critical, str)


# Seeds


def test_a_table_by_seed_or_the_true_reason_why_there_is_none() -> None:
    errors = {"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.4]}
    seeds = [0, 1, 2] * 2
    table = findings.by_seed(made(errors, search_seed=seeds))
    assert not isinstance(table, str)
    assert table["b"].to_dict() == pytest.approx({0: 20, 1: 30, 2: 40})
    assert findings.by_seed(made(errors)) == "no search seeds were recorded"
    assert "in view of another" in str(
        findings.by_seed(made(errors, study={"joint": True}, search_seed=seeds))
    )
    repeated = made(errors, search_seed=[0, 1, 2, 0, 0, 1])
    assert findings.by_seed(repeated) == "search seeds repeat within an arm (b)"
    assert not isinstance(findings.by_seed(repeated, ["a"]), str)
    stopped = made(errors, search_seed=seeds, status=["completed", "completed", "pruned"] * 2)
    why = "1 of its 3 runs was stopped early, so those that finished were selected by validation error"
    assert findings.by_seed(stopped) == f"{why} (a, b)"
    assert findings.find(made(errors, search_seed=[0, 1, 2, 3, 4, 5])).critical == (
        "no search seed is shared by all arms"
    )


def test_a_pair_that_was_measured_alike_is_paired_whatever_other_arms_are() -> None:
    found = {(one.claim.arm, one.claim.other): one for one in findings.find(protocols()).versus}
    pair = found["b", "random"].paired
    assert pair is not None
    errors = [findings.percent(protocols(), arm) for arm in ("b", "random")]
    assert pair.p == pytest.approx(stats.ttest_rel(*errors).pvalue)


def test_why_an_arm_has_no_curve_over_time_is_told() -> None:
    runs = made({"a": [0.1, 0.2, 0.3], "b": [0.2]}, study={"reference": "a"})
    assert findings.find(runs).no_anytime == {arm: "no seconds were recorded" for arm in "ab"}
    found = findings.find(replace(runs, tables=_timed(runs)))
    assert [one.arm for one in found.anytime] == ["a"]
    assert found.no_anytime == {"b": "1 run with a test error and seconds, fewer than 2"}
    answers = {one.number: one for one in checklist.checklist(runs, findings.find(runs))}
    assert answers[10].evidence == "no anytime curve: no seconds were recorded (a, b)"


# Protocols


def protocols(**study: Any) -> Sample:
    draw = np.random.default_rng(0)
    errors = {arm: draw.normal(mean, 0.01, 6) for arm, mean in (("a", 0.1), ("b", 0.2), ("random", 0.3))}
    named = {"reference": "a", "baseline": "random", **study}
    columns = {"config.retrain.epochs": [3] * 6 + [4] * 12, "params_m": draw.random(18)}
    return made(errors, study=named, search_seed=list(range(6)) * 3, **columns)


def test_arms_of_different_protocols_are_not_compared() -> None:
    runs = protocols(primary_metrics=["params_m"])
    found = findings.find(runs)
    verdicts = {(one.claim.arm, one.claim.other): one.claim.verdict for one in found.versus}
    assert verdicts == {("b", "a"): "no verdict", ("a", "random"): "no verdict", ("b", "random"): "supported"}
    for one in found.versus[:2]:
        assert "config.retrain.epochs: 3, 4" in str(one.claim.doubt)
        assert one.claim.difference is not None
        assert (one.claim.difference.low, one.claim.difference.p, one.comparison) == (None, None, None)
    assert (found.profiles, found.aggregates, found.improvement, found.anytime) == ({}, {}, {}, ())
    assert (found.components.between, found.sweep) == (None, None)
    assert "config.retrain.epochs: 3, 4" in str(found.critical)
    alone = [np.var(100 * findings.percent(runs, arm), ddof=1) / 100**2 for arm in ("a", "b", "random")]
    assert found.spread == pytest.approx(np.sqrt(np.mean(alone)))  # between runs of one arm, measured alike
    assert found.spread_df == 15
    assert found.metrics == ()
    (declared,) = (one for one in sections.claims(runs, found) if one.kind == "metric")
    assert declared.verdict.startswith("no verdict: measured under different protocols")
    asked = findings.find(runs, pool=True)
    assert asked.spread is not None
    assert asked.unanswered == ()
    assert all(one.comparison is not None for one in asked.versus)


def test_retrainings_of_one_search_that_differ_leave_no_spread() -> None:
    searches = [f"s{row // 2}" for row in range(8)]
    runs = made({"a": np.arange(1, 9) / 10}, search_id=searches, **{"config.retrain.epochs": [3, 4] * 4})
    assert findings.spread(runs) == (None, 0)
    assert "config.retrain.epochs: 3, 4" in findings.spread_doubts(runs)["a"]
    alike = made({"a": np.arange(1, 9) / 10}, search_id=searches, **{"config.retrain.epochs": 3})
    assert findings.spread(alike) == (pytest.approx(np.std([15, 35, 55, 75], ddof=1)), 3)


# Declared metrics


def test_a_declared_metric_never_vanishes() -> None:
    draw = np.random.default_rng(1)
    metric = draw.random(12)
    runs = made(
        {"a": metric + 0.01 * draw.random(12)},
        study={
            "primary_metrics": ["good", "same", "two", "none", "search_gone", "magic"],
            "metrics": {"gone": {"unit": "1", "better": "lower"}},
        },
        good=metric,
        same=1.0,
        two=[0.1, 0.2] + [np.nan] * 10,
        none=[np.nan] * 11 + [np.inf],
    )
    found = claims(runs)
    assert {name: one.verdict for name, one in found.items() if one.declared} == {
        "good": "supported",
        "same": "undecided at n=12: constant",
        "two": "undecided at n=2: finite in 2 runs only",
        "none": "undecided at n=0: not finite in any run",
        "search_gone": "undecided at n=0: not recorded",
        "magic": "undecided at n=0: not recorded",
    }
    assert found["good"].p is not None
    assert found["good"].p_adjusted == pytest.approx(min(1, 6 * found["good"].p))
    strange = [text for text in limits.limits(runs) if "does not record" in text]
    assert len(strange) == 1
    assert "names magic, which" in strange[0]


def test_a_declared_name_that_is_no_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"primary_metrics in study\.json is 'params_m'; write a list"):
        findings.find(made({"a": [0.1, 0.2, 0.3]}, study={"primary_metrics": "params_m"}))


def test_what_was_not_declared_is_no_claim_of_the_study() -> None:
    draw = np.random.default_rng(2)
    runs = made(
        {"a": draw.random(8)}, study={"primary_metrics": ["one"]}, one=draw.random(8), two=draw.random(8)
    )
    found = findings.find(runs)
    blocks = sections.page_blocks(runs, found, checklist.checklist(runs, found), {}, {})
    cards = [[card[0] for card in block.items] for block in blocks if isinstance(block, page.Cards)]
    assert cards == [["one tells which run errs less"], ["two tells which run errs less"]]
    assert [one.declared for one in sections.claims(runs, found)] == [True, False]


# Stopped runs


def test_arms_without_a_verdict_have_no_numbers_of_independent_runs() -> None:
    draw = np.random.default_rng(3)
    errors = {arm: draw.normal(0.1, 0.01, 6) for arm in ("a", "b", "random")}
    status = ["pruned"] + ["completed"] * 17
    runs = made(errors, study={"reference": "b", "baseline": "random"}, status=status)
    found = findings.find(runs)
    assert set(found.doubts) == {"a"}
    assert set(found.aggregates) == set(found.profiles) == {"b", "random"}
    assert set(found.improvement) == {"b"}
    one = next(one for one in found.versus if one.claim.arm == "a")
    assert (one.comparison, one.equivalence, one.paired, one.improvement) == (None, None, None, None)
    assert found.spread_df == 10
    expected = np.sqrt(np.mean([np.var(100 * errors[arm], ddof=1) for arm in ("b", "random")]))
    assert found.spread == pytest.approx(expected)


def test_a_weighted_verdict_is_adjusted_with_the_others() -> None:
    draw = np.random.default_rng(4)
    n = 24
    metric = draw.random(n)
    stopped = (metric > 0.5) & (np.arange(n) % 3 > 0)
    chance = np.where(metric > 0.5, 1 / 3, 1.0)
    runs = made(
        {"a": metric + 0.05 * draw.random(n)},
        study={"primary_metrics": ["one", "two"]},
        status=np.where(stopped, "pruned", "completed"),
        completion_probability=chance,
        one=metric,
        two=draw.random(n),
    )
    error = runs.error.to_numpy()
    found = {one.name: one for one in findings.find(runs).metrics}
    p = {}
    for name in ("one", "two"):
        draws = associations.draws_for(runs)[0]
        test = pruning.association(
            runs.metrics[name], error, probability=chance, stopped=stopped, draws=draws
        ).test
        assert found[name].p == test.p is not None
        p[name] = float(test.p or 0)
    first, second = sorted(p, key=lambda name: p[name])
    assert found[first].p_adjusted == pytest.approx(min(1, 2 * p[first]))
    assert found[second].p_adjusted == pytest.approx(max(min(1, 2 * p[first]), p[second]))
    assert found["one"].adjustment == "Holm over 2"


@pytest.mark.parametrize(("rungs", "expected"), [("retrain_epoch", 1 - 0.5 * 0.8), ("search_epoch", 0.5)])
def test_a_search_completes_with_the_chance_that_any_retraining_does(rungs: str, expected: float) -> None:
    second = 0.2 if rungs == "retrain_epoch" else 0.5
    runs = made(
        {"a": [0.1, 0.3, 0.2]},
        study={"stopping": {"rungs": rungs}},
        status=["completed", "pruned", "completed"],
        search_id=["s", "s", "t"],
        completion_probability=[0.5, second, 1.0],
    )
    assert runs.trials["completion_probability"].tolist() == pytest.approx([expected, 1.0])
    assert runs.error.tolist() == [0.1, 0.2]
    assert any(
        "Of 1 searches with a final error some retrainings were stopped" in t for t in limits.limits(runs)
    )
    assert "stopped early" in str(summary.dependence(runs.tables, "a"))


# What is missing is told


def test_trials_that_never_started_and_metrics_of_no_run_are_told() -> None:
    draw = np.random.default_rng(5)
    half = np.where(np.arange(9) < 3, np.nan, draw.random(9))
    runs = made(
        {"a": draw.random(3), "b": draw.random(3), "random": draw.random(3)},
        study={"planned": {"a": 5, "b": 3, "c": 2}, "baseline": "random"},
        search_margin=half,
        search_loss=np.where(np.arange(9) < 6, draw.random(9), np.nan),
        proxy_snip=draw.random(9),
        proxy_snip_status=[0, 0, 3, 0, 0, 0, 1, 0, 0],
        proxy_snip_sd=draw.random(9),
        proxy_snip_seconds=draw.random(9),
        search_seconds=draw.random(9),
    )
    assert list(runs.metrics) == ["proxy_snip", "search_loss", "search_margin", "search_seconds"]
    found = findings.find(runs)
    assert found.counts.n_not_started == 4
    told = "\n".join(found.restrictions)
    assert "4 planned trials were never started" in told
    assert "whole arms, of which they say nothing: search_margin (a)." in told
    assert "by their recorded status: proxy_snip (2)" in told
    assert findings.find(made({"a": [0.1, 0.2]})).counts.n_not_started is None


# Further numbers


def test_other_groupings_show_what_arms_hide() -> None:
    draw = np.random.default_rng(6)
    depth = np.repeat([1, 2], 10)
    inside = draw.random(20)
    runs = made(
        {"a": 0.1 + 0.3 * (depth == 2) + 0.01 * inside},
        study=None,
        margin=inside - 5.0 * depth,
        search_seed=np.arange(20),
        **{"axes.depth": depth},
    )
    one = {one.name: one for one in findings.find(runs).metrics}["margin"]
    assert one.detail is not None
    assert list(one.detail.groupings) == ["depth"]
    grouped = one.detail.groupings["depth"]
    assert grouped.within.value == pytest.approx(1)
    assert grouped.pooled.value is not None
    assert grouped.pooled.value < 0
    assert str(grouped.simpson).startswith("Simpson warning")


def test_a_metric_that_is_size_in_disguise_says_no_more_than_size() -> None:
    draw = np.random.default_rng(9)
    arm, size, own = np.repeat([0.0, 1.0], 15), draw.random(30), draw.random(30)
    error = 0.3 + arm - 0.1 * size - 0.1 * own
    runs = made({"a": error[:15], "b": error[15:]}, params_m=size, disguise=5 - 2 * size, more=size + own)
    found = {one.name: one.detail for one in findings.find(runs).metrics}

    def within(metric: Any) -> float:
        """Concordant less discordant pairs of the same arm, in shares of all: no value comes twice."""
        pairs = [(i, j) for i in range(30) for j in range(i) if arm[i] == arm[j]]
        return float(np.mean([np.sign((metric[i] - metric[j]) * (error[i] - error[j])) for i, j in pairs]))

    disguise, more = found["disguise"], found["more"]
    assert disguise is not None
    assert disguise.over_size is not None
    assert disguise.gain is not None
    assert disguise.over_size.value == pytest.approx(0)
    assert disguise.gain.value == pytest.approx(0, abs=1e-6)
    assert more is not None
    assert more.over_size is not None
    assert more.over_size.value == pytest.approx(within(-size - own) - within(-size))
    assert found["params_m"] is not None
    assert found["params_m"].over_size is None


@pytest.mark.parametrize("sign", [1, -1])
def test_what_one_metric_says_more_than_another_has_no_unit_and_no_direction(sign: int) -> None:
    draw = np.random.default_rng(10)
    error, good, poor = (draw.random(20) for _ in range(3))
    good = error + 0.3 * good
    runs = made({"a": error[:10], "b": 0.5 + error[10:]}, good=sign * 1e9 * good, poor=1e-9 * (poor - 0.5))
    final = runs.error.to_numpy()
    expected = {
        "pooled": [abs(stats.kendalltau(x, final).statistic) for x in (good, poor)],
        "within arms": [
            abs(sum(stats.kendalltau(x[half], final[half]).statistic for half in (slice(10), slice(10, 20))))
            / 2
            for x in (good, poor)
        ],
    }
    for over in ("pooled", "within arms"):
        found = associations.against(runs, "good", "poor", QUICK, over=over)  # type: ignore[arg-type]
        assert found.value == pytest.approx(expected[over][0] - expected[over][1])
        assert ("good" in str(found.restriction)) == (sign < 0)
        back = associations.against(runs, "poor", "good", QUICK, over=over)  # type: ignore[arg-type]
        assert back.value == pytest.approx(-found.value)


@pytest.mark.parametrize("over", ["pooled", "within arms"])
def test_a_metric_that_is_nowhere_finite_is_no_better_than_another(over: Any) -> None:
    runs = made({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.4]}, good=range(6))
    runs = replace(runs, metrics=runs.metrics.assign(lost=np.inf))
    for names in (("good", "lost"), ("lost", "good")):
        found = associations.against(runs, *names, QUICK, over=over)
        assert found.value is None
        assert "fewer than 3" in str(found.restriction)


def test_random_search_of_a_whole_space_is_exact() -> None:
    draw = np.random.default_rng(7)
    error = draw.random(30)
    runs = replace(made({"a": error}, params_m=-error), kind="ground truth")
    found = findings.find(runs)
    assert set(found.random_search) == {"1", "10"}
    assert found.random_search["1"] == pytest.approx(100 * error.mean())
    assert found.random_search["10"] == pytest.approx(selection.expected_best(100 * error, 10, lowest=True))
    detail = found.metrics[0].detail
    assert detail is not None
    assert detail.share == pytest.approx(1 / 30)  # the metric puts the best network first


def test_hours_to_a_target_count_sequences_that_never_reach_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(8)
    errors = {"a": np.full(6, 0.1), "b": draw.normal(0.3, 0.01, 6)}
    runs = made(errors, study={"reference": "a"})
    runs = replace(runs, tables=_timed(runs))
    fast, slow = findings.find(runs).anytime
    assert fast.target == pytest.approx(10)
    assert fast.to_target == pytest.approx((1.0, 1.0, 1.0))  # the first run of each sequence, one hour each
    assert (fast.n_reached, fast.n_sequences) == (399, 399)
    assert (slow.n_reached, slow.to_target) == (0, (None, None, None))
    assert slow.area is not None
    assert slow.area.value is not None
    assert 100 * errors["b"].min() <= slow.area.value <= 100 * errors["b"].max()


def _timed(runs: Sample) -> records.Tables:
    """The tables with one epoch of an hour per run, and a validation error like the test error."""
    trials = runs.trials.assign(valid_error=runs.trials["test_error"])
    epochs = pd.DataFrame({"trial_id": trials["trial_id"], "stage": "retrain", "epoch": 0, "key": "seconds"})
    return replace(runs.tables, trials=trials, epochs=epochs.assign(value=3600.0))


def test_many_metrics_are_drawn_less_often_and_declared_ones_as_often_as_ever() -> None:
    names = [f"m{number}" for number in range(200)]
    plain = Draws()
    assert associations._budget(names[:10], 100, plain) == plain
    fewer = associations._budget(names, 100, plain)
    assert fewer.resamples == fewer.permutations == 999
    assert associations._budget(names, 100, QUICK) == QUICK
