"""How fast is a whole trial of the laptop study: search, evaluation, retraining and all that lies between?

The plain form is driven by the same loop: one module for each operation and edge in the search, NCHW and an
optimiser that goes parameter by parameter in the retraining. Both forms train on one thread, as trials of the
study do. What Ray adds is alike for both, and not in these numbers.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from benchmarks.measure import in_turns, parser, prepare, speedup, table
from benchmarks.plain import PlainSupernet
from benchmarks.retrain import draw_each, plain_cell
from nas.data import Data, load
from nas.metrics import Average
from nas.network import NetworkCell, Stem, retrain_loss
from nas.papers import PAPERS, laptop, on_digits, tiny
from nas.retrain import RetrainRun
from nas.spaces.cell import CellSpace
from nas.spaces.space import Choices
from nas.state import Batch
from nas.supernets.cell import CellSupernetConfig
from nas.trial import Trial, TrialRun


@dataclass(frozen=True)
class PlainSupernetConfig(CellSupernetConfig):
    """Settings of a cell supernet that is built in the plain form."""

    def build(  # type: ignore[override]  # the plain form answers to all that a search asks of a supernet
        self,
        space: CellSpace,
        choices: dict[str, Choices],
        *,
        cells: int,
        channels: int,
        classes: int,
        channels_in: int = 3,
        stem: Stem = "cifar",
        checkpoint_cells: bool = False,
    ) -> PlainSupernet:
        """The plain form of what `CellSupernetConfig.build` makes."""
        assert stem == "cifar"
        assert not checkpoint_cells
        like = super().build(
            space, choices, cells=cells, channels=channels, classes=classes, channels_in=channels_in
        )
        return PlainSupernet(like, cells, channels, classes, channels_in)


class PlainRetrainRun(RetrainRun):
    """A retraining as the public code steps it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.network = self.network.to(memory_format=torch.contiguous_format)
        group = self.optimizer.param_groups[0]
        settings = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
        self.optimizer = torch.optim.SGD(self.network.parameters(), foreach=False, **settings)

    def _train_step(self, batch: Batch, average: Average) -> Tensor:
        images, labels = batch
        self.optimizer.zero_grad()
        network = self.network
        assert network.auxiliary is None
        s0 = s1 = network.stem0(images)
        for cell in network.cells:
            assert isinstance(cell, NetworkCell)
            s0, s1 = s1, plain_cell(cell, s0, s1, draw_each(network, images))
        logits = network.head(s1.mean(dim=(2, 3)))
        loss = retrain_loss(logits, None, labels, auxiliary_weight=0.0, smoothing=self.stage.label_smoothing)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.stage.clip, foreach=False)
        self.optimizer.step()
        average.add(loss, logits, labels)
        return norm


class PlainTrialRun(TrialRun):
    """A trial whose retraining is that of the public code."""

    def _new_retrain(self) -> RetrainRun:
        assert self.search.genotype is not None
        return PlainRetrainRun(
            self.search.genotype, self.trial.retrain, self.data, self.trial.seeds.retrain, self.device
        )


def in_plain_form(trial: Trial) -> Trial:
    """`trial` with a supernet of one module for each operation and edge."""
    supernet = trial.method.supernet
    settings = {field.name: getattr(supernet, field.name) for field in fields(supernet)}
    return replace(trial, method=replace(trial.method, supernet=PlainSupernetConfig(**settings)))


def measure(trials: dict[str, Trial], rounds: int, device: torch.device) -> str:
    """Table of whole trials, plain and fast."""
    rows = []
    for name, trial in trials.items():
        data = Data(load(trial.data), trial.data, trial.seeds.split, device)

        def run(kind: type[TrialRun], trial: Trial, data: Data = data) -> None:
            run = kind(trial, data, device)
            while not run.done:
                run.step()

        times = in_turns(
            {
                "plain": lambda: run(PlainTrialRun, in_plain_form(trial)),  # noqa: B023  # called before the next
                "fast": lambda: run(TrialRun, trial),  # noqa: B023
            },
            rounds=rounds,
            warmup=0,
            device=device,
        )
        rows.append([name, f"{times['fast'].median:.1f}", speedup(times["plain"], times["fast"])])
        print(*rows[-1], flush=True)
    return table(["trial", "fast, s", "plain/fast"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    found = parser(__doc__, rounds=3)
    found.set_defaults(threads=1)
    found.add_argument("--K", type=int, nargs="+", default=[1, 2, 4, 8], help="partial channels")
    found.add_argument("--preset", choices=("laptop", "tiny"), default="laptop", help="size of the trials")
    chosen = found.parse_args(arguments)
    device = prepare(chosen)
    size = {"laptop": laptop, "tiny": tiny}[chosen.preset]
    base = on_digits(size(PAPERS["pc_darts"]))
    trials = {
        f"K={K}": replace(
            base, method=replace(base.method, supernet=replace(base.method.supernet, partial_channels=K))
        )
        for K in chosen.K
    }
    print(measure(trials, chosen.rounds, device))


if __name__ == "__main__":
    main()
