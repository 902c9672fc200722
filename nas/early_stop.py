"""Early stopping of a search by the curvature of its validation loss: DARTS-ES, as a setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nas.config import check_range


@dataclass(frozen=True)
class EigenvalueStop:
    """Stop a search stage when the dominant eigenvalue of the Hessian in alpha has grown, and go back.

    Every `every` epochs the largest eigenvalue of the Hessian of the validation loss in alpha is measured,
    with the weights as they are. Its mean over the last `window` measurements stands for the epoch in their
    middle. When that mean has grown by more than `factor` over the mean `delta` measurements earlier, the
    stage ends, and the architecture is that of the epoch for which the earlier mean stands, if this is
    `start` or later.

    The defaults are those of the public code; the paper says that the earlier mean over the present one falls
    below 0.75, i.e. `factor=1.3333`.

    Source: Zela et al., "Understanding and Robustifying Differentiable Architecture Search",
    arXiv:1909.09656. Differs from its code in that the weight decay of alpha, which adds a constant to every
    eigenvalue, is left out.
    """

    window: int = 5
    """Measurements that are averaged; fewer at the beginning."""
    delta: int = 4
    """Measurements between the two means that are compared."""
    factor: float = 1.3
    start: int = 10
    """First epoch of the stage that may be returned."""
    every: int = 2
    """Epochs from one measurement to the next."""
    batches: int = 1
    """Held-out batches over which a measurement is averaged."""

    def __post_init__(self) -> None:
        inf = math.inf
        check_range(
            self,
            window=(1, inf, "5 is usual"),
            delta=(1, inf, "4 is usual"),
            factor=(1, inf, "1.3 is usual"),
            start=(0, inf, "10 is usual"),
            every=(1, inf, "2 is usual"),
            batches=(1, inf, "1 is usual"),
        )

    def back_to(self, eigenvalues: Sequence[float]) -> int | None:
        """Epoch to go back to after the measurements so far, at epochs 0, `every`, ...; None to go on.

        A mean that is not positive has no growth.
        """
        now = len(eigenvalues) - 1
        middle = now - self.delta - self.window // 2
        if middle < 0 or middle * self.every < self.start:
            return None
        earlier, present = self._mean(eigenvalues, now - self.delta), self._mean(eigenvalues, now)
        return middle * self.every if 0 < earlier * self.factor < present else None

    def _mean(self, eigenvalues: Sequence[float], last: int) -> float:
        window = eigenvalues[max(0, last - self.window + 1) : last + 1]
        return math.fsum(window) / len(window)
