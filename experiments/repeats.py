"""Epochs that a resumed trial computes again: the same, as they should be, or not.

A trial that was killed goes on from its last checkpoint, so its file may hold an epoch twice, from two
attempts at two times. MLflow is to show such an epoch once, and a trial whose second try came out otherwise
ran on hardware, or by code, that does not repeat itself, which its reader must be told.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from analysis.records import is_measured

Verdict = Literal["new", "repeat", "differs"]


class Repeats:
    """What has been recorded of the trials that run, as far as it takes to know a repeated row.

    Holds eight bytes per epoch until the trial is forgotten, and no row.
    """

    def __init__(self) -> None:
        self._seen: dict[str, dict[tuple[Any, ...], bytes]] = {}
        self._differing: dict[str, int] = {}

    def check(self, row: Mapping[str, Any]) -> Verdict:
        """Say whether a row is new, repeats an earlier one, or ought to but differs; and remember it.

        The first start of a trial is new and any later one a repeat. An epoch, or a mark at one rung, repeats
        when all that is not measured is equal to the last of its kind. All other rows are new.
        """
        key = _key(row)
        if key is None:
            return "new"
        seen = self._seen.setdefault(row["trial"], {})
        digest = _digest(row)
        before = seen.get(key)
        seen[key] = digest
        if before is None:
            return "new"
        if before == digest:
            return "repeat"
        self._differing[row["trial"]] = self.differing(row["trial"]) + 1
        return "differs"

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remember the recorded rows of trials that are to go on."""
        for row in rows:
            self.check(row)

    def differing(self, trial: str) -> int:
        """How many rows of a trial differed from those they ought to repeat."""
        return self._differing.get(trial, 0)

    def forget(self, trial: str) -> None:
        """Let go of a trial that has ended."""
        self._seen.pop(trial, None)
        self._differing.pop(trial, None)


def difference(rows: Iterable[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """What a row that differs has otherwise than the one it ought to repeat, the last such among `rows`."""
    key = _key(row)
    same = [other for other in rows if _key(other) == key]
    if not same:
        return "nothing to compare with"
    before, after = _told(same[-1]), _told(row)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a row is the only one of in its trial, but for repeats; None for a row that nothing repeats."""
    match row.get("kind"):
        case "start":
            return ("start",)
        case "epoch":
            return (row["stage"], row["epoch"])
        case "mark":
            return ("mark", row["rung"])
    return None


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a repeated row must have again: no times, no measurements; None for a number that is not finite.

    The later starts of a trial may tell of another host, or of what population-based training changed.
    """
    match row["kind"]:
        case "epoch":
            values = {name: value for name, value in row["metrics"].items() if not is_measured(name)}
            values |= {name: row.get(name) for name in ("part", "genotype")}
        case "mark":
            values = {name: row.get(name) for name in ("probability", "goes_on", "audit")}
        case _:
            values = {}
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_told(row), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
