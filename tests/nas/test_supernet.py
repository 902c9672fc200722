"""The batched cell supernet against its plain form and derived networks, and at the limits of its knobs."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.gates import Gate, Gates, leaves, one_hot
from nas.methods import METHODS
from nas.metrics import supernet_quality
from nas.network import Network, Stem
from nas.ops import ReLUFirst
from nas.samplers import Gumbel, Progress, Softmax, init_arch
from nas.schedule import Constant
from nas.spaces.cell import CELL_TYPES, DARTS_OPS, SPACES, CellSpace
from nas.state import SearchState, without_statistics
from nas.streams import generator, seeded
from nas.supernets.cell import (
    CellGates,
    CellSupernet,
    CellSupernetConfig,
    FanOut,
    Noise,
    SupernetCell,
)
from nas.supernets.edge_form import edge_tensors
from nas.supernets.stacked import FOLD_MAX_CHANNELS, StackedBatchNorm
from tests.golden import Tensors, assert_close, copy_into, network_tensors
from tests.reference.cell_supernet import EdgeWeights, PlainSupernet

pytestmark = pytest.mark.usefixtures("float64")

# Rounding is far below this but where batch norm divides by hardly any variance, on maps of one pixel.
TOLERANCE = 1e-8
CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A small supernet, its gates and its input."""

    K: int = 1
    edge_norm: bool = False
    channel_mix: Any = "shuffle"
    channels: int = 8
    nodes: int = 3
    cells: int = 3
    ops: str = "all"
    """all, five on each edge, s1 (two on each edge), s4 (noise)"""
    gates: str = "soft"
    """soft, one operation on each edge, or some operations and inputs"""
    stem: Stem = "cifar"
    size: tuple[int, int] = (8, 8)
    batch: int = 3
    training: bool = True
    skip_dropout: float = 0.0
    drop_path: float = 0.0
    seed: int = 0

    def space(self) -> CellSpace:
        if self.ops in SPACES:
            space = SPACES[self.ops]
            return space if space.normal_ops else replace(space, nodes=self.nodes)
        space = CellSpace(nodes=self.nodes)
        if self.ops == "all":
            return space
        rng = random.Random(self.seed)
        subsets = [tuple(tuple(rng.sample(DARTS_OPS, 5)) for _ in space.edges) for _ in CELL_TYPES]
        return replace(space, normal_ops=subsets[0], reduce_ops=subsets[1])

    def config(self) -> CellSupernetConfig:
        return CellSupernetConfig(self.K, self.edge_norm, self.channel_mix)

    def supernet(self) -> CellSupernet:
        """Supernet with random weights, and random running statistics so that evaluation means something."""
        space = self.space()
        with seeded(self.seed, "supernet"), torch.no_grad():
            supernet = self.config().build(
                space,
                space.choices,
                cells=self.cells,
                channels=self.channels,
                classes=CLASSES,
                stem=self.stem,
            )
            for name, buffer in supernet.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        supernet.noise = Noise(generator(self.seed, "noise"), self.skip_dropout, self.drop_path)
        return supernet.train(self.training)

    def make_gates(self) -> Gates:
        """Gates of random weights, also where an option does not run and its weight must not matter."""
        rng, draws = random.Random(self.seed), generator(self.seed, "gates")
        gates = {}
        for name, table in self.config().gated(self.space().choices).items():
            weights = torch.rand(len(table.rows), len(table.options), generator=draws)
            active = table.allowed
            if self.gates == "one" and name.endswith("/op"):
                active = tuple((rng.choice(options),) for options in table.allowed)
            elif self.gates == "some":
                active = tuple(tuple(o for o in options if rng.random() < 0.6) for options in table.allowed)
            gates[name] = Gate(weights.requires_grad_(), active)
        return gates

    def images(self) -> Tensor:
        height, width = self.size
        scale = 1 if self.stem == "cifar" else 4
        return torch.randn(
            self.batch, 3, scale * height, scale * width, generator=generator(self.seed, "images")
        )

    def labels(self) -> Tensor:
        return torch.arange(self.batch) % CLASSES


