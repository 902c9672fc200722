"""Genotypes: the architectures of a cell search, their text and JSON forms, which are one network, how alike.

Standard library only, so that analysis can read genotypes without PyTorch.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeGuard

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_7x1_1x7",
    "noise",
    "conv_1x3_3x1",
    "max_pool_3x3_bn",
)
"""Names of the known operations.

Most are those of DARTS (arXiv:1806.09055); `sep_conv_7x7` and `conv_7x1_1x7` occur in NASNet and AmoebaNet,
`noise` in space S4 of RobustDARTS (arXiv:1909.09656), and the last two in the fixed reduction cell of GDAS
(arXiv:1910.04465).
"""

Edge = tuple[str, int]
"""One input of a node: the operation and the predecessor it is applied to."""

_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")


@dataclass(frozen=True)
class Cell:
    """A directed acyclic graph of operations: two inputs, intermediate nodes, one concatenated output.

    Node 0 is the output of the cell before the previous one, node 1 that of the previous cell, and `nodes[i]`
    lists the inputs of intermediate node i + 2, whose value is their sum. The cell outputs the concatenation
    of `concat`. `==` and `hash` compare the cell as written; `Genotype.key` compares networks.

    The counts `skips`, `depth` and `input_edges` are of the edges that act: not `none`, and not into a node
    that does not reach the output.

    Raises:
        ValueError: there is no node, an operation is unknown, a node has no input or one not before it, or
            `concat` is empty, repeats a node or names one that is not an intermediate node.
    """

    nodes: tuple[tuple[Edge, ...], ...]
    """Per intermediate node, numbered from 2, its inputs as (operation, predecessor)."""

    concat: tuple[int, ...]
    """The intermediate nodes that form the output, in this order."""

    def __post_init__(self) -> None:
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(f"{self} holds lists; use tuples, or Cell.from_pairs") from error
        if not self.nodes:
            raise ValueError("the cell has no nodes; give it at least one")
        for node, inputs in enumerate(self.nodes, start=2):
            if not inputs:
                raise ValueError(f"node {node} has no input; give it at least one, or remove the node")
            for edge in inputs:
                _check_edge(edge, node)
        existing = range(2, len(self.nodes) + 2)
        choice = f"name some of the nodes {', '.join(map(str, existing))}"
        if not self.concat:
            raise ValueError(f"concat is empty, so the cell has no output; {choice}")
        for position, node in enumerate(self.concat):
            if not _is_int(node) or node not in existing:
                raise ValueError(f"concat names {node!r}, which is not an intermediate node; {choice}")
            if node in self.concat[:position]:
                raise ValueError(f"concat names node {node} twice; name each node at most once")

    @classmethod
    def from_pairs(cls, pairs: Iterable[Edge], concat: Iterable[int], inputs_per_node: int = 2) -> "Cell":
        """Cell of a flat list of (operation, predecessor) in node order, `inputs_per_node` to a node."""
        edges = [_edge(pair) for pair in pairs]
        if inputs_per_node < 1 or len(edges) % inputs_per_node:
            raise ValueError(
                f"{len(edges)} pairs do not give every node inputs_per_node={inputs_per_node} inputs; "
                "add the missing pairs, or list the inputs node by node"
            )
        starts = range(0, len(edges), inputs_per_node)
        return cls(tuple(tuple(edges[i : i + inputs_per_node]) for i in starts), tuple(concat))

    @property
    def skips(self) -> int:
        """Number of skip connections."""
        return sum(op == "skip_connect" for op, _ in _acting_edges(self))

    @property
    def depth(self) -> int:
        """Number of edges on the longest path from an input to an intermediate node."""
        longest = {0: 0, 1: 0}
        for node, inputs in enumerate(_live(self).nodes, start=2):
            # A node that sums `none` only is reached from no input, and no path starts at it.
            lengths = [longest[pred] + 1 for op, pred in inputs if op != "none" and pred in longest]
            if lengths:
                longest[node] = max(lengths)
        return max(longest.values())

    @property
    def input_edges(self) -> int:
        """Number of edges that leave the two inputs."""
        return sum(predecessor < 2 for _, predecessor in _acting_edges(self))


@dataclass(frozen=True)
class Genotype:
    """One architecture of a cell search: the cell that keeps the resolution and the cell that halves it.

    Two identities, on purpose: `==` and `hash` compare genotypes exactly as written, so that records and
    round trips lose nothing, while `key` is equal for all ways to write down one network.
    """

    normal: Cell
    reduce: Cell

    def __str__(self) -> str:
        """Text form that papers and their code print, on one line.

        A cell is a flat list of (operation, predecessor) if each node has two inputs, else one list per node.
        """
        return (
            f"Genotype(normal={_edges_text(self.normal)}, normal_concat={list(self.normal.concat)}, "
            f"reduce={_edges_text(self.reduce)}, reduce_concat={list(self.reduce.concat)})"
        )

    @classmethod
    def parse(cls, text: str) -> "Genotype":
        """Genotype of a text form, flat or one list per node; `range(2, 6)` may stand for a concat.

        The text is read as Python literals and never executed.

        Raises:
            ValueError: the text is not of that form, or a cell is invalid.
        """
        try:
            call = ast.parse(f"(\n{text}\n)", mode="eval").body  # in brackets any line break is fine
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(f"{_short(text)} is not a genotype: {error}; {_FORM}") from error
        if not _is_call(call, "Genotype"):
            raise ValueError(f"{_short(text)} is not a genotype; {_FORM}")
        fields = {str(keyword.arg): _value(keyword) for keyword in call.keywords}
        if call.args or len(fields) < len(call.keywords):
            raise ValueError(f"{_short(text)} has unnamed or repeated fields; {_FORM}")
        return _from_fields(fields)

    def to_json(self) -> dict[str, list[Any]]:
        """Form that JSON can hold: the fields of the text form, each cell as one list per node."""
        return {
            "normal": _edges_json(self.normal),
            "normal_concat": list(self.normal.concat),
            "reduce": _edges_json(self.reduce),
            "reduce_concat": list(self.reduce.concat),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Genotype":
        """Genotype of the JSON form.

        Raises:
            ValueError: a field is missing or unknown, or a cell is invalid.
        """
        return _from_fields(fields)

    def canonical(self) -> "Genotype":
        """Representative of all genotypes that describe the same network up to names.

        The inputs of a node have no order, intermediate nodes may be numbered in any topological order, and
        the order of the concatenation only permutes channels. Nodes that do not reach the output are removed,
        and so is a `none` beside another input, since it adds zero; where a node has nothing else, one `none`
        stays. Two nodes of equal inputs stay two nodes: each has its own weights.
        """
        return Genotype(_canonical(self.normal), _canonical(self.reduce))

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits, equal for genotypes of one network: SHA-256 of the canonical text."""
        return hashlib.sha256(str(self.canonical()).encode()).hexdigest()[:12]


