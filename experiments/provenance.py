"""Provenance: what a result was made with."""

import hashlib
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "mlflow",
    "pyarrow",
    "numpy",
    "scipy",
    "differentiable-nas",
)


def provenance(data_name: str, data_sha256: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Code, packages, hardware, data and configuration of a study; None where something cannot be known."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain")
    return {
        "git_commit": commit,
        "git_dirty": None if changed is None else bool(changed),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{_cpu()} x {os.cpu_count()}",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "data_name": data_name,
        "data_sha256": data_sha256,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
    }


CODE = ("analysis", "experiments", "nas")
"""Packages of this project that a trial runs, or that read what it recorded."""


@cache
def fingerprint() -> Mapping[str, str | None]:
    """What must be alike wherever trials of one study run: Python, Ray, PyTorch and this project's code.

    The code is that which this process imports, as it was when first asked for.
    """
    digest = hashlib.sha256()
    for package in CODE:
        (root,) = map(Path, importlib.import_module(package).__path__)
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            name = f"{package}/{path.relative_to(root).as_posix()}"
            digest.update(f"{name} {len(content)}\n".encode() + content)
    # A head without a GPU has another build of the same PyTorch: 2.14.1+cpu and 2.14.1+cu130 are alike.
    versions = {name: (_version(name) or "none").partition("+")[0] for name in ("ray", "torch")}
    return {"python": platform.python_version(), **versions, "code": digest.hexdigest()[:12]}


def differences(here: Mapping[str, str | None], there: Mapping[str, str | None]) -> str:
    """What of two fingerprints differs, in words: `torch 2.13.0 instead of 2.14.1`; empty if nothing does."""
    names = [name for name in here if here[name] != there.get(name)]
    return ", ".join(f"{name} {there.get(name)} instead of {here[name]}" for name in names)


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
