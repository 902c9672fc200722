"""What every script plans, before anything runs: its arms, its trials, and what it refuses."""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import experiments
from experiments import compare_methods, sweep_depths, sweep_edge_norm, sweep_joint, sweep_k, sweep_skips
from experiments.stopping import Stopping
from experiments.study import (
    SEEDS,
    SHORT,
    Axis,
    Domain,
    Planned,
    Preset,
    Settings,
    Study,
    axis,
    baseline,
    parse_changes,
    plan,
    resolve,
    settable,
    stages_at,
    study_id,
)
from nas.config import paths
from nas.footprint import DataShape
from nas.metrics import saved_activation_bytes, uniform_gates
from nas.papers import PAPERS, RECIPES
from nas.schedule import Constant, Cosine, Exponential, LinearTail
from nas.searchers import RandomGenotype
from nas.spaces.cell import SPACES
from nas.trial import Trial

SCRIPTS = {
    path.stem: import_module(f"experiments.{path.stem}").STUDY
    for path in sorted(Path(experiments.__file__).parent.glob("*.py"))
    if "\nSTUDY = " in path.read_text()
}
GRIDS = {name: study for name, study in SCRIPTS.items() if not study.joint}
PRESETS: tuple[Preset, ...] = get_args(Preset)
DIGITS = DataShape(channels=1, image_size=8, classes=10)

BASES = {
    "ablate_pc_darts": "pc_darts",
    "compare_methods": "darts_1st",
    "sweep_depths": "p_darts",
    "sweep_edge_norm": "pc_darts",
    "sweep_joint": "pc_darts",
    "sweep_k": "pc_darts",
    "sweep_skips": "p_darts",
}
"""Whose published recipe each script starts from."""

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "ablate_pc_darts": {
        f"K={k} edge_norm={norm}": {"K": k, "edge_norm": norm} for k in (1, 4) for norm in (False, True)
    },
    "compare_methods": {
        f"method={name}": {"method": name}
        for name in ("darts_1st", "darts_2nd", "pc_darts", "p_darts", "gdas")
    },
    "sweep_depths": {
        f"depths={name}": {"depths": name}
        for name in ("8", "17", "5-11-17", "5-11-17 wider", "5-11-17 dropout")
    },
    "sweep_edge_norm": {"edge_norm=False": {"edge_norm": False}, "edge_norm=True": {"edge_norm": True}},
    "sweep_k": {f"K={k}": {"K": k} for k in (1, 2, 4, 8)},
    "sweep_skips": {f"M={m}": {"M": m} for m in (0, 1, 2, 3, 4, None)},
}
"""The arms of each grid, and what tables know of them."""

VARIED = {
    "ablate_pc_darts": ("method.supernet.partial_channels", "method.supernet.edge_norm"),
    "compare_methods": ("space.", "method.", "search."),
    "sweep_depths": ("search.",),
    "sweep_edge_norm": ("method.supernet.edge_norm",),
    "sweep_k": ("method.supernet.partial_channels",),
    "sweep_skips": ("method.searcher.max_skip",),
}
"""What each grid varies; nothing else may differ between its arms."""

PAPERS_OWN = {
    ("sweep_k", "K=4"): "pc_darts",
    ("sweep_edge_norm", "edge_norm=True"): "pc_darts",
    ("sweep_depths", "depths=5-11-17 dropout"): "p_darts",
    ("sweep_skips", "M=2"): "p_darts",
    ("compare_methods", "method=darts_1st"): "darts_1st",
    ("compare_methods", "method=darts_2nd"): "darts_2nd",
}
"""Arms that are a published trial, unchanged. The other methods are compared under DARTS's retraining."""


def planned(name: str, preset: Preset = "paper", **settings: Any) -> list[Planned]:
    return plan(SCRIPTS[name], Settings(preset, **settings))


def of_arm(trials: list[Planned], arm: str) -> list[Planned]:
    return [p for p in trials if p.arm == arm]


