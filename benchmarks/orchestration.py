"""What does the platform add to a trial, and what does its driver spend on a trial?

The trials are the smallest real ones: a genotype drawn at random, a network of one cell of 4 channels, ten
images to train on. Both forms run the same trials, in turns: *plain* calls `run_trial` in this process, which
is a trial's own computation (building its network, its epochs, the test pass); the platform's goes through
Ray Tune, one trial at a time in one process that is kept, with records and MLflow. What lies between two
epochs, and in a trial besides them, is compared. The first trial of a round is left out, for it waits for its
process. The second table is the driver's: CPU seconds of all its threads, and its memory as trials add up.
"""

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import table
from experiments.folder import write_study
from experiments.main import Job, parser, prepare
from experiments.packing import Packing
from experiments.recorder import Progress, Recorder
from experiments.study import Study
from experiments.tracking import Tracker, default_uri
from nas.papers import PAPERS
from nas.trial import Row, run_trial

STUDY = Study(
    name="orchestration",
    question="What does a trial cost besides its own computation?",
    base=PAPERS["pc_darts"],  # without an axis there is only the random arm, which searches nothing
)
SMALLEST = (
    "space.nodes=1",
    "data.limit=20",
    "data.test_limit=10",
    "data.valid=0.5",
    "retrain.cells=1",
    "retrain.channels=4",
    "retrain.batch_size=16",
)
STEP = 100
"""Trials between two looks at the driver's memory."""


def arguments(folder: Path, *, trials: int, epochs: int, at_once: int | None = None) -> list[str]:
    """Command line of a study of `trials` smallest trials of so many epochs."""
    options = ["--preset", "tiny", "--seeds", str(trials), "--out", str(folder)]
    options += [] if at_once is None else ["--max-concurrent", str(at_once)]
    return [*options, "--set", *SMALLEST, f"retrain.epochs={epochs}"]


def job(folder: Path, *, trials: int, epochs: int, at_once: int | None = None) -> Job:
    """That study, ready to run."""
    options = arguments(folder, trials=trials, epochs=epochs, at_once=at_once)
    return prepare(STUDY, parser(STUDY).parse_args(options))


class Untracked(Tracker):
    """A tracker that brings nothing anywhere."""

    def open(self) -> None:
        """Nothing is opened."""

    def row(self, row: Any) -> None:
        """Nothing is brought."""

    def close(self, artifacts: Sequence[Path] = (), summary: str = "") -> None:
        """Nothing is closed."""


Watch = Callable[[dict[str, Any]], None]
"""Is shown every row that a study recorded."""


class Watched(Recorder):
    """A recorder that somebody watches."""

    watch: Watch

    def row(self, row: dict[str, Any]) -> bool:
        """Keep one row."""
        new = super().row(row)
        self.watch(row)
        return new


def run(job: Job, watch: Watch, *, tracked: bool = True) -> None:
    """Run a study as `experiments.main` does, from its first trial to its last; Ray is started if need be."""
    from experiments import cluster, tune, worker  # takes seconds

    cluster.connect(job.resources)
    packing = Packing(job.resources, cluster.machine(job.resources), job.shape)
    job.folder.mkdir(parents=True)
    write_study(job.folder, job.meta)
    tracker = (Tracker if tracked else Untracked)(default_uri(job.folder), job.meta, job.folder)
    tracker.open()
    recorder = Watched(job.folder, tracker, Progress(job.planned, job.base))
    recorder.watch = watch
    place = tune.Place(packing, {worker.data_key(job.base): job.arrays}, recorder, job.folder, job.policy)
    with redirect_stdout(io.StringIO()):
        tune.run_planned(job.planned, place)
    tracker.close()


# --- what the platform adds to a trial ----------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """When a trial was done with each of its epochs and with itself; seconds of any clock."""

    epochs: tuple[float, ...]
    end: float

    @property
    def between(self) -> float:
        """Mean seconds from one epoch's end to the next's."""
        return (self.epochs[-1] - self.epochs[0]) / (len(self.epochs) - 1)

    def besides(self, began: float) -> float:
        """Seconds since `began` that did not lie between two epochs."""
        return self.end - began - (self.epochs[-1] - self.epochs[0])


@dataclass(frozen=True)
class Spent:
    """Seconds of a round: medians over its trials."""

    per_epoch: float
    """From one epoch's end to the next's."""
    per_trial: float
    """All else, from the end of the trial before; the first epoch is in it."""


def spent(trials: Sequence[Times]) -> Spent:
    """What trials took that ran one after another; the first only tells when the second began."""
    return Spent(
        statistics.median(trial.between for trial in trials[1:]),
        statistics.median(trial.besides(before.end) for before, trial in pairwise(trials)),
    )


def plain(job: Job) -> Spent:
    """The trials in this process, without the platform."""
    trials = []
    for planned in job.planned:
        epochs: list[float] = []

        def report(row: Row, epochs: list[float] = epochs) -> None:
            epochs.append(time.perf_counter())

        run_trial(planned.trial, report, arrays=job.arrays)
        trials.append(Times(tuple(epochs), time.perf_counter()))
    return spent(trials)


