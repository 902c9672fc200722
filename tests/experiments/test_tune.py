"""A trial as Ray drives it, without Ray: what a step is and tells, how it stops, resumes and makes way."""

import gc
import json
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from optuna.exceptions import ExperimentalWarning
from ray.tune import loguniform

from analysis import records
from experiments import (
    cluster,
    compare_methods,
    schedulers,
    sweep_depths,
    sweep_edge_norm,
    sweep_joint,
    sweep_k,
    sweep_skips,
    tune,
    worker,
)
from experiments.packing import Machine, Node, Share
from experiments.provenance import fingerprint
from experiments.recorder import Recorder
from experiments.schedulers import scheduler
from experiments.stopping import SchedulerName, Stopping
from experiments.study import (
    PRESETS,
    Domain,
    Joint,
    Planned,
    Policy,
    Resources,
    Settings,
    Study,
    plan,
)
from experiments.tune import Forward, Halt, Place
from experiments.worker import METRIC, TIME, TrialActor, configuration
from nas.config import override, paths
from nas.data import Arrays, load
from nas.genotype import Genotype
from nas.trial import TrialRun

SMALL: dict[str, Any] = {"space.nodes": 2, "data.limit": 60, "data.test_limit": 20, "retrain.epochs": 3}
MEASURED = ("seconds", "peak_memory_mb")
"""How metrics of the machine end, rather than of the trial."""

SEARCH_METRICS = {
    *(
        "train_loss",
        "train_error",
        "valid_loss",
        "valid_error",
        "alpha_entropy",
        "beta_entropy",
        "alpha_margin",
    ),
    *("skips", "depth_normal", "depth_reduce", "width_normal", "width_reduce", "params_m", "madds_m"),
    *("seconds", "peak_memory_mb"),
}
RETRAIN_METRICS = {
    *(
        "train_loss",
        "train_error",
        "valid_loss",
        "valid_error",
        "lr",
        "drop_path",
        "seconds",
        "peak_memory_mb",
    ),
}


@cache
def trials(study: str = "sweep_k") -> Mapping[str, Planned]:
    """Trials of 2 search and 3 retraining epochs by name."""
    changes = SMALL | ({"search.*.epochs": 2} if study == "sweep_k" else {})
    studies = {"sweep_k": sweep_k.STUDY, "sweep_depths": sweep_depths.STUDY}
    return {p.name: p for p in plan(studies[study], Settings("tiny", seeds=2, changes=changes))}


ONE = Share(cpus=1, gpus=0, memory_mb=512)
K4, K8, RANDOM = "K=4 seed=0", "K=8 seed=1", "random seed=0"


@cache
def arrays() -> Mapping[str, Arrays]:
    trial = trials()[K4].trial
    return {worker.data_key(trial): load(trial.data)}


class Actor(TrialActor):
    """The trainable with the data that Ray would hand it."""

    def setup(self, config: dict[str, Any], data: Mapping[str, Arrays] | None = None) -> None:
        super().setup(config, arrays())


def planned_config(p: Planned | str, **changes: Any) -> dict[str, Any]:
    p = trials()[p] if isinstance(p, str) else p
    return {"planned": configuration(p, ONE) | changes}


def actor(p: Planned | str, **changes: Any) -> Actor:
    return Actor(config=planned_config(p, **changes))


