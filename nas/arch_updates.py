"""Architecture updates: how architecture parameters learn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.config import ABOVE_ZERO, check_range
from nas.gates import Gates, detached, leaves
from nas.samplers import Arch
from nas.state import Batch, SearchState, frozen, swapped, without_statistics


@dataclass(frozen=True)
class Bilevel:
    """Gradient steps on the loss of held-out data, alternating with those of the weights.

    Order 1 treats the weights as constant. Order 2 looks one weight step of length `xi` ahead; its
    Hessian-vector product is either the finite difference of the paper, whose step is far too long to
    be the derivative on networks with ReLU and max-pool, or the exact one: two different methods,
    both of them offered.

    Source: Liu et al., "DARTS: Differentiable Architecture Search", arXiv:1806.09055, and its public code.
    """

    order: Literal[1, 2] = 1
    hessian: Literal["finite_difference", "exact"] = "finite_difference"
    xi: float | None = None
    """Length of the weight step looked ahead; None takes the learning rate of the weights."""
    epsilon: float = 0.01
    """The finite difference moves the weights by this distance to either side."""
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3
    """L2, coupled: pulls the distribution towards uniform."""
    clip: float | None = None
    """Largest norm of the architecture gradient; None does not clip."""
    weights_first: bool = False
    """Whether the weight step comes before the architecture step of an iteration (GDAS)."""

    def __post_init__(self) -> None:
        check_range(
            self,
            lr=(0, math.inf, "3e-4 is usual"),
            weight_decay=(0, math.inf, "1e-3 is usual"),
            epsilon=(ABOVE_ZERO, math.inf, "0.01 is the paper's"),
            xi=(0, math.inf, "None takes the learning rate of the weights"),
            clip=(ABOVE_ZERO, math.inf, "None clips nothing"),
        )
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order} must be 1 or 2")
        if self.hessian not in ("finite_difference", "exact"):
            raise ValueError(f"hessian={self.hessian!r} is not one of finite_difference, exact")

    def optimizer(self, arch: Arch) -> torch.optim.Optimizer:
        """Adam over the architecture parameters."""
        # Fused, Adam counts its steps on the device.
        return torch.optim.Adam(
            arch.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )

    def step(self, state: SearchState, weight_batch: Batch, arch_batch: Batch) -> Tensor:
        """Update the architecture parameters on `arch_batch`; returns the loss before that, on the device.

        `weight_batch` is the batch of the weight step of the same iteration, which order 2 looks ahead with.
        """
        assert state.arch_optimizer is not None
        (gates,) = state.gates()
        loss, gradients = self.gate_gradients(state, gates, weight_batch, arch_batch)
        state.arch_optimizer.zero_grad()
        torch.autograd.backward([gates[name].weights for name in gradients], list(gradients.values()))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(state.arch.parameters(), self.clip, foreach=True)
        state.arch_optimizer.step()
        return loss

    def gate_gradients(
        self, state: SearchState, gates: Gates, weight_batch: Batch, arch_batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on `arch_batch` and the gradient with respect to the weights of every gate.

        All passes of an iteration share one draw of the gates, and the chain rule through the sampler is
        applied once, to the sum.
        """
        weights = list(state.supernet.parameters())
        if self.order == 1 or self.xi == 0:
            with frozen(weights):
                return _gate_gradients(state, gates, arch_batch)
        return self._unrolled(state, weights, gates, weight_batch, arch_batch)

    def _unrolled(
        self,
        state: SearchState,
        weights: list[nn.Parameter],
        gates: Gates,
        weight_batch: Batch,
        arch_batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        xi = state.weight_lr if self.xi is None else self.xi
        exact = self.hessian == "exact"
        same_noise = _replayed(state.supernet.noise.generator)
        inner = leaves(gates) if exact else detached(gates)
        train_loss = _loss(state, inner, weight_batch)
        slope = torch.autograd.grad(
            train_loss, weights, create_graph=exact, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            ahead = _sgd_step(state.weight_optimizer, weights, [g.detach() for g in slope], xi)

        # The look-ahead weights are a copy in the paper's code: what they do to the running statistics is
        # thrown away.
        outer = leaves(gates)
        with swapped(weights, ahead), without_statistics(state.supernet):
            same_noise()
            loss = _loss(state, outer, arch_batch)
            found = torch.autograd.grad(
                loss, [*_tensors(outer), *weights], allow_unused=True, materialize_grads=True
            )
        direct, vector = found[: len(outer)], found[len(outer) :]

        implicit: Sequence[Tensor]
        if exact:
            implicit = torch.autograd.grad(
                slope, _tensors(inner), vector, allow_unused=True, materialize_grads=True
            )
        else:
            implicit = self._finite_difference(state, weights, gates, weight_batch, vector, same_noise)
        combined = [d - xi * h for d, h in zip(direct, implicit, strict=True)]
        return loss.detach(), dict(zip(gates, combined, strict=True))

    def _finite_difference(
        self,
        state: SearchState,
        weights: list[nn.Parameter],
        gates: Gates,
        batch: Batch,
        vector: tuple[Tensor, ...],
        same_noise: Callable[[], None],
    ) -> list[Tensor]:
        """Mixed second derivative of the training loss times `vector`, by central differences.

        Differences are taken of the gradient in the gates, with the weights moved along
        `vector` to either side.
        """
        norm = torch.stack(torch._foreach_norm(vector)).norm()
        distance = self.epsilon / norm
        shift = torch._foreach_mul(vector, distance)
        values: list[Tensor] = [weight.detach() for weight in weights]
        sides = []
        for sign in (1, -1):
            moved = list(torch._foreach_add(values, shift, alpha=sign))
            same_noise()
            with swapped(weights, moved), frozen(weights):
                sides.append(_gate_gradients(state, gates, batch)[1])
        plus, minus = sides
        return [(plus[name] - minus[name]) / (2 * distance) for name in gates]


def _replayed(stream: torch.Generator | None) -> Callable[[], None]:
    """Call that puts `stream` back to where it stands now: all passes of an iteration draw the same."""
    if stream is None:
        return lambda: None
    start = stream.get_state()

    def again() -> None:
        stream.set_state(start)

    return again


def _tensors(gates: Gates) -> list[Tensor]:
    return [gate.weights for gate in gates.values()]


def _loss(state: SearchState, gates: Gates, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(state.supernet(images, gates), labels)


def _gate_gradients(state: SearchState, gates: Gates, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    leaf = leaves(gates)
    loss = _loss(state, leaf, batch)
    gradients = torch.autograd.grad(loss, _tensors(leaf), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaf, gradients, strict=True))


def _sgd_step(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], slope: list[Tensor], xi: float
) -> list[Tensor]:
    """Weights after one SGD step of length `xi` with the optimiser's momentum and decay, as new tensors."""
    group = optimizer.param_groups[0]
    values: list[Tensor] = [weight.detach() for weight in weights]
    direction = torch._foreach_add(slope, values, alpha=group["weight_decay"])
    if group["momentum"] and weights[0] in optimizer.state:  # it comes with the first step, to all at once
        buffers = [optimizer.state[weight]["momentum_buffer"] for weight in weights]
        direction = torch._foreach_add(direction, buffers, alpha=group["momentum"])
    return list(torch._foreach_add(values, direction, alpha=-xi))
