"""What limits the claims of a sample: what became of its rows, and why runs allow no verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import records, summary
from analysis.loaders import Sample
from analysis.resample import Array

FAILED = ("failed", "oom", "diverged", "pending")
"""States of trials that have no final error, though no rule stopped them; the last may still get one."""


@dataclass(frozen=True)
class Counts:
    """Rows of a sample by what became of them."""

    n_rows: int
    """Of the source, copies of one result included."""

    n_total: int
    n_used: int
    """With a final error: what claims rest on."""

    n_unique: int
    """Different networks among those used."""

    n_pruned: int
    n_failed: int
    """Failed, out of memory or diverged."""

    n_pending: int
    n_missing: int
    """Completed without a final error."""

    n_not_started: int | None
    """Planned and never started; None where the plan was not recorded."""


@dataclass(frozen=True)
class Flow:
    """The rows behind a claim, by what became of them."""

    n_total: int
    n_used: int
    """With what the claim needs: a final error and, for a metric, the metric."""

    n_pruned: int
    n_failed: int
    n_pending: int


def unlike(sample: Sample) -> str | None:
    """Why nothing is pooled over the rows of a sample, if so: they were not measured alike."""
    if sample.protocols is None or sample.tables.study.get("pool"):
        return None
    return f"measured under different protocols ({summary.told_protocols(sample.protocols)})"


def doubt(sample: Sample, arm: str) -> str | None:
    """Why the finished runs of an arm cannot stand beside those of others as independent runs, if so."""
    used = ((sample.trials["arm"] == arm) & sample.error.notna()).any()
    return (summary.dependence(sample.tables, arm) or unlike(sample)) if used else None


def together(sample: Sample, arms: Sequence[str]) -> str | None:
    """Why the finished runs of arms, taken all at once, are no independent runs, if so."""
    return summary.doubt(*((sample.tables, arm) for arm in arms))


def counts_of(sample: Sample) -> Counts:
    """All rows of a sample, counted."""
    status = sample.trials["status"]
    used = sample.error.notna()
    return Counts(
        n_rows=sample.n_rows,
        n_total=len(sample.trials),
        n_used=int(used.sum()),
        n_unique=int(sample.units[used].nunique()),
        n_pruned=int((status == "pruned").sum()),
        n_failed=int(status.isin(FAILED[:-1]).sum()),
        n_pending=int((status == "pending").sum()),
        n_missing=int(((status == "completed") & ~used).sum()),
        n_not_started=_not_started(sample),
    )


def flow_of(status: "pd.Series[Any]", n_used: int) -> Flow:
    """Rows with these states, of which so many have what a claim needs."""
    return Flow(
        n_total=len(status),
        n_used=n_used,
        n_pruned=int((status == "pruned").sum()),
        n_failed=int(status.isin(FAILED[:-1]).sum()),
        n_pending=int((status == "pending").sum()),
    )


def _not_started(sample: Sample) -> int | None:
    planned: Mapping[str, int] | None = sample.tables.study.get("planned")
    if planned is None:
        return None
    begun = sample.trials["arm"].value_counts()
    return sum(max(int(number) - int(begun.get(arm, 0)), 0) for arm, number in planned.items())


def limits(sample: Sample, pool: bool = False) -> list[str]:
    """What limits all numbers of a report."""
    sample = replace(sample, tables=summary.pooled(sample.tables)) if pool else sample
    counts, found = counts_of(sample), list(sample.notes)
    if sample.protocols is not None:
        which = summary.told_protocols(sample.protocols)
        found.append(
            f"The rows were measured under different protocols ({which}), so no metric is correlated over "
            "them, nothing but the spread between runs of one arm is pooled over arms, and arms that differ "
            "are not compared; --pool does it all the same."
            if unlike(sample)
            else f"The rows were measured under different protocols ({which}) and pooled, as asked."
        )
    if counts.n_used == 0:
        pruned = counts.n_pruned and counts.n_pruned == counts.n_total
        found.append(
            "All trials were stopped early: there is no final error, and so no claim, comparison or "
            "association."
            if pruned
            else "No trial has a final error, so there is no claim, comparison or association."
        )
    elif counts.n_pruned:
        told = chances(sample) is not None
        found.append(
            f"{counts.n_pruned} of {counts.n_total} trials were stopped early. "
            + (
                "They were to finish with recorded probabilities, by which associations are weighted."
                if told
                else "No probability of finishing was recorded, so associations speak of survivors only."
            )
        )
    if lost := stopped_retrainings(sample):
        found.append(
            f"Of {lost} searches with a final error some retrainings were stopped: such an error is the mean "
            "of the retrainings that a rule let finish, which no weight corrects."
        )
    if counts.n_not_started:
        found.append(f"{counts.n_not_started} planned trials were never started, and are in no number.")
    if "search_seed" in sample.trials and counts.n_used:
        seeds = sample.trials.loc[sample.error.notna()].groupby("arm")["search_seed"].nunique()
        if seeds.max() == 1:
            found.append(
                "One search seed only: nothing is known of how results differ from search to search."
            )
    partly, wholly = _lost(sample)
    if partly:
        named = ", ".join(f"{name} ({n})" for name, n in partly.items())
        found.append(
            f"Metrics missing or not finite for some runs with a final error, left out there: {named}."
        )
    if wholly:
        named = _shortened([f"{name} ({', '.join(arms)})" for name, arms in wholly.items()])
        found.append(f"Metrics missing or not finite in whole arms, of which they say nothing: {named}.")
    if failed := _failed_proxies(sample):
        named = ", ".join(f"{name} ({n})" for name, n in failed.items())
        found.append(
            f"Proxies that could not be computed for some trials, by their recorded status: {named}."
        )
    if strange := _strangers(sample):
        found.append(
            f"primary_metrics in study.json names {', '.join(strange)}, which this study does not record: "
            f"correct the name; recorded are {', '.join(sample.metrics.columns) or 'none'}."
        )
    if sample.tables.study.get("joint"):
        found.append("Configurations were chosen one in view of another, so rows are not independent.")
    if sample.tables.study.get("scheduler") == "pbt":
        found.append("Members of the population copied one another, so rows are not independent.")
    copies = counts.n_used - counts.n_unique
    if copies and sample.kind == "study":
        found.append(f"{copies} runs found a network that another run found, too; they count as one unit.")
    return found


def _shortened(names: Sequence[str], most: int = 12) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _lost(sample: Sample) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Metrics that runs with a final error lack: in how many runs of arms that have it, and in whole arms.

    The random arm has no search, so it may lack what others have.
    """
    used = sample.error.notna()
    arms = sample.trials.loc[used, "arm"]
    known = pd.DataFrame(np.isfinite(sample.metrics[used]), index=arms.index, columns=sample.metrics.columns)
    lost = (known.groupby(arms).transform("any") & ~known).sum()
    by_arm = known.groupby(arms).any()
    by_arm = by_arm[by_arm.index != sample.tables.baseline]
    wholly = {
        str(name): [arm for arm in sample.tables.arms if arm in by_arm.index and not by_arm.loc[arm, name]]
        for name in by_arm.columns
        if by_arm[name].any() and not by_arm[name].all()
    }
    return {str(name): int(n) for name, n in lost.items() if n}, wholly


