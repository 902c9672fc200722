"""Footprint: the memory that a trial takes at its peak, known before it starts.

What tensors take is counted, not guessed: the trial's own steps run on a few images, and every storage that
comes and goes is followed. Each grows linearly with the batch, so two batches of a few images give the peak
at any other.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nas.data import Arrays, Augment, Data, DataConfig
from nas.genotype import Cell, Genotype
from nas.measures import CURVATURE_BATCH, View, hessians, spelled_out
from nas.methods import Method
from nas.metrics import supernet_quality
from nas.retrain import RetrainRun, RetrainStage
from nas.samplers import Gumbel, Softmax
from nas.schedule import Constant, Schedule
from nas.search import EVALUATION_BATCH, SearchRun, SearchStage, weight_step
from nas.searchers import Argmax, Given
from nas.spaces.cell import CELL_TYPES, CellSpace, CellType
from nas.state import Batch
from nas.streams import generator
from nas.supernets.cell import Noise
from nas.trial import Trial

PROCESS_MB = 900.0
"""Resident memory of a trial's process on a CPU besides its tensors, measured: Ray, PyTorch, its kernels."""
RETAINED = 1.3
"""What tensors take in a CPU process over what they hold, measured: freed memory stays with the allocator, in
pieces that the next tensors do not always fit."""


@dataclass(frozen=True)
class DataShape:
    """What the memory of a network depends on."""

    channels: int
    image_size: int
    classes: int


@dataclass(frozen=True)
class Peak:
    """Most memory that the tensors of a stage take at once, in MB: weights, activations and all else."""

    train: float
    evaluation: float
    curvature: float = 0.0
    """Of the graph of a Hessian, where one is measured."""


@dataclass(frozen=True)
class Footprint:
    """What a trial takes at its peak. Data are not in it: trials share them."""

    search: tuple[Peak, ...]
    """By stage of the search."""
    retrain: Peak

    @property
    def tensors_mb(self) -> float:
        """What tensors take at once: the memory of a GPU, but for libraries and kernels."""
        peaks = (*self.search, self.retrain)
        return max(max(peak.train, peak.evaluation, peak.curvature) for peak in peaks)

    @property
    def process_mb(self) -> float:
        """Resident memory of the process on a CPU.

        The allocator keeps what training freed, in pieces too small for the large batches of evaluation,
        hence the sum.
        """
        return PROCESS_MB + RETAINED * max(
            max(peak.train, peak.curvature) + peak.evaluation for peak in (*self.search, self.retrain)
        )

    @property
    def certain_mb(self) -> float:
        """What tensors take at once in any case, whatever the search finds."""
        return self.search[0].train if self.search else 0.0


def footprint(trial: Trial, shape: DataShape) -> Footprint:
    """Footprint of `trial` on images of this shape; trials that differ in seeds share one computation.

    The retrained genotype is not known before a search, so it is the costliest of the space, and a stage of
    P-DARTS keeps the costliest operations: upper bounds, for a trial must fit whatever it finds. The first
    search stage is exact.
    """
    space, method, peaks = trial.space, _timeless_method(trial.method), []
    curved = trial.method.stop is not None or bool(
        {"eigenvalue", "hessian"} & set(spelled_out(trial.measure))
    )
    for stage in trial.search:
        peaks.append(_search_peak(space, method, _timeless(stage), shape, curved))
        if stage.keep is not None:
            space = _costliest_ops(space, stage.keep)
    retrain = Peak(0.0, 0.0)
    if trial.retrain.epochs:
        searcher = trial.method.searcher
        found = Genotype.parse(searcher.genotype) if isinstance(searcher, Given) else costliest(trial.space)
        retrain = _retrain_peak(found, _timeless(trial.retrain), shape)
    return Footprint(tuple(peaks), retrain)


def _timeless(stage: Any) -> Any:
    """`stage` as one step of it takes most memory: whatever is ever dropped at random is dropped now."""

    def highest(schedule: Schedule) -> Constant:
        return Constant(max(schedule.at(epoch, stage.epochs) for epoch in range(stage.epochs)))

    changes: dict[str, Any] = {"drop_path": highest(stage.drop_path), "lr": Constant(0.01), "epochs": 9}
    changes["compile"] = "off"  # it takes minutes and keeps no more
    changes["weight_decay"] = 0.0
    if isinstance(stage, SearchStage):
        changes |= {"skip_dropout": highest(stage.skip_dropout), "frozen_epochs": 0, "keep": None}
    else:
        changes["amp"] = "off" if stage.amp == "off" else "bf16"  # fp16, which a CPU lacks, has its size
    return replace(stage, augment=Augment(), **changes)


def _timeless_method(method: Method) -> Method:
    """`method` with what memory does not depend on at its default."""
    return replace(method, searcher=Argmax(), arch_update=replace(method.arch_update, lr=3e-4), stop=None)


