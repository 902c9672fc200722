"""Values that change with training progress: learning rates, temperatures, drop probabilities.

Every schedule is a pure function `at(epoch, epochs)` of the 0-based epoch (a fraction inside an epoch where a
recipe changes the value per batch). Nothing steps, so nothing can be stepped in the wrong order, and a
resumed run reads the same values.
"""

import math
from dataclasses import dataclass
from typing import Literal


def _check_not_negative(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be a finite number >= 0")


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __post_init__(self) -> None:
        _check_not_negative(self, value=self.value)

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """Straight line from `start` in the first epoch to `end` in the last."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_not_negative(self, start=self.start, end=self.end)

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        return self.start + (self.end - self.start) * epoch / max(epochs - 1, 1)


@dataclass(frozen=True)
class Ramp:
    """Straight line from 0 towards `end`, reached only after the last epoch: drop-path, p_max * e / E."""

    end: float

    def __post_init__(self) -> None:
        _check_not_negative(self, end=self.end)

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        return self.end * epoch / epochs


def _warm(value: float, start: float, epoch: float, warmup: int, scale: str) -> float:
    if epoch >= warmup:
        return value
    return (start if scale == "start" else value) * (epoch + 1) / warmup


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end`: end + (start - end) (1 + cos(pi e / E)) / 2.

    During the first `warmup` epochs the value is (e + 1) / warmup times `start` (PC-DARTS's ImageNet code) or
    times the cosine's own value (`warmup_of="current"`, P-DARTS's).
    """

    start: float
    end: float = 0.0
    warmup: int = 0
    warmup_of: Literal["start", "current"] = "start"

    def __post_init__(self) -> None:
        _check_not_negative(self, start=self.start, end=self.end, warmup=self.warmup)

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        value = self.end + (self.start - self.end) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        return _warm(value, self.start, epoch, self.warmup, self.warmup_of)


@dataclass(frozen=True)
class LinearTail:
    """Line from `start` to 1/E' of it before the last `tail` epochs, then one `tail` times flatter to 0.

    With E' = E - tail: start (E' - e) / E' before, start (E - e) / (tail E') after. Source: the ImageNet
    retraining of PC-DARTS and P-DARTS.
    """

    start: float
    tail: int = 5
    warmup: int = 0
    warmup_of: Literal["start", "current"] = "start"

    def __post_init__(self) -> None:
        _check_not_negative(self, start=self.start, warmup=self.warmup)
        if self.tail < 1:
            raise ValueError(f"LinearTail.tail={self.tail} must be at least 1")

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        body = epochs - self.tail
        if epoch < body:
            value = self.start * (body - epoch) / body
        else:
            value = self.start * (epochs - epoch) / (max(body, 1) * self.tail)
        return _warm(value, self.start, epoch, self.warmup, self.warmup_of)


@dataclass(frozen=True)
class Exponential:
    """`start` times `decay` to the power of the epoch."""

    start: float
    decay: float

    def __post_init__(self) -> None:
        _check_not_negative(self, start=self.start, decay=self.decay)

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        return self.start * self.decay ** int(epoch)


@dataclass(frozen=True)
class SkipDropout:
    """P-DARTS's dropout after identity skips: linear fall while alpha is frozen, jump back, then exp(-0.2 t).

    Source: Chen et al., "Progressive Differentiable Architecture Search", arXiv:1904.12760, and its public
    code. With F frozen epochs: start (E - e - 1) / E before epoch F, then start exp(-0.2 (e - F)).
    """

    start: float = 0.0
    frozen_epochs: int = 10

    def __post_init__(self) -> None:
        _check_not_negative(self, start=self.start, frozen_epochs=self.frozen_epochs)
        if self.start >= 1:
            raise ValueError(f"SkipDropout.start={self.start} is a probability; use a value in [0, 1)")

    def at(self, epoch: float, epochs: int) -> float:
        """Value in force at `epoch` of `epochs`."""
        if epoch < self.frozen_epochs:
            return self.start * (epochs - epoch - 1) / epochs
        return self.start * math.exp(-0.2 * (epoch - self.frozen_epochs))


Schedule = Constant | Linear | Ramp | Cosine | LinearTail | Exponential | SkipDropout


def check_probability(owner: object, name: str, epochs: int) -> None:
    """Refuse a schedule, the field `name` of `owner`, that reaches 1 within `epochs`.

    Raises:
        ValueError: it does; an output dropped for certain cannot be scaled to keep its mean.
    """
    schedule: Schedule = getattr(owner, name)
    highest = max((schedule.at(epoch, epochs) for epoch in range(epochs)), default=0.0)
    if not highest < 1:
        raise ValueError(f"{type(owner).__name__}: {name} reaches {highest}; a probability must stay below 1")
