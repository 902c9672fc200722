"""What is measured by name: values by hand, a search that does not notice, and a stop that goes back."""

import hashlib
import io
import json
import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import nas.measures
import nas.search
import nas.trial
from nas.config import override
from nas.curvature import Hessian, Spectrum
from nas.data import Arrays, Data, load
from nas.early_stop import EigenvalueStop
from nas.gates import Gate
from nas.genotype import OPERATIONS, Cell, Genotype
from nas.measures import (
    EXTENTS,
    GROUPS,
    MEASURES,
    Snapshot,
    Values,
    View,
    catalogue,
    check_measures,
    columns_of,
    entropy,
    gini,
    measured,
    spelled_out,
)
from nas.metrics import FINAL, METRICS, supernet_quality
from nas.papers import PAPERS, on_digits, tiny
from nas.proxies import PROXIES, STATUSES
from nas.samplers import Gumbel
from nas.search import equal_batches
from nas.searchers import keep_likeliest
from nas.streams import generator
from nas.trial import Row, Trial, TrialRun, recorded_metrics
from tests.nas.searches import SMALL, images, view_of

CPU = torch.device("cpu")


def of(name: str, view: View) -> Values:
    return MEASURES[name].compute(view)


def set_rows(view: View, name: str, probabilities: list[list[float]]) -> None:
    """Make these the softmax of table `name`."""
    with torch.no_grad():
        view.state.arch.logits[name].copy_(torch.tensor(probabilities).clamp_min(1e-30).log())


# Descriptors


def test_entropy_and_gini_of_equal_shares_and_of_one_that_has_all() -> None:
    assert (entropy([0.25] * 4), gini([0.25] * 4)) == pytest.approx((1, 0))
    assert (entropy([0, 1, 0]), gini([0, 1, 0])) == pytest.approx((0, 1))
    assert gini([0.75, 0.25]) == pytest.approx(0.5), "the difference of two shares"


def test_descriptors_of_operations_by_hand() -> None:
    view = view_of()
    set_rows(view, "normal/op", [[0.4, 0.3, 0.2, 0.1]] * 5)
    set_rows(view, "reduce/op", [[0.0, 1.0, 0.0, 0.0]] * 4 + [[0.25] * 4])
    found = of("alphas", view)
    h = entropy([0.4, 0.3, 0.2, 0.1])
    assert found["alpha_entropy_normal"] == pytest.approx(h)
    assert found["alpha_entropy_reduce"] == pytest.approx(1 / 5)
    assert found["alpha_entropy_max"] == pytest.approx(1)
    assert found["alpha_entropy_ops"] == pytest.approx((5 * entropy([1 / 2, 1 / 3, 1 / 6]) + 1) / 10)
    assert found["none_mass"] == pytest.approx((5 * 0.4 + 0.25) / 10)
    far = math.dist([0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0]), math.dist([0.25] * 4, [1, 0, 0, 0])
    assert found["one_hot_distance"] == pytest.approx((5 * far[0] + far[1]) / 10)


def test_only_what_is_left_to_decide_is_described() -> None:
    kept = {
        name: table.keep(((1,), (1, 2), (1, 2), (1, 2), (1, 2))) if name.endswith("/op") else table
        for name, table in SMALL.choices.items()
    }
    view = view_of(choices=kept)
    set_rows(view, "normal/op", [[0.7, 0.1, 0.1, 0.1]] * 5)  # of which none and the pool are gone
    set_rows(view, "reduce/op", [[0.7, 0.1, 0.1, 0.1]] * 5)
    found = of("alphas", view)
    assert found["alpha_entropy_normal"] == pytest.approx(1)
    assert found["none_mass"] is None
    assert found["alpha_entropy_ops"] is None


def test_descriptors_of_edges_by_hand() -> None:
    view = view_of(edge_norm=True)
    for cell in ("normal", "reduce"):
        set_rows(view, f"{cell}/input", [[0.75, 0.25, 0.0], [0.6, 0.3, 0.1]])
    found = of("betas", view)
    assert found["beta_gini"] == pytest.approx((0.5 + gini([0.6, 0.3, 0.1])) / 2)
    assert found["beta_margin"] == pytest.approx(0.3 - 0.1), "between what a node keeps and what it drops"
    assert of("betas", view_of()) == {"beta_gini": None, "beta_margin": None}


