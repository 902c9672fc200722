"""Bilevel updates: first and second order, and what an architecture step may change."""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nas.arch_updates import Bilevel
from nas.gates import Gate, Gates
from nas.samplers import Gumbel, Progress, Sampler, Softmax, init_arch
from nas.schedule import Constant
from nas.search import weight_step
from nas.spaces.cell import CellSpace
from nas.state import Batch, SearchState, without_statistics
from nas.streams import generator, seeded
from nas.supernets.cell import CellSupernetConfig
from tests.golden import Tensors, assert_close

pytestmark = pytest.mark.usefixtures("float64")

CLASSES = 4
HARD = Gumbel(hard=True, tau=Constant(1.0))


@dataclass(frozen=True)
class Setting:
    """A small search: which supernet and sampler, and whether the weights have gained momentum before."""

    supernet: CellSupernetConfig = CellSupernetConfig()
    sampler: Sampler = Softmax()
    moving: bool = True


SETTINGS = {
    "darts": Setting(),
    "first step": Setting(moving=False),
    "pc_darts": Setting(CellSupernetConfig(partial_channels=2, edge_norm=True)),
    "gdas": Setting(sampler=HARD),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def batch(name: str) -> Batch:
    images = torch.randn(4, 3, 8, 8, generator=generator(0, "images", name), dtype=torch.float64)
    return images, torch.arange(4) % CLASSES


TRAIN, VALID = batch("train"), batch("valid")


def begin(setting: Setting, update: Bilevel) -> SearchState:
    """State of a search that has learned a little; the same whatever the update."""
    space = CellSpace(nodes=2)
    with seeded(0, "weights"):
        supernet = setting.supernet.build(space, space.choices, cells=3, channels=4, classes=CLASSES)
    arch = init_arch(setting.supernet.gated(space.choices), generator(0, "alpha"), torch.device("cpu"))
    with torch.no_grad():
        for logits in arch.parameters():
            logits.mul_(1000)
    state = SearchState(
        supernet=supernet,
        arch=arch,
        sampler=setting.sampler,
        weight_optimizer=torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4),
        arch_optimizer=update.optimizer(arch),
        progress=Progress(0, 1),
        draws=generator(0, "gates"),
    )
    if setting.moving:
        weight_step(state, batch("before"), clip=5.0)
    return state


def snapshot(state: SearchState) -> dict[str, Any]:
    """Everything that a step could change, copied."""
    assert state.arch_optimizer is not None
    return copy.deepcopy(
        {
            "weights": {name: p.detach() for name, p in state.supernet.named_parameters()},
            "statistics": dict(state.supernet.named_buffers()),
            "logits": {name: logits.detach() for name, logits in state.arch.logits.items()},
            "momentum": momentum(state),
            "gradients": {
                name: p.grad for name, p in state.supernet.named_parameters() if p.grad is not None
            },
        }
    )


def momentum(state: SearchState) -> Tensors:
    held = state.weight_optimizer.state
    return {name: held[p]["momentum_buffer"] for name, p in state.supernet.named_parameters() if held.get(p)}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logit_gradients(state: SearchState, update: Bilevel, gates: Gates | None = None) -> Tensors:
    """Gradient of the update in every logit, before clipping and the optimiser."""
    gates = gates or state.gates()[0]
    _, gradients = update.gate_gradients(state, gates, TRAIN, VALID)
    outputs = [gates[name].weights for name in gradients]
    found = torch.autograd.grad(outputs, state.arch.parameters(), list(gradients.values()), retain_graph=True)
    return dict(zip(state.arch.logits, found, strict=True))


@dataclass
class Passes:
    """The forwards of a supernet: the weights and gates of each, and whether gradients of weights follow."""

    weights: list[Tensors]
    gates: list[Gates]
    differentiated: list[bool]


def watch(state: SearchState) -> Passes:
    passes = Passes([], [], [])

    def keep(module: nn.Module, args: tuple[Tensor, Gates]) -> None:
        passes.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
        passes.differentiated.append(any(p.requires_grad for p in module.parameters()))
        passes.gates.append(
            {name: Gate(gate.weights.detach().clone(), gate.active) for name, gate in args[1].items()}
        )

    state.supernet.register_forward_pre_hook(keep)
    return passes


# --- second order -------------------------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize("hessian", ["finite_difference", "exact"])
def test_second_order_without_looking_ahead_is_first_order_bit_for_bit(
    setting: Setting, hessian: Literal["finite_difference", "exact"]
) -> None:
    results = []
    for update in (Bilevel(order=1), Bilevel(order=2, hessian=hessian, xi=0.0)):
        state = begin(setting, update)
        loss = update.step(state, TRAIN, VALID)
        results.append((loss, snapshot(state)))
    (first_loss, first), (second_loss, second) = results
    assert torch.equal(first_loss, second_loss)
    assert all(equal(first[part], second[part]) for part in first)


