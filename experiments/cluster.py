"""Ray's machines: joining or starting them, and what they have for trials."""

import logging
import os

import ray
import torch

from experiments.packing import Machine, Node
from experiments.study import Resources


def connect(resources: Resources) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine alone."""
    if ray.is_initialized():
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody but this process connects
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def check_resources(resources: Resources) -> None:
    """Refuse a request that no node can ever meet on this machine, instead of waiting for it without end.

    Raises:
        ValueError: more CPUs or GPUs per trial than there are; not checked on a cluster, which may grow.
    """
    if resources.address or os.environ.get("RAY_ADDRESS"):
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
    nodes = []
    grows = bool(resources.address or os.environ.get("RAY_ADDRESS"))
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
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
