"""What becomes of the rows of trials while a study runs: kept first, then shown."""

import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from analysis import records
from experiments.checkpoints import Checkpoints
from experiments.folder import SETTLED
from experiments.repeats import Repeats, difference
from experiments.study import Planned
from experiments.tracking import Tracker
from nas.trial import Trial


class Progress:
    """How far the study is, said in one line when a trial ends and every half minute."""

    def __init__(
        self,
        todo: Sequence[Planned],
        base: Trial,
        joint_trials: int = 0,
        past: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.work = {p.trial.id: max(0, _epochs(p.trial) - past.get(p.trial.id, 0)) for p in todo}
        """Epochs that each trial has yet to run; `past` gives those that earlier runs recorded."""
        self.trials = len(todo) + joint_trials
        self.joint = _epochs(base)
        """Epochs of a trial that a joint search has yet to choose, roughly: choices may change them."""
        self.total = sum(self.work.values()) + joint_trials * self.joint
        self.names = {p.trial.id: p.name for p in todo}
        self.epochs: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.best: tuple[float, str] | None = None
        self.started = self.said = time.monotonic()

    def row(self, row: Mapping[str, Any]) -> None:
        """Count a row, and speak when it is time."""
        if row["kind"] == "start":
            self.names[row["trial"]] = row["name"]
        elif row["kind"] == "epoch":
            self.epochs[row["trial"]] += 1
        elif row["kind"] == "note":
            print(f"note: {self.names.get(row['trial'], row['trial'])}: {row['text']}", flush=True)
        elif row["kind"] == "end":
            self.ended[row["status"]] += 1
            # A trial that stops early owes no more epochs.
            self.total -= max(0, self.work.get(row["trial"], self.joint) - self.epochs[row["trial"]])
            error = row["metrics"].get("valid_error")
            if error is not None and (self.best is None or error < self.best[0]):
                self.best = (error, self.names.get(row["trial"], row["trial"]))
        if row["kind"] == "end" or time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """Trials ended, time gone and left, best error so far."""
        done, elapsed = sum(self.epochs.values()), time.monotonic() - self.started
        left = "?" if not done else clock(elapsed * max(0, self.total - done) / done)
        best = (
            f"best validation error {100 * self.best[0]:.2f} % ({self.best[1]})"
            if self.best
            else "no validation error yet"
        )
        others = ", ".join(f"{n} {status}" for status, n in self.ended.items() if status != "completed")
        ended = f"[{sum(self.ended.values())}/{self.trials} trials" + (f", {others}]" if others else "]")
        return f"{ended} {clock(elapsed)} gone, about {left} left, {best}"


def _epochs(trial: Trial) -> int:
    return sum(stage.epochs for stage in trial.search) + trial.retrain.epochs


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Recorder:
    """Writes every row to the trial's file first, then lets tracking and progress see it.

    A row that the file has is not written again: a worker that starts anew tells all rows of its trial, for
    it cannot know which of them the driver had recorded when either died.
    """

    def __init__(self, folder: Path, tracker: Tracker, progress: Progress, *, repeats: bool = True) -> None:
        self.folder, self.tracker, self.progress = folder, tracker, progress
        self.to_repeat = repeats
        """Whether an epoch that is run again must come out as before; not so where trials copy others."""
        self.known: dict[str, set[tuple[Any, ...]]] = {}
        """Rows in the files of trials that have not ended."""
        self.repeats = Repeats()
        self.ended = 0

    def row(self, row: dict[str, Any]) -> bool:
        """Keep one row; returns whether it tells of something that had not been recorded.

        Raises:
            OSError: the disk is full or gone; what was recorded before is as it was.
        """
        trial = row["trial"]
        path = self.folder / "trials" / f"{trial}.jsonl"
        if trial not in self.known:
            held = records.read_rows(path) if path.exists() else []
            self.known[trial] = {_identity(each) for each in held}
            self.repeats.load(held)
        if _identity(row) in self.known[trial]:
            return False
        found = self.repeats.check(row)
        if found == "differs" and self.to_repeat and self.repeats.differing(trial) == 1:
            self._tell(self._doubt(path, row))
        self._tell(row)
        if row["kind"] == "end":
            del self.known[trial]
            self.repeats.forget(trial)
            if row["status"] in SETTLED:
                Checkpoints(self.folder / "checkpoints", trial).clear()
            self.ended += 1
            if self.ended % 100 == 0:
                told = {"time": row["time"], "ended": self.ended, "memory_mb": resident_mb()}
                records.append_row(self.folder / "driver.jsonl", told)
        return found == "new"

    def _tell(self, row: dict[str, Any]) -> None:
        records.append_row(self.folder / "trials" / f"{row['trial']}.jsonl", row)
        self.known[row["trial"]].add(_identity(row))
        self.tracker.row(row)
        self.progress.row(row)

    def _doubt(self, path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        """Note that a trial does not repeat itself."""
        where = f"{row['stage']} epoch {row['epoch']}" if row["kind"] == "epoch" else f"a {row['kind']}"
        text = f"{where} came out otherwise when it was run again: {difference(records.read_rows(path), row)}"
        common = {name: row[name] for name in ("trial", "attempt", "time")}
        return {"kind": "note", **common, "text": text}


def resident_mb() -> float | None:
    """Memory that this process holds now, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize() / 2**20


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["attempt"], row["kind"], row.get("stage"), row.get("epoch"), row["time"]
