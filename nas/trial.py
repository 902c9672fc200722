"""A trial: one search and one retraining. Start reading here.

`Trial` says what to do, `TrialRun` does it an epoch at a time, `run_trial` runs it to its end
in this process.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from nas.config import check_range, from_dict, to_dict
from nas.costs import network_cost
from nas.data import Arrays, Data, DataConfig, load
from nas.genotype import Genotype
from nas.measures import check_measures, columns_of, proxy_columns, spelled_out
from nas.methods import METHODS, Method
from nas.network import Network
from nas.proxies import BATCH_SIZE, BATCHES, PROXIES, evaluate
from nas.retrain import RetrainRun, RetrainStage, check_device, check_retrain
from nas.search import SearchRun, SearchStage, Values, check_search, equal_batches
from nas.spaces.cell import CellSpace
from nas.streams import generator, seeded

StageName = Literal["search", "retrain"]


@dataclass(frozen=True)
class Seeds:
    """Three seeds for three questions.

    Does a claim hold for another split, another search, another training?
    """

    split: int = 0
    search: int = 0
    retrain: int = 0


@dataclass(frozen=True)
class Trial:
    """One search and one retraining, as data. Equal trials give equal results."""

    space: CellSpace = field(default_factory=CellSpace)
    data: DataConfig = field(default_factory=DataConfig)
    method: Method = METHODS["pc_darts"]
    search: tuple[SearchStage, ...] = (SearchStage(),)
    retrain: RetrainStage = field(default_factory=RetrainStage)
    seeds: Seeds = Seeds()
    measure: tuple[str, ...] = ()
    """What is measured besides the usual, by name: `nas.measures.MEASURES`, its groups, and proxies."""
    measure_every: int = 1
    """Epochs from one measurement to the next of what runs the supernet for it (`eigenvalue`, `alignment`),
    from the first epoch of a stage on; the last epoch always is one. The literature has 2."""

    def __post_init__(self) -> None:
        check_range(self, measure_every=(1, math.inf, "2 is usual"))
        check_measures(self.measure)
        check_search(self.space, self.method, self.search)
        if self.data.weights_share == 1 and any(stage.frozen_epochs < stage.epochs for stage in self.search):
            raise ValueError(
                "weights_share=1 leaves no images to learn the architecture from; "
                "use a share below 1, or search=()"
            )

    @property
    def id(self) -> str:
        """12 hex digits that name this trial: a hash of all but where downloads lie and who decodes."""
        here = replace(self.data, root=DataConfig.root, download=DataConfig.download, workers=None)
        plain = replace(self, data=here).to_dict()
        # Fields that came later are no part of the hash while they are off: earlier records keep their names.
        for name, off in (("measure", ()), ("measure_every", 1)):
            if getattr(self, name) == off:
                del plain[name]
        if self.method.stop is None:
            del plain["method"]["stop"]
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain data."""
        plain: dict[str, Any] = to_dict(self)
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> "Trial":
        """The trial that `to_dict` was called on.

        Raises:
            ValueError: an unknown field or a refused value.
        """
        trial: Trial = from_dict(Trial, plain)
        return trial


@dataclass(frozen=True)
class Row:
    """What one epoch reports."""

    stage: StageName
    part: int
    """Which search stage, from 0; 0 in retraining."""
    epoch: int
    """Counted from 0 within search (over all its stages) and within retraining."""
    metrics: Values
    genotype: Genotype | None = None
    """What the search would give now."""
    stage_end: bool = False
    """Whether the next epoch belongs to another stage; a good moment for a checkpoint."""


def pricing(trial: Trial, data: Data) -> Callable[[Genotype], Values]:
    """Function that gives parameters and multiply-adds, in millions, of a genotype at retraining size."""
    stage, classes, image_size, channels_in = trial.retrain, data.classes, data.image_size, data.channels

    def price(genotype: Genotype) -> Values:
        cost = network_cost(
            genotype,
            channels=stage.channels,
            cells=stage.cells,
            classes=classes,
            image_size=image_size,
            channels_in=channels_in,
            stem=stage.stem,
        )
        return {"params_m": cost.params / 1e6, "madds_m": cost.madds / 1e6}

    return price


