"""MLflow as a window on a study; the only file that knows MLflow.

The rows of a study's JSONL files are the truth, and this module copies them into an MLflow store to browse
and to search: one experiment per question, one parent run per study, one child run per trial. All of it can
be rebuilt from the folder of the study: `python -m experiments.tracking sync DIR`.

A store that is down costs a study nothing. The files hold every row before this module hears of it, so they
are its spool: one thread brings MLflow what the files have more than it has taken, and on trouble tries again
later from where it was. To log a study while it runs and to rebuild its store afterwards are thus one thing.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from experiments.repeats import Repeats, Verdict

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Run

# MLflow reads these when it is imported or first used, so it is imported below, inside functions. With its
# own 7 retries and 120 s a server that is down holds up one call for 4 minutes. Nor may any call be repeated
# unasked: the first may have created a run, and lost only its answer.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")

Row = Mapping[str, Any]
"""One line of a trial's JSONL file: what a trial said at its start, after an epoch or at its end."""

CURSOR = "tracking.json"
"""The file in a study's folder that tells how many bytes of each trial's file MLflow has taken.

It may be old, torn or gone: rows sent twice change nothing.
"""

RETRY_SECONDS = (30.0, 600.0)
"""The first and the longest pause after trouble; each pause is twice the one before."""

OPEN_SECONDS = 10.0
"""How long `open` waits for a server; a store on this machine is waited for until it exists."""

CLOSE_SECONDS = 60.0
"""How long `close` waits while MLflow takes nothing."""

DRAWING = threading.Lock()
"""To be held by whoever draws while a tracker is open: Matplotlib's settings belong to the process."""

SAY_SECONDS = 5.0
"""How often `sync` tells how far it is."""

FINISHED = ("completed", "pruned")
"""The statuses of a trial that MLflow shows as FINISHED; any other end is FAILED."""

