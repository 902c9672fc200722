"""Configurations as plain data and back, dotted overrides, and what a trial's id depends on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.arch_updates import Bilevel
from nas.config import from_dict, override, parse_value, paths, to_dict
from nas.data import Augment
from nas.methods import METHODS
from nas.papers import PAPERS
from nas.samplers import Gumbel, Softmax
from nas.schedule import Constant, Cosine, Linear, Schedule
from nas.search import SearchStage
from nas.searchers import Argmax
from nas.trial import Seeds, Trial

BASE = PAPERS["pc_darts"]
P_DARTS = PAPERS["p_darts"]
GDAS = PAPERS["gdas"]

trials = st.sampled_from(list(PAPERS.values()))


# Plain data


def test_a_field_of_several_classes_carries_the_class_under_type() -> None:
    plain = to_dict(METHODS["gdas"])
    tau = {"type": "Linear", "start": 10.0, "end": 0.1}
    assert plain["sampler"] == {"type": "Gumbel", "hard": True, "tau": tau}
    assert "type" not in plain["supernet"]


def test_plain_data_is_json() -> None:
    plain = P_DARTS.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert isinstance(plain["search"], list)


def test_missing_fields_take_their_defaults() -> None:
    assert from_dict(Trial, {}) == Trial()
    assert from_dict(SearchStage, {"epochs": 3}) == SearchStage(epochs=3)


def test_a_missing_field_without_default_is_named() -> None:
    with pytest.raises(ValueError, match="tau lacks the field 'end' of Linear"):
        from_dict(Schedule, {"type": "Linear", "start": 1.0}, "tau")


def test_one_and_one_point_zero_are_one_trial() -> None:
    whole = replace(BASE, search=(replace(BASE.search[0], lr=Cosine(1, 0), clip=5),))
    point = replace(BASE, search=(replace(BASE.search[0], lr=Cosine(1.0, 0.0), clip=5.0),))
    assert whole == point
    assert whole.id == point.id
    assert Trial.from_dict(whole.to_dict()).id == whole.id


def test_numbers_in_tuples_are_written_as_their_field_says() -> None:
    assert to_dict(Bilevel(betas=(0, 1)))["betas"] == [0.0, 1.0]
    assert [type(value) for value in to_dict(Augment(jitter=(1, 1, 1, 0)))["jitter"]] == [float] * 4
    assert to_dict(Augment(pad=4))["pad"] == 4


# Overrides


def test_override_replaces_one_field() -> None:
    changed = override(BASE, {"method.supernet.partial_channels": 2})
    assert changed.method.supernet.partial_channels == 2
    assert override(changed, {"method.supernet.partial_channels": 4}) == BASE


def test_override_of_a_stage_by_number_and_of_all() -> None:
    first = override(P_DARTS, {"search.0.batch_size": 32})
    assert [stage.batch_size for stage in first.search] == [32, 96, 96]
    every = override(P_DARTS, {"search.*.batch_size": 32})
    assert [stage.batch_size for stage in every.search] == [32, 32, 32]
    assert [stage.cells for stage in every.search] == [5, 11, 17]


def test_later_changes_see_earlier_ones() -> None:
    changed = override(BASE, {"search.*.frozen_epochs": 1, "search.*.epochs": 2})
    assert (changed.search[0].frozen_epochs, changed.search[0].epochs) == (1, 2)


def test_override_takes_values_of_the_fields_type() -> None:
    assert override(GDAS, {"method.sampler": Softmax()}).method.sampler == Softmax()
    assert override(GDAS, {"method.sampler.tau": Constant(1)}).method.sampler == Gumbel(tau=Constant(1.0))
    assert override(BASE, {"search": P_DARTS.search}).search == P_DARTS.search
    assert override(BASE, {"seeds": Seeds(1, 2, 3)}).seeds == Seeds(1, 2, 3)


def test_override_takes_plain_data() -> None:
    plain = {"type": "Gumbel", "hard": False, "tau": {"type": "Constant", "value": 2}}
    assert override(BASE, {"method.sampler": plain}).method.sampler == Gumbel(False, Constant(2.0))
    ops = override(BASE, {"space.ops": ["skip_connect", "sep_conv_3x3"]}).space.ops
    assert ops == ("skip_connect", "sep_conv_3x3")


@pytest.mark.parametrize("value", [None, 0.5, 1])
def test_optional_fields_take_none_and_numbers(value: float | None) -> None:
    clip = override(BASE, {"method.arch_update.clip": value}).method.arch_update.clip
    assert clip == value
    assert clip is None or type(clip) is float


def refused(changes: dict[str, Any], trial: Trial = BASE) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is the callers' subject)
        override(trial, changes)
    return str(caught.value)


def test_unknown_fields_list_the_valid_ones() -> None:
    assert refused({"method.sampler.tua": 5.0}, GDAS) == (
        "method.sampler.tua: Gumbel has no field 'tua'; it has hard, tau"
    )
    assert "it has space, data, method, search, retrain, seeds" in refused({"sede": 1})


def test_unknown_fields_of_plain_data_list_the_valid_ones() -> None:
    message = refused({"method.sampler": {"type": "Gumbel", "tua": 1}})
    assert message == "method.sampler has no field 'tua'; it has hard, tau"


def test_unknown_stages_list_the_valid_ones() -> None:
    assert refused({"search.3.epochs": 1}, P_DARTS) == "search.3.epochs: '3' is not one of *, 0, 1, 2"


def test_there_is_nothing_below_a_plain_value() -> None:
    assert "0.1 has no field 'start'" in refused({"search.0.lr.start.start": 1})


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("search.0.epochs", "many", "int"),
        ("search.0.epochs", 3.0, "int"),
        ("search.0.epochs", True, "int"),
        ("search.0.clip", "5", "float"),
        ("search.0.clip", True, "float"),
        ("search.0.clip", None, "float"),
        ("search.0.nesterov", 1, "bool"),
        ("search.0.keep", 1.5, "int or none"),
        ("space.name", 4, "str"),
        ("search.0.stem", "vgg", "one of 'cifar', 'imagenet'"),
        ("method.arch_update.order", True, "one of 1, 2"),
        ("method.arch_update.order", 1.0, "one of 1, 2"),
        ("method.arch_update.betas", [0.5], "2 entries"),
        ("method.arch_update.betas", 0.5, "a list"),
    ],
)
def test_wrong_types_are_refused(path: str, value: object, wanted: str) -> None:
    message = refused({path: value})
    assert message.startswith(f"{path}={value!r} must ")
    assert message.endswith(wanted)


def test_wrong_classes_are_refused() -> None:
    union = "method.sampler.type='Constant' is not one of Softmax, Gumbel"
    assert refused({"method.sampler": Constant(1.0)}) == union
    assert "is not one of Softmax, Gumbel" in refused({"method.sampler": {"hard": False}})
    assert "search.0 has no field 'value'; it has augment" in refused({"search": (Constant(1.0),)})
    assert "must be a mapping with the fields of Softmax or Gumbel" in refused({"method.sampler": "Gumbel"})


def test_the_new_value_passes_the_classes_own_check() -> None:
    assert "partial_channels=3 does not divide channels=16" in refused(
        {"method.supernet.partial_channels": 3}
    )


# Paths


def test_paths_name_every_leaf() -> None:
    found = paths(GDAS)
    assert found["method.sampler.tau.start"] == 10.0
    assert found["search.0.batch_size"] == 256
    assert found["space.ops"][0] == "none"
    assert found["seeds.retrain"] == 0


@given(trials)
def test_every_path_can_be_overridden_with_its_own_value(trial: Trial) -> None:
    settable = {path: value for path, value in paths(trial).items() if not path.endswith(".type")}
    assert override(trial, settable) == trial
    assert override(trial, settable).id == trial.id


# Text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-1", -1),
        ("0.1", 0.1),
        ("1e-3", 1e-3),
        ("True", True),
        ("false", False),
        ("None", None),
        ("none", None),
        ("(1, 2)", (1, 2)),
        ("[1, 2]", [1, 2]),
        ("{'type': 'Constant', 'value': 1}", {"type": "Constant", "value": 1}),
        ("digits", "digits"),
        ("'4'", "4"),
        ("/data/images", "/data/images"),
        ("a b", "a b"),
        ("", ""),
    ],
)
def test_parse_value(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


# A trial's id


def changes_of(value: Any, path: str) -> Iterator[Any]:
    """Other values of a field's kind, some of which the field may refuse."""
    if path.endswith(".type"):
        yield from ({"type": "Constant", "value": 0.123}, {"type": "Linear", "start": 2.0, "end": 1.0})
        yield from ({"type": "Gumbel"}, {"type": "Softmax"}, {"type": "RandomGenotype", "max_skip": 1})
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (value / 2, value + 0.25, value * 2)
    elif isinstance(value, list):
        yield from (value[::-1], [0.25] * len(value), [{}], ["snip"])
    elif isinstance(value, str):
        yield from ("imagenet", "cifar", "alpha", "first", "last", "shift", "current", "exact")
        yield from ("default", "bf16", value + "2")
    else:
        ops = ("skip_connect", "sep_conv_3x3")
        yield from (2, 0.5, "x", (0.1, 0.1, 0.1, 0.1), (ops,) * 14, {})