@each_setting
def test_exact_product_is_the_derivative_of_the_unrolled_loss(setting: Setting) -> None:
    update = Bilevel(order=2, hessian="exact", xi=0.1)
    state = begin(setting, update)
    (gates,) = state.gates()
    ours = logit_gradients(state, update, gates)

    # The unrolled loss as one expression in the logits: w' = w - xi (d L_train / d w + decay w + momentum).
    weights = dict(state.supernet.named_parameters())
    images, labels = TRAIN
    slope = torch.autograd.grad(
        F.cross_entropy(state.supernet(images, gates), labels),
        list(weights.values()),
        create_graph=True,
        allow_unused=True,  # what hard gates leave out
        materialize_grads=True,
    )
    buffers = momentum(state)
    ahead = {
        name: weight - 0.1 * (gradient + 3e-4 * weight + 0.9 * buffers.get(name, torch.zeros(())))
        for (name, weight), gradient in zip(weights.items(), slope, strict=True)
    }
    images, labels = VALID
    with without_statistics(state.supernet):
        unrolled = F.cross_entropy(functional_call(state.supernet, ahead, (images, gates)), labels)
    expected = torch.autograd.grad(unrolled, state.arch.parameters())
    assert_close(ours, dict(zip(state.arch.logits, expected, strict=True)), 1e-10)


@each_setting
def test_a_small_finite_difference_is_the_exact_product(setting: Setting) -> None:
    exact, difference = Bilevel(order=2, hessian="exact"), Bilevel(order=2, epsilon=1e-6)
    expected = logit_gradients(begin(setting, exact), exact)
    assert_close(logit_gradients(begin(setting, difference), difference), expected, 1e-6)


@pytest.mark.parametrize("hessian", ["finite_difference", "exact"])
def test_step_looked_ahead_is_the_one_that_the_weights_take(
    hessian: Literal["finite_difference", "exact"],
) -> None:
    update = Bilevel(order=2, hessian=hessian)
    state = begin(SETTINGS["darts"], update)
    passes = watch(state)
    (gates,) = state.gates()
    update.gate_gradients(state, gates, TRAIN, VALID)
    ahead = passes.weights[1]
    weight_step(state, TRAIN, clip=1e9)
    assert_close({name: p.detach() for name, p in state.supernet.named_parameters()}, ahead, 1e-12)


def test_first_order_does_not_read_the_weight_batch() -> None:
    update = Bilevel()
    results = []
    for weight_batch in (TRAIN, batch("another")):
        state = begin(SETTINGS["darts"], update)
        update.step(state, weight_batch, VALID)
        results.append(snapshot(state))
    assert all(equal(results[0][part], results[1][part]) for part in results[0])


@pytest.mark.parametrize(
    ("update", "differentiated"),
    [
        (Bilevel(), [False]),
        (Bilevel(order=2, hessian="exact"), [True, True]),
        (Bilevel(order=2), [True, True, False, False]),
    ],
    ids=["order 1", "exact", "finite difference"],
)
def test_gradients_of_weights_are_computed_only_where_they_are_used(
    update: Bilevel, differentiated: list[bool]
) -> None:
    state = begin(SETTINGS["darts"], update)
    passes = watch(state)
    update.step(state, TRAIN, VALID)
    assert passes.differentiated == differentiated


def test_loss_is_that_of_held_out_data_before_the_update() -> None:
    update = Bilevel(lr=1.0)
    state = begin(SETTINGS["darts"], update)
    images, labels = VALID
    with torch.no_grad():
        expected = F.cross_entropy(state.supernet(images, state.gates()[0]), labels)
    assert torch.equal(update.step(state, TRAIN, VALID), expected)


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "count"),
    [
        (Bilevel(), 1),
        (Bilevel(order=2, hessian="exact"), 2),
        (Bilevel(order=2), 4),
    ],
    ids=["order 1", "exact", "finite difference"],
)
def test_one_draw_of_hard_gates_serves_all_passes(update: Bilevel, count: int) -> None:
    state = begin(Setting(sampler=HARD), update)
    reference = begin(Setting(sampler=HARD), update)
    (drawn,) = reference.gates()
    passes = watch(state)
    update.step(state, TRAIN, VALID)
    assert len(passes.gates) == count
    for gates in passes.gates:
        assert gates.keys() == drawn.keys()
        for name, gate in gates.items():
            assert gate.active == drawn[name].active
            assert torch.equal(gate.weights, drawn[name].weights.detach())
    # The stream has moved on by this one draw.
    assert torch.equal(state.draws.get_state(), reference.draws.get_state())


def test_gradient_of_the_gates_goes_through_the_sampler_to_the_logits() -> None:
    # Order 1 against plain autograd from the loss to the logits, supernet and sampler in one graph.
    for setting in SETTINGS.values():
        state = begin(setting, Bilevel())
        (gates,) = state.gates()
        images, labels = VALID
        loss = F.cross_entropy(state.supernet(images, gates), labels)
        expected = torch.autograd.grad(loss, state.arch.parameters(), retain_graph=True)
        found = logit_gradients(state, Bilevel(), gates)
        assert_close(found, dict(zip(state.arch.logits, expected, strict=True)), 1e-12)


