"""The same arms on several data sets, one study each: aggregate scores, and ranks over the data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis import aggregate, findings, summary
from analysis.aggregate import CriticalDifference
from analysis.loaders import Sample
from analysis.resample import RESOLUTION, Array, Estimate, count

_Errors = Mapping[str, Mapping[str, Array]]
"""Test errors in percent of the runs of each arm, by data set."""


@dataclass(frozen=True)
class Across:
    """What several data sets say of the arms that all of them have."""

    datasets: tuple[str, ...]
    arms: tuple[str, ...]
    left_out: Mapping[str, str]
    """Arms that get no number, with the reason."""

    iqm: Mapping[str, Estimate]
    """Interquartile mean by arm of scores, 0 the mean random run and 1 the best run of the data set."""

    improvement: Mapping[tuple[str, str], Estimate]
    """Probability that a run of the first arm errs less than one of the second, mean over data sets."""

    ranks: CriticalDifference
    """Of the mean errors, by data set."""


def across(samples: Sequence[Sample], pool: bool = False) -> Across:
    """Arms compared over data sets; each sample is a study of one of them.

    Raises:
        ValueError: there is one study, two are of one data set or of an unknown one, endpoints differ, a
            study holds several protocols and `pool` does not ask for it, or fewer than two arms are left.
    """
    datasets = _datasets(samples)
    endpoints = {sample.measured for sample in samples}
    if len(endpoints) > 1:
        raise ValueError(
            f"the endpoints differ: {' | '.join(sorted(endpoints))}; give runs with one endpoint"
        )
    for name, sample in zip(datasets, samples, strict=True):
        if sample.protocols is not None and not pool:
            told = ", ".join(sample.protocols)
            raise ValueError(f"{name} holds different protocols ({told}); --pool pools them all the same")
    errors, left_out = _errors(datasets, samples)
    if len(errors) < 2:
        why = "; ".join(f"{arm}: {reason}" for arm, reason in left_out.items())
        raise ValueError(f"fewer than two arms have usable runs on every data set. {why}")
    means = {arm: np.array([runs.mean() for runs in by.values()]) for arm, by in errors.items()}
    accuracy = {arm: {name: 100 - runs for name, runs in by.items()} for arm, by in errors.items()}
    return Across(
        datasets=datasets,
        arms=tuple(errors),
        left_out=left_out,
        iqm={arm: aggregate.aggregate(scores) for arm, scores in _scores(errors, samples).items()},
        improvement={
            (one, other): aggregate.probability_of_improvement(accuracy[one], accuracy[other])
            for one, other in combinations(errors, 2)
        },
        ranks=aggregate.critical_difference(means, blocks="datasets"),
    )


def _datasets(samples: Sequence[Sample]) -> tuple[str, ...]:
    if len(samples) < 2:
        raise ValueError(f"--across needs several studies, one a data set; {len(samples)} is given")
    origins = [sample.tables.study.get("provenance") or {} for sample in samples]
    hashes = [origin.get("data_sha256") for origin in origins]
    if None in hashes or len(set(hashes)) < len(hashes):
        known = ", ".join("unknown" if digest is None else str(digest)[:12] for digest in hashes)
        raise ValueError(
            f"--across needs a data set of its own in each study; their hashes are {known}: runs on one data "
            "set are replicates of it"
        )
    names = [str(origin.get("data_name")) for origin in origins]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({str(digest)[:12]})"
        for name, digest in zip(names, hashes, strict=True)
    )


def _errors(datasets: Sequence[str], samples: Sequence[Sample]) -> tuple[_Errors, dict[str, str]]:
    """Errors of the arms that every data set has usable runs of, and why the others are left out."""
    found, left_out = {}, {}
    for arm in dict.fromkeys(arm for sample in samples for arm in sample.tables.arms):
        runs = {name: findings.percent(sample, arm) for name, sample in zip(datasets, samples, strict=True)}
        lacking = [name for name, values in runs.items() if not len(values)]
        doubts = [
            f"{doubt} on {name}"
            for name, sample in zip(datasets, samples, strict=True)
            if (doubt := summary.doubt((sample.tables, arm)))
        ]
        if lacking or doubts:
            lost = [f"no finished run on {', '.join(lacking)}"] if lacking else []
            left_out[arm] = "; ".join([*lost, *doubts])
        else:
            found[arm] = runs
    for one, other in combinations(list(found), 2):  # nor may one error stand for runs of two arms
        doubts = [
            f"{doubt} on {name}"
            for name, sample in zip(datasets, samples, strict=True)
            if (doubt := summary.doubt((sample.tables, one), (sample.tables, other)))
        ]
        if doubts:
            left_out |= {arm: f"{one} and {other}: {'; '.join(doubts)}" for arm in (one, other)}
    return {arm: runs for arm, runs in found.items() if arm not in left_out}, left_out


def _scores(errors: _Errors, samples: Sequence[Sample]) -> dict[str, dict[str, Array]]:
    """Normalised scores; none where the studies have no random arm in common, or nothing beats it."""
    baseline = samples[0].tables.baseline
    if baseline is None or baseline not in errors or {s.tables.baseline for s in samples} != {baseline}:
        return {}
    scale = {
        name: (-float(runs.mean()), -min(float(by[name].min()) for by in errors.values()))
        for name, runs in errors[baseline].items()
    }
    if any(best - random <= RESOLUTION for random, best in scale.values()):
        return {}
    return {
        arm: {name: aggregate.normalised(-runs, *scale[name]) for name, runs in by.items()}
        for arm, by in errors.items()
    }


def render(found: Across) -> str:
    """Text of a comparison over data sets."""
    lines = [f"{count(len(found.datasets), 'data set')}: {', '.join(found.datasets)}"]
    lines += [f"left out, {arm}: {why}" for arm, why in found.left_out.items()]
    lines.append("interquartile mean of scores, 0 the mean random run and 1 the best run of each data set:")
    lines += [f"  {arm:22} {_told(iqm)}" for arm, iqm in found.iqm.items()]
    if not found.iqm:
        lines.append("  none: no random arm that all studies have, or nothing errs less than it")
    lines.append("probability that a run errs less, mean over data sets:")
    lines += [f"  {f'{one} than {other}':22} {_told(p)}" for (one, other), p in found.improvement.items()]
    return "\n".join([*lines, *_ranks(found.ranks)])


def _ranks(found: CriticalDifference) -> list[str]:
    test = found.friedman
    if test is None or found.cd is None:
        return [f"ranks over data sets: {found.restriction}"]
    lines = ["mean ranks over data sets, 1 the best:"]
    lines += [f"  {arm:22} {rank:.3f}" for arm, rank in zip(found.methods, found.mean_ranks, strict=True)]
    f = "infinite" if test.iman_davenport is None else f"{test.iman_davenport:.3f}"
    lines.append(
        f"  Friedman chi-squared {test.chi_squared:.3f}, p = {test.p:.4f}; Iman-Davenport F {f}, "
        f"p = {test.p_iman_davenport:.4f}; n = {count(test.n_blocks, 'data set')}"
    )
    lines.append(f"  ranks closer than {found.cd:.3f} are not told apart (Nemenyi, alpha {found.alpha:g})")
    lines += [
        f"  {one} - {other}: signed-rank p = {p:.4f}" + ("" if by is None else f", {by:.4f} by Holm")
        for one, other, p, by in found.wilcoxon
    ]
    return lines + ([f"  {found.restriction}"] if found.restriction else [])


def _told(found: Estimate) -> str:
    return f"{found}" + (f"; {found.restriction}" if found.restriction else "")
