"""Whole studies on Ray and MLflow: what is left of one, that it can be repeated, and that it can go on."""

import io
import json
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest
import ray
import torch

from analysis import records
from experiments import (
    ablate_pc_darts,
    compare_methods,
    conclusion,
    recorder,
    sweep_depths,
    sweep_edge_norm,
    sweep_joint,
    sweep_k,
    sweep_skips,
)
from experiments.cluster import connect
from experiments.main import main
from experiments.study import Resources, Study, axis
from nas.config import override
from nas.data import DataConfig
from nas.genotype import Genotype
from nas.papers import PAPERS, tiny
from nas.trial import Row, run_trial

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own imports
    import mlflow
    from mlflow import MlflowClient

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 as Parquet files in {CIFAR10}")

SWEEP = replace(sweep_k.STUDY, axes=(axis("K", 1, 4),))
"""Three trials with one seed: K=1, K=4, random."""

SMALL = ("--preset", "tiny", "--seeds", "1")
SETTINGS = {
    "data.limit": 80,
    "data.test_limit": 20,
    "space.nodes": 2,
    "search.*.epochs": 2,
    "retrain.epochs": 2,
}

MEASURED = ("seconds", "peak_memory_mb")
"""How metrics of the machine end, rather than of the trial."""


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One Ray for all studies here: starting it takes longer than a trial."""
    connect(Resources())
    yield
    ray.shutdown()


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and claims alone: figures take seconds, and are drawn once."""
    plots = MagicMock()
    plots.save.return_value = {}
    monkeypatch.setattr(conclusion, "plots", plots)
    monkeypatch.setattr(conclusion, "_report", lambda folder: [])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store for studies that nobody looks for in it: to create one takes longer than a trial."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def small(folder: Path, uri: str, *more: str, **changes: int) -> list[str]:
    settings = [f"{name}={value}" for name, value in (SETTINGS | changes).items()]
    return [*SMALL, "--out", str(folder), "--tracking-uri", uri, "--set", *settings, *more]


def outcome(folder: Path) -> pd.DataFrame:
    """The trials, without what the clock or the process decides."""
    trials = records.read_tables(folder).trials.set_index("name").sort_index()
    measured = [name for name in trials.columns if name.endswith(MEASURED)]
    return trials.drop(columns=[*measured, "study_id", "started", "ended", "attempts"])


def curves(folder: Path) -> pd.DataFrame:
    """Every metric of every epoch, likewise."""
    epochs = records.read_tables(folder).epochs
    kept = epochs[~epochs["key"].astype(str).str.endswith(MEASURED)]
    return (
        kept[["trial_id", "stage", "part", "epoch", "key", "value"]]
        .astype({"key": str})
        .reset_index(drop=True)
    )


@dataclass(frozen=True)
class Finished:
    """A study that has run."""

    folder: Path
    uri: str
    said: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def runs(self, query: str) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:  # set_tracking_uri would outlive the test
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            found = mlflow.search_runs(search_all_experiments=True, filter_string=query, output_format="list")
        return list(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _cluster: None) -> Finished:
    folder = tmp_path_factory.mktemp("sweep") / "study"
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    with redirect_stdout(io.StringIO()) as said:
        main(SWEEP, small(folder, uri))
    return Finished(folder, uri, said.getvalue())


def test_a_study_leaves_records_tables_figures_and_a_summary(finished: Finished) -> None:
    folder = finished.folder
    assert len(list((folder / "trials").glob("*.jsonl"))) == 3
    for path in (folder / "trials").glob("*.jsonl"):
        kinds = [row["kind"] for row in records.read_rows(path)]
        assert (kinds[0], kinds[-1]) == ("start", "end")
    for name in ("trials", "epochs", "genotypes"):
        assert len(pd.read_parquet(folder / "tables" / f"{name}.parquet")) >= 3
    for stem in ("error_by_arm", "curves"):
        for suffix in ("png", "svg", "csv"):
            assert (folder / "figures" / f"{stem}.{suffix}").stat().st_size > 0
    for arm in ("K=1", "K=4", "random"):
        assert (folder / "figures" / "cells" / f"{arm}.svg").read_text().rstrip().endswith("</svg>")
        assert (folder / "figures" / "cells" / f"{arm}.png").read_bytes().startswith(b"\x89PNG")
    study = records.read_study(folder)
    assert (study["name"], study["arms"], study["axis"]) == ("sweep_k", ["K=1", "K=4", "random"], "K")
    assert SWEEP.question in (folder / "summary.md").read_text()
    assert SWEEP.question in (folder / "report" / "report.html").read_text()
    assert json.loads((folder / "report" / "results.json").read_text())
    assert f"report   {folder / 'report' / 'report.html'}" in finished.said


