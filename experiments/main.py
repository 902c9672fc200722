"""The command line of every experiment: plan, refuse what is wrong, run, record, and say what was found."""

import argparse
import os
import shlex
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from analysis import records
from experiments.conclusion import conclude
from experiments.estimate import describe
from experiments.folder import Past, PausedError, files, held, past, resumed, study_folder, write_study
from experiments.packing import Packing
from experiments.provenance import fingerprint, provenance
from experiments.recorder import Progress, Recorder
from experiments.stopping import FIFO, Rungs, SchedulerName, Stopping
from experiments.study import (
    POLICY,
    SEEDS,
    SHORT,
    Batch,
    Joint,
    Planned,
    Policy,
    Preset,
    Resources,
    Settings,
    Study,
    parse_changes,
    plan,
    resolve,
    retrainings,
    searches,
    settable,
    stages_at,
    study_id,
)
from experiments.tracking import Tracker, default_uri, ui_command
from nas.data import Arrays, Data, load
from nas.footprint import DataShape
from nas.genotype import Genotype
from nas.measures import catalogue
from nas.methods import Method
from nas.papers import PAPERS
from nas.retrain import check_retrain
from nas.searchers import RandomGenotype
from nas.trial import Trial, recorded_metrics

if TYPE_CHECKING:
    from experiments import tune

PAUSED = 3
"""Exit code of a study that cannot write to its folder."""


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
        "--retrain-seeds",
        type=int,
        metavar="N",
        help="search first, then retrain each different genotype N times (default: trials retrain their own)",
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
        help="early stopping (default: none)",
    )
    add(
        "--rungs",
        choices=get_args(Rungs),
        default="retrain_epoch",
        help="what it counts, and so what it compares: retrainings, at equal epochs (default) or at equal "
        "seconds of search and retraining; or searches, of one space and stage each",
    )
    add("--first-rung", type=float, metavar="X", help="where it begins (default: a share of the epochs)")
    add("--last-rung", type=float, metavar="X", help="where it ends (default: the last epoch)")
    add(
        "--random-completion",
        type=float,
        default=0.0,
        metavar="P",
        help="probability with which a trial goes on that asha or median would stop; recorded, so that "
        "correlations can be corrected for what was stopped (0.15 is usual)",
    )
    add(
        "--audit",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the trials, drawn at random, that asha or median let go on to the end",
    )
    add(
        "--primary",
        nargs="+",
        metavar="METRIC",
        help="search metrics (columns of trials.parquet) whose association with the final error is declared "
        f"before there are results; others are exploratory (default: {', '.join(study.primary) or 'none'})",
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
        "--checkpoint-seconds",
        type=float,
        default=POLICY.checkpoint_seconds,
        metavar="S",
        help="work of a trial that a loss may cost, besides its running epoch (default %(default)g)",
    )
    add(
        "--max-failures",
        type=int,
        default=POLICY.max_failures,
        metavar="N",
        help="how often in a row, without a new epoch between, a trial starts again that lost its worker or "
        "node (default %(default)s)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="let GPUs use only algorithms that repeat bit for bit; slower there, nothing on CPUs",
    )
    add(
        "--dry-run",
        action="store_true",
        help="list the trials with their resources, estimate time and disk, and run nothing",
    )
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
    with ExitStack() as lock:
        try:
            job = prepare(study, options)
            if options.resume and not options.dry_run:
                lock.enter_context(held(job.folder))  # before it is read what is left to do
            left = work(job)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        _run_or_tell(job, left, lock)


def _run_or_tell(job: "Job", left: "Work", lock: ExitStack) -> None:
    """Run a study; where it must stop, tell how it goes on."""
    try:
        run(job, left, lock)
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command with --resume --out {job.folder} goes on from here", file=sys.stderr
        )
        raise SystemExit(130) from None
    except PausedError as error:
        print(
            f"\npaused: {error}; what was recorded is kept. Make room, then the same command with "
            f"--resume --out {job.folder} goes on from here",
            file=sys.stderr,
        )
        raise SystemExit(PAUSED) from error


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

    @property
    def stopping(self) -> Stopping:
        """How trials are stopped early."""
        return _stopping(self.options)

    @property
    def policy(self) -> Policy:
        """How the study deals with what is lost."""
        o = self.options
        return Policy(o.checkpoint_seconds, o.max_failures, o.deterministic)


