"""Arms of two studies held against each other, and an arm held against a published figure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis import compare, findings, planning, summary
from analysis.compare import Comparison, Equivalence, PairedDifference, Reproduction
from analysis.loaders import Sample
from analysis.resample import Estimate, count


@dataclass(frozen=True)
class Held:
    """An arm of one study held against an arm of another: test error in percent, first minus second."""

    arms: tuple[str, str]
    counts: tuple[str, str]
    """Of all runs of either arm, by what became of them."""

    means: tuple[float, float] | None
    """Of the finished runs; None, as are all other numbers, where an arm has no finished run."""

    comparison: Comparison | None
    paired: PairedDifference | None
    """Where both have one run of every search seed, and the same seeds."""

    equivalence: Equivalence | None
    in_pairs: bool
    """Whether the verdict rests on pairs: trials of equal configuration and seeds ran in both studies."""

    doubt: str | None
    """Why the finished runs allow no verdict, if so."""

    adjusted_p: float | None = None
    """By Holm's method over all pairs of arms that can be judged."""

    @property
    def p(self) -> float | None:
        """The p-value that the verdict rests on, not adjusted; None where there is no verdict."""
        if self.comparison is None or self.doubt:
            return None
        return self.paired.p if self.in_pairs and self.paired else self.comparison.difference.p

    @property
    def verdict(self) -> str:
        """Answer to the claim that the first arm errs less."""
        if self.comparison is None:
            return "undecided at n=0"
        if self.doubt:
            return "no verdict"
        answer = compare.verdict(self.comparison.difference, self.adjusted_p)
        return f"{answer} pairs" if self.in_pairs and answer.startswith("undecided") else answer


def alike(samples: Sequence[Sample], arms: Sequence[Sequence[str]], pool: bool = False) -> list[str]:
    """Sentences on what is not known of how the errors were measured, and on what differs and is pooled.

    Args:
        samples: studies.
        arms: whose errors are to be compared, one of each study; other arms have no say.
        pool: whether errors are compared although data or protocols differ.

    Raises:
        ValueError: the endpoints differ; or data or protocols do, and `pool` does not ask for it.
    """
    endpoints = dict.fromkeys(sample.measured for sample in samples)
    if len(endpoints) > 1:
        raise ValueError(
            f"the endpoints differ: {' | '.join(endpoints)}; such errors cannot be compared, not even with "
            "--pool; give runs with one endpoint"
        )
    told, differing = [], []
    hashes = [(sample.tables.study.get("provenance") or {}).get("data_sha256") for sample in samples]
    if len(set(hashes)) > 1:
        known = " and ".join("unknown" if digest is None else str(digest)[:12] for digest in hashes)
        differing.append(f"data ({known})")
    elif hashes[0] is None:
        told.append("data: hash not recorded, so it is not known that all runs had the same data")
    if not all(any(str(name).startswith("config.retrain.") for name in s.trials) for s in samples):
        told.append("protocol: not recorded, so it is not known that all runs were trained alike")
    for compared in arms:
        runs = [sample.tables.finals(arm) for sample, arm in zip(samples, compared, strict=True)]
        if found := summary.differing(pd.concat(runs, ignore_index=True)):
            differing.append(summary.told_protocols(found))
    differing = list(dict.fromkeys(differing))
    if differing and not pool:
        raise ValueError(
            f"errors are not measured alike: {'; '.join(differing)}; --pool compares them all the same"
        )
    return [*told, f"pooled over differing {'; '.join(differing)}"] if differing else told


def pairs(a: Sample, b: Sample, named: Sequence[str] | None) -> list[tuple[str, str]]:
    """Arms to be compared: the two named ones, or all that both studies have.

    Raises:
        ValueError: not two are named, one is not there, or the studies share none.
    """
    if named is None:
        shared = [(arm, arm) for arm in a.tables.arms if arm in b.tables.arms]
        if not shared:
            raise ValueError(
                f"the studies share no arm; name two with --arms, of {', '.join(a.tables.arms)} "
                f"and of {', '.join(b.tables.arms)}"
            )
        return shared
    if len(named) != 2:
        raise ValueError(f"--arms names {count(len(named), 'arm')}; name one of each study")
    check_arm(a, named[0])
    check_arm(b, named[1])
    return [(named[0], named[1])]


def check_arm(sample: Sample, arm: str) -> None:
    """Refuse the name of an arm that a study does not have."""
    if arm not in sample.tables.arms:
        raise ValueError(f"{arm!r} is no arm; use one of {', '.join(sample.tables.arms)}")


