"""A study: a question, a base trial, and the axes that vary; planned trial by trial before anything runs.

`plan` is plain data in, plain data out, so that a study can be listed, refused and tested without Ray.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any, Literal

from experiments.stopping import FIFO, Stopping
from nas.config import override, parse_value, paths
from nas.footprint import DataShape
from nas.genotype import Genotype
from nas.methods import Method
from nas.metrics import saved_bytes_per_image, uniform_gates
from nas.papers import RECIPES, laptop, on_digits, tiny
from nas.schedule import Constant, Cosine, Exponential, Linear, LinearTail
from nas.search import SearchStage
from nas.searchers import Given, RandomGenotype
from nas.spaces.cell import SPACES
from nas.streams import seeded
from nas.trial import Seeds, Trial

Preset = Literal["tiny", "laptop", "paper"]
Batch = Literal["fixed", "memory_matched"]
PRESETS: dict[str, Callable[[Trial], Trial]] = {"tiny": tiny, "laptop": laptop, "paper": lambda trial: trial}
SEEDS = {"tiny": 2, "laptop": 4, "paper": 4}
"""How many seeds each arm gets when the user does not say."""

SHORT = {
    "K": "method.supernet.partial_channels",
    "edge_norm": "method.supernet.edge_norm",
    "M": "method.searcher.max_skip",
    "order": "method.arch_update.order",
    "arch_lr": "method.arch_update.lr",
    "lr": "search.*.lr.start",
    "retrain_lr": "retrain.lr.start",
}
"""Names that the field uses for what the configuration spells out."""


NAMED: dict[str, Mapping[Any, Any]] = {"space": SPACES, "retrain": RECIPES}
"""Fields that `--set` takes as a whole, by name."""


LISTED = ("measure",)
"""Fields of several names, which `--set` takes with commas between them."""


@dataclass(frozen=True)
class Axis:
    """One thing that a study varies: values by the name they have in tables, each a set of dotted changes."""

    name: str
    values: Mapping[str, Mapping[str, Any]]


def axis(name: str, *values: Any) -> Axis:
    """Axis over one field, by its short name or its dotted one."""
    field_name = SHORT.get(name, name)
    return Axis(name, {str(value): {field_name: value} for value in values})


@dataclass(frozen=True)
class Domain:
    """Where a value is drawn from in a joint search: listed values, or a range on a logarithmic scale."""

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.values) == bool(self.high) or (not self.values and not 0 < self.low < self.high):
            raise ValueError(f"{self}: give either values, or a range with 0 < low < high")


@dataclass(frozen=True)
class Study:
    """The trials that answer one question."""

    name: str
    question: str
    base: Trial
    axes: tuple[Axis, ...] = ()
    joint: Mapping[str, Domain] = field(default_factory=dict)
    """Fields searched jointly by Optuna, by short or dotted name, instead of a grid of axes."""
    named: Mapping[str, Mapping[str, tuple[SearchStage, ...]]] = field(default_factory=dict)
    """For a joint search: the stages of search that values of a domain stand for, such as `5-11-17`."""
    reference: str | None = None
    """Arm that the others are compared with."""
    note: str = ""
    """What a reader of the result must know about how its arms hang together."""
    primary: tuple[str, ...] = ()
    """Search metrics, by column of the trials table, that the study declares before it has results; what the
    report finds of others is exploratory."""
    baseline: bool = True
    """Whether genotypes drawn at random, retrained alike, are an arm of the study."""


@dataclass(frozen=True)
class Planned:
    """A trial with its place in the study."""

    name: str
    arm: str
    axes: Mapping[str, Any]
    trial: Trial
    found_by: tuple[str, ...] = ()
    """Searches that found what this trial only retrains, by trial id."""


@dataclass(frozen=True)
class Settings:
    """What the user may change about any study."""

    preset: Preset = "laptop"
    data: str | None = None
    seeds: int | None = None
    batch: Batch = "fixed"
    changes: Mapping[str, Any] = field(default_factory=dict)
    stopping: Stopping = FIFO
    objectives: tuple[str, ...] = ()
    """What a joint search minimises."""
    retrain_seeds: int | None = None
    """How often each different genotype is retrained, after all searches; None retrains with each search."""


@dataclass(frozen=True)
class Resources:
    """What a study runs on."""

    address: str | None = None
    """Ray cluster to join; None takes RAY_ADDRESS, else this machine."""
    cpus_per_trial: float | None = None
    """Cores of a trial, also its threads; None is one."""
    gpus_per_trial: float | None = None
    """GPUs of a trial; None takes the share of one that it fits on, where there are GPUs."""
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Policy:
    """How a study deals with what is lost."""

    checkpoint_seconds: float = 60.0
    """A trial is saved at each stage's end, and at the first epoch to end this long after the last save."""
    max_failures: int = 3
    """How often in a row, without a new epoch between, a trial starts again that lost its worker or node."""
    deterministic: bool = False
    """Whether a GPU may use only algorithms that give the same bits every time."""

    def __post_init__(self) -> None:
        if not self.checkpoint_seconds >= 0:
            raise ValueError(
                f"--checkpoint-seconds {self.checkpoint_seconds:g} must be at least 0, to save every epoch"
            )
        if self.max_failures < 0:
            raise ValueError(f"--max-failures {self.max_failures} must be at least 0; 0 gives up at once")