def leaves(trial: Trial) -> dict[str, Any]:
    """Every field of a trial but the seeds that are counted and what is measured, which changes nothing."""
    apart = ("seeds.search", "seeds.retrain", "measure", "measure_every")
    return {n: v for n, v in paths(trial).items() if n not in apart}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    missing = object()
    return {n for n in one.keys() | other.keys() if one.get(n, missing) != other.get(n, missing)}


def identity(study: Study, settings: Settings) -> str:
    return study_id(study, settings, plan(study, settings, DIGITS))


# Scripts


def test_every_script_is_known_here() -> None:
    assert SCRIPTS.keys() == BASES.keys() == ARMS.keys() | {"sweep_joint"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_with_its_question(name: str) -> None:
    path = Path(experiments.__file__).parent / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert text.splitlines()[0] == SCRIPTS[name].question.strip()
    assert text.splitlines()[0].endswith("?")
    assert SCRIPTS[name].name == name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plan_is_every_arm_and_the_random_one_with_every_seed(name: str, preset: Preset) -> None:
    trials = planned(name, preset)
    arms = [*ARMS.get(name, {}), "random"]
    assert list(dict.fromkeys(p.arm for p in trials)) == arms
    for arm in arms:
        seeds = [(p.trial.seeds.search, p.trial.seeds.retrain) for p in of_arm(trials, arm)]
        assert seeds == [(seed, seed) for seed in range(SEEDS[preset])]
    assert {p.trial.seeds.split for p in trials} == {0}  # arms and seeds are compared on one split
    assert len({p.trial.id for p in trials}) == len({p.name for p in trials}) == len(trials)


@pytest.mark.parametrize("name", GRIDS)
def test_a_trial_knows_its_place_in_the_tables(name: str) -> None:
    for p in planned(name, "tiny", seeds=3):
        seed = p.trial.seeds.search
        assert p.name == f"{p.arm} seed={seed}"
        assert p.axes == {**ARMS[name].get(p.arm, {}), "seed": seed}


@pytest.mark.parametrize("name", GRIDS)
def test_a_reference_is_one_of_the_arms(name: str) -> None:
    assert SCRIPTS[name].reference in {None, *ARMS[name]}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", GRIDS)
def test_an_arm_differs_from_the_base_in_its_axis_alone(name: str, preset: Preset) -> None:
    base = leaves(resolve(SCRIPTS[name].base, Settings(preset)))
    changed = [difference(leaves(p.trial), base) for p in planned(name, preset, seeds=1) if p.arm != "random"]
    assert all(field.startswith(VARIED[name]) for fields in changed for field in fields)
    assert changed.count(set()) <= 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_random_arm_draws_under_the_cap_of_the_method(name: str, preset: Preset) -> None:
    searchers = {p.trial.method.searcher for p in of_arm(planned(name, preset), "random")}
    assert searchers == {RandomGenotype(max_skip=2 if name == "sweep_depths" else None)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_random_arm_is_retrained_alike_and_searches_nothing(name: str, preset: Preset) -> None:
    base = resolve(SCRIPTS[name].base, Settings(preset))
    for p in of_arm(planned(name, preset), "random"):
        assert p.trial.search == ()
        assert isinstance(p.trial.method.searcher, RandomGenotype)
        assert (p.trial.space, p.trial.data, p.trial.retrain) == (base.space, base.data, base.retrain)


def test_a_study_may_have_no_random_arm() -> None:
    study = replace(sweep_k.STUDY, baseline=False)
    assert {p.arm for p in plan(study, Settings("tiny"))} == {"K=1", "K=2", "K=4", "K=8"}


# Presets


@pytest.mark.parametrize("name", GRIDS)
def test_paper_is_the_published_recipe_where_the_study_varies_nothing(name: str) -> None:
    published = leaves(PAPERS[BASES[name]])
    for p in planned(name):
        if p.arm != "random":
            assert all(f.startswith(VARIED[name]) for f in difference(leaves(p.trial), published))


def test_paper_holds_images_out_of_a_joint_search_and_changes_nothing_else() -> None:
    base, published = resolve(sweep_joint.STUDY.base, Settings("paper")), PAPERS["pc_darts"]
    assert difference(leaves(base), leaves(published)) == {"data.valid"}
    assert (published.data.valid, base.data.valid) == (0, 0.1)


@pytest.mark.parametrize(("place", "paper"), PAPERS_OWN.items())
def test_paper_has_arms_that_are_published_trials(place: tuple[str, str], paper: str) -> None:
    name, arm = place
    for p in of_arm(planned(name), arm):
        assert replace(p.trial, seeds=PAPERS[paper].seeds) == PAPERS[paper]


@pytest.mark.parametrize("method", compare_methods.METHODS)
def test_methods_are_compared_with_their_own_space_and_search_under_one_retraining(method: str) -> None:
    for p in of_arm(planned("compare_methods"), f"method={method}"):
        own = PAPERS[method]
        assert (p.trial.space, p.trial.method, p.trial.search) == (own.space, own.method, own.search)
        assert (p.trial.data, p.trial.retrain) == (PAPERS["darts_1st"].data, PAPERS["darts_1st"].retrain)


@pytest.mark.parametrize("name", SCRIPTS)
def test_paper_is_unabridged(name: str) -> None:
    epochs = {"sweep_depths": {75}, "sweep_skips": {75}, "compare_methods": {50, 75, 250}}.get(name, {50})
    for p in planned(name):
        # The sizes that DARTS, PC-DARTS and P-DARTS state for CIFAR-10, all of them after 600 epochs.
        assert (p.trial.retrain.epochs, p.trial.retrain.cells, p.trial.retrain.channels) == (600, 20, 36)
        assert (p.trial.data.source, p.trial.data.limit, p.trial.data.test_limit) == ("cifar10", None, None)
        assert p.arm == "random" or sum(stage.epochs for stage in p.trial.search) in epochs


def test_depths_are_compared_at_equal_epochs() -> None:
    for preset in PRESETS:
        arms = {p.arm: p.trial.search for p in planned("sweep_depths", preset, seeds=1) if p.arm != "random"}
        assert len({sum(stage.epochs for stage in stages) for stages in arms.values()}) == 1
        assert [len(stages) for stages in arms.values()] == [1, 1, 3, 3, 3]
        if preset == "paper":  # smaller ones round stage by stage
            assert len({sum(stage.frozen_epochs for stage in stages) for stages in arms.values()}) == 1
    assert [s.cells for s in sweep_depths.DEPTHS["5-11-17 wider"]] == [5, 11, 17]
    assert [s.channels for s in sweep_depths.DEPTHS["5-11-17 wider"]] == [16, 28, 40]


@pytest.mark.parametrize("name", SCRIPTS)
def test_smaller_presets_run_on_digits_and_hold_images_out(name: str) -> None:
    for preset in ("tiny", "laptop"):
        for p in planned(name, preset):
            assert p.trial.data.source == "digits"
            assert p.trial.data.valid > 0
            assert not p.trial.retrain.augment.flip  # a mirrored digit is another one


def test_the_user_s_data_replaces_the_preset_s() -> None:
    sources = {
        (p.trial.data.source, p.trial.retrain.augment.flip) for p in planned("sweep_k", data="some/path")
    }
    assert sources == {("some/path", True)}
    laptop = planned("sweep_k", "laptop", data="cifar100")
    assert {(p.trial.data.source, p.trial.retrain.augment.flip) for p in laptop} == {("cifar100", True)}


def test_stages_of_a_joint_search_are_those_a_grid_would_run() -> None:
    for preset in PRESETS:
        grid = of_arm(planned("sweep_depths", preset), "depths=5-11-17")[0].trial.search
        stages = sweep_joint.STUDY.named["depths"]["5-11-17"]
        assert stages_at(sweep_joint.STUDY, Settings(preset), stages) == grid


# Identity


def test_a_study_has_one_id_in_every_process() -> None:
    program = (
        "import sys\nfrom importlib import import_module\n"
        "from experiments.study import Settings, plan, study_id\n"
        "for name in sys.argv[1:]:\n"
        "    study = import_module(f'experiments.{name}').STUDY\n"
        "    print(study_id(study, Settings('tiny'), plan(study, Settings('tiny'))))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, *SCRIPTS],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(experiments.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told == [identity(study, Settings("tiny")) for study in SCRIPTS.values()]
    assert len(set(told)) == len(told)
    assert all(len(text) == 12 and int(text, 16) >= 0 for text in told)


@pytest.mark.parametrize(
    "other",
    [
        Settings("laptop"),
        Settings("tiny", data="cifar10"),
        Settings("tiny", seeds=3),
        Settings("tiny", batch="memory_matched"),
        Settings("tiny", changes={"retrain.lr.start": 0.06}),
        Settings("tiny", changes={"data.valid": 0.25}),
        Settings("tiny", changes={"seeds.split": 1}),
        Settings("tiny", stopping=Stopping("asha")),
        Settings("tiny", objectives=("error", "params")),
    ],
    ids=lambda settings: str(difference(vars(settings), vars(Settings("tiny")))),
)
def test_an_id_changes_with_any_setting(other: Settings) -> None:
    assert identity(sweep_k.STUDY, other) != identity(sweep_k.STUDY, Settings("tiny"))


def test_an_id_changes_with_the_study() -> None:
    settings = Settings("tiny")
    found = {identity(study, settings) for study in SCRIPTS.values()}
    found.add(identity(replace(sweep_k.STUDY, axes=(axis("K", 1, 2, 4),)), settings))
    found.add(identity(replace(sweep_k.STUDY, baseline=False), settings))
    narrower = {**sweep_joint.STUDY.joint, "K": Domain((1, 2))}
    found.add(identity(replace(sweep_joint.STUDY, joint=narrower), settings))
    assert len(found) == len(SCRIPTS) + 3


def test_an_id_does_not_know_where_downloads_are_kept() -> None:
    elsewhere = Settings("tiny", changes={"data.root": "/elsewhere", "data.download": False})
    assert identity(sweep_k.STUDY, elsewhere) == identity(sweep_k.STUDY, Settings("tiny"))


# --set


def test_short_names_are_spelled_out() -> None:
    assert parse_changes([f"{name}=1" for name in SHORT]) == dict.fromkeys(SHORT.values(), 1)


def test_what_is_measured_is_a_list_with_commas() -> None:
    for text in ("hessian,proxies", "hessian, proxies,", "['hessian', 'proxies']"):
        changes = parse_changes([f"measure={text}"])
        assert all(
            p.trial.measure == ("hessian", "proxies") for p in planned("sweep_k", "tiny", changes=changes)
        )
    with pytest.raises(ValueError, match="hesian"):
        planned("sweep_k", "tiny", changes=parse_changes(["measure=hesian"]))


@pytest.mark.parametrize("study", SCRIPTS.values(), ids=SCRIPTS)
def test_short_names_stand_for_fields(study: Study) -> None:
    known = paths(resolve(study.base, Settings("paper")))
    for name in SHORT.values():
        assert name.replace("*", "0") in known, name


def test_changes_are_read_as_python_values() -> None:
    read = parse_changes(
        ["data.limit = 100", "retrain.weight_decay=1e-4", "retrain.auxiliary_norm=false", "M=none"]
    )
    assert read == {
        "data.limit": 100,
        "retrain.weight_decay": 1e-4,
        "retrain.auxiliary_norm": False,
        "method.searcher.max_skip": None,
    }


@pytest.mark.parametrize("entry", ["K", "=4", "retrain.epochs:5"])
def test_a_change_has_an_equals_sign(entry: str) -> None:
    with pytest.raises(ValueError, match=r"field=value, e\.g\. --set retrain\.epochs=50 or --set K=2"):
        parse_changes([entry])


def test_a_field_is_set_once() -> None:
    with pytest.raises(ValueError, match=r"K=2.*partial_channels is given twice"):
        parse_changes(["method.supernet.partial_channels=4", "K=2"])


@pytest.mark.parametrize(
    ("field", "known"), [("space", SPACES), ("retrain", RECIPES)], ids=["space", "retrain"]
)
def test_spaces_and_recipes_are_set_by_name(field: str, known: dict[str, Any]) -> None:
    for name, value in known.items():
        assert parse_changes([f"{field}={name}"]) == {field: value}
    trials = planned("sweep_k", "tiny", changes=parse_changes([f"{field}={next(reversed(known))}"]))
    assert {getattr(p.trial, field) for p in trials} == {known[next(reversed(known))]}
    for wrong in ("nonsense", "[1]", "{}", "4"):
        with pytest.raises(ValueError, match=f"no such {field}; use one of {', '.join(known)}"):
            parse_changes([f"{field}={wrong}"])


def test_a_change_reaches_every_trial() -> None:
    trials = planned("sweep_k", "tiny", changes={"retrain.epochs": 7, "search.*.momentum": 0.5})
    assert {p.trial.retrain.epochs for p in trials} == {7}
    assert {s.momentum for p in trials for s in p.trial.search} == {0.5}


def test_a_star_stands_for_every_stage() -> None:
    trials = planned("sweep_skips", "tiny", changes=parse_changes(["lr=0.07", "search.1.batch_size=9"]))
    for p in trials:
        if p.arm != "random":
            assert [stage.lr for stage in p.trial.search] == [Cosine(0.07)] * 3
            assert [stage.batch_size == 9 for stage in p.trial.search] == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": 1}, "no such field; they begin with space, data, method, search, retrain, seeds"),
        ({"retrain.epoch": 1}, "RetrainStage has no field 'epoch'; it has epochs, cells, channels"),
        ({"method.supernet.k": 1}, "CellSupernetConfig has no field 'k'; it has partial_channels, edge_norm"),
        ({"search.3.epochs": 1}, r"'3' is not one of \*, 0$"),
        ({"retrain.epochs": "many"}, "retrain.epochs='many' must be int"),
        ({"retrain.epochs": 2.5}, "retrain.epochs=2.5 must be int"),
        ({"retrain.epochs": 0}, "epochs=0 must be at least 1"),
        ({"data.valid": 1.0}, r"valid=1.0 must be in \[0, 1\)"),
        (
            {"method.supernet.partial_channels": 3},
            "partial_channels=3 does not divide channels=8; use one of 1, 2, 4, 8",
        ),
        ({"seeds.search": 1}, "seeds are counted by --seeds; only seeds.split can be set"),
        ({"data.source": "cifar10"}, "use --data"),
    ],
    ids=str,
)
def test_a_wrong_change_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(sweep_edge_norm.STUDY, Settings("tiny", changes=changes))


@pytest.mark.parametrize("k", [3, 16, 0])
def test_a_k_that_does_not_divide_the_channels_is_refused_in_any_arm(k: int) -> None:
    study = replace(sweep_k.STUDY, axes=(axis("K", 1, k),))
    with pytest.raises(ValueError, match=f"partial_channels={k} "):
        plan(study, Settings("tiny"))


@pytest.mark.parametrize(
    ("study", "field"),
    [
        (sweep_k.STUDY, "method.supernet.partial_channels"),
        (sweep_k.STUDY, "method.supernet"),
        (sweep_k.STUDY, "method"),
        (sweep_depths.STUDY, "search"),
        (compare_methods.STUDY, "method"),
        (sweep_joint.STUDY, "method.arch_update.lr"),
        (sweep_joint.STUDY, "search.*.lr.start"),
        (sweep_joint.STUDY, "search.0.lr.start"),
        (sweep_joint.STUDY, "search.0.batch_size"),  # stages come with the depths that Optuna chooses
    ],
    ids=lambda value: value.name if isinstance(value, Study) else str(value),
)
def test_what_a_study_varies_cannot_be_set(study: Study, field: str) -> None:
    with pytest.raises(ValueError, match=rf"--set {field.replace('*', '.')}: the study {study.name} varies"):
        plan(study, Settings("tiny", changes={field: 1}))


@pytest.mark.parametrize(
    ("study", "field", "value"),
    [
        (sweep_depths.STUDY, "search.*.batch_size", 7),
        (sweep_depths.STUDY, "search.0.epochs", 7),
        (compare_methods.STUDY, "method.arch_update.lr", 7.0),
    ],
    ids=lambda value: value.name if isinstance(value, Study) else str(value),
)
def test_what_lies_below_a_varied_field_is_set_in_every_arm(study: Study, field: str, value: Any) -> None:
    for p in plan(study, Settings("tiny", changes={field: value})):
        if p.arm != "random":
            assert paths(p.trial)[field.replace("*", "0")] == value


def test_fields_for_set_are_listed_without_what_cannot_be_set() -> None:
    names = settable(sweep_skips.STUDY, Settings("tiny"))
    assert {"retrain.lr.start", "search.2.epochs", "data.limit", "method.arch_update.order"} <= set(names)
    assert not [name for name in names if name.endswith(".type")]
    assert "method.searcher.max_skip" not in names  # what the study varies


# Plans that are refused


def test_a_study_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="--seeds 0 must be at least 1; intervals need 2"):
        plan(sweep_k.STUDY, Settings("tiny", seeds=0))