def edge_weights(space: CellSpace, gates: Gates, cell: str) -> EdgeWeights:
    """Gates as weights and active operations by edge, numbered node by node."""
    ops, inputs = gates[f"{cell}/op"], gates.get(f"{cell}/input")
    if inputs is None:
        return EdgeWeights(ops.weights, ops.active)
    pairs = [(node, source) for node in range(space.nodes) for source in range(node + 2)]
    taken = [source in inputs.active[node] for node, source in pairs]
    beta = [
        inputs.weights[pair] if take else torch.zeros(()) for pair, take in zip(pairs, taken, strict=True)
    ]
    active = tuple(options if take else () for options, take in zip(ops.active, taken, strict=True))
    return EdgeWeights(ops.weights, active, torch.stack(beta))


@contextmanager
def recorded_draws(supernet: CellSupernet) -> Iterator[Tensors]:
    """What a forward inside the context draws, by the edge that it is for, as the plain form takes it."""
    draws: Tensors = {}
    orders: list[Tensor] = []
    edges: list[str] = []

    def by_edge(suffix: str, values: Tensor) -> None:
        draws.update({f"{edge}.{suffix}": value for edge, value in zip(edges, values.unbind(1), strict=True)})

    def enter(number: int) -> Any:
        def hook(fan: FanOut, args: tuple[Any, ...]) -> None:
            edges[:] = [f"cell{number}.edge{row}" for row in fan.edge_rows]
            if args[3] is not None:
                by_edge("path", args[3])
            if orders:
                draws[f"{edges[0]}.order"] = orders.pop()

        return hook

    real = {name: getattr(torch, name) for name in ("rand", "randn", "randperm")}

    def rand(*args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = real["rand"](*args, **kwargs)
        if value.dim() == 5:
            dropped = supernet.noise.skip_dropout
            by_edge("skip", (value >= dropped) / (1 - dropped))
        return value

    def randn(*args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = real["randn"](*args, **kwargs)
        by_edge("noise", value)
        return value

    def randperm(*args: Any, **kwargs: Any) -> Tensor:
        orders.append(real["randperm"](*args, **kwargs))
        return orders[-1]

    handles = [
        fan.register_forward_pre_hook(enter(number))
        for number, cell in enumerate(supernet.cells)
        for fan in cell.modules()
        if isinstance(fan, FanOut)
    ]
    with patch.multiple(torch, rand=rand, randn=randn, randperm=randperm):
        yield draws
    for handle in handles:
        handle.remove()


def check_against_plain_form(case: Case) -> None:
    supernet, gates, images = case.supernet(), case.make_gates(), case.images()
    tensors = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in edge_tensors(supernet).items()
    }
    plain_gates = leaves(gates)

    with recorded_draws(supernet) as draws:
        logits = supernet(images, gates)
    loss = F.cross_entropy(logits, case.labels())
    torch.autograd.backward(loss)

    plain = PlainSupernet(
        tensors,
        case.space().ops,
        case.space().nodes,
        case.cells,
        case.K,
        case.channel_mix,
        case.training,
        draws,
    )
    expected = plain.logits(images, *(edge_weights(case.space(), plain_gates, cell) for cell in CELL_TYPES))
    torch.autograd.backward(F.cross_entropy(expected, case.labels()))

    assert_close({"logits": logits}, {"logits": expected.detach()}, TOLERANCE)
    ours = {name: gradient_of(gate.weights) for name, gate in gates.items()}
    theirs = {name: gradient_of(gate.weights) for name, gate in plain_gates.items()}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert_close(ours, theirs, TOLERANCE, relative_to=largest)
    weights = {name: gradient_of(tensor) for name, tensor in tensors.items() if tensor.requires_grad}
    norm = float(torch.nn.utils.get_total_norm(list(weights.values())))
    gradients = edge_tensors(supernet, lambda tensor: gradient_of(tensor) if tensor.requires_grad else None)
    assert gradients.keys() == weights.keys()
    assert_close(gradients, weights, TOLERANCE, relative_to=norm)
    statistics = {name: tensor for name, tensor in edge_tensors(supernet).items() if not tensor.requires_grad}
    before = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
    assert_close(statistics, before | plain.statistics, TOLERANCE)


def gradient_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


# Every knob at least once, by hand: what a reader expects to be covered. Hypothesis mixes them below.
CASES = {
    "darts": Case(nodes=4, cells=5),
    "wider than what is folded": Case(channels=16, cells=3),
    "pc_darts": Case(K=4, edge_norm=True, nodes=4, cells=4, channels=16),
    "K=2": Case(K=2, edge_norm=True),
    "K=4": Case(K=4),
    "K=8": Case(K=8, edge_norm=True, channels=16),
    "K=2, wide": Case(K=2, channels=32, nodes=2, cells=2),
    "edge norm alone": Case(edge_norm=True),
    "shift": Case(K=4, channel_mix="shift"),
    "mask": Case(K=2, edge_norm=True, channel_mix="mask"),
    "mask, K=1": Case(channel_mix="mask"),
    "mask, evaluated": Case(K=4, edge_norm=True, channel_mix="mask", training=False),
    "one operation": Case(nodes=4, gates="one"),
    "one operation, K=4": Case(K=4, edge_norm=True, gates="one"),
    "some operations and inputs": Case(K=2, edge_norm=True, nodes=4, gates="some"),
    "five operations": Case(nodes=4, cells=5, ops="five"),
    "s1": Case(K=2, ops="s1"),
    "s4": Case(ops="s4"),
    "imagenet stem": Case(K=2, edge_norm=True, stem="imagenet"),
    "odd sides": Case(K=4, size=(9, 7), cells=4),
    "evaluated": Case(K=2, edge_norm=True, ops="five", training=False),
    "skip dropout": Case(skip_dropout=0.4, ops="five"),
    "drop path": Case(K=4, edge_norm=True, drop_path=0.3, batch=4),
    "drop path, one operation, mask": Case(
        K=2, channel_mix="mask", gates="one", drop_path=0.3, skip_dropout=0.2
    ),
    "one node, one cell": Case(nodes=1, cells=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_plain_form(case: Case) -> None:
    check_against_plain_form(case)


@settings(max_examples=25)
@given(
    st.builds(
        Case,
        K=st.sampled_from([1, 2, 4, 8]),
        edge_norm=st.booleans(),
        channel_mix=st.sampled_from(["shuffle", "shift", "mask"]),
        channels=st.sampled_from([8, 16]),
        nodes=st.integers(1, 4),
        cells=st.integers(1, 5),
        ops=st.sampled_from(["all", "five", "s1", "s4"]),
        gates=st.sampled_from(["soft", "one", "some"]),
        stem=st.sampled_from(["cifar", "imagenet"]),
        size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
        batch=st.integers(3, 4),
        training=st.booleans(),
        skip_dropout=st.sampled_from([0.0, 0.4]),
        drop_path=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 99),
    )
)
def test_equals_the_plain_form_whatever_the_settings(case: Case) -> None:
    check_against_plain_form(case)


def test_both_ways_of_computing_a_separable_convolution_are_compared() -> None:
    widths = [case.channels * 2**i // case.K for case in CASES.values() for i in range(3)]
    assert min(widths) <= FOLD_MAX_CHANNELS < max(widths)


@pytest.mark.parametrize(
    "case", [CASES["five operations"], CASES["imagenet stem"]], ids=["cifar", "imagenet"]
)
def test_edge_form_holds_every_weight_once(case: Case) -> None:
    supernet = case.supernet()
    numbers = edge_tensors(supernet)
    weights = sum(tensor.numel() for tensor in numbers.values() if tensor.requires_grad)
    assert weights == sum(parameter.numel() for parameter in supernet.parameters())
    statistics = sum(tensor.numel() for tensor in numbers.values()) - weights
    running = [buffer for name, buffer in supernet.named_buffers() if "running" in name]
    assert statistics == sum(buffer.numel() for buffer in running)
    other = supernet.config.build(
        supernet.space,
        supernet.choices,
        cells=case.cells,
        channels=case.channels,
        classes=CLASSES,
        stem=case.stem,
    )
    with torch.no_grad():
        for name, view in edge_tensors(other).items():
            view.copy_(numbers[name])
    assert torch.equal(other(case.images(), case.make_gates()), supernet(case.images(), case.make_gates()))


@pytest.mark.parametrize("edges", [1, 2])
def test_scale_of_a_batch_norm_scales_its_gradient_on_maps_of_one_pixel(edges: int) -> None:
    # One edge's scale is a single number, which must not reach PyTorch's batch norm as an expanded tensor.
    norm = StackedBatchNorm(edges, 32)
    x = torch.randn(4, edges * 32, 1, 1, generator=generator(0, "x")).requires_grad_()
    slope = torch.randn(x.shape, generator=generator(0, "slope"))
    whole, half = (
        torch.autograd.grad((norm(x, None, torch.full((edges,), scale)) * slope).sum(), x)[0]
        for scale in (1.0, 0.5)
    )
    assert torch.allclose(half, whole / 2)


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [Softmax(), Gumbel(hard=False, tau=Constant(1.0))], ids=["softmax", "gumbel"]
)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(edge_norm=True),
        Case(K=4, edge_norm=True, nodes=4, cells=4),
        Case(K=2, edge_norm=True, channel_mix="mask"),
        Case(ops="five", edge_norm=True, K=2),
    ],
)
def test_gradient_reaches_every_architecture_parameter(case: Case, sampler: Softmax | Gumbel) -> None:
    supernet = case.supernet()
    choices = supernet.config.gated(supernet.choices)
    arch = init_arch(choices, generator(0, "alpha"), torch.device("cpu"), torch.float64)
    assert set(arch.logits) == {
        f"{cell}/{kind}" for cell in CELL_TYPES for kind in ("op", *["input"] * case.edge_norm)
    }
    (gates,) = sampler.sample(arch, Progress(0, 1), generator(0, "gates"))
    torch.autograd.backward(F.cross_entropy(supernet(case.images(), gates), case.labels()))
    for name, table in choices.items():
        gradient = arch.logits[name].grad
        assert gradient is not None
        for row, options in enumerate(table.allowed):
            reached = gradient[row].nonzero().flatten().tolist()
            assert reached == list(options), table.rows[row]


