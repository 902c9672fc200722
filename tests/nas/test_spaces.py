"""The cell spaces: edges and their order, the spaces of RobustDARTS as specified, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from math import comb, prod

import pytest

from nas.genotype import Cell, Genotype
from nas.papers import GDAS_OPS
from nas.spaces.cell import CELL_TYPES, DARTS_OPS, SPACES, CellSpace, CellType, reduction_cells
from nas.spaces.space import Choices

SKIP, SEP3 = "skip_connect", "sep_conv_3x3"
SHORT = {
    "sk": SKIP,
    "s3": SEP3,
    "d3": "dil_conv_3x3",
    "d5": "dil_conv_5x5",
    "mp": "max_pool_3x3",
    "ap": "avg_pool_3x3",
}


# The graph


def test_edges_come_node_by_node_with_ascending_predecessors() -> None:
    assert CellSpace().edges == (
        *((2, 0), (2, 1)),
        *((3, 0), (3, 1), (3, 2)),
        *((4, 0), (4, 1), (4, 2), (4, 3)),
        *((5, 0), (5, 1), (5, 2), (5, 3), (5, 4)),
    )


@pytest.mark.parametrize("nodes", range(1, 7))
def test_edge_of_a_node_lies_at_its_offset(nodes: int) -> None:
    space = CellSpace(nodes=nodes)
    for node in range(2, nodes + 2):
        offset = sum(range(2, node))  # 0, 2, 5, 9
        for source in range(node):
            assert space.edges[offset + source] == (node, source)
    assert len(space.edges) == sum(range(2, nodes + 2))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (8, {2, 5}),
        (14, {4, 9}),
        (20, {6, 13}),
        (5, {1, 3}),
        (11, {3, 7}),
        (17, {5, 11}),
        (3, {1, 2}),
        (1, {0}),
    ],
)
def test_reduction_cells_stand_at_a_third_and_two_thirds(cells: int, expected: set[int]) -> None:
    assert reduction_cells(cells) == expected


def test_tables_of_choices() -> None:
    space = CellSpace()
    assert list(space.choices) == ["normal/op", "normal/input", "reduce/op", "reduce/input"]
    ops, inputs = space.choices["reduce/op"], space.choices["reduce/input"]
    assert ops.rows[:3] == ("reduce/2<-0", "reduce/2<-1", "reduce/3<-0")
    assert (ops.options, ops.pick, len(ops.rows)) == (DARTS_OPS, 1, 14)
    assert ops.full
    assert inputs.rows == ("reduce/2", "reduce/3", "reduce/4", "reduce/5")
    assert inputs.allowed == ((0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4))
    assert inputs.pick == 2
    assert not inputs.full


def test_size_of_the_space_of_darts() -> None:
    space = CellSpace()
    inputs = space.choices["normal/input"]
    topologies = prod(comb(len(allowed), inputs.pick) for allowed in inputs.allowed)
    assert topologies == 180
    ops = len(set(space.ops) - {"none"})
    assert topologies * ops ** (space.nodes * inputs.pick) == 180 * 7**8


# The named spaces


def test_operations_of_darts_in_its_order() -> None:
    assert SPACES["darts"].ops == (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    assert sorted(GDAS_OPS) == sorted(DARTS_OPS)
    assert GDAS_OPS[:2] == ("none", SKIP)
    assert GDAS_OPS[-2:] == ("avg_pool_3x3", "max_pool_3x3")


S1_NORMAL = "sk|d3, sk|d5, sk|d5, sk|s3, sk|d3, mp|sk, sk|s3, sk|s3, sk|d3, sk|s3, mp|sk, sk|d3, d3|d5, d3|d5"
S1_REDUCE = "mp|ap, mp|d3, mp|ap, mp|ap, sk|d5, mp|ap, mp|s3, sk|d3, sk|d5, mp|ap, mp|ap, sk|d5, sk|d5, sk|d5"


@pytest.mark.parametrize(("cell", "specified"), [("normal", S1_NORMAL), ("reduce", S1_REDUCE)])
def test_s1_allows_the_two_specified_operations_on_every_edge(cell: CellType, specified: str) -> None:
    table = SPACES["s1"].op_choices(cell)
    found = [{table.options[option] for option in allowed} for allowed in table.allowed]
    assert found == [{SHORT[op] for op in edge.split("|")} for edge in specified.split(", ")]
    assert "none" not in table.options


@pytest.mark.parametrize(
    ("name", "ops"), [("s2", {SKIP, SEP3}), ("s3", {"none", SKIP, SEP3}), ("s4", {"noise", SEP3})]
)
def test_s2_to_s4_allow_their_operations_on_every_edge(name: str, ops: set[str]) -> None:
    for cell in CELL_TYPES:
        table = SPACES[name].op_choices(cell)
        assert set(table.options) == ops
        assert table.full
        assert len(table.rows) == 14


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CellSpace(nodes=0), r"space\.nodes=0 must be at least 1"),
        (lambda: CellSpace(inputs_per_node=3), r"space\.inputs_per_node=3 must be 1 or 2"),
        (lambda: CellSpace(ops=("conv_9x9", SKIP)), r"must be distinct names from none, max_pool_3x3"),
        (lambda: CellSpace(ops=(SKIP, SKIP)), "must be distinct names"),
        (lambda: CellSpace(ops=("none",)), "at least one besides none"),
        (lambda: CellSpace(ops=()), "at least one besides none"),
        (
            lambda: CellSpace(normal_ops=((SKIP,),) * 13),
            r"space\.normal_ops lists 13 edges; 4 nodes have 14",
        ),
        (
            lambda: CellSpace(nodes=1, ops=(SKIP, SEP3), reduce_ops=((SKIP,), ("noise",))),
            r"space\.reduce_ops: .* not there: \['noise'\]",
        ),
        (
            lambda: CellSpace(nodes=1, normal_ops=((SKIP,), ("none",))),
            r"space\.normal_ops: every edge needs an operation besides none",
        ),
    ],
)
def test_spaces_that_hold_no_cell_are_refused(make: Callable[[], CellSpace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("options", [(), (1, 0), (0, 0), (0, 2), (-1, 0)])
def test_option_sets_are_ascending_distinct_and_in_range(options: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"first: options .* must be ascending, distinct and within 0\.\.1"):
        Choices("table", ("first",), ("a", "b"), (options,))


def test_every_row_has_an_option_set() -> None:
    with pytest.raises(ValueError, match="table: 1 option sets for 2 rows; give one per row"):
        Choices("table", ("first", "second"), ("a",), ((0,),))


PLAIN = Cell((((SKIP, 0), (SEP3, 1)), ((SKIP, 1), (SEP3, 2))), (2, 3))


def picks_of(normal: Cell, space: CellSpace) -> None:
    space.picks(Genotype(normal, PLAIN))


def test_genotypes_of_other_spaces_have_no_picks() -> None:
    space = CellSpace(nodes=2)
    picks_of(PLAIN, space)
    with pytest.raises(ValueError, match="normal cell has 2 nodes; space 'darts' has 3"):
        picks_of(PLAIN, replace(space, nodes=3))
    with pytest.raises(ValueError, match=f"{SEP3} on normal/2<-1 is not in the space; allowed: {SKIP}"):
        picks_of(PLAIN, replace(space, ops=(SKIP,)))
    with pytest.raises(ValueError, match=r"normal cell outputs nodes \(3,\); space 'darts' outputs all"):
        picks_of(replace(PLAIN, concat=(3,)), space)
    one, three, twice = ((SKIP, 1),), (*PLAIN.nodes[1], (SKIP, 0)), ((SKIP, 1), (SKIP, 1))
    for inputs in (one, three, twice):
        with pytest.raises(ValueError, match="normal cell does not keep 2 different inputs at every node"):
            picks_of(replace(PLAIN, nodes=(PLAIN.nodes[0], inputs)), space)


def test_one_input_may_be_taken_with_two_operations() -> None:
    space = CellSpace(nodes=2)
    cell = replace(PLAIN, nodes=(PLAIN.nodes[0], ((SKIP, 2), (SEP3, 2))))
    picks = space.picks(Genotype(cell, PLAIN))
    assert picks["normal/input"] == ((0, 1), (2,))
    assert picks["normal/op"][-1] == (DARTS_OPS.index(SKIP), DARTS_OPS.index(SEP3))
    assert space.genotype(picks).normal == cell