def test_arms_that_are_one_trial_are_refused() -> None:
    lr = {"retrain.lr.start": 0.1}
    study = replace(sweep_k.STUDY, axes=(Axis("rate", {"high": lr, "large": lr}),))
    with pytest.raises(ValueError, match="rate=large seed=0 and rate=high seed=0 are one and the same trial"):
        plan(study, Settings("tiny"))


@pytest.mark.parametrize(
    "bounds", [{}, {"low": 0.1, "high": 0.1}, {"high": 1.0}, {"values": (1,), "high": 1.0}]
)
def test_a_domain_is_values_or_a_range(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give either values, or a range with 0 < low < high"):
        Domain(**bounds)


@pytest.mark.parametrize(
    "joint",
    [{"K": Domain((1, 3))}, {"nonsense": Domain((1,))}, {"lr": Domain(("high",))}],
    ids=["value", "field", "type"],
)
def test_a_joint_search_is_refused_before_optuna_draws_what_is_wrong(joint: dict[str, Domain]) -> None:
    with pytest.raises(ValueError, match=r"partial_channels=3|no field 'nonsense'|must be float"):
        plan(replace(sweep_joint.STUDY, joint=joint), Settings("tiny"))


def test_two_axes_cross() -> None:
    study = replace(sweep_k.STUDY, axes=(axis("K", 1, 4), axis("edge_norm", False, True)))
    trials = plan(study, Settings("tiny", seeds=1))
    expected = [f"K={k} edge_norm={norm}" for k in (1, 4) for norm in (False, True)]
    assert [p.arm for p in trials] == [*expected, "random"]
    for p in trials[:-1]:
        supernet = p.trial.method.supernet
        assert p.axes == {"K": supernet.partial_channels, "edge_norm": supernet.edge_norm, "seed": 0}


# --batch


def matched(study: Study = sweep_k.STUDY, **settings: Any) -> dict[str, Trial]:
    batched = Settings("tiny", seeds=1, batch="memory_matched", **settings)
    return {p.arm: p.trial for p in plan(study, batched, DIGITS) if p.arm != "random"}


def bytes_per_image(trial: Trial) -> float:
    """By how much each digit raises what a forward of the first stage's supernet keeps, between 8 and 24."""
    stage = trial.search[0]
    torch.manual_seed(0)
    supernet = trial.method.supernet.build(
        trial.space,
        trial.space.choices,
        cells=stage.cells,
        channels=stage.channels,
        classes=DIGITS.classes,
        channels_in=DIGITS.channels,
    )
    side = DIGITS.image_size
    few, many = (
        saved_activation_bytes(
            supernet, uniform_gates(supernet), torch.zeros(count, DIGITS.channels, side, side)
        )
        for count in (8, 24)
    )
    return (many - few) / 16


def test_matched_batches_take_the_same_memory_at_every_k() -> None:
    base = resolve(sweep_k.STUDY.base, Settings("tiny"))
    budget = base.search[0].batch_size * bytes_per_image(base)
    trials = matched()
    for trial in trials.values():
        each = bytes_per_image(trial)
        assert abs(trial.search[0].batch_size * each - budget) <= each / 2  # the batch is a whole number
    assert trials["K=4"].search == base.search
    sizes = [trials[f"K={k}"].search[0].batch_size for k in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_matched_learning_rate_scales_with_the_batch() -> None:
    base = resolve(sweep_k.STUDY.base, Settings("tiny")).search[0]
    assert isinstance(base.lr, Cosine)
    for trial in matched().values():
        stage = trial.search[0]
        scale = stage.batch_size / base.batch_size
        assert isinstance(stage.lr, Cosine)
        assert stage.lr.start == pytest.approx(scale * base.lr.start)
        assert stage.lr.end == pytest.approx(scale * base.lr.end)
        assert replace(stage, batch_size=base.batch_size, lr=base.lr) == base


@pytest.mark.parametrize(
    "lr", [Constant(0.1), LinearTail(0.1), Exponential(0.1, 0.9)], ids=lambda lr: type(lr).__name__
)
def test_any_schedule_scales_as_a_whole(lr: Any) -> None:
    base = sweep_k.STUDY.base
    stage = replace(base.search[0], lr=lr, cells=3, channels=8)
    study = replace(sweep_k.STUDY, base=replace(base, search=(stage,)), axes=(axis("K", 1, 4),))
    batched = Settings("paper", seeds=1, batch="memory_matched")
    narrow, _, _ = plan(study, batched, DIGITS)
    found = narrow.trial.search[0]
    scale = found.batch_size / stage.batch_size
    assert scale < 1
    moments = [found.lr.at(e, stage.epochs) / lr.at(e, stage.epochs) for e in (0, 20, 45)]
    assert moments == pytest.approx([scale] * 3)


def test_a_fixed_batch_is_the_same_at_every_k() -> None:
    stages = {p.trial.search for p in planned("sweep_k", "tiny") if p.arm != "random"}
    assert len(stages) == 1


def test_matching_leaves_the_random_arm_and_the_retraining_alone() -> None:
    batched = plan(sweep_k.STUDY, Settings("tiny", batch="memory_matched"), DIGITS)
    fixed = plan(sweep_k.STUDY, Settings("tiny"))
    assert [p.trial.retrain for p in batched] == [p.trial.retrain for p in fixed]
    assert of_arm(batched, "random") == of_arm(fixed, "random")


def test_arms_with_other_stages_cannot_be_matched() -> None:
    with pytest.raises(
        ValueError, match="needs arms with the same stages; this study varies them, use fixed"
    ):
        matched(sweep_depths.STUDY)


def test_the_baseline_is_that_of_the_resolved_base() -> None:
    settings = Settings("tiny", changes={"space.nodes": 2, "retrain.epochs": 5})
    trial = baseline(sweep_k.STUDY, settings)
    assert (trial.space.nodes, trial.retrain.epochs) == (2, 5)
