"""Stability: how alike genotypes are, between epochs of a search or between searches. No torch."""

import math
from collections.abc import Sequence
from itertools import zip_longest

from nas.genotype import Genotype

Part = tuple[str, int, int, str]
"""Cell, node, predecessor, operation."""


def parts(genotype: Genotype) -> list[Part]:
    """Every edge of a genotype as written, sorted."""
    return sorted(
        (cell, node, source, op)
        for cell in ("normal", "reduce")
        for node, inputs in enumerate(getattr(genotype, cell).nodes, start=2)
        for op, source in inputs
    )


def jaccard(one: Genotype, other: Genotype) -> float:
    """Edges that two genotypes share over edges that either has, from 0 to 1; numbered as written."""
    first, second = set(parts(one)), set(parts(other))
    return len(first & second) / len(first | second)


def hamming(one: Genotype, other: Genotype) -> float:
    """Share of the edges of `one` that `other` lacks, from 0 (the same) to 1.

    Raises:
        ValueError: the genotypes have different numbers of edges.
    """
    first, second = parts(one), parts(other)
    if len(first) != len(second):
        raise ValueError(
            f"genotypes of {len(first)} and {len(second)} edges have no Hamming distance; use jaccard"
        )
    return len(set(first) - set(second)) / len(set(first))


def topology_jaccard(one: Genotype, other: Genotype) -> float:
    """As `jaccard`, of which predecessors nodes read alone, whatever the operations."""
    first, second = ({part[:3] for part in parts(genotype)} for genotype in (one, other))
    return len(first & second) / len(first | second)


def shared_operations(one: Genotype, other: Genotype) -> float | None:
    """Share of the edges that two genotypes both have on which they also have an operation in common."""
    edges = {part[:3] for part in parts(one)} & {part[:3] for part in parts(other)}
    same = {part[:3] for part in set(parts(one)) & set(parts(other))}
    return len(same) / len(edges) if edges else None


def edit_distance(one: Genotype, other: Genotype) -> int:
    """Operations or predecessors to change to make the network of `one` that of `other`, at most.

    Edges are compared node by node in canonical form, so that two ways to write one network are 0 apart; a
    renumbering of nodes that would need fewer changes is not looked for.
    """
    one, other = one.canonical(), other.canonical()
    total = 0
    for first, second in ((one.normal, other.normal), (one.reduce, other.reduce)):
        for mine, yours in zip_longest(first.nodes, second.nodes, fillvalue=()):
            shared = sum(min(mine.count(edge), yours.count(edge)) for edge in set(mine))
            total += max(len(mine), len(yours)) - shared
    return total


def distances(genotypes: Sequence[Genotype]) -> list[list[int]]:
    """Matrix of edit distances between all genotypes, e.g. those of several seeds."""
    return [[edit_distance(one, other) for other in genotypes] for one in genotypes]


def agreement(genotypes: Sequence[Genotype]) -> float | None:
    """Fleiss's kappa of what searches say of every edge: one of the operations, or that it is not taken.

    1 where all agree on every edge, 0 where they agree as often as chance would have it with the same shares
    of answers; None of fewer than two genotypes, or where nothing but one answer was ever given. High
    agreement is not quality: searches that collapse to skips agree.

    Source: Fleiss, "Measuring nominal scale agreement among many raters", Psychological Bulletin 76, 1971.
    """
    raters = len(genotypes)
    if raters < 2:
        return None
    answers = []
    for genotype in genotypes:
        said: dict[tuple[str, int, int], str] = {}
        for cell, node, source, op in parts(genotype):
            key = (cell, node, source)
            said[key] = f"{said[key]}+{op}" if key in said else op
        answers.append(said)
    nodes = max(len(getattr(g, cell).nodes) for g in genotypes for cell in ("normal", "reduce"))
    edges = [
        (cell, node, s) for cell in ("normal", "reduce") for node in range(2, nodes + 2) for s in range(node)
    ]
    shares: dict[str, int] = {}
    agreed = 0.0
    for edge in edges:
        votes: dict[str, int] = {}
        for said in answers:
            answer = said.get(edge, "")
            votes[answer] = votes.get(answer, 0) + 1
            shares[answer] = shares.get(answer, 0) + 1
        agreed += sum(n * (n - 1) for n in votes.values()) / (raters * (raters - 1))
    observed = agreed / len(edges)
    chance = sum((n / (raters * len(edges))) ** 2 for n in shares.values())
    return None if chance == 1 else (observed - chance) / (1 - chance)


def rank_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b of two scores of the same options; None where one of them ties all options."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    first = [_sign(one[i] - one[j]) for i, j in pairs]
    second = [_sign(other[i] - other[j]) for i, j in pairs]
    norm = math.sqrt(sum(map(abs, first)) * sum(map(abs, second)))
    return sum(a * b for a, b in zip(first, second, strict=True)) / norm if norm else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
