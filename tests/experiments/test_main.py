"""The command line: what it refuses, before anything is written, and what it says and keeps of a run."""

import io
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from analysis import records, report
from experiments import (
    ablate_pc_darts,
    conclusion,
    packing,
    recorder,
    sweep_depths,
    sweep_edge_norm,
    sweep_joint,
    sweep_k,
)
from experiments import main as command
from experiments.folder import PausedError, held
from experiments.main import Job, main, parser, prepare
from experiments.packing import Machine, Node
from experiments.provenance import PACKAGES, provenance
from experiments.recorder import Progress
from experiments.stopping import Stopping
from experiments.study import SHORT, Joint, Planned, Resources, Settings, Study, plan, settable
from nas.footprint import Footprint, Peak
from nas.published import PUBLISHED

GENOTYPE = str(PUBLISHED["PC_DARTS_cifar"])
TINY = ("--preset", "tiny", "--seeds", "1")
CONCLUDE = command.conclude
REPORT = conclusion._report


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ready(*arguments: str, study: Study = sweep_k.STUDY) -> Job:
    """What passes the checks, with two arguments that make it quick."""
    return prepare(study, parser(study).parse_args([*TINY, *arguments]))


@dataclass(frozen=True)
class Refusal:
    """How a wrong command line ends."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    tmp_path: Path

    def __call__(self, *arguments: str, study: Study = sweep_k.STUDY) -> str:
        """What stderr says; the exit code is 2 and nothing was written."""
        self.monkeypatch.setattr(command, "run", lambda job: pytest.fail("it was not refused"))
        before = {path: path.stat().st_mtime_ns for path in self.tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as end:
            main(study, [*TINY, *arguments])
        assert end.value.code == 2
        assert {path: path.stat().st_mtime_ns for path in self.tmp_path.rglob("*")} == before
        said = self.capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        return said.err


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refusal:
    return Refusal(capsys, monkeypatch, tmp_path)


# Fields and values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("retrain.epoch=3",), "RetrainStage has no field 'epoch'; it has epochs, cells, channels"),
        (("optimizer.lr=3",), "no such field; they begin with space, data, method, search, retrain, seeds"),
        (("retrain.epochs=0",), "epochs=0 must be at least 1"),
        (("retrain.lr.start=fast",), "retrain.lr.start='fast' must be float"),
        (("K=2",), "--set method.supernet.partial_channels: the study sweep_k varies K itself; leave it out"),
        (
            ("search.*.channels=12",),
            "partial_channels=8 does not divide channels=12; use one of 1, 2, 3, 4, 6, 12",
        ),
        (("retrain.epochs",), "--set 'retrain.epochs' is not of the form field=value"),
        (("M=1", "M=2"), "method.searcher.max_skip is given twice; give it once"),
        (("data.weights_share=1",), "weights_share=1 leaves no images to learn the architecture from"),
        (("retrain.auxiliary_weight=0.4",), "add --set retrain.auxiliary_weight=0"),
        (("data.limit=5",), "has no training image of class"),
    ],
)
def test_a_wrong_change_is_refused(refusal: Refusal, changes: Sequence[str], message: str) -> None:
    assert message in refusal("--set", *changes)


def test_a_k_that_does_not_divide_is_refused(refusal: Refusal) -> None:
    said = refusal("--set", "K=3", study=sweep_edge_norm.STUDY)
    assert said == "error: partial_channels=3 does not divide channels=8; use one of 1, 2, 4, 8\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "--seeds 0 must be at least 1"),
        (("--preset", "huge"), "argument --preset: invalid choice: 'huge'"),
        (("--scheduler", "best"), "argument --scheduler: invalid choice: 'best'"),
        (("--trials", "4"), "unrecognized arguments: --trials 4"),  # a grid has as many as it has
        (("--cpus-per-trial", "0"), "--cpus-per-trial 0 must be above 0"),
        (("--max-concurrent", "0"), "--max-concurrent 0 must be at least 1"),
        (
            ("--primary", "search_valid_eror"),
            "--primary search_valid_eror: trials of this study do not record it; name metrics that they do "
            "(search_valid_error,",
        ),
        (("--primary", "proxy_snip"), "or have it measured: --set measure=..., now nothing more"),
    ],
)
def test_a_wrong_option_is_refused(refusal: Refusal, arguments: Sequence[str], message: str) -> None:
    assert message in refusal(*arguments)


@pytest.mark.parametrize("gpus", ["-1", "0.4", "0.6", "1.5"])
def test_a_share_of_gpus_that_does_not_pack_is_refused(refusal: Refusal, gpus: str) -> None:
    said = refusal("--gpus-per-trial", gpus)
    assert (
        said
        == f"error: --gpus-per-trial {gpus} must be 0, a whole number, or one over a whole number, e.g. 0.5\n"
    )


@pytest.mark.parametrize("gpus", [0.0, 0.25, 0.33, 0.5, 1.0, 2.0])
def test_a_share_of_gpus_that_packs_is_taken(gpus: float) -> None:
    assert ready("--gpus-per-trial", str(gpus)).resources.gpus_per_trial == gpus


def test_arms_with_other_stages_have_no_common_batch(refusal: Refusal) -> None:
    said = refusal("--batch", "memory_matched", study=sweep_depths.STUDY)
    assert "this study varies them, use fixed" in said


def test_another_paper_takes_the_place_of_the_study_s_own() -> None:
    job = ready("--paper", "p_darts")
    assert [p.arm for p in job.planned] == ["K=1", "K=2", "K=4", "K=8", "random"]
    for p in job.planned[:-1]:
        assert len(p.trial.search) == 3
        assert p.trial.method.searcher.max_skip == 2
    assert job.meta["plan_id"] != ready().meta["plan_id"]


def test_an_unknown_paper_is_refused(refusal: Refusal) -> None:
    assert "argument --paper: invalid choice: 'nasnet'" in refusal("--paper", "nasnet")


# Data


def parquet(path: Path, labels: Sequence[int], names: Sequence[str] | None = None) -> Path:
    """Grey images of 8x8 pixels with these labels."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(content, "PNG")
    images = pa.array([content.getvalue()] * len(labels), pa.binary())
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names is not None:
        table = table.replace_schema_metadata({"class_names": ",".join(names)})
    pq.write_table(table, path)
    return path


