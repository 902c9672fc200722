"""Studies whose workers and drivers are killed end with the records of one that nothing disturbed."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import records
from analysis.records import is_measured
from experiments import cluster, compare_methods, tune, worker
from experiments.packing import Share
from experiments.recorder import Progress, Recorder
from experiments.study import Planned, Policy, Resources, Settings, plan
from nas.data import load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "space.nodes": 2,
    "data.limit": 48,
    "data.test_limit": 16,
    "search.*.batch_size": 16,
    "search.*.epochs": 2,
    "search.*.frozen_epochs": 1,
    "retrain.epochs": 4,
    "retrain.batch_size": 24,
}


class Silent:
    """A tracker that nobody looks at."""

    def row(self, row: Mapping[str, Any]) -> None: ...


class Packed:
    """Two trials at once, one thread each."""

    resources = Resources(max_concurrent=2)

    def share(self, trial: object) -> Share:
        return Share(cpus=1, gpus=0, memory_mb=512)


def outcome(folder: Path) -> dict[str, bytes]:
    """What was recorded of each trial: of each epoch the last row, without what the machine has a say in."""
    told = {}
    for path in sorted((folder / "trials").glob("*.jsonl")):
        kept = {}
        for row in records.read_rows(path):
            if row["kind"] in ("epoch", "end"):
                metrics = {name: value for name, value in row["metrics"].items() if not is_measured(name)}
                fixed = {name: value for name, value in row.items() if name not in ("time", "attempt")}
                kept[row["kind"], row.get("stage"), row.get("epoch")] = fixed | {"metrics": metrics}
        told[path.stem] = json.dumps([kept[key] for key in sorted(kept, key=str)]).encode()
    return told


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    cluster.connect(Resources())
    yield
    ray.shutdown()


def run(planned: list[Planned], folder: Path, policy: Policy) -> dict[str, bytes]:
    trial = planned[0].trial
    recorder = Recorder(folder, Silent(), Progress(planned, trial))  # type: ignore[arg-type]
    data = {worker.data_key(trial): load(trial.data)}
    tune.run_planned(planned, tune.Place(Packed(), data, recorder, folder, policy))  # type: ignore[arg-type]
    return outcome(folder)


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["saved every epoch", "saved at stages' ends"])
def test_workers_killed_at_any_point_leave_no_trace(
    checkpoint_seconds: float, ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings("tiny", seeds=1, changes=SMALL)
    wanted = {"method=pc_darts", "method=darts_2nd", "method=p_darts"}
    planned = [p for p in plan(compare_methods.STUDY, settings) if p.arm in wanted]
    assert {len(p.trial.search) for p in planned} == {1, 3}
    undisturbed = run(planned, tmp_path / "undisturbed", Policy())
    # After these epochs, counted from 1 over the trial, the worker is killed: once within every stage, once
    # right at its end, where the next network is built, and each time at another moment of what it does then.
    points = {p.trial.id: {1, 2, 4} | ({3, 6, 8} if len(p.trial.search) == 3 else {3, 5}) for p in planned}
    draws, killed = random.Random(0), Counter[str]()
    forward = tune.Forward.on_trial_result

    def kill(self: tune.Forward, *args: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        forward(self, *args, trial=trial, result=result, **info)
        name = trial.config["planned"]["id"]
        epochs = {(row["stage"], row["epoch"]) for row in result["rows"] if row["kind"] == "epoch"}
        done[name] = done.get(name, set()) | epochs
        if len(done[name]) in points[name]:
            points[name].discard(len(done[name]))
            time.sleep(draws.uniform(0, 0.3))
            os.kill(result["pid"], signal.SIGKILL)
            killed[name] += 1

    done: dict[str, set[tuple[str, int]]] = {}
    monkeypatch.setattr(tune.Forward, "on_trial_result", kill)
    policy = Policy(checkpoint_seconds=checkpoint_seconds, max_failures=10)
    assert run(planned, tmp_path / "killed", policy) == undisturbed
    assert sorted(killed.values()) == [5, 5, 6]
    for p in planned:
        rows = records.read_rows(tmp_path / "killed/trials" / f"{p.trial.id}.jsonl")
        assert len({row["attempt"] for row in rows}) == killed[p.trial.id] + 1
        assert [row["kind"] for row in rows].count("end") == 1
    assert not list((tmp_path / "killed/checkpoints").glob("*/*"))


def study(folder: Path, *more: str) -> "subprocess.Popen[str]":
    """A driver of six small trials, in a process of its own."""
    changes = [f"{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, str(ROOT / "experiments/sweep_edge_norm.py"), "--preset", "tiny"]
    command += ["--seeds", "2", "--checkpoint-seconds", "0", "--out", str(folder), *more, "--set", *changes]
    with folder.parent.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=ROOT)


def rows_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "trials").glob("*.jsonl"))


def comparable(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables without what differs between two runs of one study: ids of runs, times, the machine."""
    tables = records.read_tables(folder)
    trials = tables.trials
    apart = [name for name in trials if is_measured(name) or name.startswith("host.")]
    trials = trials.drop(columns=[*apart, "study_id", "attempts", "started", "ended"])
    epochs = tables.epochs[~tables.epochs["key"].astype(str).map(is_measured)]
    epochs = epochs.drop(columns=["attempt_id", "timestamp"]).reset_index(drop=True)
    return {"trials": trials, "epochs": epochs, "genotypes": tables.genotypes}


