"""Where two runs part: the first step, by stage and epoch, at which their records differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import records
from analysis.resample import count

_STAGES = {"search": 0, "retrain": 1}
_START = (0, 0, 0)
_MOST_SHOWN = 12

_COMPARED = {
    "start": ("name", "arm", "config"),
    "epoch": ("stage", "epoch", "metrics", "genotype"),
    "end": ("status", "metrics", "genotype"),
    "mark": (),
    "note": (),
}
"""Fields of the records that are compared, by kind; marks and notes say nothing that a step does not."""


@dataclass(frozen=True)
class Divergence:
    """The first difference of two runs of one trial."""

    trial: str
    config: tuple[tuple[str, str, str], ...]
    """Fields of the configuration that differ, with both values."""

    where: str | None
    """The first step that differs, e.g. `search, epoch 3`; None if only the configuration does."""

    differences: tuple[tuple[str, str, str], ...]
    """What differs there, with both values."""

    same_steps: int
    """Steps before it, which are alike."""


@dataclass(frozen=True)
class Compared:
    """Two sets of runs held against each other, trial by trial."""

    first: tuple[Divergence, ...]
    """Of each trial that parts."""

    alike: tuple[str, ...]
    """Trials that agree from start to end."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    """Trials that the other side lacks."""

    set_aside: tuple[str, ...]
    """Measured metrics that were not compared."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.first or self.only_a or self.only_b)


def compare(a: Path, b: Path) -> Compared:
    """Two study folders, or the JSONL files of two trials, step by step.

    Trials of folders are matched by id, or by name where no id is shared; two files are taken for one trial.

    Raises:
        FileNotFoundError: a path does not exist or holds no trials.
        ValueError: one is a file and the other a folder, or a record is not as it should be.
    """
    for path, other in ((a, b), (b, a)):
        if path.is_file() and not other.exists():
            raise FileNotFoundError(f"{other} does not exist; give the JSONL file of a trial, as is {path}")
        if path.is_file() and not other.is_file():
            raise ValueError(f"{a} and {b}: give two study folders, or the JSONL files of two trials")
    if a.is_file() and b.is_file():
        pairs = {a.stem if a.stem == b.stem else f"{a.stem} and {b.stem}": (a, b)}
        only: tuple[list[str], list[str]] = ([], [])
    else:
        pairs, only = _matched(_files(a), _files(b))
    first, alike, aside = [], [], set()
    for trial, (one, other) in pairs.items():
        found, measured = _first(trial, _rows(one), _rows(other))
        aside |= measured
        if found is None:
            alike.append(trial)
        else:
            first.append(found)
    return Compared(tuple(first), tuple(alike), tuple(only[0]), tuple(only[1]), tuple(sorted(aside)))


def render(found: Compared) -> str:
    """Text of a comparison, one block per trial that parts."""
    lines = []
    for one in found.first:
        if one.config:
            lines += [f"{one.trial}: configured differently", *_listed(one.config)]
        if one.where is not None:
            steps = count(one.same_steps, "equal step")
            lines += [f"{one.trial}: differs first at {one.where}, after {steps}", *_listed(one.differences)]
        else:
            lines.append(f"{one.trial}: all {count(one.same_steps, 'step')} alike")
    if found.alike:
        lines.append(f"alike from start to end: {', '.join(found.alike)}")
    for side, trials in (("first", found.only_a), ("second", found.only_b)):
        if trials:
            lines.append(f"only in the {side}: {', '.join(trials)}")
    if found.set_aside:
        lines.append(f"measured, so not compared: {', '.join(found.set_aside)}")
    return "\n".join(lines) + "\n"


def _listed(differences: Sequence[tuple[str, str, str]]) -> list[str]:
    shown = differences[:_MOST_SHOWN]
    width = max(len(name) for name, _, _ in shown)
    more = len(differences) - len(shown)
    return [f"  {name.ljust(width)}  {a}  |  {b}" for name, a, b in shown] + (
        [f"  and {more} more"] if more else []
    )