def test_an_unknown_data_set_is_refused(refusal: Refusal) -> None:
    said = refusal("--data", "cifar11")
    assert "source='cifar11' is neither a known data set nor an existing path; use digits, cifar10" in said


def test_data_that_may_not_be_fetched_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    said = refusal("--data", "cifar10", "--set", "data.download=false", f"data.root={tmp_path / 'none'}")
    assert "download=False forbids fetching it" in said
    assert "download=True)" in said  # the command that fetches it elsewhere


def test_an_empty_data_file_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    path = parquet(tmp_path / "empty.parquet", [])
    assert f"{path} holds no rows; give a source with images" in refusal("--data", str(path))


def test_an_unreadable_data_file_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "torn.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    assert f"{path} cannot be read as Parquet" in refusal("--data", str(path))


def test_an_unreadable_image_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "animals" / name / f"{number}.png").write_bytes(b"not a picture")
    assert "is not a readable image" in refusal("--data", str(tmp_path / "animals"), "--set", "data.test=0.5")


def test_labels_out_of_range_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    named = parquet(tmp_path / "named.parquet", [0, 1, 2], names=("cat", "dog"))
    assert f"{named} row 2 holds label=2, outside 0..1 for the 2 classes" in refusal("--data", str(named))
    gap = parquet(tmp_path / "gap.parquet", [0, 1, 3])
    assert "labels must be 0, 1, ... with none missing: renumber them" in refusal("--data", str(gap))


def test_a_file_that_may_not_be_read_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: object) -> None:
        raise PermissionError(13, "Permission denied", "images")

    monkeypatch.setattr(command, "load", load)
    assert refusal("--data", "images") == "error: [Errno 13] Permission denied: 'images'\n"


# Schedulers and joint searches


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt"])
def test_a_scheduler_needs_validation_images(refusal: Refusal, name: str) -> None:
    said = refusal("--scheduler", name, "--set", "data.valid=0")
    assert f"--scheduler {name} compares validation errors, but this recipe holds no image out" in said
    assert "add --set data.valid=0.1" in said


def test_the_published_recipe_has_none_to_offer(refusal: Refusal) -> None:
    assert "add --set data.valid=0.1" in refusal("--preset", "paper", "--scheduler", "asha")


def test_a_scheduler_needs_epochs_to_compare(refusal: Refusal) -> None:
    said = refusal("--scheduler", "asha", "--set", "retrain.epochs=1")
    assert said == "error: --scheduler asha compares retraining epochs, and 1 is too few; use fifo\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "pbt"), "--scheduler pbt: Optuna would take the error of a trial stopped early"),
        (("--scheduler", "asha"), "for its last; use fifo"),
        (
            ("--set", "data.valid=0"),
            "a joint search compares validation errors, but this recipe holds no image",
        ),
        (("--trials", "0"), "--trials 0 must be at least 1"),
        (("--objectives", "test_error"), "argument --objectives: invalid choice: 'test_error'"),
        (("--batch", "memory_matched"), "--batch memory_matched matches the arms of a sweep"),
        (("--set", "K=2"), "the study sweep_joint varies K itself"),
    ],
)
def test_a_joint_search_refuses_what_it_cannot_do(
    refusal: Refusal, arguments: Sequence[str], message: str
) -> None:
    assert message in refusal(*arguments, study=sweep_joint.STUDY)


