"""What becomes of the rows of trials while a study runs: kept first, then shown."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import records
from experiments.study import Planned
from experiments.tracking import Tracker
from nas.trial import Trial


class Progress:
    """How far the study is, said in one line when a trial ends and every half minute."""

    def __init__(self, todo: Sequence[Planned], base: Trial, joint_trials: int = 0) -> None:
        self.work = {p.trial.id: _epochs(p.trial) for p in todo}
        self.trials = len(todo) + joint_trials
        self.joint = _epochs(base)
        """Epochs of a trial that a joint search has yet to choose, roughly: choices may change them."""
        self.total = sum(self.work.values()) + joint_trials * self.joint
        self.names: dict[str, str] = {}
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
        else:
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
        left = "?" if not done else _clock(elapsed * max(0, self.total - done) / done)
        best = (
            f"best validation error {100 * self.best[0]:.2f} % ({self.best[1]})"
            if self.best
            else "no validation error yet"
        )
        others = ", ".join(f"{n} {status}" for status, n in self.ended.items() if status != "completed")
        ended = f"[{sum(self.ended.values())}/{self.trials} trials" + (f", {others}]" if others else "]")
        return f"{ended} {_clock(elapsed)} gone, about {left} left, {best}"


def _epochs(trial: Trial) -> int:
    return sum(stage.epochs for stage in trial.search) + trial.retrain.epochs


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Recorder:
    """Writes every row to the trial's file first, then lets tracking and progress see it."""

    def __init__(self, folder: Path, tracker: Tracker, progress: Progress) -> None:
        self.folder, self.tracker, self.progress = folder, tracker, progress

    def row(self, row: dict[str, Any]) -> None:
        """Keep one row."""
        records.append_row(self.folder / "trials" / f"{row['trial']}.jsonl", row)
        self.tracker.row(row)
        self.progress.row(row)
