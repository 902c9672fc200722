import json
import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.genotype import OPERATIONS, Cell, Edge, Genotype, jaccard
from nas.published import PUBLISHED

SEP3, SKIP = "sep_conv_3x3", "skip_connect"


@st.composite
def cells(draw: st.DrawFn, nodes: tuple[int, int] = (2, 5), operations: tuple[str, ...] = OPERATIONS) -> Cell:
    count = draw(st.integers(*nodes))
    inputs = [
        draw(
            st.lists(st.tuples(st.sampled_from(operations), st.integers(0, node - 1)), min_size=1, max_size=3)
        )
        for node in range(2, count + 2)
    ]
    concat = draw(st.lists(st.sampled_from(range(2, count + 2)), min_size=1, unique=True))
    return Cell(tuple(map(tuple, inputs)), tuple(concat))


# Few operations and nodes, so that equal and nearly equal cells are common.
small_cells = cells((2, 4), ("none", SKIP, SEP3))
genotypes = st.builds(Genotype, cells(), cells())


def renumbered(cell: Cell, order: tuple[int, ...], rng: random.Random | None = None) -> Cell:
    """`cell` with its nodes in `order`; with `rng`, the inputs of nodes and the concat are shuffled."""
    shuffle = rng.shuffle if rng else list[Edge | int].sort
    new = {0: 0, 1: 1} | {old: position for position, old in enumerate(order, start=2)}
    nodes = []
    for old in order:
        inputs: list[Edge | int] = [(op, new[pred]) for op, pred in cell.nodes[old - 2]]
        shuffle(inputs)
        nodes.append(tuple(inputs))
    concat: list[Edge | int] = [new[old] for old in cell.concat]
    shuffle(concat)
    return Cell(tuple(nodes), tuple(concat))  # type: ignore[arg-type]


def topological_orders(cell: Cell) -> list[tuple[int, ...]]:
    def before(order: tuple[int, ...], node: int) -> set[int]:
        return {0, 1, *order[: order.index(node)]}

    return [
        order
        for order in permutations(range(2, len(cell.nodes) + 2))
        if all(pred in before(order, node) for node in order for _, pred in cell.nodes[node - 2])
    ]


def random_order(cell: Cell, rng: random.Random) -> tuple[int, ...]:
    order: list[int] = []
    while len(order) < len(cell.nodes):
        ready = [
            node
            for node, inputs in enumerate(cell.nodes, start=2)
            if node not in order and all(pred in (0, 1, *order) for _, pred in inputs)
        ]
        order.append(rng.choice(ready))
    return tuple(order)


def both(cell: Cell) -> Genotype:
    return Genotype(cell, cell)


def key(nodes: list[list[Edge]], concat: list[int]) -> str:
    return both(Cell(tuple(map(tuple, nodes)), tuple(concat))).key


# Text and JSON


@given(genotypes)
def test_text_and_json_forms_lose_nothing(genotype: Genotype) -> None:
    assert Genotype.parse(str(genotype)) == genotype
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype


def test_text_is_the_form_that_the_code_of_papers_prints() -> None:
    assert str(PUBLISHED["PC_DARTS_cifar"]) == (
        "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), "
        "('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), "
        "('dil_conv_3x3', 1)], "
        "normal_concat=[2, 3, 4, 5], "
        "reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), "
        "('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], "
        "reduce_concat=[2, 3, 4, 5])"
    )


def test_nodes_of_other_than_two_inputs_are_written_one_by_one() -> None:
    assert "reduce=[[('conv_1x3_3x1', 0)], [('conv_1x3_3x1', 1)], [(" in str(PUBLISHED["GDAS_F1"])


@pytest.mark.parametrize(
    "text",
    [
        "Genotype(normal=[('none', 0), ('noise', 1)], normal_concat=[2], "
        "reduce=[('none', 0), ('noise', 1)], reduce_concat=[2])",
        "Genotype(normal=[[('none', 0), ('noise', 1)]], normal_concat=(2,), "
        "reduce=[(('none', 0), ('noise', 1))], reduce_concat=range(2, 3))",
        "\n  Genotype (\n\treduce_concat = range( 2 ,3 ), reduce=[['none', 0],\n['noise', 1]],\n"
        "normal = [ ('none',0) , ('noise',1) , ] ,\nnormal_concat=[ 2, ] # from a log\n)  \n",
    ],
)
def test_parse_reads_every_form_in_use(text: str) -> None:
    assert Genotype.parse(text) == both(Cell(((("none", 0), ("noise", 1)),), (2,)))