_METRICS_PER_CALL, _TEXTS_PER_CALL = 1000, 100  # limits of MLflow on `log_batch`
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000  # beyond these MLflow cuts without a word
_ROWS_PER_CALL = 500

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
    and never raises for trouble with it: the trouble is logged once per outage, and the rows are sent from
    the files of their trials when the store answers again. Every row carries its own time, so sending one
    twice changes nothing.
    """

    def __init__(self, uri: str, study: Mapping[str, Any], folder: Path, flush_seconds: float = 10.0) -> None:
        if flush_seconds <= 0:
            raise ValueError(f"flush_seconds={flush_seconds} must be positive; 10 suits a study of any size")
        self.uri, self.folder, self.flush_seconds = _absolute(uri), folder.resolve(), flush_seconds
        self._copy = _Copy(self.uri, study, self.folder)
        self._lock = threading.Lock()  # of the next line, which `row` and the thread change
        self._grown: set[str] = set()  # trials whose files may hold more than was taken
        self._closing: tuple[Sequence[Path], str] | None = None
        self._pause, self._retry_at = RETRY_SECONDS[0], 0.0
        self._tried, self._wake = threading.Event(), threading.Event()
        self._open = self._done = False
        self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
        logging.getLogger("urllib3.connectionpool").addFilter(_is_not_ours)

    def open(self) -> None:
        """Find or create the experiment and the parent run; then send what an earlier process left unsent.

        A store on this machine exists when this returns, so that no two processes create it at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open = True
        self._thread.start()
        self._tried.wait(OPEN_SECONDS if _is_server(self.uri) else None)

    def row(self, row: Row) -> None:
        """Hear of a row that the file of its trial has got; it reaches MLflow in about `flush_seconds`.

        Raises:
            RuntimeError: the tracker is not open.
        """
        if not self._open:
            raise RuntimeError(
                "the tracker is not open; call open() before the first row and close() after the last"
            )
        self._grew({str(row.get("trial"))})

    def close(self, artifacts: Sequence[Path] = (), summary: str = "") -> None:
        """Send what is left, attach the files to the parent run and end it.

        `artifacts` are the tables and figures of the study, files or folders; `summary` is Markdown and
        stands under the question on the parent's page. When the store is still down, a warning tells how to
        bring it all there later.
        """
        if not self._open:
            return
        self._open = False
        self._closing = ([path.resolve() for path in artifacts], summary)
        self._wake.set()
        taken = -1
        while self._thread.is_alive() and taken != (taken := self._copy.sent):
            self._thread.join(CLOSE_SECONDS)
        if not self._done:
            command = ("python", "-m", "experiments.tracking", "sync", str(self.folder), "--tracking-uri")
            _log.warning(
                "MLflow at %s has not taken all rows of %s; its files keep them. Once it answers, run: %s",
                _masked(self.uri),
                self.folder.name,
                shlex.join((*command, _masked(self.uri))),
            )

    def link(self) -> str:
        """The study's page as the end of an MLflow address: its parent run, or all while that is unknown."""
        return self._copy.link

    def _work(self) -> None:
        while True:
            closing = self._closing  # read first: all rows of a closed tracker are then in their files
            if closing or time.monotonic() >= self._retry_at:
                self._done = self._send(closing) and closing is not None
            self._tried.set()
            if closing:
                return
            self._wake.wait(self.flush_seconds)

    def _send(self, closing: tuple[Sequence[Path], str] | None = None) -> bool:
        """Bring the store up to the files; returns whether it took everything."""
        try:
            if not self._copy.connected:
                self._copy.connect()
                self._tried.set()
                self._grew(self._copy.behind())
            with self._lock:
                grown, self._grown = self._grown, set()
            self._bring(grown)
            if closing:
                self._copy.close(*closing)
        except Exception as error:
            self._copy.disconnect()  # what is known of its runs may be half of a row; they are found again
            self._pause_after(error)
            return False
        if self._retry_at:
            _log.warning("MLflow at %s answers again and has taken all rows.", _masked(self.uri))
        self._pause, self._retry_at = RETRY_SECONDS[0], 0.0
        return True

    def _bring(self, grown: set[str]) -> None:
        if not grown:
            return
        parent = self._copy.parent
        try:
            while grown:
                trial = min(grown)
                self._copy.bring(trial)
                grown.remove(trial)
                if self._copy.parent != parent:  # the study was deleted under us, and is begun anew
                    parent = self._copy.parent
                    grown |= self._copy.behind()
        except Exception:
            self._grew(grown)
            raise
        finally:
            self._copy.save()

    def _grew(self, trials: set[str]) -> None:
        with self._lock:
            self._grown |= trials

    def _pause_after(self, error: Exception) -> None:
        if not self._retry_at:
            _log.warning(
                "MLflow at %s failed: %s. The study goes on; its files keep the rows, next try in %.0f s.",
                _masked(self.uri),
                _short(error),
                self._pause,
            )
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS[1])


