"""Ray's machines: joining or starting them, what they have for trials, and whether they are all alike."""

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray import tune
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    AutoscalingState,
    GetClusterStatusReply,
)
from ray.exceptions import GetTimeoutError, RayError
from ray.tune.experiment import Trial as TuneTrial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from experiments.packing import Machine, Node
from experiments.provenance import differences, fingerprint
from experiments.study import Resources

ANSWER_SECONDS = 5.0
"""How long a machine may take to answer that Ray runs there; Ray itself would wait for minutes."""
PROBE_SECONDS = 120.0
"""How long a node may take to tell its versions: it imports PyTorch, maybe over a network."""
SILENCE_SECONDS = 30.0
"""How long trials wait before it is said; doubled each time."""

_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of gRPC begins; the server answers with a frame of the same type 4."""


def joined(resources: Resources) -> str | None:
    """Address of the cluster that a study runs on; None is this machine alone."""
    address = resources.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def connect(resources: Resources) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine alone.

    Raises:
        ValueError: an address of another kind.
        ConnectionError: no cluster answers there, or it does not take this process in.
    """
    if ray.is_initialized():
        return
    address = joined(resources)
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody but this process connects
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    if "://" in address:
        raise ValueError(
            f"--address {address} is not a host and a port; a study runs on the cluster's head, "
            "where --address auto finds it: `ray job submit` puts it there"
        )
    _check_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, RuntimeError, ConnectionError) as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise ConnectionError(
            f"--address {address}: Ray answers there, but does not let this process in; if it has a "
            f"token, set RAY_AUTH_MODE=token (it is {mode}) and have the same ~/.ray/auth_token "
            f"({' '.join(str(error).split())})"
        ) from error


def _check_answer(address: str) -> None:
    """Refuse an address where Ray does not answer at once."""
    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ConnectionError(
            f"--address {address}: no cluster runs on this machine; give its head, HOST:6379, or leave it out"
        )
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_HTTP2)
            answer = connection.recv(9)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"--address {address}: nothing answers at {found} ({error}); is the cluster up, is this its head?"
        ) from error
    if answer[3:4] != b"\x04":
        raise ConnectionError(
            f"--address {address}: what answers at {found} is not a Ray head; its port is 6379 unless it was "
            "started with another (8265 is the dashboard's)"
        )


def check_resources(resources: Resources) -> None:
    """Refuse a request that can never be met, or not be told, instead of waiting without end.

    Raises:
        ValueError: more CPUs or GPUs per trial than this machine has, which on a cluster is not checked, as
            it may grow; or a cluster that has yet to grow, and no word on GPUs.
    """
    if joined(resources) is not None:
        if resources.gpus_per_trial is None and not any(node.cpus for node in machine(resources).nodes):
            raise ValueError(
                "the cluster has no node for trials yet, so it cannot be seen whether there will be GPUs; "
                "give --gpus-per-trial 1, or 0 for trials on CPUs"
            )
        return
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, asked in (("CPU", resources.cpus_per_trial), ("GPU", resources.gpus_per_trial)):
        if (asked or 0) > have.get(name, 0):
            flag = f"--{name.lower()}s-per-trial"
            raise ValueError(
                f"{flag} {asked:g}: this machine has {have.get(name, 0):g}; lower it, or give an --address"
            )


def machine(resources: Resources) -> Machine:
    """What Ray has for trials now. The memory of a GPU is known if it is one of this machine."""
    grows = joined(resources) is not None
    nodes = []
    for node in _alive():
        have = node["Resources"]
        memory, shared = (have.get(name, 0) / 2**20 for name in ("memory", "object_store_memory"))
        # A GPU that PyTorch cannot use here is none; a cluster's nodes are not asked.
        gpus = have.get("GPU", 0) if grows or torch.cuda.is_available() else 0
        nodes.append(Node(have.get("CPU", 0), gpus, memory, memory + shared))
    gpu_memory = None
    if any(node.gpus for node in nodes) and not grows:
        devices = range(torch.cuda.device_count())
        gpu_memory = min(torch.cuda.get_device_properties(each).total_memory for each in devices) / 2**20
    return Machine(tuple(nodes), gpu_memory, grows)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


