"""Pictures of genotypes: both cells as layered graphs, in SVG and PNG.

Each node has a row per input, and the name of an operation stands on its row: names cannot overlap, and two
edges between the same nodes stay apart. An edge that passes a layer has a lane of its own there, so that it
crosses no node and no name. All lengths are in inches.
"""

from dataclasses import dataclass
from io import BytesIO
from itertools import chain, combinations, pairwise
from statistics import fmean
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path

from nas.genotype import Cell, Genotype

STYLES: dict[str, tuple[str, tuple[float, ...]]] = {
    "skip": ("#CC79A7", (1, 1)),
    "max": ("#009E73", (4, 1.5, 1, 1.5)),
    "avg": ("#009E73", (4, 1.5, 1, 1.5)),
    "sep": ("#0072B2", ()),
    "dil": ("#D55E00", (5, 2)),
    "conv": ("#E69F00", (8, 1.5)),
    "noise": ("#000000", (2, 1, 1, 1, 1, 1)),
    "none": ("#999999", (1, 3)),
}
"""Colour and dashes by the first word of an operation; Okabe and Ito's colours, for the colour-blind too."""

_OUTPUT_STYLE: tuple[str, tuple[float, ...]] = ("#999999", ())

_ROW = 0.27  # height of an input of a node, with room for its name
_LANE = 0.2  # height of an edge that passes a layer
_PORT = 0.08  # distance of two edges that leave one node
_MARGIN = 0.13  # between a node and its neighbours in the layer
_NODE = 0.34  # width of a node, and its least height
_INPUT = 0.6  # width of an input
_ARROW = 0.1
_HEADING = 0.42
_TITLE = 0.3
_BORDER = 0.15
_FONT = 8.5  # points
_LETTER = 0.068  # width of a letter at that size


def genotype_svg(genotype: Genotype, title: str = "") -> str:
    """Picture of both cells as SVG; the same arguments give the same text."""
    return _rendered(genotype, title, "svg").decode()


def genotype_png(genotype: Genotype, title: str = "") -> bytes:
    """Picture of both cells as PNG; the same arguments give the same bytes."""
    return _rendered(genotype, title, "png")


def _rendered(genotype: Genotype, title: str, file_format: Literal["svg", "png"]) -> bytes:
    name = title or f"Genotype {genotype.key}"
    metadata = {
        "svg": {"Title": name, "Description": str(genotype), "Creator": None, "Date": None},
        "png": {"Title": name, "Description": str(genotype), "Software": None},
    }
    buffer = BytesIO()
    settings: Any = {  # matplotlib types the keys since 3.11 only
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "mathtext.fontset": "dejavusans",
        "savefig.bbox": None,
        "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
        "svg.hashsalt": "nas.draw",  # else the identifiers in the file are random
        "text.usetex": False,
    }
    with rc_context(settings):
        figure = _figure(genotype, title)
        figure.savefig(buffer, format=file_format, dpi=150, metadata=metadata[file_format], facecolor="white")
    return buffer.getvalue()


def _figure(genotype: Genotype, title: str) -> Figure:
    cells = {"Normal cell": _Layout(genotype.normal), "Reduction cell": _Layout(genotype.reduce)}
    width = max(1.5 * _LETTER * len(title), *(layout.width for layout in cells.values())) + 2 * _BORDER
    height = sum(_HEADING + layout.height for layout in cells.values()) + 2 * _BORDER
    height += _TITLE if title else 0
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    top = height - _BORDER
    if title:
        top -= _TITLE
        axes.text(_BORDER, top + 0.12, title, fontsize=_FONT + 3, fontweight="bold", parse_math=False)
    for heading, layout in cells.items():
        top -= _HEADING
        axes.text(_BORDER, top + 0.12, heading, fontsize=_FONT + 1, fontweight="bold")
        top -= layout.height
        _draw_cell(axes, layout, _BORDER, top)
    return figure