def test_operations_of_the_genotype_add_up_to_its_edges() -> None:
    view = view_of()
    found = of("operations", view)
    assert set(found) <= set(MEASURES["operations"].columns)
    assert sum(value or 0 for value in found.values()) == 8
    assert found["skip_connect_normal"] == view.genotype.normal.skips


def test_gaps_are_held_out_minus_training() -> None:
    metrics: Values = {"valid_loss": 2.0, "train_loss": 1.5, "valid_error": 0.25, "train_error": 0.5}
    assert of("gaps", view_of(metrics=metrics)) == {"gap_loss": 0.5, "gap_error": -0.25}


def test_stability_is_against_the_epoch_before() -> None:
    view = view_of()
    assert set(of("stability", view).values()) == {None}
    now = {name: p.detach() for name, p in view.state.arch.probabilities().items()}
    same = of("stability", replace(view, history={0: Snapshot(view.genotype, now)}))
    assert list(same.values()) == [1, 1, 0, 1, None, 0]
    turned = {name: -p for name, p in now.items()}
    other = SMALL.sample(random.Random(1))
    against = of("stability", replace(view, history={0: Snapshot(other, turned)}))
    assert (against["stability_tau"], against["stability_top"]) == (-1, 0)
    assert against["stability_hamming"] is not None
    assert against["stability_hamming"] > 0


# Derivatives and perturbation


@pytest.mark.usefixtures("float64")
def test_alignment_is_the_cosine_of_two_gradients() -> None:
    view = view_of()
    slopes = []
    view.state.supernet.noise = replace(view.state.supernet.noise, skip_dropout=0.0, drop_path=0.0)
    logits = view.state.arch.parameters()
    for part in ("held_out", "weights"):
        xs, ys = images(part, 24)
        loss = F.cross_entropy(view.state.supernet(xs, view.gates()), ys)
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, logits)]))
    view.state.supernet.noise = replace(view.state.supernet.noise, skip_dropout=0.3, drop_path=0.3)
    found = of("alignment", view)
    assert found["alignment"] == pytest.approx(float(F.cosine_similarity(*slopes, dim=0)))
    assert found["alignment_norm"] == pytest.approx(float(slopes[0].norm()))
    assert found["alignment_max"] == pytest.approx(float(slopes[0].abs().max()))
    same = replace(view, batches=lambda part, size, most: view.batches("weights", size, most))
    assert of("alignment", same)["alignment"] == pytest.approx(1)


@pytest.mark.usefixtures("float64")
def test_the_eigenvalue_of_every_epoch_is_that_of_the_whole_matrix() -> None:
    view = view_of()
    whole = of("hessian", view)
    assert whole["hessian"] is not None
    assert of("eigenvalue", view)["eigenvalue"] == pytest.approx(whole["hessian"], rel=1e-3)
    quantiles = [whole[f"hessian_q{q}"] for q in ("05", "25", "50", "75", "95")]
    ordered = [whole["hessian_smallest"], *quantiles, whole["hessian"]]
    assert ordered == sorted(ordered, key=lambda value: value or 0)


@pytest.mark.usefixtures("float64")
def test_curvature_is_the_mean_over_held_out_batches_of_64() -> None:
    view = view_of(replace(SMALL, nodes=1), count=192)
    view.state.supernet.noise = replace(view.state.supernet.noise, skip_dropout=0.0, drop_path=0.0)
    xs, ys = images("held_out", 192)
    logits = [view.state.arch.logits[name] for name in ("normal/op", "reduce/op")]
    spectra = []
    for batch in zip(xs.split(64), ys.split(64), strict=True):
        loss = F.cross_entropy(view.state.supernet(batch[0], view.gates()), batch[1])
        spectra.append(torch.linalg.eigvalsh(Hessian(loss, logits).matrix()))
    view.state.supernet.noise = replace(view.state.supernet.noise, skip_dropout=0.3, drop_path=0.3)
    found = of("hessian", view)
    assert len(spectra) == 3
    for name, values in (
        ("hessian", [float(s[-1]) for s in spectra]),
        ("hessian_modulus", [float(s.abs().max()) for s in spectra]),
        ("hessian_trace", [float(s.sum()) for s in spectra]),
    ):
        assert found[name] == pytest.approx(sum(values) / 3)
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert found[f"{name}_low"] == pytest.approx(interval.low, rel=1e-4)
        assert found[f"{name}_high"] == pytest.approx(interval.high, rel=1e-4)
    assert of("eigenvalue", view)["eigenvalue"] == pytest.approx(found["hessian"], rel=1e-3)


