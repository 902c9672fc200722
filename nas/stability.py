"""Stability: how far genotypes, and rankings of options, are the same from epoch to epoch. No torch."""

import math
from collections.abc import Sequence

from nas.genotype import Genotype, parts


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


def rank_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b of two scores of the same options; None where one of them ties all options."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    first = [_sign(one[i] - one[j]) for i, j in pairs]
    second = [_sign(other[i] - other[j]) for i, j in pairs]
    norm = math.sqrt(sum(map(abs, first)) * sum(map(abs, second)))
    return sum(a * b for a, b in zip(first, second, strict=True)) / norm if norm else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
