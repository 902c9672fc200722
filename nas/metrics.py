"""Metrics: what is measured of a search.

`METRICS` lists them with unit and direction; each becomes the column `search/<name>` of the records.
"""

import math
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.gates import Gate, Gates, detached, one_hot
from nas.genotype import Genotype
from nas.samplers import Arch
from nas.spaces.cell import CELL_TYPES
from nas.state import Batch, SearchState, without_statistics
from nas.streams import generator
from nas.supernets.cell import CellSupernet


@dataclass(frozen=True)
class Metric:
    """Description of a recorded number."""

    unit: str
    better: Literal["lower", "higher", "neither"]
    meaning: str
    compute: "Callable[[Probe], float | None] | None" = None
    """How to get it from a search after an epoch; None for what the loop itself measures."""


@dataclass(frozen=True)
class Probe:
    """A search after an epoch, as a metric sees it."""

    state: SearchState
    genotype: Genotype
    """What the search would give now."""
    batches: Callable[[], Iterable[Batch]]
    """Held-out batches from the start, for metrics that need the loss or its derivatives."""


def _entropy(arch: Arch, kind: str) -> float | None:
    """Mean over rows and cells of -sum p log p / log(options); None without such tables or choices."""
    values = []
    for name, p in arch.probabilities().items():
        if not name.endswith(kind):
            continue
        entropy = -torch.xlogy(p, p).sum(dim=-1)
        sizes = [len(options) for options in arch.choices[name].allowed]
        values += [h / math.log(n) for h, n in zip(entropy.tolist(), sizes, strict=True) if n > 1]
    return sum(values) / len(values) if values else None


def alpha_entropy(probe: Probe) -> float | None:
    """How undecided the operations are, from 0 to 1."""
    return _entropy(probe.state.arch, "/op")


def beta_entropy(probe: Probe) -> float | None:
    """How undecided the edges are, from 0 to 1; None without edge normalisation."""
    return _entropy(probe.state.arch, "/input")


def alpha_margin(probe: Probe) -> float | None:
    """Mean over edges of the gap between the two likeliest operations; None where no edge has two."""
    gaps = []
    arch = probe.state.arch
    for name, p in arch.probabilities().items():
        if name.endswith("/op") and p.shape[1] > 1:
            best, second = p.topk(2, dim=-1).values.unbind(dim=-1)
            allowed = arch.choices[name].allowed
            gaps += [
                gap
                for gap, options in zip((best - second).tolist(), allowed, strict=True)
                if len(options) > 1
            ]
    return sum(gaps) / len(gaps) if gaps else None


def _cell_count(cell: Literal["normal", "reduce"], what: str) -> Callable[[Probe], float]:
    return lambda probe: float(getattr(getattr(probe.genotype, cell), what))


HELD_OUT = (
    "supernet's {} on the validation part, or on the architecture half of a recipe that holds nothing out; "
    "batch norm takes the statistics of batches of 128"
)

METRICS: dict[str, Metric] = {
    "train_loss": Metric("nats", "lower", "supernet's loss on the weight half, mean over the epoch's steps"),
    "train_error": Metric("fraction", "lower", "supernet's error on the weight half, over the epoch's steps"),
    "valid_loss": Metric("nats", "lower", HELD_OUT.format("loss")),
    "valid_error": Metric("fraction", "lower", HELD_OUT.format("error")),
    "alpha_entropy": Metric("fraction", "neither", "normalised entropy of operations", alpha_entropy),
    "beta_entropy": Metric("fraction", "neither", "normalised entropy of inputs", beta_entropy),
    "alpha_margin": Metric("fraction", "neither", "gap between the two likeliest operations", alpha_margin),
    "skips": Metric("count", "neither", "skips in the normal cell", _cell_count("normal", "skips")),
    "skips_reduce": Metric("count", "neither", "skips in the reduction cell", _cell_count("reduce", "skips")),
    "depth_normal": Metric("edges", "neither", "longest path, normal cell", _cell_count("normal", "depth")),
    "depth_reduce": Metric(
        "edges", "neither", "longest path, reduction cell", _cell_count("reduce", "depth")
    ),
    "width_normal": Metric(
        "edges", "neither", "edges from inputs, normal cell", _cell_count("normal", "input_edges")
    ),
    "width_reduce": Metric(
        "edges", "neither", "edges from inputs, reduction cell", _cell_count("reduce", "input_edges")
    ),
    "params_m": Metric("millions", "neither", "weights of the derived network at retraining size"),
    "madds_m": Metric("millions", "neither", "multiply-adds of the derived network at retraining size"),
    "discretisation_gap": Metric(
        "fraction",
        "lower",
        "supernet's error with one-hot gates minus its error with its own, at the end of the search; none "
        "after going back to an earlier epoch, whose weights are gone",
    ),
    "discretisation_gap_seconds": Metric(
        "s", "lower", "wall time of measuring the discretisation gap; part of the epoch's seconds"
    ),
    "saved_mb": Metric(
        "MB", "lower", "what one training step of the supernet keeps for its backward pass; exact, by stage"
    ),
    "seconds": Metric(
        "s", "lower", "wall time of the epoch, evaluation included, what is measured by name left out"
    ),
    "peak_memory_mb": Metric(
        "MB", "lower", "peak memory of the stage so far: the device's, or the process's on a CPU"
    ),
}
"""What every search epoch records, in order; the discretisation gap comes once, at the end."""

