"""Derived genotypes against those of the public implementations, ties included: exact."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.genotype import Cell, Genotype
from nas.methods import METHODS
from nas.samplers import Arch
from nas.searchers import Argmax, keep_likeliest
from nas.spaces.cell import CELL_TYPES, CellSpace
from nas.spaces.space import Choices
from tests.golden import cases, table

Listed = list[list[str | int]]

SEARCHERS = {
    "darts": METHODS["darts_1st"],
    "pc_darts": METHODS["pc_darts"],
    "gdas_top2_pairs": METHODS["gdas"],
}
FILE = "derivation.json"


def listed(cell: Cell) -> Listed:
    """Inputs of all nodes in one list, as the public code has them."""
    return [[op, source] for inputs in cell.nodes for op, source in inputs]


def probabilities(choices: dict[str, Choices], recorded: dict[str, Any]) -> dict[str, Tensor]:
    """Softmax of the recorded logits of every table that the case has, by the name of its choices."""
    logits = {}
    for cell in CELL_TYPES:
        for name, kind in ((f"{cell}/op", f"alpha_{cell}"), (f"{cell}/input", f"beta_{cell}")):
            if kind in recorded:
                values = torch.tensor(recorded[kind], dtype=torch.float64)
                logits[name] = torch.nn.Parameter(table(choices[name], values))
    masks = {}
    for name in logits:
        allowed = torch.zeros(logits[name].shape, dtype=torch.bool)
        for row, options in enumerate(choices[name].allowed):
            allowed[row, list(options)] = True
        masks[name] = ~allowed
    return Arch(choices, logits, masks).probabilities()


def derive(
    searcher: Any, space: CellSpace, choices: dict[str, Choices], recorded: dict[str, Any]
) -> Genotype:
    genotype = searcher.derive(space, choices, probabilities(choices, recorded), random.Random(0))
    assert isinstance(genotype, Genotype)
    return genotype


@pytest.mark.parametrize("case", cases(FILE, "cases", only=lambda case: case["rule"] in SEARCHERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_genotype_of_the_public_code(case: dict[str, Any], dtype: torch.dtype) -> None:
    space = CellSpace(ops=tuple(case["columns"])) if "columns" in case else CellSpace()
    learned = {name: p.to(dtype) for name, p in probabilities(space.choices, case).items()}
    genotype = SEARCHERS[case["rule"]].searcher.derive(space, space.choices, learned, random.Random(0))
    expected = case["genotype"]
    assert listed(genotype.normal) == expected["normal"]
    assert listed(genotype.reduce) == expected["reduce"]
    assert list(genotype.normal.concat) == list(genotype.reduce.concat) == expected["concat"]


@pytest.mark.parametrize("case", cases(FILE, "cases", only=lambda case: case["rule"] == "p_darts"))
def test_p_darts_stages_and_skip_cap_of_the_public_code(case: dict[str, Any]) -> None:
    space = CellSpace()
    choices = dict(space.choices)
    for keep, stage in zip((5, 3), case["stages"], strict=True):
        learned = probabilities(choices, stage)
        for cell in CELL_TYPES:
            choices[f"{cell}/op"] = keep_likeliest(choices[f"{cell}/op"], learned[f"{cell}/op"], keep)
            assert [list(row) for row in choices[f"{cell}/op"].allowed] == stage[f"survivors_{cell}"]

    final = case["final"]
    uncapped = derive(Argmax(ties="last"), space, choices, final)
    assert listed(uncapped.normal) == final["genotype_uncapped"]["normal"]
    assert listed(uncapped.reduce) == final["genotype_uncapped"]["reduce"]
    assert uncapped.normal.skips == final["skips_uncapped"]
    for cap, expected in final["normal_with_cap"].items():
        capped = derive(Argmax(ties="last", max_skip=int(cap)), space, choices, final)
        assert listed(capped.normal) == expected, f"M={cap}"
        assert capped.reduce == uncapped.reduce


@pytest.mark.parametrize("case", cases(FILE, "cases", only=lambda case: case["rule"] == "p_darts"))
def test_p_darts_operation_of_every_edge_of_the_public_code(case: dict[str, Any]) -> None:
    space = CellSpace()
    tables = {}
    for cell in CELL_TYPES:
        survivors = tuple(map(tuple, case["stages"][1][f"survivors_{cell}"]))
        tables[f"{cell}/op"] = space.choices[f"{cell}/op"].keep(survivors)
    learned = probabilities(tables, case["final"])
    for cell in CELL_TYPES:
        for edge, option in enumerate(case["final"][f"one_op_per_edge_{cell}"]):
            # The other edges get nothing, hence this one is selected and shows its operation.
            node, source = space.edges[edge]
            alone = {name: torch.zeros_like(p) for name, p in learned.items()}
            alone[f"{cell}/op"][edge] = learned[f"{cell}/op"][edge]
            genotype = Argmax(ties="last").derive(space, tables, alone, random.Random(0))
            inputs = getattr(genotype, cell).nodes[node - 2]
            assert (space.ops[option], source) in inputs
