"""The records of a study: JSON lines while trials run, Parquet tables to analyse.

A study folder holds `study.json` and one `trials/<trial id>.jsonl` per trial, which are the truth; `tables/`
is built from them and can be built again. Every other file of this package reads `Tables` and nothing else.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nas.genotype import Genotype

SCHEMA = 1
"""Version of the rows and tables; a change that old readers would misread increments it."""

STATUSES = ("completed", "pruned", "failed", "oom", "diverged", "pending")
"""What became of a trial; `pending` means that it has started and not ended."""

END_METRICS = (
    "test_error",
    "test_loss",
    "valid_error",
    "params_m",
    "madds_m",
    "skips",
    "skips_reduce",
    "search_seconds",
    "retrain_seconds",
    "search_saved_mb",
    "peak_memory_mb",
)
"""End metrics that are columns of every trials table, if need be empty; others follow as they occur."""

MEASURED = re.compile(r"(^|_)(seconds|time|memory_mb|latency_ms|images_per_second)$")
"""Metrics that a clock or a meter gives: they differ between equal runs."""

COLUMNS = {
    "trials": (
        *("trial_id", "search_id", "arm", "name", "status", "reason", "attempts", "started", "ended"),
        *("completion_probability", "marks", "audit", "genotype", "genotype_key"),
        *("test_error", "valid_error", "params_m", "madds_m"),
    ),
    "epochs": ("trial_id", "stage", "epoch", "key", "value"),
    "genotypes": ("trial_id", "stage", "epoch", "genotype", "key"),
}
"""The tables that are read, and the columns that the analysis cannot do without."""

_PROTOCOL = re.compile(r"config\.(retrain|data)\..*|split_seed|data_sha256")
_NO_EFFECT = {"workers", "download", "root", "stream", "compile", "checkpoint_cells"}

Row = dict[str, Any]

_TAIL = 2**16
"""Bytes of a file's end in which its last line is looked for."""

_ROW_FIELDS = {
    "start": {"trial", "attempt", "time", "name", "arm", "axes", "config"},
    "epoch": {"trial", "attempt", "time", "stage", "part", "epoch", "metrics", "genotype"},
    "mark": {"trial", "attempt", "time", "rung", "probability", "goes_on", "audit"},
    "note": {"trial", "attempt", "time", "text"},
    "end": {"trial", "attempt", "time", "status", "reason", "genotype", "metrics"},
}
_STUDY_FIELDS = {"schema", "study_id", "name", "question", "axis", "reference", "baseline", "arms"}


