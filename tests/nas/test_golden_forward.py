"""The supernets of DARTS, PC-DARTS and P-DARTS against the public implementations, forward and backward."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nas.samplers import Progress, Softmax
from nas.supernets.edge_form import edge_tensors
from tests.golden import as_recorded, assert_close, build_supernet, flat, load, recordings

TOLERANCE = 1e-12


@pytest.mark.parametrize("path", recordings("forward"))
def test_supernet_is_the_public_one(path: Path) -> None:
    recording = load(path)
    supernet, arch = build_supernet(recording)
    (gates,) = Softmax().sample(arch, Progress(0, 1), torch.Generator())
    images, labels = recording.batch()

    supernet.eval()
    evaluated = supernet(images, gates)
    supernet.train()
    trained = supernet(images, gates)
    loss = F.cross_entropy(trained, labels)
    out = {
        "logits_eval": evaluated,
        "loss_eval": F.cross_entropy(evaluated, labels),
        "logits_train": trained,
        "loss_train": loss,
    }
    assert_close(out, recording.under("out/"), TOLERANCE)

    torch.autograd.backward(loss)
    alphas = {name: logits.grad for name, logits in arch.logits.items() if logits.grad is not None}
    assert_close(as_recorded(arch.choices, alphas), flat(recording.under("grad/arch/")), TOLERANCE)
    norm = torch.nn.utils.get_total_norm([p.grad for p in supernet.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(float(recording["grad/global_norm_of_params"]), rel=TOLERANCE)
    gradients = edge_tensors(supernet, lambda tensor: tensor.grad)
    assert_close(gradients, recording.under("grad/param/"), TOLERANCE, relative_to=float(norm))
    assert_close(edge_tensors(supernet), recording.under("after/buffer/"), TOLERANCE)
