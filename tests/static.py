"""Contexts that prove of a step that a GPU could run it without its host waiting, or in a captured graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__array__)
"""What brings values to the host; on a CPU some of these never reach the dispatcher."""


class HostSyncError(AssertionError):
    """A step read a tensor's values, or made a tensor whose shape depends on them."""


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Context in which a step may not wait for the device; backward passes included.

    Raises:
        HostSyncError: at the call that would wait.
    """
    with _Calls(), _Operations():
        yield


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise HostSyncError(f"Tensor.{func.__name__}() brings values to the host")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        shaped = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        if by_mask or shaped or torch.Tag.data_dependent_output in func.tags:
            raise HostSyncError(f"{func} depends on values, for which the host would wait")
        if func is torch.ops.aten._to_copy.default:
            target = kwargs.get("device")
            if target is not None and target.type == "cpu" and args[0].device.type != "cpu":
                raise HostSyncError(f"{func} brings values to the host")
        return func(*args, **kwargs)
