"""The cell space of DARTS: two inputs, some nodes, an operation on every edge, two edges kept per node.

Source: Liu et al., "DARTS: Differentiable Architecture Search", arXiv:1806.09055; the restricted
spaces S1 to S4 are those of Zela et al., "Understanding and Robustifying Differentiable Architecture
Search", arXiv:1909.09656.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nas.genotype import OPERATIONS, Cell, Genotype
from nas.spaces.space import Choices, Picks

CellType = Literal["normal", "reduce"]
CELL_TYPES: tuple[CellType, CellType] = ("normal", "reduce")

DARTS_OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


def reduction_cells(cells: int) -> set[int]:
    """Positions of the reduction cells in a network: a third and two thirds of the way."""
    return {cells // 3, 2 * cells // 3}


@dataclass(frozen=True)
class CellSpace:
    """All cells of `nodes` nodes with `inputs_per_node` edges each and one of `ops` on every edge.

    Edges are numbered node by node, predecessors ascending: 2<-0, 2<-1, 3<-0, ... `normal_ops` and
    `reduce_ops` restrict single edges to some of `ops`; None allows all. `none` may be relaxed over, but no
    derived cell holds it.
    """

    name: str = "darts"
    nodes: int = 4
    ops: tuple[str, ...] = DARTS_OPS
    normal_ops: tuple[tuple[str, ...], ...] | None = None
    reduce_ops: tuple[tuple[str, ...], ...] | None = None
    inputs_per_node: int = 2

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"space.nodes={self.nodes} must be at least 1")
        if self.inputs_per_node not in (1, 2):
            raise ValueError(
                f"space.inputs_per_node={self.inputs_per_node} must be 1 or 2: the first node has two inputs"
            )
        unknown = [op for op in self.ops if op not in OPERATIONS]
        if unknown or len(set(self.ops)) != len(self.ops) or not set(self.ops) - {"none"}:
            raise ValueError(
                f"space.ops={self.ops} must be distinct names from {', '.join(OPERATIONS)} "
                "with at least one besides none"
            )
        for cell in CELL_TYPES:
            self.op_choices(cell)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(node, predecessor) of every edge, in edge order."""
        return tuple((node, source) for node in range(2, self.nodes + 2) for source in range(node))

    def op_choices(self, cell: CellType) -> Choices:
        """Which operation acts on each edge of `cell`: table `<cell>/op`, one row an edge."""
        subsets = self.normal_ops if cell == "normal" else self.reduce_ops
        if subsets is None:
            allowed = (tuple(range(len(self.ops))),) * len(self.edges)
        else:
            if len(subsets) != len(self.edges):
                raise ValueError(
                    f"space.{cell}_ops lists {len(subsets)} edges; {self.nodes} nodes have {len(self.edges)}"
                )
            unknown = sorted({op for ops in subsets for op in ops} - set(self.ops))
            if unknown or not all(set(ops) - {"none"} for ops in subsets):
                raise ValueError(
                    f"space.{cell}_ops: every edge needs an operation besides none, and only ones of "
                    f"space.ops ({', '.join(self.ops)}); not there: {unknown or 'none of them'}"
                )
            allowed = tuple(tuple(i for i, op in enumerate(self.ops) if op in ops) for ops in subsets)
        return Choices(f"{cell}/op", tuple(f"{cell}/{n}<-{s}" for n, s in self.edges), self.ops, allowed)

    def input_choices(self, cell: CellType) -> Choices:
        """Which inputs each node of `cell` keeps: table `<cell>/input`, one row a node."""
        nodes = range(2, self.nodes + 2)
        return Choices(
            name=f"{cell}/input",
            rows=tuple(f"{cell}/{node}" for node in nodes),
            options=tuple(str(source) for source in range(self.nodes + 1)),
            allowed=tuple(tuple(range(node)) for node in nodes),
            pick=self.inputs_per_node,
        )

    @cached_property
    def choices(self) -> dict[str, Choices]:
        """All decisions of the space by name: operations and inputs, normal and reduce."""
        tables = [table(cell) for cell in CELL_TYPES for table in (self.op_choices, self.input_choices)]
        return {choices.name: choices for choices in tables}

    def sample(self, rng: random.Random) -> Genotype:
        """Genotype drawn uniformly: distinct inputs for every node, any operation but none on each."""
        cells = {}
        for cell in CELL_TYPES:
            allowed = self.op_choices(cell).allowed
            edge_of = {edge: index for index, edge in enumerate(self.edges)}
            nodes = []
            for node in range(2, self.nodes + 2):
                sources = sorted(rng.sample(range(node), self.inputs_per_node))
                ops = [
                    [self.ops[o] for o in allowed[edge_of[node, s]] if self.ops[o] != "none"] for s in sources
                ]
                nodes.append(tuple((rng.choice(names), s) for names, s in zip(ops, sources, strict=True)))
            cells[cell] = Cell(tuple(nodes), tuple(range(2, self.nodes + 2)))
        return Genotype(normal=cells["normal"], reduce=cells["reduce"])

    def genotype(self, picks: Picks) -> Genotype:
        """Genotype of `picks`; every node lists its inputs by ascending predecessor."""
        cells = {}
        for cell in CELL_TYPES:
            nodes: list[list[tuple[str, int]]] = [[] for _ in range(self.nodes)]
            for (node, source), options in zip(self.edges, picks[f"{cell}/op"], strict=True):
                nodes[node - 2] += [(self.ops[option], source) for option in options]
            cells[cell] = Cell(tuple(map(tuple, nodes)), tuple(range(2, self.nodes + 2)))
        return Genotype(normal=cells["normal"], reduce=cells["reduce"])

    def picks(self, genotype: Genotype) -> Picks:
        """Options of this space that `genotype` takes.

        Raises:
            ValueError: the genotype has another number of nodes, another number of inputs at one or one input
                twice, an output of other nodes than all, or an operation its edge does not allow.
        """
        picks: Picks = {}
        for cell in CELL_TYPES:
            nodes, concat = getattr(genotype, cell).nodes, getattr(genotype, cell).concat
            if len(nodes) != self.nodes:
                raise ValueError(f"{cell} cell has {len(nodes)} nodes; space {self.name!r} has {self.nodes}")
            if len(concat) != self.nodes:
                raise ValueError(f"{cell} cell outputs nodes {concat}; space {self.name!r} outputs all")
            if any(
                len(set(inputs)) != self.inputs_per_node or len(inputs) > len(set(inputs)) for inputs in nodes
            ):
                raise ValueError(
                    f"{cell} cell does not keep {self.inputs_per_node} different inputs at every node, "
                    f"as space {self.name!r} does"
                )
            taken: dict[tuple[int, int], list[int]] = {edge: [] for edge in self.edges}
            for node, inputs in enumerate(nodes, start=2):
                for op, source in inputs:
                    row = self.edges.index((node, source))
                    allowed = [self.ops[option] for option in self.op_choices(cell).allowed[row]]
                    if op not in allowed:
                        raise ValueError(
                            f"{op} on {cell}/{node}<-{source} is not in the space; "
                            f"allowed: {', '.join(allowed)}"
                        )
                    taken[node, source].append(self.ops.index(op))
            picks[f"{cell}/op"] = tuple(tuple(sorted(taken[edge])) for edge in self.edges)
            picks[f"{cell}/input"] = tuple(
                tuple(s for s in range(node) if taken[node, s]) for node in range(2, self.nodes + 2)
            )
        return picks