# Layout


@dataclass(frozen=True)
class _Edge:
    """An input of a node, or of the output, where the operation is empty; parallel edges differ in index."""

    index: int
    source: int
    target: int
    operation: str


_Place = int | tuple[_Edge, int]
"""What has a position in a layer: a node, or the lane of an edge that passes the layer of that number."""

_Steps = list[list[tuple[_Edge, _Place, _Place]]]
"""Per gap between two layers, the edges that cross it, each with its places left and right of the gap."""


class _Layout:
    """Positions of the nodes and edges of one cell, the bottom left corner at (0, 0).

    Nodes stand in layers by depth: inputs in the first, the output, numbered after the nodes, in the last.
    """

    def __init__(self, cell: Cell) -> None:
        self.output = len(cell.nodes) + 2
        ends = [(pred, node, op) for node, inputs in enumerate(cell.nodes, start=2) for op, pred in inputs]
        ends += [(node, self.output, "") for node in sorted(cell.concat)]
        edges = [_Edge(index, *end) for index, end in enumerate(ends)]

        self.layer_of = {0: 0, 1: 0}
        for node, inputs in enumerate(cell.nodes, start=2):
            self.layer_of[node] = 1 + max(self.layer_of[pred] for _, pred in inputs)
        self.layer_of[self.output] = 1 + max(self.layer_of.values())
        layers: list[list[_Place]] = [[] for _ in range(self.layer_of[self.output] + 1)]
        for node, layer in self.layer_of.items():
            layers[layer].append(node)

        self.routes: dict[_Edge, list[_Place]] = {}
        steps: _Steps = [[] for _ in layers[1:]]
        for edge in edges:
            first, last = self.layer_of[edge.source], self.layer_of[edge.target]
            lanes = [(edge, layer) for layer in range(first + 1, last)]
            for lane in lanes:
                layers[lane[1]].append(lane)
            self.routes[edge] = [edge.source, *lanes, edge.target]
            for layer, (here, there) in enumerate(pairwise(self.routes[edge]), start=first):
                steps[layer].append((edge, here, there))

        layers = _few_crossings(layers, steps)
        self._set_ports(layers)
        self._set_y(layers, steps)
        self._set_x(steps)

    def start(self, edge: _Edge, place: _Place) -> float:
        """Height at which an edge leaves a place."""
        return self.y[place] + (self.leave[edge] if place == edge.source else 0.0)

    def end(self, edge: _Edge, place: _Place) -> float:
        """Height at which an edge enters a place."""
        return self.y[place] + (self.enter[edge] if place == edge.target else 0.0)

    def _set_ports(self, layers: list[list[_Place]]) -> None:
        """Heights of places, and where edges enter and leave nodes, relative to the middle of the node."""
        rank = _ranks(layers)
        self.heights: dict[_Place, float] = dict.fromkeys(rank, _LANE)
        self.enter: dict[_Edge, float] = {}
        self.leave: dict[_Edge, float] = {}
        for node in range(self.output + 1):
            entering = [edge for edge in self.routes if edge.target == node]
            entering.sort(key=lambda edge: (rank[self.routes[edge][-2]], edge.index))
            leaving = [edge for edge in self.routes if edge.source == node]
            leaving.sort(key=lambda edge: (rank[self.routes[edge][1]], edge.index))
            row = _ROW if node < self.output else _LANE
            self.heights[node] = max(_NODE, row * len(entering), _PORT * (len(leaving) + 1))
            for position, edge in enumerate(entering):
                self.enter[edge] = row * ((len(entering) - 1) / 2 - position)
            for position, edge in enumerate(leaving):
                self.leave[edge] = _PORT * ((len(leaving) - 1) / 2 - position)

    def _set_y(self, layers: list[list[_Place]], steps: _Steps) -> None:
        """Middles of places, such that edges are level where the order of the layers allows it."""
        self.y: dict[_Place, float] = {place: 0.0 for layer in layers for place in layer}
        for sweep in range(40):
            for layer in layers if sweep % 2 == 0 else reversed(layers):
                wishes: dict[_Place, list[float]] = {place: [] for place in layer}
                for edge, here, there in chain.from_iterable(steps):
                    rise = self.end(edge, there) - self.start(edge, here)
                    # A long edge is easiest to follow where it goes straight on.
                    weight = 1 if here == edge.source or there == edge.target else 4
                    if there in wishes:
                        wishes[there] += [self.y[there] - rise] * weight
                    if here in wishes:
                        wishes[here] += [self.y[here] + rise] * weight
                self._move(layer, [fmean(wishes[place]) if wishes[place] else 0.0 for place in layer])
        bottom = min(y - self.heights[place] / 2 for place, y in self.y.items())
        self.y = {place: y - bottom for place, y in self.y.items()}
        self.height = max(y + self.heights[place] / 2 for place, y in self.y.items())

    def _move(self, layer: list[_Place], wishes: list[float]) -> None:
        """Move the places of a layer as near to `wishes` as order and distances allow, by least squares."""
        below = [0.0]  # of each place, relative to the first
        for upper, lower in pairwise(layer):
            margin = _MARGIN if isinstance(upper, int) or isinstance(lower, int) else 0.0
            below.append(below[-1] + (self.heights[upper] + self.heights[lower]) / 2 + margin)
        # Isotonic regression: blocks of places that touch, as (where the first place would be, members).
        blocks: list[tuple[float, int]] = []
        for wish, offset in zip(wishes, below, strict=True):
            start, members = wish + offset, 1
            while blocks and blocks[-1][0] < start:
                other, others = blocks.pop()
                start, members = (start * members + other * others) / (members + others), members + others
            blocks.append((start, members))
        starts = chain.from_iterable([start] * members for start, members in blocks)
        for place, start, offset in zip(layer, starts, below, strict=True):
            self.y[place] = start - offset

    def _set_x(self, steps: _Steps) -> None:
        """Left and right edges of the layers; the name of an operation stands in the layer where it ends."""
        self.left, self.right = [0.0], [_INPUT]
        for layer, crossing in enumerate(steps, start=1):
            rise = max(abs(self.end(edge, there) - self.start(edge, here)) for edge, here, there in crossing)
            self.left.append(self.right[-1] + min(max(0.45, 0.35 * rise), 1.1))
            letters = max(len(edge.operation) for edge in self.routes if self.layer_of[edge.target] == layer)
            self.right.append(self.left[-1] + letters * _LETTER + 2 * _ARROW + _NODE)
        self.width = self.right[-1]