class _Copy:
    """How far an MLflow store has the rows of a study's files, and the way to bring it the others.

    Any call that reaches the store raises while it is down; `disconnect`, `connect` and the same call again
    then go on where it was.
    """

    def __init__(self, uri: str, study: Mapping[str, Any], folder: Path) -> None:
        self.uri, self.study, self.folder = uri, study, folder
        self.link = "#/experiments"
        self.sent = 0
        """Rows that this process has brought, to see whether it goes forward."""
        self.parent = ""
        """Id of the study's own run in the store that has taken rows."""
        self.syncing = False
        """Whether a `sync` was begun and not finished."""
        self._store: _Store | None = None
        self._unknown: set[str] = set()
        self._files: dict[str, _File] = {}
        """Of the trials that have rows and no end yet."""
        self._taken: dict[str, int] = {}
        self._unfinished: set[str] = set()
        self._latest = 0.0
        """Time of the latest row, which ends the study."""
        self._load()

    @property
    def connected(self) -> bool:
        """Whether the store answered, and has not failed since."""
        return self._store is not None

    def connect(self) -> None:
        """Find or create the experiment and the study's own run; another store than last time has nothing."""
        self.disconnect()
        store = _Store(self.uri, self.study, self.folder, self._unknown)
        if store.parent_id != self.parent:
            self.parent, self.syncing = store.parent_id, False
            self.restart()
        self._store, self.link = store, store.link

    def disconnect(self) -> None:
        """Forget what is known of the store's runs, and rows that were read but perhaps not taken."""
        self._store = None
        self._files.clear()

    def restart(self) -> None:
        """Begin again from the first row of every trial."""
        self._taken.clear()
        self._unfinished.clear()
        self._files.clear()

    def behind(self) -> set[str]:
        """Trials whose files are not as long as what was taken of them."""
        sizes = {path.stem: path.stat().st_size for path in (self.folder / "trials").glob("*.jsonl")}
        return {trial for trial, size in sizes.items() if size != self._taken.get(trial)}

    def bring(self, trial: str) -> None:
        """Bring the rows that a trial's file has more than was taken."""
        try:
            self._bring(trial, one_by_one=False)
            return
        except Exception as error:
            if not _is_refusal(error):
                raise
        # Either one row is bad, or a run was deleted under us: begin anew, and find out row by row.
        self.connect()
        self._bring(trial, one_by_one=True)

    def _bring(self, trial: str, *, one_by_one: bool) -> None:
        path = self.folder / "trials" / f"{trial}.jsonl"
        if not path.exists():
            return
        assert self._store is not None
        file = self._files.get(trial)
        if file is None:
            taken = self._taken.get(trial, 0)
            # A run that was deleted is begun anew, with all its rows.
            file = self._files[trial] = _File(path, taken if taken and self._store.knows(trial) else 0)
            self._taken[trial] = file.position  # or half a new beginning would be taken for the whole
        for batch in file.batches():
            if one_by_one:
                self._bring_one_by_one(trial, batch)
            else:
                self._store.write(trial, batch)
            self.sent += len(batch)
            self._taken[trial] = file.position
            times = [row["time"] for _, row in batch if isinstance(row.get("time"), int | float)]
            self._latest = max(self._latest, *times) if times else self._latest
            if file.ended:
                self._unfinished.discard(trial)
            else:
                self._unfinished.add(trial)
        if file.ended:
            del self._files[trial]

    def _bring_one_by_one(self, trial: str, batch: Sequence["_Judged"]) -> None:
        assert self._store is not None
        for judged in batch:
            try:
                self._store.write(trial, [judged])
            except Exception as refusal:
                if not _is_refusal(refusal):
                    raise
                _log.warning("MLflow refuses a row of trial %s: %s", trial, _short(refusal))
                self._store.forget(trial)

    def close(self, artifacts: Sequence[Path], summary: str) -> None:
        """Attach the study's files and summary to its own run, and end it unless a trial has no end."""
        assert self._store is not None
        ended = None if self._unfinished else (self._latest or time.time())
        self._store.close(artifacts, summary, ended)

    def save(self) -> None:
        """Write down how far the store is; what cannot be written is sent again next time."""
        held = {"parent": self.parent, "syncing": self.syncing, "latest": self._latest}
        held |= {"taken": self._taken, "unfinished": sorted(self._unfinished)}
        path = self.folder / CURSOR
        try:
            path.with_suffix(".tmp").write_text(json.dumps(held), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            _log.debug("%s is not written: %s", path, _short(error))

    def _load(self) -> None:
        try:
            held = json.loads((self.folder / CURSOR).read_text(encoding="utf-8"))
            parent, syncing, latest = str(held["parent"]), bool(held["syncing"]), float(held["latest"])
            taken = {str(trial): int(size) for trial, size in held["taken"].items()}
            unfinished = set(map(str, held["unfinished"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return
        self.parent, self.syncing, self._latest = parent, syncing, latest
        self._taken, self._unfinished = taken, unfinished


class _File:
    """The rows of one trial's file from a position on, each with what `Repeats` says of it."""

    def __init__(self, path: Path, taken: int) -> None:
        self.path = path
        self.position = 0
        """Bytes read."""
        self.ended = False
        """Whether the trial has ended, and not begun again since."""
        self._repeats = Repeats()
        for _ in self._read(until=taken):
            pass
        if self.position != taken:  # not the file that was taken: its end was cut off, and it has grown since
            self.position, self.ended, self._repeats = 0, False, Repeats()

    def batches(self) -> Iterator[list["_Judged"]]:
        """The rows not read yet, some hundreds at a time."""
        rows = self._read()
        while batch := list(islice(rows, _ROWS_PER_CALL)):
            yield batch

    def _read(self, until: int | None = None) -> Iterator["_Judged"]:
        with self.path.open("rb") as file:
            file.seek(self.position)
            size, torn = 0, 0
            for line in file:
                size += len(line)
                if until is not None and self.position + size > until:
                    return
                row = _parsed(line)
                if row is None:
                    # A torn line at the end will be cut off, or is not whole yet: only a row makes it count.
                    torn += bool(line.strip())
                    continue
                if torn and until is None:
                    _log.warning("Ignored %d torn lines of %s", torn, self.path.name)
                self.position += size
                size, torn = 0, 0
                if (kind := row.get("kind")) in ("start", "epoch", "end"):  # a note may come after the end
                    self.ended = kind == "end"
                yield self._judge(row), row

    def _judge(self, row: Row) -> Verdict:
        try:
            return self._repeats.check(row)
        except (LookupError, TypeError, AttributeError):
            return "new"  # for the store to refuse


_Judged = tuple[Verdict, Row]


@dataclass
class _TrialRun:
    """A child run, and what must be known of it from row to row."""

    id: str
    name: str
    params: dict[str, str]
    stale: set[str]
    """Tags of an earlier attempt that say nothing of the next."""
    lists: dict[str, str]
    """Tags that grow: `attempts` with times, `marks` of a scheduler, `notes` on what befell the trial."""
    metrics: list["Metric"] = field(default_factory=list)
    """Not sent yet."""


class _Store:
    """The runs of one study in an MLflow store; any call raises while the store is down."""

    def __init__(self, uri: str, study: Mapping[str, Any], folder: Path, unknown: set[str]) -> None:
        from mlflow import MlflowClient  # takes seconds, and must come after the environment is set

        for noisy in ("alembic", "mlflow.store.db.utils"):  # one line per migration of a new store
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.uri, self.study, self.folder = uri, study, folder
        if (database := _database(uri)) is not None and not database.exists():
            _create(database)
        self.client = MlflowClient(tracking_uri=uri)
        self.artifacts_fail = False
        self.unknown = unknown
        """Kinds of rows that were left out and spoken of."""
        self.experiment_id = self._experiment()
        self.parent_id = self._parent()
        self.trials: dict[str, _TrialRun] = {}

    @property
    def link(self) -> str:
        # Without the query the page shows its menu for prompts and agents.
        return f"#/experiments/{self.experiment_id}/runs/{self.parent_id}?workflowType=machine_learning"

    def knows(self, trial: str) -> bool:
        """Whether there is a run of a trial."""
        return trial in self.trials or self._find("trial", trial) is not None

    def forget(self, trial: str) -> None:
        """Find the run of a trial anew when it is next needed."""
        self.trials.pop(trial, None)

    def write(self, trial: str, rows: Iterable["_Judged"]) -> None:
        """Bring rows of a trial, in order, into the store; repeats are left out."""
        actions = {"start": self._start, "epoch": self._epoch, "mark": self._mark, "note": self._note}
        actions |= {"end": self._end}
        for verdict, row in rows:
            action = actions.get(row["kind"])
            if action is not None and row["trial"] == trial:
                action(row, verdict)
            elif action is not None:
                raise ValueError(f"a row of trial {row['trial']} lies in {trial}.jsonl")
            elif str(row["kind"]) not in self.unknown:
                self.unknown.add(str(row["kind"]))
                _log.warning("MLflow is not shown rows of the unknown kind %r", row["kind"])
        if trial in self.trials:
            self._flush(self.trials[trial])

    def close(self, artifacts: Sequence[Path], summary: str, ended: float | None) -> None:
        """Attach the study's files and summary to the parent run, and end it if the study has ended."""
        for path in artifacts:
            place = path if path.is_dir() else path.parent
            inside = place.relative_to(self.folder).as_posix() if place.is_relative_to(self.folder) else "."
            self._attach(self.parent_id, path, None if inside == "." else inside)
        if summary:
            note = f"{self.study['question']}\n\n{summary}"
            self._tag(self.parent_id, {"mlflow.note.content": note})
        self._remove_doubles()
        if ended is not None:
            self.client.set_terminated(self.parent_id, "FINISHED", round(1000 * ended))

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
        told = {
            key: value
            for key, value in study.items()
            if key not in ("provenance", "study_id", "kind", "metrics")
        }
        tags = {key: value for key, value in (_flat(told) | _flat(origin)).items() if value != "None"}
        tags |= _record("study", study)
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
        found = self._single(self._search(kind, trial))
        return next(iter(found.values()), None)

    def _search(self, kind: str | None = None, trial: str | None = None) -> Iterator["Run"]:
        """Runs of the study, of one kind or one trial."""
        query = f"tags.study_id = '{self.study['study_id']}'"
        query += f" and tags.kind = '{kind}'" if kind is not None else ""
        query += f" and tags.trial_id = '{trial}'" if trial is not None else ""
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _single(self, runs: Iterable["Run"]) -> dict[tuple[str, ...], "Run"]:
        """One run of each trial, and the study's own.

        A server that hangs may create a run after its caller has given up and created another. The one that
        came late holds nothing, and is deleted.
        """
        found: dict[tuple[str, ...], Run] = {}
        for run in runs:
            key = (run.data.tags["kind"], run.data.tags.get("trial_id", ""))
            other = found.setdefault(key, run)
            if other is run:
                continue
            less, more = sorted((other, run), key=_holds)
            if not less.data.params and not less.data.metrics:
                self.client.delete_run(less.info.run_id)
            found[key] = more
        return found

    def _remove_doubles(self) -> None:
        self._single(self._search())

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
                stale=_stale(run.data.tags),
                lists={name: run.data.tags.get(name, "") for name in ("attempts", "marks", "notes")},
            )
        return self.trials[trial]

    def _start(self, row: Row, verdict: Verdict) -> None:
        run = self._trial(row)
        run.name = str(row["name"])
        self.client.update_run(run.id, status="RUNNING", name=run.name)
        self._log_params(run, _params({**row.get("params", {}), **row["axes"]}, row["config"]))
        while run.stale:
            self.client.delete_tag(run.id, run.stale.pop())
        tags = {"arm": row["arm"], "attempt": row["attempt"], "status": "running"}
        self._tag(run.id, tags | _record("start", row) | {"mlflow.parentRunId": self.parent_id})
        self._extend(run, "attempts", f"{row['attempt']} {row['time']!r}")
        if verdict == "new":
            # A filter compares metrics with < and >, params only with =.
            numbers = {name: value for name, value in row["axes"].items() if type(value) in (int, float)}
            self._collect(run, "axis/", numbers, 0, row)
        self._attach_texts(run, {"config.json": json.dumps(row["config"], indent=2).encode()})

    def _epoch(self, row: Row, verdict: Verdict) -> None:
        run = self._trial(row)
        if verdict != "repeat":
            self._collect(run, f"{row['stage']}/", row["metrics"], row["epoch"], row)

    def _mark(self, row: Row, verdict: Verdict) -> None:
        run = self._trial(row)
        if verdict == "repeat":
            return
        self._collect(run, "", {"completion_probability": row["probability"]}, round(row["rung"]), row)
        subset = ", of the audit subset" if row["audit"] else ""
        said = f"{'goes on' if row['goes_on'] else 'stops'} with probability {row['probability']:g}"
        self._extend(run, "marks", f"rung {row['rung']:g}: {said}{subset}")
        self._tag(run.id, _record(f"mark.{row['rung']}", row))

    def _note(self, row: Row, verdict: Verdict) -> None:
        self._extend(self._trial(row), "notes", f"{row['text']} ({_utc(row)})")

    def _extend(self, run: _TrialRun, name: str, text: str) -> None:
        """Add a text to a tag that lists several, unless it is there."""
        listed = run.lists[name].split("\n") if run.lists[name] else []
        if _short(text) not in listed:
            run.lists[name] = "\n".join([*listed, _short(text)])
            self._tag(run.id, {name: run.lists[name]})

    def _end(self, row: Row, verdict: Verdict) -> None:
        run = self._trial(row)
        self._collect(run, "final/", row["metrics"], 0, row)
        self._flush(run)
        tags = {"status": row["status"], "reason": row["reason"], "genotype": row["genotype"]}
        told = {key: value for key, value in tags.items() if value is not None}
        self._tag(run.id, told | _record("end", row))
        status = "FINISHED" if row["status"] in FINISHED else "FAILED"
        self.client.set_terminated(run.id, status, _milliseconds(row))
        if row["genotype"] is not None:
            self._attach_genotype(run, row["genotype"])
        del self.trials[str(row["trial"])]

    def _collect(self, run: _TrialRun, group: str, values: Mapping[str, Any], step: int, row: Row) -> None:
        from mlflow.entities import Metric

        timestamp = _milliseconds(row)
        for name, value in values.items():
            # MLflow would show NaN as the latest value, and infinity as 1.8e308.
            if value is not None and math.isfinite(value):
                run.metrics.append(Metric(_key(f"{group}{name}"), float(value), timestamp, step))
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
            self._upload(run_id, path, folder)
        except Exception as error:
            # Raises in its turn when it is the server that is gone.
            self._tag(run_id, {"artifacts_missing": f"{path.name}: {_short(error)}"})
            if self.artifacts_fail:
                return
            try:
                self._upload(run_id, path, folder)  # the server may be back just now
            except Exception as again:
                self.artifacts_fail = True
                _log.warning("MLflow at %s takes rows but not files: %s", _masked(self.uri), _short(again))
            else:
                self.client.delete_tag(run_id, "artifacts_missing")

    def _upload(self, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder)
        else:
            self.client.log_artifact(run_id, str(path), folder)


def sync(folder: Path, uri: str, say: Callable[[str], None] = lambda text: None) -> int:
    """Copy a whole study folder into an MLflow store; returns the number of rows.

    What the store holds already is not doubled; a sync that was interrupted is gone on with. For a study
    whose driver runs no more. A study with a trial that has no end is left as running. `say` hears now and
    then how far it is.

    Raises:
        FileNotFoundError: the folder is not that of a study.
        Exception: whatever MLflow raises when the store is down.
    """
    folder, uri = folder.resolve(), _absolute(uri)
    if not (folder / "study.json").exists():
        raise FileNotFoundError(f"{folder} has no study.json; give the folder of one study, in results")
    copy = _Copy(uri, json.loads((folder / "study.json").read_text(encoding="utf-8")), folder)
    copy.connect()
    if not copy.syncing:
        copy.restart()
        copy.syncing = True
    try:
        _bring_all(copy, say)
    finally:
        copy.save()
    report = folder / "summary.md"
    _, _, summary = report.read_text(encoding="utf-8").partition("\n\n") if report.exists() else ("", "", "")
    parts = [folder / name for name in ("tables", "figures", "report", "summary.md", "study.json")]
    copy.close([part for part in parts if part.exists()], summary.rstrip("\n"))
    copy.syncing = False
    copy.save()
    return copy.sent


def _bring_all(copy: _Copy, say: Callable[[str], None]) -> None:
    trials = sorted(copy.behind())
    began = said = time.monotonic()
    for done, trial in enumerate(trials, start=1):
        copy.bring(trial)
        if (now := time.monotonic()) - said > SAY_SECONDS:
            said = now
            left = (now - began) / done * (len(trials) - done)
            say(f"{done} of {len(trials)} trials, {copy.sent} rows, about {left:.0f} s left")


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
    """Pictures of a genotype by file name; none when it cannot be drawn, which must cost no trial its end."""
    try:
        from nas.draw import genotype_png, genotype_svg
        from nas.genotype import Genotype

        genotype = Genotype.parse(text)
        with DRAWING:
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
    return (_database(uri) or folder).parent / "mlartifacts"


def _database(uri: str) -> Path | None:
    """File of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:////") else None


def _create(database: Path) -> None:
    """Make a new SQLite store, all at once: one that a kill left half made would refuse all later studies."""
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    made = database.with_name(f".{database.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            try:
                os.link(made, database)
            except PermissionError:  # a file system without hard links
                made.rename(database)
    finally:
        made.unlink(missing_ok=True)


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, LookupError | TypeError | ValueError) and not isinstance(error, OSError)


def _parsed(line: bytes) -> Row | None:
    """Row of a line; None for an empty one, and for one that a crash has torn."""
    try:
        row = json.loads(line) if line.strip() else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _params(axes: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Params of a trial: its axes by the short names people search for, then every field of the config."""
    params = {_key(name): _plain(value) for name, value in axes.items()}
    for name, value in _flat(config).items():
        key = _key(name)
        params[key if params.get(key, value) == value else f"config.{key}"] = value
    return {key: _text(value, _PARAM_LENGTH) for key, value in params.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings by dotted names; a list without nested items is one leaf."""
    if isinstance(value, Mapping) and (value or not prefix):
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


def _record(name: str, value: Any) -> dict[str, str]:
    """A value as JSON in the tags `record.NAME`, `record.NAME/1` and so on, for `analysis.loaders` to read.

    Each holds as much as MLflow keeps whole. Where an earlier value was longer, its last tags stay: they come
    after the end of the JSON, where a reader stops.
    """
    text = _masked(json.dumps(value))  # with blanks between values, over which nothing is masked
    parts = [text[at : at + _TAG_LENGTH] for at in range(0, len(text), _TAG_LENGTH)]
    return {f"record.{name}" + (f"/{number}" if number else ""): part for number, part in enumerate(parts)}


def _stale(tags: Mapping[str, str]) -> set[str]:
    """Tags of a run that say nothing of a next attempt, which a trial that completed keeps its end from."""
    stale = {"reason", "artifacts_missing"}
    if tags.get("status") != "completed":
        stale |= {name for name in tags if name.partition("/")[0] == "record.end"}
    return stale & set(tags)


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


def _holds(run: "Run") -> tuple[int, int, str]:
    """How much a run holds, to compare it with its double."""
    return len(run.data.params) + len(run.data.metrics), len(run.data.tags), run.info.run_id


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


def _utc(row: Row) -> str:
    return datetime.fromtimestamp(row["time"], UTC).isoformat(timespec="milliseconds")


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
    if "://" not in uri:
        parser.error(f"--tracking-uri {uri} is no URI; use sqlite:////path/mlflow.db or http://host:5000")
    try:
        rows = sync(options.folder, uri, say=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except Exception as error:
        sys.exit(f"{_masked(uri)} is not in step with {options.folder}: {_short(error)}")
    print(f"{rows} rows of {options.folder} were sent to MLflow. To look at them: {ui_command(uri)}")


if __name__ == "__main__":
    main()
