"""The command line of every experiment: plan, refuse what is wrong, run, record, and say what was found."""

import argparse
import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from experiments.conclusion import conclude
from experiments.folder import finished, finished_arm, last_ends, resumed, study_folder, write_study
from experiments.packing import Packing
from experiments.provenance import provenance
from experiments.recorder import Progress, Recorder
from experiments.study import (
    SEEDS,
    SHORT,
    Batch,
    Joint,
    Planned,
    Preset,
    Resources,
    SchedulerName,
    Settings,
    Study,
    parse_changes,
    plan,
    resolve,
    settable,
    stages_at,
    study_id,
)
from experiments.tracking import Tracker, default_uri, ui_command
from nas.data import Arrays, Data, load
from nas.footprint import DataShape
from nas.papers import PAPERS
from nas.retrain import check_retrain
from nas.trial import Trial


def parser(study: Study) -> argparse.ArgumentParser:
    """The options that all experiments share, and those of a joint search where the study is one."""
    options = argparse.ArgumentParser(
        description=study.question,
        epilog="\n  ".join(["fields for --set:", *settable(study, Settings()), *_short_names()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add(
        "--preset",
        choices=get_args(Preset),
        default="laptop",
        help="size: seconds, minutes on digits (default), as published",
    )
    add(
        "--data",
        metavar="NAME|PATH",
        help="digits, cifar10, cifar100, fashion_mnist, an image folder, a Parquet file or folder",
    )
    add("--paper", choices=PAPERS, help="search and retrain as this paper instead of the study's own")
    add(
        "--seeds",
        type=int,
        metavar="N",
        help=f"seeds of each arm (default {', '.join(f'{k} {v}' for k, v in SEEDS.items())})",
    )
    add(
        "--batch",
        choices=get_args(Batch),
        default="fixed",
        help="search batch when K changes: one for all, or of equal memory",
    )
    add(
        "--scheduler",
        choices=get_args(SchedulerName),
        default="fifo",
        help="early stopping; counts retraining epochs only (default: none)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        dest="changes",
        help="change fields, listed below",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the study (default: results/NAME-TIME)")
    add("--tracking-uri", metavar="URI", help="MLflow store (default: sqlite beside the study's folder)")
    add("--address", metavar="ADDR", help="Ray cluster, e.g. auto; default RAY_ADDRESS, else this machine")
    add(
        "--cpus-per-trial",
        type=float,
        metavar="X",
        help="cores of a trial, also its threads (default 1, and as many trials at once as fit)",
    )
    add(
        "--gpus-per-trial",
        type=float,
        metavar="X",
        help="GPUs of a trial, fractions like 0.5 allowed; 0 runs on CPUs (default: the share of one that a "
        "trial fits on, where there are GPUs)",
    )
    add("--max-concurrent", type=int, metavar="N", help="trials at once, at most")
    add(
        "--resume", action="store_true", help="go on with the study in --out, or with the latest of this name"
    )
    if study.joint:
        add(
            "--trials",
            type=int,
            default=None,
            metavar="N",
            help="configurations that Optuna tries (default tiny 4, else 24)",
        )
        add(
            "--objectives",
            nargs="+",
            choices=("error", "params"),
            default=["error"],
            help="what to minimise (default error)",
        )
    return options


def _short_names() -> list[str]:
    return [f"{short} is short for {name}" for short, name in SHORT.items()]


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
    """Run `study` as the command line says; wrong input ends it with one sentence and exit code 2."""
    options = parser(study).parse_args(arguments)
    try:
        job = prepare(study, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        run(job)
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command with --resume --out {job.folder} goes on from here", file=sys.stderr
        )
        raise SystemExit(130) from None


@dataclass(frozen=True)
class Job:
    """A study that nothing is known to be wrong with, ready to run."""

    study: Study
    settings: Settings
    options: argparse.Namespace
    base: Trial
    planned: Sequence[Planned]
    joint_trials: int
    arrays: Arrays
    shape: DataShape
    folder: Path
    meta: Mapping[str, Any]

    @property
    def resources(self) -> Resources:
        """What the study may use."""
        o = self.options
        return Resources(o.address, o.cpus_per_trial, o.gpus_per_trial, o.max_concurrent)


def prepare(study: Study, options: argparse.Namespace) -> Job:
    """Check everything that can be checked before Ray starts; writes nothing.

    Raises:
        ValueError, OSError: what is wrong, in one sentence for the user.
    """
    _check(options)
    if options.paper:
        study = replace(study, base=PAPERS[options.paper])
    changes = parse_changes(options.changes)
    objectives = tuple(options.objectives) if study.joint else ()
    settings = Settings(
        options.preset, options.data, options.seeds, options.batch, changes, options.scheduler, objectives
    )
    # Refuses a wrong field or value before the data is read.
    planned = plan(study, replace(settings, batch="fixed"))
    base = resolve(study.base, settings)
    _check_selection(study, options, base)
    arrays = load(base.data)
    shape = _check_data(arrays, base, planned)
    planned = plan(study, settings, shape)
    identity = study_id(study, settings, planned)
    folder = study_folder(study, options, identity)
    joint_trials = _joint_trials(study, options)
    meta = _describe(study, options, base, planned, arrays, identity)
    if options.resume:
        meta = resumed(folder, meta)
    return Job(study, settings, options, base, planned, joint_trials, arrays, shape, folder, meta)


def run(job: Job) -> None:
    """Run a study from its first trial to its claims."""
    # Ray takes seconds to import, so wrong input is refused before.
    from experiments import cluster, tune, worker

    options, folder = job.options, job.folder
    done = finished(folder) if options.resume else set()
    todo = [p for p in job.planned if p.trial.id not in done]
    remaining = job.joint_trials - (finished_arm(folder, "searched") if options.resume else 0)
    print(job.study.question)
    print(f"{len(job.planned) + job.joint_trials} trials, {len(done)} finished before, in {folder}")
    try:
        cluster.connect(job.resources)
        cluster.check_resources(job.resources)
        packing = Packing(job.resources, cluster.machine(job.resources), job.shape, _images_mb(job.arrays))
        possible = [*todo, *(tune.corners(_joint(job)) if remaining > 0 else [])]
        if remaining > 0:
            print(f"counting the memory of {len(possible)} configurations, which takes a second or more each")
        said = packing.describe(possible, len(todo) + max(0, remaining)) if possible else []
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print("\n".join(said))
    folder.mkdir(parents=True, exist_ok=True)
    write_study(folder, {**job.meta, "packing": said})
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(folder)
    tracker = Tracker(uri, job.meta, folder)
    tracker.open()
    recorder = Recorder(folder, tracker, Progress(todo, job.base, max(0, remaining)))
    place = tune.Place(packing, {worker.data_key(job.base): job.arrays}, recorder, folder)
    try:
        if todo:
            restore = tune.newest_checkpoints(folder, [p.trial.id for p in todo]) if options.resume else {}
            tune.run_planned(todo, place, "fifo" if job.study.joint else options.scheduler, restore)
        if remaining > 0:
            tune.run_joint(_joint(job), remaining, options.objectives, place)
    finally:
        artifacts, text = conclude(folder)
        tracker.close(artifacts, text)
    print(f"\nMLflow  {ui_command(uri, tracker.link())}")
    if any(row["status"] == "failed" for row in last_ends(folder).values()):
        raise SystemExit(1)


def _images_mb(arrays: Arrays) -> float:
    """Size of the images in memory; those that are streamed take none."""
    held = (arrays.train_images, arrays.test_images)
    return sum(images.nbytes for images in held if isinstance(images, np.ndarray)) / 2**20


def _joint(job: Job) -> Joint:
    named = {
        axis: {
            name: {"search": stages_at(job.study, job.settings, stages)} for name, stages in values.items()
        }
        for axis, values in job.study.named.items()
    }
    return Joint(Planned("searched", "searched", {}, job.base), job.study.joint, named)


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers that cannot work, before anything is read."""
    if options.cpus_per_trial is not None and options.cpus_per_trial <= 0:
        raise ValueError(f"--cpus-per-trial {options.cpus_per_trial:g} must be above 0")
    gpus = options.gpus_per_trial or 0.0
    if gpus < 0 or (0 < gpus < 1 and gpus * int(1 / gpus) < 0.98) or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(
            f"--gpus-per-trial {gpus:g} must be 0, a whole number, or one over a whole number, e.g. 0.5"
        )
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise ValueError(f"--max-concurrent {options.max_concurrent} must be at least 1")
    if getattr(options, "trials", None) is not None and options.trials < 1:
        raise ValueError(f"--trials {options.trials} must be at least 1")


def _check_selection(study: Study, options: argparse.Namespace, base: Trial) -> None:
    """Refuse a scheduler that cannot decide, and a choice without validation data to base it on."""
    name = options.scheduler
    if name != "fifo" and base.retrain.epochs < 2:
        raise ValueError(
            f"--scheduler {name} compares retraining epochs, and {base.retrain.epochs} is too few; use fifo"
        )
    if study.joint and name != "fifo":
        raise ValueError(
            f"--scheduler {name}: Optuna would take the error of a trial stopped early for its last; use fifo"
        )
    if study.joint and options.batch != "fixed":
        raise ValueError(
            f"--batch {options.batch} matches the arms of a sweep, and a joint search has none; use fixed"
        )
    if name == "pbt" and not hasattr(base.retrain.lr, "start"):
        raise ValueError("--scheduler pbt changes retrain.lr.start, which this schedule lacks; use a cosine")
    chooser = "a joint search" if study.joint else f"--scheduler {options.scheduler}"
    if (study.joint or options.scheduler != "fifo") and base.data.valid == 0:
        raise ValueError(
            f"{chooser} compares validation errors, but this recipe holds no image out; "
            "add --set data.valid=0.1"
        )


def _check_data(arrays: Arrays, base: Trial, planned: Sequence[Planned]) -> DataShape:
    """Shape of the images, once they are known to fit the trial."""
    data = Data(arrays, base.data, base.seeds.split, torch.device("cpu"))
    for trial in [base, *(p.trial for p in planned)]:
        check_retrain(trial.retrain, data.image_size)
        for augment in (*(stage.augment for stage in trial.search), trial.retrain.augment):
            data.check(augment)
    return DataShape(data.channels, data.image_size, data.classes)


def _joint_trials(study: Study, options: argparse.Namespace) -> int:
    if not study.joint:
        return 0
    default = 4 if options.preset == "tiny" else 24
    return int(options.trials if options.trials is not None else default)


def _describe(
    study: Study,
    options: argparse.Namespace,
    base: Trial,
    planned: Sequence[Planned],
    arrays: Arrays,
    identity: str,
) -> dict[str, Any]:
    arms = list(dict.fromkeys(p.arm for p in planned))
    if study.joint:
        arms.insert(0, "searched")
    return {
        "schema": 1,
        # Two runs of one plan are two studies, which MLflow keeps apart.
        "study_id": uuid.uuid4().hex[:12],
        "plan_id": identity,
        "name": study.name,
        "note": study.note or None,
        "question": study.question,
        "preset": options.preset,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "axis": study.axes[0].name if len(study.axes) == 1 else None,
        "reference": study.reference,
        "baseline": "random" if study.baseline else None,
        "arms": arms,
        "joint": bool(study.joint),
        "scheduler": options.scheduler,
        "batch": options.batch,
        "provenance": provenance(arrays.name, arrays.sha256, base.to_dict()),
    }
