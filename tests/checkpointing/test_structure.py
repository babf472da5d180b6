"""A nested state taken apart and put together."""

import io
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_align.checkpointing.structure import Copier, place_of

Pair = namedtuple("Pair", "a b")

plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)
)
states = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(Pair._make),
        inner.map(lambda item: [item, item]),
    ),
    max_leaves=10,
)


def graph(state: Any) -> list[Any]:
    """Types and values in order, and the number of the object where one comes again."""
    numbers: dict[int, int] = {}

    def walk(value: Any) -> list[Any]:
        if not isinstance(value, (dict, list, tuple)):
            return [type(value), value]
        if not value:  # Python has one empty tuple
            return [type(value), "empty"]
        if id(value) in numbers:
            return ["again", numbers[id(value)]]
        numbers[id(value)] = len(numbers)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [type(value), *(part for key, item in items for part in (key, *walk(item)))]

    return walk(state)


def containers(state: Any) -> set[int]:
    """All that can change."""
    if not isinstance(state, (dict, list, tuple)):
        return set()
    inner = state.values() if isinstance(state, dict) else state
    own = set() if isinstance(state, tuple) else {id(state)}
    return own.union(*map(containers, inner))


@settings(max_examples=60, deadline=None)
@given(states)
def test_a_copy_has_the_same_types_values_and_sharing_and_no_container_in_common(
    state: Any,
) -> None:
    copied = Copier({}).copy(state)
    assert graph(copied) == graph(state)
    assert not containers(copied) & containers(state)


def test_containers_keep_type_identity_and_versions() -> None:
    """state_dict() hides the versions of modules in an attribute of its OrderedDict."""
    shared = [1]
    state: dict[str, Any] = {"x": shared, "y": (shared,), "pair": Pair([1], 2)}
    state["model"] = nn.BatchNorm1d(2).state_dict()

    kept = Copier({}).copy(state)

    assert kept["x"] is kept["y"][0]
    assert kept["x"] is not shared
    assert isinstance(kept["pair"], Pair)
    assert kept["pair"].a is not state["pair"].a
    assert isinstance(kept["model"], OrderedDict)
    assert kept["model"]._metadata == state["model"]._metadata
    assert kept["model"]._metadata is not state["model"]._metadata
    assert kept["model"]._metadata[""] is not state["model"]._metadata[""]


def test_cycles_close_in_the_copy() -> None:
    state: dict[str, Any] = {"list": []}
    state["self"] = state
    state["list"].append(state["list"])
    state["list"].append((state,))

    kept = Copier({}).copy(state)

    assert kept is not state
    assert kept["self"] is kept
    assert kept["list"][0] is kept["list"]
    assert kept["list"][1][0] is kept


def test_a_dict_of_another_kind_stays_one() -> None:
    counts: defaultdict[str, list[int]] = defaultdict(list, {"a": [1]})
    kept = Copier({}).copy(counts)
    counts["a"].append(2)
    assert kept == {"a": [1]}
    assert kept["new"] == []


def test_objects_of_a_type_are_replaced_once_each_and_subclasses_are_not() -> None:
    seen: list[torch.Tensor] = []

    def replace(tensor: torch.Tensor) -> str:
        seen.append(tensor)
        return f"tensor {len(seen)}"

    first, second = torch.ones(1), nn.Parameter(torch.ones(1))
    kept = Copier({torch.Tensor: replace}).copy({"a": first, "b": [first, (first,)], "c": second})
    assert kept == {"a": "tensor 1", "b": ["tensor 1", ("tensor 1",)], "c": second}
    assert kept["c"] is not second
    assert len(seen) == 1
    assert seen[0] is first


def test_what_may_change_is_deep_copied() -> None:
    state = {"set": {1, 2}, "bytes": bytearray(b"ab"), "list of sets": [{3}]}
    kept = Copier({}).copy(state)
    state["set"].add(9)
    state["bytes"].extend(b"c")
    state["list of sets"][0].clear()
    assert kept == {"set": {1, 2}, "bytes": b"ab", "list of sets": [{3}]}


def test_a_copier_remembers_nothing_of_the_state_before() -> None:
    """Else an object at the address of one that is gone would become its copy."""
    copier, inner = Copier({}), [1]
    first = copier.copy({"a": inner})
    inner.append(2)
    assert copier.copy({"a": inner}) == {"a": [1, 2]}
    assert first == {"a": [1]}


def test_what_cannot_be_copied_is_named_and_the_next_copy_works() -> None:
    copier = Copier({})
    state: dict[str, Any] = {"callbacks": [{"file": io.TextIOWrapper(io.BytesIO())}]}
    message = (
        r"SnapshotEngine\.save\(state='callbacks/0/file'\): a TextIOWrapper cannot be copied or"
        r" saved \(.*\)\. Keep it out of the state"
    )
    with pytest.raises(ValueError, match=message):
        copier.copy(state)
    del state["callbacks"][0]["file"]
    assert copier.copy(state) == {"callbacks": [{}]}


def test_place_of_an_object() -> None:
    wanted = object()
    cycle: list[Any] = []
    cycle.append(cycle)
    assert place_of({"a": cycle, "b": [0, (1, {2: wanted})]}, wanted) == "b/1/1/2"
    assert place_of(wanted, wanted) == "the state itself"
    assert place_of({"a": cycle}, wanted) == "an attribute"