POLICY = Policy()


@dataclass(frozen=True)
class Joint:
    """What a joint search starts from and chooses among."""

    base: Planned
    domains: Mapping[str, Domain]
    named: Mapping[str, Mapping[str, Any]]


def parse_changes(entries: Sequence[str]) -> dict[str, Any]:
    """Changes by dotted field of `field=value` texts; short names are spelled out.

    Raises:
        ValueError: an entry without `=`, or one field twice.
    """
    changes: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        name = SHORT.get(name.strip(), name.strip())
        if not equals or not name:
            raise ValueError(
                f"--set {entry!r} is not of the form field=value, e.g. --set retrain.epochs=50 or --set K=2"
            )
        if name in changes:
            raise ValueError(f"--set {entry!r}: {name} is given twice; give it once")
        value = value.strip()
        if name in NAMED and value not in NAMED[name]:
            raise ValueError(f"--set {entry!r}: no such {name}; use one of {', '.join(NAMED[name])}")
        if name in LISTED and not value.startswith(("[", "(")):
            changes[name] = [part.strip() for part in value.split(",") if part.strip()]
        else:
            changes[name] = NAMED[name][value] if name in NAMED else parse_value(value)
    return changes


def plan(study: Study, settings: Settings, shape: DataShape | None = None) -> list[Planned]:
    """Every trial of the study's grid, and of its baseline, seed by seed.

    `shape` is needed when the batch follows memory.

    Raises:
        ValueError: an unknown field, a value that some trial refuses, or a field that the study varies.
    """
    seeds = SEEDS[settings.preset] if settings.seeds is None else settings.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1; intervals need 2, claims 3 or more")
    _check_changes(study, settings.changes)
    for name, domain in study.joint.items():
        for value in domain.values or (domain.low, domain.high):
            stages = study.named.get(name, {}).get(value)
            override(
                resolve(study.base, settings),
                {"search": stages} if stages else {SHORT.get(name, name): value},
            )
    planned: list[Planned] = []
    for point in product(*(axis.values for axis in study.axes)) if study.axes else ():
        name, labels, trial = _arm(study, point)
        trial = resolve(trial, settings)
        if settings.batch == "memory_matched":
            trial = _matched(trial, resolve(study.base, settings), shape)
        planned += _seeded(name, labels, trial, seeds)
    if study.baseline:
        planned += _seeded("random", {}, baseline(study, settings), seeds)
    names: dict[str, str] = {}
    for p in planned:
        if (first := names.setdefault(p.trial.id, p.name)) != p.name:
            raise ValueError(f"{p.name} and {first} are one and the same trial; take one out of the study")
    return planned


