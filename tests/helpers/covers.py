"""Tests of every combination, of which the default suite takes as few as meet each value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

import pytest


def cover(**axes: Mapping[str, Any] | Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by the product of some axes; what no value needs to be met is slow.

    Args:
        **axes: Name of an argument -> its values by name, or values that name themselves.
    """
    named = {axis: by_name(values) for axis, values in axes.items()}
    names = [list(values) for values in named.values()]
    met = {
        # Shifted from round to round, so that two axes of one length do not go in step.
        tuple(axis[(n + n // len(axis) * shift) % len(axis)] for shift, axis in enumerate(names))
        for n in range(max(map(len, names)))
    }
    combinations = [
        pytest.param(
            *(values[name] for values, name in zip(named.values(), chosen, strict=True)),
            id="-".join(chosen),
            marks=() if chosen in met else pytest.mark.slow,
        )
        for chosen in product(*names)
    ]
    return pytest.mark.parametrize(tuple(named), combinations)


def with_slow(values: Sequence[Any], default: Collection[str]) -> list[Any]:
    """Parameters of which all are slow but those of these names."""
    slow = pytest.mark.slow
    named = by_name(values)
    assert set(default) <= named.keys(), "a name that none has"
    return [
        pytest.param(value, id=name, marks=() if name in default else slow)
        for name, value in named.items()
    ]


def by_name(values: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    if isinstance(values, Mapping):
        return values
    found = {getattr(value, "__name__", str(value)): value for value in values}
    assert len(found) == len(values), "two values of one name"
    return found