def other(trial: Trial, path: str, value: Any) -> Trial:
    """`trial` with another value at `path`."""
    for candidate in changes_of(value, path):
        try:
            changed = override(trial, {path.removesuffix(".type"): candidate})
        except ValueError:
            continue
        if changed != trial:
            return changed
    raise AssertionError(f"no other value was accepted for {path}={value!r}")


@pytest.mark.parametrize("name", PAPERS)
def test_every_field_but_the_place_of_downloads_changes_the_id(name: str) -> None:
    # Of the two crops at most one can be on; with neither, both can be switched.
    neither: dict[str, Any] = {"search.*.augment": Augment(), "retrain.augment": Augment()}
    if name == "gdas":  # whose hard gates cannot be compiled
        neither["method.sampler.hard"] = False
    trial = override(PAPERS[name], neither)
    changed = {path: other(trial, path, value) for path, value in paths(trial).items()}
    for path in ("data.root", "data.download", "data.workers"):
        assert changed.pop(path).id == trial.id
    assert len({each.id for each in changed.values()}) == len(set(changed.values()))
    assert trial.id not in {each.id for each in changed.values()}


def test_the_id_is_that_of_the_values() -> None:
    assert Trial(method=replace(BASE.method, searcher=Argmax())).id == Trial().id
    linear = override(GDAS, {"method.sampler.tau": Linear(10.0, 0.1)})
    assert linear.id == GDAS.id
