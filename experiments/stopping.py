"""Which trials are stopped early: rules that compare like with like, and marks that keep the answer honest.

A rule compares trials within one group only: all retrainings, or all searches of one space in one stage. A
trial that a rule would stop is marked. It goes on all the same with a probability that the mark records, so
that `analysis.pruning` can weigh the trials that finished by how likely that was.
"""

import json
import math
import random
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from nas.streams import stream_seed

SchedulerName = Literal["fifo", "asha", "hyperband", "median", "pbt"]
Rungs = Literal["retrain_epoch", "compute_seconds", "search_epoch"]
Row = Mapping[str, Any]

_ON: dict[SchedulerName, tuple[Rungs, ...]] = {
    "fifo": ("retrain_epoch",),
    "asha": ("retrain_epoch", "compute_seconds", "search_epoch"),
    "hyperband": ("retrain_epoch", "compute_seconds"),
    "median": ("retrain_epoch", "compute_seconds", "search_epoch"),
    "pbt": ("retrain_epoch", "compute_seconds"),
}
"""What each scheduler can count; HyperBand and PBT compare results of retraining only."""

_SHARE: dict[SchedulerName, int] = {"asha": 8, "median": 4, "pbt": 5}
"""The first rung lies this part of the epochs into them, where the user does not say."""