def with_normal(edges: str, concat: str = "[2]") -> str:
    return f"Genotype(normal={edges}, normal_concat={concat}, reduce=[[('none', 0)]], reduce_concat=[2])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' is not a genotype.*write Genotype\(normal=\[\.\.\.\]"),
        ("Genotype(", r"'Genotype\(' is not a genotype.*never closed.*write Genotype"),
        ("Cell(normal=[])", r"'Cell\(normal=\[\]\)' is not a genotype; write Genotype"),
        ("Genotype([('none', 0)])", "unnamed or repeated fields; write Genotype"),
        (
            "Genotype(normal=[], normal=[])",
            r"'Genotype\(normal=\[\], normal=\[\]\)' has unnamed or repeated fields",
        ),
        ("Genotype(normal=[])", r"fields \['normal'\] are not those of a genotype; write Genotype"),
        (with_normal("f()"), "field normal is not a list of literals; write Genotype"),
        (with_normal("[('none', 0)] * 2"), "field normal is not a list of literals"),
        (with_normal("[('none', 0)] and x.y"), "field normal is not a list of literals"),
        (with_normal("3"), r"normal cell: 3 is not a list; list the \(operation, predecessor\)"),
        (with_normal("[('none', 0), [('none', 0)]]"), "normal cell: 'none' is not an edge; write"),
        (with_normal("[3]"), "normal cell: 3 is neither an edge nor the list of a node's inputs"),
        (with_normal("[[('none', 0, 1)]]"), r"\('none', 0, 1\) is not an edge; write \(operation, pred"),
        (with_normal("[('none', 0)]"), "1 pairs do not give every node inputs_per_node=2 inputs; add"),
        (with_normal("[[('none', 0)]]", "2"), "concat=2 is not a list; write"),
        (with_normal("[[('none', 0)]]", "range(2, 10 ** 20)"), "field normal_concat is not a list"),
        (with_normal("[[('none', 0)]]", f"range({10**20})"), "is longer than the cell; name each node"),
        (with_normal("[[('none', 0)]]", "range(2, 3, 0)"), "field normal_concat is not a list"),
        (with_normal("[[('none', '0')]]"), "normal cell: node 2 has predecessor '0', not a node before"),
    ],
)
def test_parse_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Genotype.parse(text)


def test_parse_does_not_run_the_text() -> None:
    with pytest.raises(ValueError, match="not a list of literals"):
        Genotype.parse(with_normal("__import__('os').abort()"))


# Validation


