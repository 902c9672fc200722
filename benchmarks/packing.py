"""How much more do N one-thread trials side by side do than one N-thread trial, on the net of a laptop study?

Both run the same steps of the same networks, in processes that stay and take turns, round by round. A form's
seconds are those of one worker's steps, so several side by side do that many times more in them. What Ray and
the start of processes cost is not in it.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.measure import Timing, in_turns, speedup, table
from experiments.packing import Machine, Node, Packing
from experiments.study import Resources
from nas.config import override
from nas.data import Data, load
from nas.footprint import DataShape, costliest
from nas.papers import PAPERS, laptop, on_digits
from nas.retrain import RetrainRun
from nas.search import SearchRun, weight_step
from nas.streams import generator
from nas.supernets.cell import Noise
from nas.trial import Trial

CPU = torch.device("cpu")


def digits_trial() -> Trial:
    """PC-DARTS as `make sweep` runs it."""
    return laptop(on_digits(PAPERS["pc_darts"]))


def search_steps(trial: Trial, data: Data) -> Callable[[], None]:
    """An alternating step of the search: architecture, then weights."""
    stage = trial.search[0]
    state = SearchRun(trial.space, trial.method, (stage,), data, 0, CPU, lambda genotype: {}).state
    assert state is not None
    state.supernet.noise = Noise(generator(0, "noise"))
    batch = next(data.batches("weights", stage.batch_size, order=None))

    def step() -> None:
        trial.method.arch_update.step(state, batch, batch)
        weight_step(state, batch, stage.clip)

    return step


def retrain_steps(trial: Trial, data: Data) -> Callable[[], None]:
    """An epoch of retraining, evaluation included."""
    stage = replace(trial.retrain, epochs=10**6)
    run = RetrainRun(costliest(trial.space), stage, data, 0, CPU)

    def epoch() -> None:
        run.step()

    return epoch


STAGES: dict[str, Callable[[Trial, Data], Callable[[], None]]] = {
    "search": search_steps,
    "retrain": retrain_steps,
}


# --- workers that stay --------------------------------------------------------------------------------------


def _work(pipe: Connection, threads: int, changes: dict[str, Any]) -> None:
    """Body of a worker: builds both stages, then runs what it is told to until told nothing."""
    torch.set_num_threads(threads)
    trial = override(digits_trial(), changes)
    data = Data(load(trial.data), trial.data, 0, CPU)
    stages = {name: build(trial, data) for name, build in STAGES.items()}
    for step in stages.values():
        step()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, steps = order
        for _ in range(steps):
            stages[name]()
        pipe.send("done")


class Workers:
    """Processes of `threads` threads each, built and warm, that wait for orders."""

    def __init__(self, count: int, threads: int, changes: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, threads, changes), daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is an end of file here
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, stage: str, steps: int) -> None:
        """Let all run `steps` steps at once; returns when the last one is done."""
        for pipe in self.pipes:
            pipe.send((stage, steps))
        for pipe in self.pipes:
            pipe.recv()

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def side_by_side(timing: Timing, count: int) -> Timing:
    """Seconds for one worker's steps when `count` workers did as many each in the time measured."""
    return Timing(tuple(seconds / count for seconds in timing.seconds))


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both stages and print a table."""
    options = _options(arguments)
    count = options.workers
    changes: dict[str, Any] = {
        "search.*.batch_size": options.batch,
        "retrain.batch_size": options.batch,
        "data.limit": options.limit,
        "data.test_limit": options.limit,
    }
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, cpu ({capability}), {os.cpu_count()} cores")
    print(f"processes that want a core: {os.getloadavg()[0]:.1f}; only an idle machine gives a fair figure")
    many, one = Workers(count, 1, changes), Workers(1, count, changes)
    rows = []
    try:
        for stage, steps in (("search", options.steps), ("retrain", options.epochs)):
            forms: dict[str, Callable[[], object]] = {
                "one": partial(one.run, stage, steps),
                "many": partial(many.run, stage, steps),
            }
            times = in_turns(forms, rounds=options.rounds)
            packed = side_by_side(times["many"], count)
            unit = "steps/s" if stage == "search" else "epochs/s"
            rates = (f"{steps / each.median:.2f} {unit}" for each in (times["one"], packed))
            rows.append((stage, *rates, speedup(times["one"], packed)))
    finally:
        many.stop()
        one.stop()
    head = ("stage", f"one trial, {count} threads", f"{count} trials, 1 thread each", "throughput")
    print(table(head, rows))
    print(default_packing(override(digits_trial(), changes), count))


def default_packing(trial: Trial, cores: int) -> str:
    """What a study of `trial` does unasked on a machine of so many cores and ample memory."""
    ample = 2.0**20
    machine = Machine((Node(float(cores), 0.0, ample, ample),))
    share = Packing(Resources(), machine, DataShape(channels=1, image_size=8, classes=10)).share(trial)
    return (
        f"a study unasked: {machine.at_once(share)} trials at once, {share.threads} thread each "
        f"({share.memory_mb / 2**10:.1f} GB asked for)"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--rounds", type=int, default=9, help="timed rounds, in turns (default 9)")
    add("--workers", type=int, default=os.cpu_count(), help="trials, and threads (default: cores)")
    add("--steps", type=int, default=5, help="search steps a round (default 5)")
    add("--epochs", type=int, default=1, help="retraining epochs a round (default 1)")
    add("--batch", type=int, default=64, help="images a batch (default 64)")
    add("--limit", type=int, default=400, help="images to train on, some held out (default 400)")
    found = options.parse_args(arguments)
    if min(found.rounds, found.workers, found.steps, found.epochs, found.batch, found.limit) < 1:
        options.error("all numbers must be at least 1")
    return found


if __name__ == "__main__":
    main()