def check_margin(margin: float) -> None:
    """Refuse a margin of equivalence that is not one."""
    if not 0 < margin < 100:
        raise ValueError(f"--margin {margin:g} must be between 0 and 100 points; use e.g. {compare.MARGIN}")


def hold(
    a: Sample, b: Sample, arms: Sequence[tuple[str, str]], margin: float = compare.MARGIN
) -> tuple[Held, ...]:
    """Pairs of arms, one of each study, compared; their p-values are one family for Holm's adjustment."""
    found = [_held(a, b, pair, margin) for pair in arms]
    adjusted = compare.family({str(index): held.p for index, held in enumerate(found)}, "primary").adjusted
    return tuple(replace(held, adjusted_p=p) for held, p in zip(found, adjusted, strict=True))


def _held(a: Sample, b: Sample, arms: tuple[str, str], margin: float) -> Held:
    sides = ((a, arms[0]), (b, arms[1]))
    counts = (counted(a, arms[0]), counted(b, arms[1]))
    x, y = (findings.percent(sample, arm) for sample, arm in sides)
    if not len(x) or not len(y):
        return Held(arms, counts, None, None, None, None, False, None)
    finished = [set(sample.tables.finals(arm)["trial_id"]) for sample, arm in sides]
    same = len(finished[0] & finished[1])
    table = _by_seed(*sides)
    pairs = None if isinstance(table, str) else table
    in_pairs = bool(same) and pairs is not None
    tables = [(sample.tables, arm) for sample, arm in sides]
    # A trial that ran in both studies was retrained in both: each side answers for itself.
    doubts = [summary.doubt(side) for side in tables] if same else [summary.doubt(*tables)]
    if same and isinstance(table, str):
        doubts.append(f"{count(same, 'trial')} ran in both studies, and {table}")
    return Held(
        arms=arms,
        counts=counts,
        means=(float(x.mean()), float(y.mean())),
        comparison=compare.compare_arms(x, y),
        paired=None if pairs is None else compare.paired_difference(pairs["a"], pairs["b"]),
        equivalence=compare.equivalence(pairs["a"], pairs["b"], margin, paired=True)
        if pairs is not None and in_pairs
        else compare.equivalence(x, y, margin),
        in_pairs=in_pairs,
        doubt="; ".join(dict.fromkeys(filter(None, doubts))) or None,
    )


def _by_seed(*sides: tuple[Sample, str]) -> pd.DataFrame | str:
    """Errors of both arms, `a` and `b`, by search seed, or the reason why they do not come in pairs."""
    columns = []
    for sample, arm in sides:
        table = findings.by_seed(sample, [arm])
        if isinstance(table, str):
            return table
        columns.append(table[arm])
    if set(columns[0].index) != set(columns[1].index):
        return "not all runs come in pairs"
    return pd.concat(columns, axis=1, keys=["a", "b"])


def counted(sample: Sample, arm: str | None = None) -> str:
    """All runs (of an arm), by what became of them, as text."""
    table = summary.summarise(sample.tables)
    total = (table if arm is None else table[table["arm"] == arm]).sum(numeric_only=True).astype(int)
    told = f"n_total {total['n_total']}, n_used {total['n']}"
    told += "".join(f", {name} {total[name]}" for name in ("n_pruned", "n_failed", "n_pending"))
    return told + (f", ended without a test error {total['n_missing']}" if total["n_missing"] else "")


def reproduced(
    sample: Sample, arm: str, mean: float, sd: float | None = None, n: int | None = None
) -> tuple[Reproduction | None, str | None]:
    """The runs of an arm beside a published test error in percent, and the doubt that forbids intervals."""
    errors = findings.percent(sample, arm)
    if not len(errors):
        return None, "no run has finished"
    return compare.reproduction(errors, mean, sd, n), summary.doubt((sample.tables, arm))


# As text


