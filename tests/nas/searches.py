"""A small search in the state after an epoch, for tests of what is measured of it."""

import random
from collections.abc import Iterator
from itertools import islice

import torch

from nas.gates import Gates
from nas.measures import Part, Snapshot, Values, View
from nas.samplers import Progress, Sampler, Softmax, init_arch
from nas.searchers import Argmax
from nas.spaces.cell import CellSpace
from nas.spaces.space import Choices
from nas.state import Batch, SearchState
from nas.streams import generator, seeded
from nas.supernets.cell import CellSupernetConfig, Noise

SMALL = CellSpace(name="small", nodes=2, ops=("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3"))


def state_of(
    space: CellSpace = SMALL,
    *,
    edge_norm: bool = False,
    sampler: Sampler | None = None,
    choices: dict[str, Choices] | None = None,
) -> SearchState:
    """A search whose architecture parameters are far from equal, in training mode, with noise set."""
    config, choices = CellSupernetConfig(edge_norm=edge_norm), choices or space.choices
    with seeded(0, "init"):
        supernet = config.build(space, choices, cells=3, channels=4, classes=3, channels_in=1)
    dtype = torch.get_default_dtype()
    arch = init_arch(config.gated(choices), generator(0, "alpha"), torch.device("cpu"), dtype)
    with torch.no_grad():
        for logits in arch.parameters():
            logits.mul_(1000)
    supernet.to(dtype).train()
    supernet.noise = Noise(generator(0, "noise"), skip_dropout=0.3, drop_path=0.3)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    return SearchState(
        supernet, arch, sampler or Softmax(), optimizer, None, Progress(0, 1), generator(0, "gates")
    )


def images(part: str, count: int) -> Batch:
    """Noise to classify into three classes."""
    drawn = torch.randn(count, 1, 8, 8, generator=generator(0, part), dtype=torch.float64)
    return drawn.to(torch.get_default_dtype()), torch.arange(count) % 3


def view_of(
    space: CellSpace = SMALL,
    *,
    edge_norm: bool = False,
    sampler: Sampler | None = None,
    choices: dict[str, Choices] | None = None,
    metrics: Values | None = None,
    history: dict[int, Snapshot] | None = None,
    count: int = 24,
) -> View:
    """View of `state_of`, with `count` images in each part."""
    state = state_of(space, edge_norm=edge_norm, sampler=sampler, choices=choices)
    probabilities = {name: p.detach() for name, p in state.arch.probabilities().items()}
    genotype = Argmax().derive(space, choices or space.choices, probabilities, random.Random(0))

    def gates() -> Gates:
        return state.sampler.sample(state.arch, state.progress, generator(0, "gates", "evaluation"))[0]

    def batches(part: Part, size: int, most: int) -> Iterator[Batch]:
        xs, ys = images(part, count)
        yield from islice(zip(xs.split(size), ys.split(size), strict=True), most)

    return View(state, genotype, metrics or {}, gates, batches, 0, history or {})
