"""Clusters of several nodes: one that is lost, ones that come and go, and one that runs something else."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group

from analysis import records
from analysis.records import is_measured
from experiments import cluster
from experiments.provenance import fingerprint
from experiments.study import Resources

pytestmark = pytest.mark.slow
psutil = importlib.import_module("psutil")  # comes with Ray, and is found once that is imported

ROOT = Path(__file__).parents[2]
STORE = 80 * 2**20
"""Bytes of a node's object store: nodes here share one machine."""
STUDY = (
    *("experiments/sweep_edge_norm.py", "--preset", "tiny", "--seeds", "1", "--checkpoint-seconds", "0"),
    *("--set", "space.nodes=2", "data.limit=80", "data.test_limit=20"),
    *("search.*.epochs=2", "retrain.epochs=12"),
)
TRIALS = 3


@contextmanager
def study(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Context in which the study runs as a user would run it; what it says goes to `folder`.log."""
    with folder.with_suffix(".log").open("wb") as log:
        command = [sys.executable, *STUDY, "--out", str(folder), *options]
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield driver
        finally:
            end(driver.pid)
            driver.wait()


def end(pid: int) -> None:
    """End a process and all that it started."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        with_patience(each.terminate)
    _, alive = psutil.wait_procs(family, timeout=10)
    for each in alive:
        with_patience(each.kill)


def with_patience(signal: Any) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        pass


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in (folder / "trials").glob("*.jsonl") for row in records.read_rows(path)]


def outcome(folder: Path) -> dict[str, bytes]:
    """By trial, what its rows say of it, and not of the machine."""
    told: dict[str, dict[str, Any]] = {}
    for row in rows(folder):
        if row["kind"] in ("epoch", "end"):
            metrics = {name: value for name, value in row["metrics"].items() if not is_measured(name)}
            fixed = {name: value for name, value in row.items() if name not in ("time", "attempt")}
            key = f"{row['kind']} {row.get('stage')} {row.get('epoch')}"
            told.setdefault(row["trial"], {})[key] = fixed | {"metrics": metrics}
    return {trial: json.dumps(kept, sort_keys=True).encode() for trial, kept in told.items()}


def wait(what: str, reached: Any, seconds: float = 120) -> float:
    """Seconds until something is reached."""
    start = time.monotonic()
    while not reached():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the study records when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    with study(folder) as driver:
        assert driver.wait(300) == 0, said(folder)
    found = outcome(folder)
    assert len(found) == TRIALS
    return found


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes of two."""
    # No other Ray on this machine is to take this one for its own. A socket's path may not be long.
    for name in ("_private.utils.write_ray_address", "_common.utils.reset_ray_address"):
        monkeypatch.setattr(f"ray.{name}", lambda *_: None)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    shared = {"object_store_memory": STORE}
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder), **shared}
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            started.add_node(num_cpus=2, **shared)
        started.wait_for_nodes()
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def trials_on(node: Any) -> list[str]:
    """Processes of trials on a node."""
    raylet = node.all_processes["raylet"][0].process.pid
    names = [" ".join(each.cmdline()) for each in psutil.Process(raylet).children()]
    return [name for name in names if "Trainable" in name]


def test_a_lost_node_leaves_no_trace(nodes: Cluster, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    with study(folder, "--address", nodes.address, "--max-concurrent", "2") as driver:
        busy: list[Any] = []

        def found() -> bool:
            """Whether a trial retrains, on a node that runs one."""
            busy[:] = [node for node in nodes.worker_nodes if trials_on(node)]
            return bool(busy) and any(row.get("stage") == "retrain" for row in rows(folder))

        wait("a trial in retraining", found)
        lost = busy[0]
        before, killed = {row["attempt"] for row in rows(folder)}, time.time()
        nodes.remove_node(lost, allow_graceful=False)
        assert driver.wait(300) == 0, said(folder)
    assert outcome(folder) == undisturbed
    starts = [row for row in rows(folder) if row["kind"] == "start"]
    again = [row for row in starts if [each["trial"] for each in starts].count(row["trial"]) > 1]
    attempts = {row["attempt"] for row in again if row["attempt"] not in before}
    epochs = [row["time"] for row in rows(folder) if row["kind"] == "epoch" and row["attempt"] in attempts]
    assert epochs
    resumed = [row["resumed"] for row in again if row["attempt"] in attempts]
    print(f"\nnode lost: first new epoch after {min(epochs) - killed:.1f} s; went on after epochs {resumed}")


# Nodes that come and go

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The name that Ray's fake nodes give the head."""


