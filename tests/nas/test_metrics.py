"""What is measured of a search: known values of every metric, and that measuring changes nothing."""

import math
import mmap
import random
from pathlib import Path
from typing import Literal

import pytest
import torch

from nas.gates import one_hot
from nas.genotype import Cell, Genotype
from nas.metrics import (
    METRICS,
    Average,
    Probe,
    alpha_entropy,
    alpha_margin,
    beta_entropy,
    describe,
    one_hot_gates,
    peak_memory_mb,
    reset_peak_memory,
    supernet_quality,
)
from nas.samplers import Progress, Softmax, init_arch
from nas.searchers import Argmax
from nas.spaces.cell import SPACES, CellSpace
from nas.spaces.space import Choices
from nas.state import Batch, SearchState
from nas.streams import generator, seeded
from nas.supernets.cell import CellSupernetConfig, Noise

CPU = torch.device("cpu")
SKIP, SEP3 = "skip_connect", "sep_conv_3x3"
SMALL = CellSpace(name="small", nodes=2, ops=("none", SKIP, SEP3, "max_pool_3x3"))
GENOTYPE = SMALL.sample(random.Random(0))


def state_of(
    space: CellSpace = SMALL,
    config: CellSupernetConfig | None = None,
    choices: dict[str, Choices] | None = None,
) -> SearchState:
    """A search that has just begun, its architecture parameters all equal."""
    config = config or CellSupernetConfig()
    choices = choices or space.choices
    with seeded(0, "init"):
        supernet = config.build(space, choices, cells=3, channels=4, classes=3, channels_in=1)
    arch = init_arch(config.gated(choices), generator(0, "alpha"), CPU)
    with torch.no_grad():
        for logits in arch.parameters():
            logits.zero_()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    return SearchState(supernet, arch, Softmax(), optimizer, None, Progress(0, 1), generator(0, "gates"))


def batches() -> list[Batch]:
    images = torch.randn(12, 1, 8, 8, generator=generator(0, "images"))
    labels = torch.arange(12) % 3
    return [(images[:8], labels[:8]), (images[8:], labels[8:])]


def probe(state: SearchState, genotype: Genotype = GENOTYPE) -> Probe:
    return Probe(state, genotype, batches)


def set_logits(state: SearchState, name: str, rows: list[list[float]]) -> None:
    with torch.no_grad():
        state.arch.logits[name].copy_(torch.tensor(rows))


def subsets(*sizes: int) -> dict[str, Choices]:
    """Choices of SMALL with these numbers of operations on the five edges of both cells."""
    kept = tuple(tuple(range(size)) for size in sizes)
    return {name: t.keep(kept) if name.endswith("/op") else t for name, t in SMALL.choices.items()}


# Entropy and margin


@pytest.mark.parametrize("space", [*SPACES.values(), SMALL], ids=lambda space: space.name)
def test_entropy_is_one_and_the_margin_zero_where_nothing_is_decided(space: CellSpace) -> None:
    state = state_of(space, CellSupernetConfig(edge_norm=True))
    assert alpha_entropy(probe(state)) == pytest.approx(1)
    assert beta_entropy(probe(state)) == pytest.approx(1)
    assert alpha_margin(probe(state)) == pytest.approx(0)


def test_entropy_is_zero_and_the_margin_one_where_all_is_decided() -> None:
    state = state_of(config=CellSupernetConfig(edge_norm=True))
    with torch.no_grad():
        for logits in state.arch.parameters():
            logits[:, 0] = 200.0
    assert alpha_entropy(probe(state)) == pytest.approx(0)
    assert beta_entropy(probe(state)) == pytest.approx(0)
    assert alpha_margin(probe(state)) == pytest.approx(1)


