"""What a study measures by name, from the command line to the report, without Ray."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import report
from experiments import main, sweep_k, worker
from experiments.folder import write_study
from experiments.packing import Share
from experiments.recorder import Progress, Recorder
from experiments.study import axis
from nas.measures import columns_of
from nas.proxies import PROXIES

STUDY = replace(sweep_k.STUDY, axes=(axis("K", 1),), baseline=False)
"""Three searches by their seeds, as few as can be correlated with anything."""

SETTINGS = {
    "measure": "eigenvalue,proxies",
    "data.limit": 80,
    "data.test_limit": 40,
    "space.nodes": 2,
    "search.*.epochs": 1,
    "retrain.epochs": 1,
}

BOOKKEEPING = ("_status", "_sd", "_low", "_high", "_seconds")


class Silent:
    """A tracker that nobody looks at."""

    def row(self, row: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Measured:
    """A study that has run, and its report."""

    study: dict[str, Any]
    trials: pd.DataFrame
    results: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured") / "study"
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    arguments = ["--preset", "tiny", "--seeds", "3", "--out", str(folder), "--set", *settings]
    job = main.prepare(STUDY, main.parser(STUDY).parse_args(arguments))
    folder.mkdir()
    write_study(folder, job.meta)
    recorder = Recorder(folder, Silent(), Progress(job.planned, job.base))  # type: ignore[arg-type]
    data = {worker.data_key(job.base): job.arrays}
    for planned in job.planned:
        running = worker.TrialActor.__new__(worker.TrialActor)
        running.setup({"planned": worker.configuration(planned, Share(cpus=1, gpus=0, memory_mb=512))}, data)
        done = False
        while not done:
            told = running.step()
            done = told["done"]
            for row in told["rows"]:
                recorder.row(row)
    report.write(folder, folder / "report")
    return Measured(
        json.loads((folder / "study.json").read_text()),
        pd.read_parquet(folder / "tables" / "trials.parquet"),
        json.loads((folder / "report" / "results.json").read_text()),
        (folder / "report" / "report.md").read_text(),
    )


def test_what_was_asked_for_is_a_column_of_the_trials(measured: Measured) -> None:
    assert measured.trials["status"].tolist() == ["completed"] * 3
    named = [f"search_{name}" for name in columns_of(("eigenvalue",))]
    named += [f"proxy_{name}{end}" for name in PROXIES for end in ("", "_sd", "_status", "_seconds")]
    assert set(named) <= set(measured.trials)
    assert np.isfinite(measured.trials["search_eigenvalue"]).all()


def test_the_study_says_what_each_column_is(measured: Measured) -> None:
    told = measured.study["metrics"]
    assert {*columns_of(("eigenvalue",)), *(f"proxy_{name}" for name in PROXIES)} <= set(told)
    for name in columns_of(("eigenvalue", "proxies")):
        assert set(told[name]) >= {"unit", "better", "meaning"}
        assert name.startswith("proxy_") or f"search_{name}" in measured.trials


def test_the_report_has_what_was_measured_and_nothing_of_how(measured: Measured) -> None:
    reported = [one["name"] for one in measured.results["metrics"]]
    varying = {
        name
        for name in ("search_eigenvalue", *(f"proxy_{name}" for name in PROXIES))
        if np.isfinite(measured.trials[name]).all() and np.ptp(measured.trials[name]) > 1e-6
    }
    assert {"search_eigenvalue", "proxy_synflow", "proxy_params"} <= varying <= set(reported)
    assert [name for name in reported if name.endswith(BOOKKEEPING) and name != "search_seconds"] == []
    claims = " ".join(one["claim"] for one in measured.results["claims"])
    assert "search_eigenvalue tells which run errs less" in claims
    assert "search_eigenvalue" in measured.text


def test_what_was_not_asked_for_is_nowhere(measured: Measured) -> None:
    other = set(columns_of(("hessian", "perturbation", "descriptors"))) - set(columns_of(("eigenvalue",)))
    assert not {f"search_{name}" for name in other} & set(measured.trials)
    assert not other & set(measured.study["metrics"])