def test_the_modulus_of_batches_of_opposite_sign_does_not_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([Spectrum(3.0, -1.0, 1.0, None, None), Spectrum(1.0, -3.1, 2.0, None, None)])
    monkeypatch.setattr(nas.measures, "hessians", lambda view, batches: [None, None])
    monkeypatch.setattr(nas.measures, "spectrum", lambda *_: next(given))
    assert of("hessian", view_of())["hessian_modulus"] == pytest.approx(3.05)


def test_a_batch_that_is_not_finite_leaves_no_number_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nas.measures, "largest_eigenvalues", lambda *_: [1.0, math.nan])
    found = measured(("eigenvalue", "hessian"), view_of(), every=True, last=False)
    assert found["eigenvalue_status"] == STATUSES.index("nan")
    assert [found[name] for name in MEASURES["eigenvalue"].columns] == [None] * 4


def test_a_measure_without_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(view: View) -> Values:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(MEASURES, "alignment", replace(MEASURES["alignment"], compute=fails))
    found = measured(("alignment", "alphas"), view_of(), every=True, last=False)
    assert found["alignment_status"] == STATUSES.index("error")
    assert [found[name] for name in MEASURES["alignment"].columns] == [None] * 3
    assert found["alpha_entropy_max"] is not None
    assert set(found) == set(columns_of(("alignment", "alphas")))


@pytest.mark.usefixtures("float64")
def test_gradients_of_operations_by_hand() -> None:
    view = view_of()
    supernet = view.state.supernet
    supernet.noise = replace(supernet.noise, skip_dropout=0.0, drop_path=0.0)
    xs, ys = images("weights", 24)
    own = [p for name, p in supernet.named_parameters() if ".weighted.sep_conv_3x3." in name]
    slopes = torch.autograd.grad(F.cross_entropy(supernet(xs, view.gates()), ys), own)
    flat = torch.cat([slope.flatten() for slope in slopes])
    found = of("gradients", view)
    assert found["gradient_sep_conv_3x3"] == pytest.approx(float(flat.norm()) / math.sqrt(len(flat)))
    assert set(found) == {"gradient_skip_connect", "gradient_sep_conv_3x3"}
    assert all(value is not None and value > 0 for value in found.values())


def test_the_cells_of_a_genotype_by_hand() -> None:
    # Node 3 is two edges from an input, by a skip (1) and the 3x3 convolution applied twice (5).
    nodes = ((("skip_connect", 0), ("max_pool_3x3", 1)), (("sep_conv_3x3", 2), ("skip_connect", 0)))
    free = ((("skip_connect", 0), ("skip_connect", 1)), (("max_pool_3x3", 0), ("max_pool_3x3", 1)))
    genotype = Genotype(Cell(nodes, (2, 3)), Cell(free, (2, 3)))
    found = of("cells", replace(view_of(), genotype=genotype))
    assert (found["parameter_free_normal"], found["parameter_free_reduce"]) == (3, 4)
    assert found["receptive_field_normal"] == 3 + 5, "the pool is the wider of the two ways into node 2"
    assert found["receptive_field_reduce"] == 3
    assert set(EXTENTS) == set(OPERATIONS) - {"none"}


