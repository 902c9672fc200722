"""How alike genotypes are: values by hand."""

import random

import pytest
from scipy import stats

from nas.genotype import Cell, Genotype
from nas.spaces.cell import SPACES
from nas.stability import (
    agreement,
    distances,
    edit_distance,
    hamming,
    jaccard,
    rank_tau,
    shared_operations,
    topology_jaccard,
)

SKIP, SEP, MAX = "skip_connect", "sep_conv_3x3", "max_pool_3x3"


def genotype(*nodes: tuple[tuple[str, int], ...]) -> Genotype:
    cell = Cell(nodes, tuple(range(2, len(nodes) + 2)))
    return Genotype(cell, cell)


BASE = genotype(((SKIP, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
SWAPPED = genotype(((SEP, 1), (SKIP, 0)), ((SKIP, 0), (SEP, 2)))
ONE_OP = genotype(((MAX, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
NOTHING = genotype(((MAX, 0), (MAX, 1)), ((MAX, 0), (MAX, 1)))


def test_the_order_of_inputs_says_nothing() -> None:
    assert (jaccard(BASE, SWAPPED), hamming(BASE, SWAPPED), edit_distance(BASE, SWAPPED)) == (1, 0, 0)


def test_one_of_four_edges_differs_in_each_cell() -> None:
    assert jaccard(BASE, ONE_OP) == 6 / 10
    assert hamming(BASE, ONE_OP) == 1 / 4
    assert edit_distance(BASE, ONE_OP) == 2
    assert (jaccard(BASE, NOTHING), hamming(BASE, NOTHING), edit_distance(BASE, NOTHING)) == (0, 1, 8)


def test_edges_and_operations_are_compared_apart() -> None:
    assert (topology_jaccard(BASE, ONE_OP), shared_operations(BASE, ONE_OP)) == (1, 3 / 4)
    assert topology_jaccard(BASE, NOTHING) == 3 / 5, "of node 3 one of two predecessors is the same"
    assert shared_operations(BASE, NOTHING) == 0
    first, second = genotype(((SKIP, 0), (SEP, 0))), genotype(((SKIP, 1), (SEP, 1)))
    assert (topology_jaccard(first, second), shared_operations(first, second)) == (0, None)


def test_nodes_may_be_numbered_otherwise() -> None:
    one = genotype(((SKIP, 0), (SKIP, 1)), ((SEP, 0), (SEP, 1)))
    other = genotype(((SEP, 0), (SEP, 1)), ((SKIP, 0), (SKIP, 1)))
    assert edit_distance(one, other) == 0
    assert jaccard(one, other) == 0


def test_a_missing_node_is_as_many_changes_as_it_has_edges() -> None:
    assert edit_distance(genotype(((SKIP, 0), (SEP, 1))), BASE) == 4
    with pytest.raises(ValueError, match="genotypes of 4 and 8 edges have no Hamming distance"):
        hamming(genotype(((SKIP, 0), (SEP, 1))), BASE)


def test_distances_are_symmetric_with_nothing_on_the_diagonal() -> None:
    found = distances([BASE, ONE_OP, NOTHING])
    assert found[0][1] == found[1][0] == 2
    assert [found[i][i] for i in range(3)] == [0, 0, 0]


def test_seeds_that_agree_wholly_and_seeds_that_draw() -> None:
    assert agreement([BASE, SWAPPED, BASE]) == pytest.approx(1)
    draws = random.Random(0)
    drawn = [SPACES["darts"].sample(draws) for _ in range(300)]
    # Not 0: a node's first edges are taken more often than those of later nodes, which all draws share.
    assert abs(agreement(drawn) or 1) < 0.15
    assert agreement([BASE]) is None


def test_agreement_of_two_by_hand() -> None:
    # Five edges a cell; answers differ on one of them, which one seed gives to SKIP and the other to MAX.
    shares = {"": 2 / 10, SKIP: 3 / 10, SEP: 4 / 10, MAX: 1 / 10}
    chance = sum(share**2 for share in shares.values())
    assert agreement([BASE, ONE_OP]) == pytest.approx((4 / 5 - chance) / (1 - chance))


@pytest.mark.parametrize("seed", range(4))
def test_tau_is_that_of_scipy(seed: int) -> None:
    draws = random.Random(seed)
    one, other = ([draws.randrange(5) for _ in range(8)] for _ in range(2))
    assert rank_tau(one, other) == pytest.approx(stats.kendalltau(one, other).statistic)


def test_ties_all_over_have_no_order() -> None:
    assert rank_tau([1, 1, 1], [1, 2, 3]) is None
