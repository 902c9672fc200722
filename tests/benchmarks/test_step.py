"""The benchmarks of the search step compare forms that compute the same, and print what they promise."""

import pytest
import torch

from benchmarks import memory, step
from benchmarks.measure import count
from benchmarks.step import NETS, Net, forms, steps
from nas.search import weight_step

SMALL = Net(cells=3, channels=8, channels_in=3, image_size=8, batch=4)


@pytest.mark.parametrize("K", [1, 4])
def test_both_forms_start_alike(K: int) -> None:
    plain, fast, (images, _) = forms(SMALL, K, torch.device("cpu"))
    outputs = [state.supernet.eval()(images, state.gates()[0]) for state in (plain, fast)]
    assert torch.allclose(*outputs, atol=1e-4)


def test_published_steps_end_where_ours_do() -> None:
    """They compute more than they use, not something else."""
    ends = []
    for kind in ("published", "frozen"):
        plain, _, batch = forms(SMALL, 4, torch.device("cpu"))
        if kind == "published":
            step.published_weight_step(plain, batch, 5.0)
            step.published_alpha_step(plain, batch)
        else:
            weight_step(plain, batch, 5.0)
            step.Bilevel(order=1).step(plain, batch, batch)
        ends.append([*plain.supernet.parameters(), *plain.arch.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("K", [4])
def test_operations_of_a_weight_step_of_the_papers_net(K: int) -> None:
    """A count, so it holds on any machine: at most 27 % of the published form."""
    net = Net(8, 16, 3, 32, batch=2)
    found = steps(net, K, torch.device("cpu"), exact=False)["weights"]
    counts = {name: count(form).ops for name, form in found.items()}
    assert counts["fast"] <= 0.27 * counts["published"]


@pytest.mark.parametrize(("K", "share"), [(4, 0.40), (1, 0.56)])
def test_activations_that_a_step_of_the_papers_net_keeps(K: int, share: float) -> None:
    kept = memory.saved_mb(NETS["paper"], K, torch.device("cpu"))
    assert kept["fast"] <= share * kept["published"]
    assert kept["checkpointed"] < kept["fast"] < kept["frozen"] < kept["published"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    small = ["--net", "digits", "--K", "4", "--rounds", "1", "--batch", "4", "--threads", "1"]
    step.main([*small, "--steps", "weights"])
    memory.main(["--net", "digits", "--K", "2", "--threads", "1"])
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    for row in ("| 4 | weights ", "| digits | 2 "):
        assert row in printed
    assert "GFLOP/s" in printed
