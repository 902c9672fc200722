"""Ray Tune and Optuna: the only file that knows them. Runs planned trials, one Tune `step` per epoch.

What a trial does is in `nas.trial`; what is recorded leaves here as plain rows through a `Recorder`.
"""

import ctypes
import gc
import logging
import os
import platform
import random
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

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

import ray
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
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

from experiments.packing import GPU_SHARE, Machine, Node, Packing, Share
from experiments.study import SHORT, Joint, Planned, Resources, SchedulerName
from nas.config import override
from nas.data import Arrays, Data
from nas.streams import stream_seed
from nas.trial import Row, Trial, TrialRun

CHECKPOINT = "state.pt"
CHECKPOINT_SECONDS = 60.0
"""A trial is saved at each stage's end, and at the first epoch that ends this long after the last save."""
METRIC, TIME = "retrain_valid_error", "retrain_epoch"
"""What schedulers compare, and over what: only retraining reports them, so no search is compared with one."""


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


def connect(resources: Resources) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine alone."""
    if ray.is_initialized():
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody but this process connects
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def check_resources(resources: Resources) -> None:
    """Refuse a request that no node can ever meet on this machine, instead of waiting for it without end.

    Raises:
        ValueError: more CPUs or GPUs per trial than there are; not checked on a cluster, which may grow.
    """
    if resources.address or os.environ.get("RAY_ADDRESS"):
        return
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, asked in (("CPU", resources.cpus_per_trial), ("GPU", resources.gpus_per_trial)):
        if (asked or 0) > have.get(name, 0):
            flag = f"--{name.lower()}s-per-trial"
            raise ValueError(
                f"{flag} {asked:g}: this machine has {have.get(name, 0):g}; lower it, or give an --address"
            )


def machine(resources: Resources) -> Machine:
    """What Ray has for trials now. The memory of a GPU is known if it is one of this machine."""
    nodes = []
    grows = bool(resources.address or os.environ.get("RAY_ADDRESS"))
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            have = node["Resources"]
            memory, shared = (have.get(name, 0) / 2**20 for name in ("memory", "object_store_memory"))
            # A GPU that PyTorch cannot use here is none; a cluster's nodes are not asked.
            gpus = have.get("GPU", 0) if grows or torch.cuda.is_available() else 0
            nodes.append(Node(have.get("CPU", 0), gpus, memory, memory + shared))
    gpu_memory = None
    if any(node.gpus for node in nodes) and not grows:
        devices = range(torch.cuda.device_count())
        gpu_memory = min(torch.cuda.get_device_properties(each).total_memory for each in devices) / 2**20
    return Machine(tuple(nodes), gpu_memory, grows)


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
        return_freed_memory()
        self.planned = resolve(config)
        base = config["planned"]
        self.id = base["id"] or self.planned.trial.id
        self.adopts = base["adopts"]
        self.memory_mb = base["memory_mb"]
        self.attempt = uuid.uuid4().hex
        self.begun = False
        self.saved = time.monotonic()
        self.refusal: dict[str, Any] | None = None
        torch.set_num_threads(base["threads"])
        on_gpu = base["gpus"] > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu and base["gpus"] < 1:
            # Then a trial that outgrows its share ends itself, not its neighbours.
            torch.cuda.set_per_process_memory_fraction(GPU_SHARE * base["gpus"])
        try:
            trial = self.planned.trial
            data = Data(self.arrays[base["data_key"]], trial.data, trial.seeds.split, self.device)
            self.run = TrialRun(trial, data, self.device)
            if base["restore"]:
                self.load_checkpoint(base["restore"])
        except Exception as error:
            self.refusal = self._failure(error)
            self.run = None  # not half restored

    def step(self) -> dict[str, Any]:
        """Run one epoch; what is to be recorded goes to the driver as `rows`."""
        rows = [] if self.begun else [self._start()]
        self.begun = True
        if self.run is None or self.run.done:
            return {"rows": [*rows, self.refusal or self._end("completed")], "done": True}
        try:
            epoch = self.run.step()
        except Exception as error:
            return {"rows": [*rows, self._failure(error)], "done": True}
        return self._result(self.run, epoch, rows)

    def _result(self, run: TrialRun, epoch: Row, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What Tune is told of an epoch, `rows` before it included."""
        rows.append(self._epoch(epoch))
        result: dict[str, Any] = {"rows": rows, "done": run.done, "params_m": run.params_m}
        if epoch.stage == "retrain":
            result |= {METRIC: epoch.metrics["valid_error"], TIME: epoch.epoch + 1}
        if epoch.stage_end:
            return_freed_memory()
        if run.done:
            rows.append(self._end("completed"))
        elif epoch.stage_end or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            result["should_checkpoint"] = True
            self.saved = time.monotonic()
        return result

    def _failure(self, error: Exception) -> dict[str, Any]:
        """The end of a trial whose own code raised: it would raise again, so Ray is not to try it again."""
        if isinstance(error, FloatingPointError):
            return self._end("diverged", reason=str(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return self._end("oom", reason=str(error))
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return self._end("failed", reason=reason)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write everything the rest of the trial depends on."""
        if self.run is not None:
            path = Path(checkpoint_dir) / CHECKPOINT
            torch.save(self.run.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # Ray passes the path
        """Continue from what `save_checkpoint` wrote."""
        if self.run is not None:
            held = torch.load(Path(checkpoint_dir) / CHECKPOINT, weights_only=True, map_location=self.device)
            self.run.load_state_dict(held, adopt=self.adopts)

    def cleanup(self) -> None:
        """Let go of the networks."""
        self.run = None

    def _start(self) -> dict[str, Any]:
        where = host(self.device) | {"memory_mb": self.memory_mb}
        return self._record("start", **described(self.planned), host=where)

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


def return_freed_memory() -> None:
    """Hand back what freed networks took, for a later stage may hold other sizes and the next trial less."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def resolve(config: Mapping[str, Any]) -> Planned:
    """The planned trial of a Tune configuration: its base with the fields that Tune or Optuna chose."""
    base = config["planned"]
    trial = Trial.from_dict(base["trial"])
    axes = dict(base["axes"])
    for name in base["fields"]:
        value = config[name]
        changes = base["named"][name][value] if name in base["named"] else {SHORT.get(name, name): value}
        trial = override(trial, changes)
        axes[name] = value
    chosen = "".join(f" {name}={config[name]}" for name in base["fields"])
    return Planned(base["name"] + chosen, base["arm"], axes, trial)


def configuration(planned: Planned, share: Share, restore: Path | None = None) -> dict[str, Any]:
    """Tune's configuration of one planned trial and its share of the machine: plain data, no array in it."""
    return {
        "id": planned.trial.id,
        "name": planned.name,
        "arm": planned.arm,
        "axes": dict(planned.axes),
        "trial": planned.trial.to_dict(),
        "fields": [],
        "named": {},
        "data_key": data_key(planned.trial),
        "threads": share.threads,
        "gpus": share.gpus,
        "memory_mb": share.memory_mb,
        "bundle": share.bundle,
        "restore": str(restore) if restore else None,
        "adopts": False,
    }


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


def described(planned: Planned) -> dict[str, Any]:
    """What the start row of a trial says of its plan."""
    return {
        "name": planned.name,
        "arm": planned.arm,
        "axes": dict(planned.axes),
        "config": planned.trial.to_dict(),
        "params": common_params(planned.trial),
    }


def common_params(trial: Trial) -> dict[str, Any]:
    """What people search trials for, by its short names, whatever the study varies."""
    params: dict[str, Any] = {
        "seed": trial.seeds.search,
        "dataset": trial.data.source,
        "space": trial.space.name,
    }
    if trial.search:
        params |= {
            "K": trial.method.supernet.partial_channels,
            "edge_norm": trial.method.supernet.edge_norm,
            "order": trial.method.arch_update.order,
            "depths": "-".join(str(stage.cells) for stage in trial.search),
        }
    return params | {"M": trial.method.searcher.max_skip}


def host(device: torch.device) -> dict[str, Any]:
    """Where an attempt ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"node": platform.node(), "device": name, "threads": torch.get_num_threads()}


class RetrainHyperBand(HyperBandScheduler):
    """HyperBand that lets results without a retraining epoch pass, as other schedulers do by themselves."""

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide on a retraining epoch; a search goes on."""
        if TIME not in result:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision


class RetrainMedian(MedianStoppingRule):
    """Median stopping that a trial without a last retraining epoch, such as a diverged one, does not trip."""

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Count a last retraining epoch."""
        if TIME in result:
            super().on_trial_complete(tune_controller, trial, result)


class RetrainOptuna(OptunaSearch):
    """Optuna's samplers, told of retraining epochs only: a search reports nothing that they compare."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a retraining epoch on."""
        if TIME in result:
            super().on_trial_result(trial_id, result)


def scheduler(name: SchedulerName, epochs: int) -> TrialScheduler:
    """Scheduler that counts retraining epochs only, `epochs` at most."""
    match name:
        case "fifo":
            return FIFOScheduler()  # type: ignore[no-untyped-call]
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
            # Otherwise a bracket whose last rung lies before the last epoch finishes no trial.
            return RetrainHyperBand(
                time_attr=TIME, max_t=epochs, metric=METRIC, mode="min", stop_last_trials=False
            )
        case "median":
            grace = max(1, epochs // 4)
            return RetrainMedian(
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


def data_key(trial: Trial) -> str:
    """Name of the arrays that a trial reads; trials that split the same images differently share them."""
    config = trial.data
    chosen = (config.source, config.test, config.limit, config.test_limit, config.image_size, config.stream)
    return repr(chosen)


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
