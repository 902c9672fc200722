"""`ray_cluster.yaml` and `ray_job.yaml`: what Ray and KubeRay take, and as their comments promise."""

import copy
import re
import shlex
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from experiments import cluster, provenance, sweep_k
from experiments.cluster import Waiting, connect
from experiments.main import parser
from experiments.provenance import differences, fingerprint
from experiments.study import Resources

ROOT = Path(__file__).parent.parent
START = "ray start"

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return loaded


def validate(config: Config) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def start_command(config: Config, role: str) -> str:
    """Return the one command with which `role`, head or worker, starts Ray."""
    (command,) = (line for line in config[f"{role}_start_ray_commands"] if START in line)
    return str(command)


def test_ray_accepts_the_file(config: Config) -> None:
    validate(config)


def test_ray_refuses_an_unknown_key(config: Config) -> None:
    with pytest.raises(Exception, match="'idle_timeout_hours' was unexpected"):  # jsonschema's own error type
        validate(config | {"idle_timeout_hours": 1})


def test_no_default_command_of_ray_is_left(config: Config) -> None:
    # Ray's defaults install a nightly wheel and open the dashboard to the network.
    prepared = prepare_config(copy.deepcopy(config))
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[key] == config[key]
    commands = [command for key, value in prepared.items() if key.endswith("_commands") for command in value]
    opened = re.compile(r"(?<![\d.])0\.0\.0\.0")  # and not 10.0.0.0/8
    assert not [command for command in commands if opened.search(command) or "ray-wheels" in command]


def locked_ray() -> str:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return str(version)


