"""Packing: how many trials run side by side, and on what share of the machine, before any of them starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.study import Planned, Resources
from nas.footprint import DataShape, Footprint, footprint
from nas.trial import Trial

GPU_SHARE = 0.9
"""Part of a GPU's memory that the tensors of its trials may fill; the rest is room for the allocator."""
GPU_PROCESS_MB = 1024.0
"""Memory of a GPU that libraries take in every process; not measured."""
TRIALS_PER_GPU = 4
"""Most trials that share a GPU unasked: small ones soon wait for one another."""
GPU_HOST_MB = 4096.0
"""Memory of the machine that a trial on a GPU asks for; not measured."""


@dataclass(frozen=True)
class Share:
    """What one trial is given."""

    cpus: float
    gpus: float
    memory_mb: int

    @property
    def threads(self) -> int:
        """PyTorch threads of the trial."""
        return max(1, int(self.cpus))

    @property
    def gpu_text(self) -> str:
        """The share of a GPU in words."""
        whole = f"{self.gpus:g} GPUs" if self.gpus > 1 else "a GPU"
        return whole if self.gpus >= 1 else f"{self.gpus:.2g} of a GPU"

    @property
    def bundle(self) -> dict[str, float]:
        """The share in Ray's words; Ray runs no more trials on a node than its own memory allows."""
        given = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_mb * 2**20}
        return {name: amount for name, amount in given.items() if amount}


@dataclass(frozen=True)
class Node:
    """What one machine has for trials."""

    cpus: float
    gpus: float
    memory_mb: float
    """What Ray hands out."""
    free_mb: float
    """That, and what Ray keeps for shared data."""

    def fits(self, share: Share) -> int:
        """How many trials of this share run here at once."""
        ratios = [self.cpus / share.cpus, self.memory_mb / share.memory_mb]
        if share.gpus:
            ratios.append(self.gpus / share.gpus)
        return int(min(ratios) + 1e-6)  # 1 / (1/3) is a hair below 3


@dataclass(frozen=True)
class Machine:
    """Where a study runs: this machine, or a cluster that may grow."""

    nodes: tuple[Node, ...]
    gpu_memory_mb: float | None = None
    """Memory of a GPU; None if there is none or it is not known."""
    grows: bool = False

    @property
    def name(self) -> str:
        """What to call it."""
        return "the cluster's largest node" if self.grows else "this machine"

    def largest(self, gpus: float) -> Node | None:
        """The node with most memory among those that have as many GPUs."""
        able = [node for node in self.nodes if node.cpus and node.gpus >= gpus]
        return max(able, key=lambda node: node.memory_mb, default=None)

    def at_once(self, share: Share) -> int:
        """How many trials of this share run at once."""
        return sum(node.fits(share) for node in self.nodes)


