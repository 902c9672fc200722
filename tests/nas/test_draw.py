import subprocess
import sys
from collections import Counter
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from matplotlib.patches import FancyBboxPatch, PathPatch

from nas.draw import STYLES, _figure, genotype_png, genotype_svg
from nas.genotype import OPERATIONS, Cell, Genotype
from nas.published import PUBLISHED
from tests.nas.test_genotype import genotypes

SVG = "{http://www.w3.org/2000/svg}"


def one_node_per_operation() -> Genotype:
    cell = Cell.from_pairs([(operation, 0) for operation in OPERATIONS], range(2, 15), inputs_per_node=1)
    return Genotype(cell, PUBLISHED["GDAS_F1"].reduce)


def texts(svg: str) -> Counter[str]:
    return Counter(
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
    )


@pytest.mark.parametrize(
    "genotype", [PUBLISHED["NASNet"], PUBLISHED["SNAS_aggressive"], one_node_per_operation()]
)
def test_every_edge_is_named_in_the_text_of_the_svg(genotype: Genotype) -> None:
    found = texts(genotype_svg(genotype))
    operations = Counter(
        op.replace("_", " ")
        for cell in (genotype.normal, genotype.reduce)
        for inputs in cell.nodes
        for op, _ in inputs
    )
    assert {name: found[name] for name in operations} == operations


def test_nodes_have_the_numbers_of_the_text_form() -> None:
    found = texts(genotype_svg(PUBLISHED["NASNet"]))
    assert {number: found[number] for number in "123456"} == {"1": 0} | dict.fromkeys("23456", 2)


def test_same_genotype_same_bytes_whatever_the_settings_of_the_user() -> None:
    genotype = PUBLISHED["DARTS_V1"]
    svg, png = genotype_svg(genotype, "a"), genotype_png(genotype, "a")
    with matplotlib.rc_context({"svg.fonttype": "path", "font.family": ["serif"], "savefig.bbox": "tight"}):
        assert (genotype_svg(genotype, "a"), genotype_png(genotype, "a")) == (svg, png)
    code = (
        "import sys; from nas.draw import genotype_svg; from nas.published import PUBLISHED;"
        "sys.stdout.write(genotype_svg(PUBLISHED['DARTS_V1'], 'a'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == svg


def test_different_genotypes_give_different_pictures() -> None:
    assert genotype_png(PUBLISHED["DARTS_V1"]) != genotype_png(PUBLISHED["DARTS_V2"])


def test_png_is_a_png() -> None:
    assert genotype_png(PUBLISHED["GDAS_F1"]).startswith(b"\x89PNG\r\n\x1a\n")


def test_svg_says_what_it_shows() -> None:
    genotype = PUBLISHED["PDARTS"]
    root = ElementTree.fromstring(genotype_svg(genotype, "<K=4> & seed $0$"))
    assert root.findtext(f"{SVG}title") == "<K=4> & seed $0$"
    assert root.findtext(".//{http://purl.org/dc/elements/1.1/}description") == str(genotype)
    untitled = ElementTree.fromstring(genotype_svg(genotype))
    assert untitled.findtext(f"{SVG}title") == f"Genotype {genotype.key}"


def test_families_of_operations_differ_in_colour_and_in_dashes() -> None:
    assert {operation.split("_")[0] for operation in OPERATIONS} == set(STYLES)
    styles = [STYLES[word] for word in STYLES if word != "avg"]  # both pools look alike
    assert len({colour for colour, _ in styles}) == len({dashes for _, dashes in styles}) == len(styles)


def assert_readable(genotype: Genotype) -> None:
    """Names overlap neither one another nor an edge or a node, and edges cross no node."""
    figure = _figure(genotype, "title")
    axes = figure.axes[0]
    to_inches = axes.transData.inverted()
    names = [text.get_window_extent().transformed(to_inches) for text in axes.texts]
    numbers = {text.get_position() for text in axes.texts if text.get_horizontalalignment() == "center"}
    labels = [box for box, text in zip(names, axes.texts, strict=True) if text.get_position() not in numbers]
    nodes = [patch.get_bbox() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    edges = [patch.get_path() for patch in axes.patches if isinstance(patch, PathPatch)]
    for one, other in combinations(names, 2):
        assert not one.overlaps(other)
    for label in labels:
        assert axes.viewLim.x0 <= label.x0 <= label.x1 <= axes.viewLim.x1
        assert not any(label.overlaps(node) for node in nodes)
        assert not any(edge.intersects_bbox(label, filled=False) for edge in edges)
    for one, other in combinations(nodes, 2):
        assert not one.padded(0.05).overlaps(other)
    for node in nodes:
        inside = node.padded(-0.01)  # an edge touches the node that it leaves
        assert not any(edge.intersects_bbox(inside, filled=False) for edge in edges)
    assert len({str(edge) for edge in edges}) == len(edges)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_are_readable(name: str) -> None:
    assert_readable(PUBLISHED[name])


@given(genotypes)
@settings(max_examples=15, deadline=None)
def test_any_cell_is_readable(genotype: Genotype) -> None:
    assert_readable(genotype)


def test_parallel_edges_stay_apart() -> None:
    cell = Cell.from_pairs([("sep_conv_3x3", 0)] * 2 + [("skip_connect", 2), ("skip_connect", 0)] * 2, [3, 4])
    assert_readable(Genotype(cell, cell))
