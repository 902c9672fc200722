"""Gates: how strongly each option acts, and which options run at all.

Samplers make them, supernets receive them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.spaces.space import Choices, Picks


@dataclass(frozen=True)
class Gate:
    """The gate of one table of choices.

    `weights` has shape (rows, options); only the options listed in `active`, row by row, are computed,
    whatever the weight of the others. `active` is known to the host, so no device value decides what runs.
    """

    weights: Tensor
    active: tuple[tuple[int, ...], ...]


Gates = dict[str, Gate]
"""Gates by name of their `Choices`.

A table without a gate is not relaxed: its options all act with weight 1.
"""


def leaves(gates: Gates) -> Gates:
    """The same gates cut off from what made them, as leaves of a new graph."""
    return {name: Gate(gate.weights.detach().requires_grad_(), gate.active) for name, gate in gates.items()}


def detached(gates: Gates) -> Gates:
    """The same gates without gradient."""
    return {name: Gate(gate.weights.detach(), gate.active) for name, gate in gates.items()}


def one_hot(choices: dict[str, Choices], picks: Picks, like: Tensor | None = None) -> Gates:
    """Gates of one architecture: weight 1 on every option taken, nothing else runs.

    `like` gives dtype and device of the weights.
    """
    gates = {}
    for name, table in choices.items():
        weights = torch.zeros(
            len(table.rows), len(table.options), dtype=like.dtype if like is not None else None
        )
        for row, options in enumerate(picks[name]):
            weights[row, list(options)] = 1.0
        gates[name] = Gate(weights.to(like.device) if like is not None else weights, picks[name])
    return gates
