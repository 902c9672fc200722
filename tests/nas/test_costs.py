"""Sizes by formula against the modules: weights counted, multiply-adds watched as they run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.costs import NetworkCost, network_cost
from nas.genotype import OPERATIONS, Cell, Genotype
from nas.network import Network, Stem
from nas.spaces.cell import CellSpace
from tests.strategies import genotypes


@contextmanager
def watched(network: nn.Module) -> Iterator[list[int]]:
    """Multiply-adds of every convolution and linear layer that runs in the context, for one image."""
    seen: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        per_output = module.weight[0].numel()  # a linear layer's inputs; a kernel over its group's channels
        seen.append(output.numel() * per_output)

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    yield seen
    for hook in hooks:
        hook.remove()


def counted(network: Network, image_size: int, channels_in: int = 3) -> NetworkCost:
    weights = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary"))
    with watched(network.eval()) as seen, torch.no_grad():
        network(torch.zeros(1, channels_in, image_size, image_size))
    return NetworkCost(weights, sum(seen))


@given(
    data=st.data(),
    nodes=st.integers(1, 3),
    cells=st.integers(1, 6),
    image_size=st.integers(8, 21),
    channels=st.sampled_from([8, 16]),
    channels_in=st.sampled_from([1, 3]),
    classes=st.integers(2, 11),
    stem=st.sampled_from(["cifar", "imagenet"]),
)
@settings(max_examples=60)
def test_formula_counts_what_the_network_has_and_does(
    data: st.DataObject,
    nodes: int,
    cells: int,
    image_size: int,
    channels: int,
    channels_in: int,
    classes: int,
    stem: Stem,
) -> None:
    genotype = data.draw(genotypes(CellSpace(nodes=nodes, ops=OPERATIONS)))
    network = Network(
        genotype, channels=channels, cells=cells, classes=classes, channels_in=channels_in, stem=stem
    )
    formula = network_cost(
        genotype,
        channels=channels,
        cells=cells,
        classes=classes,
        image_size=image_size,
        channels_in=channels_in,
        stem=stem,
    )
    assert formula == counted(network, image_size, channels_in)


def both(op: str) -> Genotype:
    cell = Cell((((op, 0), (op, 1)), ((op, 1), (op, 2))), (2, 3))
    return Genotype(cell, cell)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("image_size", [8, 9, 15])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_every_operation_is_counted(op: str, image_size: int, stem: Stem) -> None:
    genotype = both(op)
    network = Network(genotype, channels=8, cells=4, classes=10, stem=stem)
    formula = network_cost(genotype, channels=8, cells=4, classes=10, image_size=image_size, stem=stem)
    assert formula == counted(network, image_size)


@pytest.mark.parametrize(
    ("op", "weights"),
    [
        ("none", 0),
        ("noise", 0),
        ("max_pool_3x3", 0),
        ("avg_pool_3x3", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 2 * 16 * 9 + 2 * 256 + 4 * 16),
        ("sep_conv_5x5", 2 * 16 * 25 + 2 * 256 + 4 * 16),
        ("sep_conv_7x7", 2 * 16 * 49 + 2 * 256 + 4 * 16),
        ("dil_conv_3x3", 16 * 9 + 256 + 2 * 16),
        ("dil_conv_5x5", 16 * 25 + 256 + 2 * 16),
        ("conv_7x1_1x7", 14 * 256 + 2 * 16),
    ],
)
def test_weights_of_an_operation_at_stride_one(op: str, weights: int) -> None:
    """The terms of the papers' counts at C = 16, e.g. 2 C k^2 + 2 C^2 + 4 C for a separable convolution."""
    nothing = Cell(((("none", 0), ("none", 1)),), (2,))
    one = Cell((((op, 0), ("none", 1)),), (2,))
    # Of three cells the first alone is normal.
    with_op, without = (
        network_cost(Genotype(cell, nothing), channels=16, cells=3, classes=10, image_size=8)
        for cell in (one, nothing)
    )
    assert with_op.params - without.params == weights


def test_the_auxiliary_head_is_not_counted() -> None:
    genotype = both("sep_conv_3x3")
    with_head = Network(genotype, channels=8, cells=3, classes=10, auxiliary=True)
    without = Network(genotype, channels=8, cells=3, classes=10)
    assert sum(p.numel() for p in with_head.parameters()) > sum(p.numel() for p in without.parameters())
    formula = network_cost(genotype, channels=8, cells=3, classes=10, image_size=32)
    assert formula == counted(with_head, 32) == counted(without, 32)