Part = tuple[str, int, int, str]
"""Cell, node, predecessor, operation."""


def parts(genotype: Genotype) -> list[Part]:
    """Every edge of a genotype as written, sorted."""
    return sorted(
        (cell, node, source, op)
        for cell in ("normal", "reduce")
        for node, inputs in enumerate(getattr(genotype, cell).nodes, start=2)
        for op, source in inputs
    )


def jaccard(one: Genotype, other: Genotype) -> float:
    """Edges that two genotypes share over edges that either has, from 0 to 1; numbered as written."""
    first, second = set(parts(one)), set(parts(other))
    return len(first & second) / len(first | second)


# Validation


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_edge(edge: object, node: int) -> None:
    operation, predecessor = _edge(edge)
    if operation not in OPERATIONS:
        raise ValueError(
            f"node {node} has unknown operation {operation!r}; use one of {', '.join(OPERATIONS)}"
        )
    if not _is_int(predecessor) or not 0 <= predecessor < node:
        raise ValueError(
            f"node {node} has predecessor {predecessor!r}, not a node before it; use 0 to {node - 1}"
        )


def _edge(value: object) -> Edge:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{value!r} is not an edge; write (operation, predecessor), e.g. ('none', 0)")
    return (value[0], value[1])


# Text and JSON forms

_FORM = f"write Genotype({', '.join(f'{name}=[...]' for name in _FIELDS)})"


def _edges_text(cell: Cell) -> str:
    if all(len(inputs) == 2 for inputs in cell.nodes):
        return str(list(chain.from_iterable(cell.nodes)))
    return str([list(inputs) for inputs in cell.nodes])


def _edges_json(cell: Cell) -> list[list[list[str | int]]]:
    return [[list(edge) for edge in inputs] for inputs in cell.nodes]


