"""A study of thousands of trials ends, is resumed and exported, and its driver does not grow with it."""

import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import records
from benchmarks.orchestration import arguments, resident_mb

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRIALS, KILLED_AFTER, WARM = 2000, 250, 250
GROWTH = 100.0
"""MB by which a driver may grow per 1,000 trials, its first `WARM` left out: twice what was measured."""
DRIVER = "import sys; from benchmarks.orchestration import STUDY; from experiments.main import main; "
DRIVER += "main(STUDY, sys.argv[1:])"


class Driver:
    """A study's driver in a process of its own, and how large it was when it said that a trial ended."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-c", DRIVER, *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.memory_mb: dict[int, float] = {}

    def ends(self) -> Iterator[int]:
        """Trials that this driver has seen end, as it tells of them."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if said := re.match(r"\[(\d+)/\d+ trials", line):
                ended = int(said[1])
                self.memory_mb[ended] = resident_mb(self.process.pid)
                yield ended

    def kill(self) -> None:
        """Kill the driver alone: Ray's processes see that it is gone."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_two_thousand_trials_end_after_a_kill_in_a_driver_that_does_not_grow(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    options = arguments(folder, trials=TRIALS, epochs=1)
    with Driver(*options) as killed:
        assert KILLED_AFTER in killed.ends()
    before = {path.name: path.read_bytes() for path in (folder / "trials").glob("*.jsonl")}
    finished = {name: text for name, text in before.items() if b'"kind": "end"' in text}
    assert len(finished) >= KILLED_AFTER

    with Driver(*options, "--resume") as resumed:
        assert max(resumed.ends()) == TRIALS - len(finished)
        assert resumed.process.wait() == 0

    # Nothing that had ended was run again, and all else was, once.
    paths = sorted((folder / "trials").glob("*.jsonl"))
    assert {name: (folder / "trials" / name).read_bytes() for name in finished} == finished
    assert Counter(sum(row["kind"] == "end" for row in records.read_rows(path)) for path in paths) == {
        1: TRIALS
    }
    trials = records.read_tables(folder).trials
    assert trials["trial_id"].nunique() == len(trials) == TRIALS
    assert set(trials["status"]) == {"completed"}
    assert runs(tmp_path / "mlflow.db") == {("study", "FINISHED"): 1, ("trial", "FINISHED"): TRIALS}

    # Of Ray Tune's files and of checkpoints nothing is left.
    assert not list((folder / "tune").glob("*"))
    assert not list((folder / "checkpoints").glob("*/*"))

    memory = resumed.memory_mb
    last = max(memory)
    grown = (memory[last] - memory[WARM]) / (last - WARM) * 1000
    print({ended: round(memory[ended]) for ended in memory if ended % 250 == 0}, f"{grown:.1f} MB per 1,000")
    assert grown < GROWTH


def runs(database: Path) -> Counter[tuple[str, str]]:
    """Runs of an MLflow store by kind and status."""
    query = "select tags.value, status from runs join tags using (run_uuid) where tags.key = 'kind'"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        return Counter(store.execute(query).fetchall())
