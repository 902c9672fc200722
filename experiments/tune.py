"""Ray Tune and Optuna: runs planned trials to their ends, or lets Optuna choose them.

What a trial does is in `nas.trial`; what is recorded leaves here as plain rows through a `Recorder`.
"""

import errno
import os
import random
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search.optuna import OptunaSearch

from analysis import records
from experiments.cluster import Waiting
from experiments.folder import PausedError
from experiments.packing import Packing, Share
from experiments.schedulers import StageAware, pbt_start, scheduler
from experiments.stopping import FIFO, Stopping
from experiments.study import POLICY, Joint, Planned, Policy
from experiments.worker import METRIC, TIME, TrialActor, configuration, described, resolve
from nas.data import Arrays
from nas.streams import stream_seed


class Recorder(Protocol):
    """Takes the rows of all trials, in the driver."""

    def row(self, row: dict[str, Any]) -> bool:
        """Keep one row; returns whether it tells of something that had not been recorded."""


@dataclass(frozen=True)
class Place:
    """Where trials run and where their rows go."""

    packing: Packing
    arrays: Mapping[str, Arrays]
    """Data sets by `data_key`."""
    recorder: Recorder
    folder: Path
    policy: Policy = POLICY
    alike: Mapping[str, str | None] | None = None
    """`fingerprint` that workers must share; None where they run on this machine anyway."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of all trials."""
        return self.folder.resolve() / "checkpoints"


class Forward(tune.Callback):
    """Hands the rows of all trials to the recorder, and closes the trials that did not close themselves."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.planned: dict[str, dict[str, Any]] = {}
        """By Tune's id what was planned; PBT later puts another trial's configuration in its place."""
        self.last: dict[str, dict[str, Any]] = {}
        """The last row of every trial that has not ended, and its last genotype."""
        self.ended: set[str] = set()
        self.broken: OSError | None = None
        """Why nothing more can be recorded."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore of its own; here records say what is done.
        return {}

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
            self._record(trial, row)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial without an end was stopped by the scheduler."""
        epochs = trial.last_result.get(TIME)
        after = f"{epochs} retraining epochs" if epochs else "some epochs of its search"
        self._close(trial, "pruned", f"stopped by the scheduler after {after}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial ended in an error that retrying did not cure."""
        reason = " ".join(str(trial.get_error() or "worker lost").split())
        killed = any(word in reason for word in ("OutOfMemoryError", "running low on memory"))
        again = f"started {trial.num_failures} times in vain: " if trial.num_failures > 1 else ""
        self._close(trial, "oom" if killed else "failed", again + reason[-500:])

    def _close(self, trial: TuneTrial, status: str, reason: str) -> None:
        if trial.trial_id in self.ended or self.broken is not None:
            return
        last = self.last.get(trial.trial_id) or self._unstarted(trial)
        row = {
            "kind": "end",
            "trial": last["trial"],
            "attempt": last["attempt"],
            "time": time.time(),
            "status": status,
            "reason": reason,
            "genotype": last.get("genotype"),
            "metrics": {},
        }
        self._record(trial, row)

    def _record(self, trial: TuneTrial, row: dict[str, Any]) -> None:
        if self.broken is None:
            try:
                if self.recorder.row(row) and row["kind"] == "epoch":
                    trial.run_metadata.num_failures = 0  # it gets on: only failures in a row count
            except OSError as error:
                # Tune would take it for a failure of the trial. Its checkpoint tells the row again.
                self.broken = error
        if self.broken is not None:
            return
        if row["kind"] == "end":
            self.ended.add(trial.trial_id)
            self.last.pop(trial.trial_id, None)
        elif trial.trial_id not in self.ended:
            genotype = row.get("genotype") or self.last.get(trial.trial_id, {}).get("genotype")
            self.last[trial.trial_id] = {
                "trial": row["trial"],
                "attempt": row["attempt"],
                "genotype": genotype,
            }

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
        self._record(trial, row)
        return row


class Halt(tune.Stopper):
    """Ends a run that can record nothing more: what trials did from then on would be lost."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether one trial is to stop."""
        return False

    def stop_all(self) -> bool:
        """Whether all are to stop."""
        return self.forward.broken is not None


