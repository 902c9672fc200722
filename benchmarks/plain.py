"""The cell supernet in the form of the public code: one module for each operation on each edge.

What the batched supernet of `nas.supernets.cell` is measured against. It takes the same gates and holds the
same weights (`load` copies them over), so both can be driven by the same steps; the `published_*` steps do
what the public code does beyond that, namely compute every gradient in every step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.gates import Gates
from nas.network import cifar_stem
from nas.ops import FactorizedReduce, ReLUConvBN, build_op
from nas.spaces.cell import CELL_TYPES, CellSpace, reduction_cells
from nas.state import Batch, SearchState
from nas.supernets.cell import CellSupernet, Noise
from nas.supernets.edge_form import edge_tensors

KINDS = {"weight": "w", "running_mean": "mean", "running_var": "var"}
"""Tensors of a convolution or an affine-free batch norm, by their name in the edge form."""


class PlainEdge(nn.Module):
    """All operations on one edge, on the first C/K channels; the others pass by, then all are shuffled."""

    def __init__(
        self, ops: tuple[str, ...], allowed: tuple[int, ...], channels: int, stride: int, K: int
    ) -> None:
        super().__init__()
        self.K, self.part, self.stride, self.names = K, channels // K, stride, ops
        for option in allowed:
            self.add_module(
                ops[option], build_op(ops[option], self.part, stride, affine=False, pool_norm=True)
            )

    def forward(self, x: Tensor, weights: Tensor, active: tuple[int, ...]) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'), mixed by `weights` (options,) over the `active` ones."""
        if self.K == 1:
            return self._mixed(x, weights, active)
        mixed, rest = torch.split(x, [self.part, x.shape[1] - self.part], dim=1)
        mixed = self._mixed(mixed, weights, active)
        y = torch.cat([mixed, F.max_pool2d(rest, 2, 2) if self.stride == 2 else rest], dim=1)
        return y.view(len(y), self.K, self.part, *y.shape[2:]).transpose(1, 2).flatten(1, 2)

    def _mixed(self, x: Tensor, weights: Tensor, active: tuple[int, ...]) -> Tensor:
        outputs = [weights[option] * self.get_submodule(self.names[option])(x) for option in active]
        total: Tensor = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total


class PlainCell(nn.Module):
    """One cell, edge by edge."""

    def __init__(
        self,
        space: CellSpace,
        allowed: tuple[tuple[int, ...], ...],
        channels_in: tuple[int, int],
        channels: int,
        K: int,
        *,
        reduction: bool,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        self.cell_type, self.nodes = CELL_TYPES[reduction], space.nodes
        self.in0 = (FactorizedReduce if after_reduction else ReLUConvBN)(
            channels_in[0], channels, affine=False
        )
        self.in1 = ReLUConvBN(channels_in[1], channels, affine=False)
        for edge, (_, source) in enumerate(space.edges):
            stride = 2 if reduction and source < 2 else 1
            self.add_module(f"edge{edge}", PlainEdge(space.ops, allowed[edge], channels, stride, K))

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        weights: Tensor,
        active: tuple[tuple[int, ...], ...],
        edges: Tensor | None,
        inputs: tuple[tuple[int, ...], ...] | None,
    ) -> Tensor:
        """Outputs of the two cells before -> nodes concatenated.

        `edges` are the betas by edge, `inputs` the sources that a node takes; None is 1, and all of them.
        """
        states = [self.in0(s0), self.in1(s1)]
        number = 0
        for node in range(2, 2 + self.nodes):
            outputs = []
            for source in range(node):
                if inputs is None or source in inputs[node - 2]:
                    y = self.get_submodule(f"edge{number}")(states[source], weights[number], active[number])
                    outputs.append(y if edges is None else edges[number] * y)
                number += 1
            states.append(sum(outputs[1:], outputs[0]))
        return torch.cat(states[2:], dim=1)


class PlainSupernet(nn.Module):
    """Supernet with the same cells, weights and gates as `like`, on the CIFAR stem, without its dropouts."""

    def __init__(self, like: CellSupernet, cells: int, channels: int, classes: int, channels_in: int) -> None:
        super().__init__()
        self.space, self.choices, self.config = like.space, like.choices, like.config
        self.noise = Noise()
        width = 3 * channels
        self.stem = cifar_stem(channels_in, width)
        before, last, after_reduction = width, width, False
        self.cells = cells
        for position in range(cells):
            reduction = position in reduction_cells(cells)
            channels = channels * 2 if reduction else channels
            cell = PlainCell(
                like.space,
                like.choices[f"{CELL_TYPES[reduction]}/op"].allowed,
                (before, last),
                channels,
                like.config.partial_channels,
                reduction=reduction,
                after_reduction=after_reduction,
            )
            self.add_module(f"cell{position}", cell)
            before, last, after_reduction = last, like.space.nodes * channels, reduction
        self.head = nn.Linear(last, classes)
        self.load(like)

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """Images (B, C, H, W) and gates -> logits (B, classes)."""
        s0 = s1 = self.stem(x)
        for number in range(self.cells):
            cell = self.get_submodule(f"cell{number}")
            assert isinstance(cell, PlainCell)
            gate, inputs = gates[f"{cell.cell_type}/op"], gates.get(f"{cell.cell_type}/input")
            edges = None
            if inputs is not None:
                rows = [inputs.weights[node - 2, source] for node, source in self.space.edges]
                edges = torch.stack(rows)
            taken = None if inputs is None else inputs.active
            s0, s1 = s1, cell(s0, s1, gate.weights, gate.active, edges, taken)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(s1, 1).flatten(1))
        return logits

    def edge_form(self) -> dict[str, Tensor]:
        """Weights and running statistics under the names of `nas.supernets.edge_form`."""
        found = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            path, kind = name.rsplit(".", 1)
            if kind == "num_batches_tracked":
                continue
            if path == "head":
                kind = {"weight": "w", "bias": "b"}[kind]
            elif path == "stem.bn":
                kind = {"weight": "scale", "bias": "shift"}.get(kind) or KINDS[kind]
            else:
                kind = KINDS[kind]
            found[f"{path}.{kind}"] = tensor
        return found

    def load(self, supernet: CellSupernet) -> None:
        """Take over the weights and running statistics of `supernet`."""
        values = edge_tensors(supernet)
        with torch.no_grad():
            for name, tensor in self.edge_form().items():
                tensor.copy_(values.pop(name))
        assert not values, f"weights without a place here: {sorted(values)}"


# --- steps as the public code takes them --------------------------------------------------------------------


def published_weight_step(state: SearchState, batch: Batch, clip: float) -> None:
    """A weight step in which the architecture's gradients are computed too, and thrown away."""
    images, labels = batch
    state.weight_optimizer.zero_grad()
    (gates,) = state.gates()
    torch.autograd.backward(F.cross_entropy(state.supernet(images, gates), labels))
    nn.utils.clip_grad_norm_(state.supernet.parameters(), clip)
    state.weight_optimizer.step()


def published_alpha_step(state: SearchState, batch: Batch) -> None:
    """A first-order architecture step in which the weights' gradients are computed too, and thrown away."""
    assert state.arch_optimizer is not None
    images, labels = batch
    state.arch_optimizer.zero_grad()
    (gates,) = state.gates()
    torch.autograd.backward(F.cross_entropy(state.supernet(images, gates), labels))
    state.arch_optimizer.step()