def test_what_changed_in_five_epochs_and_since_the_first() -> None:
    view = view_of()
    now = {name: p.detach() for name, p in view.state.arch.probabilities().items()}
    for name in ("normal/op", "reduce/op"):
        set_rows(view, name, [[0.1, 0.7, 0.1, 0.1]] * 5)
    now = {name: p.detach() for name, p in view.state.arch.probabilities().items()}
    equal = {name: torch.full_like(p, 0.25) for name, p in now.items()}
    other = {name: p.clone() for name, p in now.items()}
    other["normal/op"][0] = torch.tensor([0.1, 0.1, 0.7, 0.1])  # and back again
    epochs = [equal, now, now, other, now, now]
    history = {epoch: Snapshot(view.genotype, p, 0.5) for epoch, p in enumerate(epochs)}
    found = of("stability", replace(view, history=history))
    assert found["stability_changed_5"] == pytest.approx(1 / 10)
    assert found["stability_top"] == 1
    assert found["alpha_entropy_drop"] == pytest.approx(1 - entropy([0.1, 0.7, 0.1, 0.1]))
    early = of("stability", replace(view, history={epoch: history[epoch] for epoch in range(4)}))
    assert early["stability_changed_5"] is None
    measured_now = of("eigenvalue", replace(view, history=history))
    assert measured_now["eigenvalue"] is not None
    assert measured_now["eigenvalue_ratio"] == pytest.approx(measured_now["eigenvalue"] / 0.5)


@pytest.mark.parametrize(
    ("images_", "size", "most", "expected"),
    [
        (192, 64, 3, [64] * 3),
        (500, 64, 3, [64] * 3),
        (143, 64, 3, [47] * 3),
        (100, 64, 3, [50] * 2),
        (65, 64, 1, [64]),
        (65, 64, 3, [32] * 2),
        (20, 64, 3, [20]),
        (1, 64, 3, []),
    ],
)
def test_batches_to_measure_by_are_equally_large(
    images_: int, size: int, most: int, expected: list[int]
) -> None:
    data = Data(arrays(), TRIAL.data, 0, CPU)
    data.parts = {**data.parts, "valid": torch.arange(images_) % 60}
    found = list(equal_batches(data, "valid", size, most, generator(0, "order")))
    assert [len(labels) for _, labels in found] == expected
    assert all(len(x) == len(labels) for x, labels in found)


@pytest.mark.parametrize("sampler", [None, Gumbel(hard=False)], ids=["softmax", "gumbel"])
def test_perturbation_is_the_rise_without_each_operation(sampler: Gumbel | None) -> None:
    view = view_of(sampler=sampler)
    gates, batches = view.gates(), list(view.batches("held_out", 128, 8))
    likely = view.state.arch.probabilities()
    drawn = [int(gate.weights[row, 1:].argmax()) for gate in gates.values() for row in range(5)]
    learned = [int(likely[name][row, 1:].argmax()) for name in gates for row in range(5)]
    assert (drawn == learned) == (sampler is None), "a draw has other likeliest operations than alpha"
    _, whole = supernet_quality(view.state, gates, batches)
    drops, agreed = [], []
    for name, gate in gates.items():
        for row in range(5):
            quality = []
            for option in (1, 2, 3):
                weights = gate.weights.detach().clone()
                weights[row, option] = 0
                loss, error = supernet_quality(
                    view.state, {**gates, name: Gate(weights, gate.active)}, batches
                )
                quality.append((error, loss))
            best = max(range(3), key=lambda i: quality[i])
            drops.append(quality[best][0] - whole)
            agreed.append(best == int(likely[name][row, 1:].argmax()))
    found = of("perturbation", view)
    assert found["perturbation"] == pytest.approx(sum(drops) / 10)
    assert found["perturbation_agreement"] == sum(agreed) / 10


@pytest.mark.parametrize("name", ["alignment", "eigenvalue", "hessian", "perturbation"])
def test_hard_gates_have_no_derivative_in_alpha(name: str) -> None:
    found = of(name, view_of(sampler=Gumbel(hard=True)))
    assert set(found) == set(MEASURES[name].columns)
    assert set(found.values()) == {None}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("sampler", [None, Gumbel(hard=False)], ids=["softmax", "gumbel"])
