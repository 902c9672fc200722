"""Training steps against the public implementations: all that they change, and unrolled gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.arch_updates import Bilevel
from nas.gates import Gates
from nas.metrics import Average
from nas.samplers import Arch, Progress, Softmax
from nas.search import weight_step
from nas.state import SearchState
from nas.supernets.cell import CellSupernet
from nas.supernets.edge_form import edge_tensors
from tests.golden import (
    Recording,
    Tensors,
    as_recorded,
    assert_close,
    build_supernet,
    copy_into,
    flat,
    load,
    recordings,
)

STEP_TOLERANCE = 1e-11
UNROLLED_TOLERANCE = 1e-9
SMALL_DIFFERENCE_TOLERANCE = 1e-7


def search_state(
    supernet: CellSupernet, arch: Arch, update: Bilevel, meta: dict[str, Any], lr: float
) -> SearchState:
    return SearchState(
        supernet=supernet,
        arch=arch,
        sampler=Softmax(),
        weight_optimizer=torch.optim.SGD(
            supernet.parameters(), lr=lr, momentum=meta["momentum"], weight_decay=meta["weight_decay"]
        ),
        arch_optimizer=update.optimizer(arch),
        progress=Progress(0, 1),
        draws=torch.Generator(),
    )


def momentum(state: SearchState) -> Tensors:
    buffers = {id(p): held["momentum_buffer"] for p, held in state.weight_optimizer.state.items()}
    return edge_tensors(state.supernet, lambda tensor: buffers.get(id(tensor)))


@pytest.mark.parametrize("path", recordings("one_step"))
def test_steps_are_those_of_the_public_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = load(path)
    meta = recording.meta
    supernet, arch = build_supernet(recording)
    update = Bilevel(
        lr=meta["arch_lr"],
        betas=tuple(meta["arch_betas"]),
        weight_decay=meta["arch_weight_decay"],
        clip=meta["grad_clip"] if any(of == "arch" for of, _ in meta["grad_norms_before_clipping"]) else None,
    )
    state = search_state(supernet, arch, update, meta, meta["lr"])
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def recorded_clip(*args: Any, **settings: Any) -> Tensor:
        norm = clip(*args, **settings)
        norms.append(float(norm))
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recorded_clip)

    losses = []
    for step in range(meta["steps"]):
        weight_batch = recording.batch("train_", step)
        update.step(state, weight_batch, recording.batch("valid_", step))
        average = Average()
        weight_step(state, weight_batch, meta["grad_clip"], average)
        losses.append(average.read()[0])
        if step + 1 in meta["snapshots"]:
            after = f"after{step + 1}"
            assert_close(
                as_recorded(arch.choices, dict(arch.logits)),
                flat(recording.under(f"{after}/arch/")),
                STEP_TOLERANCE,
            )
            tensors = edge_tensors(supernet)
            assert_close(tensors, recording.under(f"{after}/param/"), STEP_TOLERANCE)
            assert_close(tensors, recording.under(f"{after}/buffer/"), STEP_TOLERANCE)
            assert_close(momentum(state), recording.under(f"{after}/momentum/"), STEP_TOLERANCE)
            norm = torch.nn.utils.get_total_norm([p.detach() for p in supernet.parameters()])
            assert float(norm) == pytest.approx(
                float(recording[f"{after}/param_norm_all"]), rel=STEP_TOLERANCE
            )

    assert losses == pytest.approx(recording["out/train_losses"].tolist(), rel=STEP_TOLERANCE)
    assert norms == pytest.approx(
        [norm for _, norm in meta["grad_norms_before_clipping"]], rel=STEP_TOLERANCE
    )


def logit_gradients(state: SearchState, update: Bilevel, recording: Recording) -> tuple[Tensor, Tensors]:
    """Held-out loss and the gradient of every logit before the optimiser's step, as recorded."""
    (gates,) = state.gates()
    loss, gradients = update.gate_gradients(
        state, gates, recording.batch("train_"), recording.batch("valid_")
    )
    found = torch.autograd.grad(
        [gates[name].weights for name in gradients], state.arch.parameters(), list(gradients.values())
    )
    return loss, as_recorded(state.arch.choices, dict(zip(state.arch.logits, found, strict=True)))


@pytest.fixture(params=recordings("second_order"))
def recording(request: pytest.FixtureRequest) -> Recording:
    return load(request.param)


@pytest.fixture
def state(recording: Recording) -> SearchState:
    supernet, arch = build_supernet(recording)
    state = search_state(supernet, arch, Bilevel(), recording.meta, recording.meta["eta"])
    if recording.meta["momentum_present"]:
        buffers = {id(parameter): torch.zeros_like(parameter) for parameter in supernet.parameters()}
        copy_into(
            edge_tensors(supernet, lambda tensor: buffers.get(id(tensor))), recording.under("momentum/")
        )
        for parameter in supernet.parameters():
            state.weight_optimizer.state[parameter]["momentum_buffer"] = buffers[id(parameter)]
    return state


def test_finite_difference_is_that_of_the_public_code(recording: Recording, state: SearchState) -> None:
    passes: list[Tensors] = []

    def keep(module: nn.Module, args: tuple[Tensor, Gates]) -> None:
        passes.append(
            {name: tensor.detach().clone() for name, tensor in edge_tensors(state.supernet).items()}
        )

    state.supernet.register_forward_pre_hook(keep)
    loss, gradients = logit_gradients(state, Bilevel(order=2), recording)
    assert_close(gradients, flat(recording.under("out/grad/")), UNROLLED_TOLERANCE)
    assert float(loss) == pytest.approx(float(recording["out/unrolled_valid_loss"]), rel=UNROLLED_TOLERANCE)

    # The second of the four passes ran at the weights looked ahead to, the last two on either side of the
    # first.
    start, ahead, plus, minus = passes
    assert_close(ahead, recording.under("out/unrolled_param/"), UNROLLED_TOLERANCE)
    weights = edge_tensors(state.supernet, lambda tensor: tensor if tensor.requires_grad else None).keys()
    middle = {name: (plus[name] + minus[name]) / 2 for name in weights}
    assert_close(middle, {name: start[name] for name in weights}, UNROLLED_TOLERANCE)
    with torch.no_grad():
        for name, weight in edge_tensors(state.supernet).items():
            weight.copy_(ahead[name])
    _, direct = logit_gradients(state, Bilevel(order=1), recording)
    assert_close(direct, flat(recording.under("out/first_order_part/")), UNROLLED_TOLERANCE)
    product = {name: (direct[name] - gradients[name]) / recording.meta["eta"] for name in direct}
    assert_close(product, flat(recording.under("out/finite_difference_hvp/")), UNROLLED_TOLERANCE)


def test_small_finite_difference_is_that_of_the_public_code(recording: Recording, state: SearchState) -> None:
    _, gradients = logit_gradients(state, Bilevel(order=2, epsilon=1e-6), recording)
    assert_close(gradients, flat(recording.under("out/grad_r1e-6/")), SMALL_DIFFERENCE_TOLERANCE)


def test_exact_product_is_double_backward_through_the_public_code(
    recording: Recording, state: SearchState
) -> None:
    _, gradients = logit_gradients(state, Bilevel(order=2, hessian="exact"), recording)
    assert_close(gradients, flat(recording.under("out/exact_grad/")), UNROLLED_TOLERANCE)
