"""Network: the standalone model of a genotype, for retraining.

Source: the evaluation networks of DARTS (arXiv:1806.09055), PC-DARTS (arXiv:1907.05737) and P-DARTS
(arXiv:1904.12760).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.execution import recomputed
from nas.genotype import Cell, Genotype
from nas.ops import FactorizedReduce, ReLUConvBN, ReLUFirst, build_op, plus
from nas.spaces.cell import reduction_cells

Stem = Literal["cifar", "imagenet"]


def cifar_stem(channels_in: int, width: int) -> nn.Sequential:
    """3x3 convolution and batch norm at full resolution."""
    stem = nn.Sequential()
    stem.add_module("conv", nn.Conv2d(channels_in, width, 3, padding=1, bias=False))
    stem.add_module("bn", nn.BatchNorm2d(width))
    return stem


def imagenet_stems(channels_in: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Two stems, to a quarter and to an eighth of the resolution."""
    stem0 = nn.Sequential()
    stem0.add_module("conv_a", nn.Conv2d(channels_in, width // 2, 3, 2, padding=1, bias=False))
    stem0.add_module("bn_a", nn.BatchNorm2d(width // 2))
    stem0.add_module("relu", nn.ReLU(inplace=True))
    stem0.add_module("conv_b", nn.Conv2d(width // 2, width, 3, 2, padding=1, bias=False))
    stem0.add_module("bn_b", nn.BatchNorm2d(width))
    stem1 = nn.Sequential()
    stem1.add_module("relu", nn.ReLU())
    stem1.add_module("conv", nn.Conv2d(width, width, 3, 2, padding=1, bias=False))
    stem1.add_module("bn", nn.BatchNorm2d(width))
    return stem0, stem1


def auxiliary_head(channels: int, classes: int, stem: Stem, *, second_norm: bool) -> nn.Sequential:
    """Classifier on the output of the second reduction cell, for training only.

    The pool leaves 2x2 of the 8x8 (CIFAR) or 7x7 (ImageNet) map. `second_norm=False` leaves out the batch
    norm after the second convolution, as the ImageNet code of DARTS and PC-DARTS does.
    """
    head = nn.Sequential()
    head.add_module("relu", nn.ReLU())
    head.add_module("pool", nn.AvgPool2d(5, stride=3 if stem == "cifar" else 2, count_include_pad=False))
    head.add_module("conv_a", nn.Conv2d(channels, 128, 1, bias=False))
    head.add_module("bn_a", nn.BatchNorm2d(128))
    head.add_module("relu_a", nn.ReLU(inplace=True))
    head.add_module("conv_b", nn.Conv2d(128, 768, 2, bias=False))
    if second_norm:
        head.add_module("bn_b", nn.BatchNorm2d(768))
    head.add_module("relu_b", nn.ReLU(inplace=True))
    head.add_module("flatten", nn.Flatten())
    head.add_module("head", nn.Linear(768, classes))
    return head


class NetworkCell(nn.Module):
    """One cell of a genotype; `picks` are its operations in the genotype's order."""

    def __init__(
        self,
        cell: Cell,
        channels_in: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        after_reduction: bool,
        affine: bool,
        pool_norm: bool,
    ) -> None:
        super().__init__()
        self.cell = cell
        first = FactorizedReduce if after_reduction else ReLUConvBN
        self.in0 = first(channels_in[0], channels, affine=affine)
        self.in1 = ReLUConvBN(channels_in[1], channels, affine=affine)
        self.picks = nn.ModuleList(
            build_op(op, channels, 2 if reduction and source < 2 else 1, affine=affine, pool_norm=pool_norm)
            for inputs in cell.nodes
            for op, source in inputs
        )
        self.droppable = sum(not isinstance(op, nn.Identity) for op in self.picks)
        """Operations that drop-path may drop: all but identity skips."""

    def forward(self, s0: Tensor, s1: Tensor, keep: Tensor | None) -> Tensor:
        """Rectified outputs of the two cells before -> concatenated nodes (B, len(concat)*C, H', W').

        `keep` (droppable, B, 1, 1, 1) are the factors of drop-path; None drops nothing.
        """
        states = [self.in0.after_relu(s0), self.in1.after_relu(s1)]
        rectified: dict[int, Tensor] = {}
        ops, factors = iter(self.picks), iter(() if keep is None else keep.unbind())
        for inputs in self.cell.nodes:
            total: Tensor | None = None
            for _, source in inputs:
                op = next(ops)
                if isinstance(op, ReLUFirst):
                    if source not in rectified:
                        rectified[source] = F.relu(states[source])
                    y = op.after_relu(rectified[source])
                else:
                    y = op(states[source])
                total = plus(total, y, None if isinstance(op, nn.Identity) else next(factors, None))
            assert total is not None
            states.append(total)
        return torch.cat([states[node] for node in self.cell.concat], dim=1)


class Network(nn.Module):
    """The network of `genotype`: stem, `cells` cells of which two reduce, pooling, linear head.

    `affine=False, pool_norm=True` builds the operations as a supernet has them, so that the two can share
    weights. An auxiliary head that does not fit the map of the second reduction cell fails in `forward`.
    `checkpoint_cells` keeps only the inputs of cells for the backward pass, which computes the rest again.

    Raises:
        ValueError: `cells` is less than 1.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        channels: int,
        cells: int,
        classes: int,
        channels_in: int = 3,
        stem: Stem = "cifar",
        stem_multiplier: int | None = None,
        auxiliary: bool = False,
        auxiliary_norm: bool = True,
        affine: bool = True,
        pool_norm: bool = False,
        checkpoint_cells: bool = False,
    ) -> None:
        super().__init__()
        if cells < 1:
            raise ValueError(f"cells={cells} must be at least 1")
        width = channels * (stem_multiplier or (3 if stem == "cifar" else 1))
        self.stem0: nn.Module
        self.stem1: nn.Module | None = None
        if stem == "cifar":
            self.stem0 = cifar_stem(channels_in, width)
        else:
            self.stem0, self.stem1 = imagenet_stems(channels_in, width)
        self.drop_path = 0.0
        """Probability of dropping an operation's output for a sample in training; set before each epoch."""
        self.generator: torch.Generator | None = None
        """Stream of the drop-path draws."""
        self.checkpoint_cells = checkpoint_cells
        before, last, after_reduction = width, width, stem == "imagenet"
        self.cells = nn.ModuleList()
        self.auxiliary: nn.Module | None = None
        self.auxiliary_position = 2 * cells // 3
        for position in range(cells):
            reduction = position in reduction_cells(cells)
            channels = channels * 2 if reduction else channels
            cell = genotype.reduce if reduction else genotype.normal
            self.cells.append(
                NetworkCell(
                    cell,
                    (before, last),
                    channels,
                    reduction=reduction,
                    after_reduction=after_reduction,
                    affine=affine,
                    pool_norm=pool_norm,
                )
            )
            before, last = last, len(cell.concat) * channels
            after_reduction = reduction
            if auxiliary and position == self.auxiliary_position:
                self.auxiliary = auxiliary_head(last, classes, stem, second_norm=auxiliary_norm)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) -> logits (B, classes), and those of the auxiliary head in training."""
        # All that read a cell's output rectify it first, but for the head; hence it is done once, here.
        s0 = s1 = F.relu(self.stem0(x), inplace=True)
        if self.stem1 is not None:
            s1 = F.relu(self.stem1(s0), inplace=True)
        auxiliary: Tensor | None = None
        out = s1
        for position, (cell, keep) in enumerate(zip(self.cells, self._keep(x, s1.dtype), strict=True)):
            if position:
                s0, s1 = s1, F.relu(out, inplace=True)
            if self.checkpoint_cells:
                out = recomputed(cell, s0, s1, keep, generator=self.generator)
            else:
                out = cell(s0, s1, keep)
            if self.training and self.auxiliary is not None and position == self.auxiliary_position:
                auxiliary = self.auxiliary(out)
        return self.head(F.adaptive_avg_pool2d(out, 1).flatten(1)), auxiliary

    def _keep(self, x: Tensor, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """Drop-path's factors for every cell, drawn at once: 0 for what is dropped, else 1 / (1 - p)."""
        if not self.training or self.drop_path == 0:
            return [None] * len(self.cells)
        counts = [cell.droppable for cell in self.cells if isinstance(cell, NetworkCell)]
        shape = (sum(counts), len(x), 1, 1, 1)
        draws = torch.rand(shape, generator=self.generator, dtype=x.dtype, device=x.device)
        return torch.split((draws >= self.drop_path).to(dtype) / (1 - self.drop_path), counts)


def retrain_loss(
    logits: Tensor, auxiliary: Tensor | None, labels: Tensor, *, auxiliary_weight: float, smoothing: float
) -> Tensor:
    """Mean cross-entropy of the head plus `auxiliary_weight` times that of the auxiliary head."""
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if auxiliary is not None:
        loss = loss + auxiliary_weight * F.cross_entropy(auxiliary, labels, label_smoothing=smoothing)
    return loss
