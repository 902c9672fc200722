"""The cell supernet of DARTS, PC-DARTS, P-DARTS and GDAS, with the edges of a cell computed in batches.

Network -> cell -> fan-out. A `FanOut` holds all edges that leave some nodes at once, with every operation
on them: weights are stacked by edge, so that fourteen edges become four calls an operation. Nothing mixes
between edges before the sum over a node's inputs, hence the result is that of one module per edge and
operation; `tests/reference/cell_supernet.py` is that plain form, written as the equations read, and the
two are tested equal.

Sources: DARTS arXiv:1806.09055; partial channels and edge normalisation PC-DARTS arXiv:1907.05737; dropout
after skips P-DARTS arXiv:1904.12760; drop-path in the search RobustDARTS arXiv:1909.09656.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.execution import recomputed
from nas.gates import Gates
from nas.network import Stem, cifar_stem, imagenet_stems
from nas.ops import FactorizedReduce, ReLUConvBN, plus
from nas.spaces.cell import CELL_TYPES, CellSpace, CellType, reduction_cells
from nas.spaces.space import Choices
from nas.supernets.stacked import (
    CONV_OPS,
    StackedBatchNorm,
    StackedReduce,
    StackedSeparable,
    combine,
    concatenate,
    dense_gradient,
    index_tensors,
    is_channels_last,
    layout,
    repeat_sources,
    select,
    weighted,
)

POOLS = ("max_pool_3x3", "avg_pool_3x3")
SUPERNET_OPS = ("none", "noise", "skip_connect", *POOLS, *CONV_OPS)


@dataclass(frozen=True)
class CellSupernetConfig:
    """Settings of the cell supernet.

    The defaults are DARTS, and every knob's neutral value gives DARTS back exactly.
    """

    partial_channels: int = 1
    """K of PC-DARTS: operations see 1/K of the channels, the others bypass them."""
    edge_norm: bool = False
    """Whether each edge is weighted by beta, normalised over a node's inputs."""
    channel_mix: Literal["shuffle", "shift", "mask"] = "shuffle"
    """Which channels the next edge mixes.

    The public code's shuffle, a cyclic shift, or the paper's random mask, drawn for every edge and step.
    """

    def __post_init__(self) -> None:
        if self.partial_channels < 1:
            raise ValueError(f"partial_channels={self.partial_channels} must be at least 1")
        if self.channel_mix not in ("shuffle", "shift", "mask"):
            raise ValueError(f"channel_mix={self.channel_mix!r} is not one of shuffle, shift, mask")

    def gated(self, choices: dict[str, Choices]) -> dict[str, Choices]:
        """The tables of choices that this supernet relaxes: operations always, inputs with edge norm."""
        return {name: table for name, table in choices.items() if self.edge_norm or name.endswith("/op")}

    def check(self, space: CellSpace, channels: int) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: K does not divide the channels, or the space has an operation without a batched form.
        """
        k = self.partial_channels
        if channels % k:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f"partial_channels={k} does not divide channels={channels}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        missing = sorted(set(space.ops) - set(SUPERNET_OPS))
        if missing:
            raise ValueError(
                f"no supernet form of {', '.join(missing)}; "
                f"a searched space may hold {', '.join(SUPERNET_OPS)}"
            )

    def build(
        self,
        space: CellSpace,
        choices: dict[str, Choices],
        *,
        cells: int,
        channels: int,
        classes: int,
        channels_in: int = 3,
        stem: Stem = "cifar",
        checkpoint_cells: bool = False,
    ) -> "CellSupernet":
        """Supernet over `choices`, freshly initialised from PyTorch's default generator."""
        self.check(space, channels)
        return CellSupernet(
            self,
            space,
            choices,
            cells,
            channels,
            classes,
            channels_in,
            stem,
            checkpoint_cells=checkpoint_cells,
        )


# --- cell ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What is random inside a training-mode forward of the supernet, and the stream it is drawn from."""

    generator: torch.Generator | None = None
    skip_dropout: float = 0.0
    """P-DARTS: probability of zeroing an element after a stride-1 skip."""
    drop_path: float = 0.0
    """RobustDARTS: probability of zeroing an edge's output for a sample."""