def test_a_study_says_how_far_it_is_and_what_it_found(finished: Finished) -> None:
    for number in (1, 2, 3):
        assert f"[{number}/3 trials] " in finished.said
    assert "about 0:00 left, best validation error" in finished.said
    assert "3 of 3 trials finished with a test error" in finished.said
    assert f"--backend-store-uri {finished.uri}" in finished.said


def test_trials_are_found_by_what_varies(finished: Finished) -> None:
    (run,) = finished.runs("params.K = '4' and tags.kind = 'trial'")
    (row,) = outcome(finished.folder).query("arm == 'K=4'").to_dict("records")
    assert [found.info.run_id for found in finished.runs("params.K = '4'")] == [run.info.run_id]
    assert run.info.run_name == "K=4 seed=0"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/test_error"] == pytest.approx(row["test_error"])
    (other,) = finished.runs("params.K = '1'")
    assert other.info.run_id != run.info.run_id


def test_every_trial_has_its_genotype_and_a_drawing(finished: Finished, tmp_path: Path) -> None:
    genotypes = outcome(finished.folder)["genotype"]
    for run in finished.runs("tags.kind = 'trial'"):
        files = {file.path for file in finished.client.list_artifacts(run.info.run_id)}
        assert {"genotype.json", "genotype.svg", "genotype.png", "config.json"} <= files
        path = finished.client.download_artifacts(run.info.run_id, "genotype.json", str(tmp_path))
        found = Genotype.from_json(json.loads(Path(path).read_text()))
        assert str(found) == genotypes[run.info.run_name]


def test_a_study_is_the_parent_of_its_trials(finished: Finished) -> None:
    (parent,) = finished.runs("tags.kind = 'study'")
    children = finished.runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in children} == set(outcome(finished.folder).index)
    for name in ("report/report.html", "tables/trials.parquet", "figures/curves.png", "summary.md"):
        place = name.rpartition("/")[0] or None
        files = {file.path for file in finished.client.list_artifacts(parent.info.run_id, place)}
        assert name in files


@pytest.mark.usefixtures("_no_figures")
def test_the_same_study_twice_gives_the_same_genotypes_and_errors(
    finished: Finished, store: str, tmp_path: Path
) -> None:
    main(SWEEP, small(tmp_path / "again", store, "--max-concurrent", "1"))  # in one process, one by one
    pd.testing.assert_frame_equal(outcome(tmp_path / "again"), outcome(finished.folder))
    pd.testing.assert_frame_equal(curves(tmp_path / "again"), curves(finished.folder))
    one, two = (records.read_study(folder) for folder in (finished.folder, tmp_path / "again"))
    assert one["plan_id"] == two["plan_id"]
    assert one["study_id"] != two["study_id"]


@pytest.mark.usefixtures("_no_figures")
@pytest.mark.filterwarnings("ignore:.*torn by a crash")
def test_a_study_that_was_stopped_goes_on(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(finished.folder, folder)
    shutil.copy(finished.folder.parent / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = {path: path.read_bytes() for path in (folder / "trials").glob("*.jsonl")}
    torn = next(path for path, content in before.items() if b'"arm": "K=4"' in content)
    lines = before[torn].splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:-2]) + lines[-2][:60])  # a crash in the last epoch's row

    main(SWEEP, small(folder, uri, "--resume"))

    for path, content in before.items():
        assert (path.read_bytes() == content) == (path != torn)
    rows = records.read_rows(torn)
    assert [row["kind"] for row in rows].count("start") == 2
    # Its checkpoints had gone with its end, so it began anew, and came out as before.
    assert [row["stage"] for row in rows if row["kind"] == "epoch"].count("search") == 4
    assert not [row for row in rows if row["kind"] == "note"]
    pd.testing.assert_frame_equal(outcome(folder), outcome(finished.folder))
    pd.testing.assert_frame_equal(curves(folder), curves(finished.folder))
    runs = Finished(folder, uri, "").runs("tags.kind = 'trial'")
    assert sorted(run.info.run_name for run in runs) == sorted(outcome(folder).index)
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.usefixtures("_no_figures")
@needs_cifar10
def test_a_study_runs_on_images_from_a_parquet_folder(store: str, tmp_path: Path) -> None:
    study = replace(SWEEP, axes=(axis("K", 4),), reference=None, baseline=False)
    main(study, small(tmp_path / "study", store, "--data", str(CIFAR10)))
    told = records.read_study(tmp_path / "study")
    assert told["provenance"]["data_name"] == "cifar10"
    (trial,) = records.read_tables(tmp_path / "study").trials.to_dict("records")
    assert trial["status"] == "completed"
    assert trial["config.data.source"] == str(CIFAR10)
    assert 0 < trial["test_error"] <= 1


# Minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    "study",
    [
        sweep_k.STUDY,
        sweep_edge_norm.STUDY,
        sweep_depths.STUDY,
        sweep_skips.STUDY,
        sweep_joint.STUDY,
        compare_methods.STUDY,
        ablate_pc_darts.STUDY,
    ],
    ids=lambda study: study.name,
)
def test_every_script_runs_to_its_claims(study: Study, tmp_path: Path) -> None:
    main(study, [*SMALL, "--out", str(tmp_path / "study")])
    trials = records.read_tables(tmp_path / "study").trials
    assert set(trials["status"]) == {"completed"}
    assert trials["test_error"].between(0, 1).all()
    assert set(trials["arm"]) == set(records.read_study(tmp_path / "study")["arms"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt"])
def test_every_scheduler_leaves_an_end_of_every_trial(name: str, store: str, tmp_path: Path) -> None:
    study = replace(SWEEP, axes=(axis("K", 4),), reference=None, baseline=False)
    more = ("--scheduler", name, "--seeds", "4")
    main(study, small(tmp_path / "study", store, *more, **{"retrain.epochs": 8}))
    trials = records.read_tables(tmp_path / "study").trials
    assert len(trials) == 4
    assert set(trials["status"]) <= {"completed", "pruned"}
    assert "completed" in set(trials["status"])
    searched = curves(tmp_path / "study").query("stage == 'search' and key == 'train_loss'")
    assert list(searched.groupby("trial_id", observed=True).size()) == [2] * 4  # no search was cut short


@pytest.mark.slow
def test_a_trial_that_diverges_stops_no_other(store: str, tmp_path: Path) -> None:
    study = replace(SWEEP, axes=(axis("retrain.weight_decay", 3e-4, 1e30),), reference=None)
    for name in ("fifo", "median"):
        main(study, small(tmp_path / name, store, "--scheduler", name))
        statuses = records.read_tables(tmp_path / name).trials.groupby("arm")["status"].agg(list)
        assert statuses["retrain.weight_decay=1e+30"] == ["diverged"]
        assert statuses["retrain.weight_decay=0.0003"] == statuses["random"] == ["completed"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_figures")
def test_ctrl_c_stops_a_study_that_then_goes_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = replace(SWEEP, axes=(axis("K", 4),), reference=None), tmp_path / "study"
    count = recorder.Progress.row

    def stop(progress: recorder.Progress, row: dict[str, Any]) -> None:
        count(progress, row)
        if row["kind"] == "epoch" and progress.epochs.total() == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(recorder.Progress, "row", stop)
        with pytest.raises(SystemExit) as end:
            main(study, small(folder, store))
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert f"--resume --out {folder} goes on from here" in capsys.readouterr().err
    assert "completed" not in set(records.read_tables(folder).trials["status"])
    main(study, small(folder, store, "--resume"))
    assert list(records.read_tables(folder).trials["status"]) == ["completed", "completed"]


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("error",), ("error", "params")], ids=" and ".join)
def test_a_joint_search_goes_on_with_new_trials(objectives: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    arguments = [*SMALL, "--out", str(folder), "--objectives", *objectives, "--trials"]
    main(sweep_joint.STUDY, [*arguments, "2"])
    main(sweep_joint.STUDY, [*arguments, "4", "--resume"])
    trials = records.read_tables(folder).trials
    assert set(trials["status"]) == {"completed"}
    assert sorted(trials["arm"]) == ["random", *["searched"] * 4]  # four configurations, none of them twice


@pytest.mark.slow
@needs_cifar10
@pytest.mark.parametrize("paper", ["p_darts", "darts_2nd"])
def test_a_progressive_and_a_second_order_search_run_on_cifar10(paper: str) -> None:
    torch.set_num_threads(1)
    changes = {"search.*.epochs": 2, "search.*.frozen_epochs": 1, "retrain.epochs": 2}
    trial = override(
        replace(tiny(PAPERS[paper]), data=DataConfig(str(CIFAR10), limit=120, test_limit=50)), changes
    )
    rows: list[Row] = []
    result = run_trial(trial, rows.append)
    parts = [row.part for row in rows if row.stage == "search"]
    if paper == "p_darts":
        assert parts == [0, 0, 1, 1, 2, 2]
        assert trial.method.searcher.max_skip == 2
        assert result.genotype.normal.skips <= 2
    else:
        assert parts == [0, 0]
        assert trial.method.arch_update.order == 2
    assert result.metrics["test_error"] is not None
    assert 0 <= result.metrics["test_error"] <= 1
