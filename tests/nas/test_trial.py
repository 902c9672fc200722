"""The main path on a few digits: what a trial depends on, stopping and resuming, limits between methods."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import nas.search
import nas.trial
from nas.arch_updates import Bilevel
from nas.config import override
from nas.data import Arrays, Augment, Data, DataConfig, load
from nas.genotype import Genotype
from nas.methods import Method
from nas.metrics import METRICS
from nas.papers import PAPERS
from nas.samplers import Gumbel, init_arch
from nas.schedule import Constant, SkipDropout
from nas.search import SearchStage
from nas.searchers import Argmax, Given, keep_likeliest
from nas.spaces.cell import CELL_TYPES, CellSpace
from nas.streams import generator
from nas.trial import Row, Seeds, Trial, TrialRun, run_trial

CPU = torch.device("cpu")
DATA = DataConfig(limit=120, test_limit=60)
"""48 images for weights, 48 for the architecture, 24 for validation, 60 for the test."""
MEASURED = {"seconds", "peak_memory_mb", "search_seconds", "retrain_seconds", "search_peak_memory_mb"}
MEASURED |= {"discretisation_gap_seconds"}
"""Metrics of the machine rather than of the trial."""


def tiny(name: str, changes: dict[str, Any] | None = None) -> Trial:
    """A paper's trial of seconds: its method, schedules and number of stages."""
    paper = PAPERS[name]
    search = tuple(
        replace(
            stage,
            epochs=2,
            frozen_epochs=min(1, stage.frozen_epochs),
            cells=3,
            channels=4,
            batch_size=24,
            skip_dropout=replace(stage.skip_dropout, frozen_epochs=1)
            if isinstance(stage.skip_dropout, SkipDropout)
            else stage.skip_dropout,
            augment=Augment(pad=1),
        )
        for stage in paper.search
    )
    retrain = replace(
        paper.retrain,
        epochs=2,
        cells=3,
        channels=4,
        batch_size=32,
        auxiliary_weight=0.0,
        augment=Augment(pad=1, cutout=2),
    )
    trial = Trial(replace(paper.space, nodes=2), DATA, paper.method, search, retrain)
    return override(trial, changes or {})


def all_random() -> Trial:
    """Every draw at once: sampled gates, masks, the operation `noise`, dropout after skips, drop-path."""
    space = CellSpace(
        name="noisy", nodes=2, ops=("none", "skip_connect", "noise", "max_pool_3x3", "sep_conv_3x3")
    )
    changes = {
        "space": space,
        "method.supernet.channel_mix": "mask",
        "method.sampler": Gumbel(hard=False),
        "search.*.skip_dropout": Constant(0.3),
        "search.*.drop_path": Constant(0.3),
        "retrain.drop_path": Constant(0.3),
    }
    return tiny("pc_darts", changes)


TRIALS = {name: tiny(name) for name in ("darts_1st", "darts_2nd", "pc_darts", "p_darts", "gdas", "random")}
TRIALS["all random"] = all_random()


@cache
def arrays(config: DataConfig) -> Arrays:
    return load(config)


def fresh(trial: Trial) -> TrialRun:
    return TrialRun(trial, Data(arrays(trial.data), trial.data, trial.seeds.split, CPU), CPU)


@dataclass(frozen=True)
class Outcome:
    """What a trial said and gave, as text, so that equal means equal to the last bit."""

    rows: tuple[str, ...]
    result: str

    @property
    def search(self) -> tuple[str, ...]:
        return tuple(row for row in self.rows if row.startswith('["search"'))

    @property
    def retrain(self) -> tuple[str, ...]:
        return tuple(row for row in self.rows if row.startswith('["retrain"'))


def facts(metrics: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if name not in MEASURED}


def text(row: Row) -> str:
    genotype = str(row.genotype) if row.genotype else None
    return json.dumps([row.stage, row.part, row.epoch, row.stage_end, genotype, facts(row.metrics)])


