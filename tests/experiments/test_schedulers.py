"""What Ray Tune's schedulers make of trials of two stages: the trap, and how it is avoided."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler

from experiments import sweep_k
from experiments.schedulers import PBT_DOMAINS, pbt_start, scheduler
from experiments.stopping import Stopping
from experiments.study import Planned, Settings, plan
from experiments.worker import METRIC, SPENT, TIME
from nas.config import override
from nas.papers import PAPERS
from nas.schedule import Constant, Cosine, Linear, Ramp, SkipDropout
from nas.trial import Trial

CONTROLLER = SimpleNamespace(search_alg=None, get_live_trials=lambda: [], get_trials=lambda: [])


class Member:
    """What a scheduler sees of a trial."""

    def __init__(self, name: str, config: Mapping[str, Any] | None = None) -> None:
        self.trial_id, self.config, self.status = name, dict(config or {}), "RUNNING"
        self.experiment_tag = ""
        checkpoints = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=checkpoints)


@cache
def planned() -> Mapping[str, Planned]:
    """A sweep over K, of 4 epochs of search and 8 of retraining; the random arm does not search."""
    changes = {"search.*.epochs": 4, "retrain.epochs": 8}
    return {p.name: p for p in plan(sweep_k.STUDY, Settings("tiny", seeds=2, changes=changes))}


def results(name: str, errors: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The results of a trial as its worker tells them, each stage at its error; seconds fall with K."""
    p = planned()[name]
    row = {"trial": p.trial.id, "attempt": "a", "time": 0.0}
    rows: list[dict[str, Any]] = [row | {"kind": "start", "config": p.trial.to_dict()}]
    seconds = 8.0 / p.axes.get("K", 8)
    iteration, spent = 0, 0.0
    for stage, epochs in (("search", sum(s.epochs for s in p.trial.search)), ("retrain", 8)):
        for number in range(epochs):
            metrics = {"valid_error": errors[stage], "seconds": seconds}
            iteration, spent = iteration + 1, spent + seconds
            place = {"stage": stage, "part": 0, "epoch": number}
            rows.append(row | {"kind": "epoch", "time": float(iteration), "metrics": metrics} | place)
            result = {
                "rows": rows,
                "done": False,
                "training_iteration": iteration,
                "valid_error": errors[stage],
            }
            if stage == "retrain":
                result |= {METRIC: errors[stage], TIME: number + 1, SPENT: spent, "done": number == 7}
            yield result
            rows = []