def study_options(command: str) -> Namespace:
    """Options of the sweep over K in a command, as the study itself reads them."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    assert Path(script).parts[-2:] == ("experiments", "sweep_k.py")
    assert (ROOT / "experiments/sweep_k.py").exists()
    return parser(sweep_k.STUDY).parse_args(arguments)


def test_every_node_installs_the_locked_ray(config: Config) -> None:
    (install,) = (command for command in config["setup_commands"] if "pip install" in command)
    assert re.findall(r'"ray\[default,tune\]==([^"]+)"', install) == [locked_ray()]
    assert "-c ~/project/requirements.lock" in install


def test_no_trial_lands_on_the_head(config: Config) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(start_command(config, "head").split())


def test_workers_are_spot_gpus_that_come_and_go(config: Config) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert 0 < worker["max_workers"] <= config["max_workers"]
    assert worker["resources"]["GPU"] >= 1
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["idle_timeout_minutes"] > 0
    assert config["provider"]["cache_stopped_nodes"] is False


def test_dashboard_and_mlflow_listen_on_the_head_only(config: Config) -> None:
    assert "--dashboard-host=127.0.0.1" in start_command(config, "head").split()
    (mlflow,) = (line for line in config["head_start_ray_commands"] if "mlflow server" in line)
    assert "--host 127.0.0.1" in mlflow
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in mlflow
    assert "setsid --fork mlflow" in mlflow, "a server in the foreground would hang `ray up`"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_asks_for_the_token(config: Config, role: str) -> None:
    assert "RAY_AUTH_MODE=token" in start_command(config, role).split(START)[0].split()
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_workers_mount_what_the_head_exports(config: Config) -> None:
    assert any(
        re.search(r'echo "/srv/studies .*/etc/exports\.d/', line) for line in config["head_setup_commands"]
    )
    assert any(
        "$RAY_HEAD_IP:/srv/studies /srv/studies" in line for line in config["worker_start_ray_commands"]
    )


def test_the_command_of_the_header_is_one_that_the_study_takes(config: Config) -> None:
    header = (ROOT / "ray_cluster.yaml").read_text().partition("cluster_name:")[0].replace("\n#", "\n")
    (command,) = re.findall(r"(python experiments/sweep_k.py.*?)\n {6}\S", header.replace("\\\n", " "))
    options = study_options(command)
    worker = config["available_node_types"]["gpu_worker"]
    asked = {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial}
    assert all(amount <= worker["resources"][name] for name, amount in asked.items())
    assert options.out.is_relative_to("/srv/studies")
    assert options.tracking_uri == "http://127.0.0.1:5000"


# Kubernetes


@pytest.fixture
def kubernetes() -> dict[str, Config]:
    """The objects of `ray_job.yaml` by kind and name."""
    found = yaml.safe_load_all((ROOT / "ray_job.yaml").read_text())
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


@pytest.fixture
def job(kubernetes: dict[str, Config]) -> Config:
    """What the RayJob asks for."""
    spec: Config = kubernetes["RayJob/nas-study"]["spec"]
    return spec


def pods(job: Config) -> Iterator[Config]:
    """Templates of all pods of a RayJob."""
    yield job["submitterPodTemplate"]
    for group in (job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]):
        yield group["template"]


def group(job: Config) -> tuple[Config, Config]:
    """The one group of workers, and what its container may use."""
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    return workers, container["resources"]["limits"]


def test_the_job_has_what_kuberay_requires(kubernetes: dict[str, Config], job: Config) -> None:
    assert kubernetes["RayJob/nas-study"]["apiVersion"] == "ray.io/v1"
    assert {"entrypoint", "rayClusterSpec"} <= job.keys()
    assert {"headGroupSpec", "workerGroupSpecs"} <= job["rayClusterSpec"].keys()
    workers, _ = group(job)
    assert {"groupName", "rayStartParams", "template"} <= workers.keys()
    starts = [job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"], workers["rayStartParams"]]
    assert all(isinstance(value, str) for start in starts for value in start.values())
    for pod in pods(job):
        for container in pod["spec"]["containers"]:
            assert {"name", "image", "resources"} <= container.keys()
            assert container["resources"].keys() == {"requests", "limits"}
            variables = container.get("env", [])
            assert all(isinstance(one["value"], str) for one in variables)
    assert job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["name"] == "ray-head"


def test_the_job_runs_the_locked_ray(job: Config) -> None:
    assert job["rayClusterSpec"]["rayVersion"] == locked_ray()
    assert f"rayproject/ray:{locked_ray()}-py311" in (ROOT / "ray_job.yaml").read_text()
    images = {container["image"] for pod in pods(job) for container in pod["spec"]["containers"]}
    assert images == {"IMAGE-EXAMPLE"}, "all pods of one image, or driver and workers differ"


def test_the_entrypoint_of_the_job_fits_its_workers(job: Config) -> None:
    options = study_options(job["entrypoint"])
    _, limits = group(job)
    assert options.gpus_per_trial <= limits["nvidia.com/gpu"]
    assert options.cpus_per_trial <= int(limits["cpu"])
    assert options.address == "auto"


def test_workers_of_the_job_come_and_go(job: Config) -> None:
    assert job["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert job["rayClusterSpec"]["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    workers, limits = group(job)
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (0, 0, 8)
    assert limits["nvidia.com/gpu"] == 1
    head = job["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


def test_volumes_of_the_job_are_claimed_and_mounted(kubernetes: dict[str, Config], job: Config) -> None:
    claims = {name.partition("/")[2]: one["spec"] for name, one in kubernetes.items() if "Claim" in name}
    mounted: dict[str, list[str]] = {}
    for pod in pods(job):
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            for mount in container.get("volumeMounts", []):
                claim = volumes[mount["name"]].get("persistentVolumeClaim", {}).get("claimName")
                mounted.setdefault(claim, []).append(mount["mountPath"])
    assert mounted.pop(None) == ["/dev/shm"]
    assert mounted == {"nas-studies": ["/srv/studies"] * 2, "nas-mlflow": ["/srv/mlflow"]}
    assert claims["nas-studies"]["accessModes"] == ["ReadWriteMany"]
    assert claims.keys() == mounted.keys()
    assert study_options(job["entrypoint"]).out.is_relative_to("/srv/studies")


def test_the_job_is_closed_to_strangers(kubernetes: dict[str, Config], job: Config) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not [name for name in kubernetes if name.startswith(("Service/", "Ingress/"))]
    policy = kubernetes["NetworkPolicy/nas-study"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= {"app": "nas-study"}.items()
    assert all(pod["metadata"]["labels"]["app"] == "nas-study" for pod in pods(job))
    ours, operator = policy["ingress"]
    assert ours == {"from": [{"podSelector": policy["podSelector"]}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (mlflow,) = (one for pod in pods(job) for one in pod["spec"]["containers"] if one["name"] == "mlflow")
    assert "--host=127.0.0.1" in mlflow["command"]
    assert study_options(job["entrypoint"]).tracking_uri == "http://127.0.0.1:5000"


# Joining a cluster


@pytest.fixture
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray starts here, nor is one joined."""

    def init(**options: object) -> None:
        raise AssertionError(f"joined {options}")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)


