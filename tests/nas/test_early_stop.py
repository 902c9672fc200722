"""DARTS-ES: when the rule stops a search, and what it goes back to."""

from collections.abc import Callable

import pytest

from nas.arch_updates import Bilevel
from nas.early_stop import EigenvalueStop
from nas.methods import METHODS, Method
from nas.samplers import Gumbel


def outcome(
    rule: EigenvalueStop, eigenvalue: Callable[[int], float], epochs: int = 50
) -> tuple[int, int] | None:
    """(Epoch of the stop, epoch gone back to) of a search with these eigenvalues."""
    seen = []
    for epoch in range(0, epochs, rule.every):
        seen.append(eigenvalue(epoch))
        back = rule.back_to(seen)
        if back is not None:
            return epoch, back
    return None


@pytest.mark.parametrize(
    ("eigenvalue", "expected"),
    [
        (lambda epoch: 1.0, None),
        (lambda epoch: 2.0 if epoch >= 20 else 1.0, (22, 10)),
        (lambda epoch: 3.0 if epoch >= 30 else 1.0, (30, 18)),
        (lambda epoch: 1.04**epoch, (22, 10)),
        (lambda epoch: 1.03**epoch, None),
        (lambda epoch: 1.2 if epoch >= 30 else 1.0, None),
    ],
    ids=["constant", "doubles at 20", "triples at 30", "1.04^e", "1.03^e", "1.2 from 30"],
)
def test_the_rule_of_the_public_code_with_its_settings(
    eigenvalue: Callable[[int], float], expected: tuple[int, int] | None
) -> None:
    assert outcome(EigenvalueStop(), eigenvalue) == expected


def test_every_setting_moves_the_stop() -> None:
    def jump(epoch: int) -> float:
        return 4.0 if epoch >= 20 else 1.0

    assert outcome(EigenvalueStop(), jump) == (22, 10), "the mean at 20 is 1.6, but goes back before epoch 10"
    assert outcome(EigenvalueStop(start=8), jump) == (20, 8)
    assert outcome(EigenvalueStop(start=14), jump) == (26, 14)
    assert outcome(EigenvalueStop(factor=2.0), jump) == (22, 10)
    assert outcome(EigenvalueStop(factor=2.5), jump) == (24, 12), "means 1.6, 2.2, 2.8 over one of 1"
    assert outcome(EigenvalueStop(window=1), jump) == (20, 12)
    assert outcome(EigenvalueStop(delta=2), jump) == (20, 12)
    assert outcome(EigenvalueStop(every=1), jump) == (20, 14)


def test_an_early_mean_is_over_what_there_is() -> None:
    rule = EigenvalueStop(window=5, delta=1, start=0, every=1)
    # After four measurements the earlier mean is of three, (1 + 1 + 1) / 3, and the present one of four.
    assert rule.back_to([1, 1, 1]) is None
    assert rule.back_to([1, 1, 1, 2.1]) is None
    assert rule.back_to([1, 1, 1, 2.3]) == 0


@pytest.mark.parametrize("level", [0.0, -1.0])
def test_what_is_not_positive_does_not_grow(level: float) -> None:
    assert outcome(EigenvalueStop(), lambda epoch: level if epoch < 20 else 5.0, epochs=28) is None


def test_an_eigenvalue_that_is_not_a_number_stops_nothing() -> None:
    assert outcome(EigenvalueStop(), lambda epoch: float("nan")) is None


@pytest.mark.parametrize("field", ["window", "delta", "factor", "every", "batches"])
def test_settings_without_sense_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"EigenvalueStop: {field}=0 must be at least 1"):
        EigenvalueStop(**{field: 0})


def test_hard_gates_have_no_curvature_to_stop_by() -> None:
    with pytest.raises(ValueError, match=r"stop needs a loss that is differentiable .* method\.stop=None"):
        Method(sampler=Gumbel(hard=True), stop=EigenvalueStop())
    assert Method(sampler=Gumbel(hard=False), stop=EigenvalueStop()).stop is not None


def test_no_listed_method_stops_early_unless_told_to() -> None:
    assert all(method.stop is None for method in METHODS.values())
    assert Method(arch_update=Bilevel(order=2)) == METHODS["darts_2nd"]
