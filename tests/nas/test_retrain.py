"""The retraining step: its settings, what each leaves as it is, and what it refuses."""

import io
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import nas.ops
import nas.retrain
from nas.data import Arrays, Augment, Data, DataConfig, load
from nas.execution import recomputed
from nas.genotype import Cell, Genotype
from nas.metrics import Average
from nas.network import Network
from nas.published import PUBLISHED
from nas.retrain import RetrainRun, RetrainStage, micro_batches
from nas.schedule import Constant
from tests.static import no_host_sync

CPU = torch.device("cpu")
STAGE = RetrainStage(
    epochs=2,
    cells=3,
    channels=4,
    batch_size=16,
    auxiliary_weight=0.0,
    drop_path=Constant(0.3),
    label_smoothing=0.1,
    augment=Augment(pad=1),
)
NOISY = Genotype(
    Cell(((("noise", 0), ("sep_conv_3x3", 1)), (("skip_connect", 0), ("max_pool_3x3", 2))), (2, 3)),
    Cell(((("skip_connect", 0), ("noise", 1)), (("dil_conv_5x5", 2), ("skip_connect", 2))), (2, 3)),
)
"""Draws in its operations as well."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"amp": "bf16"},
    "accumulate": {"accumulate": 4},
    "checkpoint": {"checkpoint_cells": True},
    "all": {"amp": "bf16", "accumulate": 2, "checkpoint_cells": True},
}


@cache
def arrays() -> Arrays:
    return load(DATA)


DATA = DataConfig(limit=70, test_limit=30)
"""56 images for training, so that the last batch is a smaller one, and 14 for validation."""


def new_run(genotype: Genotype = NOISY, **changes: Any) -> RetrainRun:
    return RetrainRun(genotype, replace(STAGE, **changes), Data(arrays(), DATA, 0, CPU), 0, CPU)


def tensors(module: nn.Module, *, grads: bool = False) -> dict[str, Tensor]:
    found = dict(module.state_dict())
    if grads:
        found |= {f"grad/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"accumulate": 3}, r"accumulate=3 does not divide batch_size=16.*use one of 1, 2, 4, 8$"),
        ({"accumulate": 16}, r"2 images or more"),
        ({"accumulate": 2, "compile": "reduce-overhead"}, "use compile='default' or accumulate=1"),
        ({"amp": "fp8"}, "amp='fp8' is not one of off, bf16, fp16"),
        ({"compile": "max"}, "compile='max' is not one of off, default, reduce-overhead"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **changes)


def test_fp16_on_a_cpu_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="amp='fp16' needs a GPU"):
        new_run(amp="fp16")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    run = new_run(**SETTINGS[name])
    run.network.drop_path, run.network.generator = 0.3, torch.Generator()
    average = Average()
    for batch in [*run._train_batches()][-2:]:  # a full one and a smaller one
        with no_host_sync():
            run._train_step(batch, average)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_restored_after_an_epoch_goes_on_as_if_it_never_stopped(name: str) -> None:
    whole = new_run(**SETTINGS[name])
    whole.step()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    stopped = new_run(**SETTINGS[name])
    stopped.load_state_dict(torch.load(file))
    metrics, again = whole.step(), stopped.step()
    for machine in ("seconds", "peak_memory_mb"):
        del metrics[machine], again[machine]
    assert metrics == again
    assert_same(tensors(whole.network), tensors(stopped.network))


# --- drop-path ----------------------------------------------------------------------------------------------


def test_drop_path_drops_each_operation_of_each_sample_alone_but_no_identity() -> None:
    network = Network(PUBLISHED["PC_DARTS_cifar"], channels=4, cells=3, classes=10).double()
    network.drop_path, network.generator = 0.25, torch.Generator().manual_seed(0)
    keep = network._keep(torch.zeros(2000, 3, 8, 8, dtype=torch.float64), torch.float64)
    # One normal cell, with an identity among its 8 operations, and two reduction cells without.
    assert [len(factors) for factors in keep if factors is not None] == [7, 8, 8]
    factors = torch.cat([part for part in keep if part is not None]).flatten(1)
    assert set(factors.unique().tolist()) == {0.0, 1 / 0.75}
    # Means of 2000 draws have a deviation of 0.0129 around 1; correlations one of 0.0224 around 0.
    assert factors.mean(1).sub(1).abs().max() < 5 * math.sqrt(1 / 3 / 2000)
    assert (torch.corrcoef(factors) - torch.eye(len(factors))).abs().max() < 5 / math.sqrt(2000)


def test_evaluation_drops_nothing() -> None:
    network = Network(NOISY, channels=4, cells=3, classes=10).eval()
    network.drop_path, network.generator = 0.5, torch.Generator().manual_seed(0)
    before = network.generator.get_state()
    assert network._keep(torch.zeros(2, 3, 8, 8), torch.float32) == [None] * 3
    assert torch.equal(before, network.generator.get_state())


# --- activation checkpointing -------------------------------------------------------------------------------


def trained(checkpoint_cells: bool, stem: Any = "cifar") -> tuple[dict[str, Tensor], Tensor]:
    """Output, gradients and statistics after two forward and three backward passes; the stream's state."""
    torch.manual_seed(0)
    network = Network(
        NOISY, channels=4, cells=4, classes=10, stem=stem, checkpoint_cells=checkpoint_cells
    ).double()
    network.drop_path, network.generator = 0.3, torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nas.ops.Noise):
            module.generator = network.generator
    size = 16 if stem == "cifar" else 64
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    first, second = network(images)[0], network(images)[0]
    torch.autograd.backward(first.square().sum(), retain_graph=True)
    torch.autograd.backward(second.exp().sum())
    torch.autograd.backward(first.sum())  # a second pass through the same graph
    return {**tensors(network, grads=True), "out": second.detach()}, network.generator.get_state()


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_checkpointing_changes_no_bit(stem: str) -> None:
    (kept, stream), (computed_again, stream_again) = trained(False, stem), trained(True, stem)
    assert_same(kept, computed_again)
    assert torch.equal(stream, stream_again)


