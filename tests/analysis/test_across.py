from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import loaders
from analysis.across import across, render
from analysis.loaders import Sample
from tests.analysis.conftest import Outcome, write_study, write_trial

ARMS = {"K=1": -0.05, "K=4": -0.03, "random": 0.0}


def dataset(
    folder: Path, name: str, outcomes: Mapping[str, Sequence[Outcome]], digest: str | None = None
) -> Sample:
    origin = {"data_name": name, "data_sha256": digest or name * 8}
    write_study(folder / name, arms=list(outcomes), provenance=origin)
    for arm, results in outcomes.items():
        for seed, result in enumerate(results):
            lost = isinstance(result, str)
            write_trial(folder / name, arm, seed, None if lost else result, result if lost else "completed")  # type: ignore[arg-type]
    return loaders.load(folder / name)


def drawn(datasets: int, runs: int = 3) -> dict[str, dict[str, list[float]]]:
    """Errors by data set and arm: the arms differ by `ARMS`, the data sets by much more."""
    draw = np.random.default_rng(0)
    return {
        f"set{index}": {
            arm: [0.2 + index / 10 + shift + float(noise) for noise in draw.normal(0, 0.01, runs)]
            for arm, shift in ARMS.items()
        }
        for index in range(datasets)
    }


def test_ranks_and_probabilities_are_those_of_the_errors(tmp_path: Path) -> None:
    errors = drawn(5)
    found = across([dataset(tmp_path, name, arms) for name, arms in errors.items()])
    means = {arm: [np.mean(arms[arm]) for arms in errors.values()] for arm in ARMS}
    assert found.ranks.friedman is not None
    assert found.ranks.friedman.p == pytest.approx(stats.friedmanchisquare(*means.values()).pvalue)
    assert "fewer than 10" in (found.ranks.restriction or "")
    wins = [
        stats.mannwhitneyu(arms["K=4"], arms["K=1"]).statistic / 9 for arms in errors.values()
    ]  # share of pairs in which K=4 errs more
    assert found.improvement["K=1", "K=4"].value == pytest.approx(np.mean(wins))
    scores = [
        (np.mean(arms["random"]) - error) / (np.mean(arms["random"]) - min(map(min, arms.values())))
        for arms in errors.values()
        for error in arms["K=1"]
    ]
    assert found.iqm["K=1"].value == pytest.approx(stats.trim_mean(scores, 0.25))
    assert found.iqm["K=1"].low is not None
    told = render(found)
    assert "Iman-Davenport F" in told
    assert "not told apart (Nemenyi, alpha 0.05)" in told


def test_few_data_sets_have_no_ranks(tmp_path: Path) -> None:
    found = across([dataset(tmp_path, name, arms) for name, arms in drawn(2).items()])
    assert found.ranks.cd is None
    assert "ranks over data sets: 2 blocks, fewer than 5: no diagram" in render(found)


def test_one_data_set_twice_is_refused(tmp_path: Path) -> None:
    one, two = (dataset(tmp_path, name, arms, "a" * 64) for name, arms in drawn(2).items())
    with pytest.raises(ValueError, match="replicates"):
        across([one, two])


def test_an_arm_of_selected_runs_is_left_out_of_all(tmp_path: Path) -> None:
    first, second = drawn(2).values()
    stopped: dict[str, Sequence[Outcome]] = {**second, "K=4": [0.2, 0.3, "pruned"]}
    found = across([dataset(tmp_path, "one", first), dataset(tmp_path, "two", stopped)])
    assert found.arms == ("K=1", "random")
    assert "stopped early" in found.left_out["K=4"]
    lost: dict[str, Sequence[Outcome]] = {"K=1": ["pruned"], "random": [0.3]}
    with pytest.raises(ValueError, match="fewer than two arms"):
        across([dataset(tmp_path, "three", first), dataset(tmp_path, "four", lost)])


def test_arms_that_share_a_retraining_on_one_data_set_are_left_out_of_all(tmp_path: Path) -> None:
    one, two = (dataset(tmp_path, name, arms) for name, arms in drawn(2).items())
    same = two.trials["arm"].isin(["K=1", "K=4"])
    ids = two.trials["retraining_id"].mask(same, "network-" + two.trials["search_seed"].astype(str))
    shared = replace(two, tables=replace(two.tables, trials=two.trials.assign(retraining_id=ids)))
    with pytest.raises(ValueError, match=r"K=1 and K=4: 6 of their searches .*share its retrainings on set1"):
        across([one, shared])
    errors = drawn(2)["set1"] | {"K=8": [0.2, 0.21, 0.22]}
    more = dataset(tmp_path, "more", errors)
    ids = more.trials["retraining_id"].mask(
        more.trials["arm"].isin(["K=1", "K=4"]) & (more.trials["search_seed"] == 0), "network"
    )
    found = across(
        [
            dataset(tmp_path, "other", drawn(1)["set0"] | {"K=8": [0.2, 0.21, 0.22]}),
            replace(more, tables=replace(more.tables, trials=more.trials.assign(retraining_id=ids))),
        ]
    )
    assert found.arms == ("random", "K=8")
    assert set(found.left_out) == {"K=1", "K=4"}
