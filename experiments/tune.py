"""Ray Tune and Optuna: the only file that knows them. Runs planned trials, one Tune `step` per epoch.

What a trial does is in `nas.trial`; what is recorded leaves here as plain rows through a `Recorder`.
"""

import os
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

# Read by Ray when it is imported or started; a user's own setting wins.
for _name, _value in {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
}.items():
    os.environ.setdefault(_name, _value)

import optuna
import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from experiments.study import SHORT, Domain, Planned
from nas.config import override
from nas.data import Arrays, Data
from nas.trial import Row, Trial, TrialRun

SchedulerName = Literal["fifo", "asha", "hyperband", "median", "pbt"]
CHECKPOINT = "state.pt"
CHECKPOINT_SECONDS = 60.0
"""A trial is saved at the end of each stage, and at the first epoch that ends this long after the last save."""
METRIC, TIME = "retrain_valid_error", "retrain_epoch"
"""What schedulers compare, and over what. Only retraining epochs report them, so no search is compared with a retraining."""


class Recorder(Protocol):
    """Takes the rows of all trials, in the driver."""

    def row(self, row: dict[str, Any]) -> None:
        """Keep one row."""


@dataclass(frozen=True)
class Resources:
    """What the study runs on."""

    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int | None = None


def connect(resources: Resources) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine alone."""
    if ray.is_initialized():
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="error")
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody but this process connects
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")


def check_resources(resources: Resources) -> None:
    """Refuse a request that no node can ever meet on this machine, instead of waiting for it without end.

    Raises:
        ValueError: more CPUs or GPUs per trial than there are; not checked on a cluster, which may still grow.
    """
    if resources.address or os.environ.get("RAY_ADDRESS"):
        return
    have = ray.cluster_resources()
    for name, asked in (("CPU", resources.cpus_per_trial), ("GPU", resources.gpus_per_trial)):
        if asked > have.get(name, 0):
            flag = f"--{name.lower()}s-per-trial"
            raise ValueError(
                f"{flag} {asked:g}: this machine has {have.get(name, 0):g}; lower it, or give a cluster's --address"
            )


class TrialActor(tune.Trainable):
    """A trial as Ray Tune drives it: one `step` is one epoch of the current stage."""

    def setup(self, config: dict[str, Any], arrays: Mapping[str, Arrays] | None = None) -> None:
        """Build the trial of `config`; `arrays` holds the data sets by key, one copy per node."""
        assert arrays is not None
        self.arrays = arrays
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make this process run another trial."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        # The networks of the trial before go first: two would have to fit otherwise.
        self.run: TrialRun | None = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.planned = resolve(config)
        base = config["planned"]
        self.id = base["id"] or self.planned.trial.id
        self.adopts = base["adopts"]
        self.attempt = uuid.uuid4().hex
        self.begun = False
        self.saved = time.monotonic()
        self.refusal: dict[str, Any] | None = None
        torch.set_num_threads(base["threads"])
        on_gpu = base["gpus"] > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        try:
            trial = self.planned.trial
            data = Data(self.arrays[base["data_key"]], trial.data, trial.seeds.split, self.device)
            self.run = TrialRun(trial, data, self.device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.refusal = self._end("oom", reason=str(error))
        if base["restore"]:
            self.load_checkpoint(base["restore"])

    def step(self) -> dict[str, Any]:
        """Run one epoch; what is to be recorded goes to the driver as `rows`."""
        rows = [] if self.begun else [self._start()]
        self.begun = True
        if self.run is None or self.run.done:
            return {"rows": [*rows, self.refusal or self._end("completed")], "done": True}
        try:
            epoch = self.run.step()
        except FloatingPointError as error:
            return {"rows": [*rows, self._end("diverged", reason=str(error))], "done": True}
        except (MemoryError, torch.OutOfMemoryError) as error:
            return {"rows": [*rows, self._end("oom", reason=str(error))], "done": True}
        rows.append(self._epoch(epoch))
        result: dict[str, Any] = {"rows": rows, "done": self.run.done, "params_m": self.run.params_m}
        if epoch.stage == "retrain":
            result |= {METRIC: epoch.metrics["valid_error"], TIME: epoch.epoch + 1}
        if self.run.done:
            rows.append(self._end("completed"))
        elif epoch.stage_end or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            result["should_checkpoint"] = True
            self.saved = time.monotonic()
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write everything the rest of the trial depends on."""
        if self.run is not None:
            path = Path(checkpoint_dir) / CHECKPOINT
            torch.save(self.run.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue from what `save_checkpoint` wrote."""
        if self.run is not None:
            held = torch.load(Path(checkpoint_dir) / CHECKPOINT, weights_only=True, map_location=self.device)
            self.run.load_state_dict(held, adopt=self.adopts)

    def cleanup(self) -> None:
        """Let go of the networks."""
        self.run = None

    def _start(self) -> dict[str, Any]:
        planned = self.planned
        return self._record(
            "start",
            name=planned.name,
            arm=planned.arm,
            axes=dict(planned.axes),
            config=planned.trial.to_dict(),
        )

    def _epoch(self, row: Row) -> dict[str, Any]:
        genotype = str(row.genotype) if row.genotype else None
        return self._record(
            "epoch",
            stage=row.stage,
            part=row.part,
            epoch=row.epoch,
            metrics=dict(row.metrics),
            genotype=genotype,
        )

    def _end(self, status: str, reason: str | None = None) -> dict[str, Any]:
        found = self.run.search.genotype if self.run is not None else None
        metrics = dict(self.run.result) if self.run is not None and self.run.result else {}
        return self._record(
            "end", status=status, reason=reason, genotype=str(found) if found else None, metrics=metrics
        )

    def _record(self, kind: str, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "trial": self.id, "attempt": self.attempt, "time": time.time(), **values}


def resolve(config: Mapping[str, Any]) -> Planned:
    """The planned trial of a Tune configuration: its base with the fields that Tune or Optuna chose."""
    base = config["planned"]
    trial = Trial.from_dict(base["trial"])
    axes = dict(base["axes"])
    for name in base["fields"]:
        value = config[name]
        trial = override(
            trial, {SHORT.get(name, name): base["named"][name][value] if name in base["named"] else value}
        )
        axes[name] = value
    return Planned(base["name"], base["arm"], axes, trial)


def configuration(
    planned: Planned, data_key: str, resources: Resources, restore: Path | None = None
) -> dict[str, Any]:
    """Tune's configuration of one planned trial: plain data, no array in it."""
    return {
        "id": planned.trial.id,
        "name": planned.name,
        "arm": planned.arm,
        "axes": dict(planned.axes),
        "trial": planned.trial.to_dict(),
        "fields": [],
        "named": {},
        "data_key": data_key,
        "threads": max(1, int(resources.cpus_per_trial)),
        "gpus": resources.gpus_per_trial,
        "restore": str(restore) if restore else None,
        "adopts": False,
    }


class Forward(tune.Callback):
    """Hands the rows of all trials to the recorder, and closes the trials that did not close themselves."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.last: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore of its own, which this project does not use: records say what is done.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record what an epoch reported."""
        for row in result["rows"]:
            self.recorder.row(row)
            self.last[trial.trial_id] = row

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
            "genotype": None,
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
            "name": planned.name,
            "arm": planned.arm,
            "axes": dict(planned.axes),
            "config": planned.trial.to_dict(),
        }
        self.recorder.row(row)
        return row