def prepare(study: Study, options: argparse.Namespace) -> Job:
    """Check everything that can be checked before Ray starts; writes nothing.

    Raises:
        ValueError, OSError: what is wrong, in one sentence for the user.
    """
    _check(options)
    if options.paper:
        study = replace(study, base=PAPERS[options.paper])
    if options.primary:
        study = replace(study, primary=tuple(options.primary))
    changes = parse_changes(options.changes)
    objectives = tuple(options.objectives) if study.joint else ()
    settings = Settings(
        options.preset,
        options.data,
        options.seeds,
        options.batch,
        changes,
        _stopping(options),
        objectives,
        options.retrain_seeds,
    )
    # Refuses a wrong field or value before the data is read.
    planned = plan(study, replace(settings, batch="fixed"))
    base = resolve(study.base, settings)
    _check_selection(study, options, base)
    _check_primary(study, base)
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


@dataclass(frozen=True)
class Work:
    """What of a study is left to do."""

    recorded: Mapping[str, Past]
    """What earlier runs recorded, by trial."""
    total: int
    """Trials of the study, without those that only retrain what others found."""
    todo: Sequence[Planned]
    begun: Sequence[Planned]
    """Trials that a joint search chose and that have not ended."""
    remaining: int
    """Trials that a joint search has yet to choose."""


def work(job: Job) -> Work:
    """What is left to do, by what the folder holds.

    Raises:
        ValueError: records that cannot be read.
    """
    recorded = past(job.folder) if job.options.resume else {}
    first = searches(job.planned) if job.settings.retrain_seeds else job.planned
    chosen = [one for one in recorded.values() if one.start["arm"] == "searched"]
    begun = [
        Planned(start["name"], start["arm"], start["axes"], Trial.from_dict(start["config"]))
        for start in (one.start for one in chosen if not one.finished)
    ]
    total = len(first) + job.joint_trials
    return Work(recorded, total, _unfinished(first, recorded), begun, max(0, job.joint_trials - len(chosen)))


def _unfinished(planned: Sequence[Planned], recorded: Mapping[str, Past]) -> list[Planned]:
    return [p for p in planned if not (p.trial.id in recorded and recorded[p.trial.id].finished)]


def _epochs(recorded: Mapping[str, Past]) -> dict[str, int]:
    return {trial: one.epochs for trial, one in recorded.items()}


