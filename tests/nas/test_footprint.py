"""Footprint: what is counted on a few images is what a whole batch takes."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.config import override
from nas.curvature import Hessian
from nas.footprint import (
    COSTLIEST,
    PROCESS_MB,
    DataShape,
    Footprint,
    _data,
    _Live,
    _peak_mb,
    costliest,
    footprint,
)
from nas.footprint import _retrain_peak as retrain_peak
from nas.genotype import OPERATIONS
from nas.metrics import saved_bytes_per_image, uniform_gates
from nas.papers import PAPERS, laptop, on_digits, tiny
from nas.retrain import RetrainRun
from nas.search import SearchRun
from nas.spaces.cell import SPACES
from nas.state import frozen
from nas.trial import Trial

DIGITS = DataShape(channels=1, image_size=8, classes=10)
MB = 2**20


def small(paper: str = "pc_darts", **changes: Any) -> Trial:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return override(tiny(on_digits(PAPERS[paper])), dotted)


def taken(trial: Trial) -> Footprint:
    return footprint(trial, DIGITS)


def of_k(k: int, **changes: Any) -> float:
    supernet = {"method__supernet__partial_channels": k}
    return taken(small(**supernet, **changes)).search[0].train


# Counting


def test_live_bytes_are_those_of_storages_not_of_views() -> None:
    held = torch.zeros(256)

    def work(count: int) -> None:
        x = torch.zeros(count, 1024)  # 4 KB an image
        y = x + 1  # the peak: x, y and what is held
        del x
        (y.view(-1)[:8] * 2).add_(1)

    with _Live([held, held[:3]]) as live:
        work(10)
    assert live.after[0] == 1024 + 40 * 1024
    assert max(live.after) == 1024 + 80 * 1024
    assert live.now == 1024


def test_a_peak_grows_from_few_images_to_any_batch() -> None:
    def work(count: int) -> None:
        weights = torch.zeros(MB // 4)  # 1 MB whatever the batch
        more = weights + 1  # so that at few images the peak lies elsewhere than at many
        del more
        torch.zeros(count, MB // 4).add_(0)

    assert _peak_mb(work, [], 2) == 3
    assert _peak_mb(work, [], 100) == 101


def test_the_peak_of_a_whole_batch_is_the_one_foretold() -> None:
    trial = small()
    stage = trial.retrain
    genotype = costliest(trial.space)
    told = retrain_peak(genotype, replace(stage, augment=replace(stage.augment, pad=0)), DIGITS).train
    run = RetrainRun(
        genotype, replace(stage, augment=replace(stage.augment, pad=0)), _data(DIGITS, 16), 0, CPU
    )
    run.step()
    run.optimizer.zero_grad()
    momentum = [value for held in run.optimizer.state.values() for value in held.values()]
    with _Live([*run.network.parameters(), *(v for v in momentum if isinstance(v, Tensor))]) as live:
        run.step()
    assert max(live.after) / MB == pytest.approx(told, rel=0.01)


CPU = torch.device("cpu")


def test_a_search_step_takes_what_it_saves_and_little_more() -> None:
    trial = laptop(on_digits(PAPERS["pc_darts"]))
    stage = trial.search[0]
    supernet = trial.method.supernet.build(
        trial.space, trial.space.choices, cells=stage.cells, channels=8, classes=10, channels_in=1
    )
    saved = stage.batch_size * saved_bytes_per_image(supernet, uniform_gates(supernet), 1, 8) / MB
    assert saved < taken(trial).search[0].train < 1.5 * saved


@pytest.mark.parametrize("how", ["eigenvalue", "hessian", "stop"])
def test_the_graph_of_a_hessian_counts_where_one_is_measured(how: str) -> None:
    plain = small(space__nodes=2)
    changes = {"method.stop": {}} if how == "stop" else {"measure": (how,)}
    told = taken(override(plain, changes))
    assert taken(plain).search[0].curvature == 0
    assert replace(told.search[0], curvature=0.0) == taken(plain).search[0]
    assert told.tensors_mb == told.search[0].curvature > taken(plain).tensors_mb
    # What 64 images take, besides the optimisers' few buffers.
    run = SearchRun(plain.space, plain.method, plain.search, _data(DIGITS, 64), 0, CPU, lambda genotype: {})
    state = run.state
    assert state is not None
    images, labels = next(_data(DIGITS, 64).batches("train", 64, order=None))
    with _Live([*state.supernet.parameters(), *state.arch.parameters(), images, labels]) as live:
        with frozen(state.supernet.parameters()):
            loss = F.cross_entropy(state.supernet.train()(images, state.gates()[0]), labels)
        logits = [state.arch.logits[name] for name in ("normal/op", "reduce/op")]
        hessian = Hessian(loss, logits)
        hessian.product(hessian.gradient.detach())
    assert told.search[0].curvature == pytest.approx(max(live.after) / MB, rel=0.1)


@pytest.mark.parametrize("paper", ["gdas", "random"])
def test_a_search_with_hard_gates_and_one_that_is_none_have_no_hessian(paper: str) -> None:
    trial = small(paper)
    assert taken(replace(trial, measure=("hessian",))) == taken(trial)


# What a footprint follows


def test_memory_falls_with_k() -> None:
    peaks = [of_k(k) for k in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 2 * peaks[2]


def test_twice_the_batch_takes_nearly_twice_the_memory() -> None:
    one, two = (of_k(1, **{"search__*__batch_size": batch}) for batch in (64, 128))
    assert 1.9 * one < two < 2 * one


def test_exact_second_order_takes_more_than_first_order() -> None:
    first, second = (
        taken(small(paper, method__arch_update__hessian="exact")).search[0].train
        for paper in ("darts_1st", "darts_2nd")
    )
    assert second > 1.5 * first


def test_every_stage_of_a_search_has_a_peak_of_its_own() -> None:
    stages = taken(small("p_darts")).search
    assert len(stages) == 3
    assert len({peak.train for peak in stages}) == 3


def test_hard_gates_take_less_than_soft_ones() -> None:
    gdas = small("gdas")
    assert taken(gdas).search[0].train < taken(override(gdas, {"method.sampler.hard": False})).search[0].train


def test_recomputed_cells_and_smaller_parts_take_less() -> None:
    whole = taken(small(retrain__batch_size=64)).retrain.train
    assert taken(small(retrain__batch_size=64, retrain__checkpoint_cells=True)).retrain.train < whole
    assert taken(small(retrain__batch_size=64, retrain__accumulate=4)).retrain.train < whole / 2


def test_what_is_dropped_at_random_later_counts_from_the_start() -> None:
    ramp = PAPERS["pc_darts"].retrain.drop_path  # 0 in the first epoch
    trial = small()
    dropping = replace(trial, retrain=replace(trial.retrain, drop_path=ramp))
    assert taken(dropping).retrain.train > taken(trial).retrain.train


def test_seeds_and_rates_change_nothing_and_cost_nothing() -> None:
    base = small()
    taken(base)
    computed = retrain_peak.cache_info().misses
    other = override(base, {"seeds.search": 7, "search.*.lr.start": 0.2, "method.arch_update.lr": 0.1})
    assert taken(other) == taken(base)
    assert retrain_peak.cache_info().misses == computed


def test_a_study_without_a_search_is_only_retrained() -> None:
    found = taken(small("random"))
    assert found.search == ()
    assert found.certain_mb == 0
    assert found.tensors_mb == max(found.retrain.train, found.retrain.evaluation)
    assert found.process_mb > PROCESS_MB + found.retrain.train


# The costliest architecture


def test_every_operation_has_its_place_by_cost() -> None:
    assert sorted(COSTLIEST) == sorted(OPERATIONS)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_no_genotype_takes_more_than_the_costliest(space: Any) -> None:
    trial = small()
    stage = replace(trial.retrain, cells=3, batch_size=32)
    most = retrain_peak(costliest(space), stage, DIGITS).train
    draws = random.Random(0)
    for _ in range(4):
        assert retrain_peak(space.sample(draws), stage, DIGITS).train <= most


def test_the_costliest_genotype_belongs_to_its_space() -> None:
    for space in SPACES.values():
        space.picks(costliest(space))


def test_a_recipe_that_will_diverge_takes_what_one_that_learns_takes() -> None:
    calm, wild = (taken(small(retrain__weight_decay=decay)) for decay in (3e-4, 1e30))
    assert wild == calm
    assert (
        taken(small(retrain__auxiliary_weight=0.0, retrain__clip=1e30, retrain__amp="bf16")).retrain.train > 0
    )
