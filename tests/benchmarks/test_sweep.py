"""The whole-trial benchmark compares two forms of one trial."""

import pytest
import torch

from benchmarks.sweep import PlainTrialRun, in_plain_form, main
from nas.data import Data, load
from nas.papers import PAPERS, on_digits, tiny
from nas.trial import TrialRun


def test_both_forms_train_the_same_trial() -> None:
    trial = on_digits(tiny(PAPERS["pc_darts"]))
    data = Data(load(trial.data), trial.data, trial.seeds.split, torch.device("cpu"))
    rows = []
    for run in (TrialRun(trial, data, data.device), PlainTrialRun(in_plain_form(trial), data, data.device)):
        rows.append([run.step() for _ in range(4)])
        assert run.retrain is not None
    for fast, plain in zip(*rows, strict=True):
        assert fast.stage == plain.stage
        for name in ("train_loss", "valid_loss"):
            assert fast.metrics[name] == pytest.approx(plain.metrics[name], rel=0.02)
    assert rows[0][2].genotype == rows[1][2].genotype


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    main(["--preset", "tiny", "--K", "8", "--rounds", "1"])
    torch.set_num_threads(before)
    assert "| K=8 " in capsys.readouterr().out
