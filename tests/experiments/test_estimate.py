"""What a study will take: the time of measuring is in it."""

from typing import Any

import pytest
import torch

from experiments import estimate
from nas.config import override
from nas.data import load
from nas.papers import PAPERS, on_digits, tiny
from nas.search import SearchRun
from nas.trial import TrialRun


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (4, 3), (5, 3), (6, 4)])
def test_each_measure_counts_as_often_as_it_is_due(epochs: int, times: int) -> None:
    found = {"alphas_seconds": 1.0, "alignment_seconds": 10.0, "hessian_seconds": 1000.0, "hessian": 7.0}
    assert estimate._measuring(found, epochs, measure_every=2) == epochs + 10 * times + 1000


def test_measuring_is_timed_on_all_images_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = override(on_digits(tiny(PAPERS["pc_darts"])), {"data.limit": 300, "measure": ("hessian", "snip")})
    seen: list[int] = []

    def measured(self: SearchRun, names: tuple[str, ...]) -> dict[str, float | None]:
        assert names == trial.measure
        seen.append(self.data.size("weights"))
        return {"hessian_seconds": 1000.0}

    def scored(self: TrialRun, genotype: Any, measure: tuple[str, ...]) -> dict[str, float | None]:
        return {"proxy_snip": 1e6, "proxy_snip_seconds": 500.0} if measure else {}

    monkeypatch.setattr(SearchRun, "measured_now", measured)
    monkeypatch.setattr(TrialRun, "scored", scored)
    found = estimate.estimate(trial, load(trial.data), torch.device("cpu"))
    assert 1500 < found.seconds < 1700
    assert seen == [round(300 * (1 - trial.data.valid) * trial.data.weights_share)] * len(trial.search)