@dataclass(frozen=True)
class Stopping:
    """How a study stops trials early, and which of them go on all the same.

    Raises:
        ValueError: a choice that its scheduler cannot keep.
    """

    scheduler: SchedulerName = "fifo"
    rungs: Rungs = "retrain_epoch"
    """What a trial's age is counted in: epochs of retraining; seconds of its own search and retraining, which
    is fair where arms differ in the time of an epoch; epochs within the current stage of the search."""
    first: float | None = None
    """First rung: ASHA and median stopping decide from here on, PBT perturbs each time this much has passed.

    None is an eighth of the epochs for ASHA, a quarter for median stopping, a fifth for PBT."""
    last: float | None = None
    """ASHA has no rung after this, HyperBand halves up to here; None is the last epoch."""
    random_completion: float = 0.0
    """Probability with which a trial that the rule would stop goes on to the next rung."""
    audit: float = 0.0
    """Share of the trials, drawn uniformly, that no rule stops."""

    def __post_init__(self) -> None:
        name = self.scheduler
        for field_name, allowed in (("scheduler", get_args(SchedulerName)), ("rungs", get_args(Rungs))):
            if (given := getattr(self, field_name)) not in allowed:
                raise ValueError(f"{field_name}={given!r} is not one of {', '.join(allowed)}")
        if self.rungs not in _ON[name]:
            raise ValueError(
                f"rungs={self.rungs}: {name} works with {' or '.join(_ON[name])} only; "
                "choose one of these, or asha or median"
            )
        for which, value, users in (
            ("first", self.first, ("asha", "median", "pbt")),
            ("last", self.last, ("asha", "hyperband")),
        ):
            if value is None:
                continue
            if name not in users:
                raise ValueError(
                    f"{which}={value:g}: {name} has no use for it; leave it out, or use {', '.join(users)}"
                )
            least = 0.0 if self.rungs == "compute_seconds" else 1.0
            if not (value >= least and 0 < value < math.inf):
                wanted = "a number of seconds above 0" if least == 0 else "at least 1 epoch"
                raise ValueError(f"{which}={value:g} must be {wanted}")
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ValueError(f"first={self.first:g} lies after last={self.last:g}; exchange them")
        if self.rungs == "compute_seconds":
            needed = "last" if name == "hyperband" else "first"
            if getattr(self, needed) is None:
                raise ValueError(
                    f"rungs=compute_seconds: how long a trial takes is not known before, so {name} needs "
                    f"{needed}; give it in seconds"
                )
        self._check_design()

    def _check_design(self) -> None:
        for which, value in (("random_completion", self.random_completion), ("audit", self.audit)):
            if not 0 <= value < 1:
                raise ValueError(f"{which}={value:g} must be in [0, 1); at 1 nothing is stopped: use fifo")
            if value and self.scheduler not in ("asha", "median"):
                why = {
                    "fifo": "fifo stops no trial",
                    "hyperband": "hyperband stops trials while they are paused, all at once",
                    "pbt": "pbt copies trials, so they do not end as what they began",
                }[self.scheduler]
                raise ValueError(f"{which}={value:g}: {why}; use asha or median, or leave it out")

    def check(self, epochs: int) -> None:
        """Refuse a first rung that no trial reaches in time, where the longest one compared has `epochs`.

        These are epochs of retraining, or of a stage of the search if rungs lie there.

        Raises:
            ValueError: the first rung is not before the last epoch.
        """
        if self.rungs != "compute_seconds" and self.first is not None and self.first >= epochs:
            raise ValueError(
                f"first={self.first:g} is not before the last of {epochs} epochs, so {self.scheduler} would "
                f"change nothing; use less, or fifo"
            )

    def span(self, epochs: int) -> tuple[float, float]:
        """First and last rung of trials of `epochs` epochs (of retraining, or of a stage of the search)."""
        first = self.first or max(1, epochs // _SHARE.get(self.scheduler, epochs))
        last = self.last or (math.inf if self.rungs == "compute_seconds" else epochs)
        return first, last


FIFO = Stopping()
"""Nothing is stopped early."""


# Rules


@dataclass(frozen=True)
class Ladder:
    """The rungs of a rule: times that grow by a factor."""

    first: float
    last: float = math.inf
    reduction: float = 2

    def reached(self, time: float) -> float | None:
        """Time of the highest rung reached at `time`, None before the first one."""
        number = 0
        while self.first * self.reduction**number <= min(time, self.last):
            number += 1
        return float(self.first * self.reduction ** (number - 1)) if number else None


class Rule(Protocol):
    """Decides on one trial after another, by results that are comparable; it never forgets one."""

    ladder: Ladder
    """A trial that goes on although the rule would stop it is asked again at the next of these rungs."""

    def add(self, trial: str, time: float, value: float) -> None:
        """Count a result, an error, on which nothing is to be decided."""

    def stops(self, trial: str, time: float, value: float) -> bool:
        """Count a result, and say whether it should be the trial's last."""


class Asha:
    """Asynchronous successive halving, which stops: at a rung the best part of those that got there goes on.

    A trial is compared once per rung, with those that reached the rung before it; a result that jumps over
    rungs counts at the highest. Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning",
    arXiv:1810.05934, in the form that stops instead of promoting. It decides as Ray's ASHAScheduler does with
    `stop_last_trials=False`, and keeps its state by the trial's own id.
    """

    def __init__(self, first: float, last: float = math.inf, reduction: float = 2) -> None:
        self.ladder = Ladder(first, last, reduction)
        self.results: dict[float, dict[str, float]] = defaultdict(dict)
        """By rung and trial the error with which the trial got there."""

    def add(self, trial: str, time: float, value: float) -> None:
        """Count a result."""
        if (rung := self.ladder.reached(time)) is not None:
            self.results[rung].setdefault(trial, value)

    def stops(self, trial: str, time: float, value: float) -> bool:
        """Count a result; True if it is worse than the best 1/reduction of those at the rung before it."""
        rung = self.ladder.reached(time)
        if rung is None or trial in self.results[rung]:
            return False
        # Scores, not errors: interpolated the other way round, a tie would come out otherwise than Ray's.
        scores = [-other for other in self.results[rung].values()]
        self.results[rung][trial] = value
        share = 100 * (1 - 1 / self.ladder.reduction)
        return bool(scores) and -value < float(np.percentile(scores, share))


class Median:
    """Median stopping: a trial whose best is worse than the median of the others' running means is stopped.

    Others are those that got as far, `least` of them at least; their means are over what they reported from
    `first` up to now. Source: Golovin et al., "Google Vizier", KDD 2017, which takes completed trials only;
    that, and the means from `first` on, are as in Ray's MedianStoppingRule. Differs from Ray's in that no
    trial is paused while there are too few others, and that a trial's last result counts once.
    """

    def __init__(self, first: float, least: int = 3) -> None:
        self.ladder, self.least = Ladder(first), least
        self.times: dict[str, array[float]] = defaultdict(_floats)
        self.errors: dict[str, array[float]] = defaultdict(_floats)

    def add(self, trial: str, time: float, value: float) -> None:
        """Count a result."""
        self.times[trial].append(time)
        self.errors[trial].append(value)

    def stops(self, trial: str, time: float, value: float) -> bool:
        """Count a result; True if the trial's best so far is worse than the median of means."""
        self.add(trial, time, value)
        first = self.ladder.first
        if time < first:
            return False
        means = []
        for other, times in self.times.items():
            if other != trial and times[-1] >= time:
                scoped = self.errors[other][bisect_left(times, first) : bisect_right(times, time)]
                means += [np.mean(scoped)] if scoped else []
        return len(means) >= self.least and min(self.errors[trial]) > float(np.median(means))


def _floats() -> "array[float]":
    return array("d")  # eight bytes a result: a study has a million


# Decisions


@dataclass(frozen=True)
class _Point:
    """A result that a rule takes."""

    group: tuple[str | int, ...]
    """Only results of one group are compared."""
    epochs: int
    """Of the stage that the result is of."""
    before: int
    """Epochs of the stages of the search before it."""
    time: float
    """Age of the trial within the stage."""
    value: float


@dataclass
class _Known:
    """What is known of a trial."""

    audit: bool
    space: str = ""
    stages: list[tuple[int, int, int]] = field(default_factory=list)
    """Epochs, cells and channels of the stages of its search."""
    epochs: Counter[str] = field(default_factory=Counter)
    """Of each stage those that have reported: one that a retry repeats counts once."""
    seconds: float = 0.0
    announced: bool = False
    """Whether a mark says that the trial is of the audit subset."""
    spared: set[float] = field(default_factory=set)
    """Rungs at which the trial was marked and went on."""
    lost: dict[str, Any] | None = None
    """The mark after the last epoch, which a driver that died had not recorded."""
    stopped: bool = False


class Judge:
    """Decides who is stopped from the rows that trials report, and says so in rows of kind `mark`.

    A mark holds the time of the rung (epochs of a search are counted over its stages), the `probability` with
    which the trial was to go on, and whether it does (`goes_on`). A trial of the audit subset is marked as
    such at its first epoch, at rung 0. Chance comes from streams named by trial and rung: neither the order
    in which trials arrive nor a resume changes it.
    """

    def __init__(self, stopping: Stopping, epochs: int, seed: int) -> None:
        if stopping.scheduler not in ("asha", "median"):
            raise ValueError(f"{stopping.scheduler} is no rule that judges trials; use asha or median")
        self.stopping, self.epochs, self.seed = stopping, epochs, seed
        self.rules: dict[tuple[str | int, ...], Rule] = {}
        self.trials: dict[str, _Known] = {}

    def stopped(self, trial: str) -> bool:
        """Whether the trial is to run no further."""
        return trial in self.trials and self.trials[trial].stopped

    def judge(self, row: Row) -> list[dict[str, Any]]:
        """Take a row as a trial reports it; the marks it leads to, each of a rung and time of its own."""
        known = self._known(row["trial"])
        if row["kind"] != "epoch":
            self._take(row)
            return []
        marks = []
        if known.lost is not None:
            marks.append(known.lost)
            self._take(known.lost)
        if (mark := self._mark(row)) is not None:
            marks.append(mark)
            self._take(mark)
        return marks

    def replay(self, rows: Iterable[Row]) -> None:
        """Take rows recorded before, of any trials: what was decided stays, and nothing is decided anew.

        Rows are sorted by time; those of one trial stay in order. One decision can be missing: the driver may
        have died between a trial's last epoch and its mark. It is made up at the trial's next epoch.
        """
        latest: dict[str, float] = {}

        def when(row: Row) -> float:
            # A retry on a machine whose clock is behind is not to come before what it retries.
            latest[row["trial"]] = max(row["time"], latest.get(row["trial"], -math.inf))
            return latest[row["trial"]]

        ordered = sorted(rows, key=when)
        telling = ("epoch", "mark", "end")
        final = {row["trial"]: number for number, row in enumerate(ordered) if row["kind"] in telling}
        for number, row in enumerate(ordered):
            self._take(row, undecided=final.get(row["trial"]) == number)

    def _take(self, row: Row, undecided: bool = False) -> None:
        """Count a row on which nothing is to be decided, or nothing yet."""
        known = self._known(row["trial"])
        match row["kind"]:
            case "start":
                config = row["config"]
                known.space = json.dumps(config["space"], sort_keys=True)
                known.stages = [(s["epochs"], s["cells"], s["channels"]) for s in config["search"]]
            case "epoch" if undecided:
                known.lost = self._mark(row)
            case "epoch":
                known.lost = None
                if (point := self._point(row)) is not None:
                    self._rule(point).add(row["trial"], point.time, point.value)
            case "mark":
                known.lost = None
                known.announced |= row["audit"]
                known.stopped |= not row["goes_on"]
                known.spared.add(row["rung"])
            case "end":
                known.lost = None

    def _point(self, row: Row) -> _Point | None:
        """What an epoch gives a rule to compare: nothing if it is a repeated one, or of another stage.

        Nor does one after a stop, which a trial runs if the driver died before it recorded the stop.
        """
        known, metrics = self._known(row["trial"]), row["metrics"]
        stage, part = row["stage"], row["part"]
        if known.stopped or row["epoch"] < known.epochs[stage]:
            return None
        known.epochs[stage] = row["epoch"] + 1
        known.seconds += metrics.get("seconds") or 0.0
        value = metrics.get("valid_error")
        searching = self.stopping.rungs == "search_epoch"
        if value is None or not math.isfinite(value) or searching != (stage == "search"):
            return None
        if not searching:
            time = known.seconds if self.stopping.rungs == "compute_seconds" else row["epoch"] + 1
            return _Point((stage,), self.epochs, 0, time, value)
        # Supernets of other sizes, or at another point of their schedule, are no peers.
        group = (stage, known.space, part, *known.stages[part])
        before = sum(epochs for epochs, _, _ in known.stages[:part])
        return _Point(group, known.stages[part][0], before, row["epoch"] + 1 - before, value)

    def _mark(self, row: Row) -> dict[str, Any] | None:
        """Count an epoch; the mark it leads to, if any."""
        trial, rung = row["trial"], None
        known = self._known(trial)
        if (point := self._point(row)) is not None:
            rule = self._rule(point)
            if rule.stops(trial, point.time, point.value) and (reached := rule.ladder.reached(point.time)):
                rung = point.before + reached
        if rung in known.spared:
            rung = None
        if rung is None and known.audit and not known.announced:
            rung = 0.0
        if rung is None:
            return None
        probability = 1.0 if known.audit else self.stopping.random_completion
        return {
            "kind": "mark",
            "trial": trial,
            "attempt": row["attempt"],
            "time": row["time"],
            "rung": rung,
            "probability": probability,
            "goes_on": self._draw("completion", trial, repr(rung)) < probability,
            "audit": known.audit,
        }

    def _rule(self, point: _Point) -> Rule:
        if point.group not in self.rules:
            first, last = self.stopping.span(point.epochs)
            self.rules[point.group] = (
                Asha(first, last) if self.stopping.scheduler == "asha" else Median(first)
            )
        return self.rules[point.group]

    def _known(self, trial: str) -> _Known:
        if trial not in self.trials:
            self.trials[trial] = _Known(audit=self._draw("audit", trial) < self.stopping.audit)
        return self.trials[trial]

    def _draw(self, *name: str | int) -> float:
        """A number in [0, 1) that is a function of its name."""
        return random.Random(stream_seed(self.seed, *name)).random()
