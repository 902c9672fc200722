"""An epoch of alternating updates: the batched supernet and one module per operation and edge stay equal.

`benchmarks.plain` is the public code's form with PyTorch's modules, against which speed is measured; what
is shown here, on the paper's network in double precision, is that both compute the same search.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import PlainSupernet
from nas.arch_updates import Bilevel
from nas.gates import leaves
from nas.genotype import Genotype
from nas.methods import METHODS
from nas.samplers import Gumbel, Progress, Sampler, Softmax, init_arch
from nas.schedule import Constant
from nas.search import weight_step
from nas.searchers import keep_likeliest
from nas.spaces.cell import CellSpace
from nas.spaces.space import Choices
from nas.state import Batch, SearchState
from nas.streams import generator, seeded
from nas.supernets.cell import CellSupernet, CellSupernetConfig
from nas.supernets.edge_form import edge_tensors

pytestmark = pytest.mark.usefixtures("float64")

CELLS, CHANNELS, CLASSES = 8, 16, 10
STEPS = 2
AFTER = 1e-5
"""Rounding after two iterations: finite differences and Adam's first steps divide by little."""


@dataclass(frozen=True)
class Case:
    """One search: K, edge normalisation, order of the architecture's gradient, kind of gates, stage."""

    K: int
    edge_norm: bool
    order: Literal[1, 2]
    gates: Literal["soft", "hard"]
    part: int = 0
    """1 is the second stage of P-DARTS: five operations left on each edge, others from edge to edge."""
    image_size: int = 32

    @property
    def name(self) -> str:
        """Short form for the test's report."""
        return f"K={self.K}{' edge norm' * self.edge_norm} order {self.order} {self.gates} part {self.part}"

    @property
    def sampler(self) -> Sampler:
        return Softmax() if self.gates == "soft" else Gumbel(tau=Constant(5.0))

    def choices(self) -> dict[str, Choices]:
        tables = dict(CellSpace().choices)
        if self.part:
            for name in tables:
                if name.endswith("/op"):
                    table = tables[name]
                    liking = torch.rand(
                        len(table.rows), len(table.options), generator=generator(0, "liking", name)
                    )
                    tables[name] = keep_likeliest(table, liking, 5)
        return tables

    def states(self) -> tuple[SearchState, SearchState]:
        """The fast search and the plain one, from the same weights and the same draws."""
        space, choices = CellSpace(), self.choices()
        config = CellSupernetConfig(partial_channels=self.K, edge_norm=self.edge_norm)
        with seeded(0, "weights"):
            fast = config.build(space, choices, cells=CELLS, channels=CHANNELS, classes=CLASSES)
            plain = PlainSupernet(fast, CELLS, CHANNELS, CLASSES, 3)
        return self._state(config, choices, fast), self._state(config, choices, plain)

    def _state(self, config: CellSupernetConfig, choices: dict[str, Choices], supernet: Any) -> SearchState:
        arch = init_arch(config.gated(choices), generator(0, "alpha"), torch.device("cpu"))
        return SearchState(
            supernet=supernet,
            arch=arch,
            sampler=self.sampler,
            weight_optimizer=torch.optim.SGD(
                supernet.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4
            ),
            arch_optimizer=self.update.optimizer(arch),
            progress=Progress(0, 1),
            draws=generator(0, "gates"),
        )

    @property
    def update(self) -> Bilevel:
        return Bilevel(order=self.order, lr=0.1)  # large, so that the genotype moves within two steps

    def batch(self, name: str, step: int) -> Batch:
        images = torch.randn(
            2, 3, self.image_size, self.image_size, generator=generator(0, name, step), dtype=torch.float64
        )
        return images, torch.tensor([step % CLASSES, (step + 3) % CLASSES])


