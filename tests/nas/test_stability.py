"""How alike genotypes and rankings are from epoch to epoch: values by hand."""

import random

import pytest
from scipy import stats

from nas.genotype import Cell, Genotype
from nas.stability import hamming, rank_tau

SKIP, SEP, MAX = "skip_connect", "sep_conv_3x3", "max_pool_3x3"


def genotype(*nodes: tuple[tuple[str, int], ...]) -> Genotype:
    cell = Cell(nodes, tuple(range(2, len(nodes) + 2)))
    return Genotype(cell, cell)


BASE = genotype(((SKIP, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
SWAPPED = genotype(((SEP, 1), (SKIP, 0)), ((SKIP, 0), (SEP, 2)))
ONE_OP = genotype(((MAX, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
NOTHING = genotype(((MAX, 0), (MAX, 1)), ((MAX, 0), (MAX, 1)))


def test_one_of_four_edges_differs_in_each_cell() -> None:
    assert [hamming(BASE, other) for other in (SWAPPED, ONE_OP, NOTHING)] == [0, 1 / 4, 1]


def test_genotypes_of_different_sizes_have_no_hamming_distance() -> None:
    with pytest.raises(ValueError, match="genotypes of 4 and 8 edges have no Hamming distance"):
        hamming(genotype(((SKIP, 0), (SEP, 1))), BASE)


@pytest.mark.parametrize("seed", range(4))
def test_tau_is_that_of_scipy(seed: int) -> None:
    draws = random.Random(seed)
    one, other = ([draws.randrange(5) for _ in range(8)] for _ in range(2))
    assert rank_tau(one, other) == pytest.approx(stats.kendalltau(one, other).statistic)


def test_ties_all_over_have_no_order() -> None:
    assert rank_tau([1, 1, 1], [1, 2, 3]) is None
