"""What every space, sampler, searcher, method and paper promises; `test_contracts.py` holds each to it."""

import json
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.gates import Gates, one_hot
from nas.genotype import Genotype
from nas.methods import Method
from nas.samplers import Arch, Progress, Sampler, Softmax, init_arch
from nas.searchers import Argmax, RandomGenotype, Searcher
from nas.spaces.cell import CELL_TYPES, CellSpace
from nas.spaces.space import Choices
from nas.streams import generator, seeded
from nas.trial import Trial

CPU = torch.device("cpu")
CLASSES = 3


def arch_of(choices: dict[str, Choices], seed: int = 0, scale: float = 1.0) -> Arch:
    """Architecture parameters that have moved away from their start."""
    arch = init_arch(choices, generator(seed, "contract"), CPU)
    with torch.no_grad():
        for logits in arch.parameters():
            logits.mul_(1000 * scale)
    return arch


def random_probabilities(choices: dict[str, Choices], seed: int = 0) -> dict[str, Tensor]:
    """A distribution over the allowed options of every row of every table."""
    with torch.no_grad():
        return arch_of(choices, seed).probabilities()


def sampled(sampler: Sampler, arch: Arch, seed: int = 0, epoch: int = 0) -> Gates:
    """The gates of one step."""
    (gates,) = sampler.sample(arch, Progress(epoch, 10), generator(seed, "gates"))
    return gates


def within(space: CellSpace, genotype: Genotype, *, pairs: bool = False) -> None:
    """A derived genotype takes at every node as many inputs as the space says, and operations allowed there.

    `pairs` lets a node take one input twice, with two operations.
    """
    for cell_type in CELL_TYPES:
        cell = getattr(genotype, cell_type)
        table = space.op_choices(cell_type)
        assert len(cell.nodes) == space.nodes
        assert cell.concat == tuple(range(2, space.nodes + 2))
        for node, inputs in enumerate(cell.nodes, start=2):
            assert len(set(inputs)) == len(inputs) == space.inputs_per_node
            assert pairs or len({source for _, source in inputs}) == len(inputs)
            for op, source in inputs:
                allowed = table.allowed[space.edges.index((node, source))]
                assert op != "none"
                assert op in {space.ops[option] for option in allowed}


def check_space(space: CellSpace) -> None:
    """A space samples its members, tells them apart, and round-trips them through picks and one-hot gates."""
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(10)]
    rng = random.Random(0)
    assert [space.sample(rng) for _ in range(10)] == drawn, "same seed, same draws"
    for genotype in drawn:
        within(space, genotype)
        picks = space.picks(genotype)
        assert space.genotype(picks) == genotype
        assert set(picks) == set(space.choices)
        for name, table in space.choices.items():
            for taken, allowed in zip(picks[name], table.allowed, strict=True):
                assert set(taken) <= set(allowed)
            if name.endswith("/input"):
                assert {len(taken) for taken in picks[name]} == {table.pick}
        for name, gate in one_hot(space.choices, picks).items():
            assert gate.active == picks[name]
            expected = torch.zeros_like(gate.weights)
            for row, options in enumerate(picks[name]):
                for option in options:
                    expected[row, option] = 1
            assert torch.equal(gate.weights, expected)
    different = {tuple(space.picks(genotype).items()) for genotype in drawn}
    assert len(different) == len(set(drawn)), "different genotypes, different picks"


def check_sampler(sampler: Sampler, choices: dict[str, Choices]) -> None:
    """Same logits, progress and stream: same gates. Rows sum to 1; nothing acts outside `active`."""
    arch = arch_of(choices)
    for seed in range(3):
        for epoch in (0, 9):
            gates, again = sampled(sampler, arch, seed, epoch), sampled(sampler, arch, seed, epoch)
            assert set(gates) == set(choices)
            for name, gate in gates.items():
                table = choices[name]
                assert gate.weights.shape == (len(table.rows), len(table.options))
                assert torch.equal(gate.weights, again[name].weights), "same stream, same gates"
                assert gate.active == again[name].active
                sums = gate.weights.sum(dim=1)
                assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)
                assert (gate.weights >= 0).all()
                for weights, active, allowed in zip(gate.weights, gate.active, table.allowed, strict=True):
                    assert active
                    assert set(active) <= set(allowed)
                    silent = [option for option in range(len(table.options)) if option not in active]
                    assert weights[silent].eq(0).all()
    check_gradient_of_gates(sampler, arch)


