"""What the context against waiting for the device refuses, and what it lets pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.static import HostSyncError, no_host_sync

X = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_waiting_is_refused(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(HostSyncError), no_host_sync():
        read(X)


def test_waiting_in_a_backward_pass_is_refused() -> None:
    x = X.clone().requires_grad_()
    x.register_hook(lambda grad: grad * float(grad.sum()))
    with pytest.raises(HostSyncError), no_host_sync():
        (x * x).sum().backward()


def test_computing_passes() -> None:
    x = X.clone().requires_grad_()
    with no_host_sync():
        y = torch.where(x > 0, x, 0.0)[torch.tensor([2, 0])].sum()
        y.backward()
        torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 1.0]
