"""Ray Tune and Optuna: runs planned trials to their ends, or lets Optuna choose them.

What a trial does is in `nas.trial`; what is recorded leaves here as plain rows through a `Recorder`.
"""

import random
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search.optuna import OptunaSearch

from experiments.packing import Packing, Share
from experiments.schedulers import PBT_FIELDS, scheduler
from experiments.study import Joint, Planned, SchedulerName
from experiments.worker import CHECKPOINT, METRIC, TIME, TrialActor, configuration, described, resolve
from nas.data import Arrays
from nas.streams import stream_seed


class Recorder(Protocol):
    """Takes the rows of all trials, in the driver."""

    def row(self, row: dict[str, Any]) -> None:
        """Keep one row."""


@dataclass(frozen=True)
class Place:
    """Where trials run and where their rows go."""

    packing: Packing
    arrays: Mapping[str, Arrays]
    """Data sets by `data_key`."""
    recorder: Recorder
    folder: Path


class Forward(tune.Callback):
    """Hands the rows of all trials to the recorder, and closes the trials that did not close themselves."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.planned: dict[str, dict[str, Any]] = {}
        """By Tune's id what was planned; PBT later puts another trial's configuration in its place."""
        self.last: dict[str, dict[str, Any]] = {}
        self.genotypes: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore of its own; here records say what is done.
        return {}

    @property
    def ended(self) -> int:
        """How many trials have ended, in whatever way."""
        return sum(row["kind"] == "end" for row in self.last.values())

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Remember what the trial was planned to be."""
        self.planned.setdefault(trial.trial_id, trial.config["planned"])

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record what an epoch reported."""
        planned = self.planned[trial.trial_id]
        for row in result["rows"]:
            if planned["id"]:
                row["trial"] = planned["id"]
                if row["kind"] == "start":
                    row |= {"name": planned["name"], "arm": planned["arm"]}
                    row["axes"] |= planned["axes"]
            self.recorder.row(row)
            self.last[trial.trial_id] = row
            if row.get("genotype"):
                self.genotypes[trial.trial_id] = row["genotype"]

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial without an end was stopped by the scheduler."""
        self._close(
            trial,
            "pruned",
            f"stopped by the scheduler after {trial.last_result.get(TIME, 0)} retraining epochs",
        )

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial ended in an error that retrying did not cure."""
        error = trial.get_error()
        self._close(trial, "failed", " ".join(str(error).split())[-500:] if error else "worker lost")

    def _close(self, trial: TuneTrial, status: str, reason: str) -> None:
        last = self.last.get(trial.trial_id, {})
        if last.get("kind") == "end":
            return
        started = {} if last else self._unstarted(trial)
        row = {
            "kind": "end",
            "trial": last.get("trial") or started["trial"],
            "attempt": last.get("attempt") or started["attempt"],
            "time": time.time(),
            "status": status,
            "reason": reason,
            "genotype": self.genotypes.get(trial.trial_id),
            "metrics": {},
        }
        self.recorder.row(row)
        self.last[trial.trial_id] = row

    def _unstarted(self, trial: TuneTrial) -> dict[str, Any]:
        """Record the start of a trial that failed before its first epoch."""
        planned = resolve(trial.config)
        row = {
            "kind": "start",
            "trial": trial.config["planned"]["id"] or planned.trial.id,
            "attempt": trial.trial_id,
            "time": time.time(),
            **described(planned),
            "host": None,
        }
        self.recorder.row(row)
        return row


class RetrainOptuna(OptunaSearch):
    """Optuna's samplers, told of retraining epochs only: a search reports nothing that they compare."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a retraining epoch on."""
        if TIME in result:
            super().on_trial_result(trial_id, result)


def run_planned(
    planned: Sequence[Planned], place: Place, scheduler_name: SchedulerName, restore: Mapping[str, Path]
) -> None:
    """Run planned trials to their ends; `restore` gives checkpoints by trial id to continue from."""
    configs = [configuration(p, place.packing.share(p.trial), restore.get(p.trial.id)) for p in planned]
    epochs = max(p.trial.retrain.epochs for p in planned)
    if scheduler_name != "pbt":
        space: dict[str, Any] = {"planned": tune.grid_search(configs)}
        _fit(space, _tuning(place, scheduler_name, epochs), place, trials=len(configs), keep=2)
        return
    # A member that copied one of another arm would belong to that arm: each arm is a population of its own.
    for arm in dict.fromkeys(p.arm for p in planned):
        # Members start at the recipe's own values; what PBT draws later comes from a stream as well.
        random.seed(stream_seed(0, "pbt", arm))
        population = [
            config | {"fields": list(PBT_FIELDS), "adopts": True}
            for config in configs
            if config["arm"] == arm
        ]
        trial = next(p.trial for p in planned if p.arm == arm)
        start = {
            "retrain.lr.start": getattr(trial.retrain.lr, "start", 0.0),
            "retrain.weight_decay": trial.retrain.weight_decay,
        }
        space = {"planned": tune.grid_search(population), **start}
        tuning = _tuning(place, scheduler_name, epochs)
        # PBT still needs checkpoints that a kept number of two would have deleted.
        _fit(space, tuning, place, trials=len(population), keep=None)


