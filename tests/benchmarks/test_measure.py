"""Counts and ratios of the benchmarks are what they say."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import Roofline, Timing, count, in_turns, speedup, table


def test_speedup_is_the_ratio_of_medians_and_its_spread_that_of_rounds() -> None:
    ratio = speedup(Timing((2.0, 9.0, 4.0)), Timing((1.0, 2.0, 4.0)))
    assert (ratio.value, ratio.low, ratio.high) == (4.0 / 2.0, 1.0, 4.5)
    assert str(ratio) == "2.00 (1.00-4.50)"


def test_forms_run_in_turns_and_change_who_comes_first() -> None:
    calls: list[str] = []
    times = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert "".join(calls) in ("abbaabba", "baabbaab")
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"a": 3, "b": 3}


def test_views_are_not_counted() -> None:
    x = torch.ones(4, 6)
    assert count(lambda: x.view(24)[3:].t()).ops == 0
    assert count(lambda: x + 1).ops == 1


def test_backward_passes_are_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    assert count(lambda: (x * x).sum().backward()).ops > count(lambda: (x * x).sum()).ops


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_cost_twice_as_much_backward_whatever_their_groups(groups: int) -> None:
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    weight = torch.randn(12, 8 // groups, 3, 3, requires_grad=True)
    forward = 2 * 2 * 12 * 3 * 3 * (8 // groups) * 3 * 3  # two a product, batch, outputs, window, inputs
    assert count(lambda: F.conv2d(x, weight, groups=groups)).flops == forward
    assert count(lambda: F.conv2d(x, weight, groups=groups).sum().backward()).flops == 3 * forward


def test_traffic_is_what_goes_in_and_comes_out() -> None:
    x = torch.ones(100)
    assert count(lambda: x + x).traffic == 3 * 400


def test_the_bound_of_an_operation_is_the_slower_of_arithmetic_and_traffic() -> None:
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    flops, traffic = 2 * 10 * 20 * 30, 4 * (10 * 20 + 20 * 30 + 10 * 30)
    assert count(lambda: a @ b, Roofline(flops=1.0, bandwidth=1e9)).bound == flops
    assert count(lambda: a @ b, Roofline(flops=1e9, bandwidth=1.0)).bound == traffic


def test_tables_are_markdown_with_columns_of_one_width() -> None:
    lines = table(["a", "long"], [[1, "x"], ["three", 2]]).splitlines()
    assert lines[0] == "| a     | long |"
    assert len({len(line) for line in lines}) == 1