def test_entropy_and_margin_of_surviving_operations() -> None:
    state = state_of(choices=subsets(4, 3, 2, 2, 1))
    # Of the options that are left, not of all; an edge with one of them has nothing to decide.
    assert alpha_entropy(probe(state)) == pytest.approx(1)
    assert alpha_margin(probe(state)) == pytest.approx(0)
    for name in state.arch.logits:
        set_logits(state, name, [[0.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 200, 0, 0], [0.0, 0, 0, 0], [0.0] * 4])
    assert alpha_entropy(probe(state)) == pytest.approx(3 / 4)
    assert alpha_margin(probe(state)) == pytest.approx(1 / 4)


def test_margin_and_entropy_of_two_options_are_those_of_a_logistic() -> None:
    state = state_of(choices=subsets(2, 2, 2, 2, 2))
    for name in state.arch.logits:
        set_logits(state, name, [[1.5, 0.0, 9.0, 9.0]] * 5)  # the last two are not allowed
    p = 1 / (1 + math.exp(-1.5))
    assert alpha_margin(probe(state)) == pytest.approx(2 * p - 1)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert alpha_entropy(probe(state)) == pytest.approx(entropy)


def test_nothing_to_decide_has_no_entropy_and_no_margin() -> None:
    state = state_of(choices=subsets(1, 1, 1, 1, 1))
    assert alpha_entropy(probe(state)) is None
    assert alpha_margin(probe(state)) is None


def test_without_edge_normalisation_there_is_no_entropy_of_edges() -> None:
    assert beta_entropy(probe(state_of())) is None


# Of the genotype


def test_descriptions_of_the_genotype() -> None:
    normal = Cell((((SKIP, 0), (SEP3, 1)), ((SKIP, 2), (SKIP, 0))), (2, 3))
    reduce = Cell((((SEP3, 0), (SEP3, 1)), ((SEP3, 0), (SEP3, 1))), (2, 3))
    found = describe(probe(state_of(), Genotype(normal, reduce)))
    assert (found["skips"], found["skips_reduce"]) == (3, 0)
    assert (found["depth_normal"], found["depth_reduce"]) == (2, 1)
    assert (found["width_normal"], found["width_reduce"]) == (3, 4)


def test_every_metric_is_described_in_the_order_of_its_columns() -> None:
    computed = [name for name, metric in METRICS.items() if metric.compute is not None]
    assert list(describe(probe(state_of()))) == computed
    assert all(metric.unit and metric.meaning for metric in METRICS.values())


# Averages


def test_averages_weigh_every_image_alike() -> None:
    average = Average()
    for size, wrong, loss in ((3, 1, 2.0), (1, 1, 6.0)):
        labels = torch.zeros(size, dtype=torch.long)
        logits = torch.tensor([[1.0, 0.0]]).repeat(size, 1)
        logits[:wrong] = torch.tensor([0.0, 1.0])
        average.add(torch.tensor(loss), logits, labels)
    assert average.read() == (3.0, 0.5)


def test_there_is_no_average_of_nothing() -> None:
    with pytest.raises(ValueError, match="no batch to average over: the part of the data is empty"):
        Average().read()


# Quality of the supernet


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channel_mix", ["shuffle", "mask"])
def test_measuring_the_supernet_changes_nothing(mode: bool, channel_mix: Literal["shuffle", "mask"]) -> None:
    space = CellSpace(nodes=2, ops=("none", SKIP, SEP3, "noise"))
    config = CellSupernetConfig(partial_channels=2, edge_norm=True, channel_mix=channel_mix)
    state = state_of(space, config)
    state.supernet.train(mode)
    noise = state.supernet.noise = Noise(generator(0, "noise"), skip_dropout=0.5, drop_path=0.5)
    assert noise.generator is not None
    before = {name: value.clone() for name, value in state.supernet.state_dict().items()}
    streams = [torch.get_rng_state(), noise.generator.get_state(), state.draws.get_state()]
    modes = {name: module.training for name, module in state.supernet.named_modules()}
    gates = state.gates()[0]
    first = supernet_quality(state, gates, batches())
    assert supernet_quality(state, gates, batches()) == first
    assert state.supernet.noise is noise
    assert {name: module.training for name, module in state.supernet.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in state.supernet.state_dict().items())
    after = [torch.get_rng_state(), noise.generator.get_state(), state.draws.get_state()]
    assert all(torch.equal(one, two) for one, two in zip(streams, after, strict=True))
    tracking = [getattr(m, "track_running_stats", True) for m in state.supernet.modules()]
    assert all(tracking)
    assert all(p.grad is None and p.requires_grad for p in state.supernet.parameters())
    assert all(p.grad is None and p.requires_grad for p in state.arch.parameters())


