from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import loaders, studies
from analysis.loaders import Sample
from tests.analysis.conftest import Outcome, write_study, write_trial

A = {"K=1": [0.101, 0.113, 0.118, 0.125], "K=4": [0.221, 0.202, 0.231, 0.215]}
B = {"K=1": [0.105, 0.121, 0.131, 0.132], "K=4": [0.262, 0.219, 0.223, 0.271]}


def sample(
    folder: Path, outcomes: Mapping[str, Sequence[Outcome]], first: int = 0, **fields: object
) -> Sample:
    """A study whose trials have the seeds from `first` on; equal seeds of one arm are one trial."""
    write_study(folder, arms=list(outcomes), baseline=None, **fields)
    for arm, results in outcomes.items():
        for seed, result in enumerate(results, start=first):
            lost = isinstance(result, str)
            write_trial(folder, arm, seed, None if lost else result, result if lost else "completed")  # type: ignore[arg-type]
    return loaders.load(folder)


def test_independent_arms_are_judged_by_welch_and_holm(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a", A), sample(tmp_path / "b", B, first=10)
    found = studies.hold(a, b, studies.pairs(a, b, None))
    assert [held.arms for held in found] == [("K=1", "K=1"), ("K=4", "K=4")]
    p = [stats.ttest_ind(A[arm], B[arm], equal_var=False).pvalue for arm in A]
    assert [held.p for held in found] == pytest.approx(p)
    smaller = min(1.0, 2 * min(p))
    assert sorted(held.adjusted_p or 0 for held in found) == pytest.approx([smaller, max(smaller, *p)])
    assert not any(held.in_pairs or held.paired for held in found)
    assert found[0].verdict == "undecided at n=4"
    assert "minimum detectable difference" in studies.render(found[0], 2)


def test_trials_that_ran_in_both_studies_are_compared_in_pairs(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a", A), sample(tmp_path / "b", B)
    held = studies.hold(a, b, [("K=1", "K=1")])[0]
    assert held.in_pairs
    assert held.doubt is None
    assert held.p == pytest.approx(stats.ttest_rel(A["K=1"], B["K=1"]).pvalue)
    assert held.p is not None
    assert held.p < 0.05 < stats.ttest_ind(A["K=1"], B["K=1"]).pvalue
    assert held.verdict == "supported"
    assert "compared in pairs" in studies.render(held, 1)


def test_trials_of_both_studies_that_do_not_come_in_pairs_get_no_verdict(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a", A), sample(tmp_path / "b", B, first=2)
    held = studies.hold(a, b, [("K=1", "K=1")])[0]
    assert held.verdict == "no verdict"
    assert held.p is None
    assert held.doubt == "2 trials ran in both studies, and not all runs come in pairs"
    twice = replace(a, tables=replace(a.tables, trials=a.trials.assign(search_seed=0)))
    held = studies.hold(twice, twice, [("K=1", "K=1")])[0]
    assert held.doubt == "4 trials ran in both studies, and search seeds repeat within an arm (K=1)"


def test_what_other_arms_were_measured_by_has_no_say(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a", A), sample(tmp_path / "b", B)

    def retrained(one: Sample, **epochs: int) -> Sample:
        """The study with its arms retrained for so many epochs, K=1 first."""
        trials = one.trials.assign(**{"config.retrain.epochs": one.trials["arm"].map({**epochs})})
        return loaders.of_tables(replace(one.tables, trials=trials), {})

    a, b = retrained(a, **{"K=1": 3, "K=4": 5}), retrained(b, **{"K=1": 3, "K=4": 6})
    assert not any("pooled" in told for told in studies.alike([a, b], [("K=1", "K=1")]))
    with pytest.raises(ValueError, match=r"config\.retrain\.epochs: 5, 6.*--pool"):
        studies.alike([a, b], [("K=4", "K=4")])
    assert "pooled over differing" in studies.alike([a, b], [("K=4", "K=4")], pool=True)[-1]
    for held, arm in zip(studies.hold(a, b, studies.pairs(a, b, None)), A, strict=True):
        assert (held.in_pairs, held.doubt) == (True, None)
        assert held.p == pytest.approx(stats.ttest_rel(A[arm], B[arm]).pvalue)


def test_one_doubted_arm_takes_the_verdict_and_leaves_the_family(tmp_path: Path) -> None:
    a = sample(tmp_path / "a", A | {"K=4": [0.1, 0.11, 0.12, "pruned", "pruned", "pruned", "failed"]})
    b = sample(tmp_path / "b", B, first=10)
    one, four = studies.hold(a, b, studies.pairs(a, b, None))
    assert one.adjusted_p == one.p
    assert (four.adjusted_p, four.verdict) == (None, "no verdict")
    told = studies.render(four, 1)
    assert "first, K=4: n_total 7, n_used 3, n_pruned 3, n_failed 1, n_pending 0" in told
    assert "second, K=4: n_total 4, n_used 4, n_pruned 0, n_failed 0, n_pending 0" in told
    assert "no verdict: 3 of its 7 runs were stopped early" in told
    assert "Welch" not in told
    assert "[" not in told


@pytest.mark.parametrize(
    ("fields", "said"), [({"scheduler": "pbt"}, "copy one another"), ({"joint": True}, "in view of another")]
)
def test_each_study_answers_for_its_own_doubts(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    a, b = sample(tmp_path / "a", A, **fields), sample(tmp_path / "b", B, first=10)
    for first, second in ((a, b), (b, a)):
        held = studies.hold(first, second, [("K=1", "K=1")])[0]
        assert held.verdict == "no verdict"
        assert said in (held.doubt or "")


def test_what_is_not_known_of_the_data_is_said_and_what_differs_is_refused(tmp_path: Path) -> None:
    plain = sample(tmp_path / "plain", {"K=1": [0.1, 0.2]})
    known = sample(tmp_path / "known", {"K=1": [0.1, 0.2]}, provenance={"data_sha256": "a" * 64})
    assert any("hash not recorded" in told for told in studies.alike([plain, plain], [("K=1", "K=1")]))
    assert any("protocol: not recorded" in told for told in studies.alike([plain, plain], [("K=1", "K=1")]))
    assert not any("hash" in told for told in studies.alike([known, known], [("K=1", "K=1")]))
    with pytest.raises(ValueError, match=r"data \(unknown and aaaaaaaaaaaa\).*--pool"):
        studies.alike([plain, known], [("K=1", "K=1")])
    assert "pooled over differing data" in studies.alike([plain, known], [("K=1", "K=1")], pool=True)[-1]


def test_another_endpoint_is_refused_even_pooled(tmp_path: Path) -> None:
    last = sample(tmp_path / "a", {"K=1": [0.1, 0.2]})
    best = replace(last, measured="test error, the best over its epochs")
    with pytest.raises(ValueError, match="endpoints differ"):
        studies.alike([last, best], [("K=1", "K=1")], pool=True)
    studies.alike([last, replace(last, retrainings=3)], [("K=1", "K=1")])


def test_a_published_figure_is_held_against_a_new_run(tmp_path: Path) -> None:
    study = sample(tmp_path / "a", A)
    found, doubt = studies.reproduced(study, "K=1", 12.0, 0.5, 10)
    assert doubt is None
    assert found is not None
    errors = 100 * np.array(A["K=1"])
    margin = stats.t.ppf(0.975, 3) * errors.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert (found.low, found.high) == pytest.approx((errors.mean() - margin, errors.mean() + margin))
    assert found.z == pytest.approx((errors.mean() - 12.0) / (0.5 * np.sqrt(1 / 10 + 1 / 4)))
    told = studies.render_reproduction(found, doubt)
    assert "the published mean lies inside" in told
    assert "z = " in told
    outside = studies.render_reproduction(*studies.reproduced(study, "K=1", 50.0))
    assert "lies outside" in outside
    assert "z = " not in outside


def test_a_published_figure_is_no_interval_away_from_selected_runs(tmp_path: Path) -> None:
    study = sample(tmp_path / "a", {"K=1": [0.1, 0.11, "pruned"], "K=4": ["pruned"]})
    told = studies.render_reproduction(*studies.reproduced(study, "K=1", 12.0, 0.5, 10))
    assert "no prediction interval and no z: 1 of its 3 runs was stopped early" in told
    assert studies.reproduced(study, "K=4", 12.0) == (None, "no run has finished")
