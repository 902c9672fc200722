"""Synthetic study folders: a helper that writes the records a study would have written."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import figures
from analysis.records import Tables, append_row, export, read_tables


@pytest.fixture(scope="session", autouse=True)
def _strict_figures() -> Iterator[None]:
    """A figure that cannot be drawn fails its test, where a report would leave it out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FAILURES", ())
        yield


SKIP = (("skip_connect", 0), ("sep_conv_3x3", 1))
CONV = (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))


def genotype(skips: int = 1) -> str:
    """Text of a four-node genotype whose first `skips` normal nodes have one skip connection each."""
    nodes = [edge for node in range(4) for edge in (SKIP if node < skips else CONV)]
    reduce = [edge for _ in range(4) for edge in CONV]
    concat = [2, 3, 4, 5]
    return f"Genotype(normal={nodes}, normal_concat={concat}, reduce={reduce}, reduce_concat={concat})"


def write_study(folder: Path, **fields: object) -> Path:
    """Write `study.json`, with fields in place of those of a plain study of K=1 and K=4."""
    study = {
        "schema": 1,
        "study_id": "0123456789ab",
        "name": "sweep_k",
        "question": "What does PC-DARTS lose in final error for searching on 1/K of the channels?",
        "preset": "laptop",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "python -m experiments.sweep_k",
        "axis": "K",
        "reference": "K=1",
        "baseline": "random",
        "arms": ["K=1", "K=4", "random"],
        "provenance": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study | fields))
    return folder


def start(
    trial: str, arm: str = "K=4", seed: int = 0, attempt: str = "a0", time: float = 100.0
) -> dict[str, Any]:
    """A start row."""
    config = {
        "seeds": {"split": 0, "search": seed, "retrain": seed},
        "search": [{"epochs": 3, "keep": []}],
        "method": {"name": arm, "edge_norm": True},
    }
    name, axes = f"{arm} seed={seed}", {"arm": arm, "seed": seed}
    row = {"kind": "start", "trial": trial, "attempt": attempt, "time": time}
    return row | {"name": name, "arm": arm, "axes": axes, "config": config}


def epoch(
    trial: str, number: int, metrics: Mapping[str, float | None], stage: str = "search", **fields: object
) -> dict[str, Any]:
    """An epoch row."""
    row = {
        "kind": "epoch",
        "trial": trial,
        "attempt": "a0",
        "time": 101.0 + number,
        "stage": stage,
        "part": 0,
    }
    return row | {"epoch": number, "metrics": dict(metrics), "genotype": None} | fields


def end(
    trial: str, status: str = "completed", test_error: float | None = 0.1, **fields: object
) -> dict[str, Any]:
    """An end row."""
    metrics = {
        "test_error": test_error,
        "params_m": 0.5,
        "skips": 1.0,
        "search_seconds": 30.0,
        "peak_memory_mb": 800.0,
    }
    row = {"kind": "end", "trial": trial, "attempt": "a0", "time": 200.0, "status": status, "reason": None}
    return row | {"genotype": genotype() if status == "completed" else None, "metrics": metrics} | fields


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to the files of their trials."""
    for row in rows:
        append_row(folder / "trials" / f"{row['trial']}.jsonl", row)


def write_trial(
    folder: Path, arm: str, seed: int, test_error: float | None, status: str = "completed"
) -> str:
    """Write a trial of three search epochs (none if random) and four of retraining, two if not completed."""
    trial = f"{arm.replace(' ', '_').replace('=', '')}-{seed}"
    level = 0.1 if test_error is None else test_error
    rows = [start(trial, arm, seed)]
    for stage, epochs in (
        ("search", 0 if arm == "random" else 3),
        ("retrain", 4 if status == "completed" else 2),
    ):
        for number in range(epochs):
            error = level + 0.5 * 0.4 ** (number + 1)
            text = genotype(number) if stage == "search" else None
            rows.append(
                epoch(trial, number, {"valid_error": error, "train_loss": 2 * error}, stage, genotype=text)
            )
    if status != "pending":
        found = genotype(seed % 3)
        rows.append(end(trial, status, test_error, genotype=found if status == "completed" else None))
    write_rows(folder, rows)
    return trial


Outcome = float | str | None
"""Test error of a completed trial, or the status of one that has none."""

Build = Callable[..., Tables]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Tables of a study: `build({arm: [test error or status, ...]}, **fields of study.json)`."""

    def tables(outcomes: Mapping[str, Sequence[Outcome]], **fields: object) -> Tables:
        folder = write_study(tmp_path / "study", **{"arms": list(outcomes), **fields})
        for arm, results in outcomes.items():
            for seed, result in enumerate(results):
                if isinstance(result, str):
                    write_trial(folder, arm, seed, None, result)
                else:
                    write_trial(folder, arm, seed, result)
        export(folder)
        return read_tables(folder)

    return tables


def draws(mean: float, spread: float, runs: int, seed: int) -> list[float]:
    """Test errors around a mean."""
    return [round(float(value), 5) for value in np.random.default_rng(seed).normal(mean, spread, runs)]
