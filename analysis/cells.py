"""Cells that the searches of an arm found, side by side, and how far the searches agree on each edge.

A cell is drawn as a staircase: the nodes from left to right, each lower than the one before, with a row per
input that holds its operation. An edge leaves its source downwards and turns right into its row, so that
edges cross at right angles only, and run through no box and no name.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from analysis.plots import GREY, INK, blank

KINDS = {"normal": "normal", "reduce": "reduction"}
"""Cells of a genotype by the name of their nodes in its JSON form, and the words for them."""

MOST = 6
"""Searches that one figure has room for."""

_ROW, _GAP = 0.17, 0.08  # inches: height of an input of a node, and between nodes
_BOX, _INPUT, _SPACE = (
    0.58,
    0.34,
    0.08,
)  # inches: widths of a node and of an input of the cell, and between them
_FONT = 7.5
_WIDTH = 3.6  # inches that a cell has at that size of letters

_PALETTE = LinearSegmentedColormap.from_list("agreement", mpl.colormaps["Blues"](np.linspace(0.35, 1, 64)))


def edges(genotypes: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Edges of the cells of several searches, each with the share of the searches that found it, too.

    Args:
        genotypes: the name of each search, and its genotype as JSON text.

    Columns:
        search, cell, node, row: where the edge ends: `row` numbers the inputs of its node.
        source, operation: of the edge; sources 0 and 1 are the inputs of the cell.
        output: whether the node is part of the output of the cell.
        agreement, low, high, n: share of the n searches that have an edge of this cell, node, source and
            operation, with its 95 % interval (Wilson).
    """
    found = pd.DataFrame([row for search, text in genotypes for row in _rows(search, json.loads(text))])
    same = ["cell", "node", "source", "operation"]
    found["n"] = len(genotypes)
    # A node may have the same edge twice, and it is still one search that found it.
    counts = found.drop_duplicates(["search", *same]).groupby(same).size().rename("k")
    found = found.join(counts, on=same)
    found["agreement"] = found["k"] / found["n"]
    tests = [stats.binomtest(k, len(genotypes)).proportion_ci(method="wilson") for k in found["k"].tolist()]
    found["low"], found["high"] = [float(test.low) for test in tests], [float(test.high) for test in tests]
    return found.drop(columns="k")


def _rows(search: str, genotype: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in KINDS:
        for node, inputs in enumerate(genotype[cell], start=2):
            for row, (operation, source) in enumerate(inputs):
                yield {
                    "search": search,
                    "cell": cell,
                    "node": node,
                    "row": row,
                    "source": source,
                    "operation": operation,
                    "output": node in genotype[f"{cell}_concat"],
                }


def grid(table: pd.DataFrame) -> Figure:
    """Both cells of each search of `edges`, a row per search, in the order of the table."""
    searches = list(dict.fromkeys(table["search"]))
    most = max(_height(cell) for _, cell in table.groupby(["search", "cell"]))
    figure = blank("", (most + 0.3) * len(searches) + 0.4)
    panels = figure.subplots(len(searches), len(KINDS), squeeze=False)
    for row, search in zip(panels, searches, strict=True):
        for axes, (kind, word) in zip(row, KINDS.items(), strict=True):
            axes.set_title(f"{search}: {word} cell", fontsize=8.5, loc="left")
            _draw(axes, table[(table["search"] == search) & (table["cell"] == kind)], most)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _PALETTE),
        ax=list(panels.flat),
        location="bottom",
        aspect=50,
        pad=0.01,
    )
    bar.set_label("share of the searches that found this edge with this operation", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    return figure


def _height(cell: pd.DataFrame) -> float:
    return _ROW + _GAP + len(cell) * _ROW + cell["node"].nunique() * _GAP


def _draw(axes: Axes, cell: pd.DataFrame, height: float) -> None:
    inputs = Counter(cell["node"].tolist())
    left: dict[int, float] = {0: 0.0, 1: _INPUT + _SPACE}
    left |= {node: 2 * (_INPUT + _SPACE) + index * (_BOX + _SPACE) for index, node in enumerate(inputs)}
    width = max(left.values()) + _BOX
    axes.set_xlim(-0.02, max(width, _WIDTH) + 0.02)
    axes.set_ylim(-height - 0.02, 0.02)
    axes.axis("off")
    font = _FONT * min(1.0, _WIDTH / width)
    bottom = {0: -_ROW, 1: -_ROW}
    for source in (0, 1):
        _box(axes, left[source], -_ROW, _INPUT, _ROW, output=True)
        middle = left[source] + _INPUT / 2
        axes.text(middle, -_ROW / 2, f"in {source}", ha="center", va="center", fontsize=font, color=GREY)
    part_of_output = dict(zip(cell["node"], cell["output"], strict=True))
    top = -_ROW - _GAP
    for node, number in inputs.items():
        bottom[node] = top - number * _ROW
        _box(axes, left[node], bottom[node], _BOX, number * _ROW, output=part_of_output[node])
        top = bottom[node] - _GAP
    for source in left:
        # The edge that goes farthest leaves leftmost, so that edges of one source do not cross.
        leaving = cell[cell["source"] == source].sort_values(["node", "row"], ascending=False)
        room = _INPUT if source < 2 else _BOX
        lanes = left[source] + room * (np.arange(len(leaving)) + 1) / (len(leaving) + 1)
        for lane, edge in zip(lanes, _records(leaving), strict=True):
            node, end = edge["node"], left[edge["node"]]
            y = bottom[node] + (inputs[node] - edge["row"] - 0.5) * _ROW
            colour, width = _PALETTE(edge["agreement"]), 0.8 + 1.4 * edge["agreement"]
            above = 1 + edge["agreement"] / 2
            axes.plot([lane, lane, end], [bottom[source], y, y], color=colour, linewidth=width, zorder=above)
            axes.plot([end - 0.02], [y], marker=">", markersize=3.5, color=colour, zorder=above)
            name = short(edge["operation"])
            axes.text(end + _BOX / 2, y, name, ha="center", va="center", fontsize=font, color=INK, zorder=4)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _box(axes: Axes, x: float, y: float, width: float, height: float, *, output: bool) -> None:
    """A node; dashed if the cell's output leaves it out."""
    style = "-" if output else (0, (2, 2))
    axes.add_patch(
        Rectangle(
            (x, y), width, height, facecolor="white", edgecolor=GREY, linewidth=0.8, linestyle=style, zorder=2
        )
    )


def short(operation: str) -> str:
    """Name of an operation that fits a node: `sep 3x3` for `sep_conv_3x3`."""
    words = operation.split("_")
    return " ".join(word for word in words if word == words[0] or word not in ("conv", "pool", "connect"))
