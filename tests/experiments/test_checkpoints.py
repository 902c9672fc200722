"""Checkpoints: whole or not at all, checked when read; trials go on from them as if never stopped."""

import errno
import json
import os
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import compare_methods, worker
from experiments.checkpoints import KEEP, Checkpoints, read, write
from experiments.packing import Share
from experiments.study import Planned, Policy, Settings, plan
from experiments.worker import TrialActor, configuration
from nas.data import Arrays, load
from nas.trial import TrialRun

STATE = {"weights": torch.arange(6.0).reshape(2, 3), "epoch": 3, "genotype": "none", "rows": [1.5, None]}
MEASURED = ("seconds", "peak_memory_mb")
SMALL: dict[str, Any] = {
    "space.nodes": 2,
    "data.limit": 48,
    "data.test_limit": 16,
    "search.*.batch_size": 16,
    "retrain.epochs": 3,
    "retrain.batch_size": 24,
}


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


# The file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "deep/state.pt", STATE)
    assert same(read(tmp_path / "deep/state.pt"), STATE)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.pt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write(path, STATE)
    content = bytearray(path.read_bytes())
    draws = random.Random(0)
    for _ in range(20):
        broken = bytearray(content)
        if damage == "cut":
            del broken[draws.randrange(len(broken)) :]
        elif damage == "flip":
            broken[draws.randrange(len(broken))] ^= 1 << draws.randrange(8)
        path.write_bytes({"empty": b"", "other": b"PK\x03\x04" + bytes(content)}.get(damage, bytes(broken)))
        with pytest.raises(ValueError, match=r"not a checkpoint|not as it was written"):
            read(path)