def test_quality_does_not_depend_on_running_statistics_or_dropout() -> None:
    state = state_of()
    gates = state.gates()[0]
    clean = supernet_quality(state, gates, batches())
    state.supernet.noise = Noise(generator(0, "noise"), skip_dropout=0.9, drop_path=0.9)
    with torch.no_grad():
        for name, buffer in state.supernet.named_buffers():
            if "running" in name:
                buffer.add_(5.0)
    assert supernet_quality(state, gates, batches()) == clean


def test_quality_is_the_mean_over_images() -> None:
    state = state_of()
    gates = state.gates()[0]
    whole, (one, two) = batches(), batches()
    losses = [supernet_quality(state, gates, [batch]) for batch in (one, two)]
    expected = [(8 * a + 4 * b) / 12 for a, b in zip(*losses, strict=True)]
    assert supernet_quality(state, gates, whole) == pytest.approx(expected)


# Discretisation


def test_one_hot_gates_are_those_of_the_genotypes_picks() -> None:
    state = state_of()
    expected = one_hot(SMALL.choices, SMALL.picks(GENOTYPE))
    found = one_hot_gates(state, GENOTYPE)
    assert set(found) == set(expected)
    for name, gate in found.items():
        assert torch.equal(gate.weights, expected[name].weights)
        assert gate.active == expected[name].active


@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_has_decided_everything_loses_nothing(seed: int) -> None:
    """Soft gates that are one-hot, with `none` on every other edge, are those of the genotype they derive."""
    state, genotype = state_of(), SMALL.sample(random.Random(seed))
    picks = SMALL.picks(genotype)
    for name in state.arch.logits:
        decided: list[list[float]] = [[0.0] * len(SMALL.ops) for _ in SMALL.edges]
        for row, options in zip(decided, picks[name], strict=True):
            row[options[0] if options else SMALL.ops.index("none")] = 200.0
        set_logits(state, name, decided)
    probabilities = {name: p.detach() for name, p in state.arch.probabilities().items()}
    derived = Argmax().derive(SMALL, SMALL.choices, probabilities, random.Random(0))
    assert derived == genotype
    soft = supernet_quality(state, state.gates()[0], batches())
    discrete = supernet_quality(state, one_hot_gates(state, derived), batches())
    assert discrete == pytest.approx(soft, abs=1e-6)


def test_undecided_gates_do_lose_something() -> None:
    state = state_of()
    soft, _ = supernet_quality(state, state.gates()[0], batches())
    discrete, _ = supernet_quality(state, one_hot_gates(state, GENOTYPE), batches())
    assert discrete != pytest.approx(soft)


# Memory


def hold_for_a_moment(megabytes: int) -> None:
    """Touch fresh pages and give them back; an allocator might serve ones that it holds already."""
    with mmap.mmap(-1, megabytes * 2**20) as block:
        block.write(bytes(megabytes * 2**20))


def test_peak_memory_is_that_since_the_last_reset() -> None:
    assert peak_memory_mb(CPU) > 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak")
    before = peak_memory_mb(CPU)
    hold_for_a_moment(200)
    peak = peak_memory_mb(CPU)
    assert peak >= before + 190
    reset_peak_memory(CPU)
    assert peak_memory_mb(CPU) <= peak - 190
