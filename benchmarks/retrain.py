"""What does one training step of the retrained network cost, ours against the public code's, piece by piece?

Plain is the form of the public code: NCHW, a ReLU in front of each operation, a draw and a product for each
operation that drop-path may drop, an optimiser and a clip that go parameter by parameter. The rows after it
add one thing each; the last is `nas.retrain.RetrainRun` as a trial runs it. All start from the same weights
and take the same batch; in double precision they agree to rounding (tests/benchmarks/test_retrain.py).

    python -m benchmarks.retrain
    python -m benchmarks.retrain --genotype DARTS_V2 --batch 32 --compile
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import (
    count,
    in_turns,
    parser,
    prepare,
    roofline,
    speedup,
    synchronise,
    table,
)
from nas.data import Arrays, Data, DataConfig
from nas.execution import Compile
from nas.metrics import Average, saved_bytes
from nas.network import Network, NetworkCell, retrain_loss
from nas.published import PUBLISHED
from nas.retrain import RetrainRun, RetrainStage
from nas.schedule import Constant
from nas.state import Batch

DROP_PATH = 0.2
OURS = "ours: + shared ReLUs"
HEAD = ("form", "s/step", "faster by", "operations", "saved MB", "times the roofline")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every form in turns and print them as one table."""
    options = _options().parse_args(arguments)
    device = prepare(options)
    peak = roofline(device)
    print(
        f"{peak}; {options.genotype}, {options.cells} cells, {options.channels} channels, "
        f"batch {options.batch}, {options.rounds} rounds"
    )
    settings = (options.genotype, options.cells, options.channels, options.batch, device)
    batch = made_up(options.batch, device)
    found = forms(new_run(*settings))
    compiled = None
    if options.compile:
        compiled = compile_now(new_run(*settings, setting="default"), batch)
        found["ours, cells compiled"] = compiled
    timings = in_turns(
        {name: partial(form.step, batch) for name, form in found.items()},
        rounds=options.rounds,
        device=device,
    )
    rows = []
    for name, form in found.items():
        seconds = timings[name].median
        row = [name, f"{seconds:.3f}", str(speedup(timings["plain"], timings[name]))]
        if form is not compiled:  # what is counted are PyTorch's operations, not those of compiled code
            counts = count(partial(form.step, batch), peak)
            row += [
                str(counts.ops),
                f"{form.saved_bytes(batch) / 2**20:.0f}",
                f"{seconds / counts.bound:.2f}",
            ]
        rows.append(row + [""] * (len(HEAD) - len(row)))
    print(table(HEAD, rows))


def _options() -> argparse.ArgumentParser:
    found = parser(__doc__, rounds=7)
    found.add_argument("--genotype", default="PC_DARTS_cifar", choices=sorted(PUBLISHED), metavar="NAME")
    found.add_argument("--batch", type=int, default=16, help="images in a batch (default 16)")
    found.add_argument("--cells", type=int, default=20, help="cells (default 20)")
    found.add_argument("--channels", type=int, default=36, help="channels of the first cells (default 36)")
    found.add_argument(
        "--compile", action="store_true", help="measure ours compiled, too: minutes to warm up"
    )
    return found


# --- what is trained ----------------------------------------------------------------------------------------


def new_run(
    genotype: str, cells: int, channels: int, batch: int, device: torch.device, setting: Compile = "off"
) -> RetrainRun:
    """A retraining on made-up images of CIFAR's size, with the auxiliary head and drop-path on."""
    pixels = np.zeros((20, 3, 32, 32), np.uint8)
    labels = np.arange(20) % 10
    names = tuple(map(str, range(10)))
    arrays = Arrays(pixels, labels, pixels, labels, names, "made", "", (0.5,) * 3, (0.25,) * 3)
    stage = RetrainStage(
        cells=cells, channels=channels, batch_size=batch, drop_path=Constant(DROP_PATH), compile=setting
    )
    run = RetrainRun(PUBLISHED[genotype], stage, Data(arrays, DataConfig(), 0, device), 0, device)
    run.network.drop_path = DROP_PATH
    run.network.generator = torch.Generator(device).manual_seed(0)
    run.network.train()
    return run