@dataclass(frozen=True)
class Tables:
    """The records of one study, ready to analyse; data frames are not to be changed in place."""

    study: dict[str, Any]
    """Content of `study.json`: name, question, arms, reference, baseline, provenance."""

    trials: pd.DataFrame
    """One row per trial: axes, seeds, the machine it ran on, config, status and end metrics.

    `completion_probability` is that with which it was to get its final error, over its `marks`, the rungs at
    which a rule would have stopped it; a trial of the `audit` subset no rule could stop. These are what
    `analysis.pruning.association` takes as `probability` and `audit`.
    """

    epochs: pd.DataFrame
    """One row per trial, stage, epoch and metric; `value` is NaN where the metric was null."""

    genotypes: pd.DataFrame
    """One row per epoch that has a genotype, and one of stage `final` for the genotype a trial ended with."""

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms in the order of the study; those it does not list, the baseline first, come last."""
        return _arm_order(self.study, self.trials["arm"])

    @property
    def baseline(self) -> str | None:
        """Arm of randomly drawn architectures, if the study has one."""
        name: str | None = self.study["baseline"]
        return name

    @property
    def reference(self) -> str | None:
        """Arm that the others are compared with, if the study names one."""
        name: str | None = self.study["reference"]
        return name

    def finals(self, arm: str | None = None) -> pd.DataFrame:
        """Trials (of an arm) that completed with a test error: the runs that claims rest on."""
        used = (self.trials["status"] == "completed") & self.trials["test_error"].notna()
        return self.trials[used if arm is None else used & (self.trials["arm"] == arm)]


def is_measured(metric: str) -> bool:
    """Whether a metric is of the machine rather than of the trial: it never comes out the same twice."""
    return MEASURED.search(metric) is not None


def is_protocol(column: str) -> bool:
    """Whether a column says how a final error was measured: a setting that cannot change it is left out."""
    return _PROTOCOL.fullmatch(column) is not None and column.rpartition(".")[2] not in _NO_EFFECT


# Rows


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one record as a JSON line, on disk when this returns; numbers that are not finite become null.

    Lines at the end that a crash has torn are removed first, with a warning: they would spoil the new record.

    Raises:
        OSError: the disk is full or gone; the file holds the records that it held.
        TypeError: a value is not JSON; numpy scalars are converted.
    """
    line = json.dumps(_finite(row), allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        end = _mend(file, path)
        try:
            written = file.write(line)
            if written < len(line):
                file.write(line[written:])  # says why, if it is for good
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read_rows(path: Path) -> list[Row]:
    """Records of a JSON lines file, in file order; lines at its end that a crash has torn are left out.

    A warning tells of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last record is not a JSON object; the message names file and line.
    """
    rows = []
    torn: tuple[int, ValueError] | None = None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except ValueError as error:
            torn = torn or (number, error)
            continue
        if torn is not None:
            raise ValueError(
                f"{path}, line {torn[0]} is not a record: {torn[1]}; restore the file, or delete the line"
            ) from torn[1]
        rows.append(row)
    if torn is not None:
        warnings.warn(f"{path}: left out from line {torn[0]} on, torn by a crash", stacklevel=2)
    return rows


def read_study(folder: Path) -> dict[str, Any]:
    """Content of `study.json`.

    Raises:
        FileNotFoundError: the folder holds no `study.json`.
        ValueError: it is not JSON, of another schema version, or a field is missing or of the wrong form.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a study: it holds no study.json; give the folder a study was run into"
        )
    try:
        study = _parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not a JSON object: {error}; restore it from a copy of the study"
        ) from error
    check_study(study, path)
    return study


def check_study(study: Mapping[str, Any], path: Path) -> None:
    """Refuse what `study.json`, or a copy of it elsewhere, cannot be; `path` is where it was read.

    Raises:
        ValueError: it is of another schema version, or a field is missing or of the wrong form.
    """
    if study.get("schema") != SCHEMA:
        found = study.get("schema")
        raise ValueError(
            f"{path} has schema {found!r}, not {SCHEMA}; use the version of this package that wrote it"
        )
    if missing := _STUDY_FIELDS - study.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; restore it from a copy of the study")
    arms = study["arms"]
    if (
        not isinstance(arms, list)
        or not all(isinstance(arm, str) for arm in arms)
        or len(set(arms)) < len(arms)
    ):
        raise ValueError(f"{path}: arms={arms!r} must be a list of different names")
    for role in ("reference", "baseline"):
        if study[role] is not None and not isinstance(study[role], str):
            raise ValueError(f"{path}: {role}={study[role]!r} must be the name of an arm, or null")
    if study["reference"] is not None and study["reference"] not in (*arms, study["baseline"]):
        raise ValueError(
            f"{path}: reference={study['reference']!r} is not an arm; use one of {', '.join(arms)}, or null"
        )


def _parse(text: bytes) -> Row:
    value = json.loads(text, parse_constant=lambda _: None)  # a UnicodeDecodeError is a ValueError, too
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value


def _mend(file: FileIO, path: Path) -> int:
    """Make an open file end with a whole record; returns its length."""
    size = file.seek(0, os.SEEK_END)
    window = min(size, _TAIL)
    while window:
        file.seek(size - window)
        tail = file.read()
        start = tail.rstrip(b"\n").rfind(b"\n") + 1
        if start == 0 and window < size:
            window = min(size, 2 * window)  # the last line is longer
            continue
        try:
            _parse(tail[start:])
        except ValueError:
            warnings.warn(f"{path}: removed its last line, torn by a crash", stacklevel=3)
            size -= window - start
            file.truncate(size)
            window = min(size, _TAIL)
        else:
            return size if tail.endswith(b"\n") else size + (file.write(b"\n") or 0)
    return size


def _finite(value: Any) -> Any:
    """The value in plain Python types, with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Trials, as their rows tell


@dataclass(frozen=True)
class _Trial:
    """What the rows of one trial say after retries: last start, last end, one row per epoch and rung."""

    start: Row
    started: float
    attempts: int
    epochs: list[Row]
    marks: list[Row]
    end: Row | None
    notes: list[str]
    search: str
    """The trial that searched: this one, unless genotypes are retrained apart."""
    retraining: str
    """The trial that retrained."""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], path: Path) -> "_Trial":
        _check_rows(rows, path)
        starts = [row for row in rows if row["kind"] == "start"]
        ends = [index for index, row in enumerate(rows) if row["kind"] == "end"]
        end = rows[ends[-1]] if ends else None
        # Tried again after a failure, a trial has no outcome yet; a completed one keeps its outcome.
        if end and end["status"] != "completed" and any(row["kind"] == "start" for row in rows[ends[-1] :]):
            end = None
        return cls(
            start=starts[-1],
            started=starts[0]["time"],
            attempts=len({row["attempt"] for row in rows} - {None}),
            epochs=list(
                {(row["stage"], row["epoch"]): row for row in rows if row["kind"] == "epoch"}.values()
            ),
            marks=list({row["rung"]: row for row in rows if row["kind"] == "mark"}.values()),
            end=end,
            notes=[row["text"] for row in rows if row["kind"] == "note"],
            search=path.stem,
            retraining=path.stem,
        )

    def retrained(self, other: "_Trial") -> "_Trial":
        """This search and the retraining of what it found, as if one trial had done both."""
        mine, theirs = self.start, other.start
        seed = theirs["config"]["seeds"]["retrain"]
        config = mine["config"] | {
            "retrain": theirs["config"]["retrain"],
            "seeds": mine["config"]["seeds"] | {"retrain": seed},
        }
        start = theirs | {
            "trial": f"{self.id}-{seed}",
            "name": f"{mine['name']} retrain={seed}",
            "arm": mine["arm"],
            "axes": mine["axes"],
            "config": config,
        }
        end = other.end
        if end is not None:
            found = {} if self.end is None else self.end["metrics"]
            # What the retraining says of a search is that it had none.
            told = {name: value for name, value in end["metrics"].items() if name not in found}
            own = {"retrain_seconds": end["metrics"].get("retrain_seconds")}
            memory = [each.get("peak_memory_mb") for each in (found, end["metrics"])]
            peak = max((value for value in memory if value is not None), default=None)
            end = end | {"metrics": found | told | own | {"peak_memory_mb": peak}}
        return _Trial(
            start=start,
            started=min(self.started, other.started),
            attempts=max(self.attempts, other.attempts),
            epochs=[*self.epochs, *other.epochs],
            marks=[*self.marks, *other.marks],
            end=end,
            notes=[*self.notes, *other.notes],
            search=self.id,
            retraining=other.id,
        )

    @property
    def id(self) -> str:
        return str(self.start["trial"])

    @property
    def completion_probability(self) -> float:
        """Probability with which the trial was to run to its end, as far as schedulers decide that.

        The product of those at its marks; 0 where it was stopped without one, so by a rule without chance.
        """
        stopped = self.end is not None and self.end["status"] == "pruned"
        if stopped and all(mark["goes_on"] for mark in self.marks):
            return 0.0
        return math.prod((float(mark["probability"]) for mark in self.marks), start=1.0)


