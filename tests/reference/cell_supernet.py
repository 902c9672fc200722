"""The cell supernet written as its equations read: one operation on one edge at a time.

`nas.supernets.cell` computes the same in batches of edges. Nothing of `nas` is used here, only elementary
functions of PyTorch:

    node_j  = sum over i < j of beta_ij edge_ij(node_i)
    edge(x) = mix(sum over operations o of alpha_o o(x[:C/K]), x[C/K:])

All weights and running statistics are in one dict, under names such as `cell2.edge5.sep_conv_3x3.dw1.w`:
a convolution has a tensor w, a batch norm has mean, var and perhaps scale and shift. What is random comes in
as `draws`, so that a caller can hand over what another form drew.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class EdgeWeights:
    """The architecture of one cell type; edges are numbered node by node, predecessors ascending."""

    alpha: Tensor
    """(edges, operations)"""
    active: tuple[tuple[int, ...], ...]
    """The operations that run, edge by edge; the weights of the others are not read."""
    beta: Tensor | None = None
    """(edges,); None is 1 everywhere."""


@dataclass
class PlainSupernet:
    """A supernet of the given tensors; `logits` leaves the running statistics after it in `statistics`."""

    tensors: Tensors
    ops: tuple[str, ...]
    nodes: int
    cells: int
    K: int = 1
    mix: str = "shuffle"
    training: bool = True
    draws: Tensors = field(default_factory=dict)
    """By name of an edge, e.g. `cell2.edge5.path`.

    `path` is a factor for each sample, `skip` one for each element of an identity, `order` the channels with
    the mixed ones first, `noise` the operation's output.
    """
    statistics: Tensors = field(default_factory=dict)

    def logits(self, images: Tensor, normal: EdgeWeights, reduce: EdgeWeights) -> Tensor:
        """Images (B, C, H, W) -> (B, classes)."""
        if "stem.conv.w" in self.tensors:
            s0 = s1 = self.norm("stem.bn", self.conv("stem.conv", images, padding=1))
        else:
            half = self.norm("stem0.bn_a", self.conv("stem0.conv_a", images, stride=2, padding=1))
            s0 = self.norm("stem0.bn_b", self.conv("stem0.conv_b", F.relu(half), stride=2, padding=1))
            s1 = self.norm("stem1.bn", self.conv("stem1.conv", F.relu(s0), stride=2, padding=1))
        for number in range(self.cells):
            if number in (self.cells // 3, 2 * self.cells // 3):
                s0, s1 = s1, self.cell(f"cell{number}", s0, s1, reduce, stride=2)
            else:
                s0, s1 = s1, self.cell(f"cell{number}", s0, s1, normal, stride=1)
        return s1.mean(dim=(2, 3)) @ self.tensors["head.w"].T + self.tensors["head.b"]

    def cell(self, name: str, s0: Tensor, s1: Tensor, weights: EdgeWeights, stride: int) -> Tensor:
        """Outputs of the two cells before -> all nodes but these two, concatenated."""
        states = [self.preprocess(f"{name}.in0", s0), self.preprocess(f"{name}.in1", s1)]
        edge = 0
        for node in range(2, 2 + self.nodes):
            total = torch.tensor(0.0)
            for source in range(node):
                y = self.edge(
                    f"{name}.edge{edge}",
                    states[source],
                    weights.alpha[edge],
                    weights.active[edge],
                    stride=stride if source < 2 else 1,
                )
                total = total + (y if weights.beta is None else weights.beta[edge] * y)
                edge += 1
            states.append(total)
        return torch.cat(states[2:], dim=1)

    def preprocess(self, name: str, x: Tensor) -> Tensor:
        """Output of a cell at this cell's width; halved if the cell after it was a reduction."""
        if f"{name}.conv_a.w" in self.tensors:
            return self.factorized_reduce(name, x)
        return self.norm(f"{name}.bn", self.conv(f"{name}.conv", F.relu(x)))

    def edge(self, name: str, x: Tensor, alpha: Tensor, active: tuple[int, ...], stride: int) -> Tensor:
        """All active operations on C/K channels, in their sum, and the other channels past them."""
        channels = x.shape[1]
        part = channels // self.K
        order = self.draws.get(f"{name}.order", torch.arange(channels))
        x = x[:, order]
        size = [-(-side // stride) for side in x.shape[2:]]
        y = x.new_zeros(x.shape[0], part, *size)
        for option in active:
            if self.ops[option] != "none":
                y = y + alpha[option] * self.operation(f"{name}.{self.ops[option]}", x[:, :part], stride)
        if self.K > 1:
            y = self.put_together(y, self.halve(x[:, part:]) if stride == 2 else x[:, part:], order)
        return y * self.draws[f"{name}.path"][:, None, None, None] if f"{name}.path" in self.draws else y

    def halve(self, x: Tensor) -> Tensor:
        """Largest of every 2x2 pixels; a side of odd length ends in a window of one."""
        return F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf), 2, 2)

    def put_together(self, mixed: Tensor, bypassed: Tensor, order: Tensor) -> Tensor:
        """Mixed and bypassed channels -> all channels, ordered so that the next edge mixes other ones."""
        y = torch.cat([mixed, bypassed], dim=1)
        if self.mix == "mask":
            restored = torch.empty_like(y)
            restored[:, order] = y
            return restored
        if self.mix == "shift":
            return torch.cat([bypassed, mixed], dim=1)
        # Channel shuffle: channel g C/K + r moves to r K + g.
        part = mixed.shape[1]
        return torch.stack([y[:, g * part + r] for r in range(part) for g in range(self.K)], dim=1)

    def operation(self, name: str, x: Tensor, stride: int) -> Tensor:
        """One operation on one edge, named e.g. `cell2.edge5.sep_conv_3x3`."""
        edge, op = name.rsplit(".", 1)
        if op == "noise":
            return self.draws[f"{edge}.noise"]
        if op == "skip_connect" and stride == 1:
            return x * self.draws.get(f"{edge}.skip", torch.tensor(1.0))
        if op == "skip_connect":
            return self.factorized_reduce(name, x)
        if op == "max_pool_3x3":
            return self.norm(f"{name}.bn", F.max_pool2d(x, 3, stride, padding=1))
        if op == "avg_pool_3x3":
            return self.norm(f"{name}.bn", F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False))
        kernel = int(op[-1])
        if op.startswith("dil_conv"):
            y = self.conv(
                f"{name}.dw", F.relu(x), stride=stride, padding=kernel - 1, dilation=2, depthwise=True
            )
            return self.norm(f"{name}.bn", self.conv(f"{name}.pw", y))
        assert op.startswith("sep_conv")
        y = self.conv(f"{name}.dw1", F.relu(x), stride=stride, padding=kernel // 2, depthwise=True)
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.pw1", y))
        y = self.conv(f"{name}.dw2", F.relu(y), padding=kernel // 2, depthwise=True)
        return self.norm(f"{name}.bn2", self.conv(f"{name}.pw2", y))

    def factorized_reduce(self, name: str, x: Tensor) -> Tensor:
        """Half of the channels from the even pixels, half from the odd ones; odd sides get a row of zeros."""
        x = F.pad(F.relu(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        even, odd = x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]
        halves = [self.conv(f"{name}.conv_a", even), self.conv(f"{name}.conv_b", odd)]
        return self.norm(f"{name}.bn", torch.cat(halves, dim=1))

    def conv(
        self,
        name: str,
        x: Tensor,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        depthwise: bool = False,
    ) -> Tensor:
        """Convolution without bias."""
        groups = x.shape[1] if depthwise else 1
        return F.conv2d(x, self.tensors[f"{name}.w"], None, stride, padding, dilation, groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Batch norm with the batch's statistics in training, with the running ones in evaluation.

        Those of the batch enter the running ones with weight 0.1, the variance unbiased.
        """
        mean, var = self.tensors[f"{name}.mean"], self.tensors[f"{name}.var"]
        if self.training:
            count = x.numel() // x.shape[1]
            batch_mean = x.mean(dim=(0, 2, 3))
            batch_var = ((x - batch_mean[:, None, None]) ** 2).mean(dim=(0, 2, 3))
            self.statistics[f"{name}.mean"] = 0.9 * mean + 0.1 * batch_mean.detach()
            self.statistics[f"{name}.var"] = 0.9 * var + 0.1 * batch_var.detach() * count / (count - 1)
            mean, var = batch_mean, batch_var
        y = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        if f"{name}.scale" in self.tensors:
            scale, shift = self.tensors[f"{name}.scale"], self.tensors[f"{name}.shift"]
            y = y * scale[:, None, None] + shift[:, None, None]
        return y
