"""The golden data: numbers recorded by running the public implementations, in a folder beside the repository.

Its README describes them. `NAS_GOLDEN` names another folder; tests are skipped where there is none.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn

from nas.network import Network, NetworkCell
from nas.samplers import Arch, init_arch
from nas.spaces.cell import CELL_TYPES, CellSpace
from nas.spaces.space import Choices
from nas.streams import generator
from nas.supernets.cell import CellSupernet, CellSupernetConfig
from nas.supernets.edge_form import edge_tensors

Tensors = dict[str, Tensor]

FOLDER = Path(os.environ.get("NAS_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
RECORDED_NAMES = {
    f"{cell}/{kind}": f"{greek}_{cell}"
    for cell in CELL_TYPES
    for kind, greek in (("op", "alpha"), ("input", "beta"))
}


def _or_skip(found: list[ParameterSet], what: str) -> list[ParameterSet]:
    reason = f"no golden data: {what} is not in {FOLDER}; set NAS_GOLDEN to its folder"
    return found or [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=reason))]


def recordings(kind: str) -> list[ParameterSet]:
    """A test parameter for each NPZ file whose name begins with `kind`: its path; or one that skips."""
    paths = sorted(FOLDER.glob(f"{kind}*.npz"))
    return _or_skip([pytest.param(path, id=path.stem) for path in paths], f"{kind}*.npz")


@cache
def document(file: str) -> Any:
    """Content of a JSON file."""
    return json.loads((FOLDER / file).read_text())


def cases(
    file: str,
    key: str,
    name: Callable[[Any], str] = lambda case: str(case["id"]),
    only: Callable[[Any], bool] = lambda case: True,
) -> list[ParameterSet]:
    """A test parameter for each entry of list `key` in a JSON file that `only` accepts; or one that skips."""
    entries = document(file)[key] if (FOLDER / file).exists() else []
    return _or_skip([pytest.param(case, id=name(case)) for case in entries if only(case)], file)


@dataclass(frozen=True)
class Recording:
    """An NPZ file: settings, and tensors by name, floating-point ones as float64."""

    meta: dict[str, Any]
    tensors: Tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> Tensors:
        """The tensors whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def batch(self, kind: str = "", index: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels, e.g. those of `data/train_input/2` and `data/train_label/2`."""
        suffix = "" if index is None else f"/{index}"
        return self[f"data/{kind}input{suffix}"], self[f"data/{kind}label{suffix}"]


def load(path: Path) -> Recording:
    """The recording in an NPZ file."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Recording(meta, {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})


def build_supernet(recording: Recording) -> tuple[CellSupernet, Arch]:
    """Supernet and architecture parameters of a recording, in the state before its first step, float64."""
    meta = recording.meta
    space = CellSpace(
        nodes=meta["nodes"],
        ops=tuple(meta["op_order"]),
        normal_ops=_as_tuples(meta.get("kept_ops_normal")),
        reduce_ops=_as_tuples(meta.get("kept_ops_reduce")),
    )
    config = CellSupernetConfig(partial_channels=meta["partial_k"], edge_norm=meta["edge_norm"])
    supernet = config.build(
        space, space.choices, cells=meta["cells"], channels=meta["channels"], classes=meta["classes"]
    ).double()
    copy_into(edge_tensors(supernet), recording.under("param/") | recording.under("buffer/"))
    arch = init_arch(config.gated(space.choices), generator(0), torch.device("cpu"), torch.float64)
    recorded = {name: recording[f"arch/{RECORDED_NAMES[name]}"] for name in arch.logits}
    copy_into(dict(arch.logits), {name: table(arch.choices[name], recorded[name]) for name in recorded})
    return supernet, arch


def _as_tuples(subsets: list[list[str]] | None) -> tuple[tuple[str, ...], ...] | None:
    return None if subsets is None else tuple(map(tuple, subsets))


def copy_into(views: Tensors, values: Tensors) -> None:
    """Write `values` into the tensors of the same names and shapes; none may be left over on either side."""
    assert views.keys() == values.keys(), sorted(views.keys() ^ values.keys())[:10]
    with torch.no_grad():
        for name, view in views.items():
            assert view.shape == values[name].shape, name
            view.copy_(values[name])


def table(choices: Choices, values: Tensor) -> Tensor:
    """Table of (rows, options) of a recorded tensor, which holds allowed options only; zero at the others."""
    full = torch.zeros(len(choices.rows), len(choices.options), dtype=torch.float64)
    left = values.flatten()
    for row, options in enumerate(choices.allowed):
        full[row, list(options)], left = left[: len(options)], left[len(options) :]
    assert len(left) == 0
    return full


def as_recorded(choices: dict[str, Choices], tables: Tensors) -> Tensors:
    """Tables of (rows, options) under their recorded names: entries of allowed options only, as a vector."""
    found = {}
    for name, full in tables.items():
        rows = zip(full.detach(), choices[name].allowed, strict=True)
        found[RECORDED_NAMES[name]] = torch.cat([row[list(options)] for row, options in rows])
    return found


def flat(tensors: Tensors) -> Tensors:
    """The same tensors, each as a vector."""
    return {name: tensor.flatten() for name, tensor in tensors.items()}


Read = Callable[[Tensor], Tensor | None]


def network_tensors(network: Network, read: Read = lambda tensor: tensor) -> Tensors:
    """Weights and running statistics of a derived network by their recorded names.

    `read` maps each to what is wanted of it, e.g. its gradient; where it gives None the name is left out.
    """
    found: dict[str, Tensor | None] = {}
    for path, module in network.named_modules():
        name = _recorded_name(network, path)
        if isinstance(module, nn.Conv2d):
            found[f"{name}.w"] = module.weight
        elif isinstance(module, nn.Linear):
            found |= {f"{name}.w": module.weight, f"{name}.b": module.bias}
        elif isinstance(module, nn.BatchNorm2d):
            found |= {f"{name}.scale": module.weight, f"{name}.shift": module.bias}
            found |= {f"{name}.mean": module.running_mean, f"{name}.var": module.running_var}
    wanted = {name: read(tensor) for name, tensor in found.items() if tensor is not None}
    return {name: tensor for name, tensor in wanted.items() if tensor is not None}


def _recorded_name(network: Network, path: str) -> str:
    match path.split("."):
        case ["cells", number, "picks", pick, *rest]:
            cell = network.cells[int(number)]
            assert isinstance(cell, NetworkCell)
            ops = [op for inputs in cell.cell.nodes for op, _ in inputs]
            return ".".join([f"cell{number}", f"pick{pick}", ops[int(pick)], *rest])
        case ["cells", number, *rest]:
            return ".".join([f"cell{number}", *rest])
        case ["auxiliary", *rest]:
            return ".".join(["aux", *rest])
        case ["stem0", *rest] if network.stem1 is None:
            return ".".join(["stem", *rest])
    return path


def assert_close(
    actual: Tensors, expected: Tensors, tolerance: float, *, relative_to: float | None = None
) -> None:
    """Every tensor of `expected` is in `actual`, within `tolerance` of its largest entry or `relative_to`."""
    assert expected
    assert expected.keys() <= actual.keys(), sorted(expected.keys() - actual.keys())[:10]
    errors = {}
    for name, value in expected.items():
        ours = actual[name].detach()
        assert ours.shape == value.shape, f"{name}: {tuple(ours.shape)} for {tuple(value.shape)}"
        scale = float(value.abs().max()) if relative_to is None else relative_to
        errors[name] = float((ours - value).abs().max()) / max(scale, torch.finfo(torch.float64).tiny)
    wrong = sorted((-error, name) for name, error in errors.items() if not error <= tolerance)
    assert not wrong, f"{len(wrong)} of {len(errors)} beyond {tolerance}: " + ", ".join(
        f"{name} {-error:.1e}" for error, name in wrong[:10]
    )
