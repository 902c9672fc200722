"""Loaders: from our own tables, an MLflow store, or published ground truth to one `Sample`.

A loader refuses what it does not recognise; nothing is guessed from the order of columns or rows, and pickles
are read by an unpickler that can build plain data only.
"""

import hashlib
import io
import json
import math
import pickle
import sqlite3
from collections import namedtuple
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import records
from analysis.records import Tables
from analysis.summary import by_search, differing
from nas.genotype import Genotype

# Names of end metrics that are results of retraining, and columns that describe a trial.
_RESULTS = ("test_", "valid_", "train_", "retrain_", "best_")
_BOOKKEEPING = ("_status", "_sd", "_low", "_high", "_seconds", "stop_epoch", "stop_back_to")
"""How names of columns end that describe a measurement, its cost or its spread, and measure nothing else."""

_NOT_METRICS = {"attempts", "completion_probability", "marks", "audit", "search_id", "retraining_id"}


@dataclass(frozen=True, eq=False)
class Sample:
    """Runs or architectures with their final errors, from whichever source; frames are not to be changed."""

    tables: Tables
    kind: Literal["study", "ground truth"]

    measured: str
    """What the test error of one row of the source is, in words."""

    metrics: pd.DataFrame
    """What may predict the error: one column per metric, on the index of `tables.trials`."""

    finals: pd.DataFrame
    """Every final training: `trial_id`, `retrain_seed`, `test_error`."""

    sources: Mapping[str, str]
    """SHA-256 of the files read, by name."""

    n_rows: int
    """Rows of the source, copies of one result included."""

    notes: tuple[str, ...] = ()
    """What a reader must know of the source."""

    drawings: tuple[Path, ...] = ()
    """Drawings of cells as SVG that lie in the folder of the study, one per arm."""

    protocols: Mapping[str, Sequence[str]] | None = None
    """Columns in which the rows' protocols differ, with their values; None if there is one protocol."""

    retrainings: int = 1
    """Most retrainings of one search, of which `test_error` is the mean."""

    @property
    def endpoint(self) -> str:
        """What `test_error` is, in words."""
        several = f", mean of up to {self.retrainings} retrainings" if self.retrainings > 1 else ""
        return self.measured + several

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial or architecture."""
        return self.tables.trials

    @property
    def error(self) -> "pd.Series[float]":
        """Final error of each row, NaN where it has none."""
        used = self.trials["status"] == "completed"
        return self.trials["test_error"].where(used).astype(float)

    @property
    def seeds(self) -> dict[str, list[int]]:
        """Seeds that the trials took, by the name of their column; of retraining, those of every training."""
        columns = {
            name: self.trials[name]
            for name in map(str, self.trials.columns)
            if name.endswith("_seed") and "." not in name
        }
        if "retrain_seed" in columns and len(self.finals):
            columns["retrain_seed"] = self.finals["retrain_seed"]
        return {
            name: sorted(int(value) for value in values.dropna().unique()) for name, values in columns.items()
        }

    @property
    def units(self) -> "pd.Series[Any]":
        """Independent unit of each row: its network where known, since several runs may find the same one."""
        known = self.trials["genotype_key"]
        return known.where(known.notna(), self.trials["trial_id"]).astype(object)


def load(path: Path, *, study: str | None = None, sha256: str | None = None) -> Sample:
    """Sample of a study folder, an MLflow store (`.db`), NAS-Bench-Macro (`.json`), or curves (`.npy`).

    Args:
        path: what to read; learning curves are a folder with one `.npy` and one list of genotypes.
        study: id or name of the study, where an MLflow store holds several.
        sha256: of the file, refused if it differs.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is none of these, its hash is another, its content is not as it should be, or `study`
            or `sha256` does not apply to it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a study folder or a file of ground truth")
    if study is not None and not is_store(path):
        raise ValueError(
            f"--study {study} chooses from an MLflow store (.db), which {path} is not; leave it out"
        )
    if path.is_dir() and (path / "study.json").is_file():
        if sha256 is not None:
            raise ValueError(
                f"--sha256 is of one file, and {path} is a folder; leave it out: tables are checked against "
                "the hashes in tables/manifest.json, which a report names under sources"
            )
        return from_study(path)
    if path.is_dir():
        arrays = sorted(path.glob("*.npy"))
        if len(arrays) != 1:
            raise ValueError(
                f"{path} holds no study.json, and {len(arrays)} .npy files; give a study folder, or one with "
                "one array of learning curves and one list of genotypes"
            )
        return from_curves(arrays[0], sha256=sha256)
    if is_store(path):
        return from_mlflow(path, study, sha256=sha256)
    readers = {".json": from_nas_bench_macro, ".npy": from_curves}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: nothing known ends in {path.suffix!r}; give a study folder, an MLflow store (.db), "
            "NAS-Bench-Macro (.json) or learning curves (.npy)"
        )
    return readers[path.suffix](path, sha256=sha256)