def made_up(size: int, device: torch.device) -> Batch:
    """A batch of noise, the same at each call."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=draws, dtype=torch.get_default_dtype())
    return images.to(device), torch.randint(10, (size,), generator=draws).to(device)


@dataclass(frozen=True)
class Form:
    """A network and one way to take a training step with it."""

    network: Network
    step: Callable[[Batch], object]

    def saved_bytes(self, batch: Batch) -> int:
        """Bytes that a step keeps for its backward pass, weights aside."""
        return saved_bytes(lambda: self.step(batch), self.network.parameters())


def forms(run: RetrainRun) -> dict[str, Form]:
    """The steps that are compared, from the public code's to that of `run`, each on its own weights."""
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    plain = [
        PlainRun(run, nchw),
        PlainRun(run, nhwc),
        PlainRun(run, nhwc, update_at_once=True),
        PlainRun(run, nhwc, update_at_once=True, draw_at_once=True),
    ]
    names = ("plain", "+ channels last", "+ update at once", "+ drop-path drawn at once")
    found = {name: Form(each.network, each.step) for name, each in zip(names, plain, strict=True)}
    return {**found, OURS: Form(run.network, lambda batch: run._train_step(batch, Average()))}


def compile_now(run: RetrainRun, batch: Batch) -> Form:
    """The step of a run whose cells are compiled, after a first one that compiles them."""
    started = time.perf_counter()
    run._train_step(batch, Average())
    synchronise(run.device)
    print(f"compiling took {time.perf_counter() - started:.0f} s")
    return Form(run.network, lambda batch: run._train_step(batch, Average()))


# --- the public code's form ---------------------------------------------------------------------------------


class PlainRun:
    """The training step in the form of the public code, on a copy of the weights of `run`."""

    def __init__(
        self,
        run: RetrainRun,
        memory_format: torch.memory_format,
        *,
        update_at_once: bool = False,
        draw_at_once: bool = False,
    ) -> None:
        self.stage, self.memory_format, self.draw_at_once = run.stage, memory_format, draw_at_once
        generator, run.network.generator = run.network.generator, None  # which cannot be copied
        self.network = copy.deepcopy(run.network).to(memory_format=memory_format)
        run.network.generator = generator
        self.network.generator = torch.Generator(run.device).manual_seed(0)
        for layer in self.network.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.foreach = None if update_at_once else False
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=run.optimizer.param_groups[0]["lr"],
            momentum=run.stage.momentum,
            weight_decay=run.stage.weight_decay,
            foreach=self.foreach,
            fused=update_at_once,
        )

    def step(self, batch: Batch) -> None:
        """One update of the weights."""
        images, labels = batch
        self.optimizer.zero_grad()
        x = images.to(memory_format=self.memory_format)
        logits, auxiliary = plain_forward(self.network, x, draw_at_once=self.draw_at_once)
        weight = self.stage.auxiliary_weight
        loss = retrain_loss(logits, auxiliary, labels, auxiliary_weight=weight, smoothing=0.0)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.clip, foreach=self.foreach)
        self.optimizer.step()


def plain_forward(network: Network, x: Tensor, *, draw_at_once: bool) -> tuple[Tensor, Tensor | None]:
    """`network(x)` in training, of the CIFAR stem, with every operation on its own."""
    s0 = s1 = network.stem0(x)
    auxiliary = None
    drawn: Iterable[Tensor | None] = (
        network._keep(x, x.dtype) if draw_at_once else [None] * len(network.cells)
    )
    for position, (cell, keep) in enumerate(zip(network.cells, drawn, strict=True)):
        assert isinstance(cell, NetworkCell)
        factors = draw_each(network, x) if keep is None else iter(keep)
        s0, s1 = s1, plain_cell(cell, s0, s1, factors)
        if network.auxiliary is not None and position == network.auxiliary_position:
            auxiliary = network.auxiliary(s1)
    return network.head(F.adaptive_avg_pool2d(s1, 1).flatten(1)), auxiliary


def draw_each(network: Network, x: Tensor) -> Iterator[Tensor]:
    """Factors of drop-path for one operation after the other, each drawn when asked for."""
    size, kept = (len(x), 1, 1, 1), 1 - network.drop_path
    while True:
        draws = torch.rand(size, generator=network.generator, dtype=x.dtype, device=x.device)
        yield (draws >= network.drop_path).to(x.dtype) / kept


def plain_cell(cell: NetworkCell, s0: Tensor, s1: Tensor, factors: Iterator[Tensor]) -> Tensor:
    """Outputs of the two cells before -> that of `cell`."""
    states = [cell.in0(s0), cell.in1(s1)]
    picks = iter(cell.picks)
    for inputs in cell.cell.nodes:
        terms = []
        for _, source in inputs:
            op = next(picks)
            y = op(states[source])
            terms.append(y if isinstance(op, nn.Identity) else y * next(factors))
        states.append(sum(terms[1:], start=terms[0]))
    return torch.cat([states[node] for node in cell.cell.concat], dim=1)


if __name__ == "__main__":
    main()