def _ranks(layers: list[list[_Place]]) -> dict[_Place, float]:
    """Positions of places in their layers, relative to the middle of the layer."""
    return {place: i - (len(layer) - 1) / 2 for layer in layers for i, place in enumerate(layer)}


def _few_crossings(layers: list[list[_Place]], steps: _Steps) -> list[list[_Place]]:
    """The layers, all but the first reordered so that few edges cross and, where that is equal, rise little.

    As usual for layered graphs: sort by the mean position of neighbours, then swap places while that helps.
    """

    def cost(candidate: list[list[_Place]]) -> tuple[int, float]:
        rank = _ranks(candidate)
        crossings, rise = 0, 0.0
        for crossing in steps:
            spans = [(rank[here], rank[there]) for _, here, there in crossing]
            crossings += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(spans, 2))
            rise += sum(abs(a - b) for a, b in spans)
        return crossings, rise

    def sorted_by_neighbours(candidate: list[list[_Place]], forward: bool) -> list[list[_Place]]:
        candidate = list(candidate)
        for layer in range(1, len(candidate)) if forward else range(len(candidate) - 2, 0, -1):
            rank = _ranks(candidate)
            neighbours: dict[_Place, list[float]] = {place: [] for place in candidate[layer]}
            for _, here, there in steps[layer - 1 if forward else layer]:
                place, neighbour = (there, here) if forward else (here, there)
                neighbours[place].append(rank[neighbour])
            mean = {place: fmean(ranks) if ranks else rank[place] for place, ranks in neighbours.items()}
            candidate[layer] = sorted(candidate[layer], key=mean.__getitem__)
        return candidate

    def swapped(candidate: list[list[_Place]]) -> list[list[_Place]]:
        candidate = [list(layer) for layer in candidate]
        lowest, before = cost(candidate), None
        while lowest != before:
            before = lowest
            for layer in candidate[1:]:
                for i, j in combinations(range(len(layer)), 2):
                    layer[i], layer[j] = layer[j], layer[i]
                    if (new := cost(candidate)) < lowest:
                        lowest = new
                    else:
                        layer[i], layer[j] = layer[j], layer[i]
        return candidate

    candidates = [layers]
    for sweep in range(8):
        candidates.append(sorted_by_neighbours(candidates[-1], forward=sweep % 2 == 0))
    return min((swapped(candidate) for candidate in (layers, min(candidates, key=cost))), key=cost)