def test_checkpointing_keeps_less() -> None:
    def saved(checkpoint_cells: bool) -> int:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        network = Network(
            PUBLISHED["DARTS_V2"], channels=8, cells=5, classes=10, checkpoint_cells=checkpoint_cells
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits, _ = network(torch.zeros(4, 3, 16, 16))
        del logits
        return sum(found.values())

    assert saved(True) < saved(False) / 3


def test_checkpointing_without_gradients_is_a_call() -> None:
    layer = nn.BatchNorm2d(2)
    with torch.no_grad():
        recomputed(layer, torch.ones(2, 2, 1, 1), generator=None)
    assert int(layer.get_buffer("num_batches_tracked")) == 1


# --- accumulation -------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 100))
def test_micro_batches_are_alike_and_large_enough(images: int, size: int) -> None:
    batch = torch.arange(images), torch.arange(images)
    parts = [len(part) for part, _ in micro_batches(batch, size)]
    assert torch.cat([labels for _, labels in micro_batches(batch, size)]).tolist() == [*range(images)]
    assert max(parts) - min(parts) <= 1
    assert max(parts) <= size + 1
    assert min(parts) >= 2 or images < 2
    if images % size == 0:
        assert set(parts) == {size}


@pytest.mark.parametrize("images", [16, 13])
def test_accumulation_takes_the_step_of_the_whole_batch(images: int) -> None:
    def after(accumulate: int) -> tuple[dict[str, Tensor], float, tuple[float, float]]:
        run = new_run(PUBLISHED["DARTS_V2"], accumulate=accumulate, clip=0.1)
        run.network.double()
        for module in run.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the parts share no statistics, and so may agree
        draws = torch.Generator().manual_seed(0)
        batch = (
            torch.randn(images, 1, 8, 8, dtype=torch.float64, generator=draws),
            torch.randint(10, (images,), generator=draws),
        )
        average = Average()
        norm = run._train_step(batch, average)
        return tensors(run.network), float(norm), average.read()

    whole, whole_norm, whole_average = after(1)
    for accumulate in (2, 8):
        parts, norm, average = after(accumulate)
        assert norm == pytest.approx(whole_norm, rel=1e-12)
        assert norm > 0.1  # and so clipping acts
        assert average == pytest.approx(whole_average, rel=1e-12)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-10, atol=1e-12)


# --- low precision ------------------------------------------------------------------------------------------