class RetrainOptuna(OptunaSearch):
    """Optuna's samplers, told of retraining epochs only: a search reports nothing that they compare."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a retraining epoch on."""
        if TIME in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass an end on, without its result if an objective is missing: half a result is none."""
        wanted: Any = self.metric
        names = wanted if isinstance(wanted, list) else [wanted]
        whole = result is not None and all(result.get(name) is not None for name in names)
        # Of several objectives Optuna takes none for a failure only.
        super().on_trial_complete(
            trial_id, result if whole else None, error or (not whole and len(names) > 1)
        )


FULL = 2**20
"""Bytes that are left of a disk when it counts as full."""
TRIALS_PER_FIT = 500
"""Trials that Ray Tune is given at once; what it keeps of each until a run ends slows it down."""


def run_planned(
    planned: Sequence[Planned],
    place: Place,
    stopping: Stopping = FIFO,
    past: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Run planned trials to their ends, each from its newest checkpoint if it has one.

    `past` are the rows that earlier runs of the study recorded, for schedulers that go on from them.
    """
    configs = [
        configuration(p, place.packing.share(p.trial), place.checkpoints, place.policy) for p in planned
    ]
    epochs = max(p.trial.retrain.epochs for p in planned)
    if stopping.scheduler == "pbt":
        _run_populations(planned, configs, place, stopping, epochs, past)
        return
    chosen = scheduler(stopping, epochs, planned[0].trial.seeds.split, past)
    if isinstance(chosen, StageAware):
        stopped = [config["id"] for config in configs if chosen.judge.stopped(config["id"])]
        for trial in stopped:
            _close_stopped(trial, place)
        configs = [config for config in configs if config["id"] not in stopped]
    # HyperBand fills its brackets from one run.
    size = len(configs) if stopping.scheduler == "hyperband" else TRIALS_PER_FIT
    for first in range(0, len(configs), size):
        part = configs[first : first + size]
        tuning = tune.TuneConfig(
            scheduler=chosen, max_concurrent_trials=place.packing.resources.max_concurrent
        )
        # Tune copies all of a grid for each of its points, so the grid holds names only.
        space = {"trial": tune.grid_search([config["id"] for config in part]), "planned": _named(part)}
        _fit(space, tuning, place, trials=len(part), keep=2)


def _close_stopped(trial: str, place: Place) -> None:
    """Record the end of a trial that was stopped just before the driver died."""
    rows = records.read_rows(place.folder / "trials" / f"{trial}.jsonl")
    found = [row["genotype"] for row in rows if row.get("genotype")]
    row = {"kind": "end", "trial": trial, "attempt": rows[-1]["attempt"], "time": time.time()}
    told = {"status": "pruned", "reason": "stopped by the scheduler", "metrics": {}}
    place.recorder.row(row | told | {"genotype": found[-1] if found else None})


def _named(configs: Sequence[dict[str, Any]]) -> Any:
    """The configuration that Tune is to take for the name of a trial."""
    by_id = {config["id"]: config for config in configs}
    return tune.sample_from(lambda spec: by_id[spec["config"]["trial"]])


def _run_populations(
    planned: Sequence[Planned],
    configs: Sequence[dict[str, Any]],
    place: Place,
    stopping: Stopping,
    epochs: int,
    past: Iterable[Mapping[str, Any]],
) -> None:
    """Run each arm as a population of its own: a member that copied one of another arm would belong there."""
    # What earlier runs changed stands in the start rows that they left.
    changed = {row["trial"]: row["axes"] for row in past if row["kind"] == "start"}
    for arm in dict.fromkeys(p.arm for p in planned):
        # Members start at the recipe's own values; what PBT draws later comes from a stream as well.
        random.seed(stream_seed(0, "pbt", arm))
        population = []
        for p, config in zip(planned, configs, strict=True):
            if p.arm == arm:
                start = pbt_start(p.trial)
                began = {name: changed.get(p.trial.id, {}).get(name, value) for name, value in start.items()}
                population.append(config | {"fields": list(start), "began": began, "adopts": True})
        fields = population[0]["fields"]
        chosen = scheduler(stopping, epochs, planned[0].trial.seeds.split, fields=fields)
        space = {"planned": tune.grid_search(population)} | {name: _began(name) for name in fields}
        tuning = tune.TuneConfig(
            scheduler=chosen, max_concurrent_trials=place.packing.resources.max_concurrent
        )
        # PBT still needs checkpoints that a kept number of two would have deleted.
        _fit(space, tuning, place, trials=len(population), keep=None)


