"""Records survive crashes and retries, and become typed tables that depend on nothing but the records."""

import hashlib
import json
import math
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.pruning import association, weighted_tau
from analysis.records import (
    COLUMNS,
    append_row,
    export,
    read_rows,
    read_study,
    read_tables,
    stale,
    tables_of,
)
from analysis.resample import Draws
from nas.genotype import Genotype

from .conftest import CONV, Build, end, epoch, genotype, start, write_rows, write_study, write_trial


def mark(trial: str, rung: float = 2.0, probability: Any = 0.5, **fields: Any) -> dict[str, Any]:
    """A mark row."""
    row = {"kind": "mark", "trial": trial, "attempt": "a0", "time": 120.0, "rung": rung}
    return row | {"probability": probability, "goes_on": True, "audit": False} | fields


# Rows


def test_a_row_is_one_line_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "trials" / "t.jsonl"
    rows: list[dict[str, Any]] = [
        {"kind": "start", "n": 1},
        {"kind": "end", "text": "a\nb", "list": [1, {"x": None}]},
    ]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    assert path.read_text().count("\n") == 2


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = {
        "a": math.nan,
        "b": [math.inf, 1.5],
        "c": np.float64("-inf"),
        "d": np.float32(0.5),
        "e": np.int64(3),
    }
    append_row(tmp_path / "t.jsonl", {"metrics": metrics})
    assert read_rows(tmp_path / "t.jsonl") == [
        {"metrics": {"a": None, "b": [None, 1.5], "c": None, "d": 0.5, "e": 3}}
    ]


def test_a_row_is_on_disk_when_it_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("analysis.records.os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    append_row(tmp_path / "t.jsonl", {"n": 1})
    assert synced == [len('{"n": 1}\n')]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=4))
def test_any_rows_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "t.jsonl"
    path.touch()
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


