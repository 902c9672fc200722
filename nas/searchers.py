"""Searchers: what was learned -> one genotype."""

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nas.genotype import Cell, Genotype
from nas.spaces.cell import CELL_TYPES, CellSpace, CellType
from nas.spaces.space import Choices


@dataclass(frozen=True)
class Argmax:
    """The likeliest cell: each edge's best operation, each node's strongest edges, at most `max_skip` skips.

    `none` takes part in the softmax, so a large weight on it lowers an edge, but it is never chosen. Taken
    inputs of a node are listed by decreasing strength, or by predecessor when ties go to the last.

    Sources: DARTS arXiv:1806.09055 (alpha), PC-DARTS arXiv:1907.05737 (alpha times beta), P-DARTS
    arXiv:1904.12760 (skip cap), GDAS arXiv:1910.04465 (pairs).
    """

    edges_by: Literal["alpha_beta", "alpha", "beta"] = "alpha_beta"
    """Strength of an edge: its best operation's probability times beta, the former alone, or beta alone.

    Without edge normalisation the product is just the probability. The operation on an edge is always the one
    of the largest alpha.
    """
    max_skip: int | None = None
    """M of P-DARTS: largest number of skip connections in the normal cell; None sets no limit."""
    pairs: bool = False
    """Whether (operation, predecessor) pairs are ranked rather than edges.

    A node may then take one predecessor twice, as in GDAS.
    """
    ties: Literal["first", "last"] = "first"
    """Which of equals wins, predecessor or operation: the first in DARTS's code, the last in P-DARTS's."""

    def __post_init__(self) -> None:
        if self.max_skip is not None and self.max_skip < 0:
            raise ValueError(f"max_skip={self.max_skip} must be at least 0, or None for no cap")

    def derive(
        self,
        space: CellSpace,
        choices: dict[str, Choices],
        probabilities: dict[str, Tensor],
        draws: random.Random,
    ) -> Genotype:
        """Genotype of the probabilities, one table for each table of choices that was relaxed.

        Raises:
            ValueError: `max_skip` cannot be met, or `edges_by="beta"` without probabilities of inputs.
        """
        cells = {}
        for cell in CELL_TYPES:
            ops = probabilities[f"{cell}/op"].detach().cpu().tolist()
            inputs = probabilities.get(f"{cell}/input")
            beta = None
            if inputs is not None:
                rows = inputs.detach().cpu().tolist()
                beta = [rows[node - 2][source] for node, source in space.edges]
            cells[cell] = self._cell(space, cell, choices[f"{cell}/op"], ops, beta)
        return Genotype(normal=cells["normal"], reduce=cells["reduce"])

    def _cell(
        self,
        space: CellSpace,
        cell: CellType,
        table: Choices,
        alpha: list[list[float]],
        beta: list[float] | None,
    ) -> Cell:
        if self.edges_by == "beta" and beta is None:
            raise ValueError(
                "edges_by='beta' needs edge normalisation; "
                "set method.supernet.edge_norm=True or edges_by='alpha'"
            )
        factor = beta if beta is not None and self.edges_by == "alpha_beta" else [1.0] * len(alpha)
        score = [[p * weight for p in row] for row, weight in zip(alpha, factor, strict=True)]
        while True:
            nodes = self._select(space, table, score, beta)
            skips = [
                (score[edge][option], edge, option)
                for taken in nodes
                for edge, option in taken
                if table.options[option] == "skip_connect"
            ]
            if cell == "reduce" or self.max_skip is None or len(skips) <= self.max_skip:
                break
            removable = [entry for entry in skips if entry[0] > 0]
            if not removable:
                raise ValueError(
                    f"max_skip={self.max_skip} cannot be met: {len(skips)} nodes or more of {space.name!r} "
                    "offer nothing else; raise max_skip or allow another operation there"
                )
            _, edge, option = min(removable)
            # Taking the weakest selected skip away can demote its edge, switch its operation, and
            # let another skip in.
            score[edge][option] = 0.0
        return Cell(
            tuple(
                tuple((table.options[option], space.edges[edge][1]) for edge, option in taken)
                for taken in nodes
            ),
            tuple(range(2, space.nodes + 2)),
        )

    def _select(
        self, space: CellSpace, table: Choices, score: list[list[float]], beta: list[float] | None
    ) -> list[list[tuple[int, int]]]:
        """For every node its (edge, option) pairs."""
        nodes = []
        for node in range(2, space.nodes + 2):
            ranked: list[tuple[float, int, int]] = []
            for edge in (index for index, (target, _) in enumerate(space.edges) if target == node):
                options = [o for o in table.allowed[edge] if table.options[o] != "none"]
                if not self.pairs:
                    options = [self._best(options, score[edge])]
                ranked += [
                    (beta[edge] if beta is not None and self.edges_by == "beta" else score[edge][o], edge, o)
                    for o in options
                ]
            if self.ties == "last":
                ranked.reverse()
            ranked.sort(key=lambda entry: -entry[0])
            taken = [(edge, option) for _, edge, option in ranked[: space.inputs_per_node]]
            nodes.append(sorted(taken) if self.ties == "last" else taken)
        return nodes

    def _best(self, options: list[int], score: list[float]) -> int:
        order = options if self.ties == "first" else options[::-1]
        return max(order, key=lambda option: score[option])


@dataclass(frozen=True)
class RandomGenotype:
    """A genotype drawn uniformly from the space, without any search: the baseline of every comparison."""

    max_skip: int | None = None
    """Redraw until the normal cell has at most this many skips, for a fair baseline of capped methods."""

    def __post_init__(self) -> None:
        if self.max_skip is not None and self.max_skip < 0:
            raise ValueError(f"max_skip={self.max_skip} must be at least 0, or None for no cap")

    def derive(
        self,
        space: CellSpace,
        choices: dict[str, Choices],
        probabilities: dict[str, Tensor],
        draws: random.Random,
    ) -> Genotype:
        """Genotype drawn from `draws`; ignores what was learned.

        Raises:
            ValueError: no draw of 10,000 meets the cap.
        """
        for _ in range(10_000):
            genotype = space.sample(draws)
            if self.max_skip is None or genotype.normal.skips <= self.max_skip:
                return genotype
        raise ValueError(f"no cell of {space.name!r} among 10,000 has at most max_skip={self.max_skip} skips")


@dataclass(frozen=True)
class Given:
    """A genotype that was found before, to be retrained without a search."""

    genotype: str
    """Its text form."""

    def __post_init__(self) -> None:
        Genotype.parse(self.genotype)

    def derive(
        self,
        space: CellSpace,
        choices: dict[str, Choices],
        probabilities: dict[str, Tensor],
        draws: random.Random,
    ) -> Genotype:
        """The genotype; nothing else has a say."""
        return Genotype.parse(self.genotype)


Searcher = Argmax | RandomGenotype | Given


def keep_likeliest(table: Choices, probabilities: Tensor, keep: int) -> Choices:
    """`table` with the `keep` likeliest options left in each row.

    Of equals the first is dropped; `none` competes like any other. Source: P-DARTS, arXiv:1904.12760,
    and its public code.
    """
    rows = probabilities.detach().cpu().tolist()
    allowed = []
    for options, row in zip(table.allowed, rows, strict=True):
        kept = (
            sorted(options, key=lambda option: (row[option], option))[-keep:]
            if keep < len(options)
            else options
        )
        allowed.append(tuple(sorted(kept)))
    return table.keep(tuple(allowed))
