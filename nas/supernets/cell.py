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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.gates import Gates
from nas.network import Stem, cifar_stem, imagenet_stems
from nas.ops import FactorizedReduce, ReLUConvBN, pad_to_even
from nas.spaces.cell import CELL_TYPES, CellSpace, CellType, reduction_cells
from nas.spaces.space import Choices

FOLD_MAX_CHANNELS = 16
"""Up to this width a depthwise and the pointwise convolution after it run as one dense kernel.

That is more arithmetic, but less traffic.
"""

CONV_OPS = {
    "sep_conv_3x3": (3, 1),
    "sep_conv_5x5": (5, 1),
    "sep_conv_7x7": (7, 1),
    "dil_conv_3x3": (3, 2),
    "dil_conv_5x5": (5, 2),
}
"""(kernel, dilation) of the separable operations; those without dilation are applied twice."""
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
    ) -> "CellSupernet":
        """Supernet over `choices`, freshly initialised from PyTorch's default generator."""
        self.check(space, channels)
        return CellSupernet(self, space, choices, cells, channels, classes, channels_in, stem)


# --- operations stacked by edge -----------------------------------------------------------------------------


class StackedBatchNorm(nn.Module):
    """Batch norm without affine parameters of E edges at once, on (B, E*C, H, W); callers give its scale.

    The weight of an operation in its edge's sum is that scale, which saves a product and the
    memory it would hold.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, edges: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(edges, channels))
        self.register_buffer("running_var", torch.ones(edges, channels))
        self.track_running_stats = True

    def forward(self, x: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """(B, E'*C, H, W) of the edges `rows` (None: all), normalised and scaled by `scale` (E',)."""
        channels = self.running_mean.shape[1]
        # Contiguous for one edge too: PyTorch's CPU batch norm misreads an expanded scale in the backward
        # pass of 1x1 maps.
        gamma = None if scale is None else scale.repeat_interleave(channels)
        if self.training and not self.track_running_stats:
            return F.batch_norm(x, None, None, gamma, training=True)
        if rows is None:
            mean, var = self.running_mean.view(-1), self.running_var.view(-1)
            return F.batch_norm(x, mean, var, gamma, training=self.training)
        mean, var = self.running_mean[rows].view(-1), self.running_var[rows].view(-1)
        out = F.batch_norm(x, mean, var, gamma, training=self.training)
        if self.training:
            self.running_mean[rows] = mean.view(-1, channels)
            self.running_var[rows] = var.view(-1, channels)
        return out


class StackedConv(nn.Module):
    """Depthwise then pointwise convolution on E edges at once, which read S sources or each its own input."""

    def __init__(self, edges: int, channels: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.dw = nn.Parameter(torch.empty(edges, channels, kernel, kernel))
        self.pw = nn.Parameter(torch.empty(edges, channels, channels))
        # nn.Conv2d's default: uniform within 1 / sqrt(fan in), and a depthwise kernel's fan-in is its window.
        nn.init.uniform_(self.dw, -1 / kernel, 1 / kernel)
        nn.init.uniform_(self.pw, -1 / math.sqrt(channels), 1 / math.sqrt(channels))
        self.stride = stride
        self.dilation = dilation
        self.padding = dilation * (kernel // 2)

    def forward(self, x: Tensor, sources: int, rows: Tensor | None = None) -> Tensor:
        """(B, S*C, H, W) -> (B, E'*C, H', W'), edges sorted by source and equally many on each.

        The edges are `rows` (None: all); `sources` S is at most their number, and equal to it if
        each has its own input.
        """
        dw, pw = (self.dw, self.pw) if rows is None else (self.dw[rows], self.pw[rows])
        edges, channels = dw.shape[:2]
        if channels <= FOLD_MAX_CHANNELS:
            dense = (pw[..., None, None] * dw[:, None]).flatten(0, 1)
            return F.conv2d(x, dense, None, self.stride, self.padding, self.dilation, groups=sources)
        if sources != edges:
            x = repeat_sources(x, sources, edges // sources)
        kernel, groups = dw.reshape(-1, 1, *dw.shape[2:]), edges * channels
        depthwise = F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation, groups=groups)
        return F.conv2d(depthwise, pw.reshape(-1, channels, 1, 1), groups=edges)


def repeat_sources(x: Tensor, sources: int, times: int) -> Tensor:
    """(B, S*C, H, W) -> (B, S*times*C, H, W): every source once per edge that leaves it."""
    split = torch.unflatten(x, 1, (sources, 1, -1))
    return split.expand(-1, -1, times, -1, -1, -1).flatten(1, 3)


class StackedSeparable(nn.Module):
    """A sep_conv or dil_conv on E edges: [ReLU, depthwise, pointwise, batch norm] once or twice."""

    def __init__(self, name: str, edges: int, channels: int, stride: int) -> None:
        super().__init__()
        kernel, dilation = CONV_OPS[name]
        self.conv1 = StackedConv(edges, channels, kernel, stride, dilation)
        self.bn1 = StackedBatchNorm(edges, channels)
        self.twice = dilation == 1
        if self.twice:
            self.conv2 = StackedConv(edges, channels, kernel, 1, dilation)
            self.bn2 = StackedBatchNorm(edges, channels)

    def forward(self, rectified: Tensor, sources: int, rows: Tensor | None, scale: Tensor) -> Tensor:
        """Rectified sources (B, S*C, H, W) -> (B, E'*C, H', W'), each edge scaled by `scale` (E',)."""
        x = self.conv1(rectified, sources, rows)
        if not self.twice:
            out: Tensor = self.bn1(x, rows, scale)
            return out
        x = self.conv2(F.relu(self.bn1(x, rows)), len(scale), rows)
        out = self.bn2(x, rows, scale)
        return out


class StackedReduce(nn.Module):
    """The stride-2 skip on E edges: FactorizedReduce as one 2x2 convolution with one pixel in each kernel."""

    def __init__(self, edges: int, channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Parameter(torch.empty(edges, channels // 2, channels))
        self.conv_b = nn.Parameter(torch.empty(edges, channels // 2, channels))
        for weight in (self.conv_a, self.conv_b):
            nn.init.uniform_(weight, -1 / math.sqrt(channels), 1 / math.sqrt(channels))
        self.bn = StackedBatchNorm(edges, channels)

    def forward(self, rectified: Tensor, sources: int, rows: Tensor | None, scale: Tensor) -> Tensor:
        """Rectified sources (B, S*C, H, W) -> (B, E'*C, H/2, W/2), each edge scaled by `scale` (E',)."""
        a, b = (self.conv_a, self.conv_b) if rows is None else (self.conv_a[rows], self.conv_b[rows])
        kernel = torch.cat(
            [F.pad(a[..., None, None], (0, 1, 0, 1)), F.pad(b[..., None, None], (1, 0, 1, 0))], dim=1
        )
        x = F.conv2d(pad_to_even(rectified), kernel.flatten(0, 1), stride=2, groups=sources)
        out: Tensor = self.bn(x, rows, scale)
        return out


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

    edges: dict[str, tuple[int, ...]]
    index: dict[str, Tensor]
    """Edges of an operation that runs on some edges only."""
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
        self._plans: dict[tuple[tuple[int, ...], ...], FanOutPlan] = {}

    def forward(
        self, x: Tensor, gate: Tensor, active: tuple[tuple[int, ...], ...], keep: Tensor | None, noise: Noise
    ) -> Tensor:
        """Sources (B, S*C, H, W) -> sums over the sources (B, T, C, H', W'), one for each target.

        `gate` (S*T, options) and `active` are those of this fan-out's edges; `keep` (B, S*T) are the
        factors of drop-path.
        """
        plan = self._plan(active, x.device)
        sources, targets, edges = len(self.sources), len(self.targets), len(self.edge_rows)
        total = self._without_weights(x, gate, plan, keep, noise)
        rectified = F.relu(x) if any(plan.edges[op] for op in self.weighted) else x
        everywhere: Tensor | None = None
        for op, module in self.weighted.items():
            scale = gate[:, self.ops.index(op)]
            if len(plan.edges[op]) == edges:
                y = module(rectified, sources, None, scale)
                everywhere = y if everywhere is None else everywhere + y
            elif plan.edges[op]:
                index = plan.index[op]
                inputs = torch.unflatten(rectified, 1, (sources, -1))[:, index // targets].flatten(1, 2)
                y = module(inputs, len(index), plan.rows[op], scale[index])
                y = torch.unflatten(y, 1, (len(index), -1))
                if keep is not None:
                    y = y * keep[:, index, None, None, None]
                if total is None:
                    total = y.new_zeros(y.shape[0], targets, *y.shape[2:])
                total = total.index_add(1, index % targets, y)
        if everywhere is not None:
            y = torch.unflatten(everywhere, 1, (edges, -1))
            if keep is not None:
                y = y * keep[:, :, None, None, None]
            for part in y.chunk(sources, dim=1):
                total = part if total is None else total + part
        if total is None:
            size = [math.ceil(side / self.stride) for side in x.shape[-2:]]
            total = x.new_zeros(x.shape[0], targets, self.channels, *size)
        return total

    def _plan(self, active: tuple[tuple[int, ...], ...], device: torch.device) -> FanOutPlan:
        if active not in self._plans:
            if len(self._plans) >= 8:  # sampled gates: patterns hardly ever repeat
                self._plans.clear()
            edges = {
                op: tuple(edge for edge in members if option in active[edge])
                for option, (op, members) in enumerate(self.members.items())
            }
            rows: dict[str, Tensor | None] = {}
            for op, running in edges.items():
                members = self.members[op]
                whole = running == members
                rows[op] = None if whole else torch.tensor([members.index(e) for e in running], device=device)
            index = {op: torch.tensor(running, device=device) for op, running in edges.items()}
            self._plans[active] = FanOutPlan(edges, index, rows)
        return self._plans[active]

    def _without_weights(
        self, x: Tensor, gate: Tensor, plan: FanOutPlan, keep: Tensor | None, noise: Noise
    ) -> Tensor | None:
        """The part of operations without weights, None where none of them runs.

        Pools and identity skips are computed once per source and combined into the targets by one product.
        """
        sources, targets = len(self.sources), len(self.targets)
        dropping = self.training and noise.skip_dropout > 0
        terms: list[Tensor] = []
        coefficients: list[Tensor] = []
        extra: Tensor | None = None
        for option, op in enumerate(self.ops):
            if not plan.edges[op] or op in self.weighted or op == "none":
                continue
            whole = len(plan.edges[op]) == sources * targets
            weight = gate[:, option]
            if not whole:
                weight = torch.zeros_like(weight).index_copy(0, plan.index[op], weight[plan.index[op]])
            if op in POOLS and self.training:
                terms.append(self._pool(op, x, plan))
                coefficients.append(weight)
            elif op == "skip_connect" and not dropping:
                terms.append(x)
                coefficients.append(weight)
            else:
                y = self._per_edge(op, x, plan, noise) * weight[:, None, None, None]
                if keep is not None:
                    y = y * keep[:, :, None, None, None]
                y = torch.unflatten(y, 1, (sources, targets)).sum(1)
                extra = y if extra is None else extra + y
        if not terms:
            return extra
        stacked = torch.unflatten(torch.cat(terms, dim=1), 1, (len(terms) * sources, -1)).flatten(2)
        mixing = torch.stack(coefficients).view(len(terms) * sources, targets).t()
        if keep is not None:
            factors = torch.unflatten(keep, 1, (sources, targets)).transpose(1, 2)
            mixing = mixing * factors.repeat(1, 1, len(terms))
        total = torch.unflatten(torch.matmul(mixing, stacked), 2, (self.channels, *terms[0].shape[2:]))
        return total if extra is None else total + extra

    def _pool(self, op: str, x: Tensor, plan: FanOutPlan) -> Tensor:
        """Pool and batch norm of the sources with the batch's statistics.

        These enter the running ones of every edge that runs `op`.
        """
        norm = self.pool_norms[op]
        assert isinstance(norm, StackedBatchNorm)
        y = pool(op, x, self.stride)
        if not norm.track_running_stats:
            return F.batch_norm(y, None, None, training=True)
        mean, var = x.new_zeros(y.shape[1]), x.new_zeros(y.shape[1])
        out = F.batch_norm(y, mean, var, training=True, momentum=1.0)
        source = plan.index[op] // len(self.targets)
        for running, batch in ((norm.running_mean, mean), (norm.running_var, var)):
            new = batch.view(len(self.sources), -1)[source]
            rows = plan.rows[op]
            if rows is None:
                running.lerp_(new, 0.1)
            else:
                running[rows] = running[rows].lerp(new, 0.1)
        return out

    def _per_edge(self, op: str, x: Tensor, plan: FanOutPlan, noise: Noise) -> Tensor:
        """Output (B, S*T, C, H', W') of an operation without weights whose edges from one source differ."""
        edges = len(self.edge_rows)
        if op == "noise":
            size = [math.ceil(side / self.stride) for side in x.shape[-2:]]
            shape = (x.shape[0], edges, self.channels, *size)
            return torch.randn(shape, generator=noise.generator, dtype=x.dtype, device=x.device)
        if op == "skip_connect":
            copies = repeat_sources(x, len(self.sources), len(self.targets))
            copies = torch.unflatten(copies, 1, (edges, -1))
            draws = torch.rand(copies.shape, generator=noise.generator, dtype=x.dtype, device=x.device)
            return copies * (draws >= noise.skip_dropout) / (1 - noise.skip_dropout)
        # Evaluation: every edge's pool has running statistics of its own.
        norm = self.pool_norms[op]
        assert isinstance(norm, StackedBatchNorm)
        copies = repeat_sources(pool(op, x, self.stride), len(self.sources), len(self.targets))
        copies = torch.unflatten(copies, 1, (edges, -1))
        members = torch.tensor(self.members[op], device=x.device)
        y = torch.unflatten(norm(copies[:, members].flatten(1, 2)), 1, (len(members), -1))
        return torch.zeros_like(copies).index_copy(1, members, y)


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
    active: list[tuple[tuple[int, ...], ...]]
    edges: list[Tensor | None]
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
        """Outputs of the two cells before -> concatenated nodes (B, nodes*C, H', W')."""
        states = [self.in0(s0), self.in1(s1)]
        mixed: dict[int, Tensor] = {}
        bypassed: dict[int, Tensor] = {}
        ready = 2
        for fan, ops, active, edges in zip(self.fans, gates.ops, gates.active, gates.edges, strict=True):
            assert isinstance(fan, FanOut)
            while len(states) <= max(fan.sources):
                states.append(self._node(mixed.pop(ready), bypassed.pop(ready, None)))
                ready += 1
            keep = self._drop_path(states[0], len(fan.edge_rows), noise)
            xs = [states[source] for source in fan.sources]
            rest: Tensor | None = None
            if self.config.channel_mix == "mask":
                outputs = self._masked(fan, xs[0], ops, active, edges, keep, noise)
            elif self.part == self.channels:
                outputs = fan(concatenate(xs), ops, active, keep, noise)
            else:
                sizes = [self.part, self.channels - self.part]
                parts = [torch.split(x, sizes, dim=1) for x in xs]
                outputs = fan(concatenate([part[0] for part in parts]), ops, active, keep, noise)
                rest = self._bypass(fan, [part[1] for part in parts], edges, keep)
            for index, target in enumerate(fan.targets):
                accumulate(mixed, target, outputs[:, index])
                if rest is not None:
                    accumulate(bypassed, target, rest[:, index])
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
        return torch.stack(groups, dim=2).flatten(1, 2)

    def _bypass(self, fan: FanOut, rest: list[Tensor], edges: Tensor | None, keep: Tensor | None) -> Tensor:
        """Bypassed channels of the sources -> their weighted sums (B, T, C - C/K, H', W') for each target."""
        if fan.stride == 2:
            rest = [F.max_pool2d(x, 2, 2, ceil_mode=True) for x in rest]
        sources, targets = len(fan.sources), len(fan.targets)
        if edges is None and keep is None:
            return sum_of(rest)[:, None].expand(-1, targets, -1, -1, -1)
        weight = rest[0].new_ones(sources, targets) if edges is None else edges
        if keep is not None:
            weight = weight * torch.unflatten(keep, 1, (sources, targets))
        stacked = torch.stack(rest, dim=1)
        sums = torch.matmul(weight.transpose(-2, -1), stacked.flatten(2))
        return torch.unflatten(sums, 2, stacked.shape[2:])

    def _masked(
        self,
        fan: FanOut,
        x: Tensor,
        ops: Tensor,
        active: tuple[tuple[int, ...], ...],
        edges: Tensor | None,
        keep: Tensor | None,
        noise: Noise,
    ) -> Tensor:
        """One edge under the paper's mask: a random 1/K of the channels is mixed and put back in place."""
        order = torch.arange(self.channels, device=x.device)
        if self.training and self.part < self.channels:
            order = torch.randperm(self.channels, generator=noise.generator, device=x.device)
        chosen, rest = torch.split(order, [self.part, self.channels - self.part])
        out: Tensor = fan(x[:, chosen], ops, active, keep, noise)
        if len(rest):
            out = torch.cat([out, self._bypass(fan, [x[:, rest]], edges, keep)], dim=2)
        return out[:, :, order.argsort()]

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


def concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenation over channels that copies nothing when there is one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Sum of one tensor or more."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def accumulate(sums: dict[int, Tensor], key: int, value: Tensor) -> None:
    """Add `value` to the running sum of `key`."""
    sums[key] = sums[key] + value if key in sums else value


# --- network ------------------------------------------------------------------------------------------------


class CellSupernet(nn.Module):
    """Supernet of stacked cells; holds weights only, the architecture comes in with the gates.

    Batch norms inside cells have no affine parameters, the stem's have; reduction cells sit at a third and
    two thirds, and double the width. Build it with `CellSupernetConfig.build`.
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
    ) -> None:
        super().__init__()
        self.config, self.space, self.choices = config, space, choices
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
        for number, (sources, targets) in enumerate(
            fan_outs(space.nodes, single=config.channel_mix == "mask")
        ):
            rows = [space.edges.index((target, source)) for source in sources for target in targets]
            self.register_buffer(f"_fan_rows_{number}", torch.tensor(rows), persistent=False)

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """Images (B, C, H, W) and gates -> logits (B, classes)."""
        arranged: dict[str, CellGates] = {cell: self._arrange(gates, cell) for cell in CELL_TYPES}
        s0 = self.stem0(x)
        s1 = s0 if self.stem1 is None else self.stem1(s0)
        for cell in self.cells:
            assert isinstance(cell, SupernetCell)
            s0, s1 = s1, cell(s0, s1, arranged[cell.cell_type], self.noise)
        logits: Tensor = self.head(s1.mean(dim=(2, 3)))
        return logits

    def _arrange(self, gates: Gates, cell: CellType) -> CellGates:
        op_gate, input_gate = gates[f"{cell}/op"], gates.get(f"{cell}/input")
        weights, active = op_gate.weights, op_gate.active
        edge_weights: Tensor | None = None
        if input_gate is not None:
            edge_weights = input_gate.weights.flatten()[self._edge_index]
            kept = [source in input_gate.active[node - 2] for node, source in self.space.edges]
            if not all(kept):  # bypassed channels of an edge that does not run are nothing either
                edge_weights = edge_weights * edge_weights.new_tensor(kept)
            weights = weights * edge_weights[:, None]
            active = tuple(ops if keep else () for ops, keep in zip(active, kept, strict=True))
        result = CellGates([], [], [])
        for number, (sources, targets) in enumerate(
            fan_outs(self.space.nodes, single=self.config.channel_mix == "mask")
        ):
            rows = getattr(self, f"_fan_rows_{number}")
            result.ops.append(weights[rows])
            result.active.append(
                tuple(active[self.space.edges.index((t, s))] for s in sources for t in targets)
            )
            edges = None if edge_weights is None else edge_weights[rows].view(len(sources), len(targets))
            result.edges.append(edges)
        return result

    @contextmanager
    def without_statistics(self) -> Iterator[None]:
        """Context in which training-mode forwards leave the running statistics of batch norm alone."""
        norms = [m for m in self.modules() if isinstance(m, StackedBatchNorm | nn.BatchNorm2d)]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True
