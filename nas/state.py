"""SearchState: the one mutable object of a search stage."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.gates import Gates
from nas.samplers import Arch, Progress, Sampler
from nas.supernets.cell import CellSupernet
from nas.supernets.stacked import StackedBatchNorm

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


@dataclass
class SearchState:
    """A supernet, the architecture parameters over it, and the optimisers of both."""

    supernet: CellSupernet
    arch: Arch
    sampler: Sampler
    weight_optimizer: torch.optim.Optimizer
    arch_optimizer: torch.optim.Optimizer | None
    progress: Progress
    draws: torch.Generator
    """Stream of the gates."""

    @property
    def weight_lr(self) -> float:
        """Learning rate of the weights in force."""
        return float(self.weight_optimizer.param_groups[0]["lr"])

    def gates(self) -> list[Gates]:
        """Gates for one step, drawn by the sampler."""
        return self.sampler.sample(self.arch, self.progress, self.draws)


def load_optimizer(optimizer: torch.optim.Optimizer, held: dict[str, Any]) -> None:
    """Restore what an optimiser has accumulated; its settings stay those of the trial it was built for."""
    optimizer.load_state_dict({**held, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which `parameters` need no gradient, so that nothing is computed or saved for one."""
    held = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Context in which `parameters` hold `values`; the tensors they had come back untouched."""
    held = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, held, strict=True):
            parameter.data = value


@contextmanager
def without_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which training-mode forwards of `module` leave running statistics of batch norm alone."""
    kinds = (StackedBatchNorm, nn.BatchNorm2d)
    norms = [m for m in module.modules() if isinstance(m, kinds) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
