"""Candidate operations by name, as modules on (B, C, H, W): what a derived network is built of.

Compositions are those of DARTS (arXiv:1806.09055) and its public code; ReLU first and not in place, since
several operations read the same tensor. A supernet batches the same operations over edges
(`nas.supernets.cell`); the two are tested equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReLUFirst(nn.Sequential):
    """A ReLU, then these layers.

    Where several such read one tensor, its reader rectifies it once and calls `after_relu` of each.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.after_relu(F.relu(x))

    def after_relu(self, rectified: Tensor) -> Tensor:
        """Rectified (B, C, H, W) -> (B, C', H', W')."""
        for layer in self:
            rectified = layer(rectified)
        return rectified


class ReLUConvBN(ReLUFirst):
    """ReLU, 1x1 convolution, batch norm: how a cell brings its inputs to its own width."""

    def __init__(self, channels_in: int, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels, affine=affine)


def plus(total: Tensor | None, y: Tensor, keep: Tensor | None = None) -> Tensor:
    """`total + keep * y` in one pass; None stands for a sum without terms yet, and for a factor of 1."""
    if keep is None:
        return y if total is None else total + y
    return y * keep if total is None else torch.addcmul(total, y, keep)


def pad_to_even(x: Tensor) -> Tensor:
    """`x` with a row or column of zeros at the bottom and right where a side is odd."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x


class FactorizedReduce(ReLUFirst):
    """Halves the resolution without dropping a pixel: two strided 1x1 convolutions, one shifted by a pixel.

    Raises:
        ValueError: the number of output channels is odd.
    """

    def __init__(self, channels_in: int, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(
                f"FactorizedReduce to {channels} channels: each half takes one of two, use an even number"
            )
        self.conv_a = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.conv_b = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels, affine=affine)

    def after_relu(self, rectified: Tensor) -> Tensor:
        """Rectified (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""
        x = pad_to_even(rectified)
        out: Tensor = self.bn(torch.cat([self.conv_a(x), self.conv_b(x[:, :, 1:, 1:])], dim=1))
        return out


class SepConv(ReLUFirst):
    """Depthwise-separable convolution, applied twice; only the first one strides."""

    def __init__(self, channels: int, kernel: int, stride: int, *, affine: bool) -> None:
        super().__init__()
        for i, step in enumerate((stride, 1), start=1):
            depthwise = nn.Conv2d(
                channels, channels, kernel, step, padding=kernel // 2, groups=channels, bias=False
            )
            if i == 2:
                self.relu = nn.ReLU(inplace=True)  # nothing else reads the first half
            self.add_module(f"dw{i}", depthwise)
            self.add_module(f"pw{i}", nn.Conv2d(channels, channels, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels, affine=affine))


class DilConv(ReLUFirst):
    """Depthwise-separable convolution with dilation 2."""

    def __init__(self, channels: int, kernel: int, stride: int, *, affine: bool) -> None:
        super().__init__()
        self.dw = nn.Conv2d(
            channels, channels, kernel, stride, padding=kernel - 1, dilation=2, groups=channels, bias=False
        )
        self.pw = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels, affine=affine)


class RectConv(ReLUFirst):
    """A 1xk then a kx1 convolution.

    AmoebaNet's 7x1 has full convolutions; the one of the fixed reduction cell of GDAS is grouped (`groups`)
    and has a pointwise convolution after it (`then_pointwise`).
    """

    def __init__(
        self, channels: int, kernel: int, stride: int, *, groups: int, then_pointwise: bool, affine: bool
    ) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_a = nn.Conv2d(
            channels, channels, (1, kernel), (1, stride), (0, pad), groups=groups, bias=False
        )
        self.conv_b = nn.Conv2d(
            channels, channels, (kernel, 1), (stride, 1), (pad, 0), groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels, affine=affine)
        if then_pointwise:
            self.relu = nn.ReLU(inplace=True)
            self.pw = nn.Conv2d(channels, channels, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels, affine=affine)


class Zero(nn.Module):
    """The operation `none`: zeros of the output's shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> zeros (B, C, ceil(H/s), ceil(W/s))."""
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class Noise(nn.Module):
    """Standard normal noise that ignores its input (space S4 of RobustDARTS).

    Drawn from `generator` when one is set.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> noise (B, C, ceil(H/s), ceil(W/s))."""
        shape = x[:, :, :: self.stride, :: self.stride].shape
        return torch.randn(shape, generator=self.generator, dtype=x.dtype, device=x.device)


def _pool(kind: str, channels: int, stride: int, *, norm: bool, affine: bool) -> nn.Module:
    pool: nn.Module
    if kind == "max":
        pool = nn.MaxPool2d(3, stride, padding=1)
    else:
        pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if not norm:
        return pool
    layers = nn.Sequential()
    layers.add_module("pool", pool)
    layers.add_module("bn", nn.BatchNorm2d(channels, affine=affine))
    return layers


def build_op(
    name: str, channels: int, stride: int, *, affine: bool = True, pool_norm: bool = False
) -> nn.Module:
    """Module of operation `name`, (B, C, H, W) -> (B, C, ceil(H/stride), ceil(W/stride)).

    `affine=False, pool_norm=True` gives the form operations have inside a supernet, the defaults
    the one for retraining.

    Raises:
        ValueError: no such operation.
    """
    match name:
        case "none":
            return Zero(stride)
        case "noise":
            return Noise(stride)
        case "max_pool_3x3" | "avg_pool_3x3":
            return _pool(name[:3], channels, stride, norm=pool_norm, affine=affine)
        case "max_pool_3x3_bn":
            return _pool("max", channels, stride, norm=True, affine=affine)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=affine)
        case "sep_conv_3x3" | "sep_conv_5x5" | "sep_conv_7x7":
            return SepConv(channels, int(name[-1]), stride, affine=affine)
        case "dil_conv_3x3" | "dil_conv_5x5":
            return DilConv(channels, int(name[-1]), stride, affine=affine)
        case "conv_7x1_1x7":
            return RectConv(channels, 7, stride, groups=1, then_pointwise=False, affine=affine)
        case "conv_1x3_3x1":
            return RectConv(channels, 3, stride, groups=8, then_pointwise=True, affine=affine)
    raise ValueError(f"no operation is called {name!r}; nas.genotype.OPERATIONS lists them")
