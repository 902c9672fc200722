"""How alike the cells of searches are: values by hand, by brute force, and from the records of a study."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import agreement
from analysis.agreement import ArmAgreement, distances, edit_distance, kappa, kappa_kernel, pair_mean_kernel
from analysis.records import Row, Tables, tables_of
from analysis.resample import Draws
from analysis.summary import by_search
from nas.genotype import Cell, Genotype, jaccard
from nas.spaces.cell import SPACES
from tests.analysis.conftest import end, epoch, genotype, start

SKIP, SEP, MAX = "skip_connect", "sep_conv_3x3", "max_pool_3x3"


def small(*nodes: tuple[tuple[str, int], ...]) -> Genotype:
    cell = Cell(nodes, tuple(range(2, len(nodes) + 2)))
    return Genotype(cell, cell)


BASE = small(((SKIP, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
SWAPPED = small(((SEP, 1), (SKIP, 0)), ((SKIP, 0), (SEP, 2)))
ONE_OP = small(((MAX, 0), (SEP, 1)), ((SKIP, 0), (SEP, 2)))
NOTHING = small(((MAX, 0), (MAX, 1)), ((MAX, 0), (MAX, 1)))


def sampled(n: int, seed: int = 0) -> list[Genotype]:
    draws = random.Random(seed)
    return [SPACES["darts"].sample(draws) for _ in range(n)]


# Edit distance


def test_edits_are_counted_in_both_cells_whatever_the_order_of_inputs() -> None:
    assert [edit_distance(BASE, other) for other in (SWAPPED, ONE_OP, NOTHING)] == [0, 2, 8]
    assert edit_distance(small(((SKIP, 0), (SEP, 1))), BASE) == 4, "a missing node is all of its edges"


def test_nodes_may_be_numbered_otherwise() -> None:
    one = small(((SKIP, 0), (SKIP, 1)), ((SEP, 0), (SEP, 1)))
    other = small(((SEP, 0), (SEP, 1)), ((SKIP, 0), (SKIP, 1)))
    assert edit_distance(one, other) == 0
    assert jaccard(one, other) == 0


def test_the_matrix_has_every_pair_and_copies_beside_each_other() -> None:
    genotypes = [BASE, ONE_OP, BASE, NOTHING]
    expected = [[edit_distance(one, other) for other in genotypes] for one in genotypes]
    np.testing.assert_array_equal(distances(genotypes), expected)


# Kappa


def fleiss(genotypes: Sequence[Genotype], nodes: int) -> float:
    """Fleiss's kappa by its own formula, from a table of how many searches say what of which edge."""
    tables, n = [], len(genotypes)
    for name in ("normal", "reduce"):
        for node in range(nodes):
            inputs = [getattr(one, name).nodes[node] for one in genotypes]
            for source in range(node + 2):
                tables.append(
                    Counter("+".join(sorted(op for op, at in edges if at == source)) for edges in inputs)
                )
    per_edge = [(sum(k * k for k in said.values()) - n) / (n * (n - 1)) for said in tables]
    total = sum(tables, Counter[str]())
    chance = sum((k / (n * len(tables))) ** 2 for k in total.values())
    return (sum(per_edge) / len(tables) - chance) / (1 - chance)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_kappa_is_that_of_fleiss(n: int) -> None:
    genotypes = sampled(n, seed=n)
    assert kappa(genotypes) == pytest.approx(fleiss(genotypes, nodes=4))


def test_kappa_of_two_by_hand() -> None:
    # Five edges a cell; answers differ on one of them, which one seed gives to SKIP and the other to MAX.
    shares = {"": 2 / 10, SKIP: 3 / 10, SEP: 4 / 10, MAX: 1 / 10}
    chance = sum(share**2 for share in shares.values())
    assert kappa([BASE, ONE_OP]) == pytest.approx((4 / 5 - chance) / (1 - chance))


def test_kappa_of_searches_that_agree_wholly_and_of_random_ones() -> None:
    assert kappa([BASE, SWAPPED, BASE]) == pytest.approx(1)
    # Not 0: a node's first edges are taken more often than those of later nodes, which all draws share.
    assert abs(kappa(sampled(300)) or 1) < 0.15
    assert kappa([BASE]) is kappa([]) is None


# Weights


def test_a_search_that_is_drawn_twice_makes_no_pair_with_itself() -> None:
    genotypes = sampled(4)
    values = np.array([[jaccard(one, other) for other in genotypes] for one in genotypes])
    drawn = [0, 0, 1, 3]
    pairs = [(i, j) for i, j in itertools.combinations(drawn, 2) if i != j]
    weights = np.bincount(drawn, minlength=4)[None].astype(float)
    assert pair_mean_kernel(values)(weights)[0] == pytest.approx(np.mean([values[i, j] for i, j in pairs]))
    assert np.isnan(pair_mean_kernel(values)(np.array([[3.0, 0, 0, 0]]))[0])


