"""Frozen dataclasses to plain data and back, and dotted overrides: what records, sweeps and `--set` use.

A value has one home, the field of a dataclass. Where a field admits several dataclasses (a schedule, a
sampler), the plain form carries the class's name under "type".
"""

import ast
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def to_dict(value: Any, hint: Any = None) -> Any:
    """Plain data (dict, list, str, numbers, None) of a configuration."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        plain = {f.name: to_dict(getattr(value, f.name), hints[f.name]) for f in fields(value)}
        several = sum(is_dataclass(member) for member in _members(hint)) > 1
        return {"type": type(value).__name__, **plain} if several else plain
    if isinstance(value, tuple):
        items = _items(hint, len(value))
        return [to_dict(entry, item) for entry, item in zip(value, items, strict=True)]
    if type(value) is int and float in _members(hint) and int not in _members(hint):
        return float(value)  # 1 and 1.0 are one trial, which has one text
    return value


def _items(hint: Any, count: int) -> tuple[Any, ...]:
    """Types of the `count` entries of a tuple of type `hint`; None where it does not say."""
    for member in _members(hint):
        items = get_args(member) if get_origin(member) is tuple else ()
        if len(items) == 2 and items[1] is Ellipsis:
            return items[:1] * count
        if len(items) == count:
            return items
    return (None,) * count


def from_dict(hint: Any, plain: Any, path: str = "") -> Any:
    """The value of type `hint` that `to_dict` made `plain` of.

    Raises:
        ValueError: an unknown field, a missing one, or a value of another type; the message names the field.
    """
    members = _members(hint)
    if plain is None and type(None) in members:
        return None
    classes = [member for member in members if is_dataclass(member)]
    if classes:
        return _dataclass_from(classes, plain, path)
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(plain, list | tuple):
            raise ValueError(f"{path}={plain!r} must be a list")
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(from_dict(items[0], entry, f"{path}.{i}") for i, entry in enumerate(plain))
        if len(items) != len(plain):
            raise ValueError(f"{path}={plain!r} must have {len(items)} entries")
        return tuple(
            from_dict(item, entry, f"{path}.{i}")
            for i, (item, entry) in enumerate(zip(items, plain, strict=True))
        )
    for member in members:
        if get_origin(member) is tuple and isinstance(plain, list | tuple):
            return from_dict(member, plain, path)
        if get_origin(member) is Literal and any(
            plain == value and type(plain) is type(value) for value in get_args(member)
        ):
            return plain
        if member is float and isinstance(plain, int | float) and not isinstance(plain, bool):
            return float(plain)
        if member in (int, str, bool) and type(plain) is member:
            return plain
    wanted = " or ".join(_describe(member) for member in members)
    raise ValueError(f"{path}={plain!r} must be {wanted}")


def _describe(member: Any) -> str:
    if get_origin(member) is Literal:
        return "one of " + ", ".join(map(repr, get_args(member)))
    return "none" if member is type(None) else getattr(member, "__name__", str(member))


def _dataclass_from(classes: list[Any], plain: Any, path: str) -> Any:
    if not isinstance(plain, Mapping):
        raise ValueError(
            f"{path}={plain!r} must be a mapping with the fields of "
            f"{' or '.join(c.__name__ for c in classes)}"
        )
    plain = dict(plain)
    cls = classes[0]
    if len(classes) > 1:
        kind = plain.pop("type", None)
        named = {c.__name__: c for c in classes}
        if kind not in named:
            raise ValueError(f"{path}.type={kind!r} is not one of {', '.join(named)}")
        cls = named[kind]
    hints = _hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(plain) - known):
        raise ValueError(
            f"{path or cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    for f in fields(cls):
        if f.name not in plain and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{path or cls.__name__} lacks the field {f.name!r} of {cls.__name__}; give it")
    return cls(
        **{
            name: from_dict(hints[name], entry, f"{path}.{name}" if path else name)
            for name, entry in plain.items()
        }
    )


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted fields replaced.

    E.g. `{"method.sampler.tau.start": 5.0, "search.0.epochs": 3, "search.*.batch_size": 64}`.

    A value is one of the field's type, or the plain data of one; `*` stands for every stage of a tuple.

    Raises:
        ValueError: no such field (the valid ones are listed), or a value that the field refuses.
    """
    for path, value in changes.items():
        config = _override(config, path.split("."), value, path, None)
    return config


def _override(node: Any, keys: list[str], value: Any, path: str, hint: Any) -> Any:
    if not keys:
        return from_dict(hint, to_dict(value, hint), path)
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        valid = ["*", *map(str, range(len(node)))]
        if key not in valid:
            raise ValueError(f"{path}: {key!r} is not one of {', '.join(valid)}")
        item = get_args(hint)[0] if get_args(hint) else None
        return tuple(
            _override(entry, rest, value, path, item) if key in ("*", str(i)) else entry
            for i, entry in enumerate(node)
        )
    if not is_dataclass(node) or isinstance(node, type):
        raise ValueError(f"{path}: {node!r} has no field {key!r}; set the field before it as a whole")
    known = [f.name for f in fields(node)]
    if key not in known:
        raise ValueError(f"{path}: {type(node).__name__} has no field {key!r}; it has {', '.join(known)}")
    return replace(node, **{key: _override(getattr(node, key), rest, value, path, _hints(type(node))[key])})


def paths(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a configuration by its dotted name."""
    plain = to_dict(config) if is_dataclass(config) else config
    if isinstance(plain, Mapping):
        items = [(str(key), entry) for key, entry in plain.items()]
    elif isinstance(plain, list) and any(isinstance(entry, Mapping) for entry in plain):
        items = [(str(index), entry) for index, entry in enumerate(plain)]
    else:
        return {prefix: plain}
    found: dict[str, Any] = {}
    for key, entry in items:
        found |= paths(entry, f"{prefix}.{key}" if prefix else key)
    return found


ABOVE_ZERO = 1e-12
"""Lower bound of what must be positive."""


def check_range(owner: object, **bounds: tuple[float, float, str]) -> None:
    """Refuse numbers of a dataclass outside [low, high), each given as field=(low, high, way out).

    Raises:
        ValueError: a value is outside or not a number; None is not checked.
    """
    for name, (low, high, advice) in bounds.items():
        value = getattr(owner, name)
        if value is not None and not low <= value < high:
            least = "above 0" if low == ABOVE_ZERO else f"at least {low:g}"
            wanted = least if math.isinf(high) else f"in [{low:g}, {high:g})"
            raise ValueError(f"{type(owner).__name__}: {name}={value} must be {wanted}; {advice}")


def parse_value(text: str) -> Any:
    """Python literal in `text`, or the text itself: 4, 0.1, True, None, (1, 2), digits."""
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