def test_measuring_leaves_the_search_bit_for_bit(name: str, sampler: Gumbel | None) -> None:
    metrics: Values = dict.fromkeys(("valid_loss", "train_loss", "valid_error", "train_error"), 0.5)
    space = replace(SMALL, nodes=1, ops=(*SMALL.ops, "noise"))
    view = view_of(space, edge_norm=True, sampler=sampler, metrics=metrics, count=8)
    state = view.state
    state.supernet.cells[1].eval()
    state.supernet.checkpoint_cells = True
    for parameter in (*state.supernet.parameters(), *state.arch.parameters()):
        parameter.grad = torch.randn_like(parameter, generator=None)
    held = {**state.supernet.state_dict(keep_vars=True), **state.arch.logits}
    copies = {key: value.clone() for key, value in held.items()}
    grads = [p.grad.clone() for p in held.values() if p.grad is not None]
    modes = [module.training for module in state.supernet.modules()]
    noise = state.supernet.noise
    assert noise.generator is not None
    streams = [torch.get_rng_state(), noise.generator.get_state(), state.draws.get_state()]
    first = of(name, view)
    assert of(name, view) == first, "the same draws at every call"
    now = {**state.supernet.state_dict(keep_vars=True), **state.arch.logits}
    assert all(now[key] is held[key] and torch.equal(now[key], copy) for key, copy in copies.items())
    after = [p.grad for p in held.values() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, grads, strict=True))
    assert all(p.requires_grad for p in (*state.supernet.parameters(), *state.arch.parameters()))
    assert [module.training for module in state.supernet.modules()] == modes
    assert state.supernet.noise is noise
    assert state.supernet.checkpoint_cells is True
    assert all(getattr(module, "track_running_stats", True) for module in state.supernet.modules())
    later = [torch.get_rng_state(), noise.generator.get_state(), state.draws.get_state()]
    assert all(torch.equal(a, b) for a, b in zip(streams, later, strict=True))


# Names


def test_groups_stand_for_their_members_once_and_in_order() -> None:
    assert spelled_out(("snip", "descriptors", "gaps")) == (*GROUPS["descriptors"], "snip")
    assert spelled_out(("proxies",)) == tuple(PROXIES)
    assert not set(MEASURES) & set(PROXIES)
    assert not (set(MEASURES) | set(PROXIES)) & set(GROUPS)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"measure: 'snpi' is not one of descriptors, proxies, alphas, .*snip"
    ):
        Trial(measure=("snpi",))
    check_measures((*GROUPS, *MEASURES, *PROXIES))


def test_columns_are_described_and_belong_to_one_measure() -> None:
    columns = columns_of(tuple(MEASURES))
    assert len(set(columns)) == len(columns)
    assert not set(columns) & set(METRICS)
    described = [metric for measure in MEASURES.values() for metric in measure.columns.values()]
    assert all(metric.unit and metric.meaning for metric in described)


def test_the_catalogue_tells_all_that_is_recorded() -> None:
    _, result = finished(replace(RANDOM, measure=("gaps", "snip")))
    told = catalogue(("gaps", "snip"))
    assert {name for name in result if name.startswith("proxy_")} == {
        name for name in told if name.startswith("proxy_")
    }
    assert set(told) >= {*METRICS, *columns_of(("gaps",))}
    assert told["gap_error"]["better"] == "lower"
    assert told["proxy_snip"]["better"] == "higher"
    assert set(catalogue(())) == {*METRICS, *FINAL}


def test_every_column_of_a_trial_is_described_and_every_description_is_of_one() -> None:
    everything = (*MEASURES, *PROXIES)
    trial = override(replace(TRIAL, measure=everything), {"method.stop": {}})
    rows, result = finished(trial)
    told = set(catalogue(everything, stops=True))
    recorded = {name for row in rows for name in row.metrics}
    recorded |= {name if name in told else name.removeprefix("search_") for name in result}
    absent = {f"{op}_{cell}" for op in missing_ops() for cell in ("normal", "reduce")}
    absent |= {f"gradient_{op}" for op in missing_ops()}
    assert recorded == told - absent
    assert {f"search_{name}" for name in absent} | set(result) >= set(recorded_metrics(trial))


def test_seconds_of_an_epoch_leave_out_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(view: View) -> Values:
        clock[0] += 5.0
        return {"gap_error": 0.0, "gap_loss": 0.0}

    def training(self: nas.search.SearchRun, *_: Any) -> Any:
        clock[0] += 2.0
        return train_epoch(self, *_)

    train_epoch = nas.search.SearchRun._train_epoch
    monkeypatch.setattr(nas.search.SearchRun, "_train_epoch", training)
    monkeypatch.setitem(MEASURES, "gaps", replace(MEASURES["gaps"], compute=slow))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    row = begun(replace(TRIAL, measure=("gaps", "alphas"))).step()
    assert (row.metrics["gaps_seconds"], row.metrics["alphas_seconds"]) == (5.0, 0.0)
    assert row.metrics["seconds"] == 2.0


