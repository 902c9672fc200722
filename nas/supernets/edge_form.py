"""The cell supernet's tensors by edge: one name for each weight of each operation on each edge.

The stacked supernet keeps all edges of a fan-out in one tensor. Here every tensor gets the name and the
shape that it has in an implementation with one module per edge and operation, e.g.
`cell2.edge5.sep_conv_3x3.dw1.w`, as a *view*: copying into the views loads a checkpoint of that form,
cloning them saves one.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from nas.ops import FactorizedReduce
from nas.supernets.cell import CellSupernet, FanOut, SupernetCell
from nas.supernets.stacked import StackedReduce, StackedSeparable

Read = Callable[[Tensor], Tensor | None]


def edge_tensors(supernet: CellSupernet, read: Read = lambda tensor: tensor) -> dict[str, Tensor]:
    """Views of all weights and running statistics, by edge-form name.

    `read` maps each tensor of the supernet to the one to be viewed, e.g. `lambda p: p.grad`; where it gives
    None the name is left out.
    """
    found = {}
    for name, tensor, view in _views(supernet):
        source = read(tensor)
        if source is not None:
            found[name] = view(source)
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _norm(name: str, norm: nn.BatchNorm2d) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.affine:
        yield f"{name}.scale", norm.weight, _same
        yield f"{name}.shift", norm.bias, _same
    yield f"{name}.mean", norm.running_mean, _same
    yield f"{name}.var", norm.running_var, _same


def _plain(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    for child_name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            yield f"{name}.{child_name}.w", child.weight, _same
        elif isinstance(child, nn.BatchNorm2d):
            yield from _norm(f"{name}.{child_name}", child)


def _row(index: int, *, extra: tuple[int, ...] = ()) -> Callable[[Tensor], Tensor]:
    def view(tensor: Tensor) -> Tensor:
        part = tensor[index]
        for dim in extra:
            part = part.unsqueeze(dim)
        return part

    return view


def _stacked_norm(
    name: str, norm: nn.Module, row: int
) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    for role, tensor in (("mean", norm.running_mean), ("var", norm.running_var)):
        assert isinstance(tensor, Tensor)
        yield f"{name}.{role}", tensor, _row(row)


def _fan_out(name: str, fan: FanOut) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    for op, edges in fan.members.items():
        for row, edge in enumerate(edges):
            prefix = f"{name}.edge{fan.edge_rows[edge]}.{op}"
            if op in fan.pool_norms:
                yield from _stacked_norm(f"{prefix}.bn", fan.pool_norms[op], row)
                continue
            if op not in fan.weighted:
                continue
            module = fan.weighted[op]
            if isinstance(module, StackedReduce):
                yield f"{prefix}.conv_a.w", module.conv_a, _row(row, extra=(-1, -1))
                yield f"{prefix}.conv_b.w", module.conv_b, _row(row, extra=(-1, -1))
                yield from _stacked_norm(f"{prefix}.bn", module.bn, row)
                continue
            assert isinstance(module, StackedSeparable)
            stages = (
                [("1", module.conv1, module.bn1), ("2", module.conv2, module.bn2)] if module.twice else []
            )
            for number, conv, norm in stages or [("", module.conv1, module.bn1)]:
                yield f"{prefix}.dw{number}.w", conv.dw, _row(row, extra=(1,))
                yield f"{prefix}.pw{number}.w", conv.pw, _row(row, extra=(-1, -1))
                yield from _stacked_norm(f"{prefix}.bn{number}", norm, row)


def _views(supernet: CellSupernet) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    if supernet.stem1 is None:
        yield from _plain("stem", supernet.stem0)
    else:
        yield from _plain("stem0", supernet.stem0)
        yield from _plain("stem1", supernet.stem1)
    for number, cell in enumerate(supernet.cells):
        assert isinstance(cell, SupernetCell)
        name = f"cell{number}"
        for position, first in (("in0", cell.in0), ("in1", cell.in1)):
            assert isinstance(first, nn.Sequential | FactorizedReduce)
            yield from _plain(f"{name}.{position}", first)
        for fan in cell.fans:
            assert isinstance(fan, FanOut)
            yield from _fan_out(name, fan)
    yield "head.w", supernet.head.weight, _same
    yield "head.b", supernet.head.bias, _same