def searches(planned: Sequence[Planned]) -> list[Planned]:
    """The searches of planned trials, with nothing retrained."""
    return [
        replace(
            p,
            trial=replace(
                p.trial,
                retrain=replace(p.trial.retrain, epochs=0),
                seeds=replace(p.trial.seeds, retrain=0),
            ),
        )
        for p in planned
    ]


def retrainings(planned: Sequence[Planned], found: Mapping[str, Genotype], seeds: int) -> list[Planned]:
    """Retrainings of what the searches of `planned` found, by the id of a search: each network `seeds` times.

    Genotypes that only write one network in different ways are retrained once, in their canonical form.
    """
    groups: dict[Trial, list[str]] = {}
    for p, search in zip(planned, searches(planned), strict=True):
        if (genotype := found.get(search.trial.id)) is not None:
            trial = replace(
                p.trial,
                method=Method(searcher=Given(str(genotype.canonical()))),
                search=(),
                measure=(),
                measure_every=1,
                seeds=replace(p.trial.seeds, search=0, retrain=0),
            )
            groups.setdefault(trial, []).append(search.trial.id)
    apart = []
    for trial, ids in groups.items():
        key = found[ids[0]].key
        for seed in range(seeds):
            retrained = replace(trial, seeds=replace(trial.seeds, retrain=seed))
            axes = {"genotype": key, "retrain_seed": seed}
            apart.append(Planned(f"{key} retrain={seed}", "retrained", axes, retrained, tuple(ids)))
    return apart


def resolve(trial: Trial, settings: Settings) -> Trial:
    """`trial` at the size of the preset, on the user's data, with the user's changes."""
    trial = PRESETS[settings.preset](trial)
    if settings.data is not None:
        trial = replace(trial, data=replace(trial.data, source=settings.data))
    if settings.preset != "paper" and settings.data in (None, "digits"):
        trial = on_digits(trial)
    return override(trial, settings.changes)


def baseline(study: Study, settings: Settings) -> Trial:
    """The random arm: the study's own data and retraining, a genotype drawn uniformly from its space."""
    base = resolve(study.base, settings)
    searcher, varied = base.method.searcher, {one.name for one in study.axes} | set(study.joint)
    # A capped method is compared with random cells under the same cap, unless the cap is the question.
    cap = searcher.max_skip if "M" not in varied and not isinstance(searcher, Given) else None
    return replace(base, method=Method(searcher=RandomGenotype(max_skip=cap)), search=())


def _arm(study: Study, point: Sequence[str]) -> tuple[str, dict[str, Any], Trial]:
    labels: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for one, name in zip(study.axes, point, strict=True):
        values = one.values[name]
        labels[one.name] = next(iter(values.values())) if len(values) == 1 and one.name in SHORT else name
        changes.update(values)
    name = " ".join(f"{label}={value}" for label, value in labels.items())
    return name, labels, override(study.base, changes)


def _seeded(arm: str, labels: Mapping[str, Any], trial: Trial, seeds: int) -> list[Planned]:
    return [
        Planned(
            name=f"{arm} seed={seed}",
            arm=arm,
            axes={**labels, "seed": seed},
            trial=replace(trial, seeds=Seeds(split=trial.seeds.split, search=seed, retrain=seed)),
        )
        for seed in range(seeds)
    ]