TORN = [
    '{"kind": "epo',
    '{"kind": "end"',
    '{"text": "\\u00',
    "\x00\x00",
    '{"n": \n',
    "\x00\n\x01\n\n\x02",
    "x" * 200_000,
]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_tail_is_left_out_with_a_warning(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n' + torn)
    with pytest.warns(UserWarning, match=r"t\.jsonl: left out from line 2 on, torn"):
        assert read_rows(path) == [{"n": 1}]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_tail_makes_way_for_the_next_record(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "t.jsonl"
    long = {"n": 1, "text": "y" * 300_000}
    path.write_text(json.dumps(long) + "\n" + torn)
    with pytest.warns(UserWarning, match="torn"):
        append_row(path, {"n": 3})
    append_row(path, {"n": 4})
    assert read_rows(path) == [long, {"n": 3}, {"n": 4}]


def test_a_full_disk_leaves_the_records_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    append_row(path, {"n": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_row(path, {"n": 2})
    assert path.read_text() == '{"n": 1}\n'


def test_a_corrupt_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 is not a record"):
        read_rows(path)


def test_a_line_that_is_not_an_object_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('[1]\n{"n": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not a record: list instead of an object"):
        read_rows(path)


def test_appending_after_a_crash_removes_the_torn_line_only(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    with pytest.warns(UserWarning, match="torn"):
        append_row(path, {"n": 3})
    assert read_rows(path) == [{"n": 1}, {"n": 3}]


def test_appending_keeps_a_whole_line_that_only_lacks_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}')
    append_row(path, {"n": 3})
    assert [row["n"] for row in read_rows(path)] == [1, 2, 3]


# Study


def test_a_folder_without_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no study\.json"):
        read_study(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"arms": "K=1"}, "arms='K=1' must be a list"),
        ({"arms": ["a", "a"], "reference": None}, "different names"),
        ({"reference": "K=3"}, "reference='K=3' is not an arm; use one of K=1"),
        ({"baseline": 3}, "baseline=3 must be the name of an arm, or null"),
    ],
)
def test_a_study_that_breaks_a_rule_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write_study(tmp_path, **fields))


def test_a_study_that_lacks_a_field_or_is_not_json_is_refused(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    del study["arms"]
    (tmp_path / "study.json").write_text(json.dumps(study))
    with pytest.raises(ValueError, match="lacks arms"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_study(tmp_path)


# Trials


def exported(folder: Path, rows: list[dict[str, Any]]) -> Any:
    write_study(folder)
    write_rows(folder, rows)
    export(folder)
    return read_tables(folder)


def test_a_finished_trial_is_one_row(tmp_path: Path) -> None:
    tables = exported(tmp_path, [start("t", "K=4", seed=7), end("t", test_error=0.125)])
    row = tables.trials.iloc[0]
    expected = {
        "study_id": "0123456789ab",
        "trial_id": "t",
        "arm": "K=4",
        "name": "K=4 seed=7",
        "axes.arm": "K=4",
        "axes.seed": 7,
        "search_seed": 7,
        "config.seeds.search": 7,
        "config.search.0.epochs": 3,
        "config.search.0.keep": "[]",
        "config.method.edge_norm": True,
        "status": "completed",
        "attempts": 1,
        "test_error": 0.125,
        "params_m": 0.5,
        "genotype": genotype(),
        "genotype_key": Genotype.parse(genotype()).key,
        "started": pd.Timestamp(datetime.fromtimestamp(100, UTC)),
        "ended": pd.Timestamp(datetime.fromtimestamp(200, UTC)),
    }
    assert {name: row[name] for name in expected} == expected
    assert row[["reason", "valid_error", "madds_m", "skips_reduce", "search_saved_mb"]].isna().all()


def test_a_retried_trial_counts_once_and_its_last_rows_win(tmp_path: Path) -> None:
    first = [
        start("t"),
        epoch("t", 0, {"train_loss": 9.0, "only_first": 1.0}),
        epoch("t", 1, {"train_loss": 8.0}),
    ]
    second = [start("t", seed=5, attempt="a1", time=150.0), epoch("t", 0, {"train_loss": 1.0}, attempt="a1")]
    tables = exported(tmp_path, [*first, end("t", "failed"), *second, end("t", test_error=0.2, attempt="a1")])
    trial = tables.trials.iloc[0]
    assert (len(tables.trials), trial["attempts"], trial["status"], trial["test_error"]) == (
        1,
        2,
        "completed",
        0.2,
    )
    assert (trial["search_seed"], trial["started"]) == (5, pd.Timestamp(100, unit="s", tz="UTC"))
    assert tables.epochs[["epoch", "key", "value", "attempt_id"]].values.tolist() == [
        [0, "train_loss", 1.0, "a1"],
        [1, "train_loss", 8.0, "a0"],
    ]


@pytest.mark.parametrize(
    ("last", "status"), [("failed", "pending"), ("oom", "pending"), ("completed", "completed")]
)
def test_a_trial_started_again_is_pending_unless_it_had_completed(
    tmp_path: Path, last: str, status: str
) -> None:
    tables = exported(tmp_path, [start("t"), end("t", last), start("t", attempt="a1")])
    assert tables.trials["status"].tolist() == [status]


def test_a_trial_without_end_is_pending(tmp_path: Path) -> None:
    tables = exported(tmp_path, [start("t"), epoch("t", 0, {"train_loss": 1.0})])
    assert tables.trials["status"].tolist() == ["pending"]
    assert tables.trials[["ended", "test_error", "genotype"]].isna().all(axis=None)


def test_a_trial_that_crashed_before_its_first_record_is_left_out_with_a_warning(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    (tmp_path / "trials" / "empty.jsonl").touch()
    with pytest.warns(UserWarning, match=r"empty\.jsonl holds no record"):
        export(tmp_path)
    assert read_tables(tmp_path).trials["trial_id"].tolist() == ["K1-0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (end("other"), "record 2 is of trial 'other'"),
        (end("t", "stopped"), "status 'stopped'; use one of completed, pruned"),
        ({"kind": "memo"}, "kind 'memo'; use one of start, epoch, mark, note, end"),
        ({"kind": "mark", "trial": "t"}, r"record 2 \(mark\) lacks attempt, audit"),
        (mark("t", probability=1.5), r"probability=1.5 must be a number in \[0, 1\]"),
        (mark("t", probability=None), "probability=None must be a number"),
        (mark("t", probability=True), "probability=True must be a number"),
        (mark("t", rung=-1.0), r"rung=-1.0 must be a number in \[0, inf\]"),
        (mark("t", goes_on=1), "goes_on=1 must be true or false"),
        (mark("t", audit="yes"), "audit='yes' must be true or false"),
        (mark("t", probability=0.0), "goes_on=True at probability 0.0 cannot be"),
        (mark("t", probability=1.0, goes_on=False), "goes_on=False at probability 1.0 cannot be"),
        (mark("t", audit=True, goes_on=False), "a trial of the audit subset is not stopped"),
        ({"kind": "end", "trial": "t"}, r"record 2 \(end\) lacks attempt, genotype"),
        (end("t", genotype="Genotype()"), "record 2: .*write Genotype"),
        (epoch("t", 0, {"train_loss": "low"}), "metric train_loss='low' is not a number"),  # type: ignore[dict-item]
    ],
)
def test_a_record_that_breaks_a_rule_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_study(tmp_path)
    for content in (start("t"), row):
        append_row(tmp_path / "trials" / "t.jsonl", content)
    with pytest.raises(ValueError, match=message):
        export(tmp_path)


def test_marks_multiply_and_say_who_no_rule_could_stop(tmp_path: Path) -> None:
    rows = {
        "never": [],
        "spared twice": [mark("", 2.0, 0.5), mark("", 4.0, 0.2)],
        "spared, then stopped": [mark("", 2.0, 0.5), mark("", 4.0, 0.2, goes_on=False)],
        "recorded twice": [mark("", 2.0, 0.5), mark("", 2.0, 0.5, attempt="a1")],
        "audited": [mark("", 0.0, 1.0, audit=True), mark("", 2.0, 1.0, audit=True)],
        "audited, never marked": [mark("", 0.0, 1.0, audit=True)],
        "stopped without chance": [mark("", 2.0, 0.0, goes_on=False)],
        "stopped without mark": [],
    }
    found = []
    for trial, marks in rows.items():
        stopped = "stopped" in trial
        last = end(trial, "pruned", None) if stopped else end(trial)
        found += [start(trial), *(row | {"trial": trial} for row in marks), last]
    trials = exported(tmp_path, found).trials.set_index("trial_id")
    columns = trials[["completion_probability", "marks", "audit"]]
    assert {trial: tuple(columns.loc[trial]) for trial in rows} == {
        "never": (1.0, 0, False),
        "spared twice": (pytest.approx(0.1), 2, False),
        "spared, then stopped": (pytest.approx(0.1), 2, False),
        "recorded twice": (0.5, 1, False),
        "audited": (1.0, 1, True),
        "audited, never marked": (1.0, 0, True),
        "stopped without chance": (0.0, 1, False),
        "stopped without mark": (0.0, 0, False),
    }
    assert list(columns.dtypes) == [np.float64, np.int64, np.bool_]
    assert trials.loc["recorded twice", "attempts"] == 2


def test_columns_of_trials_go_straight_into_the_association(tmp_path: Path) -> None:
    """At a rung the worse half is marked, and goes on with probability 0.4, or because it is audited."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(60):
        trial, metric = f"t{number:02}", draw.random()
        audit, spared = draw.random() < 0.2, draw.random() < 0.4
        rows += [start(trial, seed=number), epoch(trial, 0, {"valid_error": metric}, stage="retrain")]
        if audit or metric > 0.5:
            rung = 1.0 if metric > 0.5 else 0.0
            chance = {"probability": 1.0} if audit else {"probability": 0.4, "goes_on": bool(spared)}
            rows.append(mark(trial, rung, audit=bool(audit), **chance))
        if audit or spared or metric <= 0.5:
            rows.append(end(trial, test_error=metric + 0.3 * draw.random()))
        elif number % 7:
            rows.append(end(trial, "pruned", None))
        else:
            rows.append(end(trial, "oom", None))
    tables = exported(tmp_path, rows)
    trials, epochs = tables.trials, tables.epochs
    first = epochs[epochs["key"] == "valid_error"].set_index("trial_id")["value"]
    found = association(
        trials["trial_id"].map(first.to_dict()),
        trials["test_error"],
        probability=trials["completion_probability"],
        audit=trials["audit"],
        failed=~trials["status"].isin(["completed", "pruned"]),
        draws=Draws(resamples=99),
    )
    done = trials[trials["status"] == "completed"]
    by_hand = weighted_tau(
        done["trial_id"].map(first.to_dict()), done["test_error"], 1 / done["completion_probability"]
    )
    assert by_hand is not None
    assert found.headline.value == pytest.approx(by_hand)
    assert (found.n_total, found.n_used, found.n_failed) == (60, len(done), (trials["status"] == "oom").sum())
    assert found.n_stopped == (trials["status"] == "pruned").sum() > 0
    assert found.audit.n == trials["audit"].sum() > 3
    assert set(done["completion_probability"]) == {1.0, 0.4}


def test_a_trial_without_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no start record"):
        exported(tmp_path, [end("t")])


def test_an_end_metric_named_as_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end metric 'attempts' has the name of another column"):
        exported(tmp_path, [start("t"), end("t", metrics={"attempts": 1.0})])


# Columns


def with_config(trial: str, config: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    return start(trial) | {"config": config, "axes": axes}


def test_config_columns_have_the_type_of_their_values(tmp_path: Path) -> None:
    first = {"a": {"int": 1, "float": 0.5, "mixed": 1, "bool": True, "gap": 3, "null": None, "big": 2**63}}
    second = {
        "a": {
            "int": 2,
            "float": 1,
            "mixed": "auto",
            "bool": False,
            "null": None,
            "big": 1,
            "list": [5, [True]],
        }
    }
    rows = [
        with_config("t", first, {"K": 4, "depths": [5, 11]}),
        with_config("u", second, {"K": None, "depths": [8, 20]}),
    ]
    trials = exported(tmp_path, rows).trials
    found = {
        name: (str(column.dtype), column.astype(object).where(column.notna(), None).tolist())
        for name, column in trials.items()
        if str(name).startswith(("config.", "axes."))
    }
    assert found == {
        "axes.K": ("Int64", [4, None]),
        "axes.depths": ("str", ["[5, 11]", "[8, 20]"]),
        "config.a.int": ("int64", [1, 2]),
        "config.a.float": ("float64", [0.5, 1.0]),
        "config.a.mixed": ("str", ["1", "auto"]),
        "config.a.bool": ("bool", [True, False]),
        "config.a.gap": ("Int64", [3, None]),
        "config.a.null": ("object", [None, None]),
        "config.a.big": ("str", [str(2**63), "1"]),
        "config.a.list.0": ("Int64", [None, 5]),
        "config.a.list.1.0": ("boolean", [None, True]),
    }


def test_each_seed_is_a_column(tmp_path: Path) -> None:
    seeds = {"split": 2, "search": 1, "retrain": 3}
    trials = exported(tmp_path, [with_config("t", {"seeds": seeds, "data": {"seed": 9}}, {})]).trials
    assert trials[["split_seed", "search_seed", "retrain_seed"]].values.tolist() == [[2, 1, 3]]


def test_the_machine_of_a_trial_is_in_columns_if_recorded(tmp_path: Path) -> None:
    host = {"node": "n1", "device": "cuda:0", "threads": 4}
    trials = exported(tmp_path, [start("t") | {"host": host}, start("u")]).trials
    assert trials[["host.node", "host.device", "host.threads"]].iloc[0].tolist() == ["n1", "cuda:0", 4]
    assert trials.filter(like="host.").iloc[1].isna().all()


def test_records_without_a_machine_have_no_columns_for_it(tmp_path: Path) -> None:
    assert exported(tmp_path, [start("t")]).trials.filter(like="host.").empty


def test_trials_stand_in_the_order_of_the_arms(build: Build) -> None:
    tables = build({"K=4": [0.1, 0.2], "K=1": [0.3], "random": [0.4]})
    assert tables.trials["arm"].tolist() == ["K=4", "K=4", "K=1", "random"]
    assert tables.arms == ("K=4", "K=1", "random")


def test_arms_that_the_study_does_not_list_come_last(build: Build) -> None:
    tables = build({"K=4": [0.1], "K=1": [0.3], "random": [0.4]}, arms=["K=1"], baseline="random")
    assert tables.arms == ("K=1", "random", "K=4")


def test_epochs_are_long_and_sorted(tmp_path: Path) -> None:
    rows = [start("u"), start("t")]
    for trial in ("u", "t"):
        for number in (2, 10, 0):
            rows.append(epoch(trial, number, {"valid_error": 0.5, "beta_entropy": None}, part=number // 3))
        rows.append(epoch(trial, 0, {"lr": 0.1}, "retrain"))
    epochs = exported(tmp_path, rows).epochs
    one = [("retrain", "lr", 0)] + [
        ("search", key, n) for key in ("beta_entropy", "valid_error") for n in (0, 2, 10)
    ]
    found = list(epochs[["trial_id", "stage", "key", "epoch"]].itertuples(index=False, name=None))
    assert found == [(trial, *rest) for trial in ("t", "u") for rest in one]
    assert epochs.loc[epochs["key"] == "beta_entropy", "value"].isna().all()
    assert epochs.loc[epochs["epoch"] == 10, "part"].tolist() == [3, 3, 3, 3]
    assert (epochs[["trial_id", "attempt_id", "stage", "key"]].dtypes == "category").all()
    assert epochs["timestamp"].iloc[0] == pd.Timestamp(101, unit="s", tz="UTC")


def test_genotypes_hold_each_epoch_and_the_final_one(tmp_path: Path) -> None:
    prices = {"params_m": 1.5, "madds_m": 200.0}
    rows = [
        start("t"),
        epoch("t", 0, prices, genotype=genotype(3)),
        epoch("t", 1, prices),
        epoch("t", 0, {"lr": 0.1}, "retrain"),
        end("t", genotype=genotype(2)),
    ]
    found = exported(tmp_path, rows).genotypes
    assert found[["stage", "skips_normal", "skips_reduce", "params_m"]].values.tolist() == [
        ["search", 3, 0, 1.5],
        ["final", 2, 0, 0.5],
    ]
    assert found["epoch"].isna().tolist() == [False, True]
    assert found["madds_m"].isna().tolist() == [False, True]
    for text, row in zip((genotype(3), genotype(2)), found.itertuples(), strict=True):
        parsed = Genotype.parse(text)
        assert Genotype.from_json(json.loads(str(row.genotype))) == parsed
        assert (row.key, row.depth_normal, row.width_reduce) == (parsed.key, 1, 4 * len(CONV))


def test_isomorphic_genotypes_share_their_key(tmp_path: Path) -> None:
    swapped = genotype().replace(
        "('skip_connect', 0), ('sep_conv_3x3', 1)", "('sep_conv_3x3', 1), ('skip_connect', 0)"
    )
    assert swapped != genotype()
    tables = exported(tmp_path, [start("t"), end("t"), start("u"), end("u", genotype=swapped)])
    assert tables.trials["genotype"].nunique() == 2
    assert tables.trials["genotype_key"].nunique() == 1


# Files


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder, order in zip(folders, ((0, 1, 2), (2, 0, 1)), strict=True):
        write_study(folder)
        for seed in order:
            write_trial(folder, "K=1", seed, 0.1 + seed / 100)
            write_trial(folder, "random", seed, 0.2 + seed / 100)
    first, second = (export(folder) for folder in folders)
    assert [path.name for path in first.values()] == [
        "trials.parquet",
        "epochs.parquet",
        "genotypes.parquet",
        "finals.parquet",
        "protocols.parquet",
        "manifest.json",
    ]
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes()


def test_the_manifest_describes_the_files(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    paths = export(tmp_path)
    manifest = json.loads(paths.pop("manifest").read_text())
    assert manifest["rows"] == {"trials": 1, "epochs": 14, "genotypes": 4, "finals": 1, "protocols": 1}
    (record,) = (tmp_path / "trials").iterdir()
    assert manifest["records"] == {record.name: len(record.read_bytes())}
    assert (manifest["schema"], manifest["study_id"]) == (1, "0123456789ab")
    for name, path in paths.items():
        assert manifest["sha256"][name] == hashlib.sha256(path.read_bytes()).hexdigest()
        stored = pq.ParquetFile(path)
        assert stored.metadata.metadata[b"nas.schema"] == b"1"
        assert stored.metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_failed_export_leaves_the_old_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    old = {path: path.read_bytes() for path in export(tmp_path).values()}
    write_trial(tmp_path, "K=1", 1, 0.2)

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("analysis.records.os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == old


def test_tables_that_are_missing_or_changed_are_refused(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    with pytest.raises(FileNotFoundError, match="has no tables yet"):
        read_tables(tmp_path)
    paths = export(tmp_path)
    shutil.copy(paths["epochs"], paths["trials"])
    with pytest.raises(
        ValueError, match=r"trials\.parquet is not the file its manifest describes; remove .*tables"
    ):
        read_tables(tmp_path)
    export(tmp_path)
    paths["genotypes"].unlink()
    with pytest.raises(FileNotFoundError, match=r"genotypes\.parquet is missing; remove .*tables"):
        read_tables(tmp_path)
    shutil.rmtree(tmp_path / "trials")
    with pytest.raises(FileNotFoundError, match=r"genotypes\.parquet is missing; restore .* from a copy"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: '{"schema": 0}', "has schema 0, this version reads 1"),
        (lambda _: "[1", "is not a JSON object"),
        (lambda _: "[1]", "is not a JSON object: list instead of an object"),
        (lambda manifest: {key: manifest[key] for key in manifest if key != "sha256"}, "lacks sha256"),
        (lambda manifest: {key: manifest[key] for key in manifest if key != "study_id"}, "lacks study_id"),
        (
            lambda manifest: manifest | {"sha256": {"trials": "0", "epochs": "0"}},
            "lacks genotypes; remove .*tables",
        ),
        (
            lambda manifest: manifest | {"study_id": "f" * 12},
            "of study ffffffffffff, and study.json of 01234",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path: Path, change: Any, said: str) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    path = export(tmp_path)["manifest"]
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"manifest\.json .*{said}"):
        read_tables(tmp_path)


@pytest.mark.parametrize(("name", "column"), [(name, each[-1]) for name, each in COLUMNS.items()])
def test_a_table_without_a_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    write_study(tmp_path)
    write_trial(tmp_path, "K=1", 0, 0.1)
    paths = export(tmp_path)
    pq.write_table(pq.read_table(paths[name]).drop_columns([column]), paths[name])
    manifest = json.loads(paths["manifest"].read_text())
    manifest["sha256"][name] = hashlib.sha256(paths[name].read_bytes()).hexdigest()
    paths["manifest"].write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{name}\.parquet lacks the column {column}; remove .*tables"):
        read_tables(tmp_path)


def test_tables_are_stale_once_there_are_other_records(tmp_path: Path) -> None:
    write_study(tmp_path)
    assert not stale(tmp_path)  # there is nothing to build them from
    trial = write_trial(tmp_path, "K=1", 0, None, "pending")
    assert stale(tmp_path)
    export(tmp_path)
    assert not stale(tmp_path)
    write_rows(tmp_path, [end(trial)])
    assert stale(tmp_path)
    export(tmp_path)
    write_trial(tmp_path, "K=1", 1, 0.1)
    assert stale(tmp_path)
    shutil.rmtree(tmp_path / "trials")
    assert not stale(tmp_path)  # tables that were published without records are what there is


def test_tables_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    write_study(tmp_path)
    for seed in range(2):
        write_trial(tmp_path, "K=1", seed, 0.1 + seed / 100)
    export(tmp_path)
    rows = {path: read_rows(path) for path in (tmp_path / "trials").iterdir()}
    read, built = read_tables(tmp_path), tables_of(read_study(tmp_path), rows)
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(built, name), getattr(read, name))


# Protocols


def measured(trial: str, seed: int = 0, **config: Any) -> list[dict[str, Any]]:
    """Rows of a trial with settings of its retraining and data."""
    row = start(trial, seed=seed)
    row["config"] |= {"retrain": {"epochs": 3, "compile": "off"}, "data": {"source": "digits"}} | config
    return [row, end(trial)]


def test_trials_measured_alike_share_a_protocol(tmp_path: Path) -> None:
    seeds = {"split": 0, "search": 1, "retrain": 1}
    rows = [
        *measured("a", seed=0),
        *measured("b", seed=1),
        *measured("same", retrain={"epochs": 3, "compile": "default"}),
        *measured("longer", retrain={"epochs": 4, "compile": "off"}),
        *measured("fewer", data={"source": "digits", "limit": 10}),
        *measured("split", seeds=seeds | {"split": 1}),
    ]
    folder = write_study(tmp_path / "a", provenance={"data_sha256": "ab" * 32})
    write_rows(folder, rows)
    paths = export(folder)
    trials = read_tables(folder).trials.set_index("trial_id")
    protocol = trials["protocol_id"]
    assert protocol.str.fullmatch("[0-9a-f]{12}").all()
    assert protocol["a"] == protocol["b"] == protocol["same"]
    assert protocol[["a", "longer", "fewer", "split"]].is_unique
    protocols = pd.read_parquet(paths["protocols"]).set_index("protocol_id")
    assert set(protocols.index) == set(protocol)
    assert protocols.loc[protocol["longer"], "config.retrain.epochs"] == 4
    assert set(protocols["data_sha256"]) == {"ab" * 32}
    assert not [name for name in map(str, protocols) if name.endswith("compile") or "search" in name]
    # Other data under the same settings are another protocol.
    other = write_study(tmp_path / "b", provenance={"data_sha256": "cd" * 32})
    write_rows(other, rows)
    export(other)
    assert not set(read_tables(other).trials["protocol_id"]) & set(protocol)


def test_finals_are_the_last_errors_of_completed_trials(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    write_rows(folder, [*measured("a", 3), start("b"), end("b", "pruned", None), start("c"), end("c")])
    write_rows(folder, [start("d"), end("d", test_error=None), start("e")])
    paths = export(folder)
    finals = pd.read_parquet(paths["finals"]).set_index("trial_id")
    columns = ["retrain_seed", "protocol_id", "test_error", "params_m", "madds_m"]
    assert list(finals.columns) == columns
    trials = read_tables(folder).finals().set_index("trial_id")
    assert sorted(finals.index) == ["a", "c"]
    pd.testing.assert_frame_equal(finals, trials[columns], check_dtype=False)


def test_a_study_without_trials_has_empty_tables_with_the_usual_columns(build: Build) -> None:
    tables = build({"K=1": [], "random": []})
    assert (len(tables.trials), len(tables.epochs), len(tables.genotypes)) == (0, 0, 0)
    assert {"trial_id", "arm", "status", "test_error", "search_seconds"} <= set(tables.trials)
    assert {"trial_id", "stage", "epoch", "key", "value"} <= set(tables.epochs)


def test_finals_are_completed_trials_with_a_test_error(build: Build) -> None:
    tables = build({"K=1": [0.1, None, "failed", "pending"], "random": [0.3]})
    assert tables.finals()["test_error"].tolist() == [0.1, 0.3]
    assert tables.finals("K=1")["trial_id"].tolist() == ["K1-0"]
