"""The folder of a study: which one a command means, whether it may go on there, and what has ended in it."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis import records
from experiments.study import Study

FINISHED = {"completed", "pruned", "diverged", "oom"}
"""Ends that `--resume` does not run again; a failed trial is tried once more."""


def study_folder(study: Study, options: argparse.Namespace, identity: str) -> Path:
    """Folder of this run.

    Raises:
        FileExistsError: it is a file, holds another study, or holds this one and `--resume` is not given.
        FileNotFoundError: nothing to resume.
    """
    if options.out is None and options.resume:
        found = sorted(path.parent for path in Path("results").glob(f"{study.name}-*/study.json"))
        found = [path for path in found if records.read_study(path).get("plan_id") == identity]
        if not found:
            raise FileNotFoundError(
                "--resume: no folder of this study (same options) in results/; name it with --out"
            )
        return found[-1]
    if options.out is None:
        return Path("results") / f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder: Path = options.out
    if folder.is_file():
        raise FileExistsError(f"--out {folder} is a file; name a folder")
    if not (folder / "study.json").exists():
        if options.resume:
            raise FileNotFoundError(
                f"--resume: {folder} holds no study; leave --resume out to start one there"
            )
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"--out {folder} is not empty and holds no study; choose a new folder")
        return folder
    held = records.read_study(folder)
    if held.get("plan_id") != identity:
        raise FileExistsError(
            f"--out {folder} holds another study ({held['name']}, started by: {held['command']}); "
            "choose another folder"
        )
    if not options.resume:
        raise FileExistsError(
            f"--out {folder} holds this study already; add --resume to go on, or choose another folder"
        )
    return folder


def resumed(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Description of the study that is resumed, as it was begun.

    Raises:
        ValueError: its data have changed since.
    """
    held = records.read_study(folder)
    before, after = held["provenance"], now["provenance"]
    if before["data_sha256"] != after["data_sha256"]:
        raise ValueError(
            f"--resume {folder}: the data are not those the study began with (sha256 "
            f"{after['data_sha256'][:12]}, not {before['data_sha256'][:12]}); restore them, or start anew"
        )
    if before["git_commit"] != after["git_commit"]:
        print(f"note: the study began at commit {before['git_commit']}, this is {after['git_commit']}")
    if held["scheduler"] != "fifo":
        print(f"note: {held['scheduler']} has forgotten earlier trials, so it may decide otherwise now")
    return held


def finished(folder: Path) -> set[str]:
    """Trials whose end has been recorded."""
    return {row["trial"] for row in _ends(folder) if row["status"] in FINISHED}


def finished_arm(folder: Path, arm: str) -> int:
    """Number of an arm's trials whose end has been recorded."""
    starts = {
        row["trial"]: row["arm"]
        for path in files(folder)
        for row in records.read_rows(path)
        if row["kind"] == "start"
    }
    return sum(starts.get(trial) == arm for trial in finished(folder))


def files(folder: Path) -> list[Path]:
    """The files that hold the rows of trials."""
    return sorted((folder / "trials").glob("*.jsonl"))


def _ends(folder: Path) -> list[dict[str, Any]]:
    return [row for path in files(folder) for row in records.read_rows(path) if row["kind"] == "end"]


def last_ends(folder: Path) -> dict[str, dict[str, Any]]:
    """The last end row of every trial that has one, by trial."""
    return {row["trial"]: row for row in _ends(folder)}


def write_study(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write study.json, unless a study that is resumed has it."""
    path = folder / "study.json"
    if not path.exists():
        path.with_suffix(".tmp").write_text(json.dumps(meta, indent=2) + "\n")
        path.with_suffix(".tmp").rename(path)