@dataclass(frozen=True)
class FanOutPlan:
    """Which edges run which operation, as index tensors on the device.

    Made once for each pattern of active options.
    """

    shape: tuple[int, int]
    """Sources and targets."""
    table: Tensor
    """Rows of the fan-out's edges in the cell's tables of choices."""
    edges: dict[str, tuple[int, ...]]
    """Edges on which an operation runs, known to the host."""
    index: dict[str, Tensor]
    """The same on the device."""
    rows: dict[str, Tensor | None]
    """The same edges among those the operation exists on; None where these are all."""


class FanOut(nn.Module):
    """All edges from some source nodes to some target nodes, every source to every target, and all their ops.

    Edge `s * T + t` leads from source s to target t; `edge_rows` gives its row in the cell's
    tables of choices.
    """

    def __init__(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        space: CellSpace,
        allowed: Sequence[tuple[int, ...]],
        channels: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.sources, self.targets = tuple(sources), tuple(targets)
        self.edge_rows = [space.edges.index((target, source)) for source in sources for target in targets]
        self.ops, self.channels, self.stride = space.ops, channels, stride
        self.members = {
            op: tuple(edge for edge, row in enumerate(self.edge_rows) if option in allowed[row])
            for option, op in enumerate(space.ops)
        }
        """By operation, the edges it exists on."""
        self.weighted = nn.ModuleDict()
        self.pool_norms = nn.ModuleDict()
        for op, edges in self.members.items():
            if not edges:
                continue
            if op in CONV_OPS:
                self.weighted[op] = StackedSeparable(op, len(edges), channels, stride)
            elif op in POOLS:
                self.pool_norms[op] = StackedBatchNorm(len(edges), channels)
            elif op == "skip_connect" and stride == 2:
                self.weighted[op] = StackedReduce(len(edges), channels)

    def forward(self, x: Tensor, gate: Tensor, plan: FanOutPlan, keep: Tensor | None, noise: Noise) -> Tensor:
        """Sources (B, S*C, H, W) -> sums over the sources (B, T*C, H', W'), one for each target.

        `gate` (S*T, options) and `plan` are those of this fan-out's edges; `keep` (B, S*T) are the
        factors of drop-path.
        """
        sources, targets, edges = len(self.sources), len(self.targets), len(self.edge_rows)
        total = self._without_weights(x, gate, plan, keep, noise)
        rectified = F.relu(x) if any(plan.edges[op] for op in self.weighted) else x
        everywhere: Tensor | None = None
        for op, module in self.weighted.items():
            running = plan.edges[op]
            scale = gate[:, self.ops.index(op)]
            if len(running) == edges:
                y = module(rectified, sources, None, scale)
                everywhere = plus(everywhere, y)
            elif running:
                inputs = select(rectified, sources, [edge // targets for edge in running])
                y = module(inputs, len(running), plan.rows[op], scale[plan.index[op]])
                y = y if keep is None else weighted(y, keep[:, plan.index[op]])
                total = self._spread(y, running, total)
        if everywhere is not None:
            y = everywhere if keep is None else weighted(everywhere, keep)
            for part in y.chunk(sources, dim=1):
                total = plus(total, part)
        if total is None:
            size = [math.ceil(side / self.stride) for side in x.shape[-2:]]
            total = x.new_zeros(x.shape[0], targets * self.channels, *size)
        return total

    def _spread(self, y: Tensor, running: tuple[int, ...], total: Tensor | None) -> Tensor:
        """`total` plus the outputs (B, E*C, H', W') of the edges `running`, each at its target."""
        targets = len(self.targets)
        sums: list[Tensor | None] = [None] * targets
        if total is not None:
            sums = list(total.chunk(targets, dim=1))
        for part, edge in zip(y.chunk(len(running), dim=1), running, strict=True):
            sums[edge % targets] = plus(sums[edge % targets], part)
        nothing = y.new_zeros(()).expand(y.shape[0], self.channels, *y.shape[2:])
        return concatenate([nothing if part is None else part for part in sums])

    def plan(self, active: Sequence[tuple[int, ...]], device: torch.device) -> FanOutPlan:
        """What runs where, given the options that run on each edge."""
        edges = {
            op: tuple(edge for edge in members if option in active[edge])
            for option, (op, members) in enumerate(self.members.items())
        }
        lists: dict[str, Sequence[int]] = {"table": self.edge_rows}
        for op, running in edges.items():
            lists[f"{op}/edges"] = running
            lists[f"{op}/rows"] = [self.members[op].index(edge) for edge in running]
        moved = index_tensors(lists, device)
        return FanOutPlan(
            (len(self.sources), len(self.targets)),
            moved["table"],
            edges,
            {op: moved[f"{op}/edges"] for op in edges},
            {op: None if edges[op] == self.members[op] else moved[f"{op}/rows"] for op in edges},
        )

    def _without_weights(
        self, x: Tensor, gate: Tensor, plan: FanOutPlan, keep: Tensor | None, noise: Noise
    ) -> Tensor | None:
        """The part of operations without weights, None where none of them runs.

        Pools and identity skips are computed once per source and combined into the targets by one product.
        """
        sources, targets = len(self.sources), len(self.targets)
        dropping = self.training and noise.skip_dropout > 0
        pools: list[str] = []
        pool_weights: list[Tensor] = []
        total: Tensor | None = None

        def mixed(y: Tensor, weights: list[Tensor]) -> Tensor:
            mixing = torch.stack(weights).view(len(weights) * sources, targets).t()
            if keep is not None:
                factors = torch.unflatten(keep, 1, (sources, targets)).transpose(1, 2)
                mixing = mixing * factors.repeat(1, 1, len(weights))
            return combine(y, mixing)

        for option, op in enumerate(self.ops):
            if not plan.edges[op] or op in self.weighted or op == "none":
                continue
            whole = len(plan.edges[op]) == sources * targets
            weight = gate[:, option]
            if not whole:
                weight = torch.zeros_like(weight).index_copy(0, plan.index[op], weight[plan.index[op]])
            if op in POOLS and self.training:
                pools.append(op)
                pool_weights.append(weight)
            elif op == "skip_connect" and not dropping:
                total = plus(total, mixed(x, [weight]))
            else:
                y = weighted(self._per_edge(op, x, plan, noise), weight if keep is None else weight * keep)
                for part in y.chunk(sources, dim=1):
                    total = plus(total, part)
        if pools:
            total = plus(total, mixed(self._pooled(pools, x, plan), pool_weights))
        return total

    def _pooled(self, ops: list[str], x: Tensor, plan: FanOutPlan) -> Tensor:
        """Pools of the sources (B, len(ops)*S*C, H', W'), normalised with the batch's statistics.

        These enter the running ones of every edge that runs the pool.
        """
        y = concatenate([pool(op, x, self.stride) for op in ops])
        norms = [self.pool_norms[op] for op in ops]
        if not all(norm.track_running_stats for norm in norms):
            return F.batch_norm(y, None, None, training=True)
        mean, var = y.new_zeros(len(ops), len(self.sources), self.channels).repeat(2, 1, 1, 1)
        out = F.batch_norm(y, mean.view(-1), var.view(-1), training=True, momentum=1.0)
        for number, (op, norm) in enumerate(zip(ops, norms, strict=True)):
            assert isinstance(norm, StackedBatchNorm)
            source, rows = plan.index[op] // len(self.targets), plan.rows[op]
            for running, batch in ((norm.running_mean, mean[number]), (norm.running_var, var[number])):
                if rows is None:
                    running.lerp_(batch[source], 0.1)
                else:
                    running[rows] = running[rows].lerp(batch[source], 0.1)
        return out

    def _per_edge(self, op: str, x: Tensor, plan: FanOutPlan, noise: Noise) -> Tensor:
        """Output (B, S*T*C, H', W') of an operation without weights whose edges from one source differ."""
        sources, targets, edges = len(self.sources), len(self.targets), len(self.edge_rows)
        if op == "noise":
            size = [math.ceil(side / self.stride) for side in x.shape[-2:]]
            shape = (x.shape[0], edges, self.channels, *size)
            drawn = torch.randn(shape, generator=noise.generator, dtype=x.dtype, device=x.device)
            return drawn.flatten(1, 2)
        if op == "skip_connect":
            copies = repeat_sources(x, sources, targets)
            draws = torch.rand(
                (x.shape[0], edges, self.channels, *x.shape[2:]),
                generator=noise.generator,
                dtype=x.dtype,
                device=x.device,
            )
            return copies * (draws.flatten(1, 2) >= noise.skip_dropout) / (1 - noise.skip_dropout)
        # Evaluation: every edge's pool has running statistics of its own.
        norm = self.pool_norms[op]
        assert isinstance(norm, StackedBatchNorm)
        copies = repeat_sources(pool(op, x, self.stride), sources, targets)
        members = self.members[op]
        if len(members) == edges:
            out: Tensor = norm(copies)
            return out
        outputs = iter(norm(select(copies, edges, members)).chunk(len(members), dim=1))
        nothing = torch.zeros_like(copies[:, : self.channels])
        return concatenate([next(outputs) if edge in members else nothing for edge in range(edges)])


def pool(op: str, x: Tensor, stride: int) -> Tensor:
    """3x3 pooling without batch norm; the padding is not counted in the average."""
    if op == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, padding=1)
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


@dataclass(frozen=True)
class CellGates:
    """The gates of one cell type, arranged for its fan-outs.

    Made once per forward and used by every cell of the type.
    """

    ops: list[Tensor]
    """For every fan-out, effective weight (edges, options): operation times edge."""
    plans: list[FanOutPlan]
    edges: Sequence[Tensor | None]
    """For every fan-out, weight (S, T) of the edges themselves, which bypassed channels carry; None is 1."""


class SupernetCell(nn.Module):
    """One cell with all edges and operations."""

    def __init__(
        self,
        config: CellSupernetConfig,
        space: CellSpace,
        allowed: Sequence[tuple[int, ...]],
        channels_in: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.cell_type: CellType = "reduce" if reduction else "normal"
        self.nodes, self.channels, self.part = space.nodes, channels, channels // config.partial_channels
        self.stride = 2 if reduction else 1
        first = FactorizedReduce if after_reduction else ReLUConvBN
        self.in0 = first(channels_in[0], channels, affine=False)
        self.in1 = ReLUConvBN(channels_in[1], channels, affine=False)
        self.fans = nn.ModuleList(
            FanOut(sources, targets, space, allowed, self.part, self.stride if sources[0] < 2 else 1)
            for sources, targets in fan_outs(space.nodes, single=config.channel_mix == "mask")
        )

    def forward(self, s0: Tensor, s1: Tensor, gates: CellGates, noise: Noise) -> Tensor:
        """Outputs of the two cells before, rectified -> concatenated nodes (B, nodes*C, H', W')."""
        states = [dense_gradient(self.in0.after_relu(s0)), dense_gradient(self.in1.after_relu(s1))]
        mixed: dict[int, Tensor] = {}
        bypassed: dict[int, Tensor] = {}
        ready = 2
        for fan, ops, plan, edges in zip(self.fans, gates.ops, gates.plans, gates.edges, strict=True):
            assert isinstance(fan, FanOut)
            while len(states) <= max(fan.sources):
                states.append(self._node(mixed.pop(ready), bypassed.pop(ready, None)))
                ready += 1
            keep = self._drop_path(states[0], len(fan.edge_rows), noise)
            xs = [states[source] for source in fan.sources]
            rest: Tensor | None = None
            if self.config.channel_mix == "mask":
                outputs = self._masked(fan, xs[0], ops, plan, edges, keep, noise)
            elif self.part == self.channels:
                outputs = fan(concatenate(xs), ops, plan, keep, noise)
            else:
                sizes = [self.part, self.channels - self.part]
                parts = [torch.split(x, sizes, dim=1) for x in xs]
                outputs = fan(concatenate([part[0] for part in parts]), ops, plan, keep, noise)
                rest = self._bypass(fan, [part[1] for part in parts], edges, keep)
            for target, output in zip(fan.targets, outputs.chunk(len(fan.targets), dim=1), strict=True):
                mixed[target] = plus(mixed.get(target), output)
            if rest is not None:
                for target, output in zip(fan.targets, rest.chunk(len(fan.targets), dim=1), strict=True):
                    bypassed[target] = plus(bypassed.get(target), output)
        states += [self._node(mixed.pop(node), bypassed.pop(node, None)) for node in sorted(mixed)]
        return torch.cat(states[2:], dim=1)

    def _node(self, mixed: Tensor, bypassed: Tensor | None) -> Tensor:
        """Mixed slice (B, C/K, H, W) and bypassed channels -> the node, ordered as the next edge reads it."""
        if bypassed is None:
            return mixed
        if self.config.channel_mix == "shift":
            return torch.cat([bypassed, mixed], dim=1)
        # Channel shuffle with K groups: channel g C/K + r moves to r K + g.
        groups = [mixed, *bypassed.chunk(self.config.partial_channels - 1, dim=1)]
        if is_channels_last(groups[0]):
            pixels = [group.permute(0, 2, 3, 1) for group in groups]
            return torch.stack(pixels, dim=4).flatten(3).permute(0, 3, 1, 2)
        return torch.stack(groups, dim=2).flatten(1, 2)

    def _bypass(self, fan: FanOut, rest: list[Tensor], edges: Tensor | None, keep: Tensor | None) -> Tensor:
        """Bypassed channels of the sources -> their weighted sums (B, T*(C - C/K), H', W'), by target."""
        if fan.stride == 2:
            rest = [F.max_pool2d(x, 2, 2, ceil_mode=True) for x in rest]
        sources, targets = len(fan.sources), len(fan.targets)
        if edges is None and keep is None:
            return concatenate([sum(rest[1:], start=rest[0])] * targets)
        weight = rest[0].new_ones(sources, targets) if edges is None else edges
        if keep is not None:
            weight = weight * torch.unflatten(keep, 1, (sources, targets))
        return combine(concatenate(rest), weight.transpose(-2, -1))

    def _masked(
        self,
        fan: FanOut,
        x: Tensor,
        ops: Tensor,
        plan: FanOutPlan,
        edges: Tensor | None,
        keep: Tensor | None,
        noise: Noise,
    ) -> Tensor:
        """One edge under the paper's mask: a random 1/K of the channels is mixed and put back in place."""
        order = torch.arange(self.channels, device=x.device)
        if self.training and self.part < self.channels:
            order = torch.randperm(self.channels, generator=noise.generator, device=x.device)
        chosen, rest = torch.split(order, [self.part, self.channels - self.part])
        out: Tensor = fan(x[:, chosen], ops, plan, keep, noise)
        if len(rest):
            out = torch.cat([out, self._bypass(fan, [x[:, rest]], edges, keep)], dim=1)
        return out[:, order.argsort()]

    def _drop_path(self, like: Tensor, edges: int, noise: Noise) -> Tensor | None:
        if not self.training or noise.drop_path == 0:
            return None
        draws = torch.rand(
            like.shape[0], edges, generator=noise.generator, dtype=like.dtype, device=like.device
        )
        return (draws >= noise.drop_path) / (1 - noise.drop_path)


def fan_outs(nodes: int, *, single: bool = False) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(sources, targets) of a cell's fan-outs: both inputs together, then node by node.

    With `single` they are taken apart edge by edge.
    """
    last = nodes + 2
    fans: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0, 1), tuple(range(2, last)))]
    fans += [((node,), tuple(range(node + 1, last))) for node in range(2, last - 1)]
    if single:
        return [
            ((source,), (target,)) for sources, targets in fans for source in sources for target in targets
        ]
    return fans


# --- network ------------------------------------------------------------------------------------------------


class CellSupernet(nn.Module):
    """Supernet of stacked cells; holds weights only, the architecture comes in with the gates.

    Batch norms inside cells have no affine parameters, the stem's have; reduction cells sit at a third and
    two thirds, and double the width. `checkpoint_cells` keeps only the inputs of cells for the backward pass,
    which computes the rest again. Build it with `CellSupernetConfig.build`.
    """

    _edge_index: Tensor

    def __init__(
        self,
        config: CellSupernetConfig,
        space: CellSpace,
        choices: dict[str, Choices],
        cells: int,
        channels: int,
        classes: int,
        channels_in: int,
        stem: Stem,
        *,
        checkpoint_cells: bool,
    ) -> None:
        super().__init__()
        self.config, self.space, self.choices = config, space, choices
        self.checkpoint_cells = checkpoint_cells
        self.noise = Noise()
        """Set by the search loop before each epoch."""
        width = 3 * channels
        self.stem0: nn.Module
        self.stem1: nn.Module | None = None
        if stem == "cifar":
            self.stem0 = cifar_stem(channels_in, width)
        else:
            self.stem0, self.stem1 = imagenet_stems(channels_in, width)
        before, last = width, width
        reductions, after_reduction = reduction_cells(cells), stem == "imagenet"
        self.cells = nn.ModuleList()
        for position in range(cells):
            reduction = position in reductions
            channels = channels * 2 if reduction else channels
            allowed = choices[f"{CELL_TYPES[reduction]}/op"].allowed
            cell = SupernetCell(
                config,
                space,
                allowed,
                (before, last),
                channels,
                reduction=reduction,
                after_reduction=after_reduction,
            )
            self.cells.append(cell)
            before, last = last, space.nodes * channels
            after_reduction = reduction
        self.head = nn.Linear(last, classes)
        columns = space.nodes + 1
        index = [(node - 2) * columns + source for node, source in space.edges]
        self.register_buffer("_edge_index", torch.tensor(index), persistent=False)
        self._held_plans: dict[object, list[FanOutPlan]] = {}

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """Images (B, C, H, W) and gates -> logits (B, classes)."""
        arranged: dict[str, CellGates] = {cell: self._arrange(gates, cell) for cell in CELL_TYPES}
        # All that read a cell's output rectify it first, but for the head; hence it is done once, here.
        laid = layout(x.device)
        s0 = s1 = F.relu(self.stem0(x.contiguous(memory_format=laid)).contiguous(memory_format=laid))
        if self.stem1 is not None:
            s1 = F.relu(self.stem1(s0))
        out = s1
        for position, cell in enumerate(self.cells):
            assert isinstance(cell, SupernetCell)
            if position:
                s0, s1 = s1, F.relu(out)
            inputs = (s0, s1, arranged[cell.cell_type], self.noise)
            if self.checkpoint_cells:
                out = recomputed(cell, *inputs, generator=self.noise.generator)
            else:
                out = cell(*inputs)
        logits: Tensor = self.head(dense_gradient(out).mean(dim=(2, 3)))
        return logits

    def _arrange(self, gates: Gates, cell: CellType) -> CellGates:
        op_gate, input_gate = gates[f"{cell}/op"], gates.get(f"{cell}/input")
        weights, active = op_gate.weights, op_gate.active
        edge_weights: Tensor | None = None
        if input_gate is not None:
            edge_weights = input_gate.weights.flatten().index_select(0, self._edge_index)
            kept = [source in input_gate.active[node - 2] for node, source in self.space.edges]
            if not all(kept):  # bypassed channels of an edge that does not run are nothing either
                edge_weights = edge_weights * edge_weights.new_tensor(kept)
            weights = weights * edge_weights[:, None]
            active = tuple(ops if keep else () for ops, keep in zip(active, kept, strict=True))
        plans = self._plans(cell, active, weights.device)
        ops = [weights.index_select(0, plan.table) for plan in plans]
        if edge_weights is None:
            return CellGates(ops, plans, [None] * len(plans))
        edges = [edge_weights.index_select(0, plan.table).view(plan.shape) for plan in plans]
        return CellGates(ops, plans, edges)

    def _plans(
        self, cell_type: CellType, active: tuple[tuple[int, ...], ...], device: torch.device
    ) -> list[FanOutPlan]:
        """Plans of the fan-outs of `cell_type`, alike in all its cells."""
        key = (cell_type, active, device)
        if key not in self._held_plans:
            if len(self._held_plans) >= 8:  # sampled gates: patterns hardly ever repeat
                self._held_plans.clear()
            cells = [cell for cell in self.cells if isinstance(cell, SupernetCell)]
            like = next((cell for cell in cells if cell.cell_type == cell_type), None)
            fans = [fan for fan in like.fans if isinstance(fan, FanOut)] if like else []
            plans = [fan.plan([active[row] for row in fan.edge_rows], device) for fan in fans]
            self._held_plans[key] = plans
        return self._held_plans[key]