def _short(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")


def _is_call(expression: ast.expr, name: str) -> TypeGuard[ast.Call]:
    return (
        isinstance(expression, ast.Call)
        and isinstance(expression.func, ast.Name)
        and expression.func.id == name
    )


def _value(field: ast.keyword) -> object:
    """The literal or the `range` that a field is given."""
    try:
        if _is_call(field.value, "range") and not field.value.keywords:
            return range(*[ast.literal_eval(bound) for bound in field.value.args])
        return ast.literal_eval(field.value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"field {field.arg} is not a list of literals; {_FORM}") from error


def _from_fields(fields: Mapping[str, Any]) -> Genotype:
    if set(fields) != set(_FIELDS):
        raise ValueError(f"fields {sorted(map(str, fields))} are not those of a genotype; {_FORM}")
    cells = {}
    for name in ("normal", "reduce"):
        try:
            cells[name] = _cell(fields[name], fields[f"{name}_concat"])
        except ValueError as error:
            raise ValueError(f"{name} cell: {error}") from error
    return Genotype(cells["normal"], cells["reduce"])


def _cell(nodes: object, concat: object) -> Cell:
    if not isinstance(nodes, list | tuple):
        raise ValueError(f"{nodes!r} is not a list; list the (operation, predecessor) inputs of the nodes")
    if not isinstance(concat, list | tuple | range):
        raise ValueError(f"concat={concat!r} is not a list; write e.g. [2, 3, 4, 5] or range(2, 6)")
    if concat[len(nodes) :]:  # a mistyped range must not fill the memory
        raise ValueError(f"concat={_short(str(concat))} is longer than the cell; name each node at most once")
    if all(isinstance(item, list | tuple) and item and isinstance(item[0], str) for item in nodes):
        return Cell.from_pairs(nodes, concat)
    for inputs in nodes:
        if not isinstance(inputs, list | tuple):
            raise ValueError(f"{inputs!r} is neither an edge nor the list of a node's inputs; {_FORM}")
    return Cell(tuple(tuple(map(_edge, inputs)) for inputs in nodes), tuple(concat))


# The network behind a cell


def _live(cell: Cell) -> Cell:
    """The cell without what has no effect: nodes that do not reach the output, zeros that are added."""
    inputs_of = {}
    for node, inputs in enumerate(cell.nodes, start=2):
        acting = tuple(edge for edge in inputs if edge[0] != "none")
        inputs_of[node] = acting or (("none", 0),)  # a zero is the same zero whatever it is made from
    reached = set(cell.concat)
    for node in sorted(inputs_of, reverse=True):
        if node in reached:
            reached.update(predecessor for _, predecessor in inputs_of[node])
    kept = [node for node in inputs_of if node in reached]
    return _renumbered(inputs_of, kept, cell.concat)


def _acting_edges(cell: Cell) -> Iterator[Edge]:
    return (edge for edge in chain.from_iterable(_live(cell).nodes) if edge[0] != "none")


def _renumbered(inputs_of: Mapping[int, tuple[Edge, ...]], order: list[int], concat: Iterable[int]) -> Cell:
    """The cell whose nodes 2, 3, ... are the nodes in `order`, with sorted inputs and sorted concat."""
    new = {0: 0, 1: 1} | {node: position for position, node in enumerate(order, start=2)}
    nodes = [sorted((new[pred], op) for op, pred in inputs_of[node]) for node in order]
    return Cell(
        tuple(tuple((op, pred) for pred, op in inputs) for inputs in nodes),
        tuple(sorted(new[node] for node in concat)),
    )


def _canonical(cell: Cell) -> Cell:
    live = _live(cell)
    inputs_of = dict(enumerate(live.nodes, start=2))
    cells = (_renumbered(inputs_of, order, live.concat) for order in _orders(inputs_of, live.concat))
    return min(cells, key=lambda candidate: (candidate.nodes, candidate.concat))


def _orders(inputs_of: Mapping[int, tuple[Edge, ...]], concat: Iterable[int]) -> Iterator[list[int]]:
    """Topological orders of the nodes; isomorphic cells give, up to names, the same set of them.

    Nodes are told apart by integer labels that depend on structure alone. Where structure leaves a tie, each
    of the tied nodes is put first in turn (individualisation and refinement, as in graph isomorphism).
    """
    consumers: dict[int, list[Edge]] = {node: [] for node in inputs_of}
    level = {0: 0, 1: 0}
    for node, inputs in inputs_of.items():
        level[node] = 1 + max(level[pred] for _, pred in inputs)
        for op, pred in inputs:
            if pred in consumers:
                consumers[pred].append((op, node))

    def search(labels: dict[int, int]) -> Iterator[list[int]]:
        labels = _refined(labels, inputs_of, consumers)
        order = sorted(labels, key=lambda node: labels[node])
        groups = ([other for other in order if labels[other] == labels[node]] for node in order)
        tied = next((group for group in groups if len(group) > 1), None)
        if tied is None:
            yield order
            return
        tried = set()
        for node in tied:
            # Swapping two nodes of equal inputs and consumers changes nothing: one stands for both.
            twins = (tuple(sorted(inputs_of[node])), tuple(sorted(consumers[node])))
            if twins not in tried:
                tried.add(twins)
                yield from search({other: 2 * label - (other == node) for other, label in labels.items()})

    # The level counts most, so every order by label is topological.
    yield from search({node: 2 * level[node] + (node in concat) for node in inputs_of})


def _refined(
    labels: dict[int, int], inputs_of: Mapping[int, Iterable[Edge]], consumers: Mapping[int, Iterable[Edge]]
) -> dict[int, int]:
    """Labels split by the labels of predecessors and consumers until none splits; their order is kept."""
    while True:
        label_of = {0: -2, 1: -1} | labels
        surroundings = {
            node: (
                labels[node],
                tuple(sorted((op, label_of[pred]) for op, pred in inputs_of[node])),
                tuple(sorted((op, label_of[consumer]) for op, consumer in consumers[node])),
            )
            for node in labels
        }
        ranks = {value: rank for rank, value in enumerate(sorted(set(surroundings.values())))}
        split = len(ranks) > len(set(labels.values()))
        labels = {node: ranks[value] for node, value in surroundings.items()}
        if not split:
            return labels