def check_gradient_of_gates(sampler: Sampler, arch: Arch) -> None:
    """A loss on the gates moves every logit of a row with a choice, and none of an option not allowed."""
    for logits in arch.parameters():
        logits.grad = None
    for seed in range(3):
        gates = sampled(sampler, arch, seed)
        loss = torch.zeros(())
        for gate in gates.values():
            slope = torch.linspace(1, 2, gate.weights.numel()).view_as(gate.weights)
            loss = loss + (slope * gate.weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    for name, logits in arch.logits.items():
        assert logits.grad is not None
        for gradient, allowed in zip(logits.grad, arch.choices[name].allowed, strict=True):
            options = list(allowed)
            assert gradient[options].ne(0).all() or len(options) == 1
            assert gradient[[o for o in range(len(gradient)) if o not in allowed]].eq(0).all()


def check_searcher(searcher: Searcher, space: CellSpace) -> None:
    """A searcher gives a genotype of the space, the same for the same stream, under its cap."""
    for seed in range(10):
        learned = random_probabilities(space.choices, seed)
        genotype = searcher.derive(space, space.choices, learned, random.Random(seed))
        assert genotype == searcher.derive(space, space.choices, learned, random.Random(seed))
        within(space, genotype, pairs=isinstance(searcher, Argmax) and searcher.pairs)
        if searcher.max_skip is not None:
            assert genotype.normal.skips <= searcher.max_skip
        if isinstance(searcher, RandomGenotype):
            assert genotype == searcher.derive(space, space.choices, {}, random.Random(seed))


def check_method(method: Method, space: CellSpace) -> None:
    """Logits are finite; their loss reaches all alphas and betas and, where all options run, all weights."""
    with seeded(0, "contract"):
        supernet = method.supernet.build(
            space, space.choices, cells=3, channels=8, classes=CLASSES, channels_in=1
        )
    supernet.train()
    arch = arch_of(method.supernet.gated(space.choices), scale=0.1)
    assert set(arch.logits) == {n for n in space.choices if method.supernet.edge_norm or n.endswith("/op")}
    assert not any(parameter is logits for parameter in supernet.parameters() for logits in arch.parameters())
    draws = generator(0, "gates")
    images = torch.randn(8, 1, 8, 8, generator=generator(0, "images"))
    labels = torch.arange(8) % CLASSES
    for _ in range(12):  # one path at a time may miss an option
        (gates,) = method.sampler.sample(arch, Progress(0, 10), draws)
        out = supernet(images, gates)
        assert out.shape == (8, CLASSES)
        assert out.isfinite().all()
        F.cross_entropy(out, labels).backward()  # type: ignore[no-untyped-call]
    for name, logits in arch.logits.items():
        assert logits.grad is not None
        for gradient, options in zip(logits.grad, arch.choices[name].allowed, strict=True):
            assert gradient[list(options)].ne(0).all(), name
    for name, parameter in supernet.named_parameters():
        if parameter.grad is not None or isinstance(method.sampler, Softmax):  # where all options run
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    genotype = method.searcher.derive(space, space.choices, arch.probabilities(), random.Random(0))
    within(space, genotype, pairs=isinstance(method.searcher, Argmax) and method.searcher.pairs)


def check_paper(trial: Trial) -> None:
    """A trial survives JSON with its id: 12 hex digits of everything but where downloads are kept."""
    plain = json.loads(json.dumps(trial.to_dict()))
    back = Trial.from_dict(plain)
    assert back == trial
    assert back.id == trial.id
    assert back.to_dict() == plain
    assert len(trial.id) == 12
    assert set(trial.id) <= set("0123456789abcdef")
    assert replace(trial, data=replace(trial.data, root="/elsewhere", download=False)).id == trial.id