def _check_rows(rows: Sequence[Row], path: Path) -> None:
    for number, row in enumerate(rows, start=1):
        where = f"{path}, record {number}"
        fields = _ROW_FIELDS.get(row.get("kind", ""))
        if fields is None:
            raise ValueError(f"{where} has kind {row.get('kind')!r}; use one of {', '.join(_ROW_FIELDS)}")
        if missing := fields - row.keys():
            raise ValueError(f"{where} ({row['kind']}) lacks {', '.join(sorted(missing))}")
        if row["trial"] != path.stem:
            raise ValueError(
                f"{where} is of trial {row['trial']!r}; a trial's records belong in {row['trial']}.jsonl"
            )
        if row["kind"] == "end" and row["status"] not in STATUSES[:-1]:
            raise ValueError(f"{where} has status {row['status']!r}; use one of {', '.join(STATUSES[:-1])}")
        if row["kind"] == "mark":
            _check_mark(row, where)
        for name, value in row.get("metrics", {}).items():
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{where}: metric {name}={value!r} is not a number; use a number or null")
        try:
            _ = None if row.get("genotype") is None else _described(row["genotype"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not any(row["kind"] == "start" for row in rows):
        raise ValueError(
            f"{path} has no start record, so its arm and config are not known; restore or delete the file"
        )


def _check_mark(row: Row, where: str) -> None:
    for name in ("goes_on", "audit"):
        if not isinstance(row[name], bool):
            raise ValueError(f"{where}: {name}={row[name]!r} must be true or false")
    for name, high in (("rung", math.inf), ("probability", 1)):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ValueError(f"{where}: {name}={value!r} must be a number in [0, {high}]")
    if row["goes_on"] != bool(row["probability"]) and row["probability"] in (0, 1):
        raise ValueError(
            f"{where}: goes_on={row['goes_on']} at probability {row['probability']} cannot be; correct one"
        )
    if row["audit"] and not row["goes_on"]:
        raise ValueError(f"{where}: a trial of the audit subset is not stopped; correct audit or goes_on")


def _read_all(folder: Path) -> dict[Path, list[Row]]:
    """Rows of all trials, by file; a file without any is left out, with a warning."""
    found = {}
    for path in sorted((folder / "trials").glob("*.jsonl")):
        if rows := read_rows(path):
            found[path] = rows
        else:
            warnings.warn(f"{path} holds no record: a crash before its first one; left out", stacklevel=3)
    return found


def _trials(study: Mapping[str, Any], rows: Mapping[Path, Sequence[Row]]) -> list[_Trial]:
    """Trials in the order of their arms."""
    trials = _joined([_Trial.from_rows(of_trial, path) for path, of_trial in rows.items()])
    order = {
        arm: index for index, arm in enumerate(_arm_order(study, (trial.start["arm"] for trial in trials)))
    }
    return sorted(trials, key=lambda trial: (order[trial.start["arm"]], trial.id))


def _joined(trials: Sequence[_Trial]) -> list[_Trial]:
    """Trials; where genotypes are retrained apart, each retraining with every search that found its own."""
    searches = [trial for trial in trials if not trial.start.get("found_by")]
    # By what was found, not by name: a search that failed first may have found it since.
    found: dict[str, list[_Trial]] = {}
    if len(searches) < len(trials):
        for search in searches:
            if search.end is not None and search.end["genotype"] is not None:
                found.setdefault(_task(search, search.end["genotype"]), []).append(search)
    joined, done = [], set()
    for trial in trials:
        if not trial.start.get("found_by"):
            continue
        finders = found.get(_task(trial, trial.start["config"]["method"]["searcher"]["genotype"]), [])
        if not finders:
            missing = ", ".join(trial.start["found_by"])
            raise ValueError(
                f"trial {trial.id} retrains what {missing} found, whose records are missing; restore them"
            )
        joined += [search.retrained(trial) for search in finders]
        done |= {search.id for search in finders}
    return [*joined, *(trial for trial in searches if trial.id not in done)]


def _task(trial: _Trial, genotype: str) -> str:
    """What there is to retrain: a network, however it is written down, on data by a recipe."""
    config = trial.start["config"]
    recipe = config["retrain"] | {"epochs": 0}  # a search alone retrains nothing
    split = config["seeds"]["split"]
    return json.dumps([_described(genotype)["key"], config["space"], config["data"], recipe, split])


def _arm_order(study: Mapping[str, Any], used: Iterable[str]) -> tuple[str, ...]:
    baseline = [] if study["baseline"] is None else [study["baseline"]]
    return tuple(dict.fromkeys([*study["arms"], *baseline, *sorted(set(used))]))


# Tables


def export(folder: Path) -> dict[str, Path]:
    """Build the tables of a study from its records; the same records give the same bytes.

    A retried trial counts once: of the rows for one stage and epoch the last is taken, as is the last end.
    A trial started again after an end other than `completed` is pending.

    Returns:
        The files by name: `trials`, `epochs`, `genotypes`, `finals`, `protocols` and `manifest`.

    Raises:
        FileNotFoundError, ValueError: as in `read_study` and `read_rows`; or a record is not as it should be.
    """
    study = read_study(folder)
    sizes = _sizes(folder)  # before they are read: what a running study adds meanwhile makes the tables stale
    tables = _tables(study, _read_all(folder))
    manifest: dict[str, Any] = {"schema": SCHEMA, "study_id": study["study_id"], "rows": {}, "sha256": {}}
    paths = {name: folder / "tables" / f"{name}.parquet" for name in tables}
    for name, table in tables.items():
        content = _parquet(table, study["study_id"])
        _replace(paths[name], content)
        manifest["rows"][name] = table.num_rows
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    manifest["records"] = sizes
    paths["manifest"] = folder / "tables" / "manifest.json"
    _replace(paths["manifest"], json.dumps(manifest, indent=2).encode() + b"\n")
    return paths


def tables_of(study: Mapping[str, Any], rows: Mapping[Path, Sequence[Row]]) -> Tables:
    """The tables that `export` would write of the rows of trials, by paths that end in their ids.

    Rows of other places than files may have null for what is not known there: `attempt` or `part`.
    """
    tables = _tables(study, rows)
    return Tables(dict(study), *(_frame(tables[name]) for name in COLUMNS))


def _tables(study: Mapping[str, Any], rows: Mapping[Path, Sequence[Row]]) -> dict[str, pa.Table]:
    trials = _trials(study, rows)
    protocols = {trial.id: _protocol(study, trial) for trial in trials}
    return {
        "trials": _trials_table(study, trials, protocols),
        "epochs": _epochs_table(trials),
        "genotypes": _genotypes_table(trials),
        "finals": _finals_table(trials, protocols),
        "protocols": _protocols_table(protocols.values()),
    }


def stale(folder: Path) -> bool:
    """Whether a study has records that its tables were not built from; tables without records never are.

    Raises:
        ValueError: as in `read_manifest`.
    """
    sizes = _sizes(folder)
    if not sizes or not (folder / "tables" / "manifest.json").is_file():
        return bool(sizes)
    return bool(read_manifest(folder).get("records") != sizes)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every trial's file, which records only ever grow."""
    return {path.name: path.stat().st_size for path in sorted((folder / "trials").glob("*.jsonl"))}


def read_tables(folder: Path) -> Tables:
    """The exported tables of a study.

    Raises:
        FileNotFoundError: the study has no tables yet, or one is missing.
        ValueError: the tables are of another schema version or study, not those that the manifest describes,
            or lack a column of `COLUMNS`.
    """
    study = read_study(folder)
    manifest, again = read_manifest(folder), _again(folder)
    if manifest["study_id"] != study["study_id"]:
        raise ValueError(
            f"{folder / 'tables' / 'manifest.json'} is of study {manifest['study_id']}, and study.json of "
            f"{study['study_id']}: tables of another study lie here; {again}"
        )
    frames = []
    for name, columns in COLUMNS.items():
        path = folder / "tables" / f"{name}.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {again}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{path} is not the file its manifest describes; {again}")
        try:
            table = pq.read_table(pa.BufferReader(content))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet table: {error}; {again}") from error
        if missing := [column for column in columns if column not in table.column_names]:
            raise ValueError(f"{path} lacks the column {', '.join(missing)}; {again}")
        frames.append(_frame(table))
    return Tables(study, *frames)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the tables of a study are: `study_id`, and by name their `rows` and `sha256`.

    `records` are the bytes of the trials' files that they were built from, by name.

    Raises:
        FileNotFoundError: the study has no tables yet.
        ValueError: it is not JSON, of another schema version, or does not describe every table of `COLUMNS`.
    """
    path, again = folder / "tables" / "manifest.json", _again(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tables yet; `python -m analysis report {folder} --out DIR` builds them, once a "
            "trial has begun"
        )
    try:
        manifest = _parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}; {again}") from error
    if manifest.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}; {again}"
        )
    missing = {"study_id", "sha256"} - manifest.keys() or COLUMNS.keys() - set(manifest["sha256"])
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; {again}")
    return manifest


def _again(folder: Path) -> str:
    """The way out of tables that cannot be used."""
    if not _sizes(folder):
        return f"restore {folder / 'tables'} from a copy, or the records in trials/ that it is built from"
    return f"remove {folder / 'tables'}: `python -m analysis report {folder} --out DIR` builds it anew"


def _trials_table(
    study: Mapping[str, Any], trials: Sequence[_Trial], protocols: Mapping[str, Row]
) -> pa.Table:
    axes = _columns(
        "axes.", [{key: _scalar(value) for key, value in t.start["axes"].items()} for t in trials]
    )
    config = _columns("", [dict(_flat(trial.start["config"], "config")) for trial in trials])
    seeds = _columns("", [_seeds(trial.start["config"]) for trial in trials])
    hosts = _columns("host.", [trial.start.get("host") or {} for trial in trials])
    ends: list[Row] = [trial.end or {} for trial in trials]
    texts = [end.get("genotype") for end in ends]
    columns = {
        "study_id": _strings(study["study_id"] for _ in trials),
        "trial_id": _strings(trial.id for trial in trials),
        "search_id": _strings(trial.search for trial in trials),
        "retraining_id": _strings(trial.retraining for trial in trials),
        "protocol_id": _strings(protocols[trial.id]["protocol_id"] for trial in trials),
        "arm": _strings(trial.start["arm"] for trial in trials),
        "name": _strings(trial.start["name"] for trial in trials),
        **{name: _typed(values) for name, values in axes.items()},
        **{name: _typed(values) for name, values in seeds.items()},
        **{name: _typed(values) for name, values in hosts.items()},
        "status": _strings(end.get("status", "pending") for end in ends),
        "reason": _strings(end.get("reason") for end in ends),
        "attempts": pa.array([trial.attempts for trial in trials], pa.int64()),
        "notes": _strings("; ".join(trial.notes) or None for trial in trials),
        "completion_probability": _floats(trial.completion_probability for trial in trials),
        # Rung 0 only says that a trial is of the audit subset.
        "marks": pa.array([sum(mark["rung"] > 0 for mark in trial.marks) for trial in trials], pa.int64()),
        "audit": pa.array([any(mark["audit"] for mark in trial.marks) for trial in trials], pa.bool_()),
        "started": _times(trial.started for trial in trials),
        "ended": _times(end.get("time") for end in ends),
        "genotype": _strings(texts),
        "genotype_key": _strings(None if text is None else _described(text)["key"] for text in texts),
    }
    metrics = [end.get("metrics", {}) for end in ends]
    for name in (*END_METRICS, *sorted({name for row in metrics for name in row} - set(END_METRICS))):
        if name in columns:
            raise ValueError(
                f"the end metric {name!r} has the name of another column of trials; rename the metric"
            )
        columns[name] = _floats(row.get(name) for row in metrics)
    return pa.table(columns | {name: _typed(values) for name, values in config.items()})


def _epochs_table(trials: Sequence[_Trial]) -> pa.Table:
    rows: list[tuple[Any, ...]] = []
    for trial in sorted(trials, key=lambda trial: trial.id):
        of_trial = [
            (trial.id, row["attempt"], row["stage"], row["part"], row["epoch"], key, value, row["time"])
            for row in trial.epochs
            for key, value in row["metrics"].items()
        ]
        rows += sorted(of_trial, key=lambda row: (row[2], row[5], row[4]))
    trial_id, attempt, stage, part, epoch, key, value, time = zip(*rows, strict=True) if rows else [()] * 8
    # Dictionaries only now that the rows are in order: Arrow does not sort dictionary columns.
    return pa.table(
        {
            "trial_id": _strings(trial_id).dictionary_encode(),
            "attempt_id": _strings(attempt).dictionary_encode(),
            "stage": _strings(stage).dictionary_encode(),
            "part": pa.array(part, pa.int64()),
            "epoch": pa.array(epoch, pa.int64()),
            "key": _strings(key).dictionary_encode(),
            "value": _floats(value),
            "timestamp": _times(time),
        }
    )


def final_genotypes(genotypes: Mapping[str, str]) -> pd.DataFrame:
    """The genotypes table of trials of which no more than what they ended with is known, by trial."""
    last = {"stage": "final", "epoch": None, "params_m": None, "madds_m": None}
    return _frame(
        _genotypes([{"trial_id": trial} | last | _described(text) for trial, text in genotypes.items()])
    )


def _genotypes_table(trials: Sequence[_Trial]) -> pa.Table:
    rows: list[Row] = []
    for trial in sorted(trials, key=lambda trial: trial.id):
        by_epoch = sorted(trial.epochs, key=lambda row: (row["stage"], row["epoch"]))
        for row in [*by_epoch, *([trial.end | {"stage": "final"}] if trial.end else [])]:
            if row["genotype"] is not None:
                found = {name: row.get(name) for name in ("stage", "epoch")}
                prices = {name: row["metrics"].get(name) for name in ("params_m", "madds_m")}
                rows.append({"trial_id": trial.id} | found | _described(row["genotype"]) | prices)
    return _genotypes(rows)


def _genotypes(rows: Sequence[Row]) -> pa.Table:
    types = dict.fromkeys(("trial_id", "stage", "genotype", "key"), pa.string()) | {"epoch": pa.int64()}
    counts = [f"{name}_{cell}" for name in ("skips", "depth", "width") for cell in ("normal", "reduce")]
    types |= dict.fromkeys(counts, pa.int64()) | dict.fromkeys(("params_m", "madds_m"), pa.float64())
    order = ["trial_id", "stage", "epoch", "genotype", "key", *counts, "params_m", "madds_m"]
    return pa.table({name: pa.array([row[name] for row in rows], types[name]) for name in order})


def _finals_table(trials: Sequence[_Trial], protocols: Mapping[str, Row]) -> pa.Table:
    """One row per final training: the test error after its last epoch, and the size of the network."""
    ends = [
        (trial, trial.end["metrics"])
        for trial in trials
        if trial.end is not None
        and trial.end["status"] == "completed"
        and trial.end["metrics"].get("test_error") is not None
    ]
    seeds = [_seeds(trial.start["config"]).get("retrain_seed") for trial, _ in ends]
    return pa.table(
        {
            "trial_id": _strings(trial.id for trial, _ in ends),
            "retrain_seed": _typed(seeds),
            "protocol_id": _strings(protocols[trial.id]["protocol_id"] for trial, _ in ends),
            **{
                name: _floats(end.get(name) for _, end in ends)
                for name in ("test_error", "params_m", "madds_m")
            },
        }
    )


def _protocols_table(protocols: Iterable[Row]) -> pa.Table:
    """One row per protocol, one column per setting; protocols come by their ids."""
    found = {row["protocol_id"]: row for row in protocols}
    columns = _columns("", [found[name] for name in sorted(found)])
    return pa.table(
        {"protocol_id": _strings(columns.pop("protocol_id", []))}
        | {name: _typed(columns[name]) for name in sorted(columns)}
    )


def _protocol(study: Mapping[str, Any], trial: _Trial) -> Row:
    """How a trial's final error is measured, by column, and its `protocol_id`: 12 hex digits of the rest."""
    config = trial.start["config"]
    origin = study.get("provenance") or {}
    told = dict(_flat(config, "config")) | _seeds(config) | {"data_sha256": origin.get("data_sha256")}
    settings = {name: value for name, value in told.items() if is_protocol(name)}
    text = json.dumps(settings, sort_keys=True)
    return {"protocol_id": hashlib.sha256(text.encode()).hexdigest()[:12]} | settings


@lru_cache(maxsize=4096)
def _described(text: str) -> Row:
    """The columns that a genotype determines; `width` counts the edges that leave the cell's two inputs."""
    genotype = Genotype.parse(text)
    cells = {"normal": genotype.normal, "reduce": genotype.reduce}
    return {
        "genotype": json.dumps(genotype.to_json(), separators=(",", ":")),
        "key": genotype.key,
        **{f"skips_{name}": cell.skips for name, cell in cells.items()},
        **{f"depth_{name}": cell.depth for name, cell in cells.items()},
        **{f"width_{name}": cell.input_edges for name, cell in cells.items()},
    }


def _seeds(config: Row) -> Row:
    """Seeds of a trial by the name of their column: `split_seed`, `search_seed` and `retrain_seed`."""
    return {f"{name}_seed": value for name, value in config.get("seeds", {}).items()}


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Leaves of nested config as (`config.search.0.epochs`, value); an empty dict or list is a leaf."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _flat(item, f"{name}.{key}")
    else:
        yield name, _scalar(value)


def _scalar(value: object) -> object:
    return json.dumps(value) if isinstance(value, dict | list) else value


# Columns


def _columns(prefix: str, rows: Sequence[Row]) -> dict[str, list[object]]:
    """Rows as columns, in order of first appearance, with None where a row has no such field."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {prefix + name: [row.get(name) for row in rows] for name in names}


def _typed(values: Sequence[object]) -> pa.Array:
    """Column of the one type that the values share; values of mixed types become strings."""
    types = {type(value) for value in values if value is not None}
    if not types:
        return pa.nulls(len(values))
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):  # type: ignore[operator]
        return pa.array(values, pa.int64())
    if types in ({float}, {int, float}):
        return _floats(values)
    return _strings(
        value if value is None or isinstance(value, str) else json.dumps(value) for value in values
    )


def _strings(values: Iterable[object]) -> pa.Array:
    return pa.array(list(values), pa.string())


def _floats(values: Iterable[Any]) -> pa.Array:
    return pa.array([None if value is None else float(value) for value in values], pa.float64())


def _times(values: Iterable[float | None]) -> pa.Array:
    """Unix times in seconds as timestamps in UTC."""
    microseconds = [None if value is None else round(value * 1e6) for value in values]
    return pa.array(microseconds, pa.timestamp("us", tz="UTC"))


# Files


def _parquet(table: pa.Table, study_id: str) -> bytes:
    sink = pa.BufferOutputStream()
    metadata = {"nas.schema": str(SCHEMA), "nas.study_id": study_id}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Data frame of a table; integers and truth values with gaps become pandas Int64 and boolean."""
    frame: pd.DataFrame = table.to_pandas()
    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    for field in table.schema:
        column = table[field.name]
        if column.null_count and field.type in nullable:
            frame[field.name] = column.to_pandas(types_mapper=nullable.get)
    return frame
