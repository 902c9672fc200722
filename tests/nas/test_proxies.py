"""Zero-cost proxies: exact identities, and a network that is bit for bit what it was."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas import proxies
from nas.costs import network_cost
from nas.network import Network
from nas.proxies import PROXIES, STATUSES, Subject, evaluate
from nas.spaces.cell import DARTS_OPS, CellSpace
from nas.state import Batch
from nas.streams import generator, seeded

SPACE = CellSpace(nodes=2, ops=("noise", *DARTS_OPS))
DATA_FREE = ("l2_norm", "params", "madds", "synflow", "zen")


def network(seed: int = 0, **options: bool) -> Network:
    genotype = CellSpace(nodes=2).sample(random.Random(seed))
    with seeded(seed, "init"):
        return Network(genotype, channels=4, cells=3, classes=3, channels_in=1, **options)


def batch(count: int = 16) -> Batch:
    images = torch.randn(count, 1, 8, 8, generator=generator(0, "images"), dtype=torch.float64)
    return images.to(torch.get_default_dtype()), torch.arange(count) % 3


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def drawn(*shape: int, name: str = "weights") -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *shape), dtype=torch.float64)


# Nothing of the network changes


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_leaves_the_network_and_every_generator_bit_for_bit(name: str) -> None:
    genotype = SPACE.sample(random.Random(5))
    assert "noise" in str(genotype)
    net = Network(genotype, channels=4, cells=3, classes=3, channels_in=1, auxiliary=True)
    net.drop_path, net.generator = 0.5, generator(0, "drop_path")
    net.checkpoint_cells = True
    net.eval()
    net.cells[1].train()
    images, labels = batch()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = {key: (value, value.clone()) for key, value in net.state_dict(keep_vars=True).items()}
    grads = [(p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None]
    modes = [module.training for module in net.modules()]
    streams = [torch.get_rng_state(), net.generator.get_state()]
    first = PROXIES[name].score(Subject(net), (images, labels))
    again = PROXIES[name].score(Subject(net), (images, labels))
    assert first == again or math.isnan(first)
    now = net.state_dict(keep_vars=True)
    assert list(now) == list(held)
    assert all(now[key] is value and torch.equal(value, copy) for key, (value, copy) in held.items())
    after = [p.grad for p in net.parameters()]
    assert all(a is grad and torch.equal(grad, copy) for a, (grad, copy) in zip(after, grads, strict=True))
    assert all(p.requires_grad for p in net.parameters())
    assert [module.training for module in net.modules()] == modes
    assert (net.drop_path, net.checkpoint_cells) == (0.5, True)
    assert net.auxiliary is not None
    after_streams = [torch.get_rng_state(), net.generator.get_state()]
    assert all(torch.equal(a, b) for a, b in zip(streams, after_streams, strict=True))
    assert all(not module._forward_hooks for module in net.modules())
    assert all(getattr(module, "generator", None) in (None, net.generator) for module in net.modules())


def test_the_auxiliary_head_and_drop_path_have_no_say() -> None:
    net = network()
    plain = [PROXIES[name].score(Subject(net), batch()) for name in ("snip", "params", "l2_norm")]
    net.drop_path, net.generator = 0.9, generator(0, "drop_path")
    net.auxiliary = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert [PROXIES[name].score(Subject(net), batch()) for name in ("snip", "params", "l2_norm")] == plain


# Identities


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in PROXIES if name not in DATA_FREE])
def test_the_order_of_images_says_nothing(name: str) -> None:
    images, labels = batch(12)
    order = torch.randperm(12, generator=generator(0, "order"))
    one, other = (
        PROXIES[name].score(Subject(network()), b) for b in ((images, labels), (images[order], labels[order]))
    )
    assert other == pytest.approx(one, rel=1e-8)


@pytest.mark.parametrize("name", DATA_FREE)
def test_proxies_without_data_see_only_the_shape_of_images(name: str) -> None:
    images, labels = batch()
    one, other = (PROXIES[name].score(Subject(network()), (x, labels)) for x in (images, images * 3 + 1))
    assert one == other


def test_synflow_of_a_chain_of_linear_maps_is_its_number_times_the_flow() -> None:
    weights = [drawn(7, 6), drawn(5, 7), drawn(4, 5)]
    flow = weights[2].abs() @ weights[1].abs() @ weights[0].abs()
    found = proxies.synflow_of(Subject(chain(*map(linear, weights))), drawn(1, 1, 2, 3))
    assert found == pytest.approx(3 * float(flow.sum()), rel=1e-12)
    assert proxies.synflow(Subject(chain(*map(linear, weights))), (drawn(2, 1, 2, 3), torch.zeros(2))) == (
        pytest.approx(math.log(3 * float(flow.sum())))
    )


def test_a_network_without_flow_has_no_synflow() -> None:
    assert proxies.synflow(
        Subject(chain(linear(torch.zeros(2, 4)))), (drawn(2, 1, 2, 2), torch.zeros(2))
    ) == (-math.inf)


def test_batch_norm_takes_no_part_in_synflow() -> None:
    net = network()
    before = proxies.synflow(Subject(net), batch())
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(-7)
                module.running_var.add_(5)  # type: ignore[union-attr]
    assert proxies.synflow(Subject(net), batch()) == before


def test_snip_is_at_least_plain_and_both_are_sums_of_the_same_terms() -> None:
    net, (images, labels) = network(), batch()
    F.cross_entropy(net.train()(images)[0], labels).backward()  # type: ignore[no-untyped-call]
    layers = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    terms = [weight.detach() * weight.grad for weight in layers if weight.grad is not None]
    norms = [float(weight.grad.norm()) for weight in layers if weight.grad is not None]
    plain, snip = (score(Subject(net), batch()) for score in (proxies.plain, proxies.snip))
    assert plain == pytest.approx(sum(float(term.sum()) for term in terms), rel=1e-4)
    assert snip == pytest.approx(sum(float(term.abs().sum()) for term in terms), rel=1e-4)
    assert snip >= abs(plain)
    assert proxies.grad_norm(Subject(net), batch()) == pytest.approx(sum(norms), rel=1e-4)


def test_grasp_of_a_quadratic_loss() -> None:
    matrix = drawn(6, 6)
    matrix = matrix + matrix.T
    theta = drawn(6).requires_grad_()
    expected = -float(theta.detach() @ matrix @ matrix @ theta.detach())
    assert proxies.grasp_of(theta @ matrix @ theta / 2, [theta]) == pytest.approx(expected, rel=1e-12)


def test_fisher_of_one_linear_layer_by_hand() -> None:
    weight, (images, labels) = drawn(3, 4), (drawn(5, 1, 2, 2), torch.arange(5) % 3)
    logits = images.flatten(1) @ weight.T
    slope = (logits.softmax(dim=1) - F.one_hot(labels, 3)) / 5
    expected = 0.5 * float((logits * slope).square().mean(dim=0).sum())
    assert proxies.fisher(Subject(chain(linear(weight))), (images, labels)) == pytest.approx(expected)


def test_fisher_sums_pixels_before_it_squares() -> None:
    layer, images = nn.Conv2d(1, 2, 1, bias=False), torch.ones(2, 1, 2, 2)
    net, labels = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.tensor([0, 1])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
    out = torch.tensor([1.0, -2.0])  # of every pixel; the gradient of each of 4 is a quarter of the logit's
    slope = (out.softmax(dim=0) - torch.eye(2)) / 2
    expected = 0.5 * float((out * slope).square().mean(dim=0).sum())
    assert proxies.fisher(Subject(net), (images, labels)) == pytest.approx(expected)


def test_jacob_cov_of_orthogonal_rows_without_mean() -> None:
    rows = torch.zeros(64, 128, dtype=torch.float64)
    for i in range(64):
        rows[i, 2 * i], rows[i, 2 * i + 1] = 1 + i, -1 - i
    assert proxies.jacob_cov_of(rows) == pytest.approx(-64.0000000032, abs=1e-9)


def test_a_constant_jacobian_row_has_no_correlation() -> None:
    rows = drawn(4, 10)
    rows[2] = 3.0
    assert math.isnan(proxies.jacob_cov_of(rows))


def test_the_jacobian_is_that_of_the_sum_of_the_logits() -> None:
    weight = drawn(3, 4)
    rows = proxies.jacobian(Subject(chain(linear(weight))), (drawn(5, 1, 2, 2), torch.zeros(5)))
    torch.testing.assert_close(rows, weight.sum(dim=0).expand(5, 4))


def test_the_jacobian_takes_the_batchs_statistics_as_constants() -> None:
    with seeded(0, "net"):
        conv, norm, head = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Linear(1, 2)
    net = nn.Sequential(conv, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    images = drawn(6, 1, 4, 4)
    weight, gamma = conv.weight.item(), norm.weight.item()
    deviation = math.sqrt(float((images * weight).var(unbiased=False)) + norm.eps)
    rows = proxies.jacobian(Subject(net), (images, torch.zeros(6)))
    expected = head.weight.sum().item() * gamma * weight / deviation / 16
    torch.testing.assert_close(rows, torch.full((6, 16), expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_networks_that_end_in_batch_norm_have_a_jacobian(seed: int) -> None:
    rows = proxies.jacobian(Subject(network(seed)), batch())
    assert float(rows.norm(dim=1).min()) > 1e-3


def test_naswot_by_hand() -> None:
    codes = [torch.tensor([[1, 1, 0], [0, 1, 0]]).bool(), torch.tensor([[1], [0]]).bool()]
    kernels = [proxies.alike(code) for code in codes]
    assert proxies.naswot_of(kernels) == pytest.approx(math.log(4 * 4 - 2 * 2)), "2 of 4 units alike"
    assert math.isnan(proxies.naswot_of([]))


@pytest.mark.parametrize("count", [16, 64])
def test_two_identical_images_are_told_apart_by_nothing(count: int) -> None:
    images, labels = batch(count)
    images[3] = images[7]
    assert proxies.naswot(Subject(network()), (images, labels)) == -math.inf
    codes = torch.rand(count, 997, generator=generator(0, "codes")) > 0.5
    codes[3] = codes[7]  # of 64 images a determinant alone would be rounding, and so finite
    assert proxies.naswot_of([proxies.alike(codes)]) == -math.inf


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, Tensor.relu_])
def test_every_form_of_relu_is_seen_once(relu: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 30)

        def forward(self, x: Tensor) -> Tensor:
            return relu(self.layer(x.flatten(1)))

    with seeded(0, "net"):
        net = Net()
    images, _ = batch(3)
    images = images[:, :, :2, :2]
    code = net.layer(images.flatten(1)) > 0
    expected = proxies.naswot_of([proxies.alike(code)])
    assert proxies.naswot(Subject(net), (images, torch.zeros(3))) == pytest.approx(expected)


def test_zen_of_a_convolution_is_that_of_its_features() -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = proxies.zen(Subject(net, seed=4), batch(6))
    total = 0.0
    for repeat in range(proxies.ZEN_REPEATS):
        draws = generator(4, "proxy", "zen", repeat)
        weight = torch.randn(2, 1, 1, 1, generator=draws)
        torch.randn(6, 1, 8, 8, generator=draws)
        noise = torch.randn(6, 1, 8, 8, generator=draws)
        total += math.log(0.01 * float(weight.abs().sum() * noise.abs().flatten(1).sum(dim=1).mean()))
    assert found == pytest.approx(total / proxies.ZEN_REPEATS, rel=1e-4)


def test_zen_adds_the_scale_that_batch_norm_takes_away() -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False)
    normed = nn.Sequential(conv, nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    norm = nn.BatchNorm2d(2, affine=False)
    total = 0.0
    for repeat in range(proxies.ZEN_REPEATS):
        draws = generator(0, "proxy", "zen", repeat)
        weight = torch.randn(2, 1, 1, 1, generator=draws)
        images, noise = (torch.randn(64, 1, 8, 8, generator=draws) for _ in range(2))
        clean, moved = (F.conv2d(x, weight) for x in (images, images + 0.01 * noise))
        change = norm.train()(clean) - norm(moved)
        variance = (clean.var(dim=(0, 2, 3), unbiased=False)).mean()
        total += math.log(change.abs().flatten(1).sum(dim=1).mean()) + math.log(variance) / 2
    other = proxies.zen(Subject(normed), batch(64))
    assert other == pytest.approx(total / proxies.ZEN_REPEATS, rel=1e-4)
    with torch.no_grad():
        normed[1].weight.fill_(100.0)  # type: ignore[union-attr, operator]
        normed[1].running_var.fill_(9.0)  # type: ignore[union-attr, operator]
    assert proxies.zen(Subject(normed), batch(64)) == other


def test_epe_nas_by_hand() -> None:
    rows = torch.tensor([[1.0, -1, 0, 0], [1, -1, 0, 0], [0, 0, 1, -1], [1, 0, -1, 0]]).double()
    labels = torch.tensor([0, 0, 1, 2])
    expected = abs(4 * math.log(1 + 1e-5))  # classes 1 and 2 have one image each
    assert proxies.epe_nas_of(rows, labels) == pytest.approx(expected)
    labels = torch.tensor([0, 1, 0, 1])  # correlations 0 and 1/2
    zero, half = 2 * math.log(1e-5), 2 * math.log(0.5 + 1e-5)
    diagonal = 2 * math.log(1 + 1e-5)
    assert proxies.epe_nas_of(rows, labels) == pytest.approx(abs(zero + diagonal) + abs(half + diagonal))
    assert math.isnan(proxies.epe_nas_of(rows, torch.arange(4)))


def test_above_a_hundred_classes_epe_nas_is_the_mean_difference() -> None:
    rows = drawn(202, 10)
    labels = torch.arange(202) // 2
    sums = []
    for label in range(101):
        correlation = abs(float(torch.corrcoef(rows[2 * label : 2 * label + 2])[0, 1]))
        sums.append(2 * math.log(correlation + 1e-5) + 2 * math.log(1 + 1e-5))
    pairs = [abs(a - b) for i, a in enumerate(sums) for b in sums[:i]]
    assert proxies.epe_nas_of(rows, labels) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("seed", range(5))
def test_size_by_counting_is_size_by_formula(seed: int) -> None:
    genotype = CellSpace(nodes=2).sample(random.Random(seed))
    cost = network_cost(genotype, channels=4, cells=3, classes=3, image_size=8, channels_in=1)
    subject = Subject(network(seed, auxiliary=True))
    assert proxies.params(subject, batch()) == cost.params
    assert proxies.madds(subject, batch()) == cost.madds


# Columns


def test_a_value_is_the_mean_over_initialisations_and_batches() -> None:
    batches = [batch(8), (batch(16)[0][8:], batch(16)[1][8:])]
    found = evaluate(["snip", "synflow"], network, batches, 0)
    values = [proxies.snip(Subject(network(seed)), b) for seed in range(3) for b in batches]
    assert found["proxy_snip"] == pytest.approx(sum(values) / 6)
    assert found["proxy_snip_sd"] == pytest.approx(float(torch.tensor(values).double().std()))
    flows = [proxies.synflow(Subject(network(seed)), batches[0]) for seed in range(3)]
    assert found["proxy_synflow"] == pytest.approx(sum(flows) / 3)
    assert found["proxy_snip_status"] == STATUSES.index("ok")


def test_no_proxy_comes_without_the_baselines() -> None:
    found = evaluate(["snip"], network, [batch(4)], 0)
    parts = ("", "_sd", "_seconds", "_status")
    assert set(found) == {f"proxy_{name}{part}" for name in (*proxies.BASELINES, "snip") for part in parts}
    assert evaluate([], network, [batch(4)], 0) == {}


def test_what_has_no_value_says_why(caplog: pytest.LogCaptureFixture) -> None:
    images, _ = batch(4)
    images[1] = images[0]
    found = evaluate(["naswot", "epe_nas"], network, [(images, torch.arange(4) % 3)], 0)
    assert (found["proxy_naswot"], found["proxy_naswot_status"]) == (None, STATUSES.index("inf"))
    found = evaluate(["epe_nas"], network, [(images, torch.arange(4))], 0)
    assert (found["proxy_epe_nas"], found["proxy_epe_nas_status"]) == (None, STATUSES.index("nan"))
    two_channels = images.expand(4, 2, 8, 8)
    found = evaluate(["snip"], network, [(two_channels, torch.arange(4) % 3)], 0)
    assert (found["proxy_snip"], found["proxy_snip_status"]) == (None, STATUSES.index("error"))
    assert "proxy snip failed" in caplog.text


def test_nothing_to_score_by_is_an_error_and_not_a_score() -> None:
    found = evaluate(["snip", "synflow"], network, [], 0)
    for name in ("snip", "synflow", "params"):
        assert (found[f"proxy_{name}"], found[f"proxy_{name}_status"]) == (None, STATUSES.index("error"))


@pytest.mark.parametrize(
    ("scores", "status"),
    [
        ([1.0, math.nan], "nan"),
        ([math.inf, math.nan], "nan"),
        ([1.0, -math.inf], "inf"),
        ([1.5e308, 1.5e308], "error"),
        ([1.0, 2.0], "ok"),
    ],
)
def test_the_status_says_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, scores: list[float], status: str
) -> None:
    given = iter(scores * 3)
    monkeypatch.setitem(proxies.PROXIES, "snip", replace(PROXIES["snip"], score=lambda *_: next(given)))
    found = evaluate(["snip"], network, [batch(4)] * 2, 0)
    assert found["proxy_snip_status"] == STATUSES.index(status)
    assert found["proxy_snip"] == (1.5 if status == "ok" else None)


@pytest.mark.parametrize("name", ["synflow", "zen"])
def test_a_network_that_is_not_a_number_has_no_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "synflow_of", lambda *_: math.nan)
    monkeypatch.setattr(Subject, "logits", lambda self, images, *_: images.flatten(1) * math.nan)
    found = evaluate([name], network, [batch(4)], 0)
    assert (found[f"proxy_{name}"], found[f"proxy_{name}_status"]) == (None, STATUSES.index("nan"))


def test_a_sum_that_overflows_costs_its_proxy_and_not_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(subject: Subject, batch: Batch) -> float:
        return proxies._total(torch.tensor(1.7e308, dtype=torch.float64) for _ in range(2))

    monkeypatch.setitem(proxies.PROXIES, "snip", replace(PROXIES["snip"], score=overflow))
    found = evaluate(["snip", "plain"], network, [batch(4)], 0)
    assert (found["proxy_snip"], found["proxy_snip_status"]) == (None, STATUSES.index("error"))
    assert found["proxy_plain_status"] == STATUSES.index("ok")


def test_jacob_cov_is_of_at_most_half_as_many_images_as_an_image_has_values() -> None:
    subject, (images, labels) = Subject(network()), batch(64)
    rows = proxies.jacobian(subject, (images[:32], labels[:32]))
    found = proxies.jacob_cov(subject, (images, labels))
    assert found == proxies.jacob_cov_of(rows), "images of 8 x 8 have 64 values"
    # Of 64 rows centred over 64 values one eigenvalue is 0, and the score 1 / k whatever the network.
    assert proxies.jacob_cov_of(proxies.jacobian(subject, (images, labels))) < -0.9 / proxies.EPSILON
    assert found > -0.9 / proxies.EPSILON


def test_proxies_run_in_training_mode_whatever_the_mode_of_the_network() -> None:
    net, (images, labels) = network(), batch()
    modes = []
    net.stem0.register_forward_hook(lambda module, inputs, out: modes.append(module.training))
    net.eval()
    score = proxies.snip(Subject(net), (images, labels))
    assert modes == [True]
    assert proxies.snip(Subject(net.train()), (images, labels)) == score


def test_the_seconds_of_a_proxy_are_those_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def score(subject: Subject, batch: Batch) -> float:
        clock[0] += 2.0
        return 1.0

    monkeypatch.setattr(proxies.time, "perf_counter", lambda: clock[0])
    monkeypatch.setitem(proxies.PROXIES, "snip", replace(PROXIES["snip"], score=score))
    found = evaluate(["snip"], network, [batch(4)] * 2, 0)
    assert (found["proxy_snip_seconds"], found["proxy_params_seconds"]) == (12.0, 0.0)


def test_every_proxy_says_its_unit_and_direction() -> None:
    assert all(proxy.unit and proxy.meaning and proxy.better == "higher" for proxy in PROXIES.values())
