"""Methods: each paper's search as a row of independent choices."""

from dataclasses import dataclass, field

from nas.arch_updates import Bilevel
from nas.early_stop import EigenvalueStop
from nas.samplers import Gumbel, Sampler, Softmax
from nas.schedule import Linear
from nas.searchers import Argmax, RandomGenotype, Searcher
from nas.supernets.cell import CellSupernetConfig


@dataclass(frozen=True)
class Method:
    """How weights are shared, gates drawn, architecture parameters learned, and a genotype read off."""

    supernet: CellSupernetConfig = field(default_factory=CellSupernetConfig)
    sampler: Sampler = Softmax()
    arch_update: Bilevel = Bilevel()
    searcher: Searcher = Argmax()
    stop: EigenvalueStop | None = None
    """When a search stage ends before its last epoch; None never. DARTS with one is DARTS-ES."""

    def __post_init__(self) -> None:
        if self.stop is not None and isinstance(self.sampler, Gumbel) and self.sampler.hard:
            raise ValueError(
                "stop needs a loss that is differentiable in the architecture parameters, and hard gates "
                "give none; set method.stop=None or method.sampler.hard=False"
            )
        if (
            isinstance(self.searcher, Argmax)
            and self.searcher.edges_by == "beta"
            and not self.supernet.edge_norm
        ):
            raise ValueError(
                "edges_by='beta' needs edge normalisation; "
                "set method.supernet.edge_norm=True or edges_by='alpha'"
            )


METHODS = {
    "darts_1st": Method(),
    "darts_2nd": Method(arch_update=Bilevel(order=2)),
    "pc_darts": Method(
        supernet=CellSupernetConfig(partial_channels=4, edge_norm=True), arch_update=Bilevel(lr=6e-4)
    ),
    "pc_darts_imagenet": Method(
        supernet=CellSupernetConfig(partial_channels=2, edge_norm=True),
        arch_update=Bilevel(lr=6e-3, clip=5.0),
    ),
    "p_darts": Method(arch_update=Bilevel(lr=6e-4, clip=5.0), searcher=Argmax(max_skip=2, ties="last")),
    "gdas": Method(
        sampler=Gumbel(hard=True, tau=Linear(10.0, 0.1)),
        arch_update=Bilevel(weights_first=True),
        searcher=Argmax(pairs=True),
    ),
    "random": Method(searcher=RandomGenotype()),
}
"""Methods by name; what else a paper prescribes (stages, retraining) is in `nas.papers`."""