def to_the_end(running: Actor) -> list[dict[str, Any]]:
    results = [running.step()]
    while not results[-1]["done"]:
        results.append(running.step())
    return results


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for result in results for row in result["rows"]]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows say of the trial, not of the process or the clock."""
    told = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in ("time", "attempt")}
        if "metrics" in row:
            row["metrics"] = {n: v for n, v in row["metrics"].items() if not n.endswith(MEASURED)}
        told.append(row)
    return told


@cache
def complete(name: str) -> list[dict[str, Any]]:
    """Results of a trial that nothing interrupts."""
    return to_the_end(actor(name))


def export(folder: Path, rows: list[dict[str, Any]]) -> records.Tables:
    """Tables of rows, which the records accept or refuse."""
    study = {
        "schema": 1,
        "study_id": "0" * 12,
        "name": "sweep_k",
        "question": "?",
        "axis": "K",
        "reference": "K=1",
        "baseline": "random",
        "arms": ["K=1", "K=2", "K=4", "K=8", "random"],
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study))
    for row in rows:
        records.append_row(folder / "trials" / f"{row['trial']}.jsonl", row)
    records.export(folder)
    return records.read_tables(folder)


def test_a_worker_with_other_code_runs_no_trial() -> None:
    running = TrialActor.__new__(TrialActor)
    running.setup(planned_config(K4), arrays(), fingerprint())
    other = {**fingerprint(), "code": "0" * 12}
    with pytest.raises(RuntimeError, match=r"^node \S+ has code \w+ instead of 000000000000; install"):
        running.setup(planned_config(K4), arrays(), other)


# A step, and what leaves it


def test_one_step_is_one_epoch() -> None:
    epochs = [[row for row in result["rows"] if row["kind"] == "epoch"] for result in complete(K4)]
    assert [len(rows) for rows in epochs] == [1] * 5
    told = [(row["stage"], row["part"], row["epoch"]) for (row,) in epochs]
    assert told == [
        ("search", 0, 0),
        ("search", 0, 1),
        ("retrain", 0, 0),
        ("retrain", 0, 1),
        ("retrain", 0, 2),
    ]
    assert [result["done"] for result in complete(K4)] == [False] * 4 + [True]


def test_stages_of_a_progressive_search_are_parts_of_one_count() -> None:
    results = to_the_end(actor(trials("sweep_depths")["depths=5-11-17 seed=0"]))
    told = [(row["stage"], row["part"], row["epoch"]) for row in rows_of(results) if row["kind"] == "epoch"]
    assert told[:3] == [("search", 0, 0), ("search", 1, 1), ("search", 2, 2)]


def test_a_trial_starts_and_ends_once() -> None:
    kinds = [row["kind"] for row in rows_of(complete(K4))]
    assert kinds == ["start", *["epoch"] * 5, "end"]


def test_rows_obey_the_contract() -> None:
    p = trials()[K4]
    start, *epochs, end = rows_of(complete(K4))
    common = {"kind", "trial", "attempt", "time"}
    assert start.keys() == common | {"name", "arm", "axes", "config", "params", "host", "resumed"}
    assert (start["name"], start["arm"], start["axes"]) == ("K=4 seed=0", "K=4", {"K": 4, "seed": 0})
    assert start["config"] == p.trial.to_dict()
    assert start["host"].keys() == {"node", "device", "threads", "memory_mb"}
    for row in epochs:
        assert row.keys() == common | {"stage", "part", "epoch", "metrics", "genotype"}
        wanted = SEARCH_METRICS if row["stage"] == "search" else RETRAIN_METRICS
        assert wanted <= row["metrics"].keys()
        assert all(0 <= v <= 1 for n, v in row["metrics"].items() if n.endswith("_error"))
        assert (row["genotype"] is not None) == (row["stage"] == "search")
    assert end.keys() == common | {"status", "reason", "genotype", "metrics"}
    assert (end["status"], end["reason"]) == ("completed", None)
    assert set(records.END_METRICS) <= end["metrics"].keys()
    assert {row["trial"] for row in (start, *epochs, end)} == {p.trial.id}
    assert len({row["attempt"] for row in (start, *epochs, end)}) == 1
    times = [row["time"] for row in (start, *epochs, end)]
    assert times == sorted(times)
    assert time.time() - 600 < times[0] <= time.time()


def test_trials_are_searched_for_by_the_same_names_in_every_study() -> None:
    wanted = {"seed": 0, "dataset": "digits", "space": "darts", "M": None}
    searched = wanted | {"K": 4, "edge_norm": True, "order": 1, "depths": "3"}
    assert rows_of(complete(K4))[0]["params"] == searched
    assert rows_of(complete(RANDOM))[0]["params"] == wanted
    progressive = worker.common_params(trials("sweep_depths")["depths=5-11-17 seed=1"].trial)
    assert progressive["depths"] == "-".join(
        str(s.cells) for s in trials("sweep_depths")["depths=5-11-17 seed=1"].trial.search
    )
    assert (progressive["seed"], progressive["K"], progressive["M"]) == (1, 1, 2)


def test_an_end_repeats_what_the_epochs_said() -> None:
    _, *epochs, end = rows_of(complete(K4))
    assert end["genotype"] == epochs[1]["genotype"]
    assert Genotype.parse(end["genotype"]).normal.skips == end["metrics"]["skips"]
    assert end["metrics"]["valid_error"] == epochs[-1]["metrics"]["valid_error"]
    assert end["metrics"]["search_valid_error"] == epochs[1]["metrics"]["valid_error"]
    for stage in ("search", "retrain"):
        seconds = sum(row["metrics"]["seconds"] for row in epochs if row["stage"] == stage)
        assert end["metrics"][f"{stage}_seconds"] == pytest.approx(seconds)


def test_the_test_part_is_told_of_at_the_end_alone() -> None:
    *before, end = rows_of(complete(K4))
    assert not [name for row in before for name in row.get("metrics", {}) if "test" in name]
    assert 0 <= end["metrics"]["test_error"] <= 1
    assert not [name for result in complete(K4) for name in result if "test" in name]  # what schedulers see


def test_rows_become_tables(tmp_path: Path) -> None:
    tables = export(tmp_path, rows_of(complete(K4)))
    trial = tables.trials.iloc[0]
    assert (trial["status"], trial["attempts"], trial["axes.K"]) == ("completed", 1, 4)
    assert len(tables.finals()) == 1
    assert sorted(tables.epochs["epoch"].unique()) == [0, 1, 2]
    assert list(tables.genotypes["stage"]) == ["search", "search", "final"]


def test_the_random_arm_retrains_at_once() -> None:
    start, *epochs, end = rows_of(complete(RANDOM))
    assert start["axes"] == {"seed": 0}
    assert [(row["stage"], row["epoch"]) for row in epochs] == [("retrain", epoch) for epoch in range(3)]
    assert end["metrics"]["search_seconds"] == 0
    assert Genotype.parse(end["genotype"])


def test_a_search_reports_nothing_that_schedulers_compare() -> None:
    search, retrain = complete(K4)[:2], complete(K4)[2:]
    for result in search:
        assert not {METRIC, TIME} & result.keys()
    assert [result[TIME] for result in retrain] == [1, 2, 3]
    assert [result[METRIC] for result in retrain] == [
        row["metrics"]["valid_error"] for row in rows_of(retrain) if row["kind"] == "epoch"
    ]


def test_the_size_of_a_network_is_an_objective_once_it_is_known() -> None:
    sizes = [result["params_m"] for result in complete(K4)]
    assert sizes[0] is None
    assert set(sizes[1:]) == {rows_of(complete(K4))[-1]["metrics"]["params_m"]}


def test_a_configuration_is_plain_data() -> None:
    policy = Policy(checkpoint_seconds=5, deterministic=True)
    config = configuration(trials()[K4], Share(cpus=2.5, gpus=0.5, memory_mb=1024), Path("somewhere"), policy)
    assert json.loads(json.dumps(config)) == config
    assert (config["threads"], config["gpus"], config["checkpoints"]) == (2, 0.5, "somewhere")
    assert (config["checkpoint_seconds"], config["deterministic"]) == (5, True)
    assert config["bundle"] == {"CPU": 2.5, "GPU": 0.5, "memory": 2**30}
    assert configuration(trials()[K4], Share(cpus=0.5, gpus=0, memory_mb=1))["threads"] == 1


# Stopping and resuming


@pytest.mark.parametrize("epochs", [1, 2, 4], ids=["in search", "between stages", "in retraining"])
def test_a_checkpoint_goes_on_bit_for_bit(epochs: int, tmp_path: Path) -> None:
    running = actor(K4)
    for _ in range(epochs):
        running.step()
    running.save_checkpoint(str(tmp_path))
    resumed = actor(K4)
    resumed.step()  # whatever it did before counts for nothing
    resumed.load_checkpoint(str(tmp_path))
    assert plain(rows_of(to_the_end(resumed))) == plain(rows_of(complete(K4)[epochs:]))


def test_a_checkpoint_that_a_scheduler_kept_does_not_set_a_trial_back(tmp_path: Path) -> None:
    running = actor(K4)
    running.step()
    running.save_checkpoint(str(tmp_path))
    running.step()
    running.load_checkpoint(str(tmp_path))
    assert [row["epoch"] for row in running.step()["rows"]] == [0]  # the first of retraining


# Making way for another trial


def test_a_reused_process_keeps_nothing_of_the_trial_before() -> None:
    fresh = complete(K8)
    running = actor(K4)
    for _ in range(3):
        running.step()
    attempt = running.attempt
    assert running.reset_config(planned_config(K8))
    assert running.attempt != attempt
    assert plain(rows_of(to_the_end(running))) == plain(rows_of(fresh))


def test_the_networks_of_the_trial_before_are_gone_when_the_next_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = actor(K4)
    running.step()
    assert running.run is not None
    old = weakref.ref(running.run)
    held: list[object] = []

    def build(*_: object) -> None:
        gc.collect()
        held.append(old())
        raise MemoryError("stop here")

    monkeypatch.setattr(worker, "TrialRun", build)
    running.reset_config(planned_config(K8))
    assert held == [None]


def test_cleanup_lets_go_of_the_networks() -> None:
    running = actor(K4)
    assert running.run is not None
    old = weakref.ref(running.run)
    running.cleanup()
    gc.collect()
    assert old() is None


def test_a_trial_has_the_threads_of_its_cores() -> None:
    before = torch.get_num_threads()
    try:
        actor(RANDOM, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Trials that end badly


def single_end(results: list[dict[str, Any]], status: str) -> dict[str, Any]:
    assert results[-1]["done"]
    rows = rows_of(results)
    assert [row["kind"] for row in rows].count("end") == 1
    end = rows[-1]
    assert (end["kind"], end["status"], end["metrics"]) == ("end", status, {})
    return end


def test_a_search_that_diverges_ends_diverged(tmp_path: Path) -> None:
    p = trials()[K4]
    wild = replace(p, trial=override(p.trial, {"search.*.lr.start": 1e30}))
    results = to_the_end(actor(wild))
    end = single_end(results, "diverged")
    assert "training loss" in end["reason"]
    assert end["genotype"] is None
    assert not {METRIC, TIME} & results[-1].keys()
    assert list(export(tmp_path, rows_of(results)).trials["status"]) == ["diverged"]


def test_a_retraining_that_diverges_keeps_its_genotype() -> None:
    p = trials()[K4]
    wild = replace(p, trial=override(p.trial, {"retrain.lr.start": 1e30}))
    end = single_end(to_the_end(actor(wild)), "diverged")
    assert "retraining diverged" in end["reason"]
    assert end["genotype"] == rows_of(complete(K4))[-1]["genotype"]


@pytest.mark.parametrize("error", [MemoryError("too large"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("epochs", [0, 2])
def test_memory_that_runs_out_ends_a_trial(
    error: Exception, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = actor(K4)
    results = [running.step() for _ in range(epochs)]

    def step(run: TrialRun) -> None:
        raise error

    monkeypatch.setattr(TrialRun, "step", step)
    results += to_the_end(running)
    assert len(results) == epochs + 1
    assert single_end(results, "oom")["reason"] == str(error)


def test_memory_that_runs_out_at_the_start_ends_a_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(*_: object) -> None:
        raise MemoryError("no room for the supernet")

    monkeypatch.setattr(worker, "TrialRun", build)
    running = actor(K4, checkpoints=str(tmp_path / "nowhere"))
    running.save_checkpoint(str(tmp_path))
    assert not list(tmp_path.iterdir())
    results = to_the_end(running)
    assert [row["kind"] for row in rows_of(results)] == ["start", "end"]
    assert single_end(results, "oom")["reason"] == "no room for the supernet"


@pytest.mark.parametrize("epochs", [0, 2])
def test_an_error_of_its_own_ends_a_trial_and_is_not_paid_for_again(
    epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = actor(K4)
    results = [running.step() for _ in range(epochs)]

    def step(run: TrialRun) -> None:
        raise KeyError("no such node")

    monkeypatch.setattr(TrialRun, "step", step)
    results += to_the_end(running)
    assert len(results) == epochs + 1
    end = single_end(results, "failed")
    assert end["reason"].startswith("KeyError: 'no such node' (test_tune.py, line ")
    assert (end["genotype"] is None) == (epochs == 0)  # 2: the search is over


def test_an_error_at_the_start_ends_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(worker, "TrialRun", build)
    assert "no kernel image is available" in single_end(to_the_end(actor(K4)), "failed")["reason"]


def test_a_worker_that_is_lost_leaves_a_trial_that_counts_once(tmp_path: Path) -> None:
    lost = actor(K4)
    rows = [row for _ in range(3) for row in lost.step()["rows"]]
    rows += rows_of(to_the_end(actor(K4)))  # from the start: no checkpoint was there
    tables = export(tmp_path, rows)
    assert list(tables.trials["attempts"]) == [2]
    assert list(tables.trials["status"]) == ["completed"]
    (once,) = [export(tmp_path / "once", rows_of(complete(K4)))]
    columns = ["stage", "epoch", "key", "value"]
    kept = [f[~f["key"].astype(str).str.endswith(MEASURED)][columns] for f in (tables.epochs, once.epochs)]
    assert kept[0].equals(kept[1])


# What Tune and Optuna choose


def test_chosen_values_reach_the_trial_and_its_axes() -> None:
    stages = sweep_joint.STUDY.named["depths"]["5-11-17"]
    p = trials()[K4]
    config = planned_config(
        Planned("searched", "searched", {}, p.trial),
        id=None,
        fields=["depths", "K", "lr", "retrain.weight_decay"],
        named={"depths": {"5-11-17": {"search": stages}}},
    ) | {"depths": "5-11-17", "K": 2, "lr": 0.07, "retrain.weight_decay": 1e-5}
    found = worker.resolve(config)
    assert [stage.cells for stage in found.trial.search] == [5, 11, 17]
    assert {paths(stage)["lr.start"] for stage in found.trial.search} == {
        0.07
    }  # depths first, then their rate
    assert found.trial.method.supernet.partial_channels == 2
    assert found.trial.retrain.weight_decay == 1e-5
    assert found.axes == {"depths": "5-11-17", "K": 2, "lr": 0.07, "retrain.weight_decay": 1e-5}
    assert found.name == "searched depths=5-11-17 K=2 lr=0.07 retrain.weight_decay=1e-05"


def test_a_chosen_trial_is_named_by_what_it_does() -> None:
    p = Planned("searched", "searched", {}, trials()[K4].trial)
    chosen = [
        Actor(config=planned_config(p, id=None, fields=["K"]) | {"K": k}).step()["rows"] for k in (2, 4, 4)
    ]
    ids = [rows[0]["trial"] for rows in chosen]
    assert ids[0] != ids[1] == ids[2] == p.trial.id
    assert [rows[0]["axes"] for rows in chosen] == [{"K": 2}, {"K": 4}, {"K": 4}]


@pytest.mark.parametrize(
    "study",
    [sweep_k.STUDY, sweep_depths.STUDY, sweep_edge_norm.STUDY, sweep_skips.STUDY, compare_methods.STUDY],
    ids=lambda study: study.name,
)
def test_what_pbt_changes_is_there_to_be_changed(study: Study) -> None:
    for preset in PRESETS:
        for p in plan(study, Settings(preset, seeds=1)):  # type: ignore[arg-type]
            changed = override(p.trial, dict.fromkeys(schedulers.pbt_start(p.trial), 0.01))
            assert (changed.space, changed.method, changed.search) == (
                p.trial.space,
                p.trial.method,
                p.trial.search,
            )
            assert changed.retrain != p.trial.retrain


def test_a_copy_of_another_member_goes_on_with_its_weights_and_its_own_rates(tmp_path: Path) -> None:
    chosen = {"retrain.lr.start": 0.04, "retrain.weight_decay": 2e-3}
    donor = actor(K4)
    for _ in range(3):
        donor.step()
    donor.save_checkpoint(str(tmp_path))
    config = planned_config(K4, fields=list(chosen), adopts=True) | chosen
    copy = Actor(config=config)
    copy.load_checkpoint(str(tmp_path))
    assert copy.run is not None
    assert donor.run is not None
    assert copy.run.retrain is not None
    assert donor.run.retrain is not None
    mine, theirs = copy.run.retrain.network.state_dict(), donor.run.retrain.network.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    row = next(row for row in copy.step()["rows"] if row["kind"] == "epoch")
    assert (row["stage"], row["epoch"]) == ("retrain", 1)
    assert row["metrics"]["lr"] == pytest.approx(0.04 * 0.75)  # cosine, a third of the way
    assert copy.run.retrain.optimizer.param_groups[0]["weight_decay"] == 2e-3


class Member:
    """What a scheduler and a callback see of a trial."""

    def __init__(self, trial_id: str, config: dict[str, Any] | None = None) -> None:
        self.trial_id, self.config, self.status = trial_id, config or {}, "RUNNING"
        self.last_result: dict[str, Any] = {}
        self.experiment_tag = ""
        self.error: Exception | None = None
        self.num_failures = 1
        checkpoints = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=checkpoints)

    def get_error(self) -> Exception | None:
        return self.error


CONTROLLER = SimpleNamespace(search_alg=None, get_live_trials=lambda: [], stop_trial=lambda trial: None)
"""What a scheduler asks of Tune, with no trial that waits."""


def decide(chosen: Any, member: Member, **result: Any) -> str:
    decision: str = chosen.on_trial_result(CONTROLLER, member, {"done": False, "rows": [], **result})
    return decision


def members(chosen: Any, count: int) -> list[Member]:
    found = [Member(f"{number}", {"retrain.weight_decay": 0.01}) for number in range(count)]
    for member in found:
        chosen.on_trial_add(CONTROLLER, member)
    return found


@pytest.mark.parametrize("name", ["fifo", "asha", "hyperband", "median", "pbt"])
def test_no_scheduler_cuts_a_search(name: SchedulerName) -> None:
    chosen = scheduler(Stopping(name), 9, 0, fields=["retrain.weight_decay"])
    for member in members(chosen, 4):
        for iteration in range(1, 31):  # longer than any retraining
            assert decide(chosen, member, training_iteration=iteration) == "CONTINUE"


def test_hyperband_judges_retraining_epochs() -> None:
    chosen = scheduler(Stopping("hyperband"), 9, 0)
    *_, one, other = members(chosen, 5)  # a second bracket, whose first rung is a third of the way
    assert decide(chosen, one, training_iteration=100) == "CONTINUE"
    decisions = [decide(chosen, one, training_iteration=100 + e, **{TIME: e, METRIC: 0.1}) for e in (1, 2, 3)]
    assert decisions == ["CONTINUE", "CONTINUE", "PAUSE"]  # to wait for the other
    assert decide(chosen, other, training_iteration=2, **{TIME: 1, METRIC: 0.1}) == "CONTINUE"


def test_optuna_is_told_of_retraining_epochs_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        search = tune.RetrainOptuna({"lr": loguniform(0.01, 0.1)}, metric=METRIC, mode="min", seed=0)
    search.suggest("a")
    search.on_trial_result("a", {"training_iteration": 1, "rows": []})
    search.on_trial_result("a", {"training_iteration": 2, TIME: 1, METRIC: 0.5})
    search.on_trial_complete("a", {"training_iteration": 2, TIME: 1, METRIC: 0.5})
    search.suggest("b")
    search.on_trial_complete("b", {"training_iteration": 1, "rows": []})  # diverged while it searched
    study: Any = search._ot_study
    told = [(trial.state.name, trial.intermediate_values) for trial in study.trials]
    assert told == [("COMPLETE", {2: 0.5}), ("PRUNED", {})]


def test_a_resumed_joint_search_draws_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def fit(space: dict[str, Any], tuning: Any, place: Place, *, trials: int, keep: int | None) -> None:
        tuning.search_alg.set_search_properties(None, None, {"lr": space["lr"]})
        drawn.extend(tuning.search_alg.suggest(f"{number}")["lr"] for number in range(trials))

    monkeypatch.setattr(tune, "_fit", fit)
    joint = Joint(
        Planned("searched", "searched", {}, trials()[K4].trial), {"lr": Domain(low=0.01, high=0.1)}, {}
    )
    kept: list[dict[str, Any]] = []
    recorder = SimpleNamespace(row=kept.append)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        packing = SimpleNamespace(largest=lambda trials: ONE, slots=lambda trials: 2)
        place = Place(packing, arrays(), recorder, folder)  # type: ignore[arg-type]
        for count in (2, 2):
            tune.run_joint(joint, [], count, ["error"], place)
    assert drawn[:4] == drawn[4:]  # the same study draws the same
    assert len(set(drawn)) == 4  # and goes on where it stopped


# From Tune to the records


class Kept:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.news = True

    def row(self, row: dict[str, Any]) -> bool:
        self.rows.append(row)
        return self.news


@pytest.fixture
def kept() -> Kept:
    return Kept()


def tell(forward: Forward, event: str, member: Any, **info: Any) -> None:
    getattr(forward, f"on_trial_{event}")(iteration=0, trials=[member], trial=member, **info)


def test_rows_are_handed_on_as_they_come(kept: Kept) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    for result in complete(K4):
        tell(forward, "result", member, result=result)
    assert forward.ended == {"x"}
    tell(forward, "complete", member)
    assert kept.rows == rows_of(complete(K4))
    assert forward.ended == {"x"}


def test_a_pbt_copy_keeps_its_own_identity(kept: Kept) -> None:
    donor, member = trials()[K4], trials()["K=4 seed=1"]
    chosen = {"retrain.lr.start": 0.04}
    forward = Forward(kept)
    tuned = Member("x", planned_config(member, fields=list(chosen), adopts=True) | {"retrain.lr.start": 0.1})
    tell(forward, "start", tuned)
    tuned.config = planned_config(donor, fields=list(chosen), adopts=True) | chosen  # what PBT does
    tell(forward, "start", tuned)
    for result in to_the_end(Actor(config=tuned.config)):
        tell(forward, "result", tuned, result=result)
    assert {row["trial"] for row in kept.rows} == {member.trial.id}
    start = kept.rows[0]
    assert (start["name"], start["arm"]) == ("K=4 seed=1", "K=4")
    assert start["axes"] == {"K": 4, "seed": 1, "retrain.lr.start": 0.04}
    assert start["config"]["retrain"]["lr"]["start"] == 0.04  # what it does, not what it was planned to do


def test_a_trial_that_a_scheduler_stops_ends_pruned(kept: Kept, tmp_path: Path) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    for result in complete(K4)[:4]:
        tell(forward, "result", member, result=result)
        member.last_result = result
    assert not forward.ended
    tell(forward, "complete", member)
    end = kept.rows[-1]
    assert (end["status"], end["metrics"]) == ("pruned", {})
    assert end["genotype"] == rows_of(complete(K4))[-1]["genotype"]
    assert end["reason"] == "stopped by the scheduler after 2 retraining epochs"
    assert {end["attempt"], end["trial"]} == {kept.rows[0]["attempt"], kept.rows[0]["trial"]}
    assert forward.ended == {"x"}
    assert list(export(tmp_path, kept.rows).trials["status"]) == ["pruned"]


def test_a_trial_that_fails_ends_failed_with_the_reason(kept: Kept, tmp_path: Path) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    tell(forward, "result", member, result=complete(K4)[0])
    member.error = RuntimeError("a disk\nwent away " + "x" * 600)
    tell(forward, "error", member)
    end = kept.rows[-1]
    assert end["status"] == "failed"
    assert end["reason"] == "x" * 500  # one line, the last of it: there a traceback says what happened
    assert list(export(tmp_path, kept.rows).trials["status"]) == ["failed"]


@pytest.mark.parametrize(
    "error",
    [
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        "The actor died unexpectedly: killed because the node was running low on memory",
    ],
)
def test_a_worker_that_was_killed_for_memory_each_time_is_out_of_memory(kept: Kept, error: str) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    tell(forward, "result", member, result=complete(K4)[0])
    member.error, member.num_failures = RuntimeError(error), 4
    tell(forward, "error", member)
    assert kept.rows[-1]["status"] == "oom"
    assert kept.rows[-1]["reason"].startswith("started 4 times in vain: ")


def test_nothing_is_told_of_trials_once_nothing_can_be_recorded() -> None:
    def full(row: dict[str, Any]) -> None:
        raise OSError("No space left on device")

    forward, member = Forward(SimpleNamespace(row=full)), Member("x", planned_config(K4))
    halt = Halt(forward)
    tell(forward, "start", member)
    assert not halt.stop_all()
    tell(forward, "result", member, result=complete(K4)[0])
    assert halt.stop_all()
    assert not halt("x", {})  # the rest end with the study, not one by one
    tell(forward, "complete", member)
    assert not forward.ended  # it is to go on, where there is room


@pytest.mark.parametrize("event", ["error", "complete"])
def test_a_trial_that_never_ran_has_a_start_and_an_end(kept: Kept, event: str, tmp_path: Path) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    tell(forward, event, member)
    start, end = kept.rows
    assert (start["kind"], start["name"], start["axes"]) == ("start", "K=4 seed=0", {"K": 4, "seed": 0})
    assert (end["kind"], end["status"]) == ("end", "failed" if event == "error" else "pruned")
    assert {start["trial"], end["trial"]} == {trials()[K4].trial.id}
    assert len(export(tmp_path, kept.rows).trials) == 1


def test_a_trial_that_ended_is_not_closed_again(kept: Kept) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    for result in complete(K4):
        tell(forward, "result", member, result=result)
    tell(forward, "error", member)  # its process was lost after its last word
    assert [row["kind"] for row in kept.rows].count("end") == 1


def test_a_recorder_writes_before_it_tells(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def listener(name: str) -> Any:
        path = tmp_path / "trials" / f"{trials()[K4].trial.id}.jsonl"
        return SimpleNamespace(row=lambda row: told.append((name, len(records.read_rows(path)))))

    recorder = Recorder(tmp_path, listener("tracker"), listener("progress"))
    for row in rows_of(complete(K4))[:2]:
        recorder.row(row)
    assert told == [("tracker", 1), ("progress", 1), ("tracker", 2), ("progress", 2)]


# Resources


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def has(**resources: float) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)

    return has


def test_a_machine_that_is_too_small_is_told_of(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(CPU=4.0)
    cluster.check_resources(Resources(cpus_per_trial=4))
    with pytest.raises(
        ValueError, match="--cpus-per-trial 5: this machine has 4; lower it, or give an --address"
    ):
        cluster.check_resources(Resources(cpus_per_trial=5))
    with pytest.raises(ValueError, match=r"--gpus-per-trial 0\.5: this machine has 0"):
        cluster.check_resources(Resources(gpus_per_trial=0.5))
    # A cluster may grow.
    cluster.check_resources(Resources(address="head:6379", gpus_per_trial=8))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    cluster.check_resources(Resources(gpus_per_trial=8))


def test_a_machine_is_what_ray_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    alive = {"CPU": 4.0, "memory": 14.0 * gib, "object_store_memory": 6.0 * gib}
    nodes = [{"Alive": True, "Resources": alive}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    found = cluster.machine(Resources())
    assert found == Machine((Node(cpus=4, gpus=0, memory_mb=14 * 1024, free_mb=20 * 1024),))
    assert cluster.machine(Resources(address="head:6379")).grows


def test_corners_are_all_listed_values_together() -> None:
    named = {"depths": {"3": {"search.*.cells": 3}, "4": {"search.*.cells": 4}}}
    domains = {"K": Domain((1, 4)), "depths": Domain(("3", "4")), "lr": Domain(low=0.01, high=0.1)}
    found = tune.corners(Joint(Planned("searched", "searched", {}, trials()[K4].trial), domains, named))
    corners = [(p.trial.method.supernet.partial_channels, p.trial.search[0].cells) for p in found]
    assert corners == [(1, 3), (1, 4), (4, 3), (4, 4)]
    assert found[0].name == "searched K=1 depths=3 lr=0.01"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_freed_memory_goes_back_even_from_below_what_is_in_use() -> None:
    def resident_mb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**10

    small = [torch.zeros(16 * 1024) for _ in range(4096)]  # 256 MB of the heap, not of mappings
    kept = small[::64]
    del small
    before = resident_mb()
    worker.return_freed_memory()
    assert resident_mb() < before - 200
    assert len(kept) == 64


def test_trials_that_split_the_same_images_share_them() -> None:
    trial = trials()[K4].trial
    shared = {"data.valid": 0.3, "data.weights_share": 0.4, "seeds.split": 5, "data.shuffle": False}
    assert worker.data_key(override(trial, shared)) == worker.data_key(trial)
    for name, value in (
        ("source", "cifar10"),
        ("limit", 50),
        ("test_limit", 50),
        ("image_size", 16),
        ("test", 0.5),
        ("stream", True),
    ):
        assert worker.data_key(override(trial, {f"data.{name}": value})) != worker.data_key(trial)


def test_only_failures_in_a_row_count(kept: Kept) -> None:
    forward, member = Forward(kept), Member("x", planned_config(K4))
    tell(forward, "start", member)
    member.run_metadata.num_failures = 2
    tell(forward, "result", member, result=complete(K4)[0])
    assert member.run_metadata.num_failures == 0  # a new epoch: the trial gets on
    member.run_metadata.num_failures = 2
    kept.news = False
    tell(forward, "result", member, result=complete(K4)[0])
    assert member.run_metadata.num_failures == 2  # the same epoch again, as for ever


def test_a_trial_stopped_just_before_the_driver_died_is_not_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def fit(space: dict[str, Any], tuning: Any, place: Place, *, trials: int, keep: int | None) -> None:
        run.extend(space["trial"]["grid_search"])

    monkeypatch.setattr(tune, "_fit", fit)
    planned = [trials()[K4], trials()[K8]]
    stopped = planned[0].trial.id
    rows = [row for result in complete(K4)[:4] for row in result["rows"]]
    mark = {"kind": "mark", "trial": stopped, "attempt": "a", "time": time.time(), "rung": 2.0}
    rows.append(mark | {"probability": 0.0, "goes_on": False, "audit": False})
    for row in rows:
        records.append_row(tmp_path / "trials" / f"{stopped}.jsonl", row)
    told: list[dict[str, Any]] = []
    recorder = SimpleNamespace(row=told.append)
    packing = SimpleNamespace(share=lambda trial: ONE, resources=Resources())
    place = Place(packing, arrays(), recorder, tmp_path)  # type: ignore[arg-type]
    tune.run_planned(planned, place, Stopping("asha"), rows)
    assert run == [planned[1].trial.id]
    (end,) = told
    assert (end["trial"], end["status"], end["metrics"]) == (stopped, "pruned", {})
    assert end["genotype"] == rows_of(complete(K4))[-1]["genotype"]