@cache
def _search_peak(
    space: CellSpace, method: Method, stage: SearchStage, shape: DataShape, curved: bool
) -> Peak:
    if isinstance(method.sampler, Gumbel) and method.sampler.hard:
        curved = False  # hard gates have no curvature in alpha
        # One operation runs on each edge, whichever is drawn.
        space, method = _costliest_ops(space, 1), replace(method, sampler=Softmax())
    state = SearchRun(space, method, (stage,), _data(shape, 2), 0, CPU, lambda genotype: {}).state
    assert state is not None
    assert state.arch_optimizer is not None
    held = [*_between_steps(state.weight_optimizer), *_between_steps(state.arch_optimizer)]
    skip_dropout, drop_path = (each.at(0, 1) for each in (stage.skip_dropout, stage.drop_path))
    state.supernet.noise = Noise(generator(0, "noise"), skip_dropout, drop_path)
    state.supernet.train()

    def train(count: int) -> None:
        batch = next(_data(shape, count).batches("train", count, order=None))
        method.arch_update.step(state, batch, batch)
        weight_step(state, batch, stage.clip)
        state.weight_optimizer.zero_grad()

    def evaluate(count: int) -> None:
        supernet_quality(state, state.gates()[0], _data(shape, count).batches("train", count, order=None))

    def differentiate(count: int) -> None:
        def batches(part: object, size: int, most: int) -> Iterator[Batch]:
            return _data(shape, count).batches("train", count, order=None)

        gates = state.gates()[0]
        view = View(state, costliest(space), {}, lambda: gates, batches, 0)
        hessian = next(hessians(view, 1))
        hessian.product(hessian.gradient.detach())

    return Peak(
        _peak_mb(train, held, stage.batch_size),
        _peak_mb(evaluate, held, EVALUATION_BATCH),
        _peak_mb(differentiate, held, CURVATURE_BATCH) if curved else 0.0,
    )


@cache
def _retrain_peak(genotype: Genotype, stage: RetrainStage, shape: DataShape) -> Peak:
    run = RetrainRun(genotype, stage, _data(shape, 2), 0, CPU)
    held = _between_steps(run.optimizer)

    def train(count: int) -> None:
        run.data, run.stage = _data(shape, count), replace(stage, batch_size=count)
        with suppress(FloatingPointError):  # it is noise that is learned; what counts is what it takes
            run.step()
        run.optimizer.zero_grad()

    def evaluate(count: int) -> None:
        run.data, run.stage = _data(shape, count), replace(stage, batch_size=count)
        run.quality("test")

    return Peak(
        _peak_mb(train, held, stage.batch_size, parts=stage.accumulate),
        _peak_mb(evaluate, held, stage.batch_size, parts=stage.accumulate),
    )


CPU = torch.device("cpu")


def _data(shape: DataShape, count: int) -> Data:
    """`count` images of noise to train on, and the same to test on."""
    size = (count, shape.channels, shape.image_size, shape.image_size)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    labels = np.zeros(count, dtype=np.int64)
    half = (0.5,) * shape.channels
    classes = tuple(map(str, range(shape.classes)))
    arrays = Arrays(images, labels, images, labels, classes, "noise", "", half, half)
    return Data(arrays, DataConfig(valid=0, weights_share=1, shuffle=False), 0, CPU)


def _between_steps(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and what `optimizer` keeps of them from step to step, which it begins to keep here."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    kept = [value for held in optimizer.state.values() for value in held.values()]
    return [tensor for tensor in (*parameters, *kept) if isinstance(tensor, Tensor)]


# --- the costliest architecture -----------------------------------------------------------------------------

COSTLIEST = (
    "sep_conv_7x7",
    "sep_conv_5x5",
    "sep_conv_3x3",
    "conv_7x1_1x7",
    "conv_1x3_3x1",
    "dil_conv_5x5",
    "dil_conv_3x3",
    "max_pool_3x3_bn",
    "max_pool_3x3",
    "avg_pool_3x3",
    "noise",
    "skip_connect",
    "none",
)
"""Operations by the memory they take, most first."""


def costliest(space: CellSpace) -> Genotype:
    """Genotype of `space` that takes most memory to train.

    All nodes read the cell's inputs, which are larger than its nodes where the cell reduces.
    """
    cells = {}
    for cell in CELL_TYPES:
        first = dict(zip(space.edges, _by_cost(space, cell), strict=True))
        nodes = tuple(
            tuple((first[node, source][0], source) for source in range(space.inputs_per_node))
            for node in range(2, space.nodes + 2)
        )
        cells[cell] = Cell(nodes, tuple(range(2, space.nodes + 2)))
    return Genotype(normal=cells["normal"], reduce=cells["reduce"])


def _costliest_ops(space: CellSpace, keep: int) -> CellSpace:
    """`space` with the costliest `keep` operations on every edge."""
    normal, reduce = (tuple(ops[:keep] for ops in _by_cost(space, cell)) for cell in CELL_TYPES)
    return replace(space, normal_ops=normal, reduce_ops=reduce)


def _by_cost(space: CellSpace, cell: CellType) -> list[tuple[str, ...]]:
    """Operations of every edge, the costliest first."""
    return [
        tuple(sorted((space.ops[option] for option in options), key=COSTLIEST.index))
        for options in space.op_choices(cell).allowed
    ]


# --- following storages -------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch ships it without types
    """Bytes of all storages that are there after each operation, those of `held` included."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.after: list[int] = []
        self.known: set[int] = set()
        for tensor in held:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        self.after.append(self.now)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name not in self.known:
            self.known.add(name)
            self.now += size
            weakref.finalize(storage, self._freed, name, size).atexit = False

    def _freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


def _peak_mb(run: Callable[[int], None], held: list[Tensor], batch: int, parts: int = 1) -> float:
    """Peak of `run(batch)`, from what is there after each operation of runs on 2 and 4 images per part."""
    few, more = 2 * parts, 4 * parts
    rows = zip(_live_bytes(run, held, few), _live_bytes(run, held, more), strict=True)
    peak: float = max(low + (high - low) * (batch - few) / (more - few) for low, high in rows)
    return peak / 2**20


def _live_bytes(run: Callable[[int], None], held: list[Tensor], count: int) -> list[int]:
    collecting = gc.isenabled()
    gc.disable()  # so that what is freed, and when, depends on the run alone
    try:
        with _Live(held) as live:
            run(count)
    finally:
        if collecting:
            gc.enable()
    return list(live.after)