FINAL: dict[str, Metric] = {
    "test_error": Metric("fraction", "lower", "error of the retrained network on the test part, read once"),
    "test_loss": Metric("nats", "lower", "loss of the retrained network on the test part"),
    "search_seconds": Metric("s", "lower", "wall time of the search without what is measured by name"),
    "retrain_seconds": Metric("s", "lower", "wall time of the retraining"),
    "lr": Metric("1", "neither", "learning rate of a retraining epoch"),
    "drop_path": Metric("fraction", "neither", "probability of dropping a path in a retraining epoch"),
}
"""What the retraining and the whole trial record, besides what a search does."""


def describe(probe: Probe) -> dict[str, float | None]:
    """All metrics that can be computed from a search as it stands after an epoch."""
    return {name: metric.compute(probe) for name, metric in METRICS.items() if metric.compute is not None}


@dataclass
class Average:
    """Loss and error summed on the device; read once, so that no step waits for it."""

    loss: Tensor | None = None
    wrong: Tensor | None = None
    count: int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch with mean `loss`."""
        loss, wrong = loss.detach() * len(labels), (logits.detach().argmax(dim=1) != labels).sum()
        self.loss = loss if self.loss is None else self.loss + loss
        self.wrong = wrong if self.wrong is None else self.wrong + wrong
        self.count += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and error.

        Raises:
            ValueError: nothing was counted.
        """
        if self.loss is None or self.wrong is None:
            raise ValueError("no batch to average over: the part of the data is empty")
        return float(self.loss) / self.count, float(self.wrong) / self.count


def supernet_quality(state: SearchState, gates: Gates, batches: Iterable[Batch]) -> tuple[float, float]:
    """Loss and error of the supernet under `gates`, with the batch's statistics in batch norm.

    Running averages mix the statistics of many architectures, so those of the batch are the fair ones for a
    supernet; the running ones are left alone.
    """
    average = Average()
    gates = detached(gates)
    # Nothing is dropped, but a random mask or the operation `noise` still draws.
    noise, seed = state.supernet.noise, state.draws.initial_seed()
    draws = generator(seed, "noise", device=state.supernet.head.weight.device)
    state.supernet.noise = type(noise)(draws)
    try:
        with torch.no_grad(), without_statistics(state.supernet):
            for images, labels in batches:
                logits = state.supernet(images, gates)
                average.add(F.cross_entropy(logits, labels), logits, labels)
    finally:
        state.supernet.noise = noise
    return average.read()


def one_hot_gates(state: SearchState, genotype: Genotype) -> Gates:
    """Gates that run just `genotype` inside the supernet."""
    space = state.supernet.space
    tables = {name: table for name, table in space.choices.items() if name.split("/")[0] in CELL_TYPES}
    return one_hot(tables, space.picks(genotype), like=state.supernet.head.weight)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, so that a reused process does not report the peak of an earlier trial."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not permitted: the peak is then that of the process's life
        return


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory since the last reset: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def saved_bytes_per_image(supernet: CellSupernet, gates: Gates, channels: int, image_size: int) -> float:
    """Bytes that a training-mode forward under `gates` keeps for the backward pass of the weights, per image.

    Exact, on any machine; what a batch keeps whatever its size, such as folded kernels, is left out.
    """
    weight = supernet.head.weight
    gates = detached(gates)
    few, more = (
        saved_activation_bytes(supernet, gates, weight.new_zeros(count, channels, image_size, image_size))
        for count in (2, 4)
    )
    return (more - few) / 2


def uniform_gates(supernet: CellSupernet) -> Gates:
    """Gates that give all options of a row the same weight, so that everything runs."""
    weight = supernet.head.weight
    return {
        name: Gate(
            weight.new_full((len(table.rows), len(table.options)), 1 / len(table.options)), table.allowed
        )
        for name, table in supernet.config.gated(supernet.choices).items()
    }


def saved_activation_bytes(supernet: CellSupernet, gates: Gates, images: Tensor) -> int:
    """Bytes that one training-mode forward keeps for the backward pass, of the gates too if these need it."""
    with without_statistics(supernet):
        return saved_bytes(lambda: supernet(images, gates), supernet.parameters())


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, besides the `weights`.

    Exact, on any machine. A storage that several operations keep counts once.
    """
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in storages.values())