def is_store(path: Path) -> bool:
    """Whether a path is that of an MLflow store, by its name."""
    return path.suffix in (".db", ".sqlite", ".sqlite3")


# Studies


def from_study(folder: Path) -> Sample:
    """Sample of a study folder; its tables are built from the records where they are not those of now.

    Raises:
        FileNotFoundError: no trial has been recorded.
        ValueError: records or tables are not as they should be, or the tables are old and cannot be replaced.
    """
    if records.stale(folder):
        try:
            records.export(folder)
        except OSError as error:
            raise ValueError(
                f"{folder} has records that its tables were not built from, and its tables cannot be written "
                f"({error}); copy the folder to where you may write, and give the copy"
            ) from error
    tables = records.read_tables(folder)
    digests = records.read_manifest(folder)["sha256"]
    sources = {f"tables/{name}.parquet": digests[name] for name in sorted(records.COLUMNS)}
    sources["study.json"] = _digest(folder / "study.json")
    drawings = tuple(sorted((folder / "figures" / "cells").glob("*.svg")))
    return replace(of_tables(tables, sources), drawings=drawings)


def of_tables(tables: Tables, sources: Mapping[str, str]) -> Sample:
    """Sample of the tables of a study."""
    n_rows = len(tables.trials)
    protocols = differing(tables.finals())
    finals = _finals(tables)
    tables = by_search(tables)
    return Sample(
        tables=tables,
        kind="study",
        measured="test error after the last epoch of retraining",
        metrics=search_metrics(tables),
        finals=finals,
        sources=sources,
        n_rows=n_rows,
        protocols=protocols,
        retrainings=int(finals["trial_id"].value_counts().max()) if len(finals) else 1,
    )


def _finals(tables: Tables) -> pd.DataFrame:
    """Every final training of a study, under the row that `by_search` keeps of its search."""
    used = tables.finals()
    seeds = used["retrain_seed"] if "retrain_seed" in used else pd.Series(0, index=used.index)
    kept = by_search(tables).trials.set_index("search_id")["trial_id"]
    rows = used["search_id"].map(kept.to_dict())
    found = pd.DataFrame({"trial_id": rows, "retrain_seed": seeds, "test_error": used["test_error"]})
    return found.reset_index(drop=True)