def _began(name: str) -> Any:
    """What a member of a population starts with, which Tune is to take from what was planned for it."""
    return tune.sample_from(lambda spec: spec["config"]["planned"]["began"][name])


def run_joint(
    joint: Joint, begun: Sequence[Planned], trials: int, objectives: Sequence[str], place: Place
) -> None:
    """Let Optuna choose `trials` configurations; objectives are `error` (of validation) and `params`.

    Optuna keeps a journal in the study's folder, so a study that was stopped goes on with what it knew:
    trials that were `begun` are run to their ends first, and Optuna is told.
    """
    journal = JournalStorage(JournalFileBackend(str(place.folder / "optuna.log")))
    if begun:
        run_planned(begun, place)
    _settle(journal, begun, objectives, place)
    if not trials:
        return
    possible = [p.trial for p in corners(joint)]
    # One share for all: a process can then run any of them after another.
    config = _joint_configuration(joint, place.packing.largest(possible), place)
    space: dict[str, Any] = {"planned": config}
    for name, domain in joint.domains.items():
        space[name] = (
            tune.choice(list(domain.values)) if domain.values else tune.loguniform(domain.low, domain.high)
        )
    metrics = [OBJECTIVES[name][0] for name in objectives]
    several = len(metrics) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
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


OBJECTIVES = {"error": (METRIC, "valid_error"), "params": ("params_m", "params_m")}
"""What a joint search can minimise, by its name in a result and at a trial's end."""


def _settle(
    journal: JournalStorage, begun: Sequence[Planned], objectives: Sequence[str], place: Place
) -> None:
    """Tell Optuna how the trials ended that it takes for running: the driver that ran them is gone."""
    ends = {p.trial.id: _end_metrics(p.trial.id, place) for p in begun}
    for study in journal.get_all_studies():
        for chosen in journal.get_all_trials(study._study_id, states=(TrialState.RUNNING,)):
            values: list[float] | None = None
            for p in begun:
                if chosen.params.items() <= dict(p.axes).items():
                    found = [ends[p.trial.id].get(OBJECTIVES[name][1]) for name in objectives]
                    values = [value for value in found if value is not None]
            if values is not None and len(values) < len(objectives):
                values = None
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            journal.set_trial_state_values(chosen._trial_id, state, values)


def _end_metrics(trial: str, place: Place) -> dict[str, Any]:
    rows = records.read_rows(place.folder / "trials" / f"{trial}.jsonl")
    ends: list[dict[str, Any]] = [row["metrics"] for row in rows if row["kind"] == "end"]
    return ends[-1] if ends else {}


def _joint_configuration(joint: Joint, share: Share, place: Place | None = None) -> dict[str, Any]:
    kept = (None, POLICY) if place is None else (place.checkpoints, place.policy)
    return configuration(joint.base, share, *kept) | {
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
        PausedError: nothing more can be recorded, for the disk is full or gone.
    """
    forward, folder = Forward(place.recorder), place.folder.resolve()
    name = f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    tuning.reuse_actors = True
    tuning.trial_name_creator = tuning.trial_dirname_creator = _trial_name
    actor = tune.with_resources(
        tune.with_parameters(TrialActor, arrays=dict(place.arrays), alike=place.alike),
        lambda config: tune.PlacementGroupFactory([config["planned"]["bundle"]]),
    )
    tuner = tune.Tuner(
        actor,
        param_space=space,
        tune_config=tuning,
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder / "tune"),
            verbose=0,
            callbacks=[forward, Waiting()],
            stop=Halt(forward),
            failure_config=tune.FailureConfig(max_failures=place.policy.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=keep),
        ),
    )
    try:
        tuner.fit()
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if forward.broken is None and free > FULL:
            raise
        raise PausedError(forward.broken or f"{os.strerror(errno.ENOSPC)}: {folder}") from error
    finally:
        # Records and checkpoints of our own hold all that is needed; errors are left to be read.
        left = folder / "tune" / name
        for path in [left] if not any(left.rglob("error.txt")) else left.glob("*/checkpoint_*"):
            shutil.rmtree(path, ignore_errors=True)
    if forward.broken is not None:
        raise PausedError(forward.broken)
    if len(forward.ended) < trials:
        raise KeyboardInterrupt


def _trial_name(trial: TuneTrial) -> str:
    if "trial" in trial.config:  # then what is planned comes later
        return str(trial.config["trial"])
    base = trial.config["planned"]
    return base["id"] or f"{base['arm']}-{trial.trial_id}"
