"""Agreement: whether searches of one arm find the same cells, and from which epoch on each keeps its own.

High agreement is not quality: searches that all collapse to skip connections agree.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from analysis.records import Tables
from analysis.resample import DRAWS, Array, Draws, Estimate, Kernel, Units, estimate, mean_kernel, ratio
from analysis.summary import dependence
from nas.genotype import Genotype, jaccard, parts

KEPT = 0.9
"""Jaccard index with the genotype of the last epoch from which on a search is said to keep its own."""

_MOST_EPOCHS = 12


@dataclass(frozen=True)
class EpochAgreement:
    """How much of the genotype of an epoch is left in that of the last epoch of the same search."""

    epoch: int
    jaccard: Estimate
    """Mean over the searches that recorded a genotype at this epoch."""


@dataclass(frozen=True)
class ArmAgreement:
    """How alike the cells are that the searches of one arm ended with; intervals are over searches."""

    arm: str
    baseline: bool
    """Whether it draws at random: the agreement that comes by chance."""

    n: int
    """Searches whose genotype is known."""

    n_total: int
    jaccard: Estimate
    """Mean over pairs of searches of the edges (cell, node, source, operation) that both have, over those
    that either has."""

    kappa: Estimate
    """`kappa` of the searches."""

    edits: Estimate
    """Mean of `edit_distance` over pairs of searches."""

    kept_from: Estimate
    """Mean over searches of the first epoch from which on the genotype shares at least `KEPT` of its edges
    with that of the last epoch."""

    last_epoch: int | None
    """Latest last epoch of these searches; None where no genotypes were recorded over epochs."""

    epochs: tuple[EpochAgreement, ...]
    """First, last and up to 10 epochs between."""


def of_arms(tables: Tables, draws: Draws = DRAWS) -> tuple[ArmAgreement, ...]:
    """Agreement of each arm that has at least two searches with a genotype.

    An arm whose searches are no sample of independent ones has no intervals.

    Args:
        tables: with one row per search, as `analysis.summary.by_search` gives.
        draws: of the intervals.
    """
    final = finals(tables)
    epochs = by_epoch(tables, final["trial_id"])
    found = []
    for arm in tables.arms:
        mine = final[final["arm"] == arm]
        if len(mine) > 1:
            searched = epochs[epochs["trial_id"].isin(mine["trial_id"])]
            found.append(_of_arm(tables, arm, list(mine["genotype"]), searched, draws))
    return tuple(found)


def _of_arm(
    tables: Tables, arm: str, genotypes: Sequence[Genotype], epochs: pd.DataFrame, draws: Draws
) -> ArmAgreement:
    doubt = dependence(tables, arm, retrained=False)

    def estimated(kernel: Kernel, n: int, name: str) -> Estimate:
        found = estimate(kernel, Units.of(n), name, draws, correct=False)
        return found if doubt is None else replace(found.restricted(doubt), low=None, high=None)

    n = len(genotypes)
    since = _kept_from(epochs)
    return ArmAgreement(
        arm=arm,
        baseline=arm == tables.baseline,
        n=n,
        n_total=int((tables.trials["arm"] == arm).sum()),
        jaccard=estimated(pair_mean_kernel(_pairwise(jaccard, genotypes)), n, "mean Jaccard index of pairs"),
        kappa=estimated(kappa_kernel(genotypes), n, "Fleiss's kappa"),
        edits=estimated(pair_mean_kernel(distances(genotypes)), n, "mean edit distance of pairs"),
        kept_from=estimated(mean_kernel(since), len(since), "mean epoch"),
        last_epoch=int(epochs["epoch"].max()) if len(epochs) else None,
        epochs=tuple(
            EpochAgreement(
                epoch, estimated(mean_kernel(values), len(values), f"mean Jaccard index at epoch {epoch}")
            )
            for epoch, values in _spread(epochs)
        ),
    )


# Genotypes of a study


def finals(tables: Tables) -> pd.DataFrame:
    """Genotypes that searches ended with, by arm and seed, a row each: `arm`, `trial_id`, `genotype`."""
    kept = ["arm", "trial_id", *(["search_seed"] if "search_seed" in tables.trials else [])]
    last = tables.genotypes.loc[tables.genotypes["stage"] == "final", ["trial_id", "genotype"]]
    found = tables.trials[kept].merge(last, on="trial_id")
    order = {arm: place for place, arm in enumerate(tables.arms)}
    found = found.assign(_arm=found["arm"].map(order)).sort_values(["_arm", *kept[2:], "trial_id"])
    return found.assign(genotype=found["genotype"].map(_read))[["arm", "trial_id", "genotype"]]


def by_epoch(tables: Tables, trials: "pd.Series[str]") -> pd.DataFrame:
    """Jaccard index of each epoch's genotype with that of the last: `trial_id`, `epoch`, `jaccard`.

    A search that recorded a single genotype says nothing of epochs and is left out.
    """
    rows = tables.genotypes
    rows = rows[(rows["stage"] == "search") & rows["trial_id"].isin(trials)].sort_values(
        ["trial_id", "epoch"]
    )
    texts = rows.groupby("trial_id")["genotype"]
    rows = rows.assign(last=texts.transform("last"))[texts.transform("size") > 1]
    shared = [_shared(one, last) for one, last in zip(rows["genotype"], rows["last"], strict=True)]
    return pd.DataFrame(
        {"trial_id": rows["trial_id"], "epoch": rows["epoch"].astype(int), "jaccard": np.array(shared, float)}
    )


@lru_cache(maxsize=4096)
def _read(text: str) -> Genotype:
    return Genotype.from_json(json.loads(text))


@lru_cache(maxsize=4096)
def _shared(one: str, other: str) -> float:
    return jaccard(_read(one), _read(other))


def _kept_from(epochs: pd.DataFrame) -> Array:
    """First epoch of each search from which on its Jaccard index stays at `KEPT` or above."""
    since = []
    for _, search in epochs.groupby("trial_id"):
        below = np.flatnonzero(search["jaccard"].to_numpy() < KEPT)
        since.append(search["epoch"].iloc[int(below[-1]) + 1 if len(below) else 0])
    return np.array(since, dtype=np.float64)


def _spread(epochs: pd.DataFrame) -> list[tuple[int, Array]]:
    """Values at a few epochs, the first and the last among them."""
    numbers = np.sort(epochs["epoch"].unique())
    chosen = (
        numbers[np.unique(np.linspace(0, len(numbers) - 1, _MOST_EPOCHS).astype(int))] if len(numbers) else []
    )
    return [
        (int(number), epochs.loc[epochs["epoch"] == number, "jaccard"].to_numpy(float)) for number in chosen
    ]


# Pairs of genotypes


def edit_distance(one: Genotype, other: Genotype) -> int:
    """Operations or predecessors to change to make the network of `one` that of `other`, at most.

    Edges are compared node by node in canonical form, so that two ways to write one network are 0 apart; a
    renumbering of nodes that would need fewer changes is not looked for.
    """
    return _edits(one.canonical(), other.canonical())


def distances(genotypes: Sequence[Genotype]) -> Array:
    """Edit distances between all genotypes, shape (genotypes, genotypes)."""
    return _pairwise(_edits, [genotype.canonical() for genotype in genotypes])


def _edits(one: Genotype, other: Genotype) -> int:
    """Edit distance of two canonical genotypes."""
    total = 0
    for first, second in ((one.normal, other.normal), (one.reduce, other.reduce)):
        for mine, yours in itertools.zip_longest(first.nodes, second.nodes, fillvalue=()):
            shared = sum(min(mine.count(edge), yours.count(edge)) for edge in set(mine))
            total += max(len(mine), len(yours)) - shared
    return total


def _pairwise(function: Callable[[Genotype, Genotype], float], genotypes: Sequence[Genotype]) -> Array:
    """A symmetric function of all pairs, shape (genotypes, genotypes); equal genotypes are compared once."""
    different = list(dict.fromkeys(genotypes))
    table = np.zeros((len(different), len(different)))
    for i, j in itertools.combinations_with_replacement(range(len(different)), 2):
        table[i, j] = table[j, i] = function(different[i], different[j])
    place = {genotype: index for index, genotype in enumerate(different)}
    rows = [place[genotype] for genotype in genotypes]
    return table[np.ix_(rows, rows)]


# Kernels


def pair_mean_kernel(values: Array) -> Kernel:
    """Mean of a symmetric matrix over pairs of different rows, weighted by their product; NaN without a pair.

    A row that is drawn twice makes no pair with itself, which would be one of two equal genotypes.
    """
    apart = values - np.diag(np.diag(values))

    def kernel(weights: Array) -> Array:
        total = np.einsum("bi,bi->b", weights @ apart, weights)
        return ratio(total, weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1))

    return kernel


def kappa(genotypes: Sequence[Genotype]) -> float | None:
    """Fleiss's kappa of what searches say of every edge: one of the operations, or that it is not taken.

    1 where all agree on every edge, 0 where they agree as often as chance would have it with the same shares
    of answers; None of fewer than two genotypes, or where nothing but one answer was ever given.

    Source: Fleiss, "Measuring nominal scale agreement among many raters", Psychological Bulletin 76, 1971.
    """
    value = float(kappa_kernel(genotypes)(np.ones((1, len(genotypes))))[0]) if genotypes else np.nan
    return value if np.isfinite(value) else None


def kappa_kernel(genotypes: Sequence[Genotype]) -> Kernel:
    """`kappa` of searches with weights, whose pairs count their product."""
    answers = _answers(genotypes)
    same = (answers[:, None, :] == answers[None, :, :]).mean(axis=2)
    shares = np.stack([(answers == answer).mean(axis=1) for answer in np.unique(answers)], axis=1)
    observed_kernel = pair_mean_kernel(same)

    def kernel(weights: Array) -> Array:
        chance = (ratio(weights @ shares, weights.sum(axis=1, keepdims=True)) ** 2).sum(axis=1)
        below = 1 - chance
        return ratio(observed_kernel(weights) - chance, np.where(below > 1e-12, below, 0.0))

    return kernel


def _answers(genotypes: Sequence[Genotype]) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    """What each genotype has on every edge that any could have, as numbers, shape (genotypes, edges)."""
    nodes = max(len(cell.nodes) for genotype in genotypes for cell in (genotype.normal, genotype.reduce))
    edges = [
        (cell, node, source)
        for cell in ("normal", "reduce")
        for node in range(2, nodes + 2)
        for source in range(node)
    ]
    said: list[list[str]] = []
    for genotype in genotypes:
        taken: dict[tuple[str, int, int], str] = {}
        for cell, node, source, op in parts(genotype):
            key = (cell, node, source)
            taken[key] = f"{taken[key]}+{op}" if key in taken else op
        said.append([taken.get(edge, "") for edge in edges])
    codes = np.unique(np.array(said), return_inverse=True)[1]
    return codes.reshape(len(genotypes), len(edges))