def run(job: Job, left: Work, lock: ExitStack) -> None:
    """Run what is left of a study, to its claims; `lock` keeps other processes from it until it is closed."""
    # Ray takes seconds to import, so wrong input is refused before.
    from experiments import cluster, tune, worker

    options, folder = job.options, job.folder
    count = len(left.todo) + len(left.begun) + left.remaining
    print(job.study.question)
    print(f"{left.total} trials, {left.total - count} finished before, in {folder}")
    try:
        cluster.connect(job.resources)
        cluster.check_resources(job.resources)
        cluster.check_nodes(job.resources)
        packing = Packing(job.resources, cluster.machine(job.resources), job.shape, _images_mb(job.arrays))
        possible = [*left.todo, *left.begun, *(tune.corners(_joint(job)) if left.remaining else [])]
        if left.remaining:
            print(f"counting the memory of {len(possible)} configurations, which takes a second or more each")
        said = packing.describe(possible, count) if possible else []
        print("\n".join(said))
        if options.dry_run:
            print("\n".join(_foreseen(job, left, packing)))
            return
        if not options.resume:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(held(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    shutil.rmtree(folder / "tune", ignore_errors=True)  # what a killed driver left; nothing is read from it
    write_study(folder, {**job.meta, "packing": said})
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(folder)
    tracker = Tracker(uri, records.read_study(folder), folder)
    tracker.open()
    progress = Progress([*left.todo, *left.begun], job.base, left.remaining, _epochs(left.recorded))
    recorder = Recorder(folder, tracker, progress, repeats=options.scheduler != "pbt")
    data = {worker.data_key(job.base): job.arrays}
    alike = fingerprint() if cluster.joined(job.resources) else None
    place = tune.Place(packing, data, recorder, folder, job.policy, alike)
    # Rungs lie in one of two phases; in the other, trials have nothing to compare.
    of_searches = not job.settings.retrain_seeds or job.stopping.rungs == "search_epoch"
    try:
        if left.todo:
            tune.run_planned(left.todo, place, job.stopping if of_searches else FIFO, _rows(folder))
        if job.settings.retrain_seeds:
            _retrain(job, place, recorder)
        if left.begun or left.remaining:
            tune.run_joint(_joint(job), left.begun, left.remaining, options.objectives, place)
    except PausedError:
        tracker.close()
        raise
    except BaseException:
        _end(folder, tracker, page=False)  # an interrupted study keeps nobody waiting
        raise
    _end(folder, tracker)
    for name in ("checkpoints", "tune"):
        with suppress(OSError):  # of trials that may be tried again there is still something to keep
            (folder / name).rmdir()
    print(f"\nMLflow  {ui_command(uri, tracker.link())}")
    if any(one.status == "failed" for one in past(folder).values()):
        raise SystemExit(1)


def _end(folder: Path, tracker: Tracker, *, page: bool = True) -> None:
    """Tables, figures and claims of what there is, also for the tracker, which is closed whatever fails."""
    artifacts: list[Path] = []
    text = ""
    try:
        artifacts, text = conclude(folder, page=page)
    finally:
        tracker.close(artifacts, text)


def _retrain(job: Job, place: "tune.Place", recorder: Recorder) -> None:
    """The second phase of a study that retrains each different genotype, however often it was found."""
    from experiments import tune

    recorded = past(job.folder)
    planned = _retrainings(job, recorded)
    todo = _unfinished(planned, recorded)
    print(
        f"{len({p.axes['genotype'] for p in planned})} different genotypes found by "
        f"{len({each for p in planned for each in p.found_by})} searches; {len(planned)} retrainings, "
        f"{len(planned) - len(todo)} finished before"
    )
    if todo:
        print("\n".join(place.packing.describe(todo, len(todo))))
        recorder.progress = Progress(todo, job.base, 0, _epochs(recorded))
        stopping = FIFO if job.stopping.rungs == "search_epoch" else job.stopping
        tune.run_planned(todo, place, stopping, _rows(job.folder))


def _retrainings(job: Job, recorded: Mapping[str, Past]) -> list[Planned]:
    """Retrainings of what has been found so far."""
    texts = {trial: one.genotype for trial, one in recorded.items() if one.status == "completed"}
    found = {trial: Genotype.parse(text) for trial, text in texts.items() if text is not None}
    return retrainings(job.planned, found, job.settings.retrain_seeds or 0)


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What schedulers ask of the rows recorded so far: thousands of trials have gigabytes of the rest."""
    for row in chain.from_iterable(map(records.read_rows, files(folder))):
        if row["kind"] == "epoch":
            metrics = {name: row["metrics"].get(name) for name in ("valid_error", "seconds")}
            yield {**row, "metrics": metrics, "genotype": None}
        else:
            yield row


def _foreseen(job: Job, left: Work, packing: Packing) -> list[str]:
    """What is left of a study, trial by trial, and what it will take."""
    chosen = [Planned(f"searched {number}", "searched", {}, job.base) for number in range(left.remaining)]
    apart: list[Planned] = []
    if job.settings.retrain_seeds:
        apart += _unfinished(_retrainings(job, left.recorded), left.recorded)
        open_searches = {p.name for p in left.todo}
        for p in job.planned:
            if p.name in open_searches:
                # At most: it may find what another has found.
                found = replace(
                    p.trial, method=Method(searcher=RandomGenotype()), search=(), measure=(), measure_every=1
                )
                for seed in range(job.settings.retrain_seeds):
                    name = f"what {p.name} finds, retrain={seed}"
                    trial = replace(found, seeds=replace(p.trial.seeds, retrain=seed))
                    apart.append(Planned(name, "retrained", {}, trial))
    trials = [*left.todo, *left.begun, *chosen, *apart]
    if not trials:
        return ["nothing is left to run"]
    device = torch.device("cuda" if packing.share(job.base).gpus and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(packing.share(job.base).threads)
    return describe(trials, packing, job.arrays, device)


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
    Policy(options.checkpoint_seconds, options.max_failures)
    if getattr(options, "trials", None) is not None and options.trials < 1:
        raise ValueError(f"--trials {options.trials} must be at least 1")


def _check_selection(study: Study, options: argparse.Namespace, base: Trial) -> None:
    """Refuse a scheduler that cannot decide, and a choice without validation data to base it on."""
    name = options.scheduler
    if name != "fifo" and base.retrain.epochs < 2:
        raise ValueError(
            f"--scheduler {name} compares retraining epochs, and {base.retrain.epochs} is too few; use fifo"
        )
    stopping = _stopping(options)
    stages = [stage.epochs for stage in base.search]
    stopping.check(max(stages, default=1) if stopping.rungs == "search_epoch" else base.retrain.epochs)
    if study.joint and name != "fifo":
        raise ValueError(
            f"--scheduler {name}: Optuna would take the error of a trial stopped early for its last; use fifo"
        )
    if options.retrain_seeds is not None:
        if options.retrain_seeds < 1:
            raise ValueError(f"--retrain-seeds {options.retrain_seeds} must be at least 1")
        if study.joint or name == "pbt":
            other = (
                "a joint search learns from each trial's own retraining"
                if study.joint
                else ("--scheduler pbt copies trials, and those retrained apart differ in their genotypes")
            )
            raise ValueError(f"--retrain-seeds {options.retrain_seeds}: {other}; leave it out")
    if study.joint and options.batch != "fixed":
        raise ValueError(
            f"--batch {options.batch} matches the arms of a sweep, and a joint search has none; use fixed"
        )
    chooser = "a joint search" if study.joint else f"--scheduler {options.scheduler}"
    if (study.joint or options.scheduler != "fifo") and base.data.valid == 0:
        raise ValueError(
            f"{chooser} compares validation errors, but this recipe holds no image out; "
            "add --set data.valid=0.1"
        )


def _check_primary(study: Study, base: Trial) -> None:
    """Refuse to declare a metric that no trial will record."""
    known = recorded_metrics(base)
    for name in study.primary:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            raise ValueError(
                f"--primary {name}: trials of this study do not record it; name metrics that they do"
                + (f" ({', '.join(close)}, ...)" if close else "")
                + f", or have it measured: --set measure=..., now {','.join(base.measure) or 'nothing more'}"
            )


def _stopping(options: argparse.Namespace) -> Stopping:
    return Stopping(
        scheduler=options.scheduler,
        rungs=options.rungs,
        first=options.first_rung,
        last=options.last_rung,
        random_completion=options.random_completion,
        audit=options.audit,
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


def _counts(study: Study, options: argparse.Namespace, planned: Sequence[Planned]) -> dict[str, int]:
    """Trials by arm that are to run: what a report counts those against that never started.

    Where genotypes are retrained apart these are the searches, however often what they find is retrained.
    """
    trials = searches(planned) if options.retrain_seeds else planned
    counts = Counter({p.trial.id: p.arm for p in trials}.values())
    return ({"searched": _joint_trials(study, options)} if study.joint else {}) | counts


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
        "planned": _counts(study, options, planned),
        "joint": bool(study.joint),
        "scheduler": options.scheduler,
        "stopping": asdict(_stopping(options)),
        "batch": options.batch,
        "retrain_seeds": options.retrain_seeds,
        "threads": max(1, int(options.cpus_per_trial or 1)),
        "deterministic": options.deterministic,
        "metrics": catalogue(
            base.measure, stops=any(t.method.stop is not None for t in (base, *(p.trial for p in planned)))
        ),
        # Written before there is a result: what a report tests as declared.
        "primary_metrics": list(study.primary),
        "provenance": provenance(arrays.name, arrays.sha256, base.to_dict()),
    }
