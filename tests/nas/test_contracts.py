"""Every member of a family keeps the promise of its noun; the promises are in `tests/contracts.py`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.methods import METHODS
from nas.papers import PAPERS
from nas.samplers import Gumbel, Sampler, Softmax
from nas.schedule import Constant
from nas.searchers import Argmax, RandomGenotype, Searcher, keep_likeliest
from nas.spaces.cell import SPACES, CellSpace
from nas.spaces.space import Choices, Picks
from tests.contracts import (
    check_method,
    check_paper,
    check_sampler,
    check_searcher,
    check_space,
)
from tests.strategies import genotypes, picks, probabilities, spaces, tables

SMALL = CellSpace(nodes=2)
SAMPLERS: dict[str, Sampler] = {
    "softmax": Softmax(),
    "gumbel": Gumbel(),
    "soft gumbel": Gumbel(hard=False),
    "gumbel at low temperature": Gumbel(tau=Constant(0.1)),
}
SEARCHERS: dict[str, Searcher] = {
    "darts": Argmax(),
    "p_darts": Argmax(max_skip=2, ties="last"),
    "no skip": Argmax(max_skip=0),
    "gdas": Argmax(pairs=True),
    "alpha": Argmax(edges_by="alpha"),
    "beta": Argmax(edges_by="beta", max_skip=1),
    "random": RandomGenotype(),
    "random with a cap": RandomGenotype(max_skip=2),
}


# Spaces


@pytest.mark.parametrize("name", SPACES)
def test_space(name: str) -> None:
    assert SPACES[name].name == name
    check_space(SPACES[name])


@given(spaces())
def test_any_space(space: CellSpace) -> None:
    check_space(space)


@given(st.data(), spaces())
def test_genotype_survives_picks(data: st.DataObject, space: CellSpace) -> None:
    genotype = data.draw(genotypes(space))
    assert space.genotype(space.picks(genotype)) == genotype


@given(st.data(), spaces())
def test_picks_survive_the_genotype(data: st.DataObject, space: CellSpace) -> None:
    drawn: Picks = data.draw(picks(space))
    assert space.picks(space.genotype(drawn)) == drawn


# Samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("space", SPACES)
def test_sampler(sampler: str, space: str) -> None:
    check_sampler(SAMPLERS[sampler], SPACES[space].choices)


@pytest.mark.parametrize("sampler", [Softmax(), Gumbel(True, Constant(1.0)), Gumbel(False, Constant(1.0))])
@given(table=tables())
def test_sampler_on_any_table(sampler: Sampler, table: Choices) -> None:
    check_sampler(sampler, {"normal/op": table})


# Searchers


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("space", SPACES)
def test_searcher(searcher: str, space: str) -> None:
    check_searcher(SEARCHERS[searcher], SPACES[space])


@given(st.data(), tables(), st.integers(1, 6))
def test_keep_likeliest_keeps_exactly_k_of_the_allowed(
    data: st.DataObject, table: Choices, keep: int
) -> None:
    p = data.draw(probabilities(table))
    kept = keep_likeliest(table, p, keep)
    assert (kept.rows, kept.options, kept.pick) == (table.rows, table.options, table.pick)
    for row, (before, after) in enumerate(zip(table.allowed, kept.allowed, strict=True)):
        assert set(after) <= set(before)
        assert len(after) == min(keep, len(before))
        dropped = set(before) - set(after)
        # Whatever is dropped is less likely than whatever stays, or as likely and further to the front.
        assert all((p[row, d], d) < (p[row, k], k) for d in dropped for k in after)


# Methods and papers


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str) -> None:
    check_method(METHODS[name], SMALL)


@pytest.mark.parametrize("name", PAPERS)
def test_paper(name: str) -> None:
    check_paper(PAPERS[name])


def test_every_paper_is_another_trial() -> None:
    assert len({trial.id for trial in PAPERS.values()}) == len(PAPERS)


def test_every_paper_uses_a_listed_method() -> None:
    assert {trial.method for trial in PAPERS.values()} == set(METHODS.values())