def outcome_of(genotype: Genotype, metrics: dict[str, float | None], rows: list[str]) -> Outcome:
    return Outcome(tuple(rows), json.dumps([str(genotype), facts(metrics)]))


def run(trial: Trial) -> Outcome:
    rows: list[str] = []
    result = run_trial(trial, lambda row: rows.append(text(row)), arrays=arrays(trial.data))
    assert result.trial_id == trial.id
    return outcome_of(result.genotype, result.metrics, rows)


alone = cache(run)
"""The uninterrupted run of a trial, run once for all tests."""


def rows_of(trial: Trial) -> list[Row]:
    rows: list[Row] = []
    run_trial(trial, rows.append, arrays=arrays(trial.data))
    return rows


# What the result of a trial depends on


@pytest.mark.parametrize("name", TRIALS)
def test_the_same_trial_gives_the_same_rows_whatever_was_drawn_before(name: str) -> None:
    first = alone(TRIALS[name])
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]
    assert run(TRIALS[name]) == first
    after = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]
    assert after == states, "a trial draws from no global generator"


@pytest.mark.parametrize("name", ["pc_darts", "gdas", "all random"])
def test_the_retraining_seed_changes_the_retraining_only(name: str) -> None:
    trial = TRIALS[name]
    first, second = alone(trial), run(replace(trial, seeds=Seeds(retrain=1)))
    assert second.search == first.search
    assert json.loads(second.result)[0] == json.loads(first.result)[0]
    assert not set(second.retrain) & set(first.retrain)


def test_the_search_seed_changes_the_search() -> None:
    trial = TRIALS["pc_darts"]
    other = replace(trial, seeds=Seeds(search=1))
    assert not set(run(other).search) & set(alone(trial).search)
    # Both starts are drawn anew: that of every table of logits, and that of the weights.
    one, two = fresh(trial).search.state, fresh(other).search.state
    assert one is not None
    assert two is not None
    assert not any(
        torch.equal(a, b) for a, b in zip(one.arch.parameters(), two.arch.parameters(), strict=True)
    )
    assert not torch.equal(one.supernet.head.weight, two.supernet.head.weight)


def test_a_random_genotype_is_drawn_by_the_search_seed() -> None:
    found = {fresh(replace(TRIALS["random"], seeds=Seeds(search=seed))).search.genotype for seed in range(8)}
    assert len(found) == 8
    again = fresh(replace(TRIALS["random"], seeds=Seeds(split=5, retrain=5))).search.genotype
    assert again == fresh(TRIALS["random"]).search.genotype


def test_the_split_seed_moves_the_split_but_not_the_test_part() -> None:
    trial = TRIALS["darts_1st"]
    one, other = fresh(trial).data, fresh(replace(trial, seeds=Seeds(split=1))).data
    for part in ("weights", "arch", "valid", "train"):
        assert one.size(part) == other.size(part)
        assert not torch.equal(one.parts[part], other.parts[part])
    (images, labels), (same_images, same_labels) = (
        next(data.batches("test", 60, order=None)) for data in (one, other)
    )
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    second = run(replace(trial, seeds=Seeds(split=1)))
    assert not set(second.rows) & set(alone(trial).rows)


# Rows and results


@pytest.mark.parametrize("name", TRIALS)
def test_rows_count_epochs_over_the_stages_of_the_search(name: str) -> None:
    trial = TRIALS[name]
    rows = [json.loads(row) for row in alone(trial).rows]
    stages = len(trial.search)
    expected = [
        ["search", part, 2 * part + epoch, epoch == 1] for part in range(stages) for epoch in range(2)
    ]
    assert [row[:4] for row in rows] == [*expected, ["retrain", 0, 0, False], ["retrain", 0, 1, True]]
    for stage, _, epoch, _, genotype, metrics in rows:
        assert (genotype is None) == (stage == "retrain")
        if stage == "search":
            once = {"discretisation_gap"} if epoch < 2 * stages - 1 else set()
            assert set(metrics) == set(METRICS) - MEASURED - once
            assert (metrics["beta_entropy"] is None) == (not trial.method.supernet.edge_norm)


