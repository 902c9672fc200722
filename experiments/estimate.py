"""What a study will take: time, by running a few batches of each kind of trial, and disk."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from experiments.checkpoints import KEEP
from experiments.packing import Packing
from experiments.recorder import clock
from experiments.study import Planned
from nas.data import Arrays, Data
from nas.measures import MEASURES, Values
from nas.trial import Trial, TrialRun

ROW_KB, START_KB = 1.5, 12.0
"""Disk per epoch and per trial: its JSON line or lines, and what tables and MLflow keep of them."""
BATCHES = 1
"""Batches of which an epoch is made when it is timed."""


@dataclass(frozen=True)
class Estimate:
    """What one trial takes."""

    seconds: float
    """Of computation, on the machine that measured it."""
    epochs: int
    checkpoint_mb: float
    """The larger of its checkpoints: of the search or of the retraining."""

    @property
    def records_mb(self) -> float:
        """What its rows take on disk for good."""
        return (START_KB + ROW_KB * self.epochs) / 2**10


def estimate(trial: Trial, arrays: Arrays, device: torch.device) -> Estimate:
    """Estimate of a trial from a short form of it that is run here.

    Each stage runs for three epochs of a few batches: the first to warm up, then one as while architecture
    parameters rest and one as while they learn. What an epoch costs besides its batches is counted with
    them, so short epochs are overestimated. What is measured by name runs once, on as many images as in the
    trial.
    """
    stages = tuple(replace(stage, epochs=3, frozen_epochs=2) for stage in trial.search)
    epochs = 2 if trial.retrain.epochs else 0
    short = replace(trial, search=stages, retrain=replace(trial.retrain, epochs=epochs), measure=())
    data = Data(arrays, trial.data, trial.seeds.split, device)
    batch = max(trial.retrain.batch_size, *(stage.batch_size for stage in trial.search), 0)
    fewest = min(size for part in ("weights", "train") if (size := data.size(part)))
    share = min(1.0, BATCHES * batch / fewest)
    whole = data.parts
    data.parts = few = {part: held[: max(2, round(share * len(held)))] for part, held in whole.items()}
    run = TrialRun(short, data, device)
    seconds = measuring = checkpoint_mb = 0.0
    for stage in trial.search:
        _, frozen = (_seconds(run) for _ in range(2))
        data.parts = whole
        measuring += _measuring(run.search.measured_now(trial.measure), stage.epochs, trial.measure_every)
        data.parts = few
        learning = _seconds(run)
        checkpoint_mb = max(checkpoint_mb, _size_mb(run))
        seconds += stage.frozen_epochs * frozen + (stage.epochs - stage.frozen_epochs) * learning
    if epochs:
        checkpoint_mb = max(checkpoint_mb, _size_mb(run))
        _, training = (_seconds(run) for _ in range(2))
        seconds += trial.retrain.epochs * training
    data.parts = whole
    assert run.search.genotype is not None
    proxies = run.scored(run.search.genotype, trial.measure)
    measuring += math.fsum(value or 0.0 for name, value in proxies.items() if name.endswith("_seconds"))
    total = sum(stage.epochs for stage in trial.search) + trial.retrain.epochs
    return Estimate(seconds / share + measuring, total, checkpoint_mb)


def _measuring(found: Values, epochs: int, measure_every: int) -> float:
    """Seconds that a stage measures for, from what each measure takes once."""
    often = len({*range(0, epochs, measure_every), epochs - 1})
    times = {"always": epochs, "every": often, "last": 1}
    return math.fsum(
        times[measure.when] * (found.get(f"{name}_seconds") or 0.0) for name, measure in MEASURES.items()
    )


def _seconds(run: TrialRun) -> float:
    return run.step().metrics["seconds"] or 0.0


def _size_mb(run: TrialRun) -> float:
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    return buffer.tell() / 2**20


def describe(planned: Sequence[Planned], packing: Packing, arrays: Arrays, device: torch.device) -> list[str]:
    """Planned trials with what each takes, and what all take; trials alike but for seeds are timed once."""
    kinds: dict[Trial, Estimate] = {}
    lines = [f"{'trial':12}  {'threads':>7}  {'GPUs':>4}  {'memory':>8}  {'about':>8}  name"]
    found = []
    for p in planned:
        kind = replace(p.trial, seeds=replace(p.trial.seeds, search=0, retrain=0))
        if kind not in kinds:
            print(f"timing a few batches of {p.arm}", flush=True)
            kinds[kind] = estimate(kind, arrays, device)
        share, one = packing.share(p.trial), kinds[kind]
        found.append(one)
        lines.append(
            f"{p.trial.id:12}  {share.threads:>7}  {share.gpus:>4.2g}  {share.memory_mb:>5} MB  "
            f"{clock(one.seconds):>8}  {p.name}"
        )
    least, most = packing.at_once([p.trial for p in planned], len(planned))
    seconds = max(sum(one.seconds for one in found) / least, max(one.seconds for one in found))
    records = sum(one.records_mb for one in found)
    kept = KEEP * most * max(one.checkpoint_mb for one in found)
    return [
        *lines,
        f"time: about {clock(seconds)} with {least} at once, by a few batches of each kind of trial on this "
        f"machine ({device.type})",
        f"disk: about {records:.1f} MB for good, and up to {kept:.1f} MB of checkpoints while it runs",
    ]