# Drawing


def _draw_cell(axes: Axes, layout: _Layout, x: float, y: float) -> None:
    for edge in layout.routes:
        _draw_edge(axes, layout, edge, x, y)
    for node in layout.layer_of:
        _draw_node(axes, layout, node, x, y)


def _draw_edge(axes: Axes, layout: _Layout, edge: _Edge, x: float, y: float) -> None:
    colour, dashes = STYLES[edge.operation.split("_")[0]] if edge.operation else _OUTPUT_STYLE
    first, route = layout.layer_of[edge.source], layout.routes[edge]
    points, codes = [(layout.right[first], layout.start(edge, edge.source))], [Path.MOVETO]
    for layer, place in enumerate(route[1:], start=first + 1):
        left, right, level = layout.left[layer], layout.right[layer], layout.end(edge, place)
        middle = (points[-1][0] + left) / 2
        points += [(middle, points[-1][1]), (middle, level), (left, level), (right, level)]
        codes += [Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    tip_x, tip_y = points[-1][0] - _NODE, points[-1][1]
    points[-1] = (tip_x - _ARROW / 2, tip_y)
    arrow = [(tip_x, tip_y), (tip_x - _ARROW, tip_y + 0.4 * _ARROW), (tip_x - _ARROW, tip_y - 0.4 * _ARROW)]

    line = Path([(x + px, y + py) for px, py in points], codes)
    style = {"linewidth": 1.6 if edge.operation else 1.0, "linestyle": (0, dashes) if dashes else "solid"}
    axes.add_patch(PathPatch(line, fill=False, edgecolor=colour, capstyle="butt", **style))
    axes.add_patch(Polygon([(x + px, y + py) for px, py in arrow], facecolor=colour, linewidth=0))
    if edge.operation:
        name = edge.operation.replace("_", " ")
        axes.text(x + tip_x - _ARROW - 0.04, y + tip_y + 0.045, name, fontsize=_FONT, ha="right")


def _draw_node(axes: Axes, layout: _Layout, node: int, x: float, y: float) -> None:
    names = {0: "$c_{k-2}$", 1: "$c_{k-1}$", layout.output: "$c_k$"}
    width, height = _INPUT if node < 2 else _NODE, layout.heights[node]
    left, bottom = x + layout.right[layout.layer_of[node]] - width, y + layout.y[node] - height / 2
    box = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="#F3F3F3" if node in names else "#DCE9F5",
        edgecolor="#444444",
        linewidth=0.8,
    )
    axes.add_patch(box)
    middle = (left + width / 2, bottom + height / 2)
    axes.text(*middle, names.get(node, str(node)), fontsize=_FONT + 1, ha="center", va="center")
