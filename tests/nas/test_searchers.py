"""Derivation: fixed tables, tie rules, the skip cap against its one-shot form, uniform random cells."""

import random
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from nas.genotype import Cell, Genotype
from nas.papers import PAPERS
from nas.searchers import Argmax, RandomGenotype, Searcher, keep_likeliest
from nas.spaces.cell import SPACES, CellSpace
from nas.spaces.space import Choices
from tests.strategies import learned, spaces

SKIP, SEP3, SEP5, MAX, DIL5 = "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "max_pool_3x3", "dil_conv_5x5"
EdgesBy = Literal["alpha_beta", "alpha", "beta"]
DARTS = CellSpace()
TWO = CellSpace(name="two", nodes=2, ops=("none", SKIP, SEP3, SEP5))
"""Edges 2<-0, 2<-1, 3<-0, 3<-1, 3<-2."""


def derive(
    searcher: Searcher,
    space: CellSpace,
    normal: list[list[float]] | Tensor,
    beta: list[list[float]] | Tensor | None = None,
    choices: dict[str, Choices] | None = None,
) -> Cell:
    """The normal cell of these probabilities, (edges, ops), and of those of inputs, (nodes, predecessors)."""
    p = torch.as_tensor(normal, dtype=torch.float64)
    tables = {"normal/op": p, "reduce/op": p}
    if beta is not None:
        inputs = torch.as_tensor(beta, dtype=torch.float64)
        tables |= {"normal/input": inputs, "reduce/input": inputs}
    return searcher.derive(space, choices or space.choices, tables, random.Random(0)).normal


# Ties


def test_equal_alphas_give_the_first_inputs_and_the_first_operation() -> None:
    uniform = torch.full((14, 8), 1 / 8)
    cell = derive(Argmax(), DARTS, uniform)
    assert cell.nodes == (((MAX, 0), (MAX, 1)),) * 4
    assert cell.concat == (2, 3, 4, 5)


def test_equal_alphas_give_the_last_inputs_and_the_last_operation_of_p_darts() -> None:
    cell = derive(Argmax(ties="last"), DARTS, torch.full((14, 8), 1 / 8))
    assert cell.nodes == tuple(((DIL5, node - 2), (DIL5, node - 1)) for node in range(2, 6))


def test_equal_alphas_give_two_operations_on_the_first_input_by_pairs() -> None:
    # GDAS: all pairs of a node are equal; predecessor 0 comes first, with its operations in order.
    space = PAPERS["gdas"].space
    cell = derive(Argmax(pairs=True), space, torch.full((14, 8), 1 / 8))
    assert cell.nodes == (((SKIP, 0), (SEP3, 0)),) * 4


