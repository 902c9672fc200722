"""The distribution and the gradient of every sampler, against the equations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nas.samplers import Arch, Gumbel, Progress, Softmax, init_arch
from nas.schedule import Constant, Linear, Ramp, Schedule
from nas.spaces.cell import CellSpace
from nas.spaces.space import Choices
from nas.streams import generator

DRAWS = 4000
TABLE = "normal/op"
LOGITS = (0.9, -0.4, 0.0, 1.6, -2.0)


def arch_of(logits: Tensor, allowed: tuple[int, ...] | None = None, pick: int = 1) -> Arch:
    """One table with the given logits (rows, options) and, on every row, the same options allowed."""
    rows, options = logits.shape
    kept = allowed or tuple(range(options))
    names = tuple(map(str, range(rows))), tuple(map(str, range(options)))
    table = Choices(TABLE, *names, (kept,) * rows, pick)
    masks = {}
    if not table.full:
        masks[TABLE] = torch.tensor([[option not in kept for option in range(options)]] * rows)
    return Arch({TABLE: table}, {TABLE: nn.Parameter(logits)}, masks)


def gate_of(
    sampler: Softmax | Gumbel, arch: Arch, seed: int = 0, epoch: float = 0
) -> tuple[Tensor, list[int]]:
    """Weights of the only table and, row by row, the first active option."""
    (gates,) = sampler.sample(arch, Progress(epoch, 10), generator(seed, "gates"))
    return gates[TABLE].weights, [active[0] for active in gates[TABLE].active]


def repeated(logits: tuple[float, ...], rows: int = DRAWS) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64).repeat(rows, 1)


# Start


def test_logits_start_at_a_thousandth_of_a_normal_distribution() -> None:
    arch = init_arch(CellSpace(nodes=30).choices, generator(0, "alpha"), torch.device("cpu"))
    values = torch.cat([logits.detach().flatten() for logits in arch.parameters()]).double() * 1000
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    again = init_arch(CellSpace(nodes=30).choices, generator(0, "alpha"), torch.device("cpu"))
    assert all(torch.equal(one, two) for one, two in zip(arch.parameters(), again.parameters(), strict=True))


# Softmax


def test_softmax_gates_are_the_softmax_of_the_allowed() -> None:
    logits = torch.randn(3, 5, generator=generator(0, "logits"), dtype=torch.float64)
    weights, _ = gate_of(Softmax(), arch_of(logits, allowed=(0, 2, 3)))
    expected = torch.zeros_like(logits)
    expected[:, [0, 2, 3]] = logits[:, [0, 2, 3]].softmax(dim=1)
    assert torch.allclose(weights, expected)


def test_equal_logits_share_equally() -> None:
    space = CellSpace()
    arch = init_arch(space.choices, generator(0, "alpha"), torch.device("cpu"))
    with torch.no_grad():
        for logits in arch.parameters():
            logits.zero_()
    (gates,) = Softmax().sample(arch, Progress(0, 10), generator(0, "gates"))
    # Beta of nodes 2..5: 1/2, 1/3, 1/4, 1/5 on each input.
    for row, count in zip(gates["normal/input"].weights, (2, 3, 4, 5), strict=True):
        assert row.tolist() == pytest.approx([1 / count] * count + [0] * (5 - count))
    assert gates["reduce/op"].weights.flatten().tolist() == pytest.approx([1 / 8] * 112)


# Hard Gumbel: what is drawn


@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0, 10.0, 200.0])
def test_frequencies_of_hard_gumbel_are_the_softmax_at_any_temperature(tau: float) -> None:
    _, drawn = gate_of(Gumbel(tau=Constant(tau)), arch_of(repeated(LOGITS).float()))
    counts = np.bincount(drawn, minlength=len(LOGITS))
    expected = DRAWS * torch.tensor(LOGITS, dtype=torch.float64).softmax(dim=0).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_frequencies_over_single_draws_are_the_softmax_too() -> None:
    arch, sampler, draws = arch_of(repeated(LOGITS, rows=1)), Gumbel(), generator(0, "gates")
    counts = np.zeros(len(LOGITS))
    for _ in range(1000):
        (gates,) = sampler.sample(arch, Progress(0, 10), draws)
        counts[gates[TABLE].active[0][0]] += 1
    expected = 1000 * torch.tensor(LOGITS, dtype=torch.float64).softmax(dim=0).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_rows_are_drawn_independently() -> None:
    arch = arch_of(torch.zeros(2, 2, dtype=torch.float64))
    counts = np.zeros((2, 2))
    draws = generator(0, "gates")
    for _ in range(1000):
        (gates,) = Gumbel().sample(arch, Progress(0, 10), draws)
        (first,), (second,) = gates[TABLE].active
        counts[first, second] += 1
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_options_that_are_not_allowed_are_never_drawn(tau: float) -> None:
    logits = repeated((5.0, 0.0, 5.0, 0.5, 5.0))  # the likeliest are forbidden
    weights, drawn = gate_of(Gumbel(tau=Constant(tau)), arch_of(logits, allowed=(1, 3)))
    assert set(drawn) == {1, 3}
    assert weights[:, [0, 2, 4]].eq(0).all()
    expected = DRAWS * torch.tensor([0.0, 0.5], dtype=torch.float64).softmax(dim=0).numpy()
    assert stats.chisquare(np.bincount(drawn)[[1, 3]], expected).pvalue > 1e-3


def test_hard_gates_are_one_at_the_drawn_option_and_zero_elsewhere() -> None:
    for dtype in (torch.float32, torch.float64):
        weights, drawn = gate_of(Gumbel(), arch_of(repeated(LOGITS, rows=50).to(dtype)))
        one_hot = torch.zeros_like(weights)
        one_hot[torch.arange(50), torch.tensor(drawn)] = 1
        assert torch.equal(weights, one_hot)


def test_soft_gates_sharpen_as_the_temperature_falls() -> None:
    arch = arch_of(repeated(LOGITS, rows=200))
    peaks = []
    for tau in (10.0, 1.0, 0.1, 0.01):
        weights, _ = gate_of(Gumbel(hard=False, tau=Constant(tau)), arch)
        peaks.append(float(weights.detach().amax(dim=1).mean()))
    assert all(later > earlier for earlier, later in pairwise(peaks))
    assert peaks[-1] > 0.97


def test_the_temperature_follows_its_schedule() -> None:
    arch = arch_of(repeated(LOGITS, rows=5))
    scheduled, _ = gate_of(Gumbel(hard=False, tau=Linear(10.0, 1.0)), arch, epoch=3)
    constant, _ = gate_of(Gumbel(hard=False, tau=Constant(7.0)), arch, epoch=3)
    assert torch.allclose(scheduled, constant)


def test_tables_that_keep_several_options_stay_a_softmax() -> None:
    logits = torch.randn(3, 4, generator=generator(0, "logits"), dtype=torch.float64)
    weights, _ = gate_of(Gumbel(), arch_of(logits, pick=2))
    assert torch.allclose(weights, logits.softmax(dim=1))


# Hard Gumbel: gradient


@pytest.mark.parametrize("tau", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("allowed", [None, (0, 2, 3)])
def test_gradient_of_the_drawn_gate_is_that_of_the_soft_sample(
    tau: float, allowed: tuple[int, ...] | None
) -> None:
    """The derivative of p_k in A_m is p_k (delta_km - p_m) / tau, with p the soft sample of the same draw."""
    logits = torch.randn(30, 5, generator=generator(1, "logits"), dtype=torch.float64)
    arch = arch_of(logits, allowed)
    soft, _ = gate_of(Gumbel(hard=False, tau=Constant(tau)), arch)
    p = soft.detach()
    weights, drawn = gate_of(Gumbel(tau=Constant(tau)), arch)
    rows, k = torch.arange(30), torch.tensor(drawn)
    assert torch.equal(p.argmax(dim=1), k), "one draw gives the same option, hard and soft"
    weights[rows, k].sum().backward()  # type: ignore[no-untyped-call]
    delta = torch.zeros_like(p)
    delta[rows, k] = 1
    expected = p[rows, k, None] * (delta - p) / tau
    gradient = arch.logits[TABLE].grad
    assert gradient is not None
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    if allowed is not None:
        assert gradient[:, [1, 4]].eq(0).all()


def test_the_soft_sample_is_softmax_of_log_probabilities_and_gumbel_noise_over_tau() -> None:
    # tau (log p_k - log p_m) - (A_k - A_m) is the difference of two Gumbel numbers, which is logistic.
    arch, tau = arch_of(repeated(LOGITS)), 2.0
    with torch.no_grad():
        soft, _ = gate_of(Gumbel(hard=False, tau=Constant(tau)), arch)
    noise = tau * (soft[:, 0].log() - soft[:, 1].log()) - (LOGITS[0] - LOGITS[1])
    assert stats.kstest(noise.numpy(), "logistic").pvalue > 1e-3


# What is refused


@pytest.mark.parametrize("tau", [Constant(0.0), Linear(10.0, 0.0), Linear(0.0, 1.0), Ramp(1.0)])
def test_a_temperature_of_zero_is_refused(tau: Schedule) -> None:
    with pytest.raises(ValueError, match=r"Gumbel\.tau=.* reaches 0"):
        Gumbel(tau=tau)
