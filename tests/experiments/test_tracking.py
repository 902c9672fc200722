"""MLflow shows a study as its records tell it, whatever happens to the store meanwhile."""

import json
import logging
import math
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import loaders, report
from analysis.records import append_row
from experiments import tracking
from experiments.tracking import CURSOR, Tracker, default_uri, main, sync, ui_command
from nas.genotype import Genotype
from nas.published import PUBLISHED
from tests.analysis import conftest as made

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own imports
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Run

GENOTYPE = str(PUBLISHED["PC_DARTS_cifar"])
STUDY_ID = "0123456789ab"
NOBODY = "http://127.0.0.1:9"
STUDY: dict[str, Any] = {
    "schema": 1,
    "study_id": STUDY_ID,
    "name": "sweep_k",
    "question": "What does searching on 1/K of the channels cost?",
    "preset": "laptop",
    "created": "2026-01-02T03:04:05+00:00",
    "command": "python -m experiments.sweep_k --tracking-uri http://user:secret@host:5000",
    "axis": "K",
    "reference": "K=1",
    "baseline": None,
    "arms": ["K=1", "K=4"],
    "provenance": {
        "git_commit": "c0ffee",
        "git_dirty": True,
        "packages": {"torch": "2.14.1"},
        "gpus": [],
        "data_name": "digits",
        "data_sha256": "ab" * 32,
        "config_hash": "feedbeef",
    },
}


def trial_rows(trial: str, k: int, begin: float, status: str = "completed") -> list[dict[str, Any]]:
    config = {
        "method": {"supernet": {"partial_channels": k}},
        "search": [{"epochs": 2}, {"epochs": 1}],
        "seed": 0,
    }
    config["text"] = "x" * 7000
    common = {"trial": trial, "attempt": "a1"}
    rows: list[dict[str, Any]] = [
        {
            "kind": "start",
            "time": begin,
            "name": f"K={k} seed=0",
            "arm": f"K={k}",
            "axes": {"K": k, "edge_norm": k > 1, "depths": [5, 11, 17], "seed": 0},
            "config": config,
        }
    ]
    for number, (stage, epoch) in enumerate((("search", 0), ("search", 1), ("search", 2), ("retrain", 0))):
        metrics = {"valid_error": 0.5 / (number + 1), "beta_entropy": None}
        row = {"kind": "epoch", "time": begin + 1 + number, "stage": stage, "part": 0, "epoch": epoch}
        rows.append(row | {"metrics": metrics, "genotype": GENOTYPE})
    end = {"kind": "end", "time": begin + 9.25, "status": status, "reason": None, "genotype": GENOTYPE}
    rows.append(end | {"metrics": {"test_error": 0.1 * k, "params_m": 3.6}})
    return [common | row for row in rows]


ROWS = trial_rows("t1", 1, 1000.0) + trial_rows("t4", 4, 2000.5)


