"""Samplers: architecture parameters -> gates."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.gates import Gate, Gates
from nas.schedule import Linear, Schedule
from nas.spaces.space import Choices


@dataclass
class Arch:
    """Architecture parameters: one table of logits (rows, options) for each table of choices that is relaxed.

    Named alpha in the papers for tables of operations, beta for tables of inputs.
    """

    choices: dict[str, Choices]
    logits: dict[str, nn.Parameter]
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Where a table has options that are not allowed: True at these."""

    def parameters(self) -> list[nn.Parameter]:
        """All logits, in the order of the tables."""
        return list(self.logits.values())

    def masked(self, name: str) -> Tensor:
        """Logits of table `name` with -inf where an option is not allowed."""
        logits: Tensor = self.logits[name]
        return logits.masked_fill(self.masks[name], -torch.inf) if name in self.masks else logits

    def probabilities(self) -> dict[str, Tensor]:
        """Softmax of each row over its allowed options."""
        return {name: self.masked(name).softmax(dim=-1) for name in self.logits}

    def all_active(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Every allowed option of table `name`."""
        return self.choices[name].allowed


def init_arch(
    choices: dict[str, Choices],
    draws: torch.Generator,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Arch:
    """Logits drawn from 1e-3 N(0, 1), as DARTS, PC-DARTS, P-DARTS and GDAS start."""
    logits, masks = {}, {}
    for name, table in choices.items():
        shape = (len(table.rows), len(table.options))
        start = 1e-3 * torch.randn(shape, generator=draws, dtype=dtype)
        logits[name] = nn.Parameter(start.to(device))
        if not table.full:
            allowed = torch.zeros(shape, dtype=torch.bool)
            for row, options in enumerate(table.allowed):
                allowed[row, list(options)] = True
            masks[name] = ~allowed.to(device)
    return Arch(choices, logits, masks)


@dataclass(frozen=True)
class Progress:
    """Where a search stage stands: 0-based epoch (a fraction inside it) of `epochs`."""

    epoch: float
    epochs: int


@dataclass(frozen=True)
class Softmax:
    """Every option acts, weighted by the softmax of its row: the relaxation of DARTS (arXiv:1806.09055)."""

    def sample(self, arch: Arch, progress: Progress, draws: torch.Generator) -> list[Gates]:
        """One set of gates, differentiable in the logits."""
        return [{name: Gate(p, arch.all_active(name)) for name, p in arch.probabilities().items()}]


@dataclass(frozen=True)
class Gumbel:
    """Operations drawn from the Gumbel-softmax distribution; one runs on each edge when `hard`.

    Hard gates are one-hot forward and carry the gradient of the soft sample. Tables of which more than one
    option is taken (inputs) stay a softmax, so that edge normalisation multiplies the sampled operation.

    Source: Dong & Yang, "Searching for a Robust Neural Architecture in Four GPU Hours", arXiv:1910.04465.
    """

    hard: bool = True
    tau: Schedule = Linear(10.0, 0.1)
    """Temperature over the stage's epochs; low tau is close to a one-hot draw."""

    def __post_init__(self) -> None:
        if min(self.tau.at(epoch, 10) for epoch in range(10)) <= 0:
            raise ValueError(f"Gumbel.tau={self.tau} reaches 0, by which logits are divided; stay above it")

    def sample(self, arch: Arch, progress: Progress, draws: torch.Generator) -> list[Gates]:
        """One set of gates, differentiable in the logits; the same for all samples of a batch."""
        tau = self.tau.at(progress.epoch, progress.epochs)
        gates: Gates = {}
        soft: dict[str, Tensor] = {}
        for name, table in arch.choices.items():
            logits = arch.masked(name)
            if table.pick > 1:
                gates[name] = Gate(logits.softmax(dim=-1), arch.all_active(name))
                continue
            exponential = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=draws)
            gumbel = (
                -exponential.clamp_min(torch.finfo(logits.dtype).tiny)
                .log()
                .to(logits.device, non_blocking=True)
            )
            soft[name] = ((logits.log_softmax(dim=-1) + gumbel) / tau).softmax(dim=-1)
        if not self.hard:
            return [gates | {name: Gate(p, arch.all_active(name)) for name, p in soft.items()}]
        if soft:
            # Which operations run is the host's to know: one wait for all tables.
            chosen = torch.cat([p.argmax(dim=-1) for p in soft.values()])
            options = iter(chosen.tolist())
            tables = torch.split(chosen, [len(p) for p in soft.values()])
            for (name, p), rows in zip(soft.items(), tables, strict=True):
                straight = torch.zeros_like(p).scatter_(1, rows[:, None], 1.0) + (p - p.detach())
                gates[name] = Gate(straight, tuple((next(options),) for _ in range(len(p))))
        return [gates]


Sampler = Softmax | Gumbel