def test_the_result_repeats_the_last_search_epoch() -> None:
    last = json.loads(alone(TRIALS["pc_darts"]).search[-1])
    genotype, result = json.loads(alone(TRIALS["pc_darts"]).result)
    assert genotype == last[4]
    for name in ("valid_error", "train_error", "alpha_entropy", "beta_entropy"):
        assert result[f"search_{name}"] == last[5][name]
    for name in ("discretisation_gap", "params_m", "madds_m", "skips"):
        assert result[name] == last[5][name]


def test_a_trial_without_search_has_no_search_metrics() -> None:
    run_ = fresh(TRIALS["random"])
    while not run_.done:
        run_.step()
    assert run_.result is not None
    assert run_.result["search_seconds"] == 0
    assert run_.result["search_valid_error"] is None
    assert run_.result["discretisation_gap"] is None


def test_seconds_add_up_and_the_peak_is_the_largest() -> None:
    run_ = fresh(TRIALS["pc_darts"])
    rows = []
    while not run_.done:
        rows.append(run_.step())
    assert run_.result is not None
    for stage in ("search", "retrain"):
        total = sum(row.metrics["seconds"] or 0 for row in rows if row.stage == stage)
        assert run_.result[f"{stage}_seconds"] == pytest.approx(total)
        assert total > 0
    assert run_.result["peak_memory_mb"] == max(row.metrics["peak_memory_mb"] or 0 for row in rows)


def test_the_last_row_of_a_stage_holds_the_peak_of_that_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(nas.search, "reset_peak_memory", lambda device: begun.append(1))
    monkeypatch.setattr(nas.search, "peak_memory_mb", lambda device: float(len(begun)))
    search = fresh(TRIALS["p_darts"]).search
    peaks = []
    while not search.done:
        peaks.append(search.step()[0]["peak_memory_mb"])
    assert peaks == [1, 1, 2, 2, 3, 3]


def test_a_finished_trial_takes_no_further_step() -> None:
    run_ = fresh(TRIALS["random"])
    while not run_.done:
        run_.step()
    with pytest.raises(RuntimeError, match="the trial is done: its test part has been read"):
        run_.step()


