"""MLflow as a window on a study; the only file that knows MLflow.

The rows of a study's JSONL files are the truth, and this module copies them into an MLflow store to browse
and to search: one experiment per question, one parent run per study, one child run per trial. All of it can
be rebuilt from the folder of the study: `python -m experiments.tracking sync DIR`.

A store that is down costs a study nothing. `Tracker.row` appends to a file, the spool; one thread empties the
spool into MLflow, and on trouble leaves the rows where they are and tries again later.
"""

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Run

# MLflow reads these when it is imported or first used, so it is imported below, inside functions. With its
# own 7 retries and 120 s a server that is down holds up one call for 4 minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")

Row = Mapping[str, Any]
"""One line of a trial's JSONL file: what a trial said at its start, after an epoch or at its end."""

SPOOL = "tracking_spool.jsonl"
"""The file in a study's folder that holds the rows MLflow has not taken yet."""

RETRY_SECONDS = (30.0, 600.0)
"""The first and the longest pause after trouble; each pause is twice the one before."""

OPEN_SECONDS = 10.0
"""How long `open` waits for a server; a store on this machine is waited for until it exists."""

CLOSE_SECONDS = 60.0
"""How long `close` waits for the last rows to be taken."""

FINISHED = ("completed", "pruned")
"""The statuses of a trial that MLflow shows as FINISHED; any other end is FAILED."""

_METRICS_PER_CALL, _TEXTS_PER_CALL = 1000, 100  # limits of MLflow on `log_batch`
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000  # beyond these MLflow cuts without a word
_ROWS_PER_READ = 500

# What a healthy store says of a row it will never take; anything else is trouble that passes.
_REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}

