"""Summaries count every trial, and sentences say what the numbers allow."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.records import Tables
from analysis.summary import by_search, claims, judged, render, rows, summarise, to_markdown

from .conftest import Build, draws

FOUR = {
    "K=1": draws(0.06, 0.002, 3, seed=1),
    "K=2": draws(0.04, 0.002, 3, seed=2),
    "K=4": draws(0.061, 0.004, 3, seed=3),
    "K=8": draws(0.09, 0.002, 3, seed=4),
    "random": draws(0.065, 0.003, 3, seed=5),
}


def test_an_arm_has_the_mean_and_interval_of_its_runs(build: Build) -> None:
    summary = summarise(build(FOUR))
    assert summary["arm"].tolist() == list(FOUR)
    assert summary["role"].tolist() == ["reference", "", "", "", "baseline"]
    for row, errors in zip(rows(summary), FOUR.values(), strict=True):
        low, high = stats.ttest_1samp(100 * np.array(errors), 0).confidence_interval()
        assert [row.error_mean, row.error_low, row.error_high] == pytest.approx(
            [100 * np.mean(errors), low, high]
        )


def test_every_trial_is_counted_once(build: Build) -> None:
    outcomes = {
        "K=1": [0.1, 0.2, "pruned", "failed", "oom", "diverged", "pending", None],
        "K=4": ["failed"],
        "none": [],
        "random": [0.1],
    }
    summary = summarise(build(outcomes))
    counts = summary[["n", "n_pruned", "n_failed", "n_pending", "n_missing"]]
    assert counts.values.tolist() == [[2, 1, 3, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert counts.sum(axis=1).tolist() == summary["n_total"].tolist() == [8, 1, 0, 1]


def test_numbers_are_of_finished_trials_only(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.2, "failed"], "random": []})
    tables.trials.loc[2, "params_m"] = 99.0
    row = next(iter(rows(summarise(tables))))
    assert row.params_m == 0.5
    assert row.error_mean == pytest.approx(15)


def test_networks_are_counted_by_key(build: Build) -> None:
    # The helper gives seed s the genotype s modulo 3.
    assert summarise(build({"K=1": [0.1, 0.2, 0.3, 0.4], "random": [0.1]}))["n_unique"].tolist() == [3, 1]


def test_one_run_has_no_interval_and_the_table_says_so(build: Build) -> None:
    summary = summarise(build({"K=1": [0.05], "random": [0.06, 0.07]}))
    assert summary["error_low"].isna().tolist() == [True, False]
    text = render(summary)
    assert re.search(r"^K=1 \(reference\) +1 +5\.00 +0\.500", text, re.MULTILINE)
    assert "K=1: one run, so the spread between runs is unknown: no interval." in text


JOINT = "its configurations were chosen one in view of another"
PBT = "members of its population copy one another"
PRUNED = "2 of its 5 runs were stopped early, so those that finished were selected by validation error"
DEPENDENT: dict[str, list[float | str]] = {
    "K=1": [0.05, 0.06, 0.07, "pruned", "pruned"],
    "random": [0.1, 0.12],
}


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({}, [PRUNED, ""]),
        ({"scheduler": "asha", "joint": False}, [PRUNED, ""]),
        ({"joint": True}, [f"{JOINT}, and {PRUNED}", ""]),
        ({"scheduler": "pbt"}, [f"{PBT}, and {PRUNED}", PBT]),
    ],
)
def test_runs_that_are_not_independent_have_a_mean_and_no_interval(
    build: Build, fields: dict[str, object], reasons: list[str]
) -> None:
    summary = summarise(build(DEPENDENT, **fields))
    assert summary["no_interval"].tolist() == reasons
    assert summary["error_mean"].tolist() == pytest.approx([6, 11])
    for bound in ("error_low", "error_high"):
        assert summary[bound].isna().tolist() == [bool(reason) for reason in reasons]
    assert f"- K=1: {reasons[0]}: no interval." in to_markdown(summary).splitlines()


def test_an_arm_without_finished_runs_is_not_said_to_lack_an_interval(build: Build) -> None:
    text = render(summarise(build({"K=1": ["pruned"], "random": [0.1, 0.2]})))
    assert "K=1: no finished run (1 pruned of 1)." in text
    assert "no interval" not in text


def test_the_table_shows_what_a_search_step_keeps(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.2], "random": [0.1, 0.3]})
    assert summarise(tables)["search_saved_mb"].isna().all()
    tables.trials["search_saved_mb"] = [10.0, 20.5, np.nan, np.nan]
    header, _, *body = to_markdown(summarise(tables)).splitlines()
    place = [cell.strip() for cell in header.split("|")].index("saved MB")
    assert "memory" in header.split("|")[place + 1]
    assert [line.split("|")[place].strip() for line in body[:2]] == ["15.2", "-"]
    del tables.trials["search_saved_mb"]  # exported by an older version
    assert summarise(tables)["search_saved_mb"].isna().all()


def failing(build: Build, *reasons: str) -> Tables:
    """Tables of a study whose reference arm failed for these reasons, in the order of its trials."""
    tables = build({"K=1": [0.1, 0.2, *["failed"] * len(reasons)], "random": [0.1, 0.3]})
    failed = tables.trials["status"] == "failed"
    tables.trials["reason"] = tables.trials["reason"].astype(object)
    tables.trials.loc[failed, "reason"] = list(reasons)
    return tables


def test_the_first_reason_of_a_failure_is_printed(build: Build) -> None:
    tables = failing(build, "worker\nlost \x1b[36mat once\x1b[0m", "disk full")
    expected = 'First failure: "worker lost at once"; see column reason of trials.parquet for the rest.'
    assert claims(tables)[0].endswith(f"in none of the numbers: 2 failed. {expected}")
    for text in (render(summarise(tables)), to_markdown(summarise(tables))):
        assert f"of the 2 finished. {expected}" in " ".join(text.split())


def test_a_long_reason_keeps_both_ends_and_is_shortened(build: Build) -> None:
    failure = summarise(failing(build, "first " + "x" * 500 + " last"))["failure"].iloc[0]
    assert len(failure) <= 165
    assert failure.startswith("first x")
    assert failure.endswith("x last")


def test_stopped_trials_are_no_failures(build: Build) -> None:
    tables = build({"K=1": [0.1, "pruned"], "random": [0.1]})
    tables.trials["reason"] = "stopped by the scheduler"
    assert "stopped by" not in claims(tables)[0] + render(summarise(tables))


def test_the_table_tells_what_is_missing(build: Build) -> None:
    summary = summarise(build({"K=1": [0.1, 0.2, "pruned", "oom", None], "K=4": ["pending"], "random": []}))
    for text in (render(summary), to_markdown(summary)):
        flat = " ".join(text.split())
        assert "2 of 5" in flat
        missing = "1 pruned, 1 failed, 1 ended without a test error of 5 runs"
        assert f"K=1: {missing}; the numbers are of the 2 finished." in flat
        assert "K=4: no finished run (1 not ended of 1)." in flat
        assert "random: no run has started." in flat


def test_the_text_table_fits_a_terminal(build: Build) -> None:
    long = "method.supernet.partial_channels=4, method.supernet.edge_norm=True, search.0.epochs=50"
    errors: list[float | str] = [0.1, 0.9, *["failed"] * 10]
    summary = summarise(build({long: errors, "K=1": [0.5], "random": errors}))
    wide = {"search_seconds": 123456.0, "search_saved_mb": 12345.6, "peak_memory_mb": 123456.0}
    text = render(summary.assign(**wide, params_m=123.456))
    assert max(map(len, text.splitlines())) <= 100
    first_column = text.splitlines()[1].index(" ")
    names = [line[:first_column].strip() for line in text.split("\n\n")[0].splitlines()[2:]]
    assert "".join(names).replace(" ", "") == f"{long}K=1(reference)random(baseline)".replace(" ", "")
    assert "34.3 h" in text
    assert "123.5 GB" in text


def test_columns_of_the_text_table_align(build: Build) -> None:
    lines = render(summarise(build(FOUR))).splitlines()[:7]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "arm"


def test_markdown_has_a_cell_per_column_and_escapes_bars(build: Build) -> None:
    text = to_markdown(summarise(build({"a|b": [0.1, 0.2], "random": [0.1]}, reference=None)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert lines[2].startswith(r"| a\|b | 2 |")


# Claims


def test_claims_compare_each_arm_with_the_reference_and_with_random(build: Build) -> None:
    sentences = claims(build(FOUR))
    pairs = [sentence.split(":")[0] for sentence in sentences[1:-1]]
    assert pairs == [
        *(f"{arm} against K=1 (reference)" for arm in ("K=2", "K=4", "K=8")),
        *(f"{arm} against random (baseline)" for arm in ("K=1", "K=2", "K=4", "K=8")),
    ]
    assert sentences[0] == "15 of 15 trials finished with a test error."


def test_claims_give_the_numbers_of_an_independent_computation(build: Build) -> None:
    sentences = claims(build(FOUR))
    percent = {arm: 100 * np.array(errors) for arm, errors in FOUR.items()}
    arms = [
        *((arm, "K=1") for arm in ("K=2", "K=4", "K=8")),
        *((arm, "random") for arm in ("K=1", "K=2", "K=4", "K=8")),
    ]
    tests = [stats.ttest_ind(percent[a], percent[b], equal_var=False) for a, b in arms]
    adjusted = np.empty(len(tests))
    previous = 0.0
    for rank, index in enumerate(np.argsort([test.pvalue for test in tests])):
        previous = adjusted[index] = min(1, max(previous, (len(tests) - rank) * tests[index].pvalue))
    for (a, b), test, p, sentence in zip(arms, tests, adjusted, sentences[1:], strict=False):
        low, high = test.confidence_interval()
        mean = percent[a].mean() - percent[b].mean()
        assert (
            f"test error {mean:+.2f} percentage points, 95 % interval [{low:+.2f}, {high:+.2f}]" in sentence
        )
        assert (f"adjusted p = {p:.3f}" if p >= 0.001 else "adjusted p < 0.001") in sentence
        expected = "undecided at n=3" if p >= 0.05 else "supported" if mean < 0 else "not supported"
        assert f'"{a} errs less" is {expected}' in sentence


def test_claims_reach_all_three_verdicts(build: Build) -> None:
    text = "\n".join(claims(build(FOUR)))
    assert re.search(r'"K=2 errs less" is supported\.$', text, re.MULTILINE)
    assert re.search(r'"K=8 errs less" is not supported\.$', text, re.MULTILINE)
    assert re.search(
        r'"K=4 errs less" is undecided at n=3; with this spread, 80 % .* of \d\.\d\d points', text
    )


def test_improvement_over_random_is_given_with_both_means(build: Build) -> None:
    sentences = claims(build({"K=1": [0.1, 0.2], "random": [0.3, 0.5]}))
    assert "accuracy 85.00 % against 60.00 % (relative improvement +41.67 %)" in sentences[1]


def test_one_run_leaves_a_claim_undecided_and_out_of_the_family(build: Build) -> None:
    sentences = claims(build({"K=1": [0.1], "K=4": [0.2, 0.3], "random": [0.3, 0.5]}))
    assert '"K=4 errs less" is undecided at n=2 and 1: one run on a side' in sentences[1]
    assert "Holm's method over 1 comparison;" in sentences[-1]


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({}, f"{PRUNED} (K=1)"),
        ({"joint": True}, f"{JOINT}, and {PRUNED} (K=1)"),
        ({"scheduler": "pbt"}, f"{PBT}, and {PRUNED} (K=1); {PBT} (random)"),
    ],
)
def test_runs_that_are_not_independent_get_no_verdict(
    build: Build, fields: dict[str, object], doubt: str
) -> None:
    assert claims(build(DEPENDENT, **fields))[1:] == [
        "K=1 against random (baseline): test error -5.00 percentage points, n = 3 and 2; "
        f"no verdict: {doubt}."
    ]


def test_a_doubt_of_both_arms_is_said_once(build: Build) -> None:
    sentences = claims(build({"K=1": [0.1, 0.2], "random": [0.3, 0.5]}, scheduler="pbt"))
    assert sentences[1].endswith(f"no verdict: {PBT} (K=1, random).")


def test_pairs_without_a_verdict_leave_the_family(build: Build) -> None:
    whole, pruned = claims(build(FOUR)), claims(build({**FOUR, "K=2": [*FOUR["K=2"], "pruned"]}))
    assert sum("no verdict" in sentence for sentence in pruned) == 2
    assert "Holm's method over 7 comparisons;" in whole[-1]
    assert "Holm's method over 5 comparisons;" in pruned[-1]
    tests = {
        (a, b): stats.ttest_ind(FOUR[a], FOUR[b], equal_var=False).pvalue
        for a, b in [("K=4", "K=1"), ("K=8", "K=1"), *((a, "random") for a in ("K=1", "K=4", "K=8"))]
    }
    (a, b), least = min(tests.items(), key=lambda item: item[1])
    sentence = next(sentence for sentence in pruned if sentence.startswith(f"{a} against {b} "))
    assert (f"p = {5 * least:.3f}" if 5 * least >= 0.001 else "p < 0.001") in sentence


def test_a_note_of_the_study_is_the_last_claim(build: Build) -> None:
    outcomes = {"K=1": [0.1, 0.2], "random": [0.1, 0.3]}
    plain = claims(build(outcomes))
    assert claims(build(outcomes, note="Seeds share one split.")) == [*plain, "Seeds share one split."]
    assert claims(build(outcomes, note=None)) == claims(build(outcomes, note="")) == plain


def test_claims_say_what_is_missing(build: Build) -> None:
    sentences = claims(build({"K=1": ["pending", "oom"], "K=4": [0.1, None], "random": [0.2]}))
    assert sentences[0] == (
        "2 of 5 trials finished with a test error; the others, in none of the numbers: "
        "1 oom, 1 pending, 1 completed without a test error."
    )
    assert "K=4 against K=1 (reference): undecided, as no run of K=1 has finished." in sentences


def test_claims_without_baseline_or_reference_say_so(build: Build) -> None:
    sentences = claims(build({"K=1": [0.1, 0.2], "K=4": [0.1, 0.3]}, baseline=None, reference=None))
    assert sentences == [
        "4 of 4 trials finished with a test error.",
        "The study has no random baseline, so it cannot say whether an arm is better than random.",
        "The study names no reference arm, so its arms are not compared with one another.",
    ]


def test_a_study_without_finished_trials_has_a_table_and_claims(build: Build) -> None:
    tables = build({"K=1": [], "random": ["pending"]})
    assert "K=1: no run has started." in render(summarise(tables))
    assert (
        claims(tables)[1]
        == "K=1 against random (baseline): undecided, as no run of K=1 or random has finished."
    )


def test_a_reference_that_is_the_baseline_is_compared_with_once(build: Build) -> None:
    sentences = claims(build({"K=1": [0.1, 0.2], "random": [0.1, 0.3]}, reference="random"))
    assert [sentence.split(":")[0] for sentence in sentences[1:-1]] == ["K=1 against random (baseline)"]


def test_retrainings_of_one_search_are_one_run(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.3, 0.2], "K=4": [0.4, 0.5]}, baseline=None)
    searches = ["a", "a", "b", "c", "d"]
    several = replace(tables, trials=tables.trials.assign(search_id=searches))
    first = summarise(several).iloc[0]
    assert (first["n"], first["error_mean"]) == (2, pytest.approx(20.0))
    assert judged(several)[0].difference.n_b == 2  # type: ignore[union-attr]
    kept = by_search(several)
    assert kept.trials["search_id"].tolist() == ["a", "b", "c", "d"]
    assert set(kept.epochs["trial_id"]) == set(kept.trials["trial_id"])
    assert by_search(tables) is tables


def test_the_seconds_of_all_retrainings_are_paid_for(build: Build) -> None:
    tables = build({"K=1": [0.1, 0.3]}, baseline=None, reference=None)
    epochs = tables.epochs.astype({"trial_id": str, "stage": str, "key": str})
    seconds = epochs[(epochs["key"] == "valid_error") & (epochs["stage"] == "retrain")]
    seconds = seconds.assign(key="seconds", value=5.0)
    several = replace(
        tables,
        trials=tables.trials.assign(search_id="a"),
        epochs=pd.concat([epochs, seconds], ignore_index=True),
    )
    kept = by_search(several).epochs
    assert kept.loc[kept["key"] == "seconds", "value"].tolist() == [10.0] * 4