def test_equal_betas_do_not_change_alpha() -> None:
    beta = [[1 / 2, 1 / 2, 0, 0, 0], [1 / 3] * 3 + [0, 0], [1 / 4] * 4 + [0], [1 / 5] * 5]
    p = torch.rand(14, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    assert derive(Argmax(), DARTS, p, beta) == derive(Argmax(), DARTS, p)


# What an edge is worth. Columns: none, skip, sep3, sep5.


EDGES = [
    [0.0, 0.1, 0.5, 0.4],  # 2<-0
    [0.0, 0.1, 0.2, 0.7],  # 2<-1
    [0.0, 0.1, 0.5, 0.4],  # 3<-0: worth 0.5
    [0.0, 0.7, 0.2, 0.1],  # 3<-1: worth 0.7
    [0.0, 0.1, 0.3, 0.6],  # 3<-2: worth 0.6
]
BETA = [[0.5, 0.5, 0.0], [0.5, 0.2, 0.3]]


def test_inputs_are_listed_by_decreasing_strength() -> None:
    assert derive(Argmax(), TWO, EDGES).nodes == (((SEP5, 1), (SEP3, 0)), ((SKIP, 1), (SEP5, 2)))


def test_inputs_are_listed_by_predecessor_where_ties_go_to_the_last() -> None:
    assert derive(Argmax(ties="last"), TWO, EDGES).nodes == (((SEP3, 0), (SEP5, 1)), ((SKIP, 1), (SEP5, 2)))


@pytest.mark.parametrize(
    ("edges_by", "expected"),
    [
        ("alpha", ((SKIP, 1), (SEP5, 2))),  # 0.7, 0.6 | 0.5
        ("alpha_beta", ((SEP3, 0), (SEP5, 2))),  # 0.25, 0.18 | 0.14
        ("beta", ((SEP3, 0), (SEP5, 2))),  # 0.5, 0.3 | 0.2
    ],
)
def test_beta_enters_the_strength_of_an_edge(
    edges_by: EdgesBy, expected: tuple[tuple[str, int], ...]
) -> None:
    assert derive(Argmax(edges_by=edges_by), TWO, EDGES, BETA).nodes[1] == expected


def test_beta_alone_ranks_otherwise_than_alpha_times_beta() -> None:
    beta = [[0.5, 0.5, 0.0], [0.34, 0.32, 0.34]]
    by = {rule: derive(Argmax(edges_by=rule), TWO, EDGES, beta).nodes[1] for rule in ("alpha_beta", "beta")}
    assert by == {"alpha_beta": ((SKIP, 1), (SEP5, 2)), "beta": ((SEP3, 0), (SEP5, 2))}


@given(st.data())
def test_beta_never_changes_the_operation_on_an_edge(data: st.DataObject) -> None:
    tables = data.draw(learned(TWO, edge_norm=True, ties=False))
    alpha, beta = tables["normal/op"], tables["normal/input"]
    for rule in ("alpha_beta", "beta"):
        for node, inputs in enumerate(derive(Argmax(edges_by=rule), TWO, alpha, beta).nodes, start=2):
            for op, source in inputs:
                row = alpha[TWO.edges.index((node, source))]
                assert op == TWO.ops[1 + int(row[1:].argmax())]


def test_without_edge_normalisation_the_strength_is_alphas() -> None:
    assert derive(Argmax(), TWO, EDGES) == derive(Argmax(edges_by="alpha"), TWO, EDGES)
    with pytest.raises(ValueError, match="edges_by='beta' needs edge normalisation"):
        derive(Argmax(edges_by="beta"), TWO, EDGES)


def test_none_is_never_chosen_but_lowers_its_edge() -> None:
    free = [[0.0, 0.1, 0.5, 0.4]] * 5
    assert derive(Argmax(), TWO, free).nodes[1] == ((SEP3, 0), (SEP3, 1))
    weighed_down = [*free[:2], [0.8, 0.02, 0.10, 0.08], *free[3:]]  # 3<-0 with the same odds among the others
    assert derive(Argmax(), TWO, weighed_down).nodes[1] == ((SEP3, 1), (SEP3, 2))
    heavy = [[0.97, 0.0, 0.02, 0.01]] * 5
    assert derive(Argmax(), TWO, heavy).nodes == (((SEP3, 0), (SEP3, 1)),) * 2


def test_pairs_may_take_one_input_twice() -> None:
    p = [[0.1, 0.5, 0.2, 0.2], [0.1, 0.2, 0.4, 0.3], *([[0.1, 0.3, 0.3, 0.3]] * 2), [0.1, 0.0, 0.5, 0.4]]
    assert derive(Argmax(pairs=True), TWO, p).nodes == (((SKIP, 0), (SEP3, 1)), ((SEP3, 2), (SEP5, 2)))
    assert derive(Argmax(), TWO, p).nodes[1] == ((SEP3, 2), (SKIP, 0))


def test_one_input_per_node() -> None:
    space = replace(TWO, inputs_per_node=1)
    assert derive(Argmax(), space, EDGES).nodes == (((SEP5, 1),), ((SKIP, 1),))


def test_only_surviving_operations_are_taken() -> None:
    survivors = ((0, 1), (2, 3), (1, 2), (0, 3), (1, 2))
    choices = {**TWO.choices, "normal/op": TWO.choices["normal/op"].keep(survivors)}
    p = torch.full((5, 4), 1.0)
    cell = derive(Argmax(), TWO, p, choices=choices)
    assert cell.nodes == (((SKIP, 0), (SEP3, 1)), ((SKIP, 0), (SEP5, 1)))


# The skip cap


def best_edges(
    score: Tensor, allowed: tuple[tuple[int, ...], ...], space: CellSpace
) -> list[tuple[int, int, float]]:
    """For every node its best edges with their best operation and score; plainly, for scores without ties."""
    taken = []
    for node in range(2, space.nodes + 2):
        ranked = []
        for edge, (target, _) in enumerate(space.edges):
            if target == node:
                options = [o for o in allowed[edge] if space.ops[o] != "none"]
                best = max(options, key=lambda o: float(score[edge, o]))
                ranked.append((float(score[edge, best]), edge, best))
        taken += [(edge, op, value) for value, edge, op in sorted(ranked)[-space.inputs_per_node :]]
    return taken


def capped_in_one_shot(
    score: Tensor, allowed: tuple[tuple[int, ...], ...], space: CellSpace, most: int
) -> set[tuple[str, int, int]]:
    """The cap in one shot: of the selected skips keep the best, forget every other skip, derive once."""
    skip = space.ops.index(SKIP)
    selected = [(value, edge) for edge, op, value in best_edges(score, allowed, space) if op == skip]
    if len(selected) > most:
        kept = [edge for _, edge in sorted(selected)[len(selected) - most :]]
        score = score.clone()
        score[[edge for edge in range(len(space.edges)) if edge not in kept], skip] = 0
    return {(space.ops[op], *space.edges[edge]) for edge, op, _ in best_edges(score, allowed, space)}


def edges_of(cell: Cell) -> set[tuple[str, int, int]]:
    return {(op, node, source) for node, inputs in enumerate(cell.nodes, start=2) for op, source in inputs}


SKIPPY = CellSpace(name="skippy", ops=("none", SKIP, SEP3))


@given(
    st.data(),
    st.sampled_from([DARTS, SKIPPY, replace(SKIPPY, nodes=3), replace(SKIPPY, inputs_per_node=1)]),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(["first", "last"]),
)
def test_the_cap_is_its_one_shot_form(
    data: st.DataObject, space: CellSpace, most: int, edge_norm: bool, ties: Literal["first", "last"]
) -> None:
    tables = data.draw(learned(space, edge_norm=edge_norm, ties=False))
    p = tables["normal/op"].clone()
    p[:, space.ops.index(SKIP)] *= data.draw(st.sampled_from([1.0, 2.0, 5.0]))  # many skips
    beta = tables.get("normal/input")
    searcher = Argmax(max_skip=most, ties=ties)
    capped = derive(searcher, space, p, beta)
    free = derive(replace(searcher, max_skip=None), space, p, beta)
    assert capped.skips <= most
    if free.skips <= most:
        assert capped == free, "a cell under the cap is left alone"
    if free.skips >= most:
        assert capped.skips == most, "no more skips are taken away than needed"
    score = p if beta is None else p * torch.stack([beta[n - 2, s] for n, s in space.edges])[:, None]
    allowed = space.choices["normal/op"].allowed
    assert edges_of(capped) == capped_in_one_shot(score, allowed, space, most)


@given(st.data(), st.integers(0, 3))
def test_the_cap_is_its_one_shot_form_on_surviving_operations(data: st.DataObject, most: int) -> None:
    p = data.draw(learned(DARTS, edge_norm=False, ties=False))["normal/op"]
    p[:, DARTS.ops.index(SKIP)] *= 3
    survivors = keep_likeliest(DARTS.choices["normal/op"], p, 3)
    choices = {**DARTS.choices, "normal/op": survivors}
    capped = derive(Argmax(max_skip=most, ties="last"), DARTS, p, choices=choices)
    assert capped.skips <= most
    assert edges_of(capped) == capped_in_one_shot(p, survivors.allowed, DARTS, most)


@given(st.data(), spaces(), st.integers(0, 3))
def test_the_cap_is_met_or_refused_in_any_space(data: st.DataObject, space: CellSpace, most: int) -> None:
    tables = data.draw(learned(space))
    searcher = Argmax(max_skip=most)
    names = space.op_choices("normal")
    others = [{space.ops[o] for o in allowed} - {"none", SKIP} for allowed in names.allowed]
    # The fewest skips of any cell: of the inputs a node takes, those left to edges that offer a skip only.
    forced = 0
    for node in range(2, space.nodes + 2):
        free = sum(
            bool(other) for other, (target, _) in zip(others, space.edges, strict=True) if target == node
        )
        forced += max(0, space.inputs_per_node - free)
    if forced > most:
        with pytest.raises(ValueError, match=f"max_skip={most} cannot be met"):
            searcher.derive(space, space.choices, tables, random.Random(0))
    else:
        assert searcher.derive(space, space.choices, tables, random.Random(0)).normal.skips <= most


def test_taking_a_skip_away_can_demote_its_edge_and_let_another_skip_in() -> None:
    p = [
        [0.0, 0.1, 0.9, 0.0],
        [0.0, 0.1, 0.9, 0.0],
        [0.0, 0.6, 0.2, 0.2],  # 3<-0: a selected skip, the weakest; without it worth 0.2
        [0.0, 0.1, 0.8, 0.1],  # 3<-1
        [0.0, 0.4, 0.35, 0.25],  # 3<-2: not selected; its skip comes in next, and goes next
    ]
    assert derive(Argmax(), TWO, p).nodes[1] == ((SEP3, 1), (SKIP, 0))
    assert derive(Argmax(max_skip=0), TWO, p).nodes[1] == ((SEP3, 1), (SEP3, 2))


def test_the_reduction_cell_is_not_capped() -> None:
    p = torch.tensor([[0.0, 0.8, 0.1, 0.1]] * 5, dtype=torch.float64)
    searcher = Argmax(max_skip=1)
    genotype = searcher.derive(TWO, TWO.choices, {"normal/op": p, "reduce/op": p}, random.Random(0))
    assert (genotype.normal.skips, genotype.reduce.skips) == (1, 4)


def test_equally_likely_skips_go_from_the_first_edge_on() -> None:
    p = [[0.0, 0.8, 0.1, 0.1]] * 5
    cell = derive(Argmax(max_skip=2, ties="last"), TWO, p)
    # Node 3 loses a skip only once both of node 2 are gone.
    assert cell.nodes == (((SEP5, 0), (SEP5, 1)), ((SKIP, 1), (SKIP, 2)))


def test_the_cap_works_on_pairs() -> None:
    p = [[0.0, 0.8, 0.15, 0.05]] * 5
    cell = derive(Argmax(max_skip=0, pairs=True), TWO, p)
    assert cell.nodes == (((SEP3, 0), (SEP3, 1)),) * 2


def test_an_impossible_cap_is_refused() -> None:
    only_skips = CellSpace(name="skips", ops=("none", SKIP))
    p = torch.full((14, 2), 0.5)
    for searcher in (Argmax(max_skip=7), RandomGenotype(max_skip=7)):
        with pytest.raises(ValueError, match="max_skip=7"):
            derive(searcher, only_skips, p)
    for searcher in (Argmax(max_skip=8), RandomGenotype(max_skip=8)):
        assert derive(searcher, only_skips, p).skips == 8


@pytest.mark.parametrize("kind", [Argmax, RandomGenotype])
def test_a_negative_cap_is_refused(kind: type[Argmax] | type[RandomGenotype]) -> None:
    with pytest.raises(ValueError, match="max_skip=-1 must be at least 0, or None for no cap"):
        kind(max_skip=-1)


# Keeping the likeliest


def test_keep_likeliest_of_equals_drops_the_first() -> None:
    table = DARTS.choices["normal/op"]
    kept = keep_likeliest(table, torch.full((14, 8), 1 / 8), 5)
    assert set(kept.allowed) == {(3, 4, 5, 6, 7)}


def test_none_competes_when_the_likeliest_are_kept() -> None:
    p = torch.tensor([[0.6, 0.1, 0.2, 0.1], [0.0, 0.4, 0.3, 0.3]]).repeat(3, 1)[:5]
    kept = keep_likeliest(TWO.choices["normal/op"], p, 2)
    assert kept.allowed[:2] == ((0, 2), (1, 3))


# Random genotypes


def all_genotypes(space: CellSpace) -> set[Genotype]:
    """Every genotype of a one-node space with one input."""
    made = [op for op in space.ops if op != "none"]
    cells = [Cell((((op, source),),), (2,)) for op, source in product(made, (0, 1))]
    return {Genotype(normal, reduce) for normal, reduce in product(cells, cells)}


SMALLEST = CellSpace(nodes=1, ops=("none", SKIP, SEP3, MAX), inputs_per_node=1)


def draw_many(searcher: RandomGenotype, space: CellSpace, count: int) -> Counter[Genotype]:
    rng = random.Random(0)
    return Counter(searcher.derive(space, space.choices, {}, rng) for _ in range(count))


@pytest.mark.parametrize("cap", [None, 0])
def test_random_genotypes_are_uniform(cap: int | None) -> None:
    drawn = draw_many(RandomGenotype(cap), SMALLEST, 7200)
    expected = {g for g in all_genotypes(SMALLEST) if cap is None or g.normal.skips <= cap}
    assert len(expected) == (36 if cap is None else 24)
    assert set(drawn) == expected
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_random_genotypes_are_uniform_over_pairs_of_inputs_and_restricted_operations() -> None:
    ops = ((SKIP,), (SKIP, SEP3), (SEP3,), (SEP3, MAX), (SKIP, SEP3, MAX))
    space = CellSpace(nodes=2, ops=(SKIP, SEP3, MAX), normal_ops=ops, reduce_ops=((SKIP,),) * 5)
    rng = random.Random(0)
    drawn = Counter(space.sample(rng).normal.nodes[1] for _ in range(6000))
    by_inputs: Counter[tuple[int, ...]] = Counter()
    for inputs, count in drawn.items():
        by_inputs[tuple(source for _, source in inputs)] += count
    assert set(by_inputs) == {(0, 1), (0, 2), (1, 2)}
    assert stats.chisquare(list(by_inputs.values())).pvalue > 1e-3
    both = [count for inputs, count in drawn.items() if {source for _, source in inputs} == {1, 2}]
    assert len(both) == 6
    assert stats.chisquare(both).pvalue > 1e-3


def test_the_cap_is_a_fair_one() -> None:
    # Given at most one skip, a capped draw is distributed as an uncapped one that happens to meet the cap.
    space = CellSpace(nodes=1, ops=(SKIP, SEP3, MAX))
    capped = draw_many(RandomGenotype(1), space, 3200)
    assert set(capped) == {g for g in draw_many(RandomGenotype(), space, 3000) if g.normal.skips <= 1}
    assert stats.chisquare(list(capped.values())).pvalue > 1e-3


def test_random_genotypes_of_a_seed_do_not_depend_on_what_was_learned() -> None:
    for space in SPACES.values():
        drawn = [
            RandomGenotype().derive(space, space.choices, tables, random.Random(5))
            for tables in ({}, {"normal/op": torch.zeros(14, len(space.ops))})
        ]
        assert drawn[0] == drawn[1]
