"""The best-practice checklist for NAS experiments, answered from what a study recorded.

Source: Lindauer & Hutter (2020), "Best Practices for Scientific Research on Neural Architecture Search".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analysis.associations import swept
from analysis.findings import Findings, costs
from analysis.limits import told
from analysis.loaders import Sample

Answer = Literal["yes", "no", "unknown"]
Finding = tuple[Answer, str]


@dataclass(frozen=True)
class Item:
    """A point of the checklist with its answer, and what the answer rests on."""

    number: int
    question: str
    answer: Answer
    evidence: str

    said: str | None
    """What the authors add, from `checklist` in study.json, by number; it does not change the answer."""


def checklist(sample: Sample, found: Findings) -> tuple[Item, ...]:
    """The sixteen points, answered from records; what no record can tell is `unknown`."""
    said = sample.tables.study.get("checklist") or {}
    items = []
    for number, (question, answer) in enumerate(_POINTS, start=1):
        verdict, evidence = answer(sample, found)
        items.append(Item(number, question, verdict, evidence, said.get(str(number))))
    return tuple(items)


def _origin(sample: Sample) -> dict[str, Any]:
    return dict(sample.tables.study.get("provenance") or {})


def _columns(sample: Sample, prefix: str) -> list[str]:
    return [name for name in map(str, sample.trials.columns) if name.startswith(prefix)]


def _code(what: str) -> Callable[[Sample, Findings], Finding]:
    def answer(sample: Sample, found: Findings) -> Finding:
        origin = _origin(sample)
        commit = origin.get("git_commit")
        if not commit:
            return "unknown", "no commit was recorded"
        if str(origin.get("git_dirty")) == "True":
            return "no", f"{what} at commit {commit[:12]}, with changes that were not committed"
        return (
            "unknown",
            f"{what} at commit {commit[:12]}, all of it committed; no record says whether it is public",
        )

    return answer


def _settings(prefix: str, seed: str, what: str) -> Callable[[Sample, Findings], Finding]:
    def answer(sample: Sample, found: Findings) -> Finding:
        columns = _columns(sample, prefix)
        column = f"{seed}_seed"
        seeds = sample.seeds.get(column)
        if not columns or seeds is None:
            return "unknown", f"no settings of {what} with seeds were recorded"
        named = ", ".join(f"{value:g}" for value in seeds[:12]) + (", ..." if len(seeds) > 12 else "")
        return "yes", f"{len(columns)} settings of {what} in every trial's config; {seed} seeds {named}"

    return answer


def _alike(sample: Sample, found: Findings) -> Finding:
    if not _columns(sample, "config."):
        return "unknown", "no configuration was recorded"
    if sample.protocols:
        return "no", f"differing: {', '.join(sample.protocols)}"
    digest = str(_origin(sample).get("data_sha256") or "")[:12]
    return "yes", f"one retraining and data protocol in all trials; data sha256 {digest or 'not recorded'}"


def _confounders(sample: Sample, found: Findings) -> Finding:
    columns = _columns(sample, "host.")
    packages = _origin(sample).get("packages")
    if not columns or not packages:
        return "unknown", "the machines of the trials, or the versions of libraries, were not recorded"
    mixed = [name for name in columns if name != "host.node" and sample.trials[name].nunique() > 1]
    if mixed:
        return "no", f"trials ran on differing machines: {', '.join(mixed)}"
    return "yes", f"one kind of machine for all trials; versions of {len(packages)} packages recorded"


def _ablations(sample: Sample, found: Findings) -> Finding:
    if len(found.versus) == 0 and found.sweep is None:
        return ("unknown", "no arms that differ in one setting")
    if sample.tables.study.get("joint"):
        return "no", "settings were chosen together, none was varied alone"
    axis = sample.tables.study.get("axis")
    axes = [name.removeprefix("axes.") for name in swept(sample)] or ([str(axis)] if axis else [])
    arms = [arm for arm in sample.tables.arms if arm != sample.tables.baseline]
    if axes and len(arms) > 1:
        return "yes", f"{len(arms)} arms along {' and '.join(axes)}"
    return "no", "one setting only"


def _protocol(sample: Sample, found: Findings) -> Finding:
    if sample.kind == "ground truth":
        return "yes", f"one table: {sample.endpoint}"
    answer, evidence = _alike(sample, found)
    return answer, f"{sample.endpoint}; {evidence}"


def _over_time(sample: Sample, found: Findings) -> Finding:
    if found.anytime:
        return "yes", f"error over end-to-end hours for {len(found.anytime)} arms"
    return "no", f"no anytime curve: {told(found.no_anytime)}"


def _random(sample: Sample, found: Findings) -> Finding:
    baseline = sample.tables.baseline
    runs = int(sample.error[sample.trials["arm"] == baseline].notna().sum()) if baseline else 0
    if runs:
        return "yes", f"{runs} random architectures of the same space, retrained alike (arm {baseline})"
    return "no", "no random arm with a final error"


def _several(sample: Sample, found: Findings) -> Finding:
    if "search_seed" not in sample.trials or not found.counts.n_used:
        return "unknown", "no search seeds were recorded"
    used = sample.trials[sample.error.notna()].groupby("arm")["search_seed"].nunique()
    used = used.reindex(sample.tables.arms, fill_value=0)
    text = ", ".join(f"{arm}: {int(used[arm])}" for arm in sample.tables.arms)
    return ("yes" if used.min() > 1 else "no"), f"search seeds with a final error, {text}"


def _tabular(sample: Sample, found: Findings) -> Finding:
    if sample.kind == "ground truth":
        return "yes", "this report is of published ground truth"
    return "no", "trained networks only; `report` takes NAS-Bench-Macro, too"


def _tuned(sample: Sample, found: Findings) -> Finding:
    study = sample.tables.study
    if study.get("joint"):
        return "yes", f"searched jointly; all {found.counts.n_total} trials are in this study"
    return "unknown", "settings come from the preset and the command; how they were found is not recorded"


def _end_to_end(sample: Sample, found: Findings) -> Finding:
    hours = costs(sample)
    if not np.isfinite(hours).any():
        return "no", "no seconds were recorded"
    lost = int((~np.isfinite(hours)).sum())
    told = (
        f"{hours.sum():.3g} hours of search and retraining over all trials, stopped and failed ones included"
    )
    if lost:
        return "no", f"{told}; {lost} trials without a time"
    if sample.tables.study.get("joint"):
        return "yes", f"{told}; settings were searched for within them"
    return "unknown", f"{told}; no record of what it cost to tune the settings"


def _details(sample: Sample, found: Findings) -> Finding:
    study, origin = sample.tables.study, _origin(sample)
    missing = [name for name in ("command",) if not study.get(name)]
    missing += [
        name for name in ("git_commit", "packages", "data_sha256", "config_hash") if not origin.get(name)
    ]
    if missing:
        return "unknown", f"not recorded: {', '.join(missing)}"
    return "yes", f"command, commit, versions, data hash, and configuration {origin['config_hash']}"


_POINTS: tuple[tuple[str, Callable[[Sample, Findings], Finding]], ...] = (
    ("Code of the final training pipeline released?", _code("retraining")),
    ("Code of the search space released?", _code("space")),
    (
        "Hyperparameters of the final pipeline and its seeds?",
        _settings("config.retrain.", "retrain", "retraining"),
    ),
    ("Code of the NAS method released?", _code("method")),
    ("Hyperparameters of the NAS method and its seeds?", _settings("config.method.", "search", "the method")),
    ("Same dataset, space, training code and hyperparameters for all?", _alike),
    ("Confounders controlled (hardware, versions, run time)?", _confounders),
    ("Ablations run?", _ablations),
    ("One evaluation protocol for all?", _protocol),
    ("Performance compared over time?", _over_time),
    ("Compared with random search?", _random),
    ("Several runs, seeds stated?", _several),
    ("Tabular or surrogate benchmarks for the in-depth part?", _tabular),
    ("How hyperparameters were tuned, and its cost?", _tuned),
    ("End-to-end time reported?", _end_to_end),
    ("Every detail of the setup?", _details),
)
