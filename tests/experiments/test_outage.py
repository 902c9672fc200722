"""A tracking server that is killed while a study runs costs the study no time and no row."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import tracking
from experiments.tracking import Tracker, sync
from tests.experiments.test_tracking import STUDY, eventful_rows, keep, tables, trial_rows, write_study

pytestmark = pytest.mark.slow


class Server:
    """A real MLflow server on a SQLite store, to be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.store = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start, wait until it answers, and return the seconds that took."""
        began = time.monotonic()
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "files")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        while time.monotonic() - began < 120:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return time.monotonic() - began
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(tmp_path)
    yield server
    server.kill()


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_server_killed_twice_delays_no_row_and_loses_none(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", (0.5, 2.0))
    folder = write_study(tmp_path / "sweep_k", [])
    begin = [server.start()]
    tracker = Tracker(server.uri, STUDY, folder, flush_seconds=0.2)
    tracker.open()
    rows = eventful_rows()
    for number in range(12):  # and some more, so that there is always something under way
        rows += trial_rows(f"td{number}", number, 5000.0 + 10 * number)
    third = len(rows) // 3
    waits: dict[str, list[float]] = {"server up": [], "server down": []}
    draws = random.Random(0)

    def tell(some: list[dict[str, Any]], state: str, pause: float) -> None:
        for row in some:
            keep(folder, row)
            began = time.perf_counter()
            tracker.row(row)
            waits[state].append(time.perf_counter() - began)
            time.sleep(pause * draws.random())

    outages = []
    for part in (rows[:third], rows[third : 2 * third]):
        half = len(part) // 2
        tell(part[:half], "server up", 0.1)
        server.kill()
        down = time.monotonic()
        tell(part[half:], "server down", 0.3)
        begin.append(server.start())
        outages.append(time.monotonic() - down)
        told = sum(map(len, waits.values()))
        until(lambda told=told: tracker._copy.sent >= told)  # type: ignore[misc]
    tell(rows[2 * third :], "server up", 0.02)
    tracker.close()
    longest = {state: max(seconds) for state, seconds in waits.items()}
    with capsys.disabled():
        print("\nserver starts (s):", *(f"{seconds:.1f}" for seconds in begin), end="; ")
        print("outages (s):", *(f"{seconds:.1f}" for seconds in outages), end="; ")
        print(
            *(f"longest row(), {state}: {1000 * seconds:.2f} ms" for state, seconds in longest.items()),
            sep="; ",
        )
    assert sum(waits["server down"]) < 1.0, "of all rows of both outages together"

    live = tables(server.store)
    first: dict[object, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "epoch":  # told apart by a metric that is not measured, as by eye
            key = (row["trial"], row["stage"], row["epoch"], row["metrics"]["valid_error"])
            first.setdefault(key, row)
    epochs = [
        (row["trial"], f"{row['stage']}/{name}", value, round(1000 * row["time"]), row["epoch"], 0)
        for row in first.values()
        for name, value in row["metrics"].items()
        if value is not None
    ]
    assert sorted(row for row in live["metrics"] if row[1].startswith(("search/", "retrain/"))) == sorted(
        epochs
    )
    assert len(live["runs"]) == 1 + len({row["trial"] for row in rows})
    assert {status for _, _, status, *_ in live["runs"]} == {"FINISHED"}

    sync(folder, f"sqlite:///{tmp_path / 'rebuilt.db'}")
    assert tables(f"sqlite:///{tmp_path / 'rebuilt.db'}") == live
