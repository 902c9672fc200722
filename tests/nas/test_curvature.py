"""Hessians and their spectra: exact on quadratics, and three ways to one answer on a supernet."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from nas.curvature import DENSE_MAX, QUANTILES, Hessian, hutchinson, interval, lanczos, spectrum
from nas.measures import View, hessians
from nas.streams import generator
from tests.nas.searches import view_of


def symmetric(size: int, seed: int = 0) -> Tensor:
    matrix = torch.randn(size, size, generator=generator(seed, "matrix"), dtype=torch.float64)
    return (matrix + matrix.T) / 2


def quadratic(matrix: Tensor) -> Hessian:
    """Of half a A a, in two parameters that share its entries."""
    start = torch.randn(len(matrix), generator=generator(0, "at"), dtype=torch.float64)
    parts = [start[:4].reshape(2, 2).requires_grad_(), start[4:].requires_grad_()]
    flat = torch.cat([part.flatten() for part in parts])
    return Hessian(flat @ matrix @ flat / 2, parts)


def draws() -> torch.Generator:
    return generator(0, "draws")


def test_the_hessian_of_a_quadratic_is_its_matrix() -> None:
    matrix = symmetric(12)
    hessian = quadratic(matrix)
    torch.testing.assert_close(hessian.matrix(), matrix, rtol=0, atol=1e-12)
    found, values = spectrum(hessian, draws()), torch.linalg.eigvalsh(matrix)
    assert found.largest == pytest.approx(float(values[-1]), abs=1e-5)
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-5)
    assert found.trace == pytest.approx(float(matrix.trace()), abs=1e-5)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    assert found.quantiles == pytest.approx(torch.quantile(values, at).tolist(), abs=1e-5)
    assert found.asymmetry == pytest.approx(0, abs=1e-12)


def test_the_dominant_eigenvalue_is_that_of_largest_modulus() -> None:
    found = spectrum(quadratic(torch.diag(torch.arange(-7.0, 5.0).double())), draws())
    assert (found.largest, found.smallest, found.dominant) == pytest.approx((4, -7, -7))


def test_entries_that_are_not_kept_have_no_row() -> None:
    matrix, parameter = symmetric(9), torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    flat, kept = parameter.flatten(), torch.tensor([0, 4, 8])
    hessian = Hessian(flat @ matrix @ flat / 2, [parameter], kept)
    torch.testing.assert_close(hessian.matrix(), matrix[kept][:, kept])


def test_above_the_limit_lanczos_takes_the_place_of_the_matrix() -> None:
    values = torch.cat([torch.linspace(-1, 1, DENSE_MAX), torch.tensor([-3.0, 5.0])]).double()
    found = spectrum(quadratic(torch.diag(values)), draws())
    assert found.quantiles is None
    assert (found.smallest, found.largest) == pytest.approx((-3, 5), abs=1e-3)
    assert found.trace == pytest.approx(float(values.sum())), "exact of a diagonal matrix: signs square to 1"


def test_hutchinson_estimates_the_trace() -> None:
    matrix = symmetric(20)
    estimate = hutchinson(lambda v: matrix @ v, matrix[0], draws(), probes=4000)
    # The variance of one probe is twice the squared norm off the diagonal.
    off = matrix - torch.diag(matrix.diagonal())
    error = math.sqrt(2) * float(off.norm()) / math.sqrt(4000)
    assert abs(estimate - float(matrix.trace())) < 4 * error


@pytest.mark.parametrize("largest_only", [False, True])
@pytest.mark.parametrize("size", [1, 2, 60])
def test_lanczos_finds_the_ends_of_any_spectrum(size: int, largest_only: bool) -> None:
    matrix = symmetric(size)
    smallest, largest = lanczos(
        lambda v: matrix @ v, matrix[0], draws(), tolerance=1e-10, largest_only=largest_only
    )
    values = torch.linalg.eigvalsh(matrix)
    assert largest == pytest.approx(float(values[-1]), rel=1e-8)
    if not largest_only:
        assert smallest == pytest.approx(float(values[0]), rel=1e-8)


@pytest.mark.parametrize("negative", [-1.0, -100.0, -10000.0])
def test_lanczos_knows_the_largest_whatever_the_most_negative_one(negative: float) -> None:
    values = torch.cat([torch.tensor([negative]), torch.linspace(-0.5, 0.5, 200), torch.ones(1)]).double()
    found = lanczos(lambda v: values * v, values, draws(), tolerance=1e-2, largest_only=True)[1]
    assert found == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("largest_only", [False, True])
def test_what_lanczos_has_not_found_is_no_number(largest_only: bool) -> None:
    matrix = symmetric(60)
    found = lanczos(lambda v: matrix @ v, matrix[0], draws(), iterations=4, largest_only=largest_only)
    assert all(map(math.isnan, found))


def test_the_whole_matrix_is_computed_up_to_the_limit_alone() -> None:
    assert DENSE_MAX == 512
    whole, ends = (
        spectrum(quadratic(torch.diag(torch.linspace(-1, 1, size).double() ** 5)), draws())
        for size in (512, 513)
    )
    assert whole.quantiles is not None
    assert ends.quantiles is None


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_lanczos_stops_where_nothing_is_left_to_find(factor: float) -> None:
    calls: list[int] = []

    def product(vector: Tensor) -> Tensor:
        calls.append(1)
        return factor * vector

    assert lanczos(product, torch.ones(50), draws()) == pytest.approx((factor, factor), abs=1e-6)
    assert len(calls) == 1


def test_of_what_is_not_finite_nothing_is_known() -> None:
    assert all(map(math.isnan, lanczos(lambda v: v * math.nan, torch.ones(5), draws())))
    parameter = torch.ones(3, requires_grad=True)
    assert math.isnan(spectrum(Hessian((parameter * math.inf).square().sum(), [parameter]), draws()).largest)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_interval_is_that_of_students_t(count: int) -> None:
    values = [1.0, 2.5, 2.0, 7.0, -1.0][:count]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((expected.low, expected.high), rel=1e-5)


def test_one_value_has_no_interval_and_six_are_refused() -> None:
    assert interval([1.0]) == (None, None)
    with pytest.raises(ValueError, match="interval of 6 values; give at most 5"):
        interval([1.0] * 6)


# Of a supernet


def gradient_at(view: View, shift: Tensor) -> Tensor:
    """Gradient in alpha with the logits moved by `shift`."""
    logits = [view.state.arch.logits[name] for name in view.state.arch.logits if name.endswith("/op")]
    starts = [logit.detach().clone() for logit in logits]
    with torch.no_grad():
        for logit, part in zip(logits, shift.split([len(logit.flatten()) for logit in logits]), strict=True):
            logit += part.view_as(logit)
    found = next(hessians(view, 1)).gradient.detach()
    with torch.no_grad():
        for logit, start in zip(logits, starts, strict=True):
            logit.copy_(start)
    return found


@pytest.mark.usefixtures("float64")
def test_matrix_lanczos_and_finite_differences_agree_on_a_supernet() -> None:
    view = view_of(edge_norm=True)
    hessian = next(hessians(view, 1))
    matrix = hessian.matrix()
    scale = float(matrix.abs().max())
    assert float((matrix - matrix.T).abs().max()) < 1e-10 * scale
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    ends = lanczos(hessian.product, hessian.gradient, draws(), tolerance=1e-9)
    assert ends == pytest.approx((float(values[0]), float(values[-1])), rel=1e-7)
    step = 1e-5
    for row in range(0, len(matrix), 13):
        shift = torch.zeros(len(matrix))
        shift[row] = step
        slope = (gradient_at(view, shift) - gradient_at(view, -shift)) / (2 * step)
        torch.testing.assert_close(slope, matrix[row], rtol=0, atol=1e-5 * scale)


def test_the_hessian_is_symmetric_in_single_precision_too() -> None:
    found = spectrum(next(hessians(view_of(), 1)), draws())
    assert found.asymmetry is not None
    assert found.asymmetry < 1e-4


@pytest.mark.usefixtures("float64")
def test_adding_a_constant_to_an_edges_logits_is_a_flat_direction() -> None:
    hessian = next(hessians(view_of(), 1))
    direction = torch.zeros(hessian.size)
    direction[:4] = 1  # the first edge of the normal cell
    assert float(hessian.product(direction).abs().max()) < 1e-12