def _s1(*edges: str) -> tuple[tuple[str, ...], ...]:
    names = {
        "sk": "skip_connect",
        "s3": "sep_conv_3x3",
        "d3": "dil_conv_3x3",
        "d5": "dil_conv_5x5",
        "mp": "max_pool_3x3",
        "ap": "avg_pool_3x3",
    }
    return tuple(tuple(names[op] for op in edge.split("|")) for edge in edges)


SPACES = {
    "darts": CellSpace(),
    "s1": CellSpace(
        name="s1",
        ops=DARTS_OPS[1:],
        normal_ops=_s1(
            *"sk|d3 sk|d5 sk|d5 sk|s3 sk|d3 mp|sk sk|s3 sk|s3 sk|d3 sk|s3 mp|sk sk|d3 d3|d5 d3|d5".split()
        ),
        reduce_ops=_s1(
            *"mp|ap mp|d3 mp|ap mp|ap sk|d5 mp|ap mp|s3 sk|d3 sk|d5 mp|ap mp|ap sk|d5 sk|d5 sk|d5".split()
        ),
    ),
    "s2": CellSpace(name="s2", ops=("skip_connect", "sep_conv_3x3")),
    "s3": CellSpace(name="s3", ops=("none", "skip_connect", "sep_conv_3x3")),
    "s4": CellSpace(name="s4", ops=("noise", "sep_conv_3x3")),
}
"""Spaces by name: the full one and the four of RobustDARTS."""