@dataclass(frozen=True)
class Packing:
    """The share of every trial of a study: its own, for memory follows from the configuration."""

    resources: Resources
    machine: Machine
    shape: DataShape
    data_mb: float = 0.0
    """Size of the images and labels that a trial holds."""

    def share(self, trial: Trial) -> Share:
        """What `trial` is given."""
        found = footprint(trial, self.shape)
        # One thread unless the user says otherwise, even where cores are left over: two trials side by side
        # do more than one on two threads, and sums round differently with the number of threads, so that
        # results would depend on how many trials there are.
        cpus = 1.0 if self.resources.cpus_per_trial is None else self.resources.cpus_per_trial
        gpus = self.resources.gpus_per_trial
        if gpus is None:
            gpus = self._gpus(found)
        needed = GPU_HOST_MB if gpus else found.process_mb
        node = self.machine.largest(gpus)
        # More than any node has would never start.
        return Share(cpus, gpus, min(_rounded(needed), int(node.memory_mb) if node else _rounded(needed)))

    def largest(self, trials: Sequence[Trial]) -> Share:
        """Share with which any of `trials` runs."""
        shares = [self.share(trial) for trial in trials]
        return Share(
            shares[0].cpus, max(share.gpus for share in shares), max(share.memory_mb for share in shares)
        )

    def _gpus(self, found: Footprint) -> float:
        """One over the number of trials that fit on a GPU; 0 where there is none."""
        if not any(node.gpus for node in self.machine.nodes):
            return 0.0
        if self.machine.gpu_memory_mb is None:
            return 1.0
        fitting = int(GPU_SHARE * self.machine.gpu_memory_mb / self._on_gpu(found))
        return 1 / min(TRIALS_PER_GPU, max(1, fitting))

    def _on_gpu(self, found: Footprint) -> float:
        # Every process has its own copy of the data there; on CPUs all read one.
        return found.tensors_mb + self.data_mb + GPU_PROCESS_MB

    def at_once(self, trials: Sequence[Trial], count: int) -> tuple[int, int]:
        """How many of `count` trials like `trials` run at once: fewest and most."""
        fitting = [self.machine.at_once(self.share(trial)) for trial in trials]
        limit = min(count, self.resources.max_concurrent or count)
        return max(1, min(*fitting, limit)), max(1, min(max(fitting), limit))

    def slots(self, trials: Sequence[Trial]) -> int:
        """How many trials to have under way: what runs at once, on a cluster, which may grow, at least 8."""
        asked = self.resources.max_concurrent
        return asked or max(8 if self.machine.grows else 1, self.machine.at_once(self.largest(trials)))

    def describe(self, planned: Sequence[Planned], count: int) -> list[str]:
        """The packing of `count` trials like those planned in a line, and warnings.

        Raises:
            ValueError: a trial that needs more memory than there is, beyond doubt.
        """
        largest = max(planned, key=lambda p: self._needs_mb(p.trial))
        share = self.share(largest.trial)
        least, most = self.at_once([p.trial for p in planned], count)
        number = f"{least}" if least == most else f"{least} to {most}"
        on = f" and {share.gpu_text} each" if share.gpus else " each"
        room = self._room_mb(share)
        at_once = f"{number} trial{'s' if most > 1 else ''} at once"
        if self.machine.grows and not self.machine.at_once(share):
            at_once = "trials start when a node joins that has room for one"
        line = (
            f"packing: {at_once}, {share.threads} thread{'s' if share.threads > 1 else ''}{on}; "
            f"a trial needs up to about {_gb(self._needs_mb(largest.trial))} ({largest.name})"
        )
        line += f", {self.machine.name} has {_gb(room)} for them" if room is not None else ""
        return [line, *self._warnings(largest, share, room)]

    def _needs_mb(self, trial: Trial) -> float:
        """Memory that decides how many run at once: of the GPU if there is one."""
        found = footprint(trial, self.shape)
        return self._on_gpu(found) if self.share(trial).gpus else found.process_mb

    def _room_mb(self, share: Share) -> float | None:
        if share.gpus:
            whole = self.machine.gpu_memory_mb
            return whole and whole * min(1.0, share.gpus)
        node = self.machine.largest(share.gpus)
        return node.memory_mb if node else None

    def _warnings(self, largest: Planned, share: Share, room: float | None) -> list[str]:
        needed = self._needs_mb(largest.trial)
        if room is None or needed <= room:
            return []
        certain = footprint(largest.trial, self.shape).certain_mb
        node = self.machine.largest(share.gpus)
        free = room if share.gpus or node is None else node.free_mb
        owner = share.gpu_text if share.gpus else self.machine.name
        in_search = "lower search.*.batch_size, raise K, or set search.*.checkpoint_cells=True"
        way_out = (
            f"{in_search}; in retraining, lower retrain.batch_size, or set retrain.checkpoint_cells=True or "
            "retrain.accumulate=2 (see --set)"
        )
        if certain > free and not self.machine.grows:
            raise ValueError(
                f"{largest.name}: its search holds {_gb(certain)} of tensors at once, and "
                f"{owner} has {_gb(free)}; {in_search} (see --set)"
            )
        return [
            f"warning: {largest.name} may need {_gb(needed)}, more than the {_gb(room)} there are; "
            f"it may end for lack of memory: {way_out}"
        ]


def _rounded(memory_mb: float) -> int:
    """`memory_mb`, up by a quarter at most: trials of equal shares can follow one another in a process."""
    step: int = 2 ** max(0, math.floor(math.log2(memory_mb)) - 2)
    return math.ceil(memory_mb / step) * step


def _gb(memory_mb: float) -> str:
    return f"{memory_mb / 2**10:.1f} GB"