class Full:
    """A file on a disk that has no more room."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    write(path, STATE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if moment == "write":
            opened = Path.open

            def half(path: Path, *mode: Any) -> Any:
                file = opened(path, *mode)
                file.write(b"half of it")
                return Full(file)

            patched.setattr(Path, "open", half)
        else:
            patched.setattr(os, moment, full)
        with pytest.raises(OSError, match="No space left"):
            write(path, {"epoch": 4})
    assert same(read(path), STATE)
    assert [each.name for each in tmp_path.iterdir()] == ["state.pt"]


# Those of a trial


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "abc")
    assert kept.load() == (None, [])
    for epochs in (1, 2, 10, 9999, 10000):
        kept.save(epochs, {"epochs": epochs})
    assert len(list((tmp_path / "abc").iterdir())) == KEEP == 2
    assert kept.load() == ({"epochs": 10000}, [])
    kept.clear()
    assert not (tmp_path / "abc").exists()


def test_the_one_before_stands_in_for_a_torn_one(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "abc")
    for epochs in (1, 2):
        kept.save(epochs, {"epochs": epochs})
    path = tmp_path / "abc/000002.pt"
    path.write_bytes(path.read_bytes()[:-1])
    held, doubts = kept.load()
    assert held == {"epochs": 1}
    assert len(doubts) == 1
    assert str(path) in doubts[0]
    assert "checksum" in doubts[0]
    # It is gone, so that the next one to be saved finds the good one to fall back to.
    kept.save(3, {"epochs": 3})
    assert sorted(each.name for each in (tmp_path / "abc").iterdir()) == ["000001.pt", "000003.pt"]


def test_a_state_that_was_given_up_goes_when_another_is_saved(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "abc")
    for epochs in (7, 8):
        kept.save(epochs, {"epochs": epochs})
    for epochs in (1, 2, 3):
        kept.save(epochs, {"epochs": epochs, "anew": True})
        assert kept.load() == ({"epochs": epochs, "anew": True}, [])
    assert sorted(each.name for each in (tmp_path / "abc").iterdir()) == ["000002.pt", "000003.pt"]


def test_none_is_left(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "abc")
    for epochs in (1, 2):
        kept.save(epochs, {"epochs": epochs})
        (tmp_path / f"abc/{epochs:06}.pt").write_bytes(b"")
    held, doubts = kept.load()
    assert held is None
    assert len(doubts) == 2


# Trials that go on


@cache
def planned() -> Mapping[str, Planned]:
    """One trial of each method, two epochs in every stage of its search."""
    settings = Settings("tiny", seeds=1, changes=SMALL | {"search.*.epochs": 2, "search.*.frozen_epochs": 1})
    return {p.arm.removeprefix("method="): p for p in plan(compare_methods.STUDY, settings)}


@cache
def arrays() -> Mapping[str, Arrays]:
    trial = next(iter(planned().values())).trial
    return {worker.data_key(trial): load(trial.data)}


class Actor(TrialActor):
    """The trainable with the data that Ray would hand it."""

    def setup(self, config: dict[str, Any], data: Mapping[str, Arrays] | None = None) -> None:
        super().setup(config, arrays())


def actor(p: Planned, folder: Path, policy: Policy | None = None) -> Actor:
    share = Share(cpus=1, gpus=0, memory_mb=512)
    config = configuration(p, share, folder, policy or Policy(checkpoint_seconds=0))
    return Actor(config={"planned": config})


def to_the_end(running: Actor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    done = False
    while not done:
        result = running.step()
        rows += result["rows"]
        done = result["done"]
    return rows


def outcome(rows: list[dict[str, Any]]) -> bytes:
    """What was recorded of a trial, of each epoch the last row, without what is measured of the machine."""
    told = {}
    for row in rows:
        if row["kind"] in ("epoch", "end"):
            metrics = {n: v for n, v in row["metrics"].items() if not n.endswith(MEASURED)}
            fixed = {n: v for n, v in row.items() if n not in ("time", "attempt")} | {"metrics": metrics}
            told[row["kind"], row.get("stage"), row.get("epoch")] = fixed
    return json.dumps(list(told.values())).encode()


@cache
def undisturbed(name: str) -> bytes:
    share = Share(cpus=1, gpus=0, memory_mb=512)
    return outcome(to_the_end(Actor(config={"planned": configuration(planned()[name], share)})))


@pytest.mark.parametrize("method", ["pc_darts", "darts_2nd", "p_darts", "gdas"])
def test_a_trial_killed_after_any_epoch_ends_as_if_it_never_was(method: str, tmp_path: Path) -> None:
    p = planned()[method]
    rows: list[dict[str, Any]] = []
    ended = False
    while not ended:  # every process lives for one epoch
        result = actor(p, tmp_path).step()
        known = {json.dumps(row) for row in rows}
        new = [row for row in result["rows"] if json.dumps(row) not in known]
        assert sum(row["kind"] == "epoch" for row in new) == 1  # all that was recorded is told again, once
        rows += new
        ended = result["done"]
    assert outcome(rows) == undisturbed(method)
    starts = [row["resumed"] for row in rows if row["kind"] == "start"]
    assert starts == list(range(len(starts)))
    assert len({row["attempt"] for row in rows}) == len(starts)


def test_what_lies_between_checkpoints_is_run_again(tmp_path: Path) -> None:
    p, slow = planned()["pc_darts"], Policy(checkpoint_seconds=1e9)
    first = actor(p, tmp_path, slow)
    rows = [row for _ in range(4) for row in first.step()["rows"]]  # search ends after 2 and is saved then
    second = actor(p, tmp_path, slow)
    again = to_the_end(second)
    assert [row["resumed"] for row in again if row["kind"] == "start"] == [0, 2]
    assert outcome(again) == undisturbed("pc_darts")
    assert outcome(rows + again) == undisturbed("pc_darts")


def test_rows_that_the_driver_did_not_record_are_not_lost(tmp_path: Path) -> None:
    p = planned()["pc_darts"]
    running = actor(p, tmp_path)
    to_the_end(running)  # and the driver dies before it hears of any of it
    result = actor(p, tmp_path).step()
    assert result["done"]
    assert outcome(result["rows"]) == undisturbed("pc_darts")
    assert [row["kind"] for row in result["rows"]] == ["start", *["epoch"] * 5, "end"]


def test_the_test_part_is_read_once_though_the_last_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = planned()["pc_darts"]
    to_the_end(actor(p, tmp_path))
    monkeypatch.setattr(TrialRun, "_finish", lambda *_: pytest.fail("it was read again"))
    assert actor(p, tmp_path).step()["done"]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "all"])
def test_a_trial_goes_on_whatever_became_of_its_checkpoints(damage: str, tmp_path: Path) -> None:
    p = planned()["pc_darts"]
    running = actor(p, tmp_path)
    rows = [row for _ in range(3) for row in running.step()["rows"]]
    older, newer = sorted((tmp_path / running.id).iterdir())
    content = newer.read_bytes()
    if damage == "cut":
        newer.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        newer.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "missing":
        newer.unlink()
    else:
        older.write_bytes(b"")
        newer.write_bytes(b"")
    again = to_the_end(actor(p, tmp_path))
    assert outcome(rows + again) == undisturbed("pc_darts")
    start = next(row for row in again if row["kind"] == "start" and row["attempt"] != running.attempt)
    assert start["resumed"] == (0 if damage == "all" else 2)
    notes = [row["text"] for row in again if row["kind"] == "note"]
    assert len(notes) == {"cut": 1, "flip": 1, "missing": 0, "all": 3}[damage]
    assert all(str(newer) in note or str(older) in note or "begins anew" in note for note in notes)


def test_a_checkpoint_of_another_version_is_told_of_and_left(tmp_path: Path) -> None:
    p = planned()["pc_darts"]
    kept = Checkpoints(tmp_path, p.trial.id)
    kept.save(2, {"run": {"trial": p.trial.id, "search": {}}, "rows": "[]"})
    first = [row for _ in range(2) for row in actor(p, tmp_path).step()["rows"]]  # which lives for an epoch
    assert sum(row["kind"] == "epoch" for row in first) == 3  # 0; 0 told again, and 1
    rows = to_the_end(actor(p, tmp_path))
    assert outcome(rows) == undisturbed("pc_darts")
    (note,) = [row["text"] for row in rows if row["kind"] == "note"]
    assert "does not fit" in note
    assert "begins anew" in note


def test_a_full_disk_costs_a_trial_its_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    rows = to_the_end(actor(planned()["pc_darts"], tmp_path))
    assert outcome(rows) == undisturbed("pc_darts")
    notes = [row["text"] for row in rows if row["kind"] == "note"]
    assert notes
    assert all("No space left" in note for note in notes)
    assert not list(tmp_path.rglob("*.*"))


def test_supernet_weights_go_with_the_search(tmp_path: Path) -> None:
    running = actor(planned()["pc_darts"], tmp_path)
    saved = []
    for _ in range(3):
        running.step()
        held = Checkpoints(tmp_path, running.id).load()[0]
        assert held is not None
        saved.append("supernet" in held["run"]["search"])
    assert saved == [True, False, False]


@pytest.mark.parametrize("error", [OSError("Stale file handle"), torch.AcceleratorError("CUDA error")])
def test_an_error_that_another_process_may_not_meet_is_left_to_ray(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = actor(planned()["pc_darts"], tmp_path)

    def step(run: TrialRun) -> None:
        raise error

    monkeypatch.setattr(TrialRun, "step", step)
    with pytest.raises(type(error)):
        running.step()


def test_a_cpu_without_memory_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = actor(planned()["pc_darts"], tmp_path)
    monkeypatch.setattr(TrialRun, "step", lambda run: torch.empty(2**50))
    result = running.step()
    assert result["done"]
    assert result["rows"][-1]["status"] == "oom"


@pytest.mark.parametrize("method", ["darts_2nd", "gdas"])
def test_deterministic_algorithms_exist_for_all_that_a_trial_runs(method: str, tmp_path: Path) -> None:
    rows = to_the_end(actor(planned()[method], tmp_path, Policy(deterministic=True)))
    assert torch.are_deterministic_algorithms_enabled()
    assert outcome(rows) == undisturbed(method)
    # A process that is used again for a trial that does not ask for them uses them no more.
    actor(planned()["pc_darts"], tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("x")])
def test_a_checkpoint_for_which_there_is_no_room_is_no_wrong_one(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = planned()["pc_darts"]
    actor(p, tmp_path).step()

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TrialRun, "load_state_dict", load)
    if isinstance(error, torch.OutOfMemoryError):
        assert actor(p, tmp_path).step()["rows"][-1]["status"] == "oom"
    else:
        with pytest.raises(torch.AcceleratorError):
            actor(p, tmp_path)
    assert Checkpoints(tmp_path, p.trial.id).load()[0] is not None