# --- what a step may change ---------------------------------------------------------------------------------

UPDATES = {
    "order 1": Bilevel(clip=5.0),
    "finite difference": Bilevel(order=2),
    "exact": Bilevel(order=2, hessian="exact"),
}
each_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


@each_setting
@each_update
def test_an_architecture_step_leaves_weights_and_their_optimiser_as_they_were(
    setting: Setting, update: Bilevel
) -> None:
    state = begin(setting, update)
    # A gradient that lies about must neither be used nor added to: the weight step clears it.
    for parameter in state.supernet.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    addresses = [parameter.data_ptr() for parameter in state.supernet.parameters()]
    before = snapshot(state)
    update.step(state, TRAIN, VALID)
    after = snapshot(state)
    for part in ("weights", "momentum", "gradients"):
        assert equal(before[part], after[part]), part
    assert not any(torch.equal(before["logits"][name], after["logits"][name]) for name in before["logits"])
    assert all(parameter.requires_grad for parameter in state.supernet.parameters())
    assert [parameter.data_ptr() for parameter in state.supernet.parameters()] == addresses


@each_update
def test_a_weight_step_is_the_same_after_an_architecture_step_as_before_one(update: Bilevel) -> None:
    # The logits are put back, so that only a leaked gradient could make a difference.
    results = []
    for step_first in (False, True):
        state = begin(SETTINGS["pc_darts"], update)
        logits = snapshot(state)["logits"]
        if step_first:
            update.step(state, TRAIN, VALID)
            with torch.no_grad():
                for name, value in logits.items():
                    state.arch.logits[name].copy_(value)
        weight_step(state, TRAIN, clip=5.0)
        results.append(snapshot(state))
    assert equal(results[0]["weights"], results[1]["weights"])
    assert equal(results[0]["momentum"], results[1]["momentum"])


def test_a_weight_step_leaves_the_logits_and_their_gradients_as_they_were() -> None:
    update = Bilevel()
    state = begin(SETTINGS["pc_darts"], update)
    update.step(state, TRAIN, VALID)
    before = snapshot(state)["logits"]
    gradients = {name: p.grad.clone() for name, p in state.arch.logits.items() if p.grad is not None}
    weight_step(state, TRAIN, clip=5.0)
    assert equal(before, snapshot(state)["logits"])
    assert equal(gradients, {name: p.grad for name, p in state.arch.logits.items() if p.grad is not None})
    assert all(logits.requires_grad for logits in state.arch.parameters())


@pytest.mark.parametrize(
    ("update", "counted"),
    [(UPDATES["order 1"], [0]), (UPDATES["exact"], [0]), (UPDATES["finite difference"], [0, 2, 3])],
    ids=["order 1", "exact", "finite difference"],
)
def test_running_statistics_after_an_architecture_step(update: Bilevel, counted: list[int]) -> None:
    # Order 1 counts the held-out batch. Order 2 counts the weight batch in the passes at w, w+ and w-, as
    # the public code does, whose weights looked ahead to belong to a copy of the network.
    state = begin(SETTINGS["pc_darts"], update)
    expected = copy.deepcopy(state.supernet)
    passes = watch(state)
    update.step(state, TRAIN, VALID)
    for number in counted:
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter.copy_(passes.weights[number][name])
            expected((VALID if update.order == 1 else TRAIN)[0], passes.gates[number])
    assert equal(dict(state.supernet.named_buffers()), dict(expected.named_buffers()))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clip_bounds_the_norm_of_the_architecture_gradient(clip: float) -> None:
    state = begin(SETTINGS["pc_darts"], Bilevel())
    gradients = logit_gradients(state, Bilevel())
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    assert 1e-3 < norm < 1e3
    update = Bilevel(clip=clip)
    state = begin(SETTINGS["pc_darts"], update)
    update.step(state, TRAIN, VALID)
    clipped = {name: p.grad for name, p in state.arch.logits.items() if p.grad is not None}
    factor = min(1.0, clip / (norm + 1e-6))  # PyTorch's guard against a norm of zero
    assert_close(clipped, {name: gradient * factor for name, gradient in gradients.items()}, 1e-12)
    assert float(torch.nn.utils.get_total_norm(list(clipped.values()))) <= clip


def test_weight_decay_pulls_towards_uniform() -> None:
    # Without a gradient from the loss, each Adam step shrinks every logit.
    update = Bilevel(weight_decay=1e-3, lr=1e-4)
    state = begin(SETTINGS["darts"], update)
    assert state.arch_optimizer is not None
    before = snapshot(state)["logits"]
    for logits in state.arch.parameters():
        logits.grad = torch.zeros_like(logits)
    state.arch_optimizer.step()
    for name, logits in state.arch.logits.items():
        assert (logits.detach().abs() < before[name].abs()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"xi": -0.1}, "xi=-0.1 must be at least 0"),
        ({"order": 3}, "order=3 must be 1 or 2"),
        ({"hessian": "none"}, "hessian"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Bilevel(), **settings)