def search_metrics(tables: Tables) -> pd.DataFrame:
    """What was recorded of each trial before its retraining: end metrics, else the last epoch of its search.

    A metric that is null or absent in the last epoch is missing: no earlier epoch stands in for it. Neither
    status, spread and seconds of single measurements, nor the epoch of a stop, are metrics. Only searches
    that ended count: the last epoch of one that was cut short is not its result.
    """
    trials = tables.trials
    fixed = {"trial_id", "arm", "name", "status", "reason", "genotype", "genotype_key", "study_id"}
    names = [
        name
        for name in trials.columns
        if name not in fixed | _NOT_METRICS
        and "." not in name
        and not name.endswith("_seed")
        and not name.startswith(_RESULTS)
        and pd.api.types.is_numeric_dtype(trials[name])
    ]
    found = trials[names].astype(float)
    epochs = tables.epochs
    if len(epochs):
        retrained = epochs.loc[epochs["stage"] == "retrain", "trial_id"].unique()
        search = epochs[(epochs["stage"] == "search") & epochs["trial_id"].isin(retrained)]
        search = search.astype({"trial_id": str, "key": str})
        last = search["epoch"] == search.groupby("trial_id")["epoch"].transform("max")
        wide = search[last].pivot(index="trial_id", columns="key", values="value")
        by_key = search.groupby(["trial_id", "key"])["value"]
        sums, peaks = by_key.sum(min_count=1).unstack("key"), by_key.max().unstack("key")
        for name in sums.columns:  # what adds up over epochs, and what is a peak
            if name == "seconds" or name.endswith("_mb"):
                wide[name] = (sums if name == "seconds" else peaks)[name]
        wide = wide.reindex(trials["trial_id"]).set_axis(trials.index)
        # The end row of a completed trial has all its end metrics: what is null there was not measured.
        open_ended = trials["status"] != "completed"
        for key in map(str, wide.columns):
            # The peak of a trial is that of its search or its retraining.
            name = key if key in found.columns and not key.endswith("_mb") else f"search_{key}"
            column = wide[key].astype(float)
            found[name] = (
                found[name].mask(open_ended & found[name].isna(), column) if name in found else column
            )
    told = [str(name) for name in found if name == "search_seconds" or not str(name).endswith(_BOOKKEEPING)]
    return found[sorted(name for name in told if found[name].notna().any())]


# MLflow


