"""A trial in a worker process, as Ray Tune drives it: one `step` is one epoch of the current stage."""

import ctypes
import gc
import json
import math
import platform
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune

from experiments.checkpoints import Checkpoints, read, write
from experiments.packing import GPU_SHARE, Share
from experiments.provenance import differences, fingerprint
from experiments.study import POLICY, SHORT, Planned, Policy
from nas.config import override
from nas.data import Arrays, Data
from nas.execution import set_deterministic
from nas.searchers import Given
from nas.trial import Row, Trial, TrialRun

CHECKPOINT = "state.pt"
"""File of the state in a checkpoint that Ray Tune asks for."""
METRIC, TIME, SPENT = "retrain_valid_error", "retrain_epoch", "compute_seconds"
"""What schedulers compare, and over what: only retraining reports them, so no search is compared with one."""
NO_MEMORY = "can't allocate memory"
"""What PyTorch says when a CPU has no more, in a plain RuntimeError."""


class TrialActor(tune.Trainable):
    """A trial as Ray Tune drives it: one `step` is one epoch of the current stage.

    It goes on from its newest checkpoint, whoever started it again. A checkpoint holds the trial's rows as
    well: the driver may have died before it recorded the last of them, and drops those that it has.
    """

    def setup(
        self,
        config: dict[str, Any],
        arrays: Mapping[str, Arrays] | None = None,
        alike: Mapping[str, str | None] | None = None,
    ) -> None:
        """Build the trial of `config`; `arrays` holds the data sets by key, one copy per node.

        Raises:
            RuntimeError: this node does not run what the driver runs, whose `fingerprint` is `alike`.
        """
        assert arrays is not None
        if alike is not None and (other := differences(alike, fingerprint())):
            where = platform.node()
            raise RuntimeError(f"node {where} has {other}; install this code and requirements.lock there")
        kept = config["planned"]["checkpoints"]
        folder = None if kept is None else Path(kept).parent
        if alike is not None and folder and not (folder / "study.json").exists():
            raise RuntimeError(f"node {platform.node()} does not see {folder}; share the folder of --out")
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
        # What is left is no trial's: libraries, which stay, and which no later collection need walk again.
        gc.freeze()
        self.planned = resolve(config)
        self.base: dict[str, Any] = config["planned"]
        self.id = self.base["id"] or self.planned.trial.id
        self.attempt = uuid.uuid4().hex
        self.rows: list[dict[str, Any]] = []
        """All rows of the trial, those of earlier attempts included."""
        self.told = 0
        self.ended = False
        self.saved = time.monotonic()
        self.checkpoints: Checkpoints | None = None
        if self.base["checkpoints"] is not None:
            # Under PBT the configuration may be that of the trial it was copied from, the name never is.
            name = self.trial_name if self.base["adopts"] and self.trial_name else self.id
            self.checkpoints = Checkpoints(Path(self.base["checkpoints"]), name)
        torch.set_num_threads(self.base["threads"])
        set_deterministic(self.base["deterministic"])
        on_gpu = self.base["gpus"] > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu and self.base["gpus"] < 1:
            # Then a trial that outgrows its share ends itself, not its neighbours.
            torch.cuda.set_per_process_memory_fraction(GPU_SHARE * self.base["gpus"])
        try:
            doubts = self._restore()
        except Exception as error:
            self.run = None  # not half restored
            self._start()
            self._fail(error)
        else:
            if not self.ended:  # only its end is to be told again, if the driver died before it heard of it
                self._start()
            for doubt in doubts:
                self._say("note", text=doubt)

    def _restore(self) -> list[str]:
        """Build the run as its newest checkpoint left it; returns what was wrong with newer ones."""
        self.run = self._new_run()
        held, doubts = self.checkpoints.load(self.device) if self.checkpoints else (None, [])
        if held is not None:
            try:
                self.run.load_state_dict(held["run"], adopt=self.base["adopts"])
                self.rows = json.loads(held["rows"])
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except (KeyError, RuntimeError, ValueError) as error:  # written by another version of the code
                if NO_MEMORY in str(error):
                    raise
                doubts.append(f"its checkpoint does not fit ({_described(error)}), so it begins anew")
                self.run = self._new_run()
        elif doubts:
            doubts.append("it begins anew, no checkpoint being left")
        self.ended = any(row["kind"] == "end" for row in self.rows)
        return doubts

    def _new_run(self) -> TrialRun:
        trial = self.planned.trial
        data = Data(self.arrays[self.base["data_key"]], trial.data, trial.seeds.split, self.device)
        return TrialRun(trial, data, self.device)

    def step(self) -> dict[str, Any]:
        """Run one epoch; what is to be recorded goes to the driver as `rows`."""
        result: dict[str, Any] = {}
        if self.run is not None and not self.run.done and not self.ended:
            try:
                result = self._epoch(self.run, self.run.step())
            except Exception as error:
                self._fail(error)
        if self.run is None or self.run.done:
            self._end("completed")
        if self.run is not None and self.run.result is not None:
            # Said again: a trial that goes on after its last epoch has no other result.
            result |= {METRIC: self.run.result.get("valid_error"), "params_m": self.run.params_m}
        due = time.monotonic() - self.saved > self.base["checkpoint_seconds"]
        if self.run is not None and (self.run.done or (due and not self.ended)):
            self._save(self.run)
        rows, self.told = self.rows[self.told :], len(self.rows)
        return {"rows": rows, "done": self.ended, **result}

    def _epoch(self, run: TrialRun, row: Row) -> dict[str, Any]:
        """Note what an epoch gave; returns what schedulers are told of it."""
        self._say(
            "epoch",
            stage=row.stage,
            part=row.part,
            epoch=row.epoch,
            metrics=dict(row.metrics),
            genotype=str(row.genotype) if row.genotype else None,
        )
        if row.stage_end:
            self.saved = -math.inf
            return_freed_memory()
        result: dict[str, Any] = {"params_m": run.params_m}
        if row.stage == "retrain":
            spent = sum(run.seconds.values())
            result |= {METRIC: row.metrics["valid_error"], TIME: row.epoch + 1, SPENT: spent}
        return result

    def _save(self, run: TrialRun) -> None:
        if self.checkpoints is None:
            return
        try:
            state = {"run": run.state_dict(), "rows": json.dumps(self.rows)}
            self.checkpoints.save(sum(run.epochs.values()), state)
        except OSError as error:
            # A trial without a new checkpoint has only more to repeat.
            self._say("note", text=f"not saved after epoch {sum(run.epochs.values())}: {error}")
        self.saved = time.monotonic()

    def _fail(self, error: Exception) -> None:
        """End a trial whose own code raised: it would raise again, so Ray is not to try it again.

        Raises:
            Exception: `error`, if another process or another minute may cure it.
        """
        if isinstance(error, FloatingPointError):
            self._end("diverged", reason=str(error))
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY in str(error):
            self._end("oom", reason=str(error))
        elif isinstance(error, OSError | torch.AcceleratorError):
            raise error  # after an error on a GPU this process can use it no more
        else:
            self._end("failed", reason=_described(error))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state for a scheduler that pauses trials or copies them."""
        if self.run is not None:
            write(Path(checkpoint_dir) / CHECKPOINT, {"run": self.run.state_dict()})

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # Ray passes the path
        """Continue from what `save_checkpoint` wrote, unless the trial's own checkpoint is further."""
        if self.run is None:
            return
        held = read(Path(checkpoint_dir) / CHECKPOINT, self.device)["run"]
        if self.base["adopts"] or sum(held["epochs"].values()) > sum(self.run.epochs.values()):
            self.run.load_state_dict(held, adopt=self.base["adopts"])

    def cleanup(self) -> None:
        """Let go of the networks."""
        self.run = None

    def _start(self) -> None:
        where = host(self.device) | {"memory_mb": self.base["memory_mb"]}
        resumed = sum(self.run.epochs.values()) if self.run is not None else 0
        self._say("start", **described(self.planned), host=where, resumed=resumed)

    def _end(self, status: str, reason: str | None = None) -> None:
        if self.ended:
            return
        found = self.run.search.genotype if self.run is not None else None
        metrics = dict(self.run.result) if self.run is not None and self.run.result else {}
        genotype = str(found) if found else None
        self._say("end", status=status, reason=reason, genotype=genotype, metrics=metrics)
        self.ended = True

    def _say(self, kind: str, **values: Any) -> None:
        row = {"kind": kind, "trial": self.id, "attempt": self.attempt, "time": time.time(), **values}
        self.rows.append(row)