# Whether all nodes run the same


def check_nodes(resources: Resources) -> None:
    """Ask every node of a cluster what it runs; on this machine alone there is nothing to ask.

    Nodes that join later are not known here: their workers compare `fingerprint` themselves.

    Raises:
        ValueError: a node runs other versions or other code than this process, or cannot run the code.
    """
    if joined(resources) is None:
        return
    probe = ray.remote(num_cpus=0, max_retries=0)(_what_it_runs)
    answers = []
    for node in _alive():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers.append((node, probe.options(scheduling_strategy=there).remote()))
    end = time.monotonic() + PROBE_SECONDS
    for node, answer in answers:
        try:
            found = ray.get(answer, timeout=max(0.0, end - time.monotonic()))
            wrong = differences(fingerprint(), found)
        except GetTimeoutError:
            wrong = f"no answer for {PROBE_SECONDS:g} s"
        except RayError as error:
            if node["NodeID"] not in {each["NodeID"] for each in _alive()}:
                continue  # it left meanwhile
            wrong = f"no such code ({str(error).strip().splitlines()[-1]})"
        if wrong:
            raise ValueError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) has {wrong}; install "
                "this code and requirements.lock on all nodes (`ray up` does both), and start them anew"
            )


def _what_it_runs() -> Mapping[str, str | None]:
    return fingerprint()


# Trials that wait


class Waiting(tune.Callback):
    """Says that trials wait for a node, and why, while no trial runs."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.patience = SILENCE_SECONDS

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Look whether a trial runs; Tune calls this all the time."""
        now = time.monotonic()
        pending = next((trial for trial in trials if trial.status == TuneTrial.PENDING), None)
        if pending is None or any(trial.status == TuneTrial.RUNNING for trial in trials):
            self.since, self.patience = now, SILENCE_SECONDS
        elif now - self.since > self.patience:
            self.patience *= 2
            print(f"waiting for {now - self.since:.0f} s: {waits_for(_asked(pending))}", flush=True)


def _asked(trial: TuneTrial) -> Mapping[str, float]:
    factory = trial.placement_group_factory
    return dict(factory.required_resources) if factory is not None else {}


def waits_for(asked: Mapping[str, float]) -> str:
    """Why a trial that asks for these resources, in Ray's words, does not start."""
    wanted = _described(asked)
    nodes = [node["Resources"] for node in _alive()]
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        return f"the nodes with room for a trial ({wanted}) are busy"
    scaling = _autoscaling()
    refused = [gang.requests for gang in scaling.infeasible_gang_resource_requests]
    if any(dict(request.resources_bundle).items() >= asked.items() for gang in refused for request in gang):
        return (
            f"no node that the cluster has or may start has room for a trial ({wanted}); stop, and lower "
            "--cpus-per-trial or --gpus-per-trial, or add a larger node type, and go on with --resume"
        )
    able = [_described(node) for node in nodes if node.get("CPU")]
    have = f"its nodes have {'; '.join(sorted(set(able)))}" if able else "it has no node for trials"
    failed = sorted({one.ray_node_type_name for one in scaling.failed_instance_requests})
    trouble = f"; {', '.join(failed)} could not be started, and `ray status` says why" if failed else ""
    return f"the cluster must grow for a trial ({wanted}), now {have}{trouble}"


def _described(resources: Mapping[str, float]) -> str:
    amounts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    memory = resources.get("memory", 0) / 2**30
    return ", ".join([*amounts, f"{memory:.1f} GB"] if memory else amounts)


def _autoscaling() -> AutoscalingState:
    """What the autoscaler says of itself; nothing, where there is none or one of the first version."""
    reply = GetClusterStatusReply()
    try:
        client = GcsClient(address=ray.get_runtime_context().gcs_address)
        reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_SECONDS))
    except RayError:  # the head is busy, and this is no more than a word
        return AutoscalingState()
    return reply.autoscaling_state