def platform(job: Job) -> Spent:
    """The trials through the platform, whose rows tell when what was done."""
    trials: list[Times] = []
    epochs: list[float] = []

    def watch(row: dict[str, Any]) -> None:
        if row["kind"] == "epoch":
            epochs.append(row["time"])
        elif row["kind"] == "end":
            trials.append(Times(tuple(epochs), row["time"]))
            epochs.clear()

    run(job, watch)
    return spent(trials)


def added(rounds: int, trials: int, epochs: int) -> str:
    """Table of both forms in turns, and of what the platform adds."""
    found: dict[str, list[Spent]] = {"plain": [], "platform": []}
    forms = {"plain": plain, "platform": platform}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for name in list(forms) if number % 2 else list(reversed(forms)):
                study = job(Path(scratch, f"{number} {name}"), trials=trials, epochs=epochs, at_once=1)
                found[name].append(forms[name](study))
            print(f"round {number + 1}: {found['plain'][-1]}, {found['platform'][-1]}, {load()}", flush=True)
    rows = []
    for part in ("per_trial", "per_epoch"):
        ours, bare = ([getattr(each, part) for each in found[name]] for name in ("platform", "plain"))
        more = [a - b for a, b in zip(ours, bare, strict=True)]
        rows.append([part.replace("_", " "), *map(milliseconds, (bare, ours, more))])
    return table(["ms", "plain", "through the platform", "added"], rows)


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and range."""
    low, middle, high = (1000 * each for each in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


# --- what the driver spends ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a study cost its driver."""

    trials: int
    epochs: int
    seconds: float
    """From the first trial's end to the last one's."""
    cpu_seconds: float
    """Of all threads of the driver, from the study's begin until MLflow has all."""
    memory_mb: tuple[float, ...]
    """Resident memory after every `STEP` trials."""
    peak_mb: float

    @property
    def results(self) -> int:
        """Results that Ray Tune handed to the driver: one for each epoch."""
        return self.trials * self.epochs

    @property
    def growth(self) -> float:
        """MB per 1,000 trials, from the first quarter of the study on; before, libraries load."""
        return growth(self.memory_mb)


def growth(memory_mb: Sequence[float]) -> float:
    """MB that a driver's memory grew by per 1,000 trials, its first quarter left out; NaN if too short."""
    later = memory_mb[len(memory_mb) // 4 :]
    return (later[-1] - later[0]) / (len(later) - 1) / STEP * 1000 if len(later) > 1 else float("nan")


def driver(trials: int, epochs: int, tracked: bool) -> Cost:
    """Run a study in this process, which is best a new one, and say what it cost."""
    torch.set_num_threads(1)
    ends: list[float] = []
    memory: list[float] = []

    def watch(row: dict[str, Any]) -> None:
        if row["kind"] == "end":
            ends.append(time.perf_counter())
            if len(ends) % STEP == 0:
                memory.append(resident_mb())

    with tempfile.TemporaryDirectory() as scratch:
        study = job(Path(scratch, "study"), trials=trials, epochs=epochs)
        began = time.process_time()
        run(study, watch, tracked=tracked)
        cpu = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Cost(trials, epochs, ends[-1] - ends[0], cpu, tuple(memory), peak)


def resident_mb(process: int | str = "self") -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def costs(trials: int, epochs: int) -> str:
    """Table of studies in drivers of their own: without MLflow, with it, and with fewer but longer trials."""
    rows = []
    for name, count, length, tracked in (
        ("without MLflow", trials, 1, False),
        ("with MLflow", trials, 1, True),
        ("with MLflow", max(2, trials // epochs), epochs, True),
    ):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            cost = pool.submit(driver, count, length, tracked).result()
        print(f"{name}: {cost}, {load()}", flush=True)
        rows.append(
            [
                name,
                f"{count:,} x {length}",
                f"{1000 * cost.cpu_seconds / cost.results:.0f}",
                f"{cost.results / cost.seconds:.1f}",
                f"{cost.peak_mb:.0f}",
                f"{cost.growth:.0f}",
            ]
        )
    head = ["driver", "trials x epochs", "CPU ms / result", "results / s", "peak MB", "MB / 1,000 trials"]
    return table(head, rows)


def load() -> str:
    """How busy the machine is."""
    return f"{os.getloadavg()[0]:.1f} processes want a core of {os.cpu_count()}"


# --- command line -------------------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> None:
    """Measure both and print two tables."""
    options = _options(given)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {load()}", flush=True)
    if options.rounds:
        print(added(options.rounds, options.each, options.epochs), flush=True)
    if options.trials:
        print(costs(options.trials, options.epochs))


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--rounds", type=int, default=5, help="rounds, in turns; 0 leaves them out (default 5)")
    add("--each", type=int, default=12, help="trials of a round (default 12)")
    add("--epochs", type=int, default=20, help="epochs of a trial of a round (default 20)")
    add(
        "--trials",
        type=int,
        default=1000,
        help="trials of the driver's study; 0 leaves it out (default 1000)",
    )
    found = options.parse_args(given)
    if min(found.rounds, found.trials) < 0 or min(found.each, found.epochs) < 2 or found.trials == 1:
        options.error("--each and --epochs must be at least 2; --rounds and --trials 0, or more (trials: 2)")
    return found


if __name__ == "__main__":
    main()
