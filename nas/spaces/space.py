"""Choices: a table of decisions, the common language of spaces, samplers and supernets."""

from dataclasses import dataclass, replace

Picks = dict[str, tuple[tuple[int, ...], ...]]
"""By name of `Choices`, for every row the options taken, ascending; empty where the row takes none."""


@dataclass(frozen=True)
class Choices:
    """A table of decisions over the same options, one row each, e.g. the operation on every edge of a cell.

    One table rather than one object per decision, so that a sampler needs one softmax for all
    edges of a cell.
    """

    name: str
    rows: tuple[str, ...]
    options: tuple[str, ...]
    allowed: tuple[tuple[int, ...], ...]
    """For every row the options it may take, in ascending order."""
    pick: int = 1
    """How many options a row of the derived architecture takes."""

    def __post_init__(self) -> None:
        if len(self.allowed) != len(self.rows):
            raise ValueError(
                f"{self.name}: {len(self.allowed)} option sets for {len(self.rows)} rows; give one per row"
            )
        for row, options in zip(self.rows, self.allowed, strict=True):
            valid = (
                bool(options) and list(options) == sorted(set(options)) and options[-1] < len(self.options)
            )
            if not valid or options[0] < 0:
                raise ValueError(
                    f"{row}: options {options} must be ascending, distinct and within "
                    f"0..{len(self.options) - 1}"
                )

    @property
    def full(self) -> bool:
        """Whether every row may take every option."""
        return all(len(options) == len(self.options) for options in self.allowed)

    def keep(self, allowed: tuple[tuple[int, ...], ...]) -> "Choices":
        """The same table with fewer options."""
        return replace(self, allowed=allowed)