def scheduler(name: SchedulerName, epochs: int, seed: int = 0) -> TrialScheduler:
    """Scheduler that counts retraining epochs only, `epochs` at most.

    Raises:
        ValueError: too few epochs for it to decide anything.
    """
    if name != "fifo" and epochs < 2:
        raise ValueError(
            f"--scheduler {name} compares trials between retraining epochs; {epochs} is too few, use fifo"
        )
    match name:
        case "fifo":
            return FIFOScheduler()
        case "asha":
            grace = max(1, epochs // 8)
            return ASHAScheduler(
                time_attr=TIME,
                max_t=epochs,
                grace_period=grace,
                reduction_factor=2,
                metric=METRIC,
                mode="min",
            )
        case "hyperband":
            return HyperBandScheduler(time_attr=TIME, max_t=epochs, metric=METRIC, mode="min")
        case "median":
            grace = max(1, epochs // 4)
            return MedianStoppingRule(
                time_attr=TIME, grace_period=grace, min_samples_required=3, metric=METRIC, mode="min"
            )
        case "pbt":
            return PopulationBasedTraining(
                time_attr=TIME,
                perturbation_interval=max(1, epochs // 5),
                hyperparam_mutations=PBT_FIELDS,
                require_attrs=False,
                metric=METRIC,
                mode="min",
            )


PBT_FIELDS = {
    "retrain.lr.start": tune.loguniform(0.005, 0.2),
    "retrain.weight_decay": tune.loguniform(1e-5, 3e-3),
}
"""What population-based training changes while it retrains: nothing that the shape of a weight depends on."""


def run_planned(
    planned: Sequence[Planned],
    arrays: Mapping[str, Arrays],
    resources: Resources,
    recorder: Recorder,
    folder: Path,
    *,
    scheduler_name: SchedulerName = "fifo",
    restore: Mapping[str, Path] | None = None,
) -> None:
    """Run planned trials to their ends; `restore` gives checkpoints by trial id to continue from."""
    restore = restore or {}
    configs = [configuration(p, data_key(p.trial), resources, restore.get(p.trial.id)) for p in planned]
    space: dict[str, Any] = {"planned": tune.grid_search(configs)}
    if scheduler_name == "pbt":
        for config in configs:
            config |= {"fields": list(PBT_FIELDS), "adopts": True}
        space |= PBT_FIELDS
    chosen = scheduler(scheduler_name, max(p.trial.retrain.epochs for p in planned))
    config = tune.TuneConfig(
        scheduler=chosen, reuse_actors=True, max_concurrent_trials=resources.max_concurrent
    )
    _fit(space, config, arrays, resources, recorder, folder, keep=None if scheduler_name == "pbt" else 2)


def data_key(trial: Trial) -> str:
    """Name of the arrays that a trial reads; trials that split the same images differently share them."""
    config = trial.data
    return repr((config.source, config.test, config.limit, config.test_limit, config.image_size))


def run_joint(
    base: Planned,
    domains: Mapping[str, Domain],
    named: Mapping[str, Mapping[str, Any]],
    trials: int,
    objectives: Sequence[str],
    arrays: Mapping[str, Arrays],
    resources: Resources,
    recorder: Recorder,
    folder: Path,
    *,
    scheduler_name: SchedulerName = "fifo",
) -> None:
    """Let Optuna choose `trials` configurations from `domains`; objectives are `error` (validation) and `params`.

    `named` spells out the values of a domain whose values are names. Optuna's own storage is a journal in `folder`, so a study
    that was stopped goes on with what it knew.

    Raises:
        ValueError: a scheduler with several objectives; it could not tell which trial is worse.
    """
    if len(objectives) > 1 and scheduler_name != "fifo":
        raise ValueError(
            f"--scheduler {scheduler_name} needs one objective, not {', '.join(objectives)}; use fifo"
        )
    if scheduler_name == "pbt":
        raise ValueError(
            "--scheduler pbt chooses values itself, so it cannot go with a joint search; use fifo, asha or median"
        )
    config = configuration(base, data_key(base.trial), resources)
    config |= {"id": None, "fields": list(domains), "named": {k: dict(v) for k, v in named.items()}}
    space: dict[str, Any] = {"planned": config}
    for name, domain in domains.items():
        space[name] = (
            tune.choice(list(domain.values)) if domain.values else tune.loguniform(domain.low, domain.high)
        )
    metrics = [OBJECTIVES[name] for name in objectives]
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        search = OptunaSearch(
            metric=metrics if len(metrics) > 1 else metrics[0],
            mode=["min"] * len(metrics) if len(metrics) > 1 else "min",
            storage=storage,
            study_name="joint",
            seed=base.trial.seeds.search,
        )
    tuning = tune.TuneConfig(
        search_alg=search,
        num_samples=trials,
        reuse_actors=True,
        max_concurrent_trials=resources.max_concurrent or slots(resources),
        scheduler=None if len(metrics) > 1 else scheduler(scheduler_name, base.trial.retrain.epochs),
    )
    _fit(space, tuning, arrays, resources, recorder, folder, keep=2)


OBJECTIVES = {"error": METRIC, "params": "params_m"}
"""What a joint search can minimise, and the result that holds it: never anything of the test part."""


def slots(resources: Resources) -> int:
    """How many trials run at once on the machines there are now."""
    have = ray.cluster_resources()
    by_cpu = have.get("CPU", 1) / resources.cpus_per_trial if resources.cpus_per_trial else float("inf")
    by_gpu = have.get("GPU", 0) / resources.gpus_per_trial if resources.gpus_per_trial else float("inf")
    return max(1, int(min(by_cpu, by_gpu, resources.max_concurrent or float("inf"))))


def _fit(
    space: dict[str, Any],
    config: tune.TuneConfig,
    arrays: Mapping[str, Arrays],
    resources: Resources,
    recorder: Recorder,
    folder: Path,
    *,
    keep: int | None,
) -> None:
    config.trial_name_creator = _trial_name
    config.trial_dirname_creator = _trial_folder
    bundle = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    actor = tune.with_resources(
        tune.with_parameters(TrialActor, arrays=dict(arrays)),
        tune.PlacementGroupFactory([{name: amount for name, amount in bundle.items() if amount}]),
    )
    tuner = tune.Tuner(
        actor,
        param_space=space,
        tune_config=config,
        run_config=tune.RunConfig(
            name=f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            storage_path=str(folder.resolve() / "tune"),
            verbose=0,
            callbacks=[Forward(recorder)],
            failure_config=tune.FailureConfig(max_failures=3),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=keep),
        ),
    )
    tuner.fit()


def _trial_name(trial: TuneTrial) -> str:
    base = trial.config["planned"]
    return base["id"] or f"{base['arm']}-{trial.trial_id}"


def _trial_folder(trial: TuneTrial) -> str:
    return _trial_name(trial)


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