def _failed_proxies(sample: Sample) -> dict[str, int]:
    """Trials by proxy whose recorded status is another than 0, which is ok."""
    found = {
        name.removesuffix("_status"): int((sample.trials[name] > 0).sum())
        for name in map(str, sample.trials.columns)
        if name.startswith("proxy_") and name.endswith("_status")
    }
    return {name: n for name, n in found.items() if n}


def stopped_retrainings(sample: Sample) -> int:
    """Searches with a final error of which some retrainings were stopped."""
    if "stopped_retrainings" not in sample.trials:
        return 0
    return int(((sample.trials["stopped_retrainings"] > 0) & sample.error.notna()).sum())


def told(doubts: Mapping[str, str]) -> str:
    """Doubts by arm as text; of arms with the same one, once."""
    arms: dict[str, list[str]] = {}
    for arm, why in doubts.items():
        arms.setdefault(why, []).append(arm)
    return "; ".join(f"{why} ({', '.join(names)})" for why, names in arms.items())


def declared_metrics(sample: Sample) -> tuple[str, ...]:
    """The primary metrics of the study.

    Raises:
        ValueError: they are no list of names.
    """
    names = sample.tables.study.get("primary_metrics") or ()
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"primary_metrics in study.json is {names!r}; write a list of names, e.g. "
            '["search_valid_error"], or [] where none was declared'
        )
    return tuple(dict.fromkeys(names))


def _strangers(sample: Sample) -> list[str]:
    """Declared names that no trial of this study can record, by its catalogue of metrics."""
    listed = set(sample.tables.study.get("metrics") or ())
    known = {*listed, *(f"search_{name}" for name in listed), *records.END_METRICS, *sample.trials.columns}
    return [name for name in declared_metrics(sample) if name not in {*known, *sample.metrics.columns}]


def chances(sample: Sample) -> Array | None:
    """Probability with which each trial was to finish; None where stopped ones had none, or none known."""
    trials = sample.trials
    stopped = trials["status"] == "pruned"
    if "completion_probability" not in trials or not stopped.any():
        return None
    chance = trials["completion_probability"].astype(float)
    if not ((chance[stopped] > 0) & (chance[stopped] < 1)).all():
        return None
    return np.asarray(chance.where(chance.notna(), 1.0), dtype=np.float64)


def failed_rows(sample: Sample) -> "pd.Series[bool]":
    """Rows that have no final error for another reason than that a rule stopped them."""
    status = sample.trials["status"]
    return status.isin(FAILED) | ((status == "completed") & sample.error.isna())