@pytest.fixture
def stranger() -> Iterator[str]:
    """Address of a web server, such as Ray's dashboard."""
    with socket.create_server(("", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("_no_ray")
def test_an_address_without_ray_is_refused_in_seconds(stranger: str) -> None:
    start = time.monotonic()
    with socket.create_server(("", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        ConnectionError, match=rf"--address 127\.0\.0\.1:{port}: nothing answers at \S+:{port} "
    ):
        connect(Resources(f"127.0.0.1:{port}"))
    with pytest.raises(ConnectionError, match=r"what answers at \S+ is not a Ray head; its port is 6379"):
        connect(Resources(stranger))
    assert time.monotonic() - start < 2 * cluster.ANSWER_SECONDS


@pytest.mark.usefixtures("_no_ray")
@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_a_study_runs_on_the_head_and_not_from_afar(address: str) -> None:
    with pytest.raises(ValueError, match=f"--address {address} is not a host and a port.*ray job submit"):
        connect(Resources(address))


def test_a_cluster_that_wants_a_token_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "_check_answer", lambda address: None)
    with pytest.raises(ConnectionError, match=r"set RAY_AUTH_MODE=token \(it is disabled\)"):
        connect(Resources("10.0.0.1:6379"))


@pytest.mark.usefixtures("_no_ray")
def test_auto_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda address: None)
    with pytest.raises(ConnectionError, match="--address auto: no cluster runs on this machine"):
        connect(Resources("auto"))


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        (None, "head:6379", "head:6379"),
        ("auto", "head:6379", "auto"),
        ("local", "head:6379", None),
    ],
)
def test_the_option_comes_before_the_variable(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, expected: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster.joined(Resources(address)) == expected


# All nodes alike


def test_a_fingerprint_follows_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = SimpleNamespace(__path__=[str(tmp_path)])
    monkeypatch.setattr(provenance.importlib, "import_module", lambda name: package)
    prints = []
    for name, text in {"a.py": "x = 1", "b/c.py": "y = 2", "a.txt": "not code"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        prints.append(fingerprint.__wrapped__())
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    prints.append(fingerprint.__wrapped__())
    codes = [each["code"] for each in prints]
    assert codes[1] == codes[2]
    assert len(set(codes)) == 3


def test_a_fingerprint_names_what_must_be_alike() -> None:
    found = fingerprint()
    assert found.keys() == {"python", "ray", "torch", "code"}
    assert found["ray"] == locked_ray()
    assert found is fingerprint()
    assert differences(found, dict(found)) == ""
    other = {**found, "torch": "1.0", "code": "0" * 12}
    assert differences(found, other) == (
        f"torch 1.0 instead of {found['torch']}, code 000000000000 instead of {found['code']}"
    )


def test_this_machine_alone_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.remote", None)
    cluster.check_nodes(Resources())


# Waiting for nodes

GB = 2.0**30


def alive(*nodes: dict[str, float]) -> list[dict[str, Any]]:
    """A head that runs no trials, and these nodes, as Ray tells of them."""
    return [{"Alive": True, "Resources": node} for node in ({"memory": 64 * GB}, *nodes)]


def test_a_cluster_without_workers_must_be_told_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: alive())
    with pytest.raises(ValueError, match=r"has no node for trials yet.*give --gpus-per-trial 1, or 0"):
        cluster.check_resources(Resources("head:6379"))
    cluster.check_resources(Resources("head:6379", gpus_per_trial=0))
    monkeypatch.setattr(ray, "nodes", lambda: alive({"CPU": 8}))
    cluster.check_resources(Resources("head:6379"))


def test_why_trials_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    state = AutoscalingState()
    monkeypatch.setattr(cluster, "_autoscaling", lambda: state)

    def said(asked: dict[str, float], *nodes: dict[str, float]) -> str:
        monkeypatch.setattr(ray, "nodes", lambda: alive(*nodes))
        return cluster.waits_for(asked)

    asked = {"CPU": 2.0, "GPU": 0.5, "memory": 4 * GB}
    small, large = {"CPU": 8.0, "memory": 30 * GB}, {"CPU": 8.0, "GPU": 1.0, "memory": 30 * GB}
    assert said(asked, small, large) == "the nodes with room for a trial (2 CPU, 0.5 GPU, 4.0 GB) are busy"
    grow = "the cluster must grow for a trial (2 CPU, 0.5 GPU, 4.0 GB), now "
    assert said(asked) == f"{grow}it has no node for trials"
    assert said(asked, small, small) == f"{grow}its nodes have 8 CPU, 30.0 GB"
    state.failed_instance_requests.add(ray_node_type_name="gpu_worker")
    assert said(asked, small).endswith("; gpu_worker could not be started, and `ray status` says why")
    refused = state.infeasible_gang_resource_requests.add().requests.add().resources_bundle
    refused.update(asked | {"CPU": 4.0})
    assert said(asked, small).startswith(grow)
    refused.update(asked)
    assert said(asked, small).startswith("no node that the cluster has or may start has room for a trial")


def test_trials_that_wait_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now)
    monkeypatch.setattr(cluster, "waits_for", lambda asked: f"no room for {asked}")
    factory = SimpleNamespace(required_resources={"CPU": 2})
    pending = SimpleNamespace(status="PENDING", placement_group_factory=factory)
    running = SimpleNamespace(status="RUNNING")
    ended = SimpleNamespace(status="TERMINATED")
    waiting = Waiting()

    def step(seconds: float, *trials: Any) -> str:
        nonlocal now
        now = seconds
        waiting.on_step_end(0, list(trials))
        return capsys.readouterr().out

    assert step(29, pending, ended) == ""
    assert step(31, pending, ended) == "waiting for 31 s: no room for {'CPU': 2}\n"
    assert step(59, pending) == ""
    assert step(61, pending) == "waiting for 61 s: no room for {'CPU': 2}\n"
    assert step(100, pending, running) == ""
    assert step(125, pending) == ""
    assert step(131, pending) == "waiting for 31 s: no room for {'CPU': 2}\n"
    assert step(999, ended) == ""
