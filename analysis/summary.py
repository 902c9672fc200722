"""What a study found, as a table of its arms and as sentences, with every n and every missing run."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.compare import Difference, difference, holm, mean_interval, relative_improvement, verdict
from analysis.planning import POWER
from analysis.records import Tables, is_protocol

WIDTH = 100
"""Columns of a terminal that `render` fits; long names of arms are wrapped."""

_MEANS = ("params_m", "skips", "search_seconds", "search_saved_mb", "peak_memory_mb")
_FAILURES = ("failed", "oom", "diverged")
_RETRAINED = ("test_", "valid_error", "retrain_seconds")
"""Columns of results of a retraining, of which a search with several has the mean."""

_REASON_ENDS = (60, 96)
"""Characters of a long reason that are printed, first and last: either may be what a traceback says."""


def by_search(tables: Tables) -> Tables:
    """The tables with one row per search, whose errors are the means over the retrainings of what it found.

    Several retrainings of one network do not make several searches: claims about arms rest on searches. A
    search counts as completed with its first retraining that was, so it was to be completed with the
    probability that any of them was; epochs of retraining are those of its first row, with the seconds of
    all.
    """
    trials = tables.trials
    if "search_id" not in trials or trials["search_id"].is_unique:
        return tables
    results = [name for name in trials if str(name).startswith(_RETRAINED)]
    done = trials["status"] == "completed"
    order = trials.assign(_late=~done).sort_values("_late", kind="stable").drop(columns="_late")
    first = order.groupby("search_id", sort=False).head(1).sort_index()
    means = trials[done].groupby("search_id")[results].mean()
    first = first.set_index("search_id", drop=False)
    first.loc[means.index, results] = means
    first["stopped_retrainings"] = (trials["status"] == "pruned").groupby(trials["search_id"]).sum()
    if "completion_probability" in first:
        first["completion_probability"] = _chances(tables)
    first = first.reset_index(drop=True)
    return replace(tables, trials=first, epochs=_epochs_by_search(tables, first))


def _chances(tables: Tables) -> "pd.Series[float]":
    """Probability by search with which it was to get a final error, of any of its retrainings.

    Retrainings are stopped each by itself; where rungs lie in the search, all of them wait on one decision.
    """
    chance = tables.trials["completion_probability"].astype(float)
    by = tables.trials["search_id"]
    if (tables.study.get("stopping") or {}).get("rungs") == "search_epoch":
        return chance.groupby(by).first()
    return 1 - (1 - chance).groupby(by).prod()


def _epochs_by_search(tables: Tables, first: pd.DataFrame) -> pd.DataFrame:
    """Epochs of the rows kept; retraining takes the seconds of all rows of the search."""
    epochs = tables.epochs.astype({"trial_id": str, "stage": str, "key": str})
    kept_as = dict(zip(first["search_id"], first["trial_id"], strict=True))
    row_of = {
        trial: kept_as[search]
        for trial, search in zip(tables.trials["trial_id"], tables.trials["search_id"], strict=True)
    }
    timed = (epochs["stage"] == "retrain") & (epochs["key"] == "seconds")
    seconds = epochs[timed].assign(trial_id=epochs.loc[timed, "trial_id"].map(row_of))
    sums = seconds.groupby(["trial_id", "stage", "epoch", "key"], as_index=False, sort=False).first()
    sums["value"] = (
        seconds.groupby(["trial_id", "stage", "epoch", "key"], sort=False)["value"].sum().to_numpy()
    )
    kept = epochs[~timed & epochs["trial_id"].isin(first["trial_id"])]
    return pd.concat([kept, sums[kept.columns]], ignore_index=True)


def differing(trials: pd.DataFrame) -> dict[str, list[str]] | None:
    """Columns of the protocol in which rows differ, with the values; None if all were measured alike."""
    columns = [name for name in map(str, trials.columns) if is_protocol(name)]
    found = {name: sorted(map(str, trials[name].unique())) for name in columns}
    return {name: values for name, values in found.items() if len(values) > 1} or None


def told_protocols(protocols: Mapping[str, Sequence[str]], most: int = 6) -> str:
    """The fields in which protocols differ, as text; beyond `most` only their number."""
    named = [f"{name}: {', '.join(values[:4])}" for name, values in list(protocols.items())[:most]]
    more = len(protocols) - len(named)
    return "; ".join([*named, *([f"and {more} more"] if more else [])])


def pooled(tables: Tables) -> Tables:
    """The tables of a study whose runs are compared although they were measured under different protocols."""
    return replace(tables, study={**tables.study, "pool": True})


def summarise(tables: Tables) -> pd.DataFrame:
    """One row per arm, in the order of the study; runs are searches, whatever the number of retrainings.

    Columns:
        arm, role: its name, and `reference`, `baseline` or nothing.
        n: completed trials with a test error; the numbers below are of these.
        n_total, n_pruned, n_failed, n_pending, n_missing: all trials, and those that are not in n; failed
            includes oom and diverged, missing are those completed without a test error.
        error_mean, error_low, error_high, no_interval: mean test error in percent with its 95 % t interval,
            or the reason why there is no interval: no spread between runs, or runs that are not independent
            or not measured alike.
        params_m, skips, search_seconds, search_saved_mb, peak_memory_mb: means; saved is what one search step
            keeps for the backward pass.
        n_unique: different final networks, counted by genotype key.
        failure: reason of the first trial that failed, shortened.
    """
    tables = by_search(tables)
    return pd.DataFrame([_summary(tables, arm) for arm in tables.arms])


def rows(summary: pd.DataFrame) -> Iterable[Any]:
    """Rows of a summary, with its columns as attributes."""
    return summary.itertuples()


@dataclass(frozen=True)
class Claim:
    """The claim that one arm errs less than another, and what the study says to it."""

    arm: str
    other: str

    difference: Difference | None
    """Of test errors in percentage points; None where an arm has no finished run.

    Where there is a doubt, the difference and A12 alone: nothing that rests on independent runs.
    """

    adjusted_p: float | None
    """By Holm's method over all claims that can be judged; None for those that cannot."""

    doubt: str | None
    """Why the finished runs allow no verdict, if so."""

    verdict: str
    sentence: str
    """All of it in plain words."""