def _rows(path: Path) -> list[records.Row]:
    """Records of a trial that have what is compared."""
    rows = records.read_rows(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, record {number}"
        if row.get("kind") not in _COMPARED:
            raise ValueError(f"{where} has kind {row.get('kind')!r}; use one of {', '.join(_COMPARED)}")
        if missing := [name for name in _COMPARED[row["kind"]] if name not in row]:
            raise ValueError(
                f"{where} ({row['kind']}) lacks {', '.join(missing)}; give the records of a trial"
            )
        if not isinstance(row.get("metrics", {}), dict):
            raise ValueError(f"{where}: metrics={row['metrics']!r} must be an object of numbers")
        if not isinstance(row.get("epoch", 0), int):
            raise ValueError(f"{where}: epoch={row['epoch']!r} must be a whole number")
    if rows and not any(row["kind"] == "start" for row in rows):
        raise ValueError(f"{path} has no start record; give a trial's records")
    return rows


def _files(folder: Path) -> list[Path]:
    records.read_study(folder)
    files = sorted((folder / "trials").glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trials; give a study that has run, or two JSONL files")
    return files


def _matched(
    a: Sequence[Path], b: Sequence[Path]
) -> tuple[dict[str, tuple[Path, Path]], tuple[list[str], list[str]]]:
    by_a, by_b = ({path.stem: path for path in side} for side in (a, b))
    if not by_a.keys() & by_b.keys():
        by_a, by_b = ({_name(path): path for path in side} for side in (a, b))
    shared = [name for name in by_a if name in by_b]
    only = [name for name in by_a if name not in by_b], [name for name in by_b if name not in by_a]
    return {name: (by_a[name], by_b[name]) for name in shared}, only


def _name(path: Path) -> str:
    return next((str(row["name"]) for row in _rows(path) if row["kind"] == "start"), path.stem)


def _first(
    trial: str, a: Sequence[records.Row], b: Sequence[records.Row]
) -> tuple[Divergence | None, set[str]]:
    """First step that differs, and the measured metrics that were passed over."""
    steps_a, steps_b = dict(_steps(a)), dict(_steps(b))
    every = [*steps_a.values(), *steps_b.values()]
    aside = {name.removeprefix("metric ") for values in every for name in values if _measured(name)}
    config = _differing(steps_a.pop(_START, {}), steps_b.pop(_START, {}))
    same, found = 0, config
    for key in sorted(steps_a.keys() | steps_b.keys()):
        if key not in steps_a or key not in steps_b:
            there = ("recorded", "missing")
            found = (("step", *(there if key in steps_a else there[::-1])),)
        else:
            found = _differing(steps_a[key], steps_b[key])
        if found:
            return Divergence(trial, config, _where(key), found, same), aside
        same += 1
    return (Divergence(trial, config, None, (), same) if config else None), aside


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Names that are not measured and whose values differ, with both values."""
    return tuple(
        (name.removeprefix("metric "), _text(one, name), _text(other, name))
        for name in dict.fromkeys([*one, *other])
        if not _measured(name) and (name not in one or name not in other or one[name] != other[name])
    )


def _steps(rows: Sequence[records.Row]) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
    """Steps in order with what each holds; of a step that was tried again, the last record counts."""
    for row in rows:
        metrics = {f"metric {name}": value for name, value in row.get("metrics", {}).items()}
        if row["kind"] == "start":
            yield _START, {**dict(_flat(row["config"], "config")), "arm": row["arm"]}
        elif row["kind"] == "epoch":
            stage = _STAGES.get(row["stage"], len(_STAGES))
            yield (1, stage, row["epoch"]), metrics | {"genotype": row["genotype"]}
        elif row["kind"] == "end":
            yield (2, 0, 0), metrics | {"status": row["status"], "genotype": row["genotype"]}


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}")
    else:
        yield name, value


def _where(key: tuple[int, int, int]) -> str:
    if key[0] == 1:
        stage = {order: name for name, order in _STAGES.items()}.get(key[1], "another stage")
        return f"{stage}, epoch {key[2]}"
    return "the end"


def _measured(name: str) -> bool:
    return name.startswith("metric ") and records.is_measured(name.removeprefix("metric "))


def _text(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "missing"