@contextmanager
def autoscaling(version: int) -> Iterator[str]:
    """Context with a cluster of no workers, which Ray's autoscaler may extend to two; its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    settings = folder / "cluster.json"
    settings.write_text(json.dumps(fake_cluster(version, address)))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": str(int(version == 2)),
        "PYTHONPATH": str(ROOT),  # where the autoscaler finds the provider of nodes
    }
    if version == 2:
        environment |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"),
        *(f"--autoscaling-config={settings}", f"--temp-dir={folder}", "--num-cpus=0", "--num-gpus=0"),
        *(f"--object-store-memory={STORE}", "--include-dashboard=false", "--disable-usage-stats"),
    ]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait("a head", lambda: answers(address))
        yield address
    finally:
        ray.shutdown()
        end(head.pid)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def fake_cluster(version: int, address: str) -> dict[str, Any]:
    """What `ray_cluster.yaml` says, for nodes on this machine; Ray wants every key here."""
    provider = {
        "type": "external",
        "module": "tests.experiments.fake_nodes.FakeNodes",
        "gcs_address": address,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    if version == 2:
        provider |= {"launch_multiple": True, "head_node_id": HEAD}
    worker = {"CPU": 1, "memory": 2 * 2**30, "object_store_memory": STORE}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        **{f"{name}_commands": [] for name in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


def answers(address: str) -> bool:
    try:
        cluster.connect(Resources(address))
    except ConnectionError:
        return False
    return True


def workers() -> int:
    return sum(node.cpus > 0 for node in cluster.machine(Resources("here")).nodes)


@pytest.mark.parametrize("version", [1, 2])
def test_a_cluster_of_no_workers_grows_for_a_study_and_shrinks_again(
    version: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    with autoscaling(version) as address:
        assert workers() == 0
        with pytest.raises(ValueError, match=r"no node for trials yet.* give --gpus-per-trial"):
            cluster.check_resources(Resources(address))
        history = [(time.time(), 0)]

        def seen() -> int:
            count = workers()
            if count != history[-1][1]:
                history.append((time.time(), count))
            return count

        with study(folder, "--address", address, "--gpus-per-trial", "0") as driver:
            wait("the study's end", lambda: seen() >= 0 and driver.poll() is not None, 300)
            assert driver.poll() == 0, said(folder)
        wait("no workers", lambda: seen() == 0, 120)
    assert outcome(folder) == undisturbed
    counts = [count for _, count in history]
    assert max(counts) == 2
    assert counts[-1] == 0
    times = {kind: [row["time"] for row in rows(folder) if row["kind"] == kind] for kind in ("start", "end")}
    start, first, last = history[0][0], min(times["start"]), max(times["end"])
    story = ", ".join(f"{count} at {when - start:.1f} s" for when, count in history[1:])
    print(
        f"\nautoscaler v{version}: workers {story}; trials from {first - start:.1f} s to {last - start:.1f} s"
    )


def test_a_study_that_no_node_can_ever_run_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    options = ("--gpus-per-trial", "0", "--cpus-per-trial", "4")
    with autoscaling(2) as address, study(folder, "--address", address, *options):
        word = "no node that the cluster has or may start has room for a trial (4 CPU, "
        wait("the study's word", lambda: word in said(folder), 180)
        assert "packing: trials start when a node joins that has room for one, 4 threads each" in said(folder)
        assert not rows(folder)


def test_the_autoscaler_says_what_it_can_never_start() -> None:
    with autoscaling(2):
        asked = {"CPU": 4.0, "memory": 2.0**30}
        assert cluster.waits_for(asked) == (
            "the cluster must grow for a trial (4 CPU, 1.0 GB), now it has no node for trials"
        )
        placement_group([asked])  # as Tune asks for a trial's share
        wait("the autoscaler's word", lambda: "may start" in cluster.waits_for(asked), 60)
        assert "no node that the cluster has or may start" in cluster.waits_for(asked)
        assert "must grow" in cluster.waits_for({"CPU": 1.0})


# Nodes that are not alike


def test_a_node_with_other_code_is_refused(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # workers look first where the driver runs, which is the same folder here
    resources = Resources(nodes.address)
    cluster.connect(resources)
    start = time.monotonic()
    cluster.check_nodes(resources)
    print(f"\n3 nodes asked what they run in {time.monotonic() - start:.1f} s")
    for package in ("analysis", "experiments", "nas"):
        ours, theirs = ROOT / package, tmp_path / "other" / package
        shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns("__pycache__"))
    with (theirs / "trial.py").open("a") as file:
        file.write("# changed\n")
    path = {"PYTHONPATH": str(tmp_path / "other")}
    other = nodes.add_node(num_cpus=1, object_store_memory=STORE, env_vars=path)
    code = fingerprint()["code"]
    with pytest.raises(ValueError, match=rf"^node .* has code \w+ instead of {code}; install this code"):
        cluster.check_nodes(resources)
    nodes.remove_node(other)
    wait("the node's end", lambda: len(cluster.machine(resources).nodes) == 3)
    cluster.check_nodes(resources)
