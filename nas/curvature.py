"""Curvature: second derivatives of a scalar, as a matrix or by its products with vectors; its spectrum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE_MAX = 512
"""Up to this many parameters the whole matrix is computed; above it Lanczos finds its largest eigenvalues."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Product = Callable[[Tensor], Tensor]
"""Product of a symmetric matrix (n, n) with a vector (n,)."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of a symmetric matrix."""

    largest: float
    smallest: float
    trace: float
    """Exact for a whole matrix, else Hutchinson's estimate."""
    quantiles: tuple[float, ...] | None
    """At `QUANTILES`; None where only the ends are known."""
    asymmetry: float | None
    """Norm of the part that should not be there over the matrix's; None where there is no matrix."""

    @property
    def dominant(self) -> float:
        """Eigenvalue of largest modulus, with its sign."""
        return max(self.largest, self.smallest, key=abs)


class Hessian:
    """Second derivatives of `value` in some entries of `parameters`, by double backward.

    `kept` names these entries of the parameters laid end to end; None takes all. One graph serves all
    products; of a supernet it holds 1.6 times what a training step of as many images keeps, measured.
    """

    def __init__(self, value: Tensor, parameters: Sequence[Tensor], kept: Tensor | None = None) -> None:
        self.parameters = list(parameters)
        self.kept = kept
        slope = torch.autograd.grad(
            value, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        self.gradient = self._flat(slope)

    @property
    def size(self) -> int:
        """Number n of rows."""
        return len(self.gradient)

    def product(self, vector: Tensor) -> Tensor:
        """(n,) -> (n,)."""
        rows = torch.autograd.grad(
            self.gradient,
            self.parameters,
            vector,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._flat(rows)

    def matrix(self) -> Tensor:
        """All rows (n, n), each by its own backward pass; symmetric up to rounding."""
        eye = torch.eye(self.size, dtype=self.gradient.dtype, device=self.gradient.device)
        return torch.stack([self.product(row) for row in eye])

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([part.flatten() for part in parts])
        return flat if self.kept is None else flat[self.kept]


def spectrum(hessian: Hessian, draws: torch.Generator, dense_max: int = DENSE_MAX) -> Spectrum:
    """Spectrum of `hessian`: of the whole matrix up to `dense_max` rows, by Lanczos and Hutchinson above."""
    if hessian.size <= dense_max:
        matrix = hessian.matrix().detach().double()
        if not bool(matrix.isfinite().all()):
            return Spectrum(math.nan, math.nan, math.nan, None, None)
        halves = (matrix + matrix.T) / 2
        values = torch.linalg.eigvalsh(halves)
        at = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
        norm = float(matrix.norm())
        return Spectrum(
            largest=float(values[-1]),
            smallest=float(values[0]),
            trace=float(values.sum()),
            quantiles=tuple(torch.quantile(values, at).tolist()),
            asymmetry=float((matrix - halves).norm()) / norm if norm else 0.0,
        )
    smallest, largest = lanczos(hessian.product, hessian.gradient, draws)
    if math.isnan(largest):
        return Spectrum(math.nan, math.nan, math.nan, None, None)
    trace = hutchinson(hessian.product, hessian.gradient, draws)
    return Spectrum(largest, smallest, trace, None, None)


def lanczos(
    product: Product,
    like: Tensor,
    draws: torch.Generator,
    *,
    tolerance: float = 1e-4,
    iterations: int = 200,
    largest_only: bool = False,
) -> tuple[float, float]:
    """Smallest and largest eigenvalue of the symmetric matrix behind `product`.

    `like` (n,) gives size, dtype and device of its vectors; the first is drawn from `draws`. Stops when both
    ends are known to `tolerance` times the largest modulus, or the largest alone to `tolerance` times its
    own: a negative eigenvalue of large modulus says nothing of how well the largest is known. All vectors are
    kept and each new one is made orthogonal to them twice, without which converged eigenvalues come again.
    Both are nan of a matrix that is not finite, and where `iterations` do not do.
    """
    size = len(like)
    vector = torch.randn(size, generator=draws, dtype=torch.float64).to(like)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1]).detach()
        diagonal.append(float(basis[-1] @ image))
        if not math.isfinite(diagonal[-1]):
            return math.nan, math.nan
        known = torch.stack(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        beside.append(float(image.norm()))
        step = len(diagonal)
        band = torch.tensor(beside[:-1], dtype=torch.float64)
        inner = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        inner += torch.diag(band, 1) + torch.diag(band, -1)
        values, vectors = torch.linalg.eigh(inner)
        # |b_k s_k| bounds the distance of a Ritz value from an eigenvalue.
        errors = beside[-1] * vectors[-1].abs()
        scale = float(values.abs().max())
        rounding = torch.finfo(like.dtype).eps * scale
        if largest_only:
            known_to, error = max(abs(float(values[-1])), rounding), float(errors[-1])
        else:
            known_to, error = scale, float(max(errors[0], errors[-1]))
        exhausted = step >= size or not beside[-1] > rounding
        if exhausted or error <= tolerance * known_to:
            return float(values[0]), float(values[-1])
        if step >= iterations:
            return math.nan, math.nan
        basis.append(image / beside[-1])


def hutchinson(product: Product, like: Tensor, draws: torch.Generator, probes: int = 32) -> float:
    """Estimate of the trace of the matrix behind `product`: mean of v H v over vectors v of random signs."""
    total = 0.0
    for _ in range(probes):
        signs = torch.randint(2, (len(like),), generator=draws).to(like) * 2 - 1
        total += float(signs @ product(signs).detach())
    return total / probes


T_QUANTILE = {2: 12.706205, 3: 4.302653, 4: 3.182446, 5: 2.776445}
"""97.5 % point of Student's t for a mean of this many values."""


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the mean of 2 to 5 values by Student's t; nothing of fewer.

    Raises:
        ValueError: more than 5 values.
    """
    count = len(values)
    if count < 2:
        return None, None
    if count not in T_QUANTILE:
        raise ValueError(f"interval of {count} values; give at most {max(T_QUANTILE)}")
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_QUANTILE[count] * deviation / math.sqrt(count)
    return mean - half, mean + half