def test_a_joint_search_tries_fewer_configurations_when_tiny() -> None:
    assert ready(study=sweep_joint.STUDY).joint_trials == 4
    assert ready("--preset", "laptop", study=sweep_joint.STUDY).joint_trials == 24
    assert ready("--trials", "7", study=sweep_joint.STUDY).joint_trials == 7
    assert ready().joint_trials == 0


# Folders


def begun(folder: Path, *arguments: str, study: Study = sweep_k.STUDY) -> Job:
    """A folder as a run that stopped at once leaves it."""
    job = ready(*arguments, study=study)
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(job.meta))
    return job


def test_a_folder_of_another_study_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    begun(tmp_path / "held", study=sweep_edge_norm.STUDY)
    for more in ((), ("--resume",)):
        said = refusal("--out", "held", *more)
        assert "--out held holds another study (sweep_edge_norm, started by: python " in said
        assert "choose another folder" in said


@pytest.mark.parametrize(
    "more", [("--set", "retrain.epochs=4"), ("--scheduler", "asha"), ("--seeds", "2"), ("--preset", "laptop")]
)
def test_a_study_with_another_setting_is_another_study(
    refusal: Refusal, tmp_path: Path, more: Sequence[str]
) -> None:
    begun(tmp_path / "held")
    assert "--out held holds another study" in refusal("--out", "held", "--resume", *more)


def test_a_folder_of_this_study_is_only_resumed_on_request(refusal: Refusal, tmp_path: Path) -> None:
    begun(tmp_path / "held")
    said = refusal("--out", "held")
    assert (
        said
        == "error: --out held holds this study already; add --resume to go on, or choose another folder\n"
    )
    assert ready("--out", "held", "--resume").folder == Path("held")


@pytest.mark.parametrize("option", [("--max-concurrent", "1"), ("--cpus-per-trial", "2")])
def test_a_study_may_go_on_with_other_resources(tmp_path: Path, option: Sequence[str]) -> None:
    begun(tmp_path / "held")
    assert ready("--out", "held", "--resume", *option).folder == Path("held")


def test_a_joint_search_may_go_on_to_more_trials(tmp_path: Path) -> None:
    begun(tmp_path / "held", "--trials", "2", study=sweep_joint.STUDY)
    more = ready("--trials", "5", "--out", "held", "--resume", study=sweep_joint.STUDY)
    assert more.joint_trials == 5


def test_a_folder_with_something_else_in_it_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").touch()
    assert "--out held is not empty and holds no study; choose a new folder" in refusal("--out", "held")


def test_a_study_does_not_go_on_with_other_data(refusal: Refusal, tmp_path: Path) -> None:
    path = parquet(tmp_path / "images.parquet", [0, 1] * 20)
    begun(tmp_path / "held", "--data", str(path))
    parquet(path, [0, 1] * 21)
    said = refusal("--data", str(path), "--out", "held", "--resume")
    assert "--resume held: the data are not those the study began with (sha256 " in said
    assert "restore them, or start anew" in said


def test_a_study_that_goes_on_stays_the_study_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = begun(tmp_path / "held", "--scheduler", "hyperband")
    assert capsys.readouterr().out == ""
    told = {"git_commit": "c0ffee", "data_sha256": first.arrays.sha256}
    monkeypatch.setattr(command, "provenance", lambda *_: told)
    again = ready("--scheduler", "hyperband", "--out", "held", "--resume")
    assert again.meta == first.meta
    said = capsys.readouterr().out
    assert f"note: the study began at commit {first.meta['provenance']['git_commit']}, this is c0ffee" in said
    assert "note: hyperband compares trials of one run" in said