def write_study(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    """A study folder as the driver leaves it."""
    (folder / "trials").mkdir(parents=True)
    (folder / "tables").mkdir()
    (folder / "tables" / "trials.parquet").write_bytes(b"table")
    (folder / "study.json").write_text(json.dumps(STUDY))
    for row in rows:
        keep(folder, row)
    return folder


def keep(folder: Path, row: Mapping[str, Any]) -> None:
    """Record a row as the driver does."""
    append_row(folder / "trials" / f"{row['trial']}.jsonl", row)


def tell(tracker: Tracker, rows: Iterable[Mapping[str, Any]]) -> None:
    """Record rows, then let the tracker hear of them."""
    for row in rows:
        keep(tracker.folder, row)
        tracker.row(row)


def track(uri: str, folder: Path, rows: Sequence[Mapping[str, Any]], **close: Any) -> Tracker:
    """A tracker that took `rows` and was closed."""
    tracker = Tracker(uri, STUDY, folder, flush_seconds=0.05)
    tracker.open()
    tell(tracker, rows)
    tracker.close(**close)
    return tracker


# What two stores of one study may have otherwise, and why: ids that MLflow makes up, and whether files got
# through, which says something of the way to the store and nothing of the study.
VOLATILE = ("mlflow.parentRunId", "artifacts_missing")


def tables(uri: str) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of a SQLite store about `STUDY`, with trial ids in the place of MLflow's."""
    name = {"runs": "name, status, start_time, end_time", "params": "key, value", "tags": "key, value"}
    name["metrics"] = name["latest_metrics"] = "key, value, timestamp, step, is_nan"
    database = sqlite3.connect(f"file:{uri.removeprefix('sqlite:///')}?mode=ro", uri=True)
    mine = "select run_uuid from tags where key = 'study_id' and value = ?"
    found = {}
    with closing(database):
        of_run = database.execute(
            "select run_uuid, (select value from tags where key = 'trial_id' and run_uuid = runs.run_uuid)"
            f" from runs where lifecycle_stage = 'active' and run_uuid in ({mine})",
            (STUDY_ID,),
        )
        trials = {run: trial or "" for run, trial in of_run}
        for table, columns in name.items():
            rows = database.execute(f"select run_uuid, {columns} from {table}")
            kept = [(trials[run], *rest) for run, *rest in rows if run in trials]
            found[table] = sorted(row for row in kept if table != "tags" or row[1] not in VOLATILE)
    return found


def eventful_rows() -> list[dict[str, Any]]:
    """Rows of three trials: killed and resumed, left alone, moved by population-based training."""
    one, two, three = (trial_rows(trial, k, 1000.0 * k) for k, trial in enumerate(("ta", "tb", "tc"), 1))
    for row in (*one, *three):
        if row["kind"] == "epoch":
            row["metrics"] = row["metrics"] | {"seconds": 1.5}
    again = [json.loads(json.dumps(row)) | {"attempt": "a2", "time": row["time"] + 500} for row in one]
    for row in again[1:-1]:
        row["metrics"]["seconds"] = 2.5  # measured, so it is another every time
    mark = {"kind": "mark", "trial": "ta", "attempt": "a1", "time": 1200.0, "rung": 1}
    mark |= {"probability": 0.25, "goes_on": True, "audit": False}
    note = {"kind": "note", "trial": "ta", "attempt": "a2", "time": 1501.0, "text": "begins anew"}
    resumed = [
        *one[:4],
        mark,
        again[0],
        note,
        *again[2:4],
        mark | {"attempt": "a2", "time": 1600.0},
        *again[4:],
    ]
    moved = json.loads(json.dumps(three[4])) | {"attempt": "a2", "time": three[4]["time"] + 0.5}
    moved["metrics"]["valid_error"] = 0.01
    three.insert(5, moved)
    return [row for group in zip_longest(resumed, two, three) for row in group if row is not None]


def runs(uri: str, kind: str = "trial", study: str = STUDY_ID) -> list[Run]:
    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(
        client.search_runs(
            ids, f"tags.kind = '{kind}' and tags.study_id = '{study}'", order_by=["tags.trial_id"]
        )
    )


def told(uri: str, study: str = STUDY_ID) -> list[Any]:
    """All that a store says of a study's trials, without the ids it made up."""
    client = MlflowClient(uri)
    return [
        (
            (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
            run.data.params,
            {key: value for key, value in run.data.tags.items() if key != "mlflow.parentRunId"},
            {
                key: [
                    (point.step, point.timestamp, point.value)
                    for point in client.get_metric_history(run.info.run_id, key)
                ]
                for key in run.data.metrics
            },
            sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        )
        for run in runs(uri, study=study)
    ]


@pytest.fixture(scope="module", autouse=True)
def _no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with another study, to be copied: making a new one takes seconds."""
    folder = tmp_path_factory.mktemp("new") / "other"
    tracker = Tracker(default_uri(folder), STUDY | {"name": "other", "study_id": "f" * 12}, folder)
    tracker.open()
    store = folder.parent / "mlflow.db"
    assert store.stat().st_size > 0, "workers may start after open(), so the store must be there"
    tracker.close()
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("results") / "sweep_k", [])


@pytest.fixture(scope="module")
def uri(folder: Path, new_store: Path) -> str:
    """The store of the module, holding the study as it was logged live."""
    uri = default_uri(folder)
    shutil.copy(new_store, folder.parent / "mlflow.db")
    track(uri, folder, ROWS, artifacts=[folder / "tables" / "trials.parquet"], summary="| K | error |")
    return uri


def study_of(number: int) -> dict[str, Any]:
    """Another study in the same store."""
    return STUDY | {"study_id": f"{number:012x}"}


def test_search_by_axis_finds_the_trial(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = mlflow.search_runs(search_all_experiments=True, filter_string="params.K = '4'")
    assert found["tags.trial_id"].tolist() == ["t4"]
    assert found["params.edge_norm"].tolist() == ["True"]
    assert found["params.depths"].tolist() == ["[5, 11, 17]"]
    assert found["params.method.supernet.partial_channels"].tolist() == ["4"]
    assert found["params.search.1.epochs"].tolist() == ["1"]
    assert found["metrics.final/test_error"].tolist() == [0.4]


@pytest.mark.parametrize(
    ("query", "trials"),
    [
        ("metrics.`axis/K` > 1", ["t4"]),
        ("metrics.`final/test_error` < 0.2 and params.seed = '0'", ["t1"]),
        ("tags.status = 'completed' and attributes.status = 'FINISHED'", ["t1", "t4"]),
        ("attributes.run_name LIKE 'K=4%'", ["t4"]),
    ],
)
def test_filters_that_users_type(uri: str, query: str, trials: list[str]) -> None:
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'sweep_k'")
    found = client.search_runs([experiment.experiment_id], query, order_by=["tags.trial_id"])
    assert [
        run.data.tags["trial_id"] for run in found if run.data.tags["study_id"] == STUDY["study_id"]
    ] == trials


def test_trial_has_its_genotype_and_drawings(uri: str) -> None:
    run = runs(uri)[1]
    files = {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}
    assert files == {"config.json", "genotype.json", "genotype.svg", "genotype.png"}
    stored = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/genotype.json")
    assert Genotype.from_json(stored) == PUBLISHED["PC_DARTS_cifar"]
    assert run.data.tags["genotype_key"] == PUBLISHED["PC_DARTS_cifar"].key
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json") == ROWS[6]["config"]


def test_metric_history_is_that_of_the_rows(uri: str) -> None:
    history = MlflowClient(uri).get_metric_history(runs(uri)[1].info.run_id, "search/valid_error")
    assert [(point.step, point.timestamp, point.value) for point in history] == [
        (0, 2001500, 0.5),
        (1, 2002500, 0.25),
        (2, 2003500, 0.5 / 3),
    ]


def test_times_of_a_run_are_those_of_its_rows(uri: str) -> None:
    info = runs(uri)[0].info
    assert (info.start_time, info.end_time) == (1000000, 1009250)


def test_parent_tells_origin_question_and_summary(uri: str, folder: Path) -> None:
    (parent,) = runs(uri, "study")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(uri)} == {parent.info.run_id}
    tags = parent.data.tags
    assert tags["mlflow.note.content"] == f"{STUDY['question']}\n\n| K | error |"
    assert (tags["git_commit"], tags["git_dirty"], tags["packages.torch"]) == ("c0ffee", "True", "2.14.1")
    assert (tags["data_sha256"], tags["config_hash"], tags["preset"]) == ("ab" * 32, "feedbeef", "laptop")
    assert "baseline" not in tags  # null
    assert parent.inputs is not None
    assert [data.dataset.name for data in parent.inputs.dataset_inputs] == ["digits"]
    client = MlflowClient(uri)
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"tables"}
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "tables")] == [
        "tables/trials.parquet"
    ]
    assert (parent.info.status, parent.info.end_time) == ("FINISHED", 2009750)


def test_password_of_the_command_is_not_stored(uri: str) -> None:
    assert runs(uri, "study")[0].data.tags["command"].endswith("http://***@host:5000")


def test_long_param_says_that_it_is_cut(uri: str) -> None:
    value = runs(uri)[0].data.params["text"]
    assert len(value) == 6000
    assert value.endswith("... (cut; 7000 characters)")


def test_link_is_the_parents_page(uri: str, folder: Path) -> None:
    (parent,) = runs(uri, "study")
    tracker = track(uri, folder, [])
    page = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert tracker.link().partition("?")[0] == page


def test_rows_sent_again_change_nothing(uri: str, folder: Path) -> None:
    before = told(uri)
    (folder / CURSOR).unlink()
    track(uri, folder, [])
    assert told(uri) == before
    assert len(runs(uri, "study")) == 1
    assert sync(folder, uri) == len(ROWS)
    assert told(uri) == before


def test_later_attempt_of_a_trial_goes_on_in_its_run(uri: str, tmp_path: Path) -> None:
    study = study_of(1)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    first = trial_rows("t1", 1, 1000.0, status="failed")
    first[-1]["reason"] = "the node was lost"
    second = [row | {"attempt": "a2"} for row in trial_rows("t1", 1, 3000.0)]
    tell(tracker, [*first, *second[:3]])
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert (run.info.status, run.data.tags["attempt"], run.data.tags["status"]) == (
        "RUNNING",
        "a2",
        "running",
    )
    tracker = Tracker(uri, study, tmp_path)  # another process
    tracker.open()
    tell(tracker, second[3:])
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "completed")
    assert "reason" not in run.data.tags
    for key in ("axis/K", "search/valid_error", "retrain/valid_error"):
        history = MlflowClient(uri).get_metric_history(run.info.run_id, key)
        assert len({point.step for point in history}) == len(history), key
        assert max(point.timestamp for point in history) < 2000000, "the first attempt has told these already"


def test_statuses_and_values_that_are_no_numbers(uri: str, tmp_path: Path) -> None:
    study = study_of(2)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    for number, status in enumerate(("completed", "pruned", "failed", "oom", "diverged")):
        rows = trial_rows(status, 1, 1000.0 * number, status)
        rows[2]["metrics"]["valid_error"] = math.nan
        rows[3]["metrics"]["valid_error"] = math.inf
        tell(tracker, rows)
    tracker.close()
    by_status = {run.data.tags["status"]: run for run in runs(uri, study=study["study_id"])}
    assert {status: run.info.status for status, run in by_status.items()} == {
        "completed": "FINISHED",
        "pruned": "FINISHED",
        "failed": "FAILED",
        "oom": "FAILED",
        "diverged": "FAILED",
    }
    run = by_status["diverged"]
    assert "search/beta_entropy" not in run.data.metrics
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "search/valid_error")
    assert [(point.step, point.value) for point in history] == [(0, 0.5)]


def test_changed_param_is_told_and_stops_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(3)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    tell(tracker, trial_rows("t", 1, 1000.0) + trial_rows("t", 4, 2000.0))
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert run.data.params["K"] == "1"
    assert "K: '1' became '4'" in run.data.tags["param_conflicts"]
    assert run.data.metrics["final/test_error"] == 0.4
    assert "Params of K=4 seed=0 changed" in caplog.text


def test_axis_that_differs_from_a_field_of_its_name_keeps_its_name() -> None:
    assert tracking._params({"seed": 3}, {"seed": 0, "K": None}) == {
        "seed": "3",
        "config.seed": "0",
        "K": "None",
    }


def test_row_that_mlflow_refuses_does_not_hold_up_the_others(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(4)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    rows = trial_rows("t", 1, 1000.0)
    rows[1]["metrics"] = {"../x": 1.0}  # a path that MLflow refuses
    rows[2] = {"kind": "epoch", "trial": "t"}
    rows[-1]["genotype"] = "Genotype(?)"
    tell(tracker, rows)
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert run.info.status == "FINISHED"
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "search/valid_error")
    assert [point.step for point in history] == [2]
    assert run.data.metrics["final/test_error"] == 0.1
    assert caplog.text.count("MLflow refuses a row of trial t") == 3


def test_run_deleted_in_the_ui_is_begun_anew(uri: str, tmp_path: Path) -> None:
    study = study_of(5)
    rows = trial_rows("t", 1, 1000.0)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    tell(tracker, rows[:2])
    deadline = time.monotonic() + 10
    while not (found := runs(uri, study=study["study_id"])) and time.monotonic() < deadline:
        time.sleep(0.02)
    MlflowClient(uri).delete_run(found[0].info.run_id)
    tell(tracker, rows[2:])
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert run.info.run_id != found[0].info.run_id
    assert run.data.metrics["final/test_error"] == 0.1
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "search/valid_error")
    assert [point.step for point in history] == [0, 1, 2], "those told before it was deleted as well"


def test_files_that_find_no_room_do_not_hold_up_rows(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(MlflowClient, "log_artifacts", refuse)
    study = study_of(6)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    tell(tracker, trial_rows("t", 1, 1000.0))
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert run.info.status == "FINISHED"
    assert "no space left" in run.data.tags["artifacts_missing"]
    assert caplog.text.count("takes rows but not files") == 1


def test_server_that_nobody_runs_costs_no_time_and_no_row(
    uri: str, tmp_path: Path, new_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_study(tmp_path / "sweep_k", [])
    shutil.copy(new_store, tmp_path / "mlflow.db")
    address = NOBODY.replace("//", "//user:secret@")
    tracker = Tracker(address, STUDY, folder, flush_seconds=0.05)
    began = time.monotonic()
    tracker.open()
    tell(tracker, ROWS)
    assert time.monotonic() - began < 5
    assert tracker.link() == "#/experiments"
    tracker.close(artifacts=[folder / "tables"], summary="late")
    assert time.monotonic() - began < 10
    ours = caplog.messages
    assert len(ours) == 2, ours
    assert "The study goes on" in ours[0]
    assert f"python -m experiments.tracking sync {folder} --tracking-uri" in ours[1]
    assert "secret" not in caplog.text

    (folder / "summary.md").write_text(f"# {STUDY['question']}\n\nearly\n\nlate\n")
    rebuilt = default_uri(folder)
    main(["sync", str(folder)])
    assert told(rebuilt) == told(uri)
    (parent,) = runs(rebuilt, "study")
    assert parent.data.tags["mlflow.note.content"] == f"{STUDY['question']}\n\nearly\n\nlate"
    assert parent.info.status == "FINISHED"
    files = MlflowClient(rebuilt).list_artifacts(parent.info.run_id, "tables")
    assert [file.path for file in files] == ["tables/trials.parquet"]


def test_server_that_comes_back_gets_what_it_missed(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, attempts, down = tracking._Store, [], [True]

    def connect(*arguments: Any) -> tracking._Store:
        attempts.append(time.monotonic())
        if down[0]:
            raise ConnectionError("refused")
        return store(*arguments)

    monkeypatch.setattr(tracking, "_Store", connect)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", (0.1, 0.4))
    study = study_of(7)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.01)
    tracker.open()
    tell(tracker, ROWS)
    time.sleep(1.0)
    down[0] = False
    deadline = time.monotonic() + 10
    while tracker._copy.sent < len(ROWS) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tracker._copy.sent == len(ROWS)
    # At about 0, 0.1, 0.3, 0.7, 1.1 s: each pause is twice the one before, up to the longest.
    pauses = [later - sooner for sooner, later in pairwise(attempts)]
    least = (0.1, 0.2, 0.4, 0.4)[: len(pauses)]
    assert all(pause >= bound for pause, bound in zip(pauses, least, strict=True)), pauses
    assert 3 <= len(pauses) <= 4
    tracker.close()
    assert [run.data.tags["status"] for run in runs(uri, study=study["study_id"])] == [
        "completed",
        "completed",
    ]
    messages = [record.getMessage() for record in caplog.records if record.name == tracking.__name__]
    assert ["The study goes on" in messages[0], "answers again" in messages[1], len(messages)] == [
        True,
        True,
        2,
    ]


def test_damaged_end_of_a_file_that_is_cut_off_later_costs_no_row(uri: str, tmp_path: Path) -> None:
    study, rows = study_of(11), trial_rows("t", 1, 1000.0)
    for row in rows[:2]:
        keep(tmp_path, row)
    file = tmp_path / "trials" / "t.jsonl"
    with file.open("ab") as damaged:
        damaged.write(b"\x00\xff\n" * 3)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.01)
    tracker.open()
    deadline = time.monotonic() + 10
    while tracker._copy.sent < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.warns(UserWarning, match="removed"):
        tell(tracker, rows[2:])
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert (run.info.status, len(run.data.metrics)) == ("FINISHED", 6)
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "search/valid_error")
    assert [point.step for point in history] == [0, 1, 2]


def test_rows_of_a_process_that_died_are_sent_by_the_next(uri: str, tmp_path: Path) -> None:
    study = study_of(8)
    rows = trial_rows("t", 1, 1000.0)
    for row in rows[:-1]:  # recorded, and then the process was gone
        keep(tmp_path, row)
    file = tmp_path / "trials" / "t.jsonl"
    with file.open("a") as torn:
        torn.write(json.dumps(rows[-1])[:30])
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    with pytest.warns(UserWarning, match="removed"):
        tell(tracker, rows[-1:])
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert (run.info.status, len(run.data.metrics)) == ("FINISHED", 6)


class Flaky:
    """A client whose calls fail at random: before they took effect, or after it, or long before it."""

    def __init__(self, client: MlflowClient, draws: random.Random, late: list[Callable[[], object]]) -> None:
        self.client, self.draws, self.late = client, draws, late

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.client, name)

        def flaky(*arguments: Any, **options: Any) -> Any:
            fate = self.draws.random()
            if fate < 0.06:
                raise ConnectionError("no answer: nothing was done")
            if name == "create_run" and fate < 0.3:
                self.late.append(lambda: call(*arguments, **options))
                raise ConnectionError("no answer: done after it was asked for again")
            result = call(*arguments, **options)
            while name == "create_run" and self.late:
                self.late.pop()()
            if fate > 0.94:
                raise ConnectionError("no answer: done")
            return result

        return flaky


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, new_store: Path) -> tuple[Path, str]:
    """The folder of an eventful study, and the store it was logged to live, with nothing in its way."""
    folder = write_study(tmp_path_factory.mktemp("live") / "sweep_k", [])
    shutil.copy(new_store, folder.parent / "mlflow.db")
    track(default_uri(folder), folder, eventful_rows())
    return folder, default_uri(folder)


def test_epoch_that_a_resumed_trial_repeats_is_shown_once(undisturbed: tuple[Path, str]) -> None:
    metrics = tables(undisturbed[1])["metrics"]
    points = Counter((trial, key, step) for trial, key, _, _, step, _ in metrics)
    # What population-based training moved is another epoch by right.
    twice = {point for point, count in points.items() if count > 1}
    assert twice == {("tc", "retrain/valid_error", 0), ("tc", "retrain/seconds", 0)}
    times = [
        (step, timestamp)
        for trial, key, _, timestamp, step, _ in metrics
        if (trial, key) == ("ta", "search/seconds")
    ]
    assert times == [(0, 1001000), (1, 1002000), (2, 1003000)], "as first told"


def test_mark_of_a_scheduler_is_a_metric_and_a_tag_and_a_note_a_tag(undisturbed: tuple[Path, str]) -> None:
    (run,) = [run for run in runs(undisturbed[1]) if run.data.tags["trial_id"] == "ta"]
    assert run.data.metrics["completion_probability"] == 0.25
    assert run.data.tags["marks"] == "rung 1: goes on with probability 0.25"
    assert run.data.tags["notes"] == "begins anew (1970-01-01T00:25:01.000+00:00)"


def test_sync_into_an_empty_store_gives_the_tables_of_live_logging(
    undisturbed: tuple[Path, str], tmp_path: Path, new_store: Path
) -> None:
    folder, uri = undisturbed
    shutil.copy(new_store, tmp_path / "mlflow.db")
    rebuilt = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sync(folder, rebuilt)
    assert tables(rebuilt) == tables(uri)
    assert len(tables(uri)["runs"]) == 4


@pytest.mark.parametrize("seed", range(5))
def test_every_row_arrives_once_whatever_fails(
    seed: int, undisturbed: tuple[Path, str], tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, late = random.Random(seed), list[Callable[[], object]]()
    monkeypatch.setattr(mlflow, "MlflowClient", lambda *a, **k: Flaky(MlflowClient(*a, **k), draws, late))
    folder = write_study(tmp_path / "sweep_k", [])
    shutil.copy(new_store, tmp_path / "mlflow.db")
    uri, cursor, cursors = default_uri(folder), folder / CURSOR, [b""]

    def start() -> Tracker:
        tracker = Tracker(uri, STUDY, folder)
        tracker._open = True  # without the thread, so that a seed is one order of events
        return tracker

    tracker = start()
    for row in eventful_rows():
        if draws.random() < 0.15:  # the driver is killed, while it writes
            file = folder / "trials" / f"{row['trial']}.jsonl"
            line = json.dumps(row).encode() + b"\n"
            file.parent.mkdir(exist_ok=True)
            with file.open("ab") as torn:
                torn.write(line[: draws.randrange(len(line) - 1)])
            held = cursors[draws.randrange(len(cursors))]  # what was on disk of it by then, whole or torn
            cursors = [held[: draws.choice((len(held), draws.randrange(len(held) + 1)))]]
            cursor.write_bytes(cursors[0])
            tracker = start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the torn line
            tell(tracker, [row])
        if draws.random() < 0.4:
            tracker._send()
            cursors += [cursor.read_bytes()] if cursor.exists() else []
    tries = 1
    while not tracker._send(((), "")) and tries < 500:
        tries += 1
    assert tables(uri) == tables(undisturbed[1]), f"after {tries} tries"


def test_row_returns_while_the_store_does_not_answer(
    tmp_path: Path, new_store: Path, undisturbed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    flush = tracking._Store._flush

    def hang(*arguments: Any) -> None:
        asked.set()
        assert answer.wait(60)
        flush(*arguments)

    monkeypatch.setattr(tracking._Store, "_flush", hang)
    folder = write_study(tmp_path / "sweep_k", [])
    shutil.copy(new_store, tmp_path / "mlflow.db")
    tracker = Tracker(default_uri(folder), STUDY, folder, flush_seconds=0.01)
    tracker.open()
    first, *others = eventful_rows()
    tell(tracker, [first])
    assert asked.wait(60)
    tell(tracker, others)
    assert tracker._copy.sent == 0, "the store has not answered yet, and row() has returned every time"
    answer.set()
    tracker.close()
    assert tables(default_uri(folder)) == tables(undisturbed[1])


def test_pictures_wait_while_another_thread_draws_and_rows_do_not(uri: str, tmp_path: Path) -> None:
    tracking._drawings.cache_clear()
    study = study_of(10)
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.01)
    tracker.open()
    with tracking.DRAWING:
        tell(tracker, trial_rows("t", 1, 1000.0))
        deadline = time.monotonic() + 10
        while not (found := runs(uri, study=study["study_id"])) or found[0].info.status == "RUNNING":
            assert time.monotonic() < deadline
        client = MlflowClient(uri)
        assert {file.path for file in client.list_artifacts(found[0].info.run_id)} == {"config.json"}
    tracker.close()
    assert "genotype.png" in {file.path for file in client.list_artifacts(found[0].info.run_id)}


def test_row_of_an_unknown_kind_is_left_out_and_told_once(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(9)
    rows = trial_rows("t", 1, 1000.0)
    rows[2:2] = [{"kind": "pause", "trial": "t", "time": 1.0}] * 2
    tracker = Tracker(uri, study, tmp_path, flush_seconds=0.05)
    tracker.open()
    tell(tracker, rows)
    tracker.close()
    (run,) = runs(uri, study=study["study_id"])
    assert (run.info.status, len(run.data.metrics)) == ("FINISHED", 6)
    assert caplog.messages == ["MLflow is not shown rows of the unknown kind 'pause'"]


def test_sync_that_was_interrupted_goes_on(
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    new_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_study(tmp_path / "sweep_k", eventful_rows())
    shutil.copy(new_store, tmp_path / "mlflow.db")
    monkeypatch.setattr(tracking, "SAY_SECONDS", 0.0)
    bring = tracking._Copy.bring

    def interrupted(copy: tracking._Copy, trial: str) -> None:
        if trial == "tb":
            raise KeyboardInterrupt
        bring(copy, trial)

    with monkeypatch.context() as patch:
        patch.setattr(tracking._Copy, "bring", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on from here"):
            main(["sync", str(folder)])
    assert capsys.readouterr().out.startswith("1 of 3 trials, ")
    main(["sync", str(folder)])
    assert "1 of 2 trials, 6 rows" in capsys.readouterr().out
    assert tables(default_uri(folder)) == tables(undisturbed[1])
    main(["sync", str(folder)])
    assert "3 of 3 trials" in capsys.readouterr().out, "a whole one begins anew"
    assert tables(default_uri(folder)) == tables(undisturbed[1])


def test_store_whose_making_is_interrupted_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow makes the tables of a new store one by one, and cannot go on with one that has some of them."""

    class Interrupted:
        def __init__(self, tracking_uri: str) -> None:
            self.file = Path(tracking_uri.removeprefix("sqlite:///"))

        def search_experiments(self, max_results: int) -> None:
            self.file.write_bytes(b"half a store")
            raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "MlflowClient", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracking._create(tmp_path / "mlflow.db")
    assert not list(tmp_path.iterdir())


def test_row_needs_an_open_tracker(tmp_path: Path) -> None:
    tracker = Tracker(NOBODY, STUDY, tmp_path)
    with pytest.raises(RuntimeError, match=r"call open\(\)"):
        tracker.row(ROWS[0])


def test_sync_of_a_study_that_did_not_end_leaves_it_running(
    tmp_path: Path, new_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "sweep_k", ROWS[:-1])
    shutil.copy(new_store, tmp_path / "mlflow.db")
    with (folder / "trials" / "t4.jsonl").open("a") as file:
        file.write('{"kind": "end", "tri')
    main(["sync", str(folder)])
    uri = default_uri(folder)
    assert "11 rows of" in capsys.readouterr().out
    assert [run.info.status for run in runs(uri)] == ["FINISHED", "RUNNING"]
    assert runs(uri, "study")[0].info.status == "RUNNING"


def test_sync_tells_what_failed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no study\.json; give the folder of one study"):
        main(["sync", str(tmp_path)])


def test_store_is_beside_the_folder_and_shown_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert default_uri(tmp_path / "study") == uri
    monkeypatch.chdir(tmp_path)
    assert ui_command("sqlite:///mlflow.db") == ui_command(uri)
    assert ui_command(uri, "#/experiments/1/runs/r").endswith(
        f"--backend-store-uri {uri}  # then open http://127.0.0.1:5000/#/experiments/1/runs/r"
    )
    assert ui_command("http://user:pass@host:5000/", "#/x") == "http://***@host:5000/#/x"
    assert "pass" not in ui_command("postgresql://user:pass@host/db")


def test_import_pulls_in_neither_mlflow_nor_ray_nor_torch() -> None:
    script = (
        "import experiments.tracking, os, sys;"
        "print([name for name in ('mlflow', 'ray', 'torch') if name in sys.modules],"
        "os.environ['MLFLOW_HTTP_REQUEST_MAX_RETRIES'])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "0"], "a repeated request could create a run twice"


# What the analysis reads of a store


def one_phase(folder: Path) -> Path:
    """A study with all that a trial can come to, and a study.json with all its fields."""
    made.write_study(
        folder,
        note="learning rates are those of K=4",
        primary_metrics=["skips"],
        checklist={"1": "the code is public"},
        planned={"K=1": 2, "K=4": 5, "random": 2},
        metrics={f"metric_{number}": {"unit": "1", "about": "x" * 100} for number in range(100)},
        stopping={"scheduler": "asha", "random_completion": 0.5},
        provenance={"data_sha256": "ab" * 32, "git_dirty": False, "packages": {"torch": "2"}, "gpus": []},
    )
    for seed in range(2):
        for arm, error in (("K=1", 0.1), ("K=4", 0.12), ("random", 0.2)):
            made.write_trial(folder, arm, seed, error + 0.01 * seed)
    for seed, status in enumerate(("oom", "pending", "pruned"), start=2):
        made.write_trial(folder, "K=4", seed, None, status)
    for trial, rung, goes_on in (("K4-0", 1, True), ("K4-0", 2.5, True), ("K4-4", 1, False)):
        chance = {"probability": 1 / 3, "goes_on": goes_on, "audit": False}
        mark = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 140.0, "rung": rung}
        made.write_rows(folder, [mark | chance])
    audit = {"kind": "mark", "trial": "K1-0", "attempt": "a0", "time": 140.0, "rung": 1, "audit": True}
    note = {"kind": "note", "trial": "K4-3", "attempt": "a0", "time": 150.25, "text": "not saved (full)"}
    host = {"host": {"node": "n1", "device": "cpu", "threads": 2, "memory_mb": None}}
    again = made.start("K4-2", seed=2, attempt="b1", time=300.125) | host
    rows = [audit | {"probability": 1, "goes_on": True}, note, again]
    made.write_rows(folder, [*rows, made.end("K4-2", attempt="b1", time=400.0625)])
    return folder


def two_phases(folder: Path) -> Path:
    """Searches, two of which found one network, and retrainings of what they found; one was stopped."""
    made.write_study(folder, retrain_seeds=2)
    found = {seed: made.genotype(seed % 3) for seed in range(4)}
    for seed, text in found.items():
        row = made.start(f"search{seed}", seed=seed)
        row["config"] |= {"space": {"nodes": 4}, "data": {"source": "digits"}, "retrain": {"epochs": 0}}
        epochs = [
            made.epoch(f"search{seed}", number, {"valid_error": 0.5 / (number + 1)}) for number in (0, 1)
        ]
        measured = {"valid_error": 0.25, "search_seconds": 30.0 + seed, "skips": None}
        made.write_rows(folder, [row, *epochs, made.end(f"search{seed}", genotype=text, metrics=measured)])
    for number, text in enumerate(dict.fromkeys(found.values())):
        for seed in (0, 1):
            row = made.start(f"retrain{number}{seed}", arm="retrained", seed=seed)
            row["found_by"] = [f"search{each}" for each, other in found.items() if other == text]
            row["config"] |= {"space": {"nodes": 4}, "data": {"source": "digits"}, "retrain": {"epochs": 2}}
            row["config"]["method"] = {"searcher": {"genotype": text}}
            epochs = [made.epoch(row["trial"], 0, {"valid_error": 0.3, "seconds": 2.0}, "retrain")]
            last = made.end(row["trial"], genotype=text, test_error=0.1 + 0.03 * number + 0.01 * seed)
            if (number, seed) == (2, 1):
                last = made.end(row["trial"], "pruned", None, metrics={})
            made.write_rows(folder, [row, *epochs, last])
    return folder


@pytest.mark.parametrize("make", [one_phase, two_phases])
def test_the_analysis_reads_of_a_store_what_it_reads_of_the_folder(
    make: Callable[[Path], Path], tmp_path: Path, new_store: Path
) -> None:
    folder = make(tmp_path / "study")
    shutil.copy(new_store, tmp_path / "mlflow.db")
    sync(folder, default_uri(folder))
    before = (tmp_path / "mlflow.db").read_bytes()
    ours, theirs = loaders.load(folder), loaders.load(tmp_path / "mlflow.db", study="0123456789ab")
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert theirs.tables.study == ours.tables.study
    for name in ("trials", "metrics", "finals"):
        pd.testing.assert_frame_equal(getattr(theirs, name), getattr(ours, name))
    for name in ("kind", "endpoint", "n_rows", "notes", "protocols"):
        assert getattr(theirs, name) == getattr(ours, name), name
    key = ["trial_id", "stage", "key", "epoch"]
    curves = [
        each.tables.epochs.astype({"stage": str, "key": str, "trial_id": str}) for each in (ours, theirs)
    ]
    curves = [each[[*key, "value"]].dropna().sort_values(key, ignore_index=True) for each in curves]
    pd.testing.assert_frame_equal(curves[1], curves[0])
    last = [each.tables.genotypes.query("stage == 'final'").reset_index(drop=True) for each in (ours, theirs)]
    pd.testing.assert_frame_equal(last[1], last[0])
    if make is two_phases:
        assert set(theirs.trials["arm"]) == {"K=4"}
        assert theirs.trials["trial_id"].str.startswith("search").all()


@pytest.mark.slow
def test_the_report_of_a_store_is_that_of_the_folder(tmp_path: Path, new_store: Path) -> None:
    folder = one_phase(tmp_path / "study")
    shutil.copy(new_store, tmp_path / "mlflow.db")
    sync(folder, default_uri(folder))
    results = []
    for path, name in ((folder, "a"), (tmp_path / "mlflow.db", "b")):
        report.write(path, tmp_path / name, study=STUDY_ID if name == "b" else None)
        found = json.loads((tmp_path / name / "results.json").read_text()) | {"sources": {}}
        for arm in found["agreement"]:  # a store has no genotypes of epochs
            arm |= dict.fromkeys(("kept_from", "last_epoch", "epochs"))
        results.append(found)
    assert results[0] == results[1]


def test_runs_that_are_no_trials_are_left_out_and_trials_without_a_record_are_not(
    tmp_path: Path, new_store: Path
) -> None:
    folder = made.write_study(tmp_path / "study")
    made.write_trial(folder, "K=4", 0, 0.1)
    shutil.copy(new_store, tmp_path / "mlflow.db")
    sync(folder, default_uri(folder))
    client = MlflowClient(default_uri(folder))
    (parent,) = runs(default_uri(folder), "study")
    tags = {"mlflow.parentRunId": parent.info.run_id}
    client.create_run(parent.info.experiment_id, tags=tags, run_name="a user's own")
    # What a driver leaves that is killed between making a run and saying the first thing of it.
    begun = tags | {"kind": "trial", "study_id": STUDY_ID, "trial_id": "begun"}
    run = client.create_run(parent.info.experiment_id, tags=begun)
    store = tmp_path / "mlflow.db"
    assert len(loaders.load(store, study=STUDY_ID).trials) == 1
    client.set_tag(run.info.run_id, "status", "running")
    with pytest.raises(
        ValueError, match="no record of the start of trial begun: an earlier version filled it; se"
    ):
        loaders.load(store, study=STUDY_ID)


def test_a_record_is_whole_after_a_shorter_one_took_its_place(uri: str) -> None:
    tags = {**tracking._record("x", {"a": "y" * 30_000}), **tracking._record("x", {"b": "z" * 9_000})}
    assert sorted(tags) == ["record.x", "record.x/1", "record.x/2", "record.x/3"]
    assert loaders._record(tags, "x", Path("mlflow.db")) == {"b": "z" * 9_000}


def test_sync_attaches_the_report(tmp_path: Path, new_store: Path) -> None:
    folder = write_study(tmp_path / "sweep_k")
    (folder / "report" / "figures").mkdir(parents=True)
    (folder / "report" / "report.html").write_text("<p>")
    (folder / "report" / "figures" / "error.svg").write_text("<svg/>")
    shutil.copy(new_store, tmp_path / "mlflow.db")
    sync(folder, default_uri(folder))
    (parent,) = runs(default_uri(folder), "study")
    client = MlflowClient(default_uri(folder))
    files = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert files == {"report/report.html", "report/figures"}


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger=tracking.__name__)