@pytest.mark.parametrize("options", [(), ("--retrain-seeds", "2")], ids=["one phase", "two phases"])
def test_a_study_whose_driver_is_killed_twice_ends_as_if_it_never_was(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole" / "study", tmp_path / "broken" / "study"
    for folder in (whole, broken):
        folder.parent.mkdir()
    assert study(whole, *options).wait(600) == 0
    total, resume = rows_in(whole), options
    for share in (0.3, 0.7):
        driver = study(broken, *resume)
        while rows_in(broken) < share * total and driver.poll() is None:
            time.sleep(0.05)
        assert driver.poll() is None, "it ended before it could be killed"
        driver.kill()
        driver.wait()
        resume = (*options, "--resume")
    ended = [path for path in (broken / "trials").glob("*") if b'"kind": "end"' in path.read_bytes()]
    finished = {path.stem: path.read_bytes() for path in ended}
    assert finished
    assert study(broken, *resume).wait(600) == 0
    # What had ended was left alone.
    assert {name: (broken / f"trials/{name}.jsonl").read_bytes() for name in finished} == finished
    one, other = comparable(whole), comparable(broken)
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name], check_exact=True)
    store = sqlite3.connect(broken.parent / "mlflow.db")
    runs = store.execute("select value from tags where key = 'trial_id'").fetchall()
    ids = {*one["trials"]["search_id"], *one["trials"]["retraining_id"]}
    assert sorted(trial for (trial,) in runs) == sorted(ids)
    twice = "select run_uuid, key, step from metrics group by run_uuid, key, step having count(*) > 1"
    assert store.execute(twice).fetchall() == []
    expected = sqlite3.connect(whole.parent / "mlflow.db").execute("select count(*) from metrics").fetchall()
    assert store.execute("select count(*) from metrics").fetchall() == expected


def test_a_full_disk_pauses_a_study(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        folder, store = disk / "study", f"sqlite:///{tmp_path / 'mlflow.db'}"
        code = study(folder, "--tracking-uri", store).wait(600)
        said = disk.with_suffix(".log").read_text()
        assert code == 3, said[-2000:]
        before = {path.stem: records.read_rows(path) for path in (folder / "trials").glob("*.jsonl")}
        assert any(before.values())
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert study(folder, "--tracking-uri", store, "--resume").wait(600) == 0
        tables = records.read_tables(folder)
        assert list(tables.trials["status"]) == ["completed"] * 6
        for trial, rows in before.items():
            assert records.read_rows(folder / f"trials/{trial}.jsonl")[: len(rows)] == rows
    finally:
        subprocess.run(["umount", str(disk)], check=True)
