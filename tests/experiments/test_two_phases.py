"""Searching once and retraining each different network several times; and what a study will take."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from analysis import records
from experiments import estimate, sweep_joint, sweep_k, tune
from experiments.main import main
from experiments.packing import Share
from experiments.study import Planned, Settings, plan, retrainings, searches
from experiments.worker import TrialActor, configuration, data_key
from nas.data import Arrays, load
from nas.genotype import Genotype
from nas.published import PUBLISHED
from nas.trial import Trial, TrialRun

SMALL: dict[str, Any] = {
    "space.nodes": 2,
    "data.limit": 48,
    "data.test_limit": 16,
    "search.*.batch_size": 16,
    "search.*.epochs": 2,
    "retrain.epochs": 2,
    "retrain.batch_size": 24,
}
PLANNED = plan(sweep_k.STUDY, Settings("tiny", seeds=1, changes=SMALL))


def other_names(genotype: Genotype) -> Genotype:
    """The same network with the inputs of every node the other way round."""
    normal = replace(genotype.normal, nodes=tuple(inputs[::-1] for inputs in genotype.normal.nodes))
    return Genotype(normal, genotype.reduce)


# The plan


def test_searches_retrain_nothing_and_read_no_test_part() -> None:
    for p, search in zip(PLANNED, searches(PLANNED), strict=True):
        assert search.trial.retrain.epochs == 0
        assert (search.trial.search, search.trial.method) == (p.trial.search, p.trial.method)
        assert (search.name, search.arm, search.axes) == (p.name, p.arm, p.axes)
    # Another retraining seed is no other search.
    again = replace(
        PLANNED[0], trial=replace(PLANNED[0].trial, seeds=replace(PLANNED[0].trial.seeds, retrain=9))
    )
    assert searches([again])[0].trial.id == searches(PLANNED[:1])[0].trial.id


def test_each_different_network_is_retrained_with_every_seed() -> None:
    one, two = PUBLISHED["DARTS_V2"], PUBLISHED["PC_DARTS_cifar"]
    ids = [p.trial.id for p in searches(PLANNED)]
    found = dict(zip(ids, (one, two, other_names(one), one), strict=False))  # the fifth has found nothing
    apart = retrainings(PLANNED, found, 3)
    assert len(apart) == 6
    assert len({p.trial.id for p in apart}) == 6
    assert [p.trial.seeds.retrain for p in apart] == [0, 1, 2] * 2
    assert [p.found_by for p in apart] == [(ids[0], ids[2], ids[3])] * 3 + [(ids[1],)] * 3
    for p in apart:
        assert (p.trial.search, p.trial.measure) == ((), ())
        assert p.trial.retrain == PLANNED[0].trial.retrain
    # Nor does the plan depend on how the first to find a network wrote it.
    swapped = retrainings(PLANNED, found | {ids[0]: other_names(one)}, 3)
    assert [p.trial.id for p in swapped] == [p.trial.id for p in apart]


def test_arms_that_retrain_otherwise_are_retrained_apart() -> None:
    longer = replace(
        PLANNED[1], trial=replace(PLANNED[1].trial, retrain=replace(PLANNED[1].trial.retrain, epochs=5))
    )
    planned = [PLANNED[0], longer]
    found = {p.trial.id: PUBLISHED["DARTS_V2"] for p in searches(planned)}
    assert sorted(p.trial.retrain.epochs for p in retrainings(planned, found, 1)) == [2, 5]


# The run


class Actor(TrialActor):
    """The trainable with the data that Ray would hand it."""

    def setup(self, config: dict[str, Any], data: Mapping[str, Arrays] | None = None) -> None:
        trial = Trial.from_dict(config["planned"]["trial"])
        super().setup(config, {data_key(trial): load(trial.data)})


def rows_of(p: Planned) -> list[dict[str, Any]]:
    running = Actor(config={"planned": configuration(p, Share(cpus=1, gpus=0, memory_mb=512))})
    result: dict[str, Any] = {"done": False}
    rows: list[dict[str, Any]] = []
    while not result["done"]:
        result = running.step()
        rows += result["rows"]
    return rows


def test_two_phases_give_the_tables_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [next(p for p in PLANNED if p.arm == arm) for arm in ("K=4", "random")]
    study = {
        **{"schema": 1, "study_id": "0" * 12, "name": "sweep_k", "question": "?", "axis": "K"},
        **{"reference": "K=4", "baseline": "random", "arms": ["K=4", "random"]},
    }

    def tables(folder: Path, rows: list[dict[str, Any]]) -> records.Tables:
        folder.mkdir()
        (folder / "study.json").write_text(json.dumps(study))
        for row in rows:
            records.append_row(folder / "trials" / f"{row['trial']}.jsonl", row)
        records.export(folder)
        return records.read_tables(folder)

    with monkeypatch.context() as patched:
        patched.setattr(TrialRun, "_finish", lambda *_: pytest.fail("a search read the test part"))
        first = [row for p in searches(planned) for row in rows_of(p)]
    found = {row["trial"]: Genotype.parse(row["genotype"]) for row in first if row["kind"] == "end"}
    second = [row for p in retrainings(planned, found, 2) for row in rows_of(p)]
    apart = tables(tmp_path / "apart", first + second)
    trials = apart.trials
    assert list(trials["arm"]) == ["K=4", "K=4", "random", "random"]
    assert list(trials["retrain_seed"]) == [0, 1, 0, 1]
    assert trials["trial_id"].is_unique
    assert trials["search_id"].nunique() == 2
    assert trials["retraining_id"].nunique() == 4
    assert len(apart.finals()) == 4
    # As in one phase, a row has what the search says and what the retraining says, and epochs of both.
    together = tables(tmp_path / "together", [row for p in planned for row in rows_of(p)])
    searched = {"search_valid_error", "search_alpha_entropy", "discretisation_gap", "params_m", "skips"}
    for name in searched:
        values = trials.groupby("search_id", sort=False)[name].agg(lambda v: tuple(dict.fromkeys(v.dropna())))
        assert [v[:1] for v in values] == [tuple([v]) if v == v else () for v in together.trials[name]]
    assert set(trials.columns) == set(together.trials.columns)
    epochs = apart.epochs.groupby(["trial_id", "stage"], observed=True)["epoch"].nunique()
    assert set(epochs) == {2}
    assert len(epochs) == 2 * 2 + 2 * 1  # the random arm has no search


# A joint search that goes on


def test_optuna_hears_of_trials_whose_driver_died(tmp_path: Path) -> None:
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log")))
    study = optuna.create_study(storage=journal, study_name="joint")
    space = {"K": optuna.distributions.CategoricalDistribution([1, 2, 4])}
    chosen = [study.ask(space) for _ in range(3)]
    base = plan(sweep_joint.STUDY, Settings("tiny", seeds=1))[0].trial
    begun = Planned("searched", "searched", {"K": chosen[1].params["K"], "seed": 0}, base)
    end = {"kind": "end", "trial": base.id, "metrics": {"valid_error": 0.25, "params_m": 1.5}}
    records.append_row(tmp_path / "trials" / f"{base.id}.jsonl", end)
    place = tune.Place(None, {}, None, tmp_path)  # type: ignore[arg-type]
    tune._settle(journal, [begun], ["error", "params"][:1], place)
    told = study.get_trials()
    same = [t.params["K"] == begun.axes["K"] for t in told]
    assert [t.state for t in told] == [TrialState.COMPLETE if s else TrialState.FAIL for s in same]
    assert [t.value for t in told if t.state == TrialState.COMPLETE] == [0.25] * sum(same)


# What it will take


def test_time_is_that_of_the_epochs_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = PLANNED[0].trial
    stage = replace(trial.search[0], epochs=10, frozen_epochs=4)
    trial = replace(trial, search=(stage,), retrain=replace(trial.retrain, epochs=20))
    seconds = iter([9.0, 1.0, 3.0, 9.0, 5.0])
    monkeypatch.setattr(estimate, "_seconds", lambda run: (run.step(), next(seconds))[1])
    arrays = load(trial.data)
    found = estimate.estimate(trial, arrays, torch.device("cpu"))
    train = 48 - round(0.2 * 48)
    share = min(1.0, estimate.BATCHES * 24 / (train // 2))
    assert found.seconds == pytest.approx((4 * 1 + 6 * 3 + 20 * 5) / share, rel=0.1)
    assert found.epochs == 30
    assert 0.01 < found.checkpoint_mb < 5


def test_a_dry_run_lists_trials_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import cluster
    from experiments.packing import Machine, Node

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connect", lambda resources: None)
    monkeypatch.setattr(cluster, "check_resources", lambda resources: None)
    monkeypatch.setattr(cluster, "machine", lambda resources: Machine((Node(2, 0, 8192, 8192),)))
    changes = [f"{name}={value}" for name, value in SMALL.items()]
    main(
        sweep_k.STUDY,
        ["--preset", "tiny", "--seeds", "1", "--dry-run", "--retrain-seeds", "2", "--set", *changes],
    )
    said = capsys.readouterr().out
    for p in searches(PLANNED):
        assert f"{p.trial.id}  " in said
    assert said.count("retrain=") == 2 * len(PLANNED)
    assert "time: about " in said
    assert "disk: about " in said
    assert not list(tmp_path.iterdir())
