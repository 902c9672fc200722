"""The retraining loop: train the network of a genotype from scratch."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.config import ABOVE_ZERO, check_range
from nas.data import Augment, Data
from nas.execution import Compile, compile_cells, uncompiled
from nas.genotype import Genotype
from nas.metrics import Average, peak_memory_mb, reset_peak_memory
from nas.network import Network, Stem, retrain_loss
from nas.ops import Noise
from nas.schedule import Cosine, Ramp, Schedule, check_probability
from nas.search import Values
from nas.state import Batch, load_optimizer
from nas.streams import generator, seeded


@dataclass(frozen=True)
class RetrainStage:
    """The training of a derived network; the defaults are DARTS's CIFAR recipe."""

    epochs: int = 600
    """None trained at all, 0, leaves a trial at what its search found."""
    cells: int = 20
    channels: int = 36
    batch_size: int = 96
    lr: Schedule = Cosine(0.025)
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 3e-4
    clip: float = 5.0
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss; 0 leaves the head out."""
    auxiliary_norm: bool = True
    """Whether the auxiliary head has its second batch norm."""
    drop_path: Schedule = Ramp(0.2)
    label_smoothing: float = 0.0
    augment: Augment = field(default_factory=lambda: Augment(pad=4, flip=True, cutout=16))
    stem: Stem = "cifar"
    compile: Compile = "off"
    """Whether the cells are compiled, for full training batches; everything else runs as written."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of training where it may be low; weights, losses and evaluation stay in full precision."""
    accumulate: int = 1
    """Parts in which a batch goes through the network, for its memory.

    Loss, gradient, clipping and update are those of the whole batch, but batch norm sees its parts."""
    checkpoint_cells: bool = False
    """Whether the backward pass computes cells again instead of keeping their activations.

    For memory; the result is the same."""

    def __post_init__(self) -> None:
        inf = math.inf
        check_range(
            self,
            epochs=(0, inf, "600 is usual, 0 retrains nothing"),
            cells=(1, inf, "20 is usual"),
            channels=(1, inf, "36 is usual"),
            batch_size=(1, inf, "96 is usual"),
            clip=(ABOVE_ZERO, inf, "5 is usual, 1e9 clips nothing"),
            weight_decay=(0, inf, "0 decays nothing"),
            momentum=(0, 1, "0.9 is usual"),
            auxiliary_weight=(0, inf, "0 leaves the auxiliary head out"),
            label_smoothing=(0, 1, "0 smooths nothing"),
            accumulate=(1, inf, "1 takes a batch as a whole"),
        )
        check_probability(self, "drop_path", self.epochs)
        for name, hint in (("compile", Compile), ("amp", Literal["off", "bf16", "fp16"])):
            if getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(hint))}")
        parts = [n for n in range(1, self.batch_size // 2 + 1) if self.batch_size % n == 0]
        if self.accumulate > 1 and self.accumulate not in parts:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size} into equal parts "
                f"of 2 images or more; use one of {', '.join(map(str, parts or [1]))}"
            )
        if self.accumulate > 1 and self.compile == "reduce-overhead":
            raise ValueError(
                f"accumulate={self.accumulate} needs gradients to last from part to part, and "
                "compile='reduce-overhead' overwrites them; use compile='default' or accumulate=1"
            )