@pytest.mark.parametrize(
    ("nodes", "concat", "message"),
    [
        ([], [2], "the cell has no nodes; give it at least one"),
        ([[]], [2], "node 2 has no input; give it at least one, or remove the node"),
        ([[("conv", 0)]], [2], "node 2 has unknown operation 'conv'; use one of none, max_pool_3x3, .*_bn$"),
        ([[(SKIP, 0)], [(SKIP, 3)]], [2], "node 3 has predecessor 3, not a node before it; use 0 to 2"),
        ([[(SKIP, -1)]], [2], "node 2 has predecessor -1, not a node before it; use 0 to 1"),
        ([[(SKIP, True)]], [2], "node 2 has predecessor True"),
        ([[(SKIP, 0)]], [], "concat is empty, so the cell has no output; name some of the nodes 2"),
        ([[(SKIP, 0)], [(SKIP, 0)]], [4], "concat names 4, which is not an intermediate node; .* 2, 3"),
        ([[(SKIP, 0)]], [1], "concat names 1, which is not an intermediate node"),
        ([[(SKIP, 0)]], [2, 2], "concat names node 2 twice"),
    ],
)
def test_a_bad_cell_is_refused(nodes: list[list[Edge]], concat: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(tuple(map(tuple, nodes)), tuple(concat))


def test_a_cell_of_lists_is_refused_since_it_could_not_be_hashed() -> None:
    with pytest.raises(ValueError, match=r"holds lists; use tuples, or Cell\.from_pairs"):
        Cell([((SKIP, 0),)], (2,))  # type: ignore[arg-type]


def test_pairs_fill_nodes_in_order() -> None:
    pairs: list[Edge] = [(SKIP, 0), (SKIP, 1), (SEP3, 2), (SEP3, 0)]
    assert Cell.from_pairs(pairs, [3]).nodes == (((SKIP, 0), (SKIP, 1)), ((SEP3, 2), (SEP3, 0)))
    assert Cell.from_pairs(pairs[:2], [2], inputs_per_node=1).nodes == (((SKIP, 0),), ((SKIP, 1),))
    with pytest.raises(ValueError, match="4 pairs do not give every node inputs_per_node=3 inputs"):
        Cell.from_pairs(pairs, [2], inputs_per_node=3)


# Identity


@given(genotypes, st.randoms(use_true_random=False))
def test_key_does_not_depend_on_how_a_network_is_written(genotype: Genotype, rng: random.Random) -> None:
    normal, reduce = (
        renumbered(cell, random_order(cell, rng), rng) for cell in (genotype.normal, genotype.reduce)
    )
    other = Genotype(normal, reduce)
    assert other.key == genotype.key
    assert other.canonical() == genotype.canonical()


@given(genotypes)
def test_canonical_form_is_its_own_representative_and_counts_alike(genotype: Genotype) -> None:
    canonical = genotype.canonical()
    assert canonical.canonical() == canonical
    for one, other in ((genotype.normal, canonical.normal), (genotype.reduce, canonical.reduce)):
        assert (one.skips, one.depth, one.input_edges) == (other.skips, other.depth, other.input_edges)


@given(small_cells, small_cells, st.randoms(use_true_random=False))
def test_keys_are_equal_exactly_when_a_renumbering_maps_one_cell_to_the_other(
    one: Cell, other: Cell, rng: random.Random
) -> None:
    # canonical() is used here only to drop what has no effect; the search over all orders is the definition.
    one, other = both(one).canonical().normal, both(other).canonical().normal
    other = rng.choice([other, renumbered(one, random_order(one, rng)), mutated(one, rng)])
    target = renumbered(other, tuple(range(2, len(other.nodes) + 2)))
    isomorphic = any(renumbered(one, order) == target for order in topological_orders(one))
    assert (both(one).key == both(other).key) == isomorphic


def mutated(cell: Cell, rng: random.Random) -> Cell:
    """`cell` with one edge moved to another predecessor, and every node in the concat so that all matter."""
    nodes = [list(inputs) for inputs in cell.nodes]
    node = rng.randrange(len(nodes))
    op, _ = nodes[node][0]
    nodes[node][0] = (op if op != "none" else SEP3, rng.randrange(node + 2))
    return Cell(tuple(map(tuple, nodes)), tuple(range(2, len(nodes) + 2)))


def test_one_node_used_twice_is_not_two_nodes_of_equal_inputs() -> None:
    twice = key([[(SEP3, 0)], [(SEP3, 0)], [(SKIP, 2), (SKIP, 2)]], [2, 3, 4])
    each_once = key([[(SEP3, 0)], [(SEP3, 0)], [(SKIP, 2), (SKIP, 3)]], [2, 3, 4])
    assert twice != each_once


def test_ties_of_structure_are_searched() -> None:
    # In two rings of 3 and in one of 6 every node sees the same labels at any distance.
    def ring(pairs: list[tuple[int, int]]) -> str:
        return key([[(SEP3, 0)]] * 6 + [[(SKIP, a), (SKIP, b)] for a, b in pairs], list(range(2, 14)))

    one_ring = ring([(2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 2)])
    shuffled = ring([(6, 2), (4, 2), (4, 3), (3, 7), (7, 5), (5, 6)])
    two_rings = ring([(2, 3), (3, 4), (4, 2), (5, 6), (6, 7), (7, 5)])
    assert one_ring == shuffled
    assert one_ring != two_rings


def test_eight_interchangeable_nodes_are_not_permuted() -> None:
    # 8! orders would take minutes.
    nodes: list[list[Edge]] = [[(SEP3, 0), (SEP3, 1)]] * 8
    assert key(nodes, list(range(2, 10))) == key(nodes, list(range(9, 1, -1)))


def test_an_operation_a_predecessor_and_the_concat_all_count() -> None:
    base = key([[(SEP3, 0)], [(SEP3, 2)]], [2, 3])
    assert base != key([[(SKIP, 0)], [(SEP3, 2)]], [2, 3])
    assert base != key([[(SEP3, 1)], [(SEP3, 2)]], [2, 3])
    assert base != key([[(SEP3, 0)], [(SEP3, 2)]], [3])
    assert base != key([[(SEP3, 0)], [(SEP3, 2), (SEP3, 2)]], [2, 3])


def test_the_normal_and_the_reduction_cell_are_not_interchangeable() -> None:
    genotype = PUBLISHED["DARTS_V1"]
    assert Genotype(genotype.reduce, genotype.normal).key != genotype.key


def test_nodes_that_do_not_reach_the_output_are_dropped() -> None:
    with_loose_end = Cell((((SEP3, 0),), ((SEP3, 1),), ((SKIP, 2), (SKIP, 1))), (4,))
    assert both(with_loose_end).canonical().normal == Cell((((SEP3, 0),), ((SKIP, 1), (SKIP, 2))), (3,))
    assert (with_loose_end.skips, with_loose_end.depth, with_loose_end.input_edges) == (2, 2, 2)


def test_none_is_dropped_beside_another_input_and_kept_alone() -> None:
    beside = Cell((((SEP3, 0), ("none", 1)), (("none", 2), ("none", 1))), (2, 3))
    assert set(both(beside).canonical().normal.nodes) == {((SEP3, 0),), (("none", 0),)}
    assert (beside.depth, beside.input_edges) == (1, 1)


def test_a_node_that_feeds_only_a_none_is_dropped() -> None:
    assert key([[(SEP3, 0)], [(SKIP, 1), ("none", 2)]], [3]) == key([[(SKIP, 1)]], [2])


def test_keys_stay_the_same_across_versions() -> None:
    # Records hold keys, so a change of the canonical form would orphan them.
    assert PUBLISHED["DARTS_V1"].key == "2b68671705f0"
    assert PUBLISHED["GDAS_F1"].key == "dee82406d3d6"


def test_equality_is_of_what_is_written() -> None:
    one = both(Cell((((SEP3, 0), (SKIP, 1)),), (2,)))
    other = both(Cell((((SKIP, 1), (SEP3, 0)),), (2,)))
    assert one != other
    assert one.key == other.key
    assert len({one, other, Genotype.parse(str(one))}) == 2


# Published cells


@pytest.mark.parametrize(
    ("name", "skips", "depth", "input_edges"),
    [
        ("DARTS_V1", (3, 3), (2, 2), (7, 5)),
        ("DARTS_V2", (2, 3), (2, 2), (7, 5)),
        ("PC_DARTS_cifar", (1, 0), (1, 3), (8, 5)),
        ("PC_DARTS_image", (2, 1), (3, 3), (6, 5)),
        ("PDARTS", (2, 0), (3, 3), (6, 6)),
        ("GDAS_V1", (4, 0), (4, 2), (4, 6)),
        ("GDAS_F1", (5, 0), (2, 1), (5, 4)),
        ("SNAS_mild", (4, 2), (1, 2), (8, 5)),
        ("SNAS_moderate", (4, 0), (1, 1), (8, 8)),
        ("NASNet", (2, 1), (1, 2), (10, 7)),
        ("AmoebaNet", (2, 0), (3, 2), (8, 8)),
    ],
)
def test_counts_of_published_cells(
    name: str, skips: tuple[int, int], depth: tuple[int, int], input_edges: tuple[int, int]
) -> None:
    genotype = PUBLISHED[name]
    assert (genotype.normal.skips, genotype.reduce.skips) == skips
    assert (genotype.normal.depth, genotype.reduce.depth) == depth
    assert (genotype.normal.input_edges, genotype.reduce.input_edges) == input_edges


def test_published_genotypes_are_different_networks() -> None:
    assert len(PUBLISHED) == 15
    assert len({genotype.key for genotype in PUBLISHED.values()}) == 15


# How alike


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ((("skip_connect", 0), ("sep_conv_3x3", 1)), 1),
        ((("sep_conv_3x3", 1), ("skip_connect", 0)), 1),
        ((("max_pool_3x3", 0), ("sep_conv_3x3", 1)), 6 / 10),
    ],
)
def test_shared_edges_over_those_of_either(first: tuple[Edge, Edge], expected: float) -> None:
    second = (("skip_connect", 0), ("sep_conv_3x3", 2))
    one = Cell(((("skip_connect", 0), ("sep_conv_3x3", 1)), second), (2, 3))
    other = Cell((first, second), (2, 3))
    assert jaccard(Genotype(one, one), Genotype(other, other)) == expected