def test_bf16_is_for_training_alone() -> None:
    run = new_run(PUBLISHED["DARTS_V2"], amp="bf16")
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in run.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: seen[m.training].add(out.dtype))
    run.step()
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {parameter.dtype for parameter in run.network.parameters()} == {torch.float32}


class Overflow:
    """Hook that makes the gradient infinite at some of its calls."""

    def __init__(self, calls: Callable[[int], bool]) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, grad: Tensor) -> Tensor:
        self.count += 1
        return grad * math.inf if self.calls(self.count) else grad


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_an_infinite_gradient_in_the_last_step_is_reported(amp: str) -> None:
    run = new_run(amp=amp)
    batches = len([*run._train_batches()])
    run.network.head.weight.register_hook(Overflow(lambda call: call == batches))
    with pytest.raises(FloatingPointError, match="gradients of 1 steps not finite in epoch 0"):
        run.step()


@pytest.fixture
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of fp16, which a CPU has for tests, but not at a speed for use."""
    monkeypatch.setattr(nas.retrain, "check_device", lambda stage, device: None)


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_fp16_leaves_out_a_step_that_overflows_and_resumes_its_scale() -> None:
    run = new_run(PUBLISHED["DARTS_V2"], amp="fp16")
    run.network.head.weight.register_hook(Overflow(lambda call: call == 1))
    batches = [*run._train_batches()]
    before = dict(run.network.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in before.items()}
    run._train_step(batches[0], Average())
    assert_same(before, {n: p.detach() for n, p in run.network.named_parameters()})
    assert run.scaler.get_scale() == 2.0**15
    for held in run.optimizer.state.values():
        assert not held["momentum_buffer"].any()
    run._train_step(batches[1], Average())
    assert not torch.equal(before["head.weight"], run.network.head.weight)
    # No step is longer than the learning rate times the clipped gradient and the decayed weight.
    lr = run.optimizer.param_groups[0]["lr"]
    for name, parameter in run.network.named_parameters():
        moved = float((parameter.detach() - before[name]).norm())
        assert moved <= lr * (run.stage.clip + float(before[name].norm()))

    other = new_run(PUBLISHED["DARTS_V2"], amp="fp16")
    other.load_state_dict(run.state_dict())
    assert other.scaler.state_dict() == run.scaler.state_dict()


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_fp16_whose_gradients_overflow_at_any_scale_is_reported() -> None:
    run = new_run(PUBLISHED["DARTS_V2"], amp="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.network.head.weight.register_hook(Overflow(lambda call: True))
    with pytest.raises(FloatingPointError, match="gradients of 4 steps not finite"):
        run.step()


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_fp16_does_not_wait_for_the_device() -> None:
    run = new_run(PUBLISHED["DARTS_V2"], amp="fp16")
    run.network.drop_path, run.network.generator = 0.3, torch.Generator()
    for batch in [*run._train_batches()][:2]:
        with no_host_sync():
            run._train_step(batch, Average())


# --- compilation --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_cells_train_alike_and_leave_the_tree_alone() -> None:
    written, run = (new_run(PUBLISHED["DARTS_V2"], compile=setting) for setting in ("off", "default"))
    first, second = written.step(), run.step()
    assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)
    assert second["valid_loss"] == pytest.approx(first["valid_loss"], rel=1e-3)
    assert run.network.state_dict().keys() == written.network.state_dict().keys()
    pickle.dumps(run.state_dict())


# PyTorch's tracer looks at the gradients of whatever comes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_smaller_batch_runs_checkpointed_cells_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and checkpointed: what the backward pass runs again is what the forward pass ran."""

    def compile_quickly(cells: Iterable[nn.Module], setting: str) -> None:
        for cell in cells:
            cell.compile(backend="aot_eager", dynamic=False)

    changes = {"checkpoint_cells": True, "batch_size": 8}
    plain = new_run(PUBLISHED["DARTS_V2"], **changes)
    monkeypatch.setattr(nas.retrain, "compile_cells", compile_quickly)
    compiled = new_run(PUBLISHED["DARTS_V2"], **changes, compile="default")
    for run in (plain, compiled):
        images, labels = next(run._train_batches())
        run._train_step((images, labels), Average())
        run._train_step((images[:4], labels[:4]), Average())
    for one, other in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
