"""The folder of a study: which one a command means, whether it may go on there, and what has ended in it."""

import argparse
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import records
from experiments.study import Study

SETTLED = {"completed", "pruned", "diverged", "oom"}
"""Ends that `--resume` does not run again; a failed trial is tried once more."""


class PausedError(OSError):
    """A study stops, for nothing more can be written to its folder; what was recorded is kept."""


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
    told = {name: (held.get(name), now.get(name)) for name in ("threads", "deterministic")}
    told |= {
        name: (version, after.get("packages", {}).get(name))
        for name, version in before.get("packages", {}).items()
    }
    for name, (then, here) in told.items():
        if then != here:
            print(f"note: the study began with {name} {then}, this has {here}: the last bits may differ")
    declared, named = (each.get("primary_metrics") or [] for each in (held, now))
    if declared != named:
        print(
            f"note: primary metrics are those declared at the start ({', '.join(declared) or 'none'}), not "
            f"{', '.join(named) or 'none'}: what is declared once there may be results is exploratory"
        )
    if held["scheduler"] in ("hyperband", "pbt"):
        print(f"note: {held['scheduler']} compares trials of one run, so it may decide otherwise now")
    return held


@dataclass(frozen=True)
class Past:
    """What earlier runs recorded of one trial."""

    start: dict[str, Any]
    """Its last start row."""
    status: str | None
    """How it ended; None while it has not."""
    epochs: int
    """Epochs recorded, each counted once."""
    genotype: str | None
    """What it ended with."""

    @property
    def finished(self) -> bool:
        """Whether `--resume` leaves it alone."""
        return self.status in SETTLED


def past(folder: Path) -> dict[str, Past]:
    """What earlier runs recorded, by trial."""
    found = {}
    for path in files(folder):
        rows = records.read_rows(path)
        starts = [row for row in rows if row["kind"] == "start"]
        if starts:
            epochs = {(row["stage"], row["epoch"]) for row in rows if row["kind"] == "epoch"}
            status = genotype = None
            for row in rows:
                if row["kind"] == "end":
                    status, genotype = row["status"], row["genotype"]
                elif row["kind"] == "start" and status != "completed":
                    status = None  # it was tried again
            found[path.stem] = Past(starts[-1], status, len(epochs), genotype)
    return found


def files(folder: Path) -> list[Path]:
    """The files that hold the rows of trials."""
    return sorted((folder / "trials").glob("*.jsonl"))


def write_study(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write study.json, unless a study that is resumed has it."""
    path = folder / "study.json"
    if not path.exists():
        path.with_suffix(".tmp").write_text(json.dumps(meta, indent=2) + "\n")
        path.with_suffix(".tmp").rename(path)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Context in which no other process can run the study of `folder`; a killed one holds it no more.

    Raises:
        FileExistsError: another process runs it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{folder} is being run by another process; wait for its end, or stop it"
            ) from error
        except OSError as error:
            raise OSError(
                f"{folder} lies on a file system without locks ({error}), where two processes could run one "
                "study; choose another --out"
            ) from error
        yield
