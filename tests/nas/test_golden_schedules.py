"""The schedules of the published recipes against what the public scripts had in force, epoch by epoch."""

from dataclasses import dataclass
from typing import Any

import pytest

from nas.papers import PAPERS, RECIPES, p_darts_stages
from nas.schedule import Constant, Cosine, LinearTail, Schedule
from tests.golden import cases

TOLERANCE = 1e-12
FILE = "schedules.json"


@dataclass(frozen=True)
class Ours:
    """The schedules that a recorded case is about, and what its settings say of the recipe."""

    lr: Schedule
    drop_path: Schedule | None = None
    epochs: int | None = None
    batch_size: int | None = None


def search(paper: str) -> Ours:
    (stage,) = PAPERS[paper].search
    return Ours(stage.lr, None, stage.epochs, stage.batch_size)


def retrain(recipe: str) -> Ours:
    stage = RECIPES[recipe]
    return Ours(stage.lr, stage.drop_path, stage.epochs, stage.batch_size)


OURS = {
    "darts_search_cifar": search("darts_1st"),
    "darts_retrain_cifar": retrain("darts_cifar"),
    "darts_retrain_imagenet_step": retrain("darts_imagenet"),
    "pc_darts_search_cifar": search("pc_darts"),
    "pc_darts_search_imagenet": search("pc_darts_imagenet"),
    "pc_darts_retrain_cifar": retrain("pc_darts_cifar"),
    "pc_darts_retrain_imagenet_linear": retrain("pc_darts_imagenet"),
    "p_darts_retrain_cifar": retrain("p_darts_cifar"),
    "p_darts_retrain_imagenet_linear_batch1024": retrain("p_darts_imagenet"),
    # Settings of the public scripts that no recipe uses.
    "pc_darts_retrain_imagenet_cosine": Ours(Cosine(0.5, warmup=5), Constant(0.0)),
    "p_darts_retrain_imagenet_linear_batch256": Ours(LinearTail(0.1), Constant(0.0)),
    "p_darts_retrain_imagenet_cosine_batch1024": Ours(
        Cosine(0.5, warmup=5, warmup_of="current"), Constant(0.0)
    ),
}
THREE_STAGES = "p_darts_search_cifar_three_stages"


def close(ours: list[float], recorded: list[float]) -> None:
    assert len(ours) == len(recorded)
    worst = max(range(len(ours)), key=lambda epoch: abs(ours[epoch] - recorded[epoch]))
    assert abs(ours[worst] - recorded[worst]) <= TOLERANCE, (
        f"epoch {worst}: {ours[worst]} for {recorded[worst]}"
    )


@pytest.mark.parametrize("case", cases(FILE, "cases", only=lambda case: case["id"] != THREE_STAGES))
def test_schedule_of_the_public_script(case: dict[str, Any]) -> None:
    ours, settings = OURS[case["id"]], case["settings"]
    epochs = settings["epochs"]
    close([ours.lr.at(epoch, epochs) for epoch in range(epochs)], case["lr"])
    if "drop_path" in case:
        assert ours.drop_path is not None
        close([ours.drop_path.at(epoch, epochs) for epoch in range(epochs)], case["drop_path"])
    assert ours.epochs in (None, epochs)
    assert ours.batch_size in (None, settings["batch_size"])


@pytest.mark.parametrize("case", cases(FILE, "cases", only=lambda case: case["id"] == THREE_STAGES))
def test_stages_of_the_public_p_darts_script(case: dict[str, Any]) -> None:
    settings = case["settings"]
    stages = p_darts_stages(tuple(settings["dropout_rate"]))
    assert [stage.cells - stages[0].cells for stage in stages] == settings["add_layers"]
    recorded = zip(stages, case["lr"], case["skip_dropout"], case["arch_trained"], strict=True)
    for stage, lr, skip_dropout, arch_trained in recorded:
        assert (stage.epochs, stage.batch_size) == (settings["epochs"], settings["batch_size"])
        epochs = range(stage.epochs)
        close([stage.lr.at(epoch, stage.epochs) for epoch in epochs], lr)
        close([stage.skip_dropout.at(epoch, stage.epochs) for epoch in epochs], skip_dropout)
        assert [epoch >= stage.frozen_epochs for epoch in epochs] == arch_trained


def test_every_recorded_schedule_is_compared() -> None:
    recorded = cases(FILE, "cases")
    if recorded[0].id != "missing":
        assert {case.id for case in recorded} == {*OURS, THREE_STAGES}


@pytest.mark.parametrize("case", cases(FILE, "trap_scheduler_stepped_first_under_current_torch"))
def test_schedule_is_not_stepped_before_its_first_epoch(case: dict[str, Any]) -> None:
    # What those scripts have in force when they run unchanged on a current PyTorch.
    epochs = len(case["lr"])
    ours = [OURS[case["id"]].lr.at(epoch, epochs) for epoch in range(epochs)]
    assert max(abs(a - b) for a, b in zip(ours, case["lr"], strict=True)) > 1e-5


def test_epochs_in_which_the_architecture_is_frozen() -> None:
    # Appendix A of the specification has them for the scripts whose recordings do not.
    frozen = {
        paper: PAPERS[paper].search[0].frozen_epochs
        for paper in ("darts_1st", "pc_darts", "pc_darts_imagenet")
    }
    assert frozen == {"darts_1st": 0, "pc_darts": 15, "pc_darts_imagenet": 35}