def _described(error: Exception) -> str:
    """What an exception says, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


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
    return Planned(base["name"] + chosen, base["arm"], axes, trial, tuple(base["found_by"]))


def configuration(
    planned: Planned, share: Share, checkpoints: Path | None = None, policy: Policy = POLICY
) -> dict[str, Any]:
    """Tune's configuration of one planned trial: plain data, no array in it.

    `share` is what it is given of the machine; without a folder for `checkpoints` none is written.
    """
    return {
        "id": planned.trial.id,
        "name": planned.name,
        "arm": planned.arm,
        "axes": dict(planned.axes),
        "found_by": list(planned.found_by),
        "trial": planned.trial.to_dict(),
        "fields": [],
        "named": {},
        "data_key": data_key(planned.trial),
        "threads": share.threads,
        "gpus": share.gpus,
        "memory_mb": share.memory_mb,
        "bundle": share.bundle,
        "checkpoints": str(checkpoints) if checkpoints else None,
        "checkpoint_seconds": policy.checkpoint_seconds,
        "deterministic": policy.deterministic,
        "adopts": False,
    }


def data_key(trial: Trial) -> str:
    """Name of the arrays that a trial reads; trials that split the same images differently share them."""
    config = trial.data
    chosen = (config.source, config.test, config.limit, config.test_limit, config.image_size, config.stream)
    return repr(chosen)


def described(planned: Planned) -> dict[str, Any]:
    """What the start row of a trial says of its plan."""
    found_by = {"found_by": list(planned.found_by)} if planned.found_by else {}
    return found_by | {
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
    searcher = trial.method.searcher
    return params | ({} if isinstance(searcher, Given) else {"M": searcher.max_skip})


def host(device: torch.device) -> dict[str, Any]:
    """Where an attempt ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"node": platform.node(), "device": name, "threads": torch.get_num_threads()}