def test_the_discretisation_gap_is_the_error_of_one_hot_gates_minus_that_of_soft_ones() -> None:
    run = begun(override(TRIAL, {"search.*.epochs": 1}))
    state = run.search.state
    assert state is not None
    row = run.step()
    assert row.genotype is not None
    gates = nas.search.one_hot_gates(state, row.genotype)
    _, derived = supernet_quality(state, gates, run.data.batches("valid", 128, order=None))
    error, gap = row.metrics["valid_error"], row.metrics["discretisation_gap"]
    assert error is not None
    assert gap == derived - error != 0


def test_a_measure_gives_its_columns_and_its_seconds() -> None:
    view = view_of()
    assert set(measured(("alphas", "snip"), view, every=True, last=False)) == set(columns_of(("alphas",)))
    assert measured(("hessian",), view, every=True, last=False) == {}, "only after a stage's last epoch"
    assert measured(("alignment",), view, every=False, last=False) == {}, "not due"
    assert set(measured(("alignment",), view, every=False, last=True)) == set(columns_of(("alignment",)))


# In a trial

SPACE = replace(SMALL, name="trial", nodes=1)
CHANGES: dict[str, Any] = {
    "space": SPACE,
    "data.limit": 60,
    "data.test_limit": 20,
    "search.*.channels": 4,
    "search.*.epochs": 2,
    "search.*.frozen_epochs": 0,
    "method.supernet.partial_channels": 1,
    "retrain.epochs": 2,
    "retrain.channels": 4,
}
TRIAL = override(on_digits(tiny(PAPERS["pc_darts"])), CHANGES)
RANDOM = override(
    on_digits(tiny(PAPERS["random"])),
    {k: v for k, v in CHANGES.items() if k.startswith(("d", "s", "r")) and not k.startswith("search")},
)
ALL = ("descriptors", "alignment", "eigenvalue", "hessian", "perturbation", "snip")


@cache
def arrays() -> Arrays:
    return load(TRIAL.data)


def begun(trial: Trial) -> TrialRun:
    return TrialRun(trial, Data(arrays(), trial.data, 0, CPU), CPU)


def finished(trial: Trial) -> tuple[list[Row], Values]:
    run, rows = begun(trial), []
    while not run.done:
        rows.append(run.step())
    assert run.result is not None
    return rows, run.result


def lasting(values: Values) -> Values:
    return {k: v for k, v in values.items() if not k.endswith(("seconds", "peak_memory_mb"))}


def test_a_measured_trial_is_the_trial_and_resumes_as_if_it_had_not_stopped() -> None:
    plain_rows, plain = finished(TRIAL)
    trial = replace(TRIAL, measure=ALL)
    assert trial.id != TRIAL.id
    rows, result = finished(trial)
    for row, bare in zip(rows, plain_rows, strict=True):
        assert row.genotype == bare.genotype
        assert lasting(row.metrics).items() >= lasting(bare.metrics).items()
    assert lasting(result).items() >= lasting(plain).items()
    first, second = rows[0].metrics, rows[1].metrics
    once = set(columns_of(("hessian", "perturbation")))
    offered = set(columns_of(ALL)) - {f"{op}_{cell}" for cell in ("normal", "reduce") for op in missing_ops()}
    assert set(first) == set(plain_rows[0].metrics) | offered - once
    assert set(second) == set(plain_rows[1].metrics) | offered
    assert result["search_eigenvalue"] == second["eigenvalue"]
    assert result["search_hessian_trace"] == second["hessian_trace"]
    assert {"proxy_snip", "proxy_snip_seconds", "proxy_params"} <= result.keys()
    assert result["proxy_params"] == pytest.approx(1e6 * (result["params_m"] or 0))
    # Stopped in its search, and in its retraining, with the proxies behind it.
    for epochs in (1, 3):
        stopped = begun(trial)
        for _ in range(epochs):
            stopped.step()
        buffer = io.BytesIO()
        torch.save(stopped.state_dict(), buffer)
        buffer.seek(0)
        again = begun(trial)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        while not again.done:
            row = again.step()
            expected = rows[row.epoch + (2 if row.stage == "retrain" else 0)]
            assert lasting(row.metrics) == lasting(expected.metrics)
        assert again.result is not None
        assert lasting(again.result) == lasting(result)