def test_two_runs_of_one_plan_are_two_studies() -> None:
    one, two = ready(), ready()
    assert one.meta["plan_id"] == two.meta["plan_id"]
    assert one.meta["study_id"] != two.meta["study_id"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ready("--out", "empty").folder == Path("empty")


def test_a_file_is_no_folder(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for more in ((), ("--resume",)):
        assert "--out file is a file; name a folder" in refusal("--out", "file", *more)


def test_a_torn_study_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "study.json").write_text('{"schema": 1,')
    assert "study.json is not a JSON object" in refusal("--out", "held", "--resume")


def test_there_must_be_something_to_resume(refusal: Refusal) -> None:
    said = refusal("--out", "nowhere", "--resume")
    assert said == "error: --resume: nowhere holds no study; leave --resume out to start one there\n"
    said = refusal("--resume")
    assert said == (
        "error: --resume: no folder of this study (same options) in results/; name it with --out\n"
    )


def test_the_latest_folder_of_the_study_is_resumed(tmp_path: Path) -> None:
    for stamp in ("20250102-000000", "20250103-000000"):
        begun(tmp_path / "results" / f"sweep_k-{stamp}")
    begun(tmp_path / "results" / "sweep_k-20250104-000000", "--set", "retrain.epochs=4")
    assert ready("--resume").folder == Path("results/sweep_k-20250103-000000")


def test_a_folder_is_named_after_study_and_time() -> None:
    folder = ready().folder
    assert folder.parent == Path("results")
    assert folder.name.startswith("sweep_k-20")
    assert not folder.exists()


# What is kept of a study


def test_a_study_describes_itself(tmp_path: Path) -> None:
    job = begun(tmp_path / "held", "--set", "retrain.epochs=4")
    held = records.read_study(tmp_path / "held")
    assert held == job.meta
    assert {name: held[name] for name in ("schema", "name", "preset", "axis", "reference", "baseline")} == {
        "schema": 1,
        "name": "sweep_k",
        "preset": "tiny",
        "axis": "K",
        "reference": "K=1",
        "baseline": "random",
    }
    assert held["question"] == sweep_k.STUDY.question
    assert held["arms"] == ["K=1", "K=2", "K=4", "K=8", "random"]
    assert held["command"].startswith("python ")
    assert held["provenance"]["data_name"] == "digits"
    assert held["provenance"]["data_sha256"] == job.arrays.sha256


def test_a_study_says_at_its_start_how_many_trials_each_arm_has(tmp_path: Path) -> None:
    arms = ("K=1", "K=2", "K=4", "K=8", "random")
    assert ready("--seeds", "3").meta["planned"] == dict.fromkeys(arms, 3)
    # Retrained apart, a trial is a search, however often what it finds is retrained.
    assert ready("--seeds", "3", "--retrain-seeds", "2").meta["planned"] == dict.fromkeys(arms, 3)
    joint = ready("--seeds", "2", "--trials", "7", study=sweep_joint.STUDY)
    assert joint.meta["planned"] == {"searched": 7, "random": 2}


def test_what_was_declared_at_the_start_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = begun(tmp_path / "held", "--primary", "params_m")
    again = ready("--out", "held", "--resume", "--primary", "params_m")
    assert capsys.readouterr().out == ""
    again = ready("--out", "held", "--resume", "--primary", "skips", "madds_m")
    assert again.meta["primary_metrics"] == first.meta["primary_metrics"] == ["params_m"]
    said = capsys.readouterr().out
    assert "note: primary metrics are those declared at the start (params_m), not skips, madds_m" in said


def test_a_joint_search_has_an_arm_of_its_own(tmp_path: Path) -> None:
    begun(tmp_path / "held", study=sweep_joint.STUDY)
    held = records.read_study(tmp_path / "held")
    assert held["arms"] == ["searched", "random"]
    assert held["axis"] is None


def test_provenance_says_what_a_result_was_made_with() -> None:
    told = provenance("digits", "ab" * 32, {"a": 1, "b": 2})
    assert told.keys() == {
        "git_commit",
        "git_dirty",
        "packages",
        "python",
        "platform",
        "cpu",
        "gpus",
        "data_name",
        "data_sha256",
        "config_hash",
    }
    assert set(told["packages"]) <= set(PACKAGES)
    assert told["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (told["data_name"], told["data_sha256"]) == ("digits", "ab" * 32)
    assert json.loads(json.dumps(told)) == told


def test_a_config_hash_follows_the_values_and_not_their_order() -> None:
    hashes = [
        provenance("", "", config)["config_hash"]
        for config in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_provenance_does_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = provenance("", "", {})
    assert (told["git_commit"], told["git_dirty"]) == (None, None)


def test_help_lists_the_fields_and_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(sweep_k.STUDY, ["--help"])
    said = capsys.readouterr().out
    assert sweep_k.STUDY.question.strip() in said
    for name in settable(sweep_k.STUDY, Settings()):
        assert f"\n  {name}\n" in said
    for short, name in SHORT.items():
        assert f"{short} is short for {name}" in said


# Progress


@dataclass
class Clock:
    """The time that progress is told."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def start(trial: str, name: str = "") -> dict[str, Any]:
    return {"kind": "start", "trial": trial, "name": name or trial}


def epoch(trial: str) -> dict[str, Any]:
    return {"kind": "epoch", "trial": trial}


def end(trial: str, status: str = "completed", error: float | None = None) -> dict[str, Any]:
    return {"kind": "end", "trial": trial, "status": status, "metrics": {"valid_error": error}}


def of(count: int) -> list[Planned]:
    """Trials of 3 search and 3 retraining epochs."""
    changes = {"search.*.epochs": 3, "retrain.epochs": 3}
    return plan(sweep_edge_norm.STUDY, Settings("tiny", seeds=count, changes=changes))[:count]


def test_time_left_follows_from_the_epochs_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = of(2)
    progress = Progress([one, two], one.trial)
    assert progress.line() == "[0/2 trials] 0:00 gone, about ? left, no validation error yet"
    progress.row(start(one.trial.id, one.name))
    for _ in range(6):
        clock.now += 100
        progress.row(epoch(one.trial.id))
    capsys.readouterr()
    progress.row(end(one.trial.id, error=0.125))
    line = f"[1/2 trials] 10:00 gone, about 10:00 left, best validation error 12.50 % ({one.name})"
    assert capsys.readouterr().out == f"{line}\n"
    clock.now += 3600
    assert "1:10:00 gone, about 1:10:00 left" in progress.line()


def test_progress_is_said_every_half_minute_and_at_each_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = of(2)
    progress = Progress([one, two], one.trial)
    progress.row(start(one.trial.id))
    said = []
    for _ in range(5):
        clock.now += 20
        progress.row(epoch(one.trial.id))
        said.append(capsys.readouterr().out.count("\n"))
    assert said == [0, 1, 0, 1, 0]
    progress.row(end(one.trial.id))
    assert capsys.readouterr().out.count("\n") == 1


def test_progress_counts_ends_by_status_and_keeps_the_best(clock: Clock) -> None:
    trials = of(5)
    progress = Progress(trials, trials[0].trial)
    statuses = ("completed", "pruned", "diverged", "pruned", "completed")
    errors = (0.5, None, None, None, 0.25)
    for p, status, error in zip(trials, statuses, errors, strict=True):
        progress.row(start(p.trial.id, p.name))
        clock.now += 6
        progress.row(epoch(p.trial.id))
        progress.row(end(p.trial.id, status, error))
    assert progress.line() == (
        "[5/5 trials, 2 pruned, 1 diverged] 0:30 gone, about 0:00 left, "
        f"best validation error 25.00 % ({trials[4].name})"
    )


def test_a_trial_that_stops_early_owes_no_more_epochs(clock: Clock) -> None:
    one, two = of(2)
    progress = Progress([one, two], one.trial)
    for _ in range(2):
        clock.now += 10
        progress.row(epoch(one.trial.id))
    assert "0:20 gone, about 1:40 left" in progress.line()
    progress.row(end(one.trial.id, "pruned"))
    assert "0:20 gone, about 1:00 left" in progress.line()


def test_trials_yet_to_be_chosen_count_as_long_as_the_base(clock: Clock) -> None:
    one, _ = of(2)
    progress = Progress([], one.trial, joint_trials=3)  # 6 epochs each
    for _ in range(6):
        clock.now += 10
        progress.row(epoch("chosen"))
    assert "[0/3 trials] 1:00 gone, about 2:00 left" in progress.line()
    progress.row(end("chosen"))
    progress.row(end("other", "diverged"))
    assert "[2/3 trials, 1 diverged] 1:00 gone, about 1:00 left" in progress.line()


def test_without_validation_images_no_best_is_claimed(clock: Clock) -> None:
    one, two = of(2)
    progress = Progress([one, two], one.trial)
    progress.row(epoch(one.trial.id))
    progress.row(end(one.trial.id, error=None))
    assert progress.line().endswith("no validation error yet")


# Running, with Ray, MLflow and mostly the figures left out


@dataclass
class Stage:
    """Stands in for Ray and MLflow: `trials` end as they are told to."""

    ends: Mapping[str, str] = field(default_factory=dict)
    """Status by name of a trial; the others complete."""
    stop_after: int | None = None
    """Ctrl-C after so many trials."""
    planned: list[str] = field(default_factory=list)
    joint: list[tuple[Joint, int, Sequence[str]]] = field(default_factory=list)
    past: list[dict[str, Any]] = field(default_factory=list)
    uris: list[str] = field(default_factory=list)
    tracked: list[dict[str, Any]] = field(default_factory=list)
    closed: list[tuple[Sequence[Path], str]] = field(default_factory=list)
    pages: list[bool] = field(default_factory=list)
    machine: Machine = field(default_factory=lambda: Machine((Node(2, 0, 14 * 1024, 20 * 1024),)))

    def conclude(self, folder: Path, *, page: bool) -> tuple[list[Path], str]:
        self.pages.append(page)
        return [], f"claims of {len(list((folder / 'trials').glob('*.jsonl')))} trials"

    def run_planned(
        self, planned: Sequence[Planned], place: Any, stopping: Stopping, past: Iterable[dict[str, Any]]
    ) -> None:
        self.past = list(past)
        for number, p in enumerate(planned):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.planned.append(p.name)
            for row in rows_of(p, self.ends.get(p.name, "completed")):
                place.recorder.row(row)

    def run_joint(
        self, joint: Joint, begun: Sequence[Planned], trials: int, objectives: Sequence[str], place: Any
    ) -> None:
        self.joint.append((joint, trials, objectives))
        self.planned += [p.name for p in begun]
        for number in range(trials):
            chosen = replace(joint.base.trial, seeds=replace(joint.base.trial.seeds, search=100 + number))
            p = replace(joint.base, name=f"searched {number}", axes={"K": 4}, trial=chosen)
            for row in rows_of(p, "completed"):
                place.recorder.row(row)


def rows_of(p: Planned, status: str) -> Iterator[dict[str, Any]]:
    common = {"trial": p.trial.id, "attempt": uuid.uuid4().hex, "time": 1000.0}
    yield common | {
        "kind": "start",
        "name": p.name,
        "arm": p.arm,
        "axes": dict(p.axes),
        "config": p.trial.to_dict(),
    }
    metrics = {"valid_error": 0.5, "train_error": 0.5}
    yield common | {
        "kind": "epoch",
        "stage": "retrain",
        "part": 0,
        "epoch": 0,
        "metrics": metrics,
        "genotype": None,
    }
    done = status == "completed"
    metrics = {"test_error": 0.5, "valid_error": 0.4, "params_m": 1.0} if done else {}
    genotype = GENOTYPE if done else None
    yield common | {"kind": "end", "status": status, "reason": None, "genotype": genotype, "metrics": metrics}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    from experiments import cluster, tune

    stage = Stage()

    class Tracked:
        def __init__(self, uri: str, study: Mapping[str, Any], folder: Path) -> None:
            stage.uris.append(uri)
            assert (folder / "study.json").exists()

        def open(self) -> None: ...

        def link(self) -> str:
            return "#/runs"

        def row(self, row: dict[str, Any]) -> None:
            # The file is the truth: it has the row before anyone else is told.
            assert list(Path().rglob(f"{row['trial']}.jsonl"))
            stage.tracked.append(row)

        def close(self, artifacts: Sequence[Path] = (), summary: str = "") -> None:
            stage.closed.append((artifacts, summary))

    monkeypatch.setattr(command, "Tracker", Tracked)
    monkeypatch.setattr(command, "conclude", stage.conclude)  # figures take seconds
    monkeypatch.setattr(conclusion, "_report", lambda folder: [])
    monkeypatch.setattr(cluster, "connect", lambda resources: None)
    monkeypatch.setattr(cluster, "check_resources", lambda resources: None)
    monkeypatch.setattr(cluster, "machine", lambda resources: stage.machine)
    taken = Footprint((Peak(10.0, 2.0),), Peak(5.0, 1.0))  # counting takes a second a trial
    monkeypatch.setattr(packing, "footprint", lambda trial, shape: taken)
    monkeypatch.setattr(tune, "run_planned", stage.run_planned)
    monkeypatch.setattr(tune, "run_joint", stage.run_joint)
    return stage


def test_a_run_ends_in_tables_figures_and_claims(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "conclude", CONCLUDE)
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    folder = Path("study")
    assert stage.planned == ["edge_norm=False seed=0", "edge_norm=True seed=0", "random seed=0"]
    assert len(list((folder / "trials").glob("*.jsonl"))) == 3
    assert len(records.read_tables(folder).finals()) == 3
    for name in (
        "figures/error_by_arm.png",
        "figures/curves.png",
        "figures/cells/edge_norm=True.svg",
        "summary.md",
    ):
        assert (folder / name).stat().st_size > 0, name
    said = capsys.readouterr().out
    assert said.startswith(
        f"{sweep_edge_norm.STUDY.question.strip()}\n3 trials, 0 finished before, in study\n"
    )
    assert "3 of 3 trials finished with a test error" in said
    assert "mlflow ui" in said
    artifacts, text = stage.closed[0]
    assert "edge_norm=False against random" in text
    assert all(path.exists() for path in artifacts)
    assert (folder / "summary.md").read_text().startswith(f"# {sweep_edge_norm.STUDY.question}")


def test_primary_metrics_are_declared_before_there_are_results() -> None:
    assert ready().meta["primary_metrics"] == []
    assert ready("--primary", "skips", "params_m").meta["primary_metrics"] == ["skips", "params_m"]
    measured = ready("--set", "measure=snip", "--primary", "proxy_snip").meta
    assert measured["primary_metrics"] == ["proxy_snip"]
    assert ready(study=ablate_pc_darts.STUDY).meta["primary_metrics"] == list(ablate_pc_darts.STUDY.primary)


def test_only_what_has_not_ended_is_resumed(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.ends = {
        "K=1 seed=0": "failed",
        "K=2 seed=0": "diverged",
        "K=4 seed=0": "oom",
        "K=8 seed=0": "pruned",
    }
    with pytest.raises(SystemExit, match="1"):  # for scripts to see that something failed
        main(sweep_k.STUDY, [*TINY, "--out", "study"])
    stage.planned.clear()
    stage.ends = {}
    main(sweep_k.STUDY, [*TINY, "--out", "study", "--resume"])
    assert stage.planned == ["K=1 seed=0"]  # it failed; the others would end again as they did
    assert len({row["trial"] for row in stage.past}) == 5  # for ASHA and median stopping to go on from
    assert "5 trials, 4 finished before, in study" in capsys.readouterr().out


def test_two_processes_do_not_run_one_study(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run_it_twice(*_: object) -> None:
        tried.append(1)
        with pytest.raises(FileExistsError, match="is being run by another process"), held(Path("study")):
            pass

    from experiments import tune

    monkeypatch.setattr(tune, "run_planned", run_it_twice)
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    assert tried == [1]
    with held(Path("study")):
        pass


def test_a_study_that_another_process_runs_is_refused(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    with held(Path("study")), pytest.raises(SystemExit, match="2"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study", "--resume"])
    assert "study is being run by another process; wait for its end" in capsys.readouterr().err


def test_what_is_left_to_do_is_read_once_nobody_else_can_do_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    read = command.past

    def locked(folder: Path) -> Any:
        with pytest.raises(FileExistsError), held(folder):
            pass
        return read(folder)

    monkeypatch.setattr(command, "past", locked)
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study", "--resume"])


def test_a_study_that_can_record_nothing_more_is_paused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import tune

    def full(*_: object) -> None:
        raise PausedError("No space left on device")

    monkeypatch.setattr(tune, "run_planned", full)
    with pytest.raises(SystemExit, match="3"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    said = capsys.readouterr().err
    assert "paused: No space left on device; what was recorded is kept" in said
    assert "--resume --out study goes on" in said
    assert stage.closed == [((), "")]


def test_a_finished_study_is_not_run_again(stage: Stage) -> None:
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    first = Path("study/study.json").read_text()
    stage.planned.clear()
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study", "--resume"])
    assert stage.planned == []
    assert Path("study/study.json").read_text() == first
    assert stage.closed == [([], "claims of 3 trials")] * 2


def test_ctrl_c_tells_how_to_go_on_and_keeps_what_there_is(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.stop_after = 1
    with pytest.raises(SystemExit, match="130"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    said = capsys.readouterr()
    assert "--resume --out study goes on from here" in said.err
    assert stage.closed == [([], "claims of 1 trials")]
    stage.stop_after = None
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study", "--resume"])
    assert len(stage.planned) == 3
    assert stage.pages == [False, True]  # nobody waits for a report that was not asked for


@pytest.mark.usefixtures("_no_figures")
def test_ctrl_c_tells_how_the_report_is_written(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "conclude", CONCLUDE)
    monkeypatch.setattr(conclusion, "_report", lambda folder: pytest.fail("it was written"))
    stage.stop_after = 1
    with pytest.raises(SystemExit, match="130"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    assert "python -m analysis report study --out study/report" in capsys.readouterr().out
    assert "study/summary.md" in map(str, stage.closed[0][0])


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conclusion, "_draw", lambda folder, tables: [])


@pytest.mark.usefixtures("_no_figures")
@pytest.mark.parametrize("error", [KeyError("gone"), ZeroDivisionError("by 0"), ValueError("mixed")])
def test_a_report_that_fails_costs_a_study_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object) -> list[Path]:
        raise error

    monkeypatch.setattr(command, "conclude", CONCLUDE)
    monkeypatch.setattr(conclusion, "_report", REPORT)
    monkeypatch.setattr(report, "write", fail)
    main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    said = capsys.readouterr().out
    assert "3 of 3 trials finished with a test error" in said
    assert f"no report: {type(error).__name__}: {error} (test_main.py, line " in said
    ((artifacts, text),) = stage.closed
    assert Path("study/summary.md") in artifacts
    assert text in Path("study/summary.md").read_text()


@pytest.mark.usefixtures("_no_figures")
def test_a_report_without_room_pauses_the_study_and_closes_its_tracker(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "conclude", CONCLUDE)
    monkeypatch.setattr(conclusion, "_report", REPORT)
    monkeypatch.setattr(report, "write", full)
    with pytest.raises(SystemExit, match="3"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    assert "paused: " in capsys.readouterr().err
    assert Path("study/summary.md").stat().st_size > 0
    assert stage.closed == [([], "")]


def test_the_tracker_is_closed_whatever_the_conclusion_raises(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *, page: bool) -> tuple[list[Path], str]:
        raise RuntimeError("a broken table")

    monkeypatch.setattr(command, "conclude", fail)
    with pytest.raises(RuntimeError, match="a broken table"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    assert stage.closed == [([], "")]


def test_a_study_that_recorded_nothing_ends_without_claims(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "conclude", CONCLUDE)
    stage.stop_after = 0
    with pytest.raises(SystemExit, match="130"):
        main(sweep_edge_norm.STUDY, [*TINY, "--out", "study"])
    assert "no trial has been recorded" in capsys.readouterr().out
    assert stage.closed == [([], "")]


def test_mlflow_is_where_the_user_says(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(folder: str, *more: str) -> str:
        main(sweep_edge_norm.STUDY, [*TINY, "--out", folder, *more])
        return stage.uris[-1]

    assert run("one/study") == f"sqlite:///{tmp_path / 'one' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert run("two/study") == "http://tracking:5000"
    assert run("three/study", "--tracking-uri", "sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


def test_a_joint_search_runs_its_baseline_first_and_in_full(stage: Stage) -> None:
    arguments = [*TINY, "--out", "study", "--objectives", "error", "params", "--trials", "3"]
    main(sweep_joint.STUDY, arguments)
    assert stage.planned == ["random seed=0"]
    (joint, trials, objectives), *others = stage.joint
    assert (trials, objectives, others) == (3, ["error", "params"], [])
    assert list(joint.domains) == ["depths", "K", "edge_norm", "M", "lr", "arch_lr"]
    assert [len(joint.named["depths"][name]["search"]) for name in ("8", "5-11-17")] == [1, 3]
    main(sweep_joint.STUDY, [*arguments, "--resume"])
    assert len(stage.joint) == 1  # all three have ended
    main(sweep_joint.STUDY, [*arguments[:-1], "5", "--resume"])
    assert stage.joint[1][1] == 2


@pytest.mark.parametrize(
    "error", [ValueError("--cpus-per-trial 99: this machine has 2"), ConnectionError("no Ray")]
)
def test_a_cluster_that_is_not_there_is_told_before_anything_is_written(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    from experiments import cluster

    def refuse(resources: Resources) -> None:
        raise error

    monkeypatch.setattr(
        cluster, "connect" if isinstance(error, ConnectionError) else "check_resources", refuse
    )
    with pytest.raises(SystemExit, match="2"):
        main(sweep_k.STUDY, [*TINY, "--out", "study"])
    assert capsys.readouterr().err == f"error: {error}\n"
    assert not list(Path().iterdir())


def test_a_study_says_and_records_how_it_packs(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    main(sweep_k.STUDY, [*TINY, "--out", "study"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("packing: "))
    assert line.startswith("packing: 2 trials at once, 1 thread each; a trial needs up to about 0.9 GB (K=1 ")
    assert json.loads(Path("study/study.json").read_text())["packing"] == [line]


def test_a_study_too_large_for_the_machine_is_refused_before_anything_is_written(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.machine = Machine((Node(2, 0, 4, 8),))
    with pytest.raises(SystemExit, match="2"):
        main(sweep_k.STUDY, [*TINY, "--out", "study"])
    error = capsys.readouterr().err
    assert error.startswith("error: K=1 seed=0: its search holds ")
    assert "batch_size" in error
    assert not list(Path().iterdir())