def tensors(supernet: nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics of either form, by the same names."""
    if isinstance(supernet, PlainSupernet):
        return supernet.edge_form()
    assert isinstance(supernet, CellSupernet)
    return edge_tensors(supernet)


def gradients(supernet: nn.Module) -> dict[str, Tensor]:
    if isinstance(supernet, PlainSupernet):
        return {name: t.grad for name, t in supernet.edge_form().items() if t.grad is not None}
    assert isinstance(supernet, CellSupernet)
    return edge_tensors(supernet, lambda tensor: tensor.grad)


def check_close(fast: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor agrees, to `tolerance` of its kind's largest value."""
    # A weight that runs nowhere has no gradient in one form and zeros, stacked with others, in the other.
    for name in fast.keys() - plain.keys():
        assert not fast[name].any(), name
    assert not plain.keys() - fast.keys()
    for name in plain:
        scale = float(plain[name].abs().max()) + 1e-6
        assert float((fast[name] - plain[name]).abs().max()) < tolerance * scale, name


def one_pass(state: SearchState, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, gradients of the gates and gradients of the weights of one training pass."""
    images, labels = batch
    gates = leaves(state.sampler.sample(state.arch, state.progress, generator(0, "pass"))[0])
    state.supernet.zero_grad()
    logits = state.supernet(images, gates)
    torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
    alphas = {name: gate.weights.grad for name, gate in gates.items() if gate.weights.grad is not None}
    found = {name: gradient.clone() for name, gradient in gradients(state.supernet).items()}
    state.supernet.zero_grad()
    return logits.detach(), alphas, found


def train(state: SearchState, case: Case) -> Genotype:
    for step in range(STEPS):
        weights, held_out = case.batch("weights", step), case.batch("arch", step)
        case.update.step(state, weights, held_out)
        weight_step(state, weights, clip=5.0)
    searcher = METHODS["pc_darts"].searcher
    return searcher.derive(
        state.supernet.space, state.supernet.choices, state.arch.probabilities(), random.Random(0)
    )


def check(case: Case) -> None:
    fast, plain = case.states()
    (logits, alphas, weights), (plain_logits, plain_alphas, plain_weights) = (
        one_pass(state, case.batch("pass", 0)) for state in (fast, plain)
    )
    check_close({"logits": logits, **alphas}, {"logits": plain_logits, **plain_alphas}, 1e-9)
    check_close(weights, plain_weights, 1e-8)
    with torch.no_grad():  # the weights are the same still, running statistics have moved
        check_close(tensors(fast.supernet), tensors(plain.supernet), 1e-9)

    before = {name: tensor.clone() for name, tensor in tensors(fast.supernet).items()}
    genotypes = [train(state, case) for state in (fast, plain)]
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensors(fast.supernet).items())
    with torch.no_grad():
        check_close(tensors(fast.supernet), tensors(plain.supernet), AFTER)
        check_close(dict(fast.arch.logits), dict(plain.arch.logits), AFTER)
        assert genotypes[0] == genotypes[1]
        outputs = []
        for state in (fast, plain):
            (gates,) = state.sampler.sample(state.arch, state.progress, generator(0, "evaluation"))
            outputs.append(state.supernet.eval()(case.batch("valid", 0)[0], gates))
        check_close({"logits": outputs[0]}, {"logits": outputs[1]}, AFTER)


ALL = [
    Case(K, edge_norm, order, gates, part)
    for K, edge_norm, order, gates, part in product(
        (1, 2, 4, 8), (False, True), (1, 2), ("soft", "hard"), (0, 1)
    )
]
FEW = [
    Case(4, True, 1, "soft", image_size=16),
    Case(4, True, 2, "soft", image_size=16),
    Case(1, False, 1, "soft", part=1, image_size=16),
    Case(8, True, 1, "hard", image_size=16),
    Case(2, False, 2, "hard", part=1, image_size=16),
]


@pytest.mark.parametrize("case", FEW, ids=[case.name for case in FEW])
def test_an_epoch_is_that_of_the_plain_form(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_an_epoch_is_that_of_the_plain_form_at_full_size(case: Case) -> None:
    check(case)
