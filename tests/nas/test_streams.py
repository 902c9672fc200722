"""Random streams: what one depends on, and that nothing else moves."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.streams import generator, seeded, stream_seed

seeds = st.integers(-(2**70), 2**70)
names = st.lists(st.text(max_size=8) | st.integers(-5, 300), max_size=4)


def numbers(stream: torch.Generator, count: int = 4) -> list[float]:
    return list(torch.rand(count, generator=stream).tolist())


@given(seeds, names)
def test_a_stream_is_a_function_of_seed_and_name(seed: int, name: list[str | int]) -> None:
    assert numbers(generator(seed, *name)) == numbers(generator(seed, *name))


named = st.tuples(st.integers(0, 50), st.lists(st.integers(0, 50) | st.text(max_size=3)).map(tuple))


@given(st.sets(named, max_size=50))
def test_different_names_have_different_streams(named: set[tuple[int, tuple[str | int, ...]]]) -> None:
    assert len({stream_seed(seed, *name) for seed, name in named}) == len(named)


def test_a_name_is_more_than_its_letters() -> None:
    assert len({stream_seed(0, "a", "b"), stream_seed(0, "ab"), stream_seed(0, "a", "b", "")}) == 3
    assert stream_seed(0, 1) != stream_seed(0, "1")
    assert stream_seed(1, 1) != stream_seed(11)


def test_seeds_are_the_same_everywhere() -> None:
    # The first 16 digits of `printf "(0, 'order', 7)" | sha256sum`, halved.
    assert stream_seed(0, "order", 7) == 3194338487629572710
    assert 0 <= stream_seed(-1, "x") < 2**63


@given(st.integers(0, 100))
def test_drawing_from_one_stream_moves_no_other(count: int) -> None:
    first, second = generator(0, "first"), generator(0, "second")
    untouched = numbers(generator(0, "second"))
    torch.rand(count, generator=first)
    assert numbers(second) == untouched
    # The next epoch's stream does not know how much this one's has given.
    assert numbers(generator(0, "first", 1)) == numbers(generator(0, "first", 1))


def test_streams_do_not_look_alike() -> None:
    one, two = (torch.rand(20_000, generator=generator(0, "order", epoch)) for epoch in (0, 1))
    correlation = torch.corrcoef(torch.stack([one, two]))[0, 1]
    assert abs(float(correlation)) < 4 / 20_000**0.5


# The default generator


@pytest.fixture
def global_state() -> Iterator[Tensor]:
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    yield before
    torch.set_rng_state(before)


def test_seeded_initialises_alike_and_puts_the_global_state_back(global_state: Tensor) -> None:
    with seeded(3, "init"):
        one = nn.Linear(4, 4)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.rand(17)
    with seeded(3, "init"):
        two = nn.Linear(4, 4)
    with seeded(4, "init"):
        three = nn.Linear(4, 4)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, three.weight)


def test_seeded_puts_the_global_state_back_after_an_error(global_state: Tensor) -> None:
    with pytest.raises(RuntimeError), seeded(3, "init"):
        torch.rand(5).view(7)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_generators_leave_the_global_state_alone(global_state: Tensor) -> None:
    numbers(generator(0, "a"))
    assert torch.equal(torch.get_rng_state(), global_state)