class RetrainRun:
    """A retraining in progress: one `step` is one epoch; `quality("test")` is for once, after the last."""

    def __init__(
        self, genotype: Genotype, stage: RetrainStage, data: Data, seed: int, device: torch.device
    ) -> None:
        check_device(stage, device)
        self.genotype, self.stage, self.data = genotype, stage, data
        self.seed, self.device = seed, device
        self.epoch = 0
        reset_peak_memory(device)
        with seeded(seed, "init", "retrain"):
            network = Network(
                genotype,
                channels=stage.channels,
                cells=stage.cells,
                classes=data.classes,
                channels_in=data.channels,
                stem=stage.stem,
                auxiliary=stage.auxiliary_weight > 0,
                auxiliary_norm=stage.auxiliary_norm,
                checkpoint_cells=stage.checkpoint_cells,
            )
        # Channels last: measured on a CPU, where nearly all of the gain over the public code is this.
        self.network = network.to(device).to(memory_format=torch.channels_last)
        compile_cells(self.network.cells, stage.compile)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=stage.lr.at(0, stage.epochs),
            momentum=stage.momentum,
            nesterov=stage.nesterov,
            weight_decay=stage.weight_decay,
            fused=True,  # and so the scaler can skip a step without asking the device first
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=stage.amp == "fp16")
        if self.scaler.is_enabled():
            # A fused first step that the scaler skips would leave the momentum it made without values.
            for parameter in self.network.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @property
    def done(self) -> bool:
        """Whether the last epoch has been trained."""
        return self.epoch >= self.stage.epochs

    def step(self) -> Values:
        """Train for one epoch; returns its metrics.

        Raises:
            FloatingPointError: the training loss, a gradient or the validation loss is not finite. In fp16,
                whose loss scale is found by trying, gradients may overflow until it falls below 1.
        """
        started = time.perf_counter()
        stage = self.stage
        lr, drop = stage.lr.at(self.epoch, stage.epochs), stage.drop_path.at(self.epoch, stage.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.drop_path = drop
        self.network.generator = generator(self.seed, "drop_path", self.epoch, device=self.device)
        for module in self.network.modules():
            if isinstance(module, Noise):  # the operation of space S4, which draws in evaluation too
                module.generator = self.network.generator
        self.network.train()
        average = Average()
        overflows = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in self._train_batches():
            overflows += ~self._train_step(batch, average).isfinite()
        train_loss, train_error = average.read()
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"retraining diverged: training loss {train_loss} in epoch {self.epoch}")
        if stage.amp == "fp16":
            diverged = self.scaler.get_scale() < 1
        else:
            diverged = bool(overflows)
        if diverged:
            raise FloatingPointError(
                f"retraining diverged: gradients of {int(overflows)} steps not finite in epoch {self.epoch}"
            )
        valid_loss, valid_error = self.quality("valid") if self.data.size("valid") else (None, None)
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise FloatingPointError(
                f"retraining diverged: validation loss {valid_loss} in epoch {self.epoch}"
            )
        self.epoch += 1
        return {
            "train_loss": train_loss,
            "train_error": train_error,
            "valid_loss": valid_loss,
            "valid_error": valid_error,
            "lr": lr,
            "drop_path": drop,
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def _train_step(self, batch: Batch, average: Average) -> Tensor:
        """One update of the weights; returns the norm of the gradient, on the device."""
        stage = self.stage
        self.optimizer.zero_grad()
        for images, labels in micro_batches(batch, stage.batch_size // stage.accumulate):
            share = len(images) / len(batch[0])
            odd = len(images) * stage.accumulate != stage.batch_size
            # The backward pass belongs inside: it runs checkpointed cells again.
            with uncompiled(stage.compile) if odd else nullcontext():
                with self._autocast():
                    logits, auxiliary = self.network(images.to(memory_format=torch.channels_last))
                    loss = retrain_loss(
                        logits,
                        auxiliary,
                        labels,
                        auxiliary_weight=stage.auxiliary_weight,
                        smoothing=stage.label_smoothing,
                    )
                torch.autograd.backward(self.scaler.scale(loss * share))
            average.add(loss, logits, labels)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), stage.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _autocast(self) -> torch.autocast:
        dtype = torch.bfloat16 if self.stage.amp == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype, enabled=self.stage.amp != "off")

    def _train_batches(self) -> Iterator[Batch]:
        return self.data.batches(
            "train",
            self.stage.batch_size,
            order=generator(self.seed, "order", "retrain", self.epoch),
            augment=self.stage.augment,
            draws=generator(self.seed, "augment", "retrain", self.epoch),
        )

    def quality(self, part: Literal["valid", "test"]) -> tuple[float, float]:
        """Loss and error of the network on a part of the data, in evaluation mode."""
        average = Average()
        self.network.eval()
        with torch.no_grad(), uncompiled(self.stage.compile):
            for images, labels in self.data.batches(part, self.stage.batch_size, order=None):
                logits, _ = self.network(images.to(memory_format=torch.channels_last))
                average.add(F.cross_entropy(logits, labels), logits, labels)
        return average.read()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, in plain containers and tensors."""
        return {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.epoch = held["epoch"]
        self.network.load_state_dict(held["network"])
        load_optimizer(self.optimizer, held["optimizer"])
        self.scaler.load_state_dict(held["scaler"])


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Parts of `batch` of at most `size` images and alike in size, of 2 images or more: batch norm needs two.

    An odd one may therefore have one image more than `size`.
    """
    images, labels = batch
    count = max(1, min(-(-len(images) // size), len(images) // 2))
    yield from zip(images.tensor_split(count), labels.tensor_split(count), strict=True)


def check_device(stage: RetrainStage, device: torch.device) -> None:
    """Refuse a precision that the device does not have, before anything is built.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if stage.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; on a CPU use amp='bf16' or amp='off'")


def check_retrain(stage: RetrainStage, image_size: int) -> None:
    """Refuse a retraining that images of this size do not fit, before anything is built.

    Raises:
        ValueError: the auxiliary head, whose pool and convolutions are made for one map, finds another.
    """
    side = -(-image_size // (4 if stage.stem == "cifar" else 32))
    fitting = (8, 10) if stage.stem == "cifar" else (7, 8)
    if stage.auxiliary_weight > 0 and not fitting[0] <= side <= fitting[1]:
        raise ValueError(
            f"the auxiliary head of the {stage.stem} recipe does not fit images of {image_size} pixels "
            f"(its map is {side}, it takes {fitting[0]} to {fitting[1]}); "
            "add --set retrain.auxiliary_weight=0"
        )
