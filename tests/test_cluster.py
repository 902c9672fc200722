"""`ray_cluster.yaml`: accepted by Ray's own validator, and true to what its comments promise."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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


def test_every_node_installs_the_locked_ray(config: Config) -> None:
    (locked,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    (install,) = (command for command in config["setup_commands"] if "pip install" in command)
    assert re.findall(r'"ray\[default,tune\]==([^"]+)"', install) == [locked]
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
