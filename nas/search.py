"""The search loop: train a supernet and its architecture parameters by stages, then read off a genotype."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.config import ABOVE_ZERO, check_range
from nas.data import Augment, Data
from nas.data import Part as DataPart
from nas.execution import Compile, compile_cells, uncompiled
from nas.gates import Gates
from nas.genotype import Genotype
from nas.measures import (
    STOP_COLUMNS,
    Part,
    Snapshot,
    View,
    largest_eigenvalues,
    measured,
    seconds_of,
    spelled_out,
)
from nas.measures import Values as Values  # of this module, too
from nas.methods import Method
from nas.metrics import (
    METRICS,
    Average,
    Probe,
    describe,
    one_hot_gates,
    peak_memory_mb,
    reset_peak_memory,
    saved_bytes_per_image,
    supernet_quality,
)
from nas.network import Stem
from nas.samplers import Gumbel, Progress, init_arch
from nas.schedule import Constant, Cosine, Schedule, check_probability
from nas.searchers import Argmax, keep_likeliest
from nas.spaces.cell import CellSpace
from nas.spaces.space import Choices
from nas.state import Batch, SearchState, frozen, load_optimizer
from nas.streams import generator, seeded, stream_seed
from nas.supernets.cell import Noise


@dataclass(frozen=True)
class SearchStage:
    """The training of one supernet; P-DARTS has three, each starting from fresh weights."""

    epochs: int = 50
    frozen_epochs: int = 0
    """First epochs in which only the weights learn."""
    cells: int = 8
    channels: int = 16
    keep: int | None = None
    """Operations kept on each edge after the stage, for the next one; None keeps all."""
    batch_size: int = 64
    lr: Schedule = Cosine(0.025, 0.001)
    lr_per_batch: bool = False
    """Whether the rate follows its schedule within epochs too (GDAS)."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 3e-4
    clip: float = 5.0
    skip_dropout: Schedule = Constant(0.0)
    drop_path: Schedule = Constant(0.0)
    augment: Augment = field(default_factory=lambda: Augment(pad=4, flip=True))
    stem: Stem = "cifar"
    compile: Compile = "off"
    """Whether the cells are compiled, for full training batches; everything else runs as written.

    Draws inside a cell (drop-path, dropout after skips) interrupt what is compiled."""
    checkpoint_cells: bool = False
    """Whether the backward pass computes cells again instead of keeping their activations.

    For memory; the result is the same."""

    def __post_init__(self) -> None:
        inf = math.inf
        check_range(
            self,
            epochs=(1, inf, "leave the stage out to search less"),
            cells=(1, inf, "8 is usual"),
            channels=(1, inf, "16 is usual"),
            batch_size=(1, inf, "64 is usual"),
            frozen_epochs=(0, self.epochs + 1, "no more of them than epochs"),
            keep=(1, inf, "None keeps all operations"),
            clip=(ABOVE_ZERO, inf, "5 is usual, 1e9 clips nothing"),
            weight_decay=(0, inf, "0 decays nothing"),
            momentum=(0, 1, "0.9 is usual"),
        )
        if self.compile not in get_args(Compile):
            raise ValueError(f"compile={self.compile!r} is not one of {', '.join(get_args(Compile))}")
        check_probability(self, "skip_dropout", self.epochs)
        check_probability(self, "drop_path", self.epochs)


EVALUATION_BATCH = 128
"""Images per batch when a supernet is evaluated: batch norm takes their statistics, so all use one size."""

Price = Callable[[Genotype], Values]
"""Parameters and multiply-adds of a genotype at retraining size."""


class Watched(NamedTuple):
    """What the method's `stop` has seen of an epoch."""

    eigenvalue: float
    probabilities: dict[str, Tensor]
    metrics: Values
    """Of the epoch's row, to report if the search goes back to it."""