@pytest.mark.parametrize("edge_norm", [False, True])
@pytest.mark.parametrize("K", [1, 4])
def test_weights_of_options_that_do_not_run_do_not_matter(K: int, edge_norm: bool) -> None:
    case = Case(K=K, edge_norm=edge_norm, gates="some", nodes=4)
    supernet = case.supernet().eval()
    gates = case.make_gates()
    changed = {}
    for name, gate in gates.items():
        weights = torch.full_like(gate.weights, 1e3)
        for row, options in enumerate(gate.active):
            weights[row, list(options)] = gate.weights[row, list(options)].detach()
        changed[name] = Gate(weights.requires_grad_(), gate.active)
    logits = supernet(case.images(), gates)
    assert torch.equal(logits, supernet(case.images(), changed))
    torch.autograd.backward(logits.sum())
    for gate in gates.values():
        gradient = gradient_of(gate.weights)
        for row, options in enumerate(gate.active):
            assert set(gradient[row].nonzero().flatten().tolist()) <= set(options)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("inputs", [False, True], ids=["operations", "operations and inputs"])
@pytest.mark.parametrize("seed", range(3))
def test_one_hot_gates_make_it_the_derived_network(seed: int, inputs: bool, stem: Stem) -> None:
    case = Case(nodes=4, cells=5, stem=stem, seed=seed)
    supernet, space = case.supernet(), case.space()
    genotype = space.sample(random.Random(seed))
    network = Network(
        genotype,
        channels=case.channels,
        cells=case.cells,
        classes=CLASSES,
        stem=stem,
        stem_multiplier=3,
        affine=False,
        pool_norm=True,
    )

    def by_pick(tensors: Tensors) -> Tensors:
        """Tensors by edge of the supernet, under the names that they have in the network."""
        found = {name: tensor for name, tensor in tensors.items() if ".edge" not in name}
        for number in range(case.cells):
            cell = genotype.reduce if number in (1, 3) else genotype.normal
            picks = [
                (op, space.edges.index((node, s)))
                for node, taken in enumerate(cell.nodes, 2)
                for op, s in taken
            ]
            for pick, (op, edge) in enumerate(picks):
                prefix = f"cell{number}.edge{edge}.{op}."
                found |= {
                    f"cell{number}.pick{pick}.{op}.{name.removeprefix(prefix)}": tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
        return found

    copy_into(network_tensors(network), by_pick(edge_tensors(supernet)))
    tables = {name: table for name, table in space.choices.items() if inputs or name.endswith("/op")}
    gates = one_hot(tables, space.picks(genotype), like=torch.empty(0))

    images = case.images()
    for training in (False, True):
        expected_logits, _ = network.train(training)(images)
        logits = supernet.train(training)(images, gates)
        assert_close({"logits": logits}, {"logits": expected_logits.detach()}, TOLERANCE)
    torch.autograd.backward(F.cross_entropy(expected_logits, case.labels()))
    torch.autograd.backward(F.cross_entropy(logits, case.labels()))
    statistics = {
        name: tensor for name, tensor in network_tensors(network).items() if not tensor.requires_grad
    }
    assert_close(by_pick(edge_tensors(supernet)), statistics, TOLERANCE)
    gradients = by_pick(edge_tensors(supernet, lambda tensor: tensor.grad))
    expected = network_tensors(network, lambda tensor: tensor.grad)
    norm = float(torch.nn.utils.get_total_norm(list(expected.values())))
    assert_close(gradients, expected, TOLERANCE, relative_to=norm)


def test_one_hot_gates_change_the_running_statistics_of_what_runs_and_no_others() -> None:
    case = Case(nodes=4, cells=3)
    supernet, space = case.supernet(), case.space()
    genotype = space.sample(random.Random(7))
    before = {name: tensor.detach().clone() for name, tensor in edge_tensors(supernet).items()}
    supernet(case.images(), one_hot(space.choices, space.picks(genotype), like=torch.empty(0)))
    for name, tensor in edge_tensors(supernet).items():
        if ".edge" in name and name.endswith((".mean", ".var")):
            _, edge, op, *_ = name.split(".")
            cell = genotype.normal if name.startswith("cell0") else genotype.reduce
            node, source = space.edges[int(edge.removeprefix("edge"))]
            assert torch.equal(tensor, before[name]) == ((op, source) not in cell.nodes[node - 2]), name


# --- the limits of the knobs --------------------------------------------------------------------------------


def test_pc_darts_without_its_two_ideas_is_darts_bit_for_bit() -> None:
    case = Case(nodes=4, cells=4)
    neutral = replace(METHODS["pc_darts"].supernet, partial_channels=1, edge_norm=False)
    results = []
    for config in (METHODS["darts_1st"].supernet, neutral, replace(neutral, channel_mix="shift")):
        with seeded(0, "supernet"):
            supernet = config.build(case.space(), case.space().choices, cells=4, channels=8, classes=CLASSES)
        gates = case.make_gates()
        logits = supernet(case.images(), gates)
        torch.autograd.backward(F.cross_entropy(logits, case.labels()))
        results.append({"logits": logits, **supernet.state_dict()})
        results[-1] |= {f"gradient of {name}": gradient_of(p) for name, p in supernet.named_parameters()}
        results[-1] |= {f"gradient of {name}": gradient_of(gate.weights) for name, gate in gates.items()}
    darts, *others = results
    for other in others:
        assert darts.keys() == other.keys()
        assert all(torch.equal(darts[name], other[name]) for name in darts)


# 16 channels, 10 classes; DARTS and PC-DARTS 8 cells, the stages of P-DARTS 5, 11, 17.
@pytest.mark.parametrize(
    ("cells", "K", "weights"),
    [
        (8, 1, 1_930_618),
        (8, 2, 671_482),
        (8, 4, 299_578),
        (8, 8, 178_042),
        (5, 1, 1_275_834),
        (11, 1, 2_585_146),
        (17, 1, 3_894_202),
    ],
)
def test_size_of_published_supernet(cells: int, K: int, weights: int) -> None:
    space = CellSpace()
    with torch.device("meta"):
        supernet = CellSupernetConfig(K).build(space, space.choices, cells=cells, channels=16, classes=10)
    assert sum(parameter.numel() for parameter in supernet.parameters()) == weights


@pytest.mark.parametrize(
    ("K", "message"), [(3, "divide channels=8; use one of 1, 2, 4, 8"), (16, "divide"), (0, "at least 1")]
)
def test_a_partial_channel_count_that_does_not_fit_is_refused(K: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CellSupernetConfig(K).check(CellSpace(), channels=8)


def test_operations_without_a_batched_form_are_refused() -> None:
    with pytest.raises(ValueError, match="conv_7x1_1x7"):
        CellSupernetConfig().check(CellSpace(ops=("skip_connect", "conv_7x1_1x7")), channels=8)


# --- one cell by itself -------------------------------------------------------------------------------------


def single_node_cell(
    config: CellSupernetConfig, channels: int, ops: tuple[str, ...] = ("none", "skip_connect")
) -> SupernetCell:
    """A cell of one node that reads its inputs as they are."""
    space = CellSpace(nodes=1, ops=ops)
    allowed = space.op_choices("normal").allowed
    cell = SupernetCell(
        config, space, allowed, (channels, channels), channels, reduction=False, after_reduction=False
    )
    for name in ("in0", "in1"):
        cell.add_module(name, ReLUFirst())  # without layers, and the cell expects rectified inputs
    return cell


def single_node_gates(cell: SupernetCell, op: int, edges: tuple[float, float]) -> CellGates:
    """Only operation `op` runs, with weight 1, on both edges, which have weights themselves."""
    weights = torch.zeros(2, 2)
    weights[:, op] = torch.tensor(edges)
    beta, active = torch.tensor(edges)[:, None], ((op,), (op,))
    fans = [fan for fan in cell.fans if isinstance(fan, FanOut)]
    if len(fans) == 1:
        return CellGates([weights], [fans[0].plan(active, weights.device)], [beta])
    plans = [fan.plan(active[:1], weights.device) for fan in fans]
    return CellGates([weights[:1], weights[1:]], plans, [beta[:1], beta[1:]])


@pytest.mark.parametrize(
    ("mix", "order"), [("shuffle", [0, 2, 4, 6, 1, 3, 5, 7]), ("shift", [2, 3, 4, 5, 6, 7, 0, 1])]
)
def test_order_of_channels_after_an_edge(mix: Any, order: list[int]) -> None:
    cell = single_node_cell(CellSupernetConfig(4, channel_mix=mix), 8)
    x = torch.arange(8.0).view(1, 8, 1, 1)
    node = cell(x, torch.zeros_like(x), single_node_gates(cell, 1, (1.0, 0.0)), Noise())
    assert node.flatten().tolist() == order


def test_edges_weigh_alike_when_all_betas_are_zero() -> None:
    config = CellSupernetConfig(4, edge_norm=True)
    arch = init_arch(config.gated(CellSpace().choices), generator(0), torch.device("cpu"))
    for logits in arch.logits.values():
        nn.init.zeros_(logits)
    (gates,) = Softmax().sample(arch, Progress(0, 1), generator(0))
    rows = gates["normal/input"].weights.tolist()
    assert rows == [[1 / n] * n + [0.0] * (5 - n) for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("K", [2, 4, 8])
def test_mask_mixes_one_in_k_channels_of_each_edge_at_random(K: int) -> None:
    # With nothing but `none`, mixed channels are 0 and the others pass: 1 from the first input, 2 from the
    # second.
    channels, draws = 16, 300
    cell = single_node_cell(CellSupernetConfig(K, channel_mix="mask"), channels)
    gates = single_node_gates(cell, 0, (1.0, 1.0))
    x = torch.ones(1, channels, 1, 1)
    noise = Noise(generator(0, "noise"))
    nodes = torch.stack([cell(x, 2 * x, gates, noise).flatten() for _ in range(draws)])
    first, second = nodes % 2 == 0, nodes < 2
    for mixed in (first, second):
        assert (mixed.sum(dim=1) == channels // K).all()
        # Each channel is mixed with probability 1/K; five standard errors.
        spread = 5 * (draws / K * (1 - 1 / K)) ** 0.5
        assert ((mixed.sum(dim=0) - draws / K).abs() < spread).all()
    assert not torch.equal(first, second)


def test_mask_puts_mixed_channels_back() -> None:
    cell = single_node_cell(CellSupernetConfig(4, channel_mix="mask"), 8)
    x = torch.randn(2, 8, 3, 3)
    node = cell(x, torch.zeros_like(x), single_node_gates(cell, 1, (1.0, 0.0)), Noise(generator(0)))
    assert torch.equal(node, x)


RANDOM = Case(K=2, channel_mix="mask", skip_dropout=0.3, drop_path=0.3, ops="s4")


def test_a_forward_draws_from_its_own_stream_only() -> None:
    supernet, images, gates = RANDOM.supernet(), RANDOM.images(), RANDOM.make_gates()
    state = torch.get_rng_state()
    logits = []
    for seed in (0, 0, 1):
        supernet.noise = replace(supernet.noise, generator=generator(seed, "noise"))
        logits.append(supernet(images, gates))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_evaluation_draws_no_masks_and_drops_nothing() -> None:
    case = Case(K=2, channel_mix="mask", skip_dropout=0.3, drop_path=0.3, training=False)
    supernet = case.supernet()
    logits = supernet(case.images(), case.make_gates())
    supernet.noise = Noise()
    state = torch.get_rng_state()
    assert torch.equal(supernet(case.images(), case.make_gates()), logits)
    assert torch.equal(torch.get_rng_state(), state)


def search_state(case: Case) -> SearchState:
    supernet = case.supernet()
    arch = init_arch(supernet.config.gated(supernet.choices), generator(0, "alpha"), torch.device("cpu"))
    sgd = torch.optim.SGD(supernet.parameters(), lr=0.1)
    return SearchState(supernet, arch, Softmax(), sgd, None, Progress(0, 1), generator(0, "gates"))


def test_quality_of_a_supernet_is_measured_without_dropout() -> None:
    case = Case(skip_dropout=0.5, drop_path=0.5)
    gates, batches = case.make_gates(), [(case.images(), case.labels())]
    noisy = search_state(case)
    calm = search_state(replace(case, skip_dropout=0.0, drop_path=0.0))
    noise = noisy.supernet.noise
    assert supernet_quality(noisy, gates, batches) == supernet_quality(calm, gates, batches)
    assert noisy.supernet.noise == noise


@pytest.mark.parametrize("case", [RANDOM, Case(K=2, channel_mix="mask")], ids=["noise", "mask"])
def test_quality_of_a_supernet_draws_nothing_from_the_global_stream(case: Case) -> None:
    state, gates, batches = search_state(case), case.make_gates(), [(case.images(), case.labels())]
    before = torch.get_rng_state()
    supernet_quality(state, gates, batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "case", [Case(K=2, edge_norm=True), Case(ops="five", stem="imagenet"), Case(K=2, channel_mix="mask")]
)
def test_a_forward_without_statistics_differs_in_these_alone(case: Case) -> None:
    supernet = case.supernet()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    with without_statistics(supernet):
        left_alone = supernet(case.images(), case.make_gates())
    assert all(torch.equal(buffer, before[name]) for name, buffer in supernet.named_buffers())
    supernet.noise = replace(supernet.noise, generator=generator(case.seed, "noise"))
    assert torch.equal(supernet(case.images(), case.make_gates()), left_alone)
    assert not any(
        torch.equal(buffer, before[name]) for name, buffer in supernet.named_buffers() if "running" in name
    )


@pytest.mark.parametrize("p", [0.1, 0.4, 0.7])
def test_skip_dropout_keeps_the_expectation(p: float) -> None:
    space = CellSpace(nodes=2, ops=("skip_connect",))
    fan = FanOut((2,), (3,), space, ((0,),) * 5, channels=10, stride=1)
    noise = Noise(generator(0, "noise"), skip_dropout=p)
    x, gate = torch.ones(100, 10, 10, 10), torch.ones(1, 1)
    out = fan(x, gate, fan.plan(((0,),), x.device), None, noise)
    kept = out > 0
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - p)))
    # A mean over n draws of variance p / (1 - p); five standard errors.
    assert abs(float(out.mean()) - 1) < 5 * (p / (1 - p) / out.numel()) ** 0.5
    # Single elements are dropped, not whole channels or samples.
    assert 0 < kept[0, 0].double().mean() < 1
    fan.eval()
    assert torch.equal(fan(x, gate, fan.plan(((0,),), x.device), None, noise), x)


def test_skip_dropout_leaves_all_but_identities_alone() -> None:
    # Reduction cells of one node have no stride-1 edge, hence no identity.
    case = Case(nodes=1, cells=2)
    dropping = replace(case, skip_dropout=0.5)
    logits = case.supernet()(case.images(), case.make_gates())
    assert torch.equal(dropping.supernet()(case.images(), case.make_gates()), logits)


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("p", [0.2, 0.6])
def test_drop_path_keeps_the_expectation_and_drops_an_edge_of_a_sample(p: float, K: int) -> None:
    cell = single_node_cell(CellSupernetConfig(K), 4)
    gates = single_node_gates(cell, 1, (1.0, 1.0))
    batch = 20_000
    x = torch.ones(batch, 4, 1, 1)
    noise = Noise(generator(0, "noise"), drop_path=p)
    node = cell(x, 3 * x, gates, noise).view(batch, 4)
    # Mixed and bypassed channels of an edge go together: a sample holds one number throughout.
    assert torch.equal(node, node[:, :1].expand(-1, 4))
    seen = (node[:, 0] * (1 - p)).round(decimals=6).unique().tolist()
    assert seen == [0.0, 1.0, 3.0, 4.0]
    # Variance of a sum of two edges of sizes 1 and 3; five standard errors.
    assert abs(float(node.mean()) - 4) < 5 * (10 * p / (1 - p) / batch) ** 0.5
    assert torch.equal(cell.eval()(x, 3 * x, gates, noise), 4 * x)
