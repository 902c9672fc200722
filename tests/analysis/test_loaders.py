import hashlib
import json
import pickle
import sqlite3
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import loaders
from analysis.records import export, read_rows, read_study
from nas.genotype import Genotype as NasGenotype
from tests.analysis.conftest import Build, end, epoch, genotype, start, write_rows, write_study, write_trial

MACRO = Path(__file__).parents[3] / "shared" / "data" / "nas-bench-macro" / "nas-bench-macro_cifar10.json"


def macro(path: Path, **changes: Any) -> Path:
    """A small file in the form of NAS-Bench-Macro: two keys of one network, and two others."""
    entries = {
        key: {"test_acc": accuracies, "mean_acc": 0.0, "std": 0.0, "params": 1_000_000, "flops": 9_000_000}
        for key, accuracies in {
            "02012100": [89.0, 90.0, 91.0],
            "02012010": [80.0, 81.0, 82.0],
            "02012001": [80.0, 81.0, 82.0],
            "22222222": [93.0, 93.0, 93.0],
        }.items()
    }
    for key, fields in changes.items():
        entries[key.removeprefix("k")] |= fields
    path.write_text(json.dumps(entries))
    return path


# Studies


def test_metrics_are_those_of_the_end_or_of_the_last_epoch_of_the_search(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    write_trial(folder, "K=4", 0, 0.1)
    write_trial(folder, "K=4", 1, None, "pruned")
    sample = loaders.load(folder)
    assert sample.metrics["params_m"].tolist()[0] == 0.5
    assert sample.metrics["search_train_loss"].tolist() == pytest.approx([2 * (0.1 + 0.5 * 0.4**3)] * 2)
    assert np.isnan(sample.error[1])
    assert not {"test_error", "valid_error", "attempts", "marks", "audit"} & set(sample.metrics)


def test_a_search_that_was_cut_short_has_no_last_epoch(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    write_trial(folder, "K=4", 0, 0.1)
    write_rows(folder, [start("cut", seed=1), epoch("cut", 0, {"train_loss": 3.0}), end("cut", "oom", None)])
    sample = loaders.load(folder)
    cut = sample.trials["trial_id"] == "cut"
    assert sample.metrics.loc[cut, "search_train_loss"].isna().all()


@pytest.mark.parametrize("status", ["completed", "pruned"])
@pytest.mark.parametrize("last", [{"eigenvalue": None}, {}])
def test_no_earlier_epoch_stands_in_for_the_last(tmp_path: Path, status: str, last: dict[str, None]) -> None:
    folder = write_study(tmp_path)
    ended = {"test_error": 0.1, "search_eigenvalue": None} if status == "completed" else {}
    for trial, values in (("lost", (1.0, 2.0)), ("found", (1.0, 2.0, 3.0))):
        rows = [start(trial)] + [epoch(trial, at, {"eigenvalue": value}) for at, value in enumerate(values)]
        rows += [epoch(trial, 2, {"train_loss": 0.5, **last})] if trial == "lost" else []
        whole = {"test_error": 0.1, "search_eigenvalue": 3.0} if trial == "found" else ended
        rows += [epoch(trial, 0, {"valid_error": 0.2}, "retrain")]
        rows += [end(trial, "completed" if trial == "found" else status, None, metrics=whole)]
        write_rows(folder, rows)
    sample = loaders.load(folder)
    found = dict(zip(sample.trials["trial_id"], sample.metrics["search_eigenvalue"], strict=True))
    assert found["found"] == 3.0
    assert np.isnan(found["lost"]), "epochs 1.0, 2.0 and nothing are nothing"


@pytest.mark.parametrize(("status", "expected"), [("completed", np.nan), ("pruned", 3.0)])
def test_a_null_in_the_end_row_of_a_completed_trial_is_null(
    tmp_path: Path, status: str, expected: float
) -> None:
    folder = write_study(tmp_path)
    metrics = {"test_error": 0.1, "search_eigenvalue": None} if status == "completed" else {}
    rows = [start("t"), epoch("t", 0, {"eigenvalue": 3.0}), epoch("t", 0, {"valid_error": 0.2}, "retrain")]
    write_rows(folder, [*rows, end("t", status, None, metrics=metrics)])
    write_rows(folder, [start("u", seed=1), end("u", metrics={"test_error": 0.1, "search_eigenvalue": 4.0})])
    found = loaders.load(folder).metrics["search_eigenvalue"].tolist()
    np.testing.assert_equal(found, [expected, 4.0])


def test_seconds_of_a_search_without_an_end_metric_are_those_of_all_epochs(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    rows = [start("t")]
    rows += [epoch("t", number, {"seconds": 2.0, "peak_memory_mb": 10.0 - number}) for number in range(3)]
    rows += [epoch("t", 0, {"seconds": 5.0}, "retrain"), end("t", "pruned", None, metrics={})]
    write_rows(folder, rows)
    sample = loaders.load(folder)
    assert sample.metrics["search_seconds"].tolist() == [6.0]
    assert sample.metrics["search_peak_memory_mb"].tolist() == [10.0]


def test_several_retrainings_of_a_search_are_one_row_with_their_mean(build: Build) -> None:
    tables = build({"K=4": [0.1, 0.3, 0.2]}, reference=None)
    trials = tables.trials.assign(search_id=["a", "a", "b"], retrain_seed=[0, 1, 0])
    sample = loaders.of_tables(read_as(tables, trials), {})
    assert sample.error.tolist() == pytest.approx([0.2, 0.2])
    assert (sample.n_rows, len(sample.trials), len(sample.finals)) == (3, 2, 3)
    assert set(sample.finals["trial_id"]) == set(sample.trials["trial_id"])
    assert "mean of up to 2 retrainings" in sample.endpoint


def read_as(tables: Any, trials: pd.DataFrame) -> Any:
    return type(tables)(tables.study, trials, tables.epochs, tables.genotypes)


def test_rows_of_differing_protocols_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for seed, epochs in enumerate((3, 3, 5)):
        row = start(f"t{seed}", seed=seed)
        row["config"] |= {"retrain": {"epochs": epochs, "compile": str(seed)}, "data": {"workers": seed}}
        write_rows(folder, [row, end(f"t{seed}")])
    assert loaders.load(folder).protocols == {"config.retrain.epochs": ["3", "5"]}


def test_a_search_that_was_not_retrained_has_no_protocol_to_differ(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for trial, status, epochs in (("a", "completed", 3), ("b", "completed", 3), ("c", "failed", 0)):
        row = start(trial)
        row["config"] |= {"retrain": {"epochs": epochs}}
        write_rows(folder, [row, end(trial, status, 0.1 if epochs else None)])
    assert loaders.load(folder).protocols is None


def test_tables_are_built_where_there_are_none_and_refused_where_they_changed(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    write_trial(folder, "K=4", 0, 0.1)
    assert len(loaders.load(folder).trials) == 1
    write_trial(folder, "K=4", 1, 0.1)
    assert len(loaders.load(folder).trials) == 2  # not what they held before
    path = folder / "tables" / "trials.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        loaders.load(folder)


def test_old_tables_that_cannot_be_replaced_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path)
    write_trial(folder, "K=4", 0, 0.1)
    export(folder)
    write_trial(folder, "K=4", 1, 0.1)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("analysis.records.os.replace", refuse)
    with pytest.raises(ValueError, match=r"cannot be written .*Read-only.*copy the folder"):
        loaders.load(folder)


def test_a_study_without_a_trial_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tables yet; .*once a trial has begun"):
        loaders.load(write_study(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"), [("x.csv", "nothing known ends in '.csv'"), ("missing", "does not exist")]
)
def test_unknown_sources_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.csv").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        loaders.load(tmp_path / name)


# MLflow


def mlflow_store(path: Path, folder: Path) -> None:
    """A store with the tables and tags that a sync of the study writes."""
    store = sqlite3.connect(path)
    store.executescript(
        "CREATE TABLE runs (run_uuid, lifecycle_stage);"
        "CREATE TABLE tags (key, value, run_uuid);"
        "CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan);"
    )

    def run(name: str, tags: dict[str, Any]) -> None:
        store.execute("INSERT INTO runs VALUES (?, 'active')", (name,))
        store.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(k, v, name) for k, v in tags.items()])

    study = read_study(folder)
    text = json.dumps(study)
    parts = {"record.study": text[:50], "record.study/1": text[50:], "record.study/2": "left of a longer one"}
    run("parent", {"kind": "study", "study_id": study["study_id"], "name": study["name"]} | parts)
    for file in (folder / "trials").iterdir():
        tags = {"kind": "trial", "mlflow.parentRunId": "parent", "trial_id": file.stem, "status": "running"}
        for row in read_rows(file):
            if row["kind"] in ("start", "end"):
                tags[f"record.{row['kind']}"] = json.dumps(row)
            if row["kind"] == "start":
                tags["attempts"] = f"{row['attempt']} {row['time']}"
            for name, value in row["metrics"].items() if row["kind"] == "epoch" else ():
                # The first attempt at an epoch left another value, which the second one corrects.
                for time, each in ((row["time"], value), (row["time"] - 1, -1.0)):
                    key, step = f"{row['stage']}/{name}", row["epoch"]
                    told = (key, each, 1000 * time, file.stem, step)
                    store.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, 0)", told)
        run(file.stem, tags)
    store.commit()
    store.close()


def test_an_mlflow_store_gives_what_the_tables_give(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    for seed in range(3):
        write_trial(folder, "K=4", seed, 0.1 + 0.01 * seed)
        write_trial(folder, "random", seed, 0.2, "failed" if seed == 2 else "completed")
    path = tmp_path / "mlflow.db"
    mlflow_store(path, folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    ours, theirs = loaders.load(folder), loaders.load(path, sha256=digest)
    assert theirs.sources == {"mlflow.db": digest}
    pd.testing.assert_frame_equal(theirs.trials, ours.trials)
    pd.testing.assert_frame_equal(theirs.metrics, ours.metrics)
    assert theirs.tables.study == ours.tables.study
    with pytest.raises(ValueError, match="holds 0 studies called 'other'; name one by its id: 0123456789ab"):
        loaders.load(path, study="other")
    with pytest.raises(ValueError, match="not the file that was meant"):
        loaders.load(path, sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM tags WHERE key = 'record.start'", "no record of the start of trial K4-0: an earlier"),
        (
            "DELETE FROM tags WHERE key LIKE 'record.study%'",
            "no record of study.json: an earlier",
        ),
        ("DELETE FROM tags WHERE key = 'record.study/1'", "the record of study.json is torn"),
        (
            "DELETE FROM tags WHERE run_uuid = 'K4-0'",
            "study 0123456789ab has no trial in this store; send it",
        ),
        (
            "INSERT INTO runs VALUES ('copy', 'active');"
            "INSERT INTO tags SELECT key, value, 'copy' FROM tags WHERE run_uuid = 'K4-0'",
            "holds two runs of trial K4-0",
        ),
    ],
)
def test_a_store_that_lacks_something_says_what(tmp_path: Path, change: str, said: str) -> None:
    folder = write_study(tmp_path / "study")
    write_trial(folder, "K=4", 0, 0.1)
    mlflow_store(tmp_path / "mlflow.db", folder)
    store = sqlite3.connect(tmp_path / "mlflow.db")
    store.executescript(change)
    store.close()
    with pytest.raises(ValueError, match=said):
        loaders.load(tmp_path / "mlflow.db")


def test_a_file_that_is_no_mlflow_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, but long enough to be looked at")
    with pytest.raises(ValueError, match="not an MLflow store"):
        loaders.load(tmp_path / "x.db")


# NAS-Bench-Macro


def test_keys_of_one_network_are_one_row(tmp_path: Path) -> None:
    sample = loaders.load(macro(tmp_path / "m.json"))
    assert (sample.n_rows, len(sample.trials)) == (4, 3)
    best = sample.trials.set_index("trial_id").loc["22222222"]
    assert best["test_error"] == pytest.approx(0.07)
    assert (best["arm"], best["blocks_stage_3"], best["large_blocks"]) == ("8 blocks", 3, 8)
    assert sample.finals.groupby("trial_id")["test_error"].count().tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k02012001": {"test_acc": [80.0, 81.0, 83.0]}}, "one network with two results"),
        ({"k22222222": {"test_acc": [93.0, 93.0]}}, "not three percentages"),
        ({"k22222222": {"test_acc": [93.0, 93.0, 930.0]}}, "not three percentages"),
        ({"k22222222": {"params": None}}, "params of 22222222 is None, and must be a number above 0"),
        ({"k22222222": {"params": "x"}}, "params of 22222222 is 'x'"),
        ({"k22222222": {"params": -1}}, "params of 22222222 is -1"),
        ({"k22222222": {"flops": float("nan")}}, "flops of 22222222 is nan"),
        ({"k22222222": {"flops": float("inf")}}, "flops of 22222222 is inf"),
        ({"k22222222": {"flops": True}}, "flops of 22222222 is True"),
    ],
)
def test_results_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loaders.load(macro(tmp_path / "m.json", **changes))


def test_an_option_that_does_not_apply_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_trial(folder, "K=4", 0, 0.1)
    for path in (folder, macro(tmp_path / "m.json"), curves(tmp_path / "c")):
        with pytest.raises(ValueError, match=r"--study x chooses from an MLflow store .*; leave it out"):
            loaders.load(path, study="x")
    with pytest.raises(ValueError, match=r"--sha256 is of one file, .*tables/manifest\.json"):
        loaders.load(folder, sha256="0" * 64)


def test_another_file_than_the_one_meant_is_refused(tmp_path: Path) -> None:
    path = macro(tmp_path / "m.json")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaders.load(path, sha256=right.upper()).sources == {"m.json": right}
    with pytest.raises(ValueError, match="not the file that was meant"):
        loaders.load(path, sha256="0" * 64)


@pytest.mark.skipif(not MACRO.is_file(), reason="needs the file of NAS-Bench-Macro")
def test_the_whole_of_nas_bench_macro_gives_what_scipy_gives() -> None:
    sample = loaders.load(MACRO)
    raw = json.loads(MACRO.read_text())
    assert (sample.n_rows, len(sample.trials), sample.units.nunique()) == (6561, 3969, 3969)
    kept = sample.trials["trial_id"]
    errors = [100 - np.mean(raw[key]["test_acc"]) for key in kept]
    assert sample.error.to_numpy() * 100 == pytest.approx(errors)
    # Facts of the file, computed apart from this package.
    for name, tau in (("params_m", -0.216), ("madds_m", -0.546), ("blocks", -0.679)):
        assert stats.kendalltau(sample.metrics[name], sample.error).statistic == pytest.approx(tau, abs=1e-3)


# Learning curves


def curves(folder: Path, networks: int = 4, epochs: int = 40) -> Path:
    folder.mkdir()
    rise = 90 - 50 * 0.9 ** np.arange(epochs)
    np.save(folder / "curves.npy", rise + np.arange(networks)[:, None])
    (folder / "genotypes.txt").write_text("\n".join(genotype(number) for number in range(networks)))
    return folder


def test_curves_have_early_epochs_as_metrics_and_the_last_as_endpoint(tmp_path: Path) -> None:
    sample = loaders.load(curves(tmp_path / "c"))
    array = np.load(tmp_path / "c" / "curves.npy")
    assert (1 - sample.error.to_numpy()) * 100 == pytest.approx(array[:, -1])
    assert sample.metrics["error_at_epoch_4"].to_numpy() == pytest.approx(1 - array[:, 3] / 100)
    assert sample.metrics["skips_normal"].tolist() == [0, 1, 2, 3]
    assert len(sample.tables.epochs) == array.size
    final = sample.tables.genotypes.set_index("trial_id")
    assert (final["stage"] == "final").all()
    assert final["key"].to_dict() == sample.trials.set_index("trial_id")["genotype_key"].to_dict()
    for number in range(4):
        stored = json.loads(str(final.loc[f"{number:04d}", "genotype"]))
        assert str(NasGenotype.from_json(stored)) == genotype(number)


def test_genotypes_come_from_plain_pickles_only(tmp_path: Path) -> None:
    folder = curves(tmp_path / "c")
    (folder / "genotypes.txt").unlink()
    best = np.load(folder / "curves.npy").max(axis=1)
    listed = [(genotype(number), np.float64(value)) for number, value in enumerate(best)]
    (folder / "list.pkl").write_bytes(pickle.dumps(listed))
    assert loaders.load(folder).trials["arm"].tolist() == ["0 skips", "1 skips", "2 skips", "3 skips"]
    assert not any("check their order" in note for note in loaders.load(folder).notes)
    (folder / "list.pkl").write_bytes(pickle.dumps(listed[::-1]))
    assert any("4 best accuracies" in note for note in loaders.load(folder).notes)


Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


def test_pickled_named_tuples_of_other_code_are_genotypes(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    found = Genotype(
        [("skip_connect", 0), ("skip_connect", 1)], [2], [("skip_connect", 0), ("skip_connect", 1)], [2]
    )
    path.write_bytes(pickle.dumps([found]))
    assert loaders.unpickle(path)[0].normal == found.normal


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"asks for builtins\.exec, which is not plain data"):
        loaders.unpickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(5), "has shape"),
        (np.zeros((5, 3), dtype=int), "has shape"),
        (np.full((4, 3), 0.5), "give accuracy in percent"),
        (np.full((4, 3), np.nan), "give accuracy in percent"),
        (np.full((5, 3), 50.0), "names 4 genotypes for 5 curves"),
        (np.array([[{}]], dtype=object), "not a plain .npy array"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path: Path, array: Any, said: str) -> None:
    folder = curves(tmp_path / "c")
    np.save(folder / "curves.npy", array)
    with pytest.raises(ValueError, match=said):
        loaders.load(folder)