def equal_batches(
    data: Data, part: DataPart, size: int, most: int, order: torch.Generator
) -> Iterator[Batch]:
    """At most `most` batches of equally many images, so that a mean over them favours none.

    Of `size` images, or where the part has too few for that many batches, of as many as it has for each.
    Nothing of a part of one image: batch norm needs two.
    """
    images = data.size(part)
    count = max(1, min(most, -(-images // size)))
    size = min(size, images // count)
    if size < 2:
        return
    for number, (x, y) in enumerate(data.batches(part, size, order=order), start=1):
        yield x[:size], y[:size]  # the last batch that is served may hold one more
        if number == count:
            return


class SearchRun:
    """A search in progress: everything a checkpoint holds. One `step` is one epoch of the current stage.

    Random draws are functions of (seed, stage, epoch), so a run restored at an epoch's end goes on as if
    it had never stopped.
    """

    def __init__(
        self,
        space: CellSpace,
        method: Method,
        stages: tuple[SearchStage, ...],
        data: Data,
        seed: int,
        device: torch.device,
        price: Price,
        measure: tuple[str, ...] = (),
        measure_every: int = 1,
    ) -> None:
        self.space, self.method, self.stages, self.data = space, method, stages, data
        self.seed, self.device, self.price = seed, device, price
        self.measure, self.measure_every = measure, measure_every
        self.choices: dict[str, Choices] = dict(space.choices)
        self.part = 0
        self.epoch = 0
        """Epochs done in the current stage."""
        self.genotype: Genotype | None = None
        """What was found, once the search is done."""
        self.state: SearchState | None = None
        self.saved_mb = 0.0
        """Activations that a training step of the current stage keeps, in MB."""
        self.peak = 0.0
        """Peak memory of the current stage so far, in MB."""
        self.history: dict[int, Snapshot] = {}
        """Epochs before in the current stage by number, where `stability` or `eigenvalue` is measured."""
        self.watched: list[Watched] = []
        """What the method's `stop` has seen of the current stage."""
        self.went_back: Values | None = None
        """Metrics of the epoch that the last stage went back to, once the search is done."""
        if stages:
            self.state = self._new_state()
        else:
            self.genotype = self._derive({})

    @property
    def done(self) -> bool:
        """Whether the genotype has been found."""
        return self.genotype is not None

    @property
    def stage(self) -> SearchStage:
        """Settings of the current stage."""
        return self.stages[self.part]

    def _new_state(self) -> SearchState:
        """Fresh weights and architecture parameters for the current stage."""
        stage, method = self.stage, self.method
        with seeded(self.seed, "init", "search", self.part):
            supernet = method.supernet.build(
                self.space,
                self.choices,
                cells=stage.cells,
                channels=stage.channels,
                classes=self.data.classes,
                channels_in=self.data.channels,
                stem=stage.stem,
                checkpoint_cells=stage.checkpoint_cells,
            ).to(self.device)
        arch = init_arch(
            method.supernet.gated(self.choices),
            generator(self.seed, "alpha", self.part),
            self.device,
            torch.get_default_dtype(),
        )
        state = SearchState(
            supernet=supernet,
            arch=arch,
            sampler=method.sampler,
            weight_optimizer=torch.optim.SGD(
                supernet.parameters(),
                lr=stage.lr.at(0, stage.epochs),
                momentum=stage.momentum,
                nesterov=stage.nesterov,
                weight_decay=stage.weight_decay,
                fused=True,
            ),
            arch_optimizer=method.arch_update.optimizer(arch),
            progress=Progress(0, stage.epochs),
            draws=generator(self.seed, "gates", self.part, 0),
        )
        self.saved_mb = self._saved_mb(state)
        compile_cells(supernet.cells, stage.compile)
        reset_peak_memory(self.device)
        self.peak = 0.0
        return state

    def _saved_mb(self, state: SearchState) -> float:
        """What a training step of the current stage keeps for its backward pass, in MB."""
        state.supernet.noise = Noise(generator(self.seed, "noise", "memory", self.part, device=self.device))
        draws = generator(self.seed, "gates", "memory", self.part)
        (gates,) = state.sampler.sample(state.arch, state.progress, draws)
        per_image = saved_bytes_per_image(state.supernet, gates, self.data.channels, self.data.image_size)
        return per_image * self.stage.batch_size / 2**20

    def step(self) -> tuple[Values, Genotype]:
        """Train for one epoch; returns its metrics and the genotype of the architecture parameters now.

        Raises:
            FloatingPointError: the training or validation loss is not finite.
        """
        assert self.state is not None
        started = time.perf_counter()
        state, stage = self.state, self.stage
        train = self._train_epoch(state, stage)
        train_loss, train_error = train.read()
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"search diverged: training loss {train_loss} in epoch {self.epoch} of stage {self.part}"
            )
        with uncompiled(stage.compile):
            probabilities, stopping = self._watch(state)
            last = self.epoch + 1 == stage.epochs or stopping.get("stop_epoch") is not None
            metrics, genotype = self._measured(state, probabilities, train_loss, train_error)
            metrics |= stopping
            # Before the next stage starts a new one, and without what measuring takes.
            self.peak = peak = max(self.peak, peak_memory_mb(self.device))
            if self.measure:
                metrics |= self._measured_by_name(state, genotype, metrics, last=last)
                reset_peak_memory(self.device)
            if self._watching:
                self.watched[-1].metrics.update(metrics)
            self.epoch += 1
            if last:
                self._end_stage(state, probabilities, genotype, metrics)
        metrics["seconds"] = time.perf_counter() - started - seconds_of(metrics)
        metrics["peak_memory_mb"] = peak
        return metrics, genotype

    @property
    def _watching(self) -> bool:
        """Whether the method's `stop` looks at the current epoch."""
        return self.method.stop is not None and self.epoch % self.method.stop.every == 0

    def _watch(self, state: SearchState) -> tuple[dict[str, Tensor], Values]:
        """What the stage has learned, which is that of an earlier epoch where the method's `stop` goes back.

        And the columns of the rule, where there is one. The eigenvalue is measured after the last epoch of a
        stage too, which the rule has no use for.
        """
        probabilities, stop = state.arch.probabilities(), self.method.stop
        if stop is None:
            return probabilities, {}
        columns: Values = dict.fromkeys(STOP_COLUMNS)
        if self._watching or self.epoch + 1 == self.stage.epochs:
            started = time.perf_counter()
            genotype = self._derive(probabilities)
            values = largest_eigenvalues(self._view(state, genotype, {}), stop.batches)
            value = math.fsum(values) / len(values)
            columns["stop_eigenvalue"] = value if math.isfinite(value) else None
            columns["stop_seconds"] = time.perf_counter() - started
        if self._watching:
            self.watched.append(Watched(value, {name: p.detach() for name, p in probabilities.items()}, {}))
            back = stop.back_to([one.eigenvalue for one in self.watched])
            if back is not None:
                columns |= {"stop_epoch": float(self.epoch), "stop_back_to": float(back)}
                probabilities = self.watched[back // stop.every].probabilities
        return probabilities, columns

    def _measured_by_name(
        self, state: SearchState, genotype: Genotype, metrics: Values, *, last: bool
    ) -> Values:
        """What `measure` asks for after this epoch."""
        every = self.epoch % self.measure_every == 0
        found = measured(self.measure, self._view(state, genotype, metrics), every=every, last=last)
        if {"stability", "eigenvalue"} & set(spelled_out(self.measure)):
            now = {name: p.detach() for name, p in state.arch.probabilities().items()}
            self.history[self.epoch] = Snapshot(genotype, now, found.get("eigenvalue"))
        return found

    def measured_now(self, names: tuple[str, ...]) -> Values:
        """All columns of `names` as the current stage stands, due or not: for what they take."""
        assert self.state is not None
        genotype = self._derive(self.state.arch.probabilities())
        metrics: Values = dict.fromkeys(METRICS)
        with uncompiled(self.stage.compile):
            return measured(names, self._view(self.state, genotype, metrics), every=True, last=True)

    def _view(self, state: SearchState, genotype: Genotype, metrics: Values) -> View:
        name = ("gates", "evaluation", self.part, self.epoch)
        held_out = self._held_out()

        def gates() -> Gates:
            return state.sampler.sample(state.arch, state.progress, generator(self.seed, *name))[0]

        def batches(part: Part, size: int, most: int) -> Iterator[Batch]:
            # In an order of its own: stored images may lie class by class.
            order = generator(self.seed, "order", "measure", part)
            return equal_batches(self.data, held_out if part == "held_out" else part, size, most, order)

        return View(state, genotype, metrics, gates, batches, self.seed, self.history)

    def _measured(
        self, state: SearchState, probabilities: dict[str, Tensor], train_loss: float, train_error: float
    ) -> tuple[Values, Genotype]:
        """All metrics after an epoch of training but time and memory, and what the search would give now."""
        genotype = self._derive(probabilities)
        state.draws = generator(self.seed, "gates", "evaluation", self.part, self.epoch)
        valid_loss, valid_error = supernet_quality(state, state.gates()[0], self._valid_batches())
        if not math.isfinite(valid_loss):  # the last step of the epoch did it
            raise FloatingPointError(
                f"search diverged: validation loss {valid_loss} in epoch {self.epoch} of stage {self.part}"
            )
        metrics: Values = {
            "train_loss": train_loss,
            "train_error": train_error,
            "valid_loss": valid_loss,
            "valid_error": valid_error,
            **describe(Probe(state, genotype, self._valid_batches)),
            "saved_mb": self.saved_mb,
            **self.price(genotype),
        }
        return metrics, genotype

    def _train_epoch(self, state: SearchState, stage: SearchStage) -> Average:
        name = (self.part, self.epoch)
        state.draws = generator(self.seed, "gates", *name)
        state.progress = Progress(self.epoch, stage.epochs)
        state.supernet.noise = Noise(
            generator(self.seed, "noise", *name, device=self.device),
            skip_dropout=stage.skip_dropout.at(self.epoch, stage.epochs),
            drop_path=stage.drop_path.at(self.epoch, stage.epochs),
        )
        state.supernet.train()
        average = Average()
        update = self.method.arch_update
        learning = self.epoch >= stage.frozen_epochs
        steps = max(1, -(-self.data.size("weights") // stage.batch_size))
        arch_batches = self._arch_batches() if learning else None
        for number, batch in enumerate(self._batches("weights")):
            moment = self.epoch + (number / steps if stage.lr_per_batch else 0)
            for group in state.weight_optimizer.param_groups:
                group["lr"] = stage.lr.at(moment, stage.epochs)
            arch_batch = next(arch_batches) if arch_batches is not None else None
            full = all(len(b[1]) == stage.batch_size for b in (batch, arch_batch) if b is not None)
            with nullcontext() if full else uncompiled(stage.compile):
                if arch_batch is not None and not update.weights_first:
                    update.step(state, batch, arch_batch)
                weight_step(state, batch, stage.clip, average)
                if arch_batch is not None and update.weights_first:
                    update.step(state, batch, arch_batch)
        return average

    def _end_stage(
        self, state: SearchState, probabilities: dict[str, Tensor], genotype: Genotype, metrics: Values
    ) -> None:
        back = metrics.get("stop_back_to")
        if back is not None:
            assert self.method.stop is not None
            went_back = self.watched[int(back) // self.method.stop.every].metrics
        self.history, self.watched = {}, []
        if self.part + 1 < len(self.stages):
            keep = self.stage.keep
            if keep is not None:
                for name, table in self.choices.items():
                    if name.endswith("/op"):
                        self.choices[name] = keep_likeliest(table, probabilities[name], keep)
            self.part += 1
            self.epoch = 0
            self.state = self._new_state()
            return
        metrics |= {"discretisation_gap": None, "discretisation_gap_seconds": None}
        if back is None:
            metrics |= self._discretisation_gap(state, genotype, metrics)
        else:
            # What only the last epoch has is none of the architecture that was taken; the rule's is.
            self.went_back = dict.fromkeys(metrics) | went_back
            self.went_back |= {name: metrics[name] for name in ("stop_epoch", "stop_back_to")}
        self.genotype = genotype
        self.state = None  # the supernet is not needed any more

    def _discretisation_gap(self, state: SearchState, genotype: Genotype, metrics: Values) -> Values:
        started = time.perf_counter()
        _, derived_error = supernet_quality(state, one_hot_gates(state, genotype), self._valid_batches())
        assert metrics["valid_error"] is not None
        return {
            "discretisation_gap": derived_error - metrics["valid_error"],
            "discretisation_gap_seconds": time.perf_counter() - started,
        }

    def _derive(self, probabilities: dict[str, Tensor]) -> Genotype:
        draws = random.Random(stream_seed(self.seed, "genotype"))
        return self.method.searcher.derive(self.space, self.choices, probabilities, draws)

    def _batches(self, part: Literal["weights", "arch"], restart: int = 0) -> Iterator[Batch]:
        name = (part, self.part, self.epoch, restart)
        return self.data.batches(
            part,
            self.stage.batch_size,
            order=generator(self.seed, "order", *name),
            augment=self.stage.augment,
            draws=generator(self.seed, "augment", *name),
        )

    def _arch_batches(self) -> Iterator[Batch]:
        """Batches of the architecture half without end, reshuffled at each pass."""
        restart = 0
        while True:
            yield from self._batches("arch", restart)
            restart += 1

    def _valid_batches(self) -> Iterator[Batch]:
        """Held-out images in stored order."""
        return self.data.batches(self._held_out(), EVALUATION_BATCH, order=None)

    def _held_out(self) -> Literal["valid", "arch"]:
        """The validation part, or without one the architecture half."""
        return "valid" if self.data.size("valid") else "arch"

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, in plain containers and tensors."""
        held: dict[str, Any] = {
            "part": self.part,
            "epoch": self.epoch,
            "genotype": str(self.genotype) if self.genotype else None,
            "allowed": {name: [list(row) for row in table.allowed] for name, table in self.choices.items()},
        }
        if self.history:
            held["history"] = {
                epoch: (str(one.genotype), one.probabilities, one.eigenvalue)
                for epoch, one in self.history.items()
            }
        if self.watched:
            held["watched"] = [tuple(one) for one in self.watched]
        if self.state is not None:
            assert self.state.arch_optimizer is not None
            held["supernet"] = self.state.supernet.state_dict()
            held["logits"] = {name: logits.detach() for name, logits in self.state.arch.logits.items()}
            held["weight_optimizer"] = self.state.weight_optimizer.state_dict()
            held["arch_optimizer"] = self.state.arch_optimizer.state_dict()
        return held

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.part, self.epoch = held["part"], held["epoch"]
        self.genotype = Genotype.parse(held["genotype"]) if held["genotype"] else None
        self.choices = {
            name: table.keep(tuple(tuple(row) for row in held["allowed"][name]))
            for name, table in self.choices.items()
        }
        snapshots = dict(held.get("history", {}))
        if "before" in held:  # as checkpoints had it that knew the last epoch alone
            snapshots[self.epoch - 1] = (held["before"]["genotype"], held["before"]["probabilities"])
        self.history = {
            epoch: Snapshot(Genotype.parse(genotype), *rest) for epoch, (genotype, *rest) in snapshots.items()
        }
        # Checkpoints of before have no metrics of what was watched.
        self.watched = [
            Watched(value, probabilities, metrics[0] if metrics else {})
            for value, probabilities, *metrics in held.get("watched", ())
        ]
        self.state = None
        if "supernet" not in held:
            return
        self.state = state = self._new_state()
        assert state.arch_optimizer is not None
        state.supernet.load_state_dict(held["supernet"])
        with torch.no_grad():
            for name, logits in state.arch.logits.items():
                logits.copy_(held["logits"][name])
        load_optimizer(state.weight_optimizer, held["weight_optimizer"])
        load_optimizer(state.arch_optimizer, held["arch_optimizer"])


def weight_step(state: SearchState, batch: Batch, clip: float, average: Average | None = None) -> None:
    """One SGD step of the supernet's weights under fresh gates; architecture parameters are left alone."""
    images, labels = batch
    state.weight_optimizer.zero_grad()
    with frozen(state.arch.parameters()):
        for gates in state.gates():
            logits = state.supernet(images, gates)
            loss = F.cross_entropy(logits, labels)
            torch.autograd.backward(loss)
            if average is not None:
                average.add(loss, logits, labels)
    for parameter in state.supernet.parameters():
        if parameter.grad is None:  # of operations that no gate ran: they decay and drift like the others
            parameter.grad = torch.zeros_like(parameter)
    nn.utils.clip_grad_norm_(state.supernet.parameters(), clip, foreach=True)
    state.weight_optimizer.step()


def check_search(space: CellSpace, method: Method, stages: tuple[SearchStage, ...]) -> None:
    """Refuse a search that cannot run, before anything is built.

    Raises:
        ValueError: no stages for a searcher that reads a supernet, a width that K does not divide, an
            operation without a batched form, a compiled stage whose steps cannot be replayed, or a stage that
            may leave an edge with `none` alone.
    """
    needs_search = isinstance(method.searcher, Argmax)
    if needs_search and not stages:
        raise ValueError(
            f"{type(method.searcher).__name__} reads a searched supernet; give at least one search stage"
        )
    for stage in stages:
        method.supernet.check(space, stage.channels)
        if stage.compile != "off" and isinstance(method.sampler, Gumbel) and method.sampler.hard:
            raise ValueError(
                f"compile={stage.compile!r} would compile anew for each draw of hard gates; use compile='off'"
            )
        if stage.compile == "reduce-overhead" and method.arch_update.order == 2:
            raise ValueError(
                "compile='reduce-overhead' overwrites what order 2 still needs of its first pass; "
                "use compile='default'"
            )
    if "none" in space.ops and any(stage.keep == 1 for stage in stages[:-1]):
        raise ValueError("keep=1 may leave an edge with none alone, which no cell can hold; keep at least 2")