def test_checkpoints_that_knew_the_epoch_before_alone_are_read() -> None:
    trial = override(replace(TRIAL, measure=("stability",)), {"search.*.epochs": 3})
    run = begun(trial)
    run.step()
    run.step()
    held = run.state_dict()
    genotype, probabilities, _ = held["search"].pop("history")[1]
    held["search"]["before"] = {"genotype": genotype, "probabilities": probabilities}
    old = begun(trial)
    old.load_state_dict(held)
    found, expected = old.step().metrics, run.step().metrics
    assert found["stability_tau"] == expected["stability_tau"] is not None
    assert found["alpha_entropy_drop"] is None, "the first epoch is not known"
    assert expected["alpha_entropy_drop"] is not None


def test_curvature_is_of_the_same_images_after_every_epoch() -> None:
    def labels(run: TrialRun) -> list[list[int]]:
        assert run.search.state is not None
        view = run.search._view(run.search.state, SPACE.sample(random.Random(0)), {})
        return [labels.tolist() for _, labels in view.batches("held_out", 4, 3)]

    run = begun(TRIAL)
    first = labels(run)
    run.step()
    assert labels(run) == first


def missing_ops() -> set[str]:
    return {
        name.removesuffix("_normal") for name in MEASURES["operations"].columns if "normal" in name
    } - set(SPACE.ops)


def test_proxies_are_of_three_batches_of_64_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = replace(override(RANDOM, {"data.limit": 300}), measure=("snip",))
    data = Data(load(trial.data), trial.data, 0, CPU)
    given: list[Any] = []
    monkeypatch.setattr(
        nas.trial, "evaluate", lambda names, build, batches, seed: given.extend(batches) or {}
    )
    TrialRun(trial, data, CPU).scored(SPACE.sample(random.Random(0)), trial.measure)
    served = data.batches("train", 64, order=generator(0, "order", "proxy"))
    assert len(given) == 3
    for (x, y), (images_, labels) in zip(given, served, strict=False):
        assert torch.equal(x, images_)
        assert torch.equal(y, labels)


def test_a_trial_without_search_has_proxies_too() -> None:
    rows, result = finished(replace(RANDOM, measure=("descriptors", "synflow")))
    assert {row.stage for row in rows} == {"retrain"}
    assert result["proxy_synflow"] is not None
    assert "search_gap_error" not in result


def test_what_is_off_is_no_part_of_the_name_of_a_trial() -> None:
    plain = TRIAL.to_dict()
    assert Trial.from_dict(json.loads(json.dumps(plain))) == TRIAL
    del plain["measure"], plain["measure_every"], plain["method"]["stop"]  # as records of before have it
    assert Trial.from_dict(plain) == TRIAL
    assert hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest().startswith(TRIAL.id)
    stopping = replace(TRIAL, method=replace(TRIAL.method, stop=EigenvalueStop()))
    assert len({TRIAL.id, stopping.id, replace(TRIAL, measure=("snip",)).id}) == 3


def test_what_runs_the_supernet_is_measured_every_few_epochs_and_after_the_last() -> None:
    trial = override(replace(TRIAL, measure=("alphas", "alignment"), measure_every=2), {"search.*.epochs": 4})
    rows, result = finished(trial)
    search = [row.metrics for row in rows if row.stage == "search"]
    assert ["alignment" in metrics for metrics in search] == [True, False, True, True]
    assert all("alpha_entropy_max" in metrics for metrics in search), "what costs nothing is always there"
    assert result["search_alignment"] == search[-1]["alignment"]
    every, _ = finished(replace(trial, measure_every=1))
    for row, other in zip(rows, every, strict=True):
        assert lasting(row.metrics).items() <= lasting(other.metrics).items(), "a cadence changes no value"
    assert replace(trial, measure_every=1).id != trial.id
    with pytest.raises(ValueError, match="measure_every=0 must be at least 1"):
        replace(trial, measure_every=0)


# Stopping early