def run(chosen: Any, errors: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Drive trials side by side as Tune does; returns by name the last result of each."""
    going = {name: results(name, found) for name, found in errors.items()}
    members = {name: Member(name) for name in errors}
    for member in members.values():
        chosen.on_trial_add(CONTROLLER, member)
    last: dict[str, dict[str, Any]] = {}
    while going:
        for name in list(going):
            result = last[name] = next(going[name])
            flat = dict(result)
            stops = result["done"] or chosen.on_trial_result(CONTROLLER, members[name], flat) == "STOP"
            if stops:
                chosen.on_trial_complete(CONTROLLER, members[name], flat)
                del going[name]
    return last


SWEEP = {
    "random seed=0": {"retrain": 0.30},
    "random seed=1": {"retrain": 0.35},
    # One-shot errors of a supernet say little of the network it leads to, and are higher by far.
    "K=1 seed=0": {"search": 0.7, "retrain": 0.10},
    "K=8 seed=0": {"search": 0.9, "retrain": 0.20},
}


def test_the_trap_asha_on_iterations_stops_the_best_trial_for_searching_while_others_retrain() -> None:
    naive = ASHAScheduler(
        "training_iteration", "valid_error", "min", max_t=12, grace_period=1, reduction_factor=2
    )
    last = run(naive, SWEEP)
    assert METRIC not in last["K=1 seed=0"]  # stopped in its search, by retraining errors of random cells
    assert METRIC not in last["K=8 seed=0"]
    assert last["random seed=0"]["done"]


@pytest.mark.parametrize(
    "stopping",
    [Stopping("asha", first=1), Stopping("asha", "compute_seconds", first=1.0)],
    ids=["epochs", "seconds"],
)
def test_the_trap_is_avoided(stopping: Stopping) -> None:
    """The same results: retrainings are compared with retrainings, and the best trial finishes."""
    last = run(scheduler(stopping, epochs=8, seed=0), SWEEP)
    assert last["K=1 seed=0"]["done"]
    assert all(METRIC in result for result in last.values())  # nobody was stopped in its search
    marks = [row for result in last.values() for row in result["rows"] if row["kind"] == "mark"]
    names = {p.trial.id: name for name, p in planned().items()}
    stopped = {names[mark["trial"]] for mark in marks if not mark["goes_on"]}
    assert stopped == {name for name, result in last.items() if not result["done"]}
    assert "random seed=1" in stopped


def test_search_rungs_compare_searches_of_a_sweep_and_spare_those_that_do_not_search() -> None:
    last = run(scheduler(Stopping("asha", "search_epoch", first=1), epochs=8, seed=0), SWEEP)
    assert {name for name, result in last.items() if not result["done"]} == {"K=8 seed=0"}
    assert METRIC not in last["K=8 seed=0"]


def test_a_mark_follows_its_epoch_in_the_rows_that_callbacks_get() -> None:
    chosen = scheduler(Stopping("asha", first=1, random_completion=0.5), epochs=8, seed=0)
    row = {"attempt": "a", "time": 5.0}
    epoch = row | {"kind": "epoch", "stage": "retrain", "part": 0, "epoch": 0}
    decisions, marks = [], []
    for number in range(8):
        one = epoch | {"trial": f"{number}", "metrics": {"valid_error": number / 10, "seconds": 1.0}}
        result = {"rows": [row | {"kind": "start", "trial": f"{number}", "config": START}, one]}
        decisions.append(chosen.on_trial_result(CONTROLLER, Member(f"{number}"), copy.copy(result)))  # type: ignore[arg-type]
        assert [each["kind"] for each in result["rows"]] == ["start", "epoch", "mark"][
            : 2 if number == 0 else 3
        ]
        marks += result["rows"][2:]
    assert set(decisions) == {"CONTINUE", "STOP"}
    assert [mark["goes_on"] for mark in marks] == [decision == "CONTINUE" for decision in decisions[1:]]
    assert [mark["trial"] for mark in marks] == [f"{number}" for number in range(1, 8)]
    assert {(mark["attempt"], mark["time"], mark["rung"], mark["probability"]) for mark in marks} == {
        ("a", 5.0, 1.0, 0.5)
    }


START: dict[str, Any] = {"space": {}, "search": []}


def test_a_scheduler_goes_on_from_recorded_rows() -> None:
    stopping = Stopping("asha", first=1)
    rows = [row for result in results("random seed=0", SWEEP["random seed=0"]) for row in result["rows"]]
    fresh, resumed = (scheduler(stopping, 8, seed=0, past=past) for past in ((), rows))
    assert run(fresh, {"random seed=1": {"retrain": 0.9}})["random seed=1"]["done"]
    last = run(resumed, {"random seed=1": {"retrain": 0.9}})["random seed=1"]
    assert last[TIME] == 1


def test_the_last_epoch_of_a_trial_counts_though_tune_does_not_ask_about_it() -> None:
    chosen: Any = scheduler(Stopping("asha", first=1), epochs=8, seed=0)
    run(chosen, {"random seed=0": {"retrain": 0.2}})
    assert 8.0 in chosen.judge.rules["retrain",].results


def test_what_tune_pickles_of_a_scheduler_decides_alike() -> None:
    for stopping in (Stopping("asha", first=1), Stopping("median", first=1)):
        chosen: Any = scheduler(stopping, epochs=8, seed=0)
        run(chosen, SWEEP)
        again = pickle.loads(pickle.dumps(chosen))
        arms = {"K=8 seed=1": {"search": 0.5, "retrain": 0.9}}
        assert run(chosen, arms)["K=8 seed=1"][TIME] == run(again, arms)["K=8 seed=1"][TIME] < 8


# HyperBand


def test_hyperband_halves_by_seconds() -> None:
    chosen = scheduler(Stopping("hyperband", "compute_seconds", last=9.0), epochs=8, seed=0)
    found = [Member(f"{n}") for n in range(5)]
    for member in found:
        chosen.on_trial_add(CONTROLLER, member)  # type: ignore[arg-type]
    one = found[-1]  # in the second bracket, whose first rung is a third of the way
    told = [{SPENT: 2.5, METRIC: 0.1, TIME: 1}, {SPENT: 3.5, METRIC: 0.1, TIME: 2}]
    assert chosen.on_trial_result(CONTROLLER, one, {"rows": []}) == "CONTINUE"  # type: ignore[arg-type]
    decisions = [chosen.on_trial_result(CONTROLLER, one, result) for result in told]  # type: ignore[arg-type]
    assert decisions == ["CONTINUE", "PAUSE"]


# Population-based training


def test_pbt_starts_from_the_trials_own_values() -> None:
    trial = PAPERS["darts_1st"]
    assert pbt_start(trial) == {
        "retrain.lr.start": 0.025,
        "retrain.weight_decay": 3e-4,
        "retrain.drop_path.end": 0.2,
    }
    other = override(trial, {"retrain.lr": Constant(0.01), "retrain.drop_path": Constant(0.1)})
    assert pbt_start(other) == {
        "retrain.lr.value": 0.01,
        "retrain.weight_decay": 3e-4,
        "retrain.drop_path.value": 0.1,
    }


@pytest.mark.parametrize("lr", [Cosine(0.02), Linear(0.02, 0.0), Constant(0.02)])
@pytest.mark.parametrize("drop_path", [Ramp(0.3), Constant(0.3), Linear(0.3, 0.0)])
def test_what_pbt_changes_is_a_field_of_the_trial(lr: Any, drop_path: Any) -> None:
    trial = override(PAPERS["darts_1st"], {"retrain.lr": lr, "retrain.drop_path": drop_path})
    assert override(trial, pbt_start(trial)) == trial
    changed = override(trial, dict.fromkeys(pbt_start(trial), 0.05))
    assert changed.retrain.lr.at(0, 9) == pytest.approx(0.05)
    assert changed.retrain.weight_decay == 0.05
    assert max(changed.retrain.drop_path.at(epoch, 9) for epoch in range(10)) == pytest.approx(0.05)


def test_a_schedule_that_pbt_cannot_scale_is_refused() -> None:
    trial = override(PAPERS["darts_1st"], {"retrain.drop_path": SkipDropout(0.1)})
    with pytest.raises(ValueError, match=r"pbt cannot change retrain\.drop_path=SkipDropout"):
        pbt_start(trial)


def test_pbt_changes_nothing_beyond_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many exploits in a row, each by the larger factor: a drop-path of 1 would end the trial."""
    trial: Trial = PAPERS["darts_1st"]
    fields = pbt_start(trial)
    chosen: Any = scheduler(Stopping("pbt"), epochs=10, seed=0, fields=list(fields))
    monkeypatch.setattr("random.random", lambda: 1.0)  # never drawn anew
    monkeypatch.setattr("random.choice", max)
    config: dict[str, Any] = {**fields, "planned": {"id": "x"}}
    for _ in range(40):
        config, _ = chosen._get_new_config(Member("a"), Member("b", config))
    assert config["planned"] == {"id": "x"}
    highest = {name.split(".")[1]: config[name] for name in fields}
    assert highest == {"lr": 0.2, "weight_decay": 3e-3, "drop_path": 0.5}
    assert override(trial, {name: config[name] for name in fields}).retrain.drop_path == Ramp(0.5)


@pytest.mark.parametrize("rungs", ["retrain_epoch", "compute_seconds"])
def test_pbt_leaves_a_search_alone(rungs: Any) -> None:
    chosen: Any = scheduler(
        Stopping("pbt", rungs, first=2.0), epochs=10, seed=0, fields=["retrain.weight_decay"]
    )
    member: Any = Member("a", {"retrain.weight_decay": 1e-4})
    chosen.on_trial_add(CONTROLLER, member)
    for iteration in range(1, 20):
        assert chosen.on_trial_result(CONTROLLER, member, {"training_iteration": iteration}) == "CONTINUE"
    assert chosen._trial_state[member].last_score is None


def test_pbt_changes_nothing_that_a_weights_shape_depends_on() -> None:
    assert set(PBT_DOMAINS) == {"retrain.lr", "retrain.weight_decay", "retrain.drop_path"}