# Which images are read, and when


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts of the data in the order in which they are read."""
    seen: list[str] = []
    batches = Data.batches

    def watched(self: Data, part: Any, *args: Any, **options: Any) -> Iterator[Any]:
        seen.append(part)
        return batches(self, part, *args, **options)

    monkeypatch.setattr(Data, "batches", watched)
    return seen


@pytest.mark.parametrize("name", ["pc_darts", "p_darts", "random"])
def test_the_test_part_is_read_once_after_the_last_epoch(name: str, reads: list[str]) -> None:
    run_ = fresh(TRIALS[name])
    while not run_.done:
        assert "test" not in reads
        run_.step()
    assert reads.count("test") == 1
    assert reads[-1] == "test"


def test_search_and_retraining_read_their_parts_only(reads: list[str]) -> None:
    run_ = fresh(TRIALS["pc_darts"])
    run_.step()
    assert set(reads) == {"weights", "valid"}, "frozen: the architecture learns nothing yet"
    run_.step()
    assert set(reads) == {"weights", "arch", "valid"}
    reads.clear()
    while not run_.done:
        run_.step()
    assert set(reads) == {"train", "valid", "test"}


def test_without_a_validation_part_the_search_is_measured_on_the_architecture_half(reads: list[str]) -> None:
    trial = tiny("darts_1st", {"data.valid": 0.0})
    outcome = run(trial)
    assert set(reads) == {"weights", "arch", "train", "test"}
    assert json.loads(outcome.search[-1])[5]["valid_error"] is not None
    assert json.loads(outcome.retrain[-1])[5]["valid_error"] is None
    assert json.loads(outcome.result)[1]["valid_error"] is None


# Stopping and resuming


def saved(run_: TrialRun) -> bytes:
    buffer = io.BytesIO()
    torch.save(run_.state_dict(), buffer)
    return buffer.getvalue()


def restored(trial: Trial, held: bytes) -> TrialRun:
    run_ = fresh(trial)
    run_.load_state_dict(torch.load(io.BytesIO(held), weights_only=True))
    return run_


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_stopped_after_every_epoch_goes_on_as_if_it_never_had(name: str) -> None:
    trial = TRIALS[name]
    rows: list[str] = []
    run_ = fresh(trial)
    while not run_.done:
        torch.manual_seed(len(rows))  # every process has a state of its own
        rows.append(text(run_.step()))
        run_ = restored(trial, saved(run_))
    assert run_.result is not None
    assert run_.search.genotype is not None
    assert outcome_of(run_.search.genotype, run_.result, rows) == alone(trial)


def test_a_trial_stopped_once_goes_on_from_any_epoch_to_its_end() -> None:
    trial = TRIALS["p_darts"]
    run_, checkpoints = fresh(trial), []
    while not run_.done:
        checkpoints.append(saved(run_))
        run_.step()
    for epoch in (1, 2, 5, 6, 7):  # inside a stage, at the ends of stages, in the retraining
        again = restored(trial, checkpoints[epoch])
        rows = []
        while not again.done:
            rows.append(text(again.step()))
        assert tuple(rows) == alone(trial).rows[epoch:]


def test_a_resumed_trial_remembers_the_time_it_took() -> None:
    run_ = fresh(TRIALS["gdas"])
    before = [run_.step().metrics["seconds"] or 0 for _ in range(3)]
    again = restored(TRIALS["gdas"], saved(run_))
    assert again.seconds["search"] == pytest.approx(sum(before[:2]))
    assert again.seconds["retrain"] == pytest.approx(before[2])


def test_a_checkpoint_of_another_trial_is_refused() -> None:
    one, other = TRIALS["random"], replace(TRIALS["random"], seeds=Seeds(retrain=1))
    held = fresh(one).state_dict()
    with pytest.raises(ValueError, match=f"checkpoint of trial {one.id} cannot continue trial {other.id}"):
        fresh(other).load_state_dict(held)


def test_an_adopted_state_trains_on_with_the_adopters_settings() -> None:
    one = TRIALS["random"]
    other = override(one, {"retrain.weight_decay": 0.5, "retrain.momentum": 0.1})
    run_ = fresh(one)
    run_.step()
    adopter = fresh(other)
    adopter.load_state_dict(run_.state_dict(), adopt=True)
    assert adopter.retrain is not None
    assert run_.retrain is not None
    (group,) = adopter.retrain.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.1)
    weights = [network.state_dict() for network in (run_.retrain.network, adopter.retrain.network)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Frozen epochs


def logits_of(run_: TrialRun) -> dict[str, list[list[float]]]:
    assert run_.search.state is not None
    return {name: logits.tolist() for name, logits in run_.search.state.arch.logits.items()}


@pytest.mark.parametrize("name", ["pc_darts", "gdas", "darts_2nd"])
def test_frozen_epochs_leave_the_architecture_alone_and_train_the_weights(name: str) -> None:
    run_ = fresh(tiny(name, {"search.*.epochs": 3, "search.*.frozen_epochs": 2}))
    state = run_.search.state
    assert state is not None
    before = logits_of(run_)
    weights = [parameter.detach().clone() for parameter in state.supernet.parameters()]
    first = run_.step()
    assert logits_of(run_) == before
    moved = [not torch.equal(p, w) for p, w in zip(state.supernet.parameters(), weights, strict=True)]
    assert any(moved) if name == "gdas" else all(moved)
    second = run_.step()
    assert logits_of(run_) == before
    assert first.genotype == second.genotype
    run_.step()
    after = {name: logits.tolist() for name, logits in state.arch.logits.items()}
    assert all(after[table] != before[table] for table in before)


# Limits between methods: a knob at its neutral value gives the simpler method, bit for bit.


def test_one_stage_of_p_darts_is_darts() -> None:
    darts, p_darts = TRIALS["darts_1st"], TRIALS["p_darts"]
    stage = replace(
        darts.search[0],
        keep=p_darts.search[0].keep,  # after the last stage nothing is left to choose
        skip_dropout=p_darts.search[0].skip_dropout,
    )
    assert stage.skip_dropout == SkipDropout(0.0, frozen_epochs=1)
    method = replace(
        p_darts.method,
        arch_update=replace(p_darts.method.arch_update, lr=Bilevel().lr, clip=1e9),
        searcher=Argmax(max_skip=4),
    )
    one_stage = replace(p_darts, method=method, search=(stage,), retrain=darts.retrain)
    assert one_stage.id != darts.id
    assert alone(darts) == run(one_stage)


def test_pc_darts_of_all_channels_without_edge_normalisation_is_darts() -> None:
    darts, pc_darts = TRIALS["darts_1st"], TRIALS["pc_darts"]
    neutral = override(
        pc_darts,
        {
            "method.supernet.partial_channels": 1,
            "method.supernet.edge_norm": False,
            "method.arch_update.lr": darts.method.arch_update.lr,
            "search": darts.search,
            "retrain": darts.retrain,
        },
    )
    assert neutral == darts, "the rows of the table differ in these settings only"
    # With nothing to bypass, how channels are mixed is without effect.
    shifted = override(neutral, {"method.supernet.channel_mix": "shift"})
    assert run(shifted) == alone(darts)


def test_a_look_ahead_of_no_length_is_first_order() -> None:
    second = override(TRIALS["darts_2nd"], {"method.arch_update.xi": 0.0})
    assert run(second) == alone(TRIALS["darts_1st"])
    assert alone(TRIALS["darts_2nd"]).search != alone(TRIALS["darts_1st"]).search


# P-DARTS


def test_operations_of_p_darts_shrink_from_8_to_5_to_3() -> None:
    trial = TRIALS["p_darts"]
    run_ = fresh(trial)
    tables, sizes = [dict(run_.search.choices)], []
    for part in range(3):
        state = run_.search.state
        assert state is not None
        sizes.append(sum(parameter.numel() for parameter in state.supernet.parameters()))
        start = init_arch(
            {n: t for n, t in run_.search.choices.items() if n.endswith("/op")},
            generator(0, "alpha", part),
            CPU,
        )
        for name, logits in state.arch.logits.items():
            assert torch.equal(logits, start.logits[name]), "every stage starts afresh"
        for _ in range(trial.search[part].epochs):
            run_.step()
        tables.append(dict(run_.search.choices))
        if part < 2:
            learned = state.arch.probabilities()
            for cell in CELL_TYPES:
                before, after = tables[part][f"{cell}/op"], tables[part + 1][f"{cell}/op"]
                assert after == keep_likeliest(before, learned[f"{cell}/op"], (5, 3)[part])
                assert {len(row) for row in before.allowed} == {(8, 5)[part]}
                assert {len(row) for row in after.allowed} == {(5, 3)[part]}
                assert all(set(a) < set(b) for a, b in zip(after.allowed, before.allowed, strict=True))
    assert sizes[0] > sizes[1] > sizes[2]
    genotype = run_.search.genotype
    assert genotype is not None
    for cell in CELL_TYPES:
        survivors = tables[-1][f"{cell}/op"]
        for node, inputs in enumerate(getattr(genotype, cell).nodes, start=2):
            for op, source in inputs:
                row = trial.space.edges.index((node, source))
                assert op in {survivors.options[option] for option in survivors.allowed[row]}
    assert genotype.normal.skips <= 2


# What is refused, and what goes wrong


def test_a_diverging_search_says_so() -> None:
    trial = tiny("darts_1st", {"search.*.lr": Constant(1e30), "search.*.clip": 1e30})
    with pytest.raises(FloatingPointError, match=r"search diverged: training loss \w+ in epoch 0 of stage 0"):
        run(trial)


def test_a_search_that_diverges_in_its_last_step_says_so() -> None:
    huge = {"search.*.lr": Constant(1e38), "search.*.clip": 1e30, "search.*.batch_size": 48}
    with pytest.raises(
        FloatingPointError, match=r"search diverged: validation loss \w+ in epoch 0 of stage 0"
    ):
        run(tiny("darts_1st", huge | {"search.*.epochs": 1}))


def test_a_diverging_retraining_says_so() -> None:
    trial = tiny("random", {"retrain.lr": Constant(1e30), "retrain.clip": 1e30})
    with pytest.raises(FloatingPointError, match=r"retraining diverged: training loss \w+ in epoch 0"):
        run(trial)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: DataConfig) -> Arrays:
        raise AssertionError("data was loaded")

    monkeypatch.setattr(nas.trial, "load", refuse)


@pytest.mark.usefixtures("no_data")
def test_a_trial_that_cannot_be_built_is_refused_before_data_is_loaded() -> None:
    with pytest.raises(
        ValueError, match="partial_channels=3 does not divide channels=16; use one of 1, 2, 4"
    ):
        override(PAPERS["pc_darts"], {"method.supernet.partial_channels": 3})
    with pytest.raises(ValueError, match="partial_channels=4 does not divide channels=6"):
        override(PAPERS["pc_darts"], {"search.0.channels": 6})
    with pytest.raises(ValueError, match="no supernet form of conv_7x1_1x7"):
        Trial(space=CellSpace(ops=("skip_connect", "conv_7x1_1x7")))
    with pytest.raises(ValueError, match="Argmax reads a searched supernet; give at least one search stage"):
        Trial(search=())
    with pytest.raises(ValueError, match="weights_share=1 leaves no images to learn the architecture from"):
        Trial(data=DataConfig(weights_share=1))
    with pytest.raises(ValueError, match="keep=1 may leave an edge with none alone"):
        override(PAPERS["p_darts"], {"search.1.keep": 1})
    with pytest.raises(ValueError, match="edges_by='beta' needs edge normalisation"):
        override(PAPERS["darts_1st"], {"method.searcher": Argmax(edges_by="beta")})


@pytest.mark.parametrize(
    "changes", [{"frozen_epochs": 3, "epochs": 2}, {"epochs": 0}, {"keep": 0}, {"clip": 0}]
)
def test_stages_without_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"SearchStage: .*{next(iter(changes))}={next(iter(changes.values()))}"
    ):
        SearchStage(**changes)


def test_an_auxiliary_head_that_does_not_fit_is_refused_before_the_search() -> None:
    with pytest.raises(ValueError, match=r"does not fit images of 8 pixels .* retrain\.auxiliary_weight=0"):
        fresh(tiny("pc_darts", {"retrain.auxiliary_weight": 0.4}))


# Searches alone, retrainings alone


def test_a_search_alone_ends_at_its_genotype_and_leaves_the_test_part_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = tiny("pc_darts")
    alone = override(trial, {"retrain.epochs": 0})
    whole = run_trial(trial)
    monkeypatch.setattr(TrialRun, "_finish", lambda *_: pytest.fail("the test part was read"))
    rows: list[Row] = []
    found = run_trial(alone, rows.append)
    assert {row.stage for row in rows} == {"search"}
    assert found.genotype == whole.genotype
    assert not {"test_error", "test_loss", "valid_error"} & found.metrics.keys()
    kept = found.metrics.keys() - MEASURED
    assert {name: whole.metrics[name] for name in kept} == {name: found.metrics[name] for name in kept}


def test_a_given_genotype_is_retrained_as_after_its_search() -> None:
    trial = tiny("pc_darts")
    whole = run_trial(trial)
    alone = replace(trial, method=Method(searcher=Given(str(whole.genotype))), search=())
    found = run_trial(Trial.from_dict(alone.to_dict()))
    assert found.genotype == whole.genotype
    for name in ("test_error", "test_loss", "valid_error", "params_m"):
        assert found.metrics[name] == whole.metrics[name]


def test_a_given_genotype_must_be_one() -> None:
    with pytest.raises(ValueError, match="write Genotype"):
        Given("Genotype(nothing)")