def judged(tables: Tables) -> tuple[Claim, ...]:
    """Each arm against the reference arm and against random; the claim is always that the arm errs less.

    All comparisons form one family for Holm's adjustment, except those that get no verdict: of arms whose
    finished runs are not a sample of independent ones, or were measured under different protocols.
    """
    tables = by_search(tables)
    pairs = _pairs(tables)
    doubts = {pair: doubt(*((tables, arm) for arm in pair)) or protocols(tables, *pair) for pair in pairs}
    results = {pair: _compared(tables, *pair, doubts[pair]) for pair in pairs}
    p_values = {
        pair: result.p
        for pair, result in results.items()
        if result and result.p is not None and not doubts[pair]
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    found = []
    for pair in pairs:
        result, p = results[pair], adjusted.get(pair)
        answer = "no verdict" if doubts[pair] else verdict(result, p) if result else "undecided at n=0"
        sentence = _claim(tables, pair, result, p, doubts[pair])
        found.append(Claim(*pair, result, p, doubts[pair], answer, sentence))
    return tuple(found)


def doubt(*sides: tuple[Tables, str]) -> str | None:
    """Why the finished runs of some arms allow no verdict, and of which arms that is said; None if they do.

    Each arm comes with the tables of its study, one row per search.
    """
    arms: dict[str, list[str]] = {}
    for tables, name in sides:
        if reason := dependence(tables, name):
            arms.setdefault(reason, []).append(name)
    found = [f"{reason} ({', '.join(names)})" for reason, names in arms.items()]
    if not found and (shared := _shared(*sides)):
        found = [f"{shared} of their searches found one network and share its retrainings"]
    return "; ".join(found) or None


def claims(tables: Tables) -> list[str]:
    """Plain sentences on what the study shows: the counts, what `judged` says, and what limits it."""
    tables = by_search(tables)
    found = judged(tables)
    sentences = [_counts(tables), *(claim.sentence for claim in found)]
    if judgeable := sum(claim.adjusted_p is not None for claim in found):
        sentences.append(
            "Intervals are 95 % Welch intervals, each on its own; p is adjusted by Holm's method over "
            f"{_count(judgeable, 'comparison')}; a claim is decided where p < 0.05."
        )
    if tables.baseline is None:
        sentences.append(
            "The study has no random baseline, so it cannot say whether an arm is better than random."
        )
    if tables.reference is None:
        sentences.append("The study names no reference arm, so its arms are not compared with one another.")
    if note := tables.study.get("note"):
        sentences.append(note)
    return sentences


def chosen(tables: Tables, most: int = 5) -> pd.DataFrame:
    """Finished trials that validation would choose: the best, and all that no other beats in error and size.

    Columns: name, valid_error and test_error in percent, params_m, and whether the trial is on the `front` of
    validation error and parameters. The test error has no say in the choice: it is fair for the one trial
    that is taken, and says nothing of the search that proposed it.
    """
    finals = (
        by_search(tables)
        .finals()
        .dropna(subset=["valid_error", "params_m"])
        .sort_values(["valid_error", "params_m"])
    )
    smallest = finals["params_m"].cummin().shift(fill_value=np.inf)
    table = pd.DataFrame(
        {
            "name": finals["name"],
            "valid_error": 100 * finals["valid_error"],
            "test_error": 100 * finals["test_error"],
            "params_m": finals["params_m"],
            "front": finals["params_m"] < smallest,
        }
    )
    return table[table["front"] | (np.arange(len(table)) < most)].reset_index(drop=True)


def render_chosen(table: pd.DataFrame) -> str:
    """Text of `chosen` for a terminal, one line a trial; a star marks the front."""
    lines = ["validation %  test %  params M  chosen by validation error; * no other is better and smaller"]
    for row in rows(table):
        star = "*" if row.front else " "
        lines.append(
            f"{row.valid_error:12.2f}  {row.test_error:6.2f}  {row.params_m:8.3f}  {star} {row.name}"
        )
    return "\n".join(lines) + "\n"


def render(summary: pd.DataFrame) -> str:
    """Text table of a summary for a terminal of 100 columns, with notes on what is missing below it."""
    header, *body = _cells(summary)
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    widths[0] = max(min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])), 12)
    lines = []
    for row in (header, ["-" * width for width in widths], *body):
        name, *more = textwrap.wrap(row[0], widths[0], subsequent_indent="  ") or [""]
        values = [value.rjust(width) for value, width in zip(row[1:], widths[1:], strict=True)]
        lines += ["  ".join([name.ljust(widths[0]), *values]), *more]
    notes = [textwrap.fill(note, WIDTH) for note in _notes(summary)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def to_markdown(summary: pd.DataFrame) -> str:
    """Markdown table of a summary, with notes on what is missing below it."""
    header, *body = [[value.replace("|", "\\|") for value in row] for row in _cells(summary)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
    notes = [f"- {note}" for note in _notes(summary)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


# The summary and its printed form


def _summary(tables: Tables, arm: str) -> dict[str, object]:
    trials = tables.trials[tables.trials["arm"] == arm]
    finals = tables.finals(arm)
    error = mean_interval(100 * finals["test_error"])
    by_status = trials["status"].value_counts().to_dict()
    pruned, pending = by_status.get("pruned", 0), by_status.get("pending", 0)
    failed = sum(by_status.get(status, 0) for status in _FAILURES)
    doubted = (dependence(tables, arm) or protocols(tables, arm)) if len(finals) else None
    no_interval = doubted or (
        f"{error.reason}, so the spread between runs is unknown" if error.reason else ""
    )
    role = "baseline" if arm == tables.baseline else "reference" if arm == tables.reference else ""
    return {
        "arm": arm,
        "role": role,
        "n": len(finals),
        "n_total": len(trials),
        "n_pruned": pruned,
        "n_failed": failed,
        "n_pending": pending,
        "n_missing": len(trials) - len(finals) - pruned - failed - pending,
        "error_mean": np.nan if error.mean is None else error.mean,
        "error_low": np.nan if error.low is None or doubted else error.low,
        "error_high": np.nan if error.high is None or doubted else error.high,
        "no_interval": no_interval,
        **{name: float(finals[name].mean()) if name in finals else np.nan for name in _MEANS},
        "n_unique": finals["genotype_key"].nunique(),
        "failure": _first_reason(trials),
    }


def dependence(tables: Tables, arm: str, *, stopped: bool = True, retrained: bool = True) -> str | None:
    """Why the finished runs of an arm are not a fair sample of independent runs, if so.

    Intervals and p-values rest on independence, so such an arm gets neither. Without `stopped`, runs that
    were stopped are no such reason: where they are paid for, and count as what the arm does. Without
    `retrained`, searches that share retrainings are none: where these say nothing.
    """
    reasons = []
    if tables.study.get("joint", False) and arm != tables.baseline:
        reasons.append("its configurations were chosen one in view of another")
    if tables.study.get("scheduler", "fifo") == "pbt":
        reasons.append("members of its population copy one another")
    mine = tables.trials[tables.trials["arm"] == arm]
    pruned = int((mine["status"] == "pruned").sum())
    if "stopped_retrainings" in mine:  # of a search one may have been stopped, and another not
        pruned = int((mine["stopped_retrainings"] > 0).sum())
    if pruned and stopped:
        was = "was" if pruned == 1 else "were"
        reasons.append(
            f"{pruned} of its {_count(len(mine), 'run')} {was} stopped early, "
            "so those that finished were selected by validation error"
        )
    if retrained and (shared := _shared((tables, arm))):
        reasons.append(f"{shared} of its searches found one network and share its retrainings")
    return ", and ".join(reasons) or None


def protocols(tables: Tables, *arms: str) -> str | None:
    """That the finished runs of arms were measured under different protocols, if so and not to be pooled."""
    used = tables.finals()
    found = None if tables.study.get("pool") else differing(used[used["arm"].isin(arms)])
    return f"measured under different protocols ({told_protocols(found)})" if found else None


def _shared(*sides: tuple[Tables, str]) -> int:
    """How many finished searches of some arms have their error from the same retrainings as another."""
    runs = [tables.trials[tables.trials["arm"] == arm] for tables, arm in sides]
    used = [trials[trials["status"] == "completed"] for trials in runs]
    ids = [trials["retraining_id"] for trials in used if "retraining_id" in trials]
    return int(pd.concat(ids).dropna().duplicated(keep=False).sum()) if ids else 0


def _first_reason(trials: pd.DataFrame) -> str:
    """Reason of the trial that failed first, on one line and shortened; empty if none gives a reason."""
    failed = trials[trials["status"].isin(_FAILURES)].sort_values("ended", kind="stable")
    reasons = failed["reason"].dropna()
    if reasons.empty:
        return ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reasons.iloc[0])  # tracebacks of workers are coloured
    text = " ".join(plain.split())
    first, last = _REASON_ENDS
    return text if len(text) <= first + last else f"{text[:first].rstrip()} ... {text[-last:].lstrip()}"


def _why(failure: str) -> str:
    """Sentence, with the space before it, on why trials failed."""
    where = "see column reason of trials.parquet for the rest"
    return f' First failure: "{failure}"; {where}.' if failure else ""


def _cells(summary: pd.DataFrame) -> list[list[str]]:
    """Header and rows of the printed table."""
    header = ["arm", "runs", "error % [95 % CI]", "params M", "skips", "search", "saved MB", "memory", "nets"]
    cells = [
        [
            f"{row.arm} ({row.role})" if row.role and row.role != row.arm else row.arm,
            f"{row.n}" if row.n == row.n_total else f"{row.n} of {row.n_total}",
            _interval(row.error_mean, row.error_low, row.error_high),
            _number(row.params_m, 2 if row.params_m >= 1 else 3),
            _number(row.skips, 1),
            _duration(row.search_seconds),
            _number(row.search_saved_mb, 1),
            _memory(row.peak_memory_mb),
            str(row.n_unique),
        ]
        for row in rows(summary)
    ]
    return [header, *cells]


def _notes(summary: pd.DataFrame) -> list[str]:
    """What the reader of the table must know: runs that are not in it, and means without an interval."""
    notes = []
    for row in rows(summary):
        counts = {
            "pruned": row.n_pruned,
            "failed": row.n_failed,
            "not ended": row.n_pending,
            "ended without a test error": row.n_missing,
        }
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        if row.n_total == 0:
            notes.append(f"{row.arm}: no run has started.")
        elif row.n == 0:
            notes.append(f"{row.arm}: no finished run ({outcomes} of {row.n_total}).{_why(row.failure)}")
        elif outcomes:
            total = _count(row.n_total, "run")
            rest = f"the numbers are of the {row.n} finished.{_why(row.failure)}"
            notes.append(f"{row.arm}: {outcomes} of {total}; {rest}")
        if row.n and row.no_interval:
            notes.append(f"{row.arm}: {row.no_interval}: no interval.")
    return notes


def _interval(mean: float, low: float, high: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    if np.isnan(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds else "0 s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(megabytes: float) -> str:
    if np.isnan(megabytes):
        return "-"
    return f"{megabytes:.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


# Claims


def _pairs(tables: Tables) -> list[tuple[str, str]]:
    """The comparisons of the study: (arm, the arm it is compared with)."""
    pairs = [(arm, other) for other in (tables.reference, tables.baseline) if other for arm in tables.arms]
    return [(arm, other) for arm, other in dict.fromkeys(pairs) if arm not in (other, tables.baseline)]


def _compared(tables: Tables, arm: str, other: str, doubt: str | None) -> Difference | None:
    a, b = _errors(tables, arm), _errors(tables, other)
    if not len(a) or not len(b):
        return None
    found = difference(a, b)
    if doubt is None:
        return found
    return replace(
        found,
        low=None,
        high=None,
        p=None,
        t=None,
        df=None,
        cohens_d=None,
        hedges_g=None,
        minimum_detectable=None,
        reason=doubt,
    )


def _claim(
    tables: Tables,
    pair: tuple[str, str],
    result: Difference | None,
    adjusted_p: float | None,
    doubt: str | None,
) -> str:
    """Sentence on the claim that one arm errs less than the other, or on the doubt that forbids a verdict."""
    arm, other = pair
    start = f"{arm} against {_named(other, 'baseline' if other == tables.baseline else 'reference')}: "
    if result is None:
        without = " or ".join(name for name in pair if not len(_errors(tables, name)))
        return f"{start}undecided, as no run of {without} has finished."
    start += f"test error {result.mean_difference:+.2f} percentage points"
    if doubt:
        return f"{start}, n = {result.n_a} and {result.n_b}; no verdict: {doubt}."
    answer = verdict(result, adjusted_p)
    end = f'n = {result.n_a} and {result.n_b}{_gain(tables, *pair)}. "{arm} errs less" is {answer}'
    if adjusted_p is None:
        return f"{start}, {end}: {result.reason}, so the spread between runs is unknown."
    end = f"95 % interval [{result.low:+.2f}, {result.high:+.2f}], adjusted {_p(adjusted_p)}, {end}"
    if answer.startswith("undecided"):
        end += (
            f"; with this spread, {100 * POWER:.0f} % of such studies would find a true difference of "
            f"{result.minimum_detectable:.2f} points, before adjustment"
        )
    return f"{start}, {end}."


def _gain(tables: Tables, arm: str, other: str) -> str:
    """Relative improvement over random, with both means since its denominator moves."""
    a, b = 100 - _errors(tables, arm), 100 - _errors(tables, other)
    if other != tables.baseline or b.mean() <= 0:
        return ""
    relative = relative_improvement(a, b)
    return f", accuracy {a.mean():.2f} % against {b.mean():.2f} % (relative improvement {relative:+.2f} %)"


def _errors(tables: Tables, arm: str) -> NDArray[np.float64]:
    return 100 * tables.finals(arm)["test_error"].to_numpy(dtype=np.float64)


def _counts(tables: Tables) -> str:
    """Sentence on the trials, those without a test error included."""
    statuses = tables.trials["status"].value_counts().sort_index().to_dict()
    total, used = len(tables.trials), len(tables.finals())
    rest = [f"{count} {status}" for status, count in statuses.items() if status != "completed"]
    missing = statuses.get("completed", 0) - used
    rest += [f"{missing} completed without a test error"] if missing else []
    sentence = f"{used} of {_count(total, 'trial')} finished with a test error"
    if not rest:
        return f"{sentence}."
    why = _why(_first_reason(tables.trials))
    return f"{sentence}; the others, in none of the numbers: {', '.join(rest)}.{why}"


def _named(arm: str, role: str) -> str:
    return f"{arm} ({role})" if role != arm else arm


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