STOP = EigenvalueStop(window=1, delta=2, factor=1.5, start=0, every=1)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues 1, 1, 1, 2, 2, ...: the rule goes back to epoch 1 after epoch 3."""
    seen: list[int] = []

    def eigenvalues(view: View, batches: int) -> list[float]:
        seen.append(batches)
        return [1.0 if len(seen) <= 3 else 2.0] * batches

    monkeypatch.setattr(nas.search, "largest_eigenvalues", eigenvalues)


def stopping(**changes: Any) -> Trial:
    trial = override(TRIAL, {"search.*.epochs": 6, "method.stop": STOP, "retrain.epochs": 1})
    return override(trial, changes)


@pytest.mark.usefixtures("growing")
def test_a_stopped_search_gives_what_it_stood_at_then() -> None:
    unstopped, _ = finished(override(stopping(), {"method.stop": None, "search.*.epochs": 6}))
    rows, result = finished(stopping())
    searched = [row for row in rows if row.stage == "search"]
    assert len(searched) == 4
    assert searched[-1].stage_end
    # All of the result is of the epoch that the search went back to; one-hot gates on its weights are past.
    for name in ("valid_error", "valid_loss", "train_error", "alpha_entropy", "alpha_margin"):
        assert result[f"search_{name}"] == unstopped[1].metrics[name]
        assert name.endswith("error") or result[f"search_{name}"] != searched[-1].metrics[name]
    assert result["discretisation_gap"] is None
    assert searched[-1].metrics["discretisation_gap"] is None
    assert searched[-1].genotype == unstopped[1].genotype
    assert (result["stop_epoch"], result["stop_back_to"]) == (3, 1)
    assert searched[-1].metrics["skips"] == result["skips"] == float(unstopped[1].genotype.normal.skips)  # type: ignore[union-attr]
    assert [row.metrics["stop_eigenvalue"] for row in searched] == [1, 1, 1, 2]
    assert [row.metrics["stop_epoch"] for row in searched] == [None, None, None, 3]
    # Until then the search is the one that has no rule.
    for row, bare in zip(searched[:3], unstopped, strict=False):
        assert lasting(row.metrics).items() >= lasting(bare.metrics).items()


def test_a_rule_that_never_fires_changes_nothing_but_its_columns() -> None:
    plain_rows, plain = finished(TRIAL)
    rows, result = finished(override(TRIAL, {"method.stop": {}}))
    assert (result["stop_epoch"], result["stop_back_to"]) == (None, None)
    assert lasting(result).items() >= lasting(plain).items()
    assert [row.genotype for row in rows] == [row.genotype for row in plain_rows]
    rows, _ = finished(override(TRIAL, {"method.stop": {}, "search.*.epochs": 4}))
    seen = [row.metrics["stop_eigenvalue"] is not None for row in rows[:4]]
    assert seen == [True, False, True, True], "every other epoch, and the last"


@pytest.mark.usefixtures("growing")
def test_a_stopped_stage_hands_on_what_it_goes_back_to() -> None:
    stage = replace(stopping().search[0], keep=2)
    run = begun(replace(stopping(), search=(stage, replace(stage, keep=None))))
    seen: list[dict[str, torch.Tensor]] = []
    while run.search.part == 0:
        state = run.search.state
        run.step()
        assert state is not None
        seen.append({name: p.detach() for name, p in state.arch.probabilities().items()})
    assert len(seen) == 4
    assert run.search.watched == [], "the next stage starts anew"
    for name in ("normal/op", "reduce/op"):
        expected = keep_likeliest(SPACE.choices[name], seen[1][name], 2)
        assert run.search.choices[name] == expected


@pytest.mark.usefixtures("growing")
def test_a_search_that_watches_resumes_with_what_it_saw() -> None:
    run = begun(stopping())
    for _ in range(3):
        run.step()
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    buffer.seek(0)
    again = begun(stopping())
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert [one.eigenvalue for one in again.search.watched] == [1, 1, 1]
    row = again.step()
    assert (row.metrics["stop_epoch"], row.stage_end) == (3, True)
    # A checkpoint of before has no metrics of what was watched, and so the result has none.
    held = run.state_dict()
    held["search"]["watched"] = [entry[:2] for entry in held["search"]["watched"]]
    old = begun(stopping())
    old.load_state_dict(held)
    while not old.done:
        old.step()
    assert old.result is not None
    assert (old.result["stop_back_to"], old.result["search_valid_error"]) == (1, None)
    while not again.done:
        again.step()
    assert again.result is not None
    assert again.result["search_valid_error"] is not None