def test_weights_of_kappa_leave_searches_out() -> None:
    genotypes = sampled(6)
    kernel = kappa_kernel(genotypes)
    for kept in ([0, 1, 2], [1, 3, 4, 5]):
        weights = np.isin(np.arange(6), kept)[None].astype(float)
        assert kernel(weights)[0] == pytest.approx(kappa([genotypes[i] for i in kept]))
    assert kernel(np.full((1, 6), 2.0))[0] == pytest.approx(kappa(genotypes))


# From records


def study(searches: int = 6, random_searches: int = 6, *more: list[Row], **fields: object) -> Tables:
    """An arm that settles on a cell, and a random one; the first cells of a search are those of others."""
    trials = [*more]
    for seed in range(searches):
        own = genotype(seed % 2)
        texts = [genotype(4), genotype(3), *[own] * 3] if seed else [own, genotype(4), own, own, own]
        rows = [epoch(f"k{seed}", at, {"seconds": 1.0}, genotype=text) for at, text in enumerate(texts)]
        trials.append([start(f"k{seed}", "K=4", seed), *rows, end(f"k{seed}", genotype=own)])
    for seed, drawn in enumerate(sampled(random_searches)):
        trials.append([start(f"r{seed}", "random", seed), end(f"r{seed}", genotype=str(drawn))])
    about = {"study_id": "s", "baseline": "random", "reference": None, "arms": ["K=4", "random"], **fields}
    return tables_of(about, {Path(rows[0]["trial"]): rows for rows in trials})


def of(tables: Tables) -> dict[str, ArmAgreement]:
    return {one.arm: one for one in agreement.of_arms(by_search(tables), Draws(resamples=399))}


def test_each_arm_is_the_mean_over_its_pairs() -> None:
    found = of(study())
    for arm, genotypes in {
        "K=4": [Genotype.parse(genotype(seed % 2)) for seed in range(6)],
        "random": sampled(6),
    }.items():
        pairs = list(itertools.combinations(genotypes, 2))
        assert found[arm].jaccard.value == pytest.approx(np.mean([jaccard(*pair) for pair in pairs]))
        assert found[arm].edits.value == pytest.approx(np.mean([edit_distance(*pair) for pair in pairs]))
        assert found[arm].kappa.value == pytest.approx(kappa(genotypes))
        assert (found[arm].n, found[arm].n_total, found[arm].baseline) == (6, 6, arm == "random")


def test_intervals_are_percentiles_over_searches() -> None:
    one = of(study())["random"].jaccard
    genotypes = sampled(6)
    values = np.array([[jaccard(a, b) for b in genotypes] for a in genotypes])
    drawn = np.random.default_rng(1).integers(0, 6, (4000, 6))
    means = []
    for row in drawn:
        chosen = values[np.ix_(row, row)][row[:, None] != row[None, :]]
        means += [chosen.mean()] if len(chosen) else []
    assert one.low is not None
    assert one.high is not None
    assert "percentile bootstrap, 399 resamples of 6 units" in one.method
    np.testing.assert_allclose([one.low, one.high], np.quantile(means, [0.025, 0.975]), atol=0.03)


def test_a_search_keeps_its_cells_from_where_they_no_longer_leave_the_last() -> None:
    one = of(study())["K=4"]
    # All but the first have theirs from epoch 2 on; the first had them at once, and lost them at epoch 1.
    assert (one.kept_from.value, one.kept_from.n, one.last_epoch) == (2.0, 6, 4)
    assert [(point.epoch, point.jaccard.n) for point in one.epochs] == [(at, 6) for at in range(5)]
    own = [Genotype.parse(genotype(seed % 2)) for seed in range(6)]
    first = [1.0, *(jaccard(Genotype.parse(genotype(4)), cell) for cell in own[1:])]
    assert one.epochs[0].jaccard.value == pytest.approx(np.mean(first))
    assert [point.jaccard.value for point in one.epochs[2:]] == [1, 1, 1]


def test_an_arm_that_records_no_epochs_keeps_nothing() -> None:
    one = of(study())["random"]
    assert (one.kept_from.value, one.last_epoch, one.epochs) == (None, None, ())


def test_fewer_than_five_searches_have_no_interval_and_one_has_nothing() -> None:
    found = of(study(searches=4, random_searches=1))
    assert set(found) == {"K=4"}
    one = found["K=4"]
    assert one.jaccard.low is None
    assert "4 independent units, fewer than 5" in (one.jaccard.restriction or "")


def test_searches_that_depend_on_one_another_have_no_interval() -> None:
    one = of(study(scheduler="pbt"))["K=4"]
    assert one.jaccard.value is not None
    assert all(estimate.low is None for estimate in (one.jaccard, one.kappa, one.edits, one.kept_from))
    assert "members of its population copy one another" in (one.jaccard.restriction or "")


def test_searches_without_a_genotype_are_counted() -> None:
    one = of(study(6, 6, [start("lost", "K=4", 9), end("lost", "oom", None)]))["K=4"]
    assert (one.n, one.n_total) == (6, 7)


def test_the_order_of_trials_changes_nothing() -> None:
    tables = study()
    turned = replace(
        tables, trials=tables.trials[::-1].reset_index(drop=True), genotypes=tables.genotypes[::-1]
    )
    draws = Draws(resamples=99)
    assert agreement.of_arms(tables, draws) == agreement.of_arms(turned, draws)