_THREAD = "tracking"

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Tracker:
    """A study's line to an MLflow store; to be used by the driver process alone.

    `study` is the content of study.json, `folder` the folder that holds it. `row` never waits for the store
    and never raises for trouble with it: the trouble is logged once per outage, the rows stay in the spool,
    and they are sent in order when the store answers again. Every row carries its own time, so sending one
    twice changes nothing.
    """

    def __init__(self, uri: str, study: Mapping[str, Any], folder: Path, flush_seconds: float = 10.0) -> None:
        if flush_seconds <= 0:
            raise ValueError(f"flush_seconds={flush_seconds} must be positive; 10 suits a study of any size")
        self.uri, self.study, self.folder = _absolute(uri), study, folder.resolve()
        self.flush_seconds = flush_seconds
        self._link = "#/experiments"
        self._store: _Store | None = None
        self._spool: BinaryIO | None = None
        self._lock = threading.Lock()  # of the spool, which `row` writes and the thread reads
        self._sent = 0  # bytes of the spool that the store has taken
        self._pause, self._retry_at = RETRY_SECONDS[0], 0.0
        self._tried, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
        logging.getLogger("urllib3.connectionpool").addFilter(_is_not_ours)

    def open(self) -> None:
        """Find or create the experiment and the parent run; send what an earlier process left in the spool.

        A store on this machine exists when this returns, so that no two processes create it at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._spool = (self.folder / SPOOL).open("a+b")
        if self._spool.tell():
            self._spool.write(b"\n")  # ends a line that a crash has torn, so that the next one is whole
        self._thread.start()
        self._tried.wait(OPEN_SECONDS if _is_server(self.uri) else None)

    def row(self, row: Row) -> None:
        """Take a start, epoch or end row of any trial; it reaches MLflow within about `flush_seconds`.

        Raises:
            RuntimeError: the tracker is not open.
        """
        if self._spool is None or self._spool.closed:
            raise RuntimeError(
                "the tracker is not open; call open() before the first row and close() after the last"
            )
        try:
            if row.get("kind") == "end" and row.get("genotype") is not None:
                _drawings(row["genotype"])  # here and not in the thread: see there
            self._append(row)
        except (OSError, TypeError, ValueError) as error:
            _log.warning("Tracking skips a row of trial %s: %s", row.get("trial"), _short(error))

    def close(self, artifacts: Sequence[Path] = (), summary: str = "") -> None:
        """Send what is left, attach the files and the text to the parent run and end it.

        `artifacts` are the tables and figures of the study, files or folders; `summary` is Markdown and
        stands under the question on the parent's page. When the store is still down, the spool stays and a
        warning tells what to do.
        """
        if self._spool is None or self._spool.closed:
            return
        paths = [str(path.resolve()) for path in artifacts]
        self.row({"kind": "close", "time": time.time(), "artifacts": paths, "summary": summary})
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or self._unsent():
            command = ("python", "-m", "experiments.tracking", "sync", str(self.folder), "--tracking-uri")
            _log.warning(
                "MLflow at %s has not taken all rows of %s; its files keep them. Once it answers, run: %s",
                _masked(self.uri),
                self.folder.name,
                shlex.join((*command, _masked(self.uri))),
            )
        else:
            (self.folder / SPOOL).unlink(missing_ok=True)
        if not self._thread.is_alive():
            self._spool.close()

    def link(self) -> str:
        """The study's page as the end of an MLflow address: its parent run, or all while that is unknown."""
        return self._link

    def _append(self, row: Row) -> None:
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            assert self._spool is not None
            self._spool.write(line)
            self._spool.flush()

    def _unsent(self) -> int:
        with self._lock:
            assert self._spool is not None
            return self._spool.seek(0, os.SEEK_END) - self._sent

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()  # read first: all rows of a closed tracker are then in the spool
            if closing or time.monotonic() >= self._retry_at:
                self._empty_spool()
            self._tried.set()
            if closing:
                return
            self._closing.wait(self.flush_seconds)

    def _empty_spool(self) -> None:
        try:
            if self._store is None:
                self._store = _Store(self.uri, self.study, self.folder)
                self._link = self._store.link
            while lines := self._lines():
                rows = [row for line in lines if (row := _parsed(line, SPOOL)) is not None]
                # The spool of an earlier process may hold the close of a study that now goes on.
                closing = self._closing.is_set()
                self._store.write([row for row in rows if closing or row.get("kind") != "close"])
                self._sent += sum(map(len, lines))
            self._link = self._store.link
            with self._lock:
                assert self._spool is not None
                if self._spool.seek(0, os.SEEK_END) == self._sent:
                    self._spool.truncate(0)
                    self._sent = 0
        except Exception as error:
            self._store = None  # it may hold half of a row; a new one finds its runs by their tags
            self._pause_after(error)
        else:
            if self._retry_at:
                _log.warning("MLflow at %s answers again and has taken all rows.", _masked(self.uri))
            self._pause, self._retry_at = RETRY_SECONDS[0], 0.0

    def _lines(self) -> list[bytes]:
        with self._lock:
            assert self._spool is not None
            self._spool.seek(self._sent)
            return list(islice(self._spool, _ROWS_PER_READ))

    def _pause_after(self, error: Exception) -> None:
        if not self._retry_at:
            _log.warning(
                "MLflow at %s failed: %s. The study goes on; its rows wait in %s, next try in %.0f s.",
                _masked(self.uri),
                _short(error),
                self.folder / SPOOL,
                self._pause,
            )
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS[1])


@dataclass
class _TrialRun:
    """A child run, and what must be known of it from row to row."""

    id: str
    name: str
    params: dict[str, str]
    nonfinite: set[str]
    """Names of the metrics that were NaN or infinite at least once."""
    stale: set[str]
    """Tags of an earlier attempt that say nothing of the next."""
    metrics: list["Metric"] = field(default_factory=list)
    """Not sent yet."""