def from_mlflow(path: Path, study: str | None = None, *, sha256: str | None = None) -> Sample:
    """Sample of a study in an MLflow store on SQLite, read by plain SQL and without writing to it.

    It is that of the study's folder, but for what the store does not have: genotypes of single epochs, their
    metrics that were null, drawings. Of an epoch that was run again it has the first seconds, not the last.

    Raises:
        ValueError: it is no such store, has another hash, holds no study, or several and `study` names none
            of them; or it was filled by an earlier version.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_hash(path, digest, sha256)
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
        try:
            parent, tags = _mlflow_study(store, path, study)
            about = _record(tags, "study", path)
            rows = _mlflow_rows(store, path, parent)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not an MLflow store: {error}") from error
    records.check_study(about, path)
    if not rows:
        raise ValueError(f"{path}: study {about['study_id']} has no trial in this store; {_SYNC}")
    return of_tables(records.tables_of(about, rows), {path.name: digest})


def _mlflow_study(store: sqlite3.Connection, path: Path, study: str | None) -> tuple[str, dict[str, str]]:
    """Parent run and its tags."""
    query = (
        "SELECT t.run_uuid, t.key, t.value FROM tags t JOIN tags k ON k.run_uuid = t.run_uuid "
        "JOIN runs r ON r.run_uuid = t.run_uuid "
        "WHERE k.key = 'kind' AND k.value = 'study' AND r.lifecycle_stage = 'active'"
    )
    parents: dict[str, dict[str, str]] = {}
    for run, key, value in store.execute(query):
        parents.setdefault(run, {})[key] = value
    wanted = {
        run: tags
        for run, tags in parents.items()
        if study is None or study in (tags.get("study_id"), tags.get("name"))
    }
    if len(wanted) != 1:
        known = ", ".join(sorted(f"{tags.get('study_id')} ({tags.get('name')})" for tags in parents.values()))
        raise ValueError(
            f"{path} holds {len(wanted)} studies called {study!r}; name one by its id: "
            f"{known or 'it has none'}"
            if study
            else f"{path} holds {len(parents)} studies; name one by its id with --study: {known or 'none'}"
        )
    return next(iter(wanted.items()))


def _mlflow_rows(store: sqlite3.Connection, path: Path, parent: str) -> dict[Path, list[records.Row]]:
    """Rows of all trials of a study, as their files have them, without what the store was not told."""
    children = (
        "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ? AND run_uuid IN "
        "(SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active')"
    )
    tags: dict[str, dict[str, str]] = {}
    for run, key, value in store.execute(
        f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN ({children})", (parent,)
    ):
        tags.setdefault(run, {})[key] = value
    epochs: dict[str, dict[tuple[str, int], records.Row]] = {run: {} for run in tags}
    for run, key, step, timestamp, value in store.execute(
        "SELECT run_uuid, key, step, timestamp, value FROM metrics "
        "WHERE (key LIKE 'search/%' OR key LIKE 'retrain/%') AND is_nan = 0 "
        f"AND run_uuid IN ({children}) ORDER BY timestamp",
        (parent,),
    ):
        stage, _, name = key.partition("/")
        row = epochs[run].setdefault((stage, step), {"metrics": {}})
        row["time"] = timestamp / 1000
        row["metrics"][name] = value  # of an epoch that was run again, the last
    found: dict[Path, list[records.Row]] = {}
    for run, told in tags.items():
        if told.get("kind") != "trial" or "status" not in told:
            continue  # not a trial, or one of which nothing has been said yet
        start = _record(told, "start", path)
        place = path / str(start["trial"])
        if place in found:
            raise ValueError(f"{path} holds two runs of trial {place.name}; a sync of its study removes one")
        found[place] = _mlflow_trial(told, start, epochs[run], path)
    return dict(sorted(found.items()))


def _mlflow_trial(
    tags: Mapping[str, str],
    start: records.Row,
    epochs: Mapping[tuple[str, int], records.Row],
    path: Path,
) -> list[records.Row]:
    """Rows of one trial."""
    common = {"trial": start["trial"], "attempt": None}
    rows = []
    for line in tags.get("attempts", "").splitlines():
        attempt, _, time = line.partition(" ")
        rows.append(start | {"attempt": attempt, "time": float(time)})
    for (stage, epoch), row in epochs.items():
        unknown = {"part": None, "genotype": None}
        rows.append(common | {"kind": "epoch", "stage": stage, "epoch": epoch} | unknown | row)
    marks = [name for name in sorted(tags) if name.startswith("record.mark.") and "/" not in name]
    rows += [_record(tags, name.removeprefix("record."), path) for name in marks]
    for line in tags.get("notes", "").splitlines():
        text = line.rpartition(" (")[0] or line  # the time follows in brackets
        rows.append(common | {"kind": "note", "time": start["time"], "text": text})
    return rows + ([_record(tags, "end", path)] if "record.end" in tags else [])


_SYNC = "send it again: python -m experiments.tracking sync DIR --tracking-uri URI"


def _record(tags: Mapping[str, str], name: str, path: Path) -> dict[str, Any]:
    """What a run's tags `record.NAME`, `record.NAME/1` and so on hold, as JSON in parts.

    Raises:
        ValueError: it has none, or not a whole one.
    """
    text, number = tags.get(f"record.{name}", ""), 1
    while (more := tags.get(f"record.{name}/{number}")) is not None:
        text, number = text + more, number + 1
    what = f"the {name} of trial {tags['trial_id']}" if "trial_id" in tags else "study.json"
    if not text:
        raise ValueError(f"{path} has no record of {what}: an earlier version filled it; {_SYNC}")
    try:
        value, _ = json.JSONDecoder().raw_decode(text)  # what follows is left of a longer one
    except ValueError as error:
        raise ValueError(f"{path}: the record of {what} is torn: {error}; {_SYNC}") from error
    return dict(value)


# Ground truth


_STAGES = (2, 3, 3)
"""Layers of the stages of NAS-Bench-Macro; the first of each changes the resolution."""


def from_nas_bench_macro(path: Path, *, sha256: str | None = None) -> Sample:
    """Every architecture of NAS-Bench-Macro, one row per different network.

    Keys whose identities stand elsewhere in a stage are one network and repeat one result; one of each is
    kept. Groups (`arm`) are the numbers of layers that are not identities.

    Source: Su et al. (2021), github xiusu/NAS-Bench-Macro; the accuracy is the best over epochs on the
    test set, in percent, of three trainings.
    """
    content = _read(path, sha256)
    try:
        entries = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; give the benchmark's own file") from error
    _check_macro(entries, path)
    keep: dict[str, str] = {}
    for key in sorted(entries):
        first = keep.setdefault(canonical_macro(key), key)
        if entries[first]["test_acc"] != entries[key]["test_acc"]:
            raise ValueError(f"{path}: {first} and {key} are one network with two results; restore the file")
    rows, finals = [], []
    for network, key in keep.items():
        entry, codes = entries[key], [int(digit) for digit in key]
        errors = [1 - accuracy / 100 for accuracy in entry["test_acc"]]
        blocks = sum(code > 0 for code in codes)
        rows.append(
            {
                "study_id": "nas-bench-macro",
                "trial_id": key,
                "arm": f"{blocks} blocks",
                "name": key,
                "status": "completed",
                "reason": None,
                "attempts": 1,
                "genotype": None,
                "genotype_key": network,
                "test_error": float(np.mean(errors)),
                "params_m": entry["params"] / 1e6,
                "madds_m": entry["flops"] / 1e6,
                "blocks": float(blocks),
                "large_blocks": float(sum(code == 2 for code in codes)),
                **{
                    f"blocks_stage_{index + 1}": float(sum(code > 0 for code in codes[at : at + size]))
                    for index, (at, size) in enumerate(zip((0, 2, 5), _STAGES, strict=True))
                },
            }
        )
        finals += [
            {"trial_id": key, "retrain_seed": seed, "test_error": error} for seed, error in enumerate(errors)
        ]
    trials = pd.DataFrame(rows)
    trials = trials.sort_values(["blocks", "trial_id"], kind="stable").reset_index(drop=True)
    question = "Which simple measures of an architecture predict its error in NAS-Bench-Macro?"
    tables = _ground_tables("nas-bench-macro", question, trials, hashlib.sha256(content).hexdigest())
    metrics = [name for name in trials.columns if name.startswith(("params", "madds", "blocks", "large"))]
    return Sample(
        tables=tables,
        kind="ground truth",
        measured="mean test error of three trainings, each the best over its epochs, hence optimistic",
        metrics=trials[metrics].astype(float),
        finals=pd.DataFrame(finals),
        sources={path.name: hashlib.sha256(content).hexdigest()},
        n_rows=len(entries),
        notes=(
            f"{len(entries):,} keys are {len(keep):,} different networks; copies of one result are left out.",
            "Arms are groups of networks with the same number of layers that are not identities.",
            "The accuracy recorded is the best over epochs on the test set: it selects on what it measures.",
        ),
    )


def _check_macro(entries: object, path: Path) -> None:
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} is not NAS-Bench-Macro: it holds no object of architectures")
    for key, entry in entries.items():
        if len(key) != sum(_STAGES) or set(key) - set("012"):
            raise ValueError(f"{path}: key {key!r} is not eight digits of 0, 1 and 2")
        if not isinstance(entry, dict) or (missing := {"test_acc", "params", "flops"} - entry.keys()):
            lacks = ", ".join(sorted(missing)) if isinstance(entry, dict) else "its fields"
            raise ValueError(f"{path}: architecture {key} lacks {lacks}")
        accuracies = entry["test_acc"]
        if (
            not isinstance(accuracies, list)
            or len(accuracies) != 3
            or not all(isinstance(value, int | float) and 0 <= value <= 100 for value in accuracies)
        ):
            raise ValueError(f"{path}: test_acc of {key} is not three percentages: {accuracies!r}")
        for name in ("params", "flops"):
            value = entry[name]
            # NaN is neither above 0 nor below infinity.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(
                    f"{path}: {name} of {key} is {value!r}, and must be a number above 0; restore the file"
                )


def canonical_macro(key: str) -> str:
    """Canonical key of NAS-Bench-Macro: after the first layer of a stage, identities go to its end."""
    parts, at = [], 0
    for size in _STAGES:
        first, rest = key[at], key[at + 1 : at + size]
        parts.append(first + rest.replace("0", "").ljust(size - 1, "0"))
        at += size
    return "".join(parts)


def from_curves(path: Path, *, sha256: str | None = None) -> Sample:
    """Learning curves: test accuracy in percent, (networks, epochs), and a list of the networks' genotypes.

    The list lies beside the array as `.json`, `.txt` (one genotype a line) or pickle (`.pkl`, `.pickle`); its
    items are genotypes as text, alone or with the best accuracy.

    Source of the form: Yang et al. (2020), the NAS-Benchmark of 214 networks.
    """
    content = _read(path, sha256)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a plain .npy array: {error}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or min(array.shape) < 2:
        raise ValueError(f"{path} has shape {array.shape} of {array.dtype}; give floats, (networks, epochs)")
    curves = array.astype(np.float64)
    if not np.isfinite(curves).all() or curves.min() < 0 or curves.max() > 100 or curves.max() <= 1:
        raise ValueError(
            f"{path} holds values from {curves.min():g} to {curves.max():g}; give accuracy in percent"
        )
    lists = sorted(p for p in path.parent.iterdir() if p.suffix in (".json", ".txt", ".pkl", ".pickle"))
    if len(lists) != 1:
        raise ValueError(
            f"{path.parent} holds {len(lists)} lists of genotypes; put one .json, .txt or .pkl there"
        )
    genotypes, best = _genotypes(lists[0])
    if len(genotypes) != len(curves):
        raise ValueError(f"{lists[0].name} names {len(genotypes)} genotypes for {len(curves)} curves")
    notes = ["Arms are groups of networks with the same number of skips in the normal cell."]
    notes += ["Test accuracy was recorded at every epoch; the endpoint is the last epoch, not the best one."]
    wrong = int((np.abs(np.array(best) - curves.max(axis=1)) > 0.005).sum()) if best else 0
    if wrong:
        notes.append(f"{wrong} best accuracies of the list are not those of the curves: check their order.")
    return _curve_sample(path, content, lists[0], curves, genotypes, tuple(notes))


def _curve_sample(
    path: Path,
    content: bytes,
    listed: Path,
    curves: NDArray[np.float64],
    genotypes: Sequence[Genotype],
    notes: tuple[str, ...],
) -> Sample:
    ids = [f"{index:04d}" for index in range(len(curves))]
    error = 1 - curves / 100
    trials = pd.DataFrame(
        {
            "study_id": path.stem,
            "trial_id": ids,
            "arm": [f"{genotype.normal.skips} skips" for genotype in genotypes],
            "name": ids,
            "status": "completed",
            "reason": None,
            "attempts": 1,
            "genotype": [str(genotype) for genotype in genotypes],
            "genotype_key": [genotype.key for genotype in genotypes],
            "test_error": error[:, -1],
            "best_test_error": error.min(axis=1),
            "retrain_seed": 0,
        }
    )
    metrics = pd.DataFrame(
        {
            f"{what}_{name}": [float(getattr(getattr(genotype, name), what)) for genotype in genotypes]
            for what in ("skips", "depth", "input_edges")
            for name in ("normal", "reduce")
        }
    )
    epochs = curves.shape[1]
    for share in (0.05, 0.1, 0.25, 0.5):
        at = max(math.ceil(share * epochs), 1) - 1
        if at < epochs - 1:
            metrics[f"error_at_epoch_{at + 1}"] = error[:, at]
    order = trials.sort_values(["arm", "trial_id"], kind="stable").index
    long = pd.DataFrame(
        {
            "trial_id": np.repeat(ids, epochs),
            "stage": "retrain",
            "epoch": np.tile(np.arange(epochs), len(ids)),
            "key": "test_error",
            "value": error.reshape(-1),
        }
    )
    digest = hashlib.sha256(content).hexdigest()
    trials, metrics = trials.loc[order].reset_index(drop=True), metrics.loc[order].reset_index(drop=True)
    tables = _ground_tables(
        path.stem, "How early do learning curves tell the final error?", trials, digest, long
    )
    return Sample(
        tables=tables,
        kind="ground truth",
        measured="test error after the last epoch",
        metrics=metrics[[name for name in metrics if metrics[name].nunique() > 1]],
        finals=trials[["trial_id", "retrain_seed", "test_error"]],
        sources={path.name: digest, listed.name: _digest(listed)},
        n_rows=len(trials),
        notes=notes,
    )


def _ground_tables(
    name: str, question: str, trials: pd.DataFrame, digest: str, epochs: pd.DataFrame | None = None
) -> Tables:
    study: dict[str, Any] = {
        "schema": records.SCHEMA,
        "study_id": digest[:12],
        "name": name,
        "question": question,
        "axis": None,
        "reference": None,
        "baseline": None,
        "arms": list(dict.fromkeys(trials["arm"])),
        "provenance": {"data_name": name, "data_sha256": digest},
    }
    trials = trials.assign(**dict.fromkeys(("started", "ended"), pd.Series(pd.NaT, index=trials.index)))
    empty = pd.DataFrame(columns=["trial_id", "stage", "epoch", "key", "value"])
    known = trials.dropna(subset=["genotype"])
    genotypes = records.final_genotypes(dict(zip(known["trial_id"], known["genotype"], strict=True)))
    return Tables(study, trials, empty if epochs is None else epochs, genotypes)


# Files


_Genotype = namedtuple("_Genotype", "normal normal_concat reduce reduce_concat")

_HARMLESS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Unpickler of plain data: numbers, text, lists, numpy arrays, and genotypes as named tuples."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "Genotype":
            return _Genotype
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def unpickle(path: Path) -> Any:
    """Content of a pickle of plain data.

    Raises:
        ValueError: the file is no pickle, or asks for anything but plain data.
    """
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{path} is refused: {error}; save the list as JSON or text instead") from error


def _genotypes(path: Path) -> tuple[list[Genotype], list[float]]:
    """Genotypes of a list, and their best accuracies where it has them."""
    if path.suffix == ".txt":
        items: Any = [line for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix == ".json":
        items = json.loads(path.read_text())
    else:
        items = unpickle(path)
    if not isinstance(items, list | tuple):
        raise ValueError(f"{path} holds {type(items).__name__}; give a list of genotypes")
    found, best = [], []
    for index, item in enumerate(items):
        pair = item if isinstance(item, list | tuple) and not isinstance(item, _Genotype) else (item,)
        text = str(pair[0]).replace("_Genotype(", "Genotype(") if len(pair) else ""
        try:
            found.append(Genotype.parse(text))
        except ValueError as error:
            raise ValueError(f"{path}, item {index}: {error}") from error
        if len(pair) > 1:
            best.append(float(pair[1]))
    return found, best if len(best) == len(found) else []


def _read(path: Path, sha256: str | None) -> bytes:
    content = path.read_bytes()
    _check_hash(path, hashlib.sha256(content).hexdigest(), sha256)
    return content


def _check_hash(path: Path, digest: str, wanted: str | None) -> None:
    if wanted is not None and digest != wanted.lower():
        raise ValueError(f"{path} has sha256 {digest}, not {wanted}; it is not the file that was meant")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
