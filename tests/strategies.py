"""Hypothesis strategies for tables of choices, spaces, picks, genotypes, and what a search has learned."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from nas.genotype import Cell, Genotype
from nas.spaces.cell import CELL_TYPES, DARTS_OPS, CellSpace
from nas.spaces.space import Choices, Picks

MADE_OF_OPS = tuple(op for op in DARTS_OPS if op != "none")


@st.composite
def subsets(draw: st.DrawFn, count: int, at_least: int = 1) -> tuple[int, ...]:
    """Some of the options 0..count-1, ascending."""
    chosen = draw(st.sets(st.sampled_from(range(count)), min_size=at_least, max_size=count))
    return tuple(sorted(chosen))


@st.composite
def tables(draw: st.DrawFn, most_rows: int = 4, most_options: int = 6) -> Choices:
    """A table of choices with some options left on every row."""
    rows = draw(st.integers(1, most_rows))
    options = draw(st.integers(1, most_options))
    allowed = tuple(draw(subsets(options)) for _ in range(rows))
    return Choices(
        "table",
        tuple(f"row {row}" for row in range(rows)),
        tuple(f"option {o}" for o in range(options)),
        allowed,
    )


@st.composite
def spaces(draw: st.DrawFn, most_nodes: int = 3) -> CellSpace:
    """A cell space over some operations of DARTS, each cell type restricted on single edges or not."""
    nodes = draw(st.integers(1, most_nodes))
    chosen = draw(st.lists(st.sampled_from(MADE_OF_OPS), min_size=1, unique=True))
    ops = draw(st.permutations([*chosen, "none"])) if draw(st.booleans()) else chosen
    edges = sum(range(2, nodes + 2))

    def restricted() -> tuple[tuple[str, ...], ...] | None:
        if draw(st.booleans()):
            return None
        rows = []
        for _ in range(edges):
            kept = draw(st.sets(st.sampled_from(chosen), min_size=1))
            rows.append(tuple(op for op in ops if op in kept or (op == "none" and draw(st.booleans()))))
        return tuple(rows)

    return CellSpace(
        name="drawn",
        nodes=nodes,
        ops=tuple(ops),
        normal_ops=restricted(),
        reduce_ops=restricted(),
        inputs_per_node=draw(st.sampled_from([1, 2])),
    )


def _ops_on(space: CellSpace, cell: str, node: int, source: int) -> list[str]:
    """What a derived cell may hold on one edge, read from the space's fields."""
    edge = sum(range(2, node)) + source
    restricted = space.normal_ops if cell == "normal" else space.reduce_ops
    return [op for op in (space.ops if restricted is None else restricted[edge]) if op != "none"]


@st.composite
def genotypes(draw: st.DrawFn, space: CellSpace) -> Genotype:
    """A genotype of `space`; inputs by ascending predecessor, as the space writes them."""
    cells = {}
    for cell in CELL_TYPES:
        nodes = []
        for node in range(2, space.nodes + 2):
            count = space.inputs_per_node
            sources = sorted(draw(st.sets(st.integers(0, node - 1), min_size=count, max_size=count)))
            nodes.append(
                tuple(
                    (draw(st.sampled_from(_ops_on(space, cell, node, source))), source) for source in sources
                )
            )
        cells[cell] = Cell(tuple(nodes), tuple(range(2, space.nodes + 2)))
    return Genotype(normal=cells["normal"], reduce=cells["reduce"])


@st.composite
def picks(draw: st.DrawFn, space: CellSpace) -> Picks:
    """The picks of a genotype of `space`: one operation on every kept edge, none elsewhere."""
    found: Picks = {}
    for cell in CELL_TYPES:
        ops: list[tuple[int, ...]] = []
        kept: list[tuple[int, ...]] = []
        for node in range(2, space.nodes + 2):
            count = space.inputs_per_node
            sources = draw(st.sets(st.integers(0, node - 1), min_size=count, max_size=count))
            kept.append(tuple(sorted(sources)))
            for source in range(node):
                names = _ops_on(space, cell, node, source)
                ops.append((space.ops.index(draw(st.sampled_from(names))),) if source in sources else ())
        found[f"{cell}/op"], found[f"{cell}/input"] = tuple(ops), tuple(kept)
    return found


@st.composite
def probabilities(draw: st.DrawFn, table: Choices, *, ties: bool = True) -> Tensor:
    """A distribution over the allowed options of every row; `ties` makes equal ones common."""
    if ties:
        weights = [[0.0] * len(table.options) for _ in table.rows]
        for row, options in enumerate(table.allowed):
            for option in options:
                weights[row][option] = draw(st.integers(1, 3))
        values = torch.tensor(weights, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
        values = (
            scale * torch.randn(len(table.rows), len(table.options), generator=generator, dtype=torch.float64)
        ).exp()
        for row, options in enumerate(table.allowed):
            values[row, [o for o in range(len(table.options)) if o not in options]] = 0.0
    return values / values.sum(dim=1, keepdim=True)


@st.composite
def learned(
    draw: st.DrawFn, space: CellSpace, *, edge_norm: bool | None = None, ties: bool = True
) -> dict[str, Tensor]:
    """Probabilities of both cells' operations, and with edge normalisation (None: perhaps) of inputs."""
    with_inputs = draw(st.booleans()) if edge_norm is None else edge_norm
    return {
        name: draw(probabilities(table, ties=ties))
        for name, table in space.choices.items()
        if with_inputs or name.endswith("/op")
    }