class _Store:
    """The runs of one study in an MLflow store; any call raises while the store is down."""

    def __init__(self, uri: str, study: Mapping[str, Any], folder: Path) -> None:
        from mlflow import MlflowClient  # takes seconds, and must come after the environment is set

        for noisy in ("alembic", "mlflow.store.db.utils"):  # one line per migration of a new store
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.uri, self.study, self.folder = uri, study, folder
        self.client = MlflowClient(tracking_uri=uri)
        self.artifacts_fail = False
        self._connect()

    @property
    def link(self) -> str:
        # Without the query the page shows its menu for prompts and agents.
        return f"#/experiments/{self.experiment_id}/runs/{self.parent_id}?workflowType=machine_learning"

    def write(self, rows: Sequence[Row]) -> None:
        """Bring rows of any trials, in order, into the store; a row that it refuses is left out."""
        try:
            self._write(rows)
        except Exception as error:
            if not _is_refusal(error):
                raise
            # Either one row is bad, or a run was deleted under us: begin anew, and find out row by row.
            self._connect()
            for row in rows:
                try:
                    self._write([row])
                except Exception as refusal:
                    if not _is_refusal(refusal):
                        raise
                    _log.warning("MLflow refuses a row of trial %s: %s", row.get("trial"), _short(refusal))
                    self._connect()

    def _connect(self) -> None:
        self.experiment_id = self._experiment()
        self.parent_id = self._parent()
        self.trials: dict[str, _TrialRun] = {}

    def _write(self, rows: Iterable[Row]) -> None:
        actions = {"start": self._start, "epoch": self._epoch, "end": self._end, "close": self.close}
        for row in rows:
            action = actions.get(row["kind"])
            if action is None:
                raise ValueError(f"kind={row['kind']!r} is not a row's kind; use one of {', '.join(actions)}")
            action(row)
        for run in self.trials.values():
            self._flush(run)

    def close(self, row: Row) -> None:
        """Attach the study's files and summary to the parent run; end it unless `row` calls it unfinished."""
        for path in map(Path, row["artifacts"]):
            place = path if path.is_dir() else path.parent
            inside = place.relative_to(self.folder).as_posix() if place.is_relative_to(self.folder) else "."
            self._attach(self.parent_id, path, None if inside == "." else inside)
        if row["summary"]:
            note = f"{self.study['question']}\n\n{row['summary']}"
            self._tag(self.parent_id, {"mlflow.note.content": note})
            with tempfile.TemporaryDirectory() as scratch:
                text = Path(scratch, "summary.md")
                text.write_text(row["summary"], encoding="utf-8")
                self._attach(self.parent_id, text)
        if not row.get("unfinished"):
            self.client.set_terminated(self.parent_id, "FINISHED", _milliseconds(row))

    def _experiment(self) -> str:
        """Id of the experiment of the question, created or taken out of the bin when need be."""
        name = str(self.study["name"])
        found: Experiment | None = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        tags = {
            "mlflow.note.content": _text(self.study["question"], _TAG_LENGTH),
            "mlflow.experimentKind": "custom_model_development",  # not prompts and agents
        }
        root = _artifact_root(self.uri, self.folder)
        return str(self.client.create_experiment(name, None if root is None else root.as_uri(), tags))

    def _parent(self) -> str:
        """Id of the study's own run, with what is known of its origin as tags."""
        study, origin = self.study, self.study.get("provenance", {})
        run = self._find("study")
        if run is None:
            run = self.client.create_run(
                self.experiment_id,
                start_time=int(datetime.fromisoformat(study["created"]).timestamp() * 1000),
                tags={
                    "study_id": study["study_id"],
                    "kind": "study",
                    "mlflow.note.content": _text(study["question"], _TAG_LENGTH),
                },
                run_name=f"{study['name']} {study.get('preset', '')} {study['study_id']}",
            )
        elif run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        told = {key: value for key, value in study.items() if key not in ("provenance", "study_id", "kind")}
        tags = {key: value for key, value in (_flat(told) | _flat(origin)).items() if value != "None"}
        if "git_commit" in tags:
            tags["mlflow.source.name"] = str(study["name"])  # without a name the page shows no commit
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        self._tag(run.info.run_id, tags)
        known = run.inputs is not None and run.inputs.dataset_inputs
        if origin.get("data_sha256") and not known:
            self._log_data(run.info.run_id, str(origin.get("data_name", "data")), str(origin["data_sha256"]))
        return str(run.info.run_id)

    def _log_data(self, run_id: str, name: str, sha256: str) -> None:
        from mlflow.entities import Dataset, DatasetInput

        # MLflow allows a digest 36 characters; the tag data_sha256 has all 64.
        source = json.dumps({"sha256": sha256})
        data = Dataset(name=name, digest=sha256[:36], source_type="sha256", source=source)
        self.client.log_inputs(run_id, [DatasetInput(data)])

    def _find(self, kind: str, trial: str | None = None) -> "Run | None":
        query = f"tags.kind = '{kind}' and tags.study_id = '{self.study['study_id']}'"
        if trial is not None:
            query += f" and tags.trial_id = '{trial}'"
        hits = self.client.search_runs([self.experiment_id], query, max_results=1)
        return hits[0] if hits else None

    def _trial(self, row: Row) -> _TrialRun:
        """The run of a row's trial: known, found or created."""
        trial = str(row["trial"])
        if trial not in self.trials:
            run = self._find("trial", trial)
            if run is None:
                tags = {"kind": "trial", "study_id": self.study["study_id"], "trial_id": trial}
                tags |= {"study": self.study["name"], "mlflow.parentRunId": self.parent_id}
                name = str(row.get("name", trial))
                run = self.client.create_run(self.experiment_id, _milliseconds(row), tags, name)
            self.trials[trial] = _TrialRun(
                id=run.info.run_id,
                name=str(run.info.run_name),
                params=dict(run.data.params),
                nonfinite=set(run.data.tags.get("nonfinite", "").split()),
                stale={"reason", "artifacts_missing"} & set(run.data.tags),
            )
        return self.trials[trial]

    def _start(self, row: Row) -> None:
        run = self._trial(row)
        run.name = str(row["name"])
        self.client.update_run(run.id, status="RUNNING", name=run.name)
        self._log_params(run, _params({**row.get("params", {}), **row["axes"]}, row["config"]))
        while run.stale:
            self.client.delete_tag(run.id, run.stale.pop())
        self._tag(run.id, {"arm": row["arm"], "attempt": row["attempt"], "status": "running"})
        # A filter compares metrics with < and >, params only with =.
        numbers = {name: value for name, value in row["axes"].items() if type(value) in (int, float)}
        self._collect(run, "axis", numbers, 0, row)
        self._attach_texts(run, {"config.json": json.dumps(row["config"], indent=2).encode()})

    def _epoch(self, row: Row) -> None:
        self._collect(self._trial(row), row["stage"], row["metrics"], row["epoch"], row)

    def _end(self, row: Row) -> None:
        run = self._trial(row)
        self._collect(run, "final", row["metrics"], 0, row)
        self._flush(run)
        tags = {"status": row["status"], "reason": row["reason"], "genotype": row["genotype"]}
        self._tag(run.id, {key: value for key, value in tags.items() if value is not None})
        status = "FINISHED" if row["status"] in FINISHED else "FAILED"
        self.client.set_terminated(run.id, status, _milliseconds(row))
        if row["genotype"] is not None:
            self._attach_genotype(run, row["genotype"])
        del self.trials[str(row["trial"])]

    def _collect(self, run: _TrialRun, group: str, values: Mapping[str, Any], step: int, row: Row) -> None:
        from mlflow.entities import Metric

        timestamp = _milliseconds(row)
        for name, value in values.items():
            key = _key(f"{group}/{name}")
            if value is None:
                continue
            if math.isfinite(value):
                run.metrics.append(Metric(key, float(value), timestamp, step))
            elif key not in run.nonfinite:
                # MLflow would show NaN as the latest value, and infinity as 1.8e308.
                run.nonfinite.add(key)
                self._tag(run.id, {"nonfinite": " ".join(sorted(run.nonfinite))})
        if len(run.metrics) >= _METRICS_PER_CALL:
            self._flush(run)

    def _flush(self, run: _TrialRun) -> None:
        for part in _parts(run.metrics, _METRICS_PER_CALL):
            self.client.log_batch(run.id, metrics=part)
        run.metrics.clear()

    def _log_params(self, run: _TrialRun, params: Mapping[str, str]) -> None:
        """Log the params that are new; MLflow replaces none, so a tag tells of those that changed."""
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in run.params]
        for part in _parts(new, _TEXTS_PER_CALL):
            self.client.log_batch(run.id, params=part)
        changed = {key: value for key, value in params.items() if run.params.get(key, value) != value}
        if changed:
            told = "; ".join(f"{key}: {run.params[key]!r} became {value!r}" for key, value in changed.items())
            _log.warning("Params of %s changed; MLflow keeps the first values: %s", run.name, _short(told))
            self._tag(run.id, {"param_conflicts": told})
        run.params |= {param.key: param.value for param in new}

    def _tag(self, run_id: str, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        texts = [RunTag(_key(key), _text(value, _TAG_LENGTH)) for key, value in tags.items()]
        for part in _parts(texts, _TEXTS_PER_CALL):
            self.client.log_batch(run_id, tags=part)

    def _attach_genotype(self, run: _TrialRun, text: str) -> None:
        from nas.genotype import Genotype

        genotype = Genotype.parse(text)
        self._tag(run.id, {"genotype_key": genotype.key})
        as_json = json.dumps(genotype.to_json(), indent=2).encode()
        self._attach_texts(run, {"genotype.json": as_json, **_drawings(text)})

    def _attach_texts(self, run: _TrialRun, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in files.items():
                Path(scratch, name).write_bytes(content)
            self._attach(run.id, Path(scratch))

    def _attach(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Attach a file, or what a folder holds, to a run; when only files fail, rows are not held up."""
        try:
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)
        except Exception as error:
            # Raises in its turn when it is the server that is gone.
            self._tag(run_id, {"artifacts_missing": f"{path.name}: {_short(error)}"})
            if not self.artifacts_fail:
                _log.warning("MLflow at %s takes rows but not files: %s", _masked(self.uri), _short(error))
            self.artifacts_fail = True


def sync(folder: Path, uri: str) -> int:
    """Copy a whole study folder into an MLflow store; returns the number of rows.

    What the store holds already is not doubled. For a study whose driver runs no more: the spool is removed.
    A study with a trial that has no end is left as running.

    Raises:
        FileNotFoundError: the folder is not that of a study.
        Exception: whatever MLflow raises when the store is down.
    """
    folder, uri = folder.resolve(), _absolute(uri)
    if not (folder / "study.json").exists():
        raise FileNotFoundError(f"{folder} has no study.json; give the folder of one study, in results")
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    store = _Store(uri, study, folder)
    rows, last, unfinished = 0, 0.0, False
    for path in sorted((folder / "trials").glob("*.jsonl")):
        trial = list(_read(path))
        store.write(trial)
        rows += len(trial)
        last = max(last, *(row["time"] for row in trial)) if trial else last
        unfinished |= not trial or trial[-1]["kind"] != "end"
    close: dict[str, Any] = {"time": last or time.time(), "summary": "", "unfinished": unfinished}
    close["artifacts"] = [str(folder / part) for part in ("tables", "figures") if (folder / part).is_dir()]
    if (folder / SPOOL).exists():
        for row in _read(folder / SPOOL):
            close = dict(row) if row["kind"] == "close" else close
    store.close(close)
    (folder / SPOOL).unlink(missing_ok=True)
    return rows


def default_uri(folder: Path) -> str:
    """URI of the SQLite store beside a study's folder, which the studies of one results folder share."""
    return f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


def ui_command(uri: str, link: str = "") -> str:
    """Shell command that opens MLflow on a store; for a server, which runs already, its address.

    With the `link` of a study the command ends in a comment that tells the study's page. A password in `uri`
    is masked: put it back before use.
    """
    if _is_server(uri):
        return f"{_masked(uri).rstrip('/')}/{link}"
    # The job runner is for prompts and traces, and takes a gigabyte.
    program = f"{shlex.quote(sys.executable)} -m mlflow ui"  # no environment need be active
    command = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program} --workers 1 --port 5000"
    command += f" --backend-store-uri {shlex.quote(_masked(_absolute(uri)))}"
    return f"{command}  # then open http://127.0.0.1:5000/{link}" if link else command


@lru_cache(maxsize=64)
def _drawings(text: str) -> Mapping[str, bytes]:
    """Pictures of a genotype by file name; none when it cannot be drawn, which must not cost a trial its end.

    Matplotlib's settings belong to the process. So `Tracker.row` draws, in the thread that draws the study's
    figures, and the thread that sends finds the pictures in the cache.
    """
    try:
        from nas.draw import genotype_png, genotype_svg
        from nas.genotype import Genotype

        genotype = Genotype.parse(text)
        return {"genotype.svg": genotype_svg(genotype).encode(), "genotype.png": genotype_png(genotype)}
    except Exception as error:
        _log.warning("A genotype is not drawn: %s", _short(error))
        return {}


def _absolute(uri: str) -> str:
    """A SQLite URI that means the same file in every working directory; any other URI as it is."""
    if uri.startswith("sqlite:///") and not uri.startswith(("sqlite:////", "sqlite:///:memory:")):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def _artifact_root(uri: str, folder: Path) -> Path | None:
    """Where a new experiment keeps its files: beside the database; None where a server decides."""
    if _is_server(uri):
        return None
    if uri.startswith("sqlite:////"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        database.parent.mkdir(parents=True, exist_ok=True)
        return database.parent / "mlartifacts"
    return folder.parent / "mlartifacts"


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, LookupError | TypeError | ValueError) and not isinstance(error, OSError)


def _read(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for line in lines:
            if (row := _parsed(line, path.name)) is not None:
                yield row


def _parsed(line: bytes, where: str) -> Row | None:
    """Row of a line; None for an empty one, and for one that a crash has torn."""
    try:
        row: Row | None = json.loads(line) if line.strip() else None
    except ValueError:
        _log.warning("Ignored a torn line of %s: %.40r...", where, line)
        return None
    return row


def _params(axes: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Params of a trial: its axes by the short names people search for, then every field of the config."""
    params = {_key(name): _plain(value) for name, value in axes.items()}
    for name, value in _flat(config).items():
        key = _key(name)
        params[key if params.get(key, value) == value else f"config.{key}"] = value
    return {key: _text(value, _PARAM_LENGTH) for key, value in params.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings by dotted names; a list without nested items is one leaf."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        items = enumerate(value)
    else:
        return {prefix: _plain(value)}
    flat: dict[str, str] = {}
    for name, item in items:
        flat |= _flat(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w. /-]", "_", name)[:250]


def _text(value: object, length: int) -> str:
    """A value as a text that MLflow keeps whole: a long one is cut, and says so."""
    text = _masked(str(value))
    if len(text) <= length:
        return text
    note = f"... (cut; {len(text)} characters)"
    return text[: length - len(note)] + note


def _short(value: object) -> str:
    """What an exception or a text says, on one line and without passwords."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)
    text = " ".join(_masked(text).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Keep what other threads log of their connections; of ours one warning per outage is enough."""
    return record.threadName != _THREAD


def _masked(text: str) -> str:
    return re.sub(r"://[^\s/]*@", "://***@", text)


def _milliseconds(row: Row) -> int:
    return round(1000 * float(row["time"]))


def _parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `python -m experiments.tracking sync DIR [--tracking-uri URI]`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tracking", description="Studies in MLflow.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("sync", help="copy a study's records into a store")
    command.add_argument("folder", type=Path, metavar="DIR", help="folder of the study")
    command.add_argument("--tracking-uri", metavar="URI", help="MLflow store; default: mlflow.db beside DIR")
    options = parser.parse_args(arguments)
    uri = options.tracking_uri or default_uri(options.folder)
    try:
        rows = sync(options.folder, uri)
    except Exception as error:
        sys.exit(f"{_masked(uri)} is not in step with {options.folder}: {_short(error)}")
    print(f"{rows} rows of {options.folder} are in MLflow. To look at them: {ui_command(uri)}")


if __name__ == "__main__":
    main()