def render(held: Held, n_tests: int) -> str:
    """Text of a comparison; `n_tests` is the number of p-values over which its own was adjusted."""
    lines = [f"{held.arms[0]} - {held.arms[1]}"]
    lines += [
        f"  {which}, {arm}: {counts}"
        for which, arm, counts in zip(("first", "second"), held.arms, held.counts, strict=True)
    ]
    found = held.comparison
    if found is None or held.means is None or held.equivalence is None:
        return "\n".join([*lines, "  no comparison: an arm has no finished run"])
    welch = found.difference
    lines.append(
        f"  means {held.means[0]:.3f} and {held.means[1]:.3f} %, n = {welch.n_a} and {welch.n_b}"
        + (", of finished runs only" if held.doubt else "")
    )
    effect = f"A12 {found.a12.value:.3f}, the probability that a run of the first errs more"
    if welch.hedges_g is not None:
        effect = f"Hedges g {welch.hedges_g:+.3f}; {effect}"
    if held.doubt:
        lines += [f"  difference {welch.mean_difference:+.3f} points, no interval", f"  {effect}"]
        return "\n".join([*lines, f"  the first errs less: no verdict: {held.doubt}"])
    lines += _pairs(held.paired, held.in_pairs) if held.in_pairs and held.paired else _welch(found)
    if held.paired and not held.in_pairs:
        lines += _pairs(held.paired, False)
    lines.append(f"  {effect}, {_ends(found.a12)}")
    same = held.equivalence
    interval = "no interval" if same.low is None else f"90 % interval [{same.low:+.3f}, {same.high:+.3f}]"
    lines.append(f"  equivalence within {same.margin:g} points: {same.verdict}, {same.method}, {interval}")
    p = "" if held.adjusted_p is None else f", p = {held.adjusted_p:.4f} by Holm over {n_tests}"
    lines.append(f"  the first errs less: {held.verdict}{p}")
    return "\n".join([*lines, _detectable(held)])


def _welch(found: compare.Comparison) -> list[str]:
    result = found.difference
    if result.low is None or result.high is None:
        return [f"  difference {result.mean_difference:+.3f} points, no interval: {result.reason}"]
    tests = {
        "Welch": result.p,
        "Mann-Whitney": found.p_mann_whitney,
        "Brunner-Munzel": found.p_brunner_munzel,
        "permutation": found.p_permutation,
    }
    return [
        f"  difference {result.mean_difference:+.3f} points [{result.low:+.3f}, {result.high:+.3f}], 95 % "
        "Welch interval",
        f"  bootstrap of the difference: {_ends(found.bootstrap)}",
        f"  p, not adjusted: {_tests(tests)}",
    ]


def _pairs(found: PairedDifference, primary: bool) -> list[str]:
    start = "difference" if primary else "paired by search seed:"
    told = f"  {start} {found.mean_difference:+.3f} points"
    if found.low is None or found.high is None:
        lines = [f"{told}, no interval: {found.reason}"]
    else:
        tests = {"paired t": found.p, "Wilcoxon": found.p_wilcoxon, "permutation": found.p_permutation}
        lines = [
            f"{told} [{found.low:+.3f}, {found.high:+.3f}], 95 % interval of {count(found.n, 'pair')}",
            f"  p, not adjusted: {_tests(tests)}",
        ]
    if not primary:
        return lines
    return ["  the same trials ran in both studies, so they are compared in pairs", *lines]


def _tests(p_values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {p:.4f}" for name, p in p_values.items() if p is not None)


def _ends(found: Estimate) -> str:
    """Interval as text, or the reason why there is none."""
    if found.low is None or found.high is None:
        return found.restriction or "no interval"
    return f"[{found.low:+.3f}, {found.high:+.3f}]" + (f", {found.restriction}" if found.restriction else "")


def _detectable(held: Held) -> str:
    welch = None if held.comparison is None else held.comparison.difference
    found = held.paired if held.in_pairs else welch
    if found is None or found.minimum_detectable is None:
        return "  minimum detectable difference not known: the spread between runs is unknown"
    power = f"power {100 * planning.POWER:.0f} %, before adjustment"
    return f"  minimum detectable difference {found.minimum_detectable:.3f} points ({power})"


def render_reproduction(found: Reproduction | None, doubt: str | None) -> str:
    """Text of an arm beside a published figure."""
    if found is None:
        return f"  no comparison: {doubt}"
    lines = [
        f"  mean {found.mean:.3f} %, n = {found.n}; published {found.published:g} %",
        f"  difference {found.difference:+.3f} points, ours minus published",
    ]
    if doubt:
        return "\n".join([*lines, f"  no prediction interval and no z: {doubt}"])
    if found.low is None:
        lines.append(f"  no prediction interval: {found.reason}, so the spread between runs is unknown")
    else:
        lines.append(
            f"  a new run of ours falls into [{found.low:.3f}, {found.high:.3f}] with probability "
            f"{100 * found.level:.0f} %: the published mean lies {'inside' if found.inside else 'outside'}"
        )
    if found.z is not None:
        lines.append(f"  z = {found.z:+.3f}, in standard errors of the published spread and both n")
    return "\n".join(lines)
