"""The forms that the retraining benchmark times compute one and the same step."""

import pytest
import torch

from benchmarks.retrain import OURS, forms, made_up, main, new_run

CPU = torch.device("cpu")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("genotype", ["PC_DARTS_cifar", "DARTS_V2", "GDAS_F1", "AmoebaNet"])
def test_all_forms_take_the_same_steps(genotype: str) -> None:
    run = new_run(genotype, cells=4, channels=4, batch=4, device=CPU)
    batch = made_up(4, CPU)
    found = forms(run)
    for form in found.values():
        form.step(batch)
    networks = [form.network for name, form in found.items() if name != OURS]
    assert len({id(network) for network in networks}) == 4
    weights = dict(run.network.named_parameters())
    # Scale-invariant weights (those before batch norm) have gradients near 0 along themselves, hence atol.
    for network in networks:
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(parameter, weights[name], rtol=1e-9, atol=1e-10)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(buffer, run.network.get_buffer(name), rtol=1e-10, atol=1e-12)


def test_sharing_relus_keeps_less() -> None:
    run = new_run("PC_DARTS_cifar", cells=4, channels=8, batch=4, device=CPU)
    saved = {name: form.saved_bytes(made_up(4, CPU)) for name, form in forms(run).items()}
    assert saved[OURS] < 0.85 * saved["plain"]


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--cells", "3", "--channels", "4", "--batch", "2", "--rounds", "1"])
    assert OURS in capsys.readouterr().out