def _check_changes(study: Study, changes: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(Trial)]
    for name in changes:
        if name.split(".")[0] not in known:
            raise ValueError(
                f"--set {name}: no such field; they begin with {', '.join(known)} (--help lists them), "
                f"or are short names: {', '.join(SHORT)}"
            )
    swept = {name: one.name for one in study.axes for values in one.values.values() for name in values}
    chosen = {"search" if name in study.named else SHORT.get(name, name): name for name in study.joint}
    for name in changes:
        # What lies below a field that an axis sets is changed in every arm; a joint search would undo it.
        within = {other: label for other, label in swept.items() if name.count(".") <= other.count(".")}
        for other, label in (within | chosen).items():
            if _overlap(name, other):
                raise ValueError(f"--set {name}: the study {study.name} varies {label} itself; leave it out")
        if name.startswith(("seeds.search", "seeds.retrain")):
            raise ValueError(f"--set {name}: seeds are counted by --seeds; only seeds.split can be set")
        if name == "retrain.epochs" and changes[name] == 0:
            raise ValueError(
                "--set retrain.epochs=0 must be at least 1: trials are judged by their final error"
            )
        if name == "data.source":
            raise ValueError("--set data.source: use --data")


def _overlap(one: str, other: str) -> bool:
    """Whether a dotted name is the other, or a field of it, or it of this one; `*` is every stage."""
    return all(a == b or "*" in (a, b) for a, b in zip(one.split("."), other.split("."), strict=False))


# The batch of a sweep over K


def stages_at(study: Study, settings: Settings, stages: tuple[SearchStage, ...]) -> tuple[SearchStage, ...]:
    """Search stages at the size of the preset, as `resolve` makes those of a trial."""
    return resolve(replace(study.base, search=stages), replace(settings, changes={})).search


def _matched(trial: Trial, base: Trial, shape: DataShape | None) -> Trial:
    """`trial` with the batch at which its supernet takes the base's memory, and learning rates to match.

    The paper raises the batch with K, so K and batch change together there; `--batch fixed` tells them apart.
    """
    assert shape is not None
    if len(trial.search) != len(base.search):
        raise ValueError(
            "--batch memory_matched needs arms with the same stages; this study varies them, use fixed"
        )
    stages = []
    for stage, other in zip(trial.search, base.search, strict=True):
        ratio = _bytes_per_image(base, other, shape) / _bytes_per_image(trial, stage, shape)
        batch = max(1, round(other.batch_size * ratio))
        stages.append(replace(stage, batch_size=batch, lr=_scaled(stage.lr, batch / stage.batch_size)))
    return replace(trial, search=tuple(stages))


def _scaled(lr: Any, factor: float) -> Any:
    match lr:
        case Constant(value):
            return Constant(value * factor)
        case Cosine() | Linear():
            return replace(lr, start=lr.start * factor, end=lr.end * factor)
        case LinearTail() | Exponential():
            return replace(lr, start=lr.start * factor)
    raise ValueError(
        f"--batch memory_matched cannot scale the learning rate {lr}; use Constant, Linear or Cosine"
    )


def _bytes_per_image(trial: Trial, stage: SearchStage, shape: DataShape) -> float:
    with seeded(0, "memory probe"):
        supernet = trial.method.supernet.build(
            trial.space,
            trial.space.choices,
            cells=stage.cells,
            channels=stage.channels,
            classes=shape.classes,
            channels_in=shape.channels,
            stem=stage.stem,
        )
    return saved_bytes_per_image(supernet, uniform_gates(supernet), shape.channels, shape.image_size)


# Identity


def study_id(study: Study, settings: Settings, planned: Sequence[Planned]) -> str:
    """12 hex digits that two runs share when they are one study: same question and trials, stopped alike."""
    joint = {name: repr(domain) for name, domain in study.joint.items()}
    base = resolve(study.base, settings).id
    chosen = [asdict(settings.stopping), settings.retrain_seeds, *settings.objectives]
    text = json.dumps([study.name, settings.preset, base, joint, chosen, sorted(p.trial.id for p in planned)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settable(study: Study, settings: Settings) -> list[str]:
    """Dotted names that `--set` takes for this study."""
    names = paths(resolve(study.base, replace(settings, changes={})))
    return sorted(name for name in names if not name.endswith(".type") and _is_free(study, name))


def _is_free(study: Study, name: str) -> bool:
    try:
        _check_changes(study, {name: None})
    except ValueError:
        return False
    return True
