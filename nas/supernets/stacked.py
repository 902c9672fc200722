"""Operations stacked by edge: each on many edges in one call, and tensors as these calls want them.

Activations of several edges or sources lie side by side in the channels of one tensor (B, E*C, H, W), weights
in one tensor [edge, ...]. On a CPU activations are channels-last in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.ops import pad_to_even

FOLD_MAX_CHANNELS = 16
"""Up to this width a depthwise and the pointwise convolution after it run as one dense kernel.

More arithmetic, but less traffic and memory. Measured on a CPU only: `python -m benchmarks.step --fold`.
"""

CONV_OPS = {
    "sep_conv_3x3": (3, 1),
    "sep_conv_5x5": (5, 1),
    "sep_conv_7x7": (7, 1),
    "dil_conv_3x3": (3, 2),
    "dil_conv_5x5": (5, 2),
}
"""(kernel, dilation) of the separable operations; those without dilation are applied twice."""


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
        targets = edges // sources
        if self.stride == self.dilation == 1:
            x = repeat_sources(x, sources, targets)
            y = F.conv2d(x, dw.reshape(-1, 1, *dw.shape[2:]), padding=self.padding, groups=edges * channels)
        else:  # these are slow on many channels: one source channel makes those of all its edges
            kernel = torch.unflatten(dw, 0, (sources, targets)).transpose(1, 2)
            kernel = kernel.reshape(-1, 1, *dw.shape[2:])
            y = F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation, groups=sources * channels)
            y = by_edge(y, sources, channels)
        return F.conv2d(y, pw.reshape(-1, channels, 1, 1), groups=edges)


def repeat_sources(x: Tensor, sources: int, times: int) -> Tensor:
    """(B, S*C, H, W) -> (B, S*times*C, H, W): every source once per edge that leaves it."""
    return concatenate([source for source in x.chunk(sources, dim=1) for _ in range(times)])


def by_edge(x: Tensor, sources: int, channels: int) -> Tensor:
    """(B, S*C*T, H, W) -> (B, S*T*C, H, W): the channels of an edge side by side."""
    if is_channels_last(x):
        pixels = torch.unflatten(x.permute(0, 2, 3, 1), 3, (sources, channels, -1))
        return pixels.transpose(4, 5).flatten(3).permute(0, 3, 1, 2)
    return torch.unflatten(x, 1, (sources, channels, -1)).transpose(2, 3).flatten(1, 3)


def select(x: Tensor, groups: int, index: Sequence[int]) -> Tensor:
    """(B, G*C, H, W) -> (B, len(index)*C, H, W): the groups of channels that `index` names."""
    parts = x.chunk(groups, dim=1)
    return concatenate([parts[i] for i in index])


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    """(B, G*C, H, W) with group g scaled by `weight` (G,), or by `weight` (B, G) sample by sample."""
    factors = weight.repeat_interleave(x.shape[1] // weight.shape[-1], dim=-1)
    return x * factors[..., None, None]


def combine(x: Tensor, mixing: Tensor) -> Tensor:
    """(B, n*C, H, W) -> (B, T*C, H, W): T weighted sums over groups, by `mixing` (T, n) or (B, T, n)."""
    targets, groups = mixing.shape[-2:]
    channels = x.shape[1] // groups
    if is_channels_last(x) and mixing.dim() == 2:
        # A matrix product over the groups would have to bring them outside the pixels first.
        eye = torch.eye(channels, dtype=x.dtype, device=x.device)
        kernel = (mixing[:, None, :, None] * eye[:, None]).reshape(targets * channels, -1, 1, 1)
        return F.conv2d(x, kernel)
    sums = torch.matmul(mixing, torch.unflatten(x, 1, (groups, channels)).flatten(2))
    return sums.view(x.shape[0], targets * channels, *x.shape[2:])


def layout(device: torch.device) -> torch.memory_format:
    """How activations lie in memory: with neighbouring channels on a CPU, whose convolutions like it so."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=layout(gradient.device))


def dense_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient comes without gaps: with some, as slices have, batch norm is slow backward."""
    out: Tensor = _DenseGradient.apply(x)
    return out


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbours in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1


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


def concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenation over channels that copies nothing when there is one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def index_tensors(lists: dict[str, Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Lists of integers as tensors on `device`, in one copy for which the host does not wait."""
    flat = torch.tensor([value for values in lists.values() for value in values], dtype=torch.int64)
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [len(values) for values in lists.values()])
    return dict(zip(lists, parts, strict=True))
