"""A trial in a worker process, as Ray Tune drives it: one `step` is one epoch of the current stage."""

import ctypes
import gc
import platform
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune

from experiments.packing import GPU_SHARE, Share
from experiments.study import SHORT, Planned
from nas.config import override
from nas.data import Arrays, Data
from nas.trial import Row, Trial, TrialRun

CHECKPOINT = "state.pt"
CHECKPOINT_SECONDS = 60.0
"""A trial is saved at each stage's end, and at the first epoch that ends this long after the last save."""
METRIC, TIME = "retrain_valid_error", "retrain_epoch"
"""What schedulers compare, and over what: only retraining reports them, so no search is compared with one."""


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


def data_key(trial: Trial) -> str:
    """Name of the arrays that a trial reads; trials that split the same images differently share them."""
    config = trial.data
    chosen = (config.source, config.test, config.limit, config.test_limit, config.image_size, config.stream)
    return repr(chosen)


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