class TrialRun:
    """A trial in progress. One `step` is one epoch of the current stage, search first, then retraining."""

    def __init__(self, trial: Trial, data: Data, device: torch.device) -> None:
        check_retrain(trial.retrain, data.image_size)
        check_device(trial.retrain, device)
        self.trial, self.data, self.device = trial, data, device
        self.search = SearchRun(
            trial.space,
            trial.method,
            trial.search,
            data,
            trial.seeds.search,
            device,
            pricing(trial, data),
            trial.measure,
            trial.measure_every,
        )
        self.retrain: RetrainRun | None = None
        self.seconds: dict[StageName, float] = {"search": 0.0, "retrain": 0.0}
        self.epochs: dict[StageName, int] = {"search": 0, "retrain": 0}
        self.last: dict[StageName, Values] = {"search": {}, "retrain": {}}
        self.peak_memory_mb = 0.0
        self.proxies: Values = {}
        """Zero-cost proxies of what was found, measured before its retraining."""
        self.result: Values | None = None
        """Final metrics, once the trial is done."""
        if self.search.done:
            self._end_search()

    @property
    def done(self) -> bool:
        """Whether the test part has been read, or where nothing is retrained the search has ended."""
        return self.result is not None

    @property
    def params_m(self) -> float | None:
        """Millions of weights of the network that is retrained; None while the search goes on."""
        return self.search.price(self.search.genotype)["params_m"] if self.search.genotype else None

    def step(self) -> Row:
        """Run one epoch; after the last one the test part is read, and `result` is there.

        Where no epoch is retrained, the last epoch is that of the search, and the test part is left alone.

        Raises:
            FloatingPointError: a training or validation loss is not finite.
            RuntimeError: the trial is done.
        """
        if self.done:
            raise RuntimeError("the trial is done: its test part has been read")
        if self.retrain is None:
            part = self.search.part
            metrics, genotype = self.search.step()
            ended = self.search.done or self.search.part != part
            row = self._row("search", part, metrics, genotype, ended=ended)
            if self.search.done:
                if self.search.went_back is not None:
                    self.last["search"] = {
                        **self.search.went_back,
                        "peak_memory_mb": metrics["peak_memory_mb"],
                    }
                self._end_search()
            return row
        if not self.epochs["retrain"]:
            self.proxies = self.scored(self.retrain.genotype, self.trial.measure)
        metrics = self.retrain.step()
        row = self._row("retrain", 0, metrics, None, ended=self.retrain.done)
        if self.retrain.done:
            self.result = self._finish(self.retrain)
        return row

    def _row(
        self, stage: StageName, part: int, metrics: Values, genotype: Genotype | None, *, ended: bool
    ) -> Row:
        row = Row(stage, part, self.epochs[stage], metrics, genotype, ended)
        self.epochs[stage] += 1
        self.seconds[stage] += metrics["seconds"] or 0.0
        self.last[stage] = metrics
        self.peak_memory_mb = max(self.peak_memory_mb, metrics["peak_memory_mb"] or 0.0)
        return row

    def _end_search(self) -> None:
        assert self.search.genotype is not None
        if self.trial.retrain.epochs:
            self.retrain = self._new_retrain()
        else:
            self.proxies = self.scored(self.search.genotype, self.trial.measure)
            self.result = self._found(self.search.genotype)

    def _new_retrain(self) -> RetrainRun:
        assert self.search.genotype is not None
        return RetrainRun(
            self.search.genotype, self.trial.retrain, self.data, self.trial.seeds.retrain, self.device
        )

    def scored(self, genotype: Genotype, measure: tuple[str, ...]) -> Values:
        """Columns of the proxies that `measure` names: networks at retraining size, training images."""
        names = [name for name in spelled_out(measure) if name in PROXIES]
        if not names:
            return {}
        stage, seed = self.trial.retrain, self.trial.seeds.search

        def build(init: int) -> Network:
            with seeded(seed, "init", "proxy", init):
                network = Network(
                    genotype,
                    channels=stage.channels,
                    cells=stage.cells,
                    classes=self.data.classes,
                    channels_in=self.data.channels,
                    stem=stage.stem,
                )
            return network.to(self.device).to(memory_format=torch.channels_last)

        order = generator(seed, "order", "proxy")
        batches = list(equal_batches(self.data, "train", BATCH_SIZE, BATCHES, order))
        return evaluate(names, build, batches, seed)

    def _finish(self, retrain: RetrainRun) -> Values:
        test_loss, test_error = retrain.quality("test")
        valid_error = self.last["retrain"]["valid_error"]
        scores: Values = {"test_error": test_error, "test_loss": test_loss, "valid_error": valid_error}
        return scores | self._found(retrain.genotype)

    def _found(self, genotype: Genotype) -> Values:
        """What there is to say of a genotype and its search."""
        last = self.last["search"]
        named = [name for name in columns_of(self.trial.measure) if name in last]
        searched = {f"search_{name}": last.get(name) for name in (*SEARCH_SUMMARY, *named)}
        stopped: Values = {name: last[name] for name in ("stop_epoch", "stop_back_to") if name in last}
        return {
            **self.search.price(genotype),
            "skips": float(genotype.normal.skips),
            "skips_reduce": float(genotype.reduce.skips),
            "search_seconds": self.seconds["search"],
            "retrain_seconds": self.seconds["retrain"],
            "peak_memory_mb": self.peak_memory_mb,
            "discretisation_gap": last.get("discretisation_gap"),
            **searched,
            **stopped,
            **self.proxies,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the trial depends on, in plain containers and tensors."""
        return {
            "trial": self.trial.id,
            "search": self.search.state_dict(),
            "retrain": self.retrain.state_dict() if self.retrain else None,
            "seconds": dict(self.seconds),
            "epochs": dict(self.epochs),
            "last": {stage: dict(values) for stage, values in self.last.items()},
            "peak_memory_mb": self.peak_memory_mb,
            "proxies": dict(self.proxies),
            "result": self.result,
        }

    def load_state_dict(self, held: dict[str, Any], *, adopt: bool = False) -> None:
        """Continue from where `state_dict` was taken.

        `adopt` takes over the state of another trial, as PBT does.

        Raises:
            ValueError: the state is that of another trial, and `adopt` is not set.
        """
        if held["trial"] != self.trial.id and not adopt:
            raise ValueError(f"checkpoint of trial {held['trial']} cannot continue trial {self.trial.id}")
        self.search.load_state_dict(held["search"])
        self.retrain = None
        if held["retrain"] is not None:
            self.retrain = self._new_retrain()
            self.retrain.load_state_dict(held["retrain"])
        self.seconds, self.epochs = dict(held["seconds"]), dict(held["epochs"])
        self.last = {stage: dict(values) for stage, values in held["last"].items()}
        self.peak_memory_mb, self.result = held["peak_memory_mb"], held["result"]
        self.proxies = dict(held.get("proxies", {}))


SEARCH_SUMMARY = (
    "saved_mb",
    "peak_memory_mb",
    "valid_loss",
    "valid_error",
    "train_error",
    "alpha_entropy",
    "beta_entropy",
    "alpha_margin",
)
"""Metrics of the last search epoch that the result repeats, to stand in one row with the final error."""


def recorded_metrics(trial: Trial) -> tuple[str, ...]:
    """What records say of the search of a trial, and what may so be correlated with its final error."""
    found = ("params_m", "madds_m", "skips", "skips_reduce", "discretisation_gap", "search_seconds")
    searched = (f"search_{name}" for name in (*SEARCH_SUMMARY, *columns_of(trial.measure)))
    stopped = ("stop_epoch", "stop_back_to") if trial.method.stop is not None else ()
    return (*found, *searched, *stopped, *proxy_columns(trial.measure))


@dataclass(frozen=True)
class TrialResult:
    """What a trial found and what it scored."""

    trial_id: str
    genotype: Genotype
    metrics: Values


def run_trial(
    trial: Trial,
    report: Callable[[Row], None] = lambda row: None,
    *,
    arrays: Arrays | None = None,
    device: torch.device | str = "cpu",
) -> TrialResult:
    """Search, retrain, read the test part once; `report` gets a row after every epoch."""
    device = torch.device(device)
    data = Data(arrays if arrays is not None else load(trial.data), trial.data, trial.seeds.split, device)
    run = TrialRun(trial, data, device)
    while not run.done:
        report(run.step())
    assert run.result is not None
    assert run.search.genotype is not None
    return TrialResult(trial.id, run.search.genotype, run.result)
