"""Costs: parameters and multiply-adds of a genotype's network, by formula, without building it."""

import math
from dataclasses import dataclass

from nas.genotype import Genotype
from nas.spaces.cell import reduction_cells


@dataclass(frozen=True)
class NetworkCost:
    """Size of a network."""

    params: int
    """Weights without the auxiliary head."""
    madds: int
    """Multiply-adds of convolutions and the linear layer for one image."""


class _Count:
    """Running totals of a walk through a network."""

    def __init__(self) -> None:
        self.params = 0
        self.madds = 0

    def conv(self, weights: int, side: int) -> None:
        self.params += weights
        self.madds += weights * side * side

    def norm(self, channels: int) -> None:
        self.params += 2 * channels


def _op(count: _Count, op: str, channels: int, stride: int, side_in: int) -> None:
    """Add operation `op` at width `channels` on a map of `side_in`."""
    side = math.ceil(side_in / stride)
    c = channels
    kernel = int(op[-1]) if op[-1].isdigit() else 0
    if op.startswith("sep_conv"):
        for _ in range(2):
            count.conv(kernel * kernel * c, side)
            count.conv(c * c, side)
            count.norm(c)
    elif op.startswith("dil_conv"):
        count.conv(kernel * kernel * c, side)
        count.conv(c * c, side)
        count.norm(c)
    elif op == "skip_connect" and stride == 2:
        count.conv(c * c, side)
        count.norm(c)
    elif op == "conv_7x1_1x7":
        _rect(count, 7 * c * c, side_in, side)
        count.norm(c)
    elif op == "conv_1x3_3x1":
        _rect(count, 3 * c * c // 8, side_in, side)
        count.norm(c)
        count.conv(c * c, side)
        count.norm(c)
    elif op == "max_pool_3x3_bn":
        count.norm(c)


def _rect(count: _Count, weights: int, side_in: int, side: int) -> None:
    """A 1xk convolution that strides along the width only, then a kx1 one along the height."""
    count.params += 2 * weights
    count.madds += weights * side * side_in + weights * side * side


def network_cost(
    genotype: Genotype,
    *,
    channels: int,
    cells: int,
    classes: int,
    image_size: int,
    channels_in: int = 3,
    stem: str = "cifar",
    stem_multiplier: int | None = None,
) -> NetworkCost:
    """Parameters (auxiliary head excluded) and multiply-adds of `nas.network.Network` for square images."""
    count = _Count()
    side = image_size
    width = channels * (stem_multiplier or (3 if stem == "cifar" else 1))
    if stem == "cifar":
        count.conv(9 * channels_in * width, side)
        count.norm(width)
    else:
        for c_in, c_out in ((channels_in, width // 2), (width // 2, width), (width, width)):
            side = math.ceil(side / 2)
            count.conv(9 * c_in * c_out, side)
            count.norm(c_out)
    before, last = width, width
    for position in range(cells):
        reduction = position in reduction_cells(cells)
        channels = channels * 2 if reduction else channels
        # s0 still has the larger map after a reduction; the factorised preprocessing brings it down.
        count.conv(before * channels, side)
        count.conv(last * channels, side)
        count.norm(2 * channels)
        out_side = math.ceil(side / 2) if reduction else side
        cell = genotype.reduce if reduction else genotype.normal
        for inputs in cell.nodes:
            for op, source in inputs:
                stride = 2 if reduction and source < 2 else 1
                _op(count, op, channels, stride, side if source < 2 else out_side)
        before, last, side = last, len(cell.concat) * channels, out_side
    count.conv(last * classes, 1)
    count.params += classes
    return NetworkCost(count.params, count.madds)
