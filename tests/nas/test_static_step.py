"""A search step runs on the device alone: no value read by the host, no shape or path that depends on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nas.arch_updates import Bilevel
from nas.config import override
from nas.data import Data, DataConfig, load
from nas.genotype import Genotype
from nas.methods import METHODS
from nas.metrics import Average
from nas.papers import PAPERS, on_digits, tiny
from nas.schedule import Constant
from nas.search import SearchRun, Values, weight_step
from nas.state import Batch, SearchState
from nas.streams import generator
from nas.supernets.cell import Noise
from nas.trial import Trial
from tests.static import HostSyncError, no_host_sync

BATCH: Batch = (torch.randn(8, 1, 8, 8), torch.arange(8))


def state_of(trial: Trial) -> tuple[SearchState, Bilevel]:
    """A search that has taken its first steps: optimisers hold what they accumulate."""
    data = Data(load(DataConfig(limit=100)), DataConfig(limit=100), 0, torch.device("cpu"))
    run = SearchRun(trial.space, trial.method, trial.search, data, 0, torch.device("cpu"), no_price)
    assert run.state is not None
    stage, update = trial.search[0], trial.method.arch_update
    run.state.supernet.noise = Noise(
        generator(0, "noise"), stage.skip_dropout.at(1, 3), stage.drop_path.at(1, 3)
    )
    update.step(run.state, BATCH, BATCH)
    weight_step(run.state, BATCH, clip=5.0, average=Average())
    return run.state, update


def no_price(genotype: Genotype) -> Values:
    return {}


def small(name: str) -> Trial:
    return on_digits(tiny(PAPERS[name]))


def varied(**settings: object) -> Trial:
    trial = small("pc_darts")
    return replace(trial, search=(replace(trial.search[0], **settings),))


def varied_supernet(K: int) -> Trial:
    return override(small("pc_darts"), {"method.supernet.partial_channels": K})


class Operations(TorchDispatchMode):
    """Names of the operations dispatched, with the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(f"{func} {tuple(out.shape) if isinstance(out, Tensor) else ''}")
        return out


TRIALS = {
    "darts": small("darts_2nd"),
    "pc_darts": small("pc_darts"),
    "p_darts": small("p_darts"),
    "drop-path": varied(drop_path=Constant(0.2), skip_dropout=Constant(0.3)),
    "checkpointed": varied(checkpoint_cells=True),
    "exact": replace(
        small("darts_2nd"),
        method=replace(METHODS["darts_2nd"], arch_update=Bilevel(order=2, hessian="exact")),
    ),
}


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_a_step_reads_no_value_and_has_static_shapes(trial: Trial) -> None:
    state, update = state_of(trial)
    average = Average()
    with no_host_sync():
        update.step(state, BATCH, BATCH)
        weight_step(state, BATCH, clip=5.0, average=average)
    assert average.read()[0] > 0


@pytest.mark.parametrize("trial", [small("gdas")])
def test_hard_gates_are_chosen_by_one_read_of_the_host(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = state_of(trial)
    with pytest.raises(HostSyncError), no_host_sync():
        state.gates()
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    (gates,) = state.gates()
    assert len(reads) == 1
    monkeypatch.undo()
    # What is drawn decides what runs; the rest of the step needs no value.
    with no_host_sync():
        state.supernet(BATCH[0], gates).sum().backward()


@pytest.mark.parametrize("name", ["pc_darts", "gdas"])
def test_a_step_makes_no_tensor_of_host_values_but_one_for_a_fan_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each such tensor is a copy, for which the host waits unless it is pinned."""
    state, update = state_of(small(name))
    made = []
    tensor = torch.tensor

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        made.append(settings)
        return tensor(*arguments, **settings)

    monkeypatch.setattr(torch, "tensor", counted)
    update.step(state, BATCH, BATCH)
    weight_step(state, BATCH, clip=5.0)
    # Soft gates: always the same operations, so their index tensors are there. Hard ones: two draws, for two
    # types of cells of four fan-outs; on the host, then copied without waiting.
    assert len(made) <= (0 if name == "pc_darts" else 2 * 2 * 4)
    assert not any("device" in settings for settings in made)


@pytest.mark.parametrize(
    ("name", "update", "mix"),
    [
        ("pc_darts", Bilevel(order=2), "shuffle"),
        ("pc_darts", Bilevel(order=2, hessian="exact"), "shuffle"),
        ("gdas", Bilevel(), "shuffle"),
        ("gdas", Bilevel(), "mask"),
    ],
    ids=["order 2", "exact", "hard gates", "mask"],
)
def test_checkpointed_cells_change_nothing(name: str, update: Bilevel, mix: str) -> None:
    ends = []
    for checkpointed in (False, True):
        trial = small(name)
        supernet = replace(trial.method.supernet, channel_mix=mix, partial_channels=2)
        noisy = {"drop_path": Constant(0.2), "skip_dropout": Constant(0.3)}
        stage = replace(trial.search[0], checkpoint_cells=checkpointed, frozen_epochs=0, epochs=1, **noisy)
        method = replace(trial.method, supernet=supernet, arch_update=update)
        data = Data(load(DataConfig(limit=60)), DataConfig(limit=60), 0, torch.device("cpu"))
        run = SearchRun(trial.space, method, (stage, stage), data, 0, torch.device("cpu"), no_price)
        assert run.state is not None
        state = run.state
        run._train_epoch(state, stage)
        ends.append([*state.supernet.state_dict().values(), *state.arch.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gdas", {"search.0.compile": "default"}, "would compile anew for each draw"),
        ("darts_2nd", {"search.0.compile": "reduce-overhead"}, "order 2"),
        ("pc_darts", {"search.0.compile": "fast"}, "must be one of 'off'"),
    ],
)
def test_what_cannot_be_compiled_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(small(name), changes)


def test_steps_of_equal_shape_run_the_same_operations() -> None:
    """What a captured graph would replay is what a step would do."""
    state, update = state_of(small("pc_darts"))

    def operations() -> list[str]:
        with Operations() as seen:
            update.step(state, BATCH, BATCH)
            weight_step(state, BATCH, clip=5.0, average=Average())
        return seen.names

    first = operations()
    for parameter in state.arch.parameters():
        parameter.data.copy_(5 * torch.randn(parameter.shape, generator=generator(0, "other")))
    assert operations() == first


# PyTorch's tracer looks at the gradients of whatever comes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("K", [1, 4])
def test_cells_are_traced_whole_and_compute_the_same(K: int) -> None:
    """Without a break, so that one graph holds a cell; the compiler behind it is left out."""
    plain, _ = state_of(varied_supernet(K))
    traced, _ = state_of(varied_supernet(K))
    for cell in traced.supernet.cells:
        cell.compile(backend="eager", fullgraph=True, dynamic=False)
    for state in (plain, traced):
        weight_step(state, BATCH, clip=5.0)
    for one, other in zip(plain.supernet.parameters(), traced.supernet.parameters(), strict=True):
        assert torch.equal(one, other)