def _tuning(place: Place, scheduler_name: SchedulerName, epochs: int) -> tune.TuneConfig:
    chosen = scheduler(scheduler_name, epochs)
    return tune.TuneConfig(scheduler=chosen, max_concurrent_trials=place.packing.resources.max_concurrent)


def run_joint(joint: Joint, trials: int, objectives: Sequence[str], place: Place) -> None:
    """Let Optuna choose `trials` configurations; objectives are `error` (of validation) and `params`.

    Optuna keeps a journal in the study's folder, so a study that was stopped goes on with what it knew.
    """
    possible = [p.trial for p in corners(joint)]
    # One share for all: a process can then run any of them after another.
    config = _joint_configuration(joint, place.packing.largest(possible))
    space: dict[str, Any] = {"planned": config}
    for name, domain in joint.domains.items():
        space[name] = (
            tune.choice(list(domain.values)) if domain.values else tune.loguniform(domain.low, domain.high)
        )
    metrics = [OBJECTIVES[name] for name in objectives]
    several = len(metrics) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        journal = JournalStorage(JournalFileBackend(str(place.folder / "optuna.log")))
        known = sum(journal.get_n_trials(study._study_id) for study in journal.get_all_studies())
        search = RetrainOptuna(
            metric=metrics if several else metrics[0],
            mode=["min"] * len(metrics) if several else "min",
            storage=journal,
            study_name="joint",
            # Samplers start anew: from the same seed a resumed study would draw its first trials again.
            seed=joint.base.trial.seeds.search + known,
        )
    tuning = tune.TuneConfig(
        search_alg=search,
        num_samples=trials,
        max_concurrent_trials=place.packing.slots(possible),
    )
    _fit(space, tuning, place, trials=trials, keep=2)


OBJECTIVES = {"error": METRIC, "params": "params_m"}
"""What a joint search can minimise, and the result that holds it: never anything of the test part."""


def _joint_configuration(joint: Joint, share: Share) -> dict[str, Any]:
    return configuration(joint.base, share) | {
        "id": None,
        "fields": list(joint.domains),
        "named": {name: dict(values) for name, values in joint.named.items()},
    }


def corners(joint: Joint) -> list[Planned]:
    """Every combination of the values that a joint search may list, at the low end of its ranges."""
    config = _joint_configuration(joint, Share(1, 0, 0))
    values = [domain.values or (domain.low,) for domain in joint.domains.values()]
    return [
        resolve({"planned": config} | dict(zip(joint.domains, point, strict=True)))
        for point in product(*values)
    ]


def _fit(
    space: dict[str, Any], tuning: tune.TuneConfig, place: Place, *, trials: int, keep: int | None
) -> None:
    """Run `trials` trials to their ends.

    Raises:
        KeyboardInterrupt: Ctrl-C. Tune finishes the epochs under way, and returns as if all were done.
    """
    forward = Forward(place.recorder)
    tuning.reuse_actors = True
    tuning.trial_name_creator = tuning.trial_dirname_creator = _trial_name
    actor = tune.with_resources(
        tune.with_parameters(TrialActor, arrays=dict(place.arrays)),
        lambda config: tune.PlacementGroupFactory([config["planned"]["bundle"]]),
    )
    tuner = tune.Tuner(
        actor,
        param_space=space,
        tune_config=tuning,
        run_config=tune.RunConfig(
            name=f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            storage_path=str(place.folder.resolve() / "tune"),
            verbose=0,
            callbacks=[forward],
            failure_config=tune.FailureConfig(max_failures=3),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=keep),
        ),
    )
    tuner.fit()
    if forward.ended < trials:
        raise KeyboardInterrupt


def _trial_name(trial: TuneTrial) -> str:
    base = trial.config["planned"]
    return base["id"] or f"{base['arm']}-{trial.trial_id}"


def newest_checkpoints(folder: Path, trial_ids: Sequence[str]) -> dict[str, Path]:
    """By trial id, the newest checkpoint folder that earlier runs of a study left, where there is one."""
    found = {}
    for trial_id in trial_ids:
        states = sorted(
            folder.glob(f"tune/*/{trial_id}/checkpoint_*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime
        )
        if states:
            found[trial_id] = states[-1].parent
    return found
