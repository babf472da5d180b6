"""Values of attributes as plain data, and back into the objects that are there."""

import io
import logging
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_align.run.plain import Encoder, LostError, Rebuilder, UnknownTypeError


class Colour(Enum):
    RED = 1


class Access(Flag):
    READ = auto()
    WRITE = auto()


@dataclass(frozen=True)
class Point:
    x: float
    tags: list[str] = field(default_factory=list)


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = [0]


class Mine:
    def __init__(self) -> None:
        self.inner, self.back = {"count": 0}, [self]


class Dangerous:
    def __del__(self) -> None:
        pass


Pair = namedtuple("Pair", "first second")


def through_a_file(plain: Any) -> Any:
    """What a checkpoint gives back."""
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def rebuilt(value: Any, today: Any = None, owner: type = Mine) -> Any:
    plain = through_a_file(Encoder({}).encode(value, "it"))
    encoder = Encoder({})
    encoder.encode(today, "it")
    return Rebuilder(encoder, owner, torch.device("cpu")).build(today, plain, "it")


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
keys = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.booleans())
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
        | st.frozensets(st.text(max_size=2), max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(nested, nested)
def test_any_nested_value_comes_back_whatever_is_there(value: Any, today: Any) -> None:
    encoder = Encoder({})
    plain = encoder.encode(value, "it")
    assert not encoder.opaque
    found = Rebuilder(encoder, Mine, torch.device("cpu")).build(today, plain, "it")
    assert found == value
    assert type(found) is type(value)


VALUES = [
    Colour.RED,
    Access.READ | Access.WRITE,
    Point(1.0, ["a"]),
    Pair(1, [2]),
    deque([1, 2], maxlen=2),
    OrderedDict(b=1, a=2),
    Counter(a=2),
    defaultdict(list, {1: [2]}),
    np.float64(0.1),
    np.bool_(True),
    torch.float16,
    torch.device("cpu"),
    torch.Size([1, 2]),
    [Point(1.0), [Point(2.0)]],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_where_nothing_is(value: Any) -> None:
    found = rebuilt(value)
    assert found == value
    assert type(found) is type(value)
    assert getattr(found, "maxlen", None) == getattr(value, "maxlen", None)


def test_tensors_and_arrays_come_back_and_a_view_without_what_it_is_a_view_of() -> None:
    base = torch.arange(1000.0)
    plain = Encoder({}).encode(base[:2], "it")
    assert plain[1].untyped_storage().nbytes() == 8
    assert torch.equal(rebuilt(base[:2]), base[:2])
    parameter = rebuilt(nn.Parameter(torch.ones(2), requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad
    for array in (np.arange(6).reshape(2, 3).T, np.array(1.5), np.array([1 + 2j])):
        assert np.array_equal(rebuilt(array), array)
        assert rebuilt(array).dtype == array.dtype


def test_what_is_there_is_filled_and_stays_the_same_object() -> None:
    """An optimizer holds the tensor, a callback the list."""
    leaf, items, table = torch.zeros(2, requires_grad=True), [1], {"a": [1]}
    mine, slotted, names = Mine(), Slotted(), SimpleNamespace(a=1)
    held = table["a"]
    then = torch.ones(2, requires_grad=True)
    assert rebuilt(then, leaf) is leaf
    assert torch.equal(leaf, then)
    assert rebuilt([1, 2], items) is items
    assert items == [1, 2]
    assert rebuilt({"a": [3], "b": 1}, table) is table
    assert held == [3]
    other = Mine()
    other.inner["count"], other.added = 7, 1
    assert rebuilt(other, mine) is mine
    assert (mine.inner["count"], mine.added, mine.back[0]) == (7, 1, mine)
    assert rebuilt(Mine(), mine) is mine
    assert not hasattr(mine, "added")
    filled = Slotted()
    filled.value = [4]
    assert rebuilt(filled, slotted).value == [4]
    assert rebuilt(SimpleNamespace(b=2), names) == SimpleNamespace(b=2)


def test_a_tensor_that_is_a_view_of_something_is_replaced() -> None:
    weight = torch.zeros(2)
    found = rebuilt(torch.ones(2), weight.detach())
    assert torch.equal(found, torch.ones(2))
    assert torch.equal(weight, torch.zeros(2))


def test_what_occurs_twice_is_one_object() -> None:
    shared = [1]
    first, second = rebuilt([shared, shared])
    assert first is second


@pytest.mark.parametrize(
    "make",
    [
        lambda: random.Random(3),
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: np.random.Generator(np.random.MT19937(3)),
    ],
)
def test_generators_of_random_numbers_go_on(make: Any) -> None:
    def draw(generator: Any) -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return float(generator.random())

    ours, theirs = make(), make()
    draw(theirs)
    rebuilt(theirs, ours)
    assert draw(ours) == draw(theirs)


def test_what_has_a_state_of_its_own_is_asked_for_it() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.Adam([weight], lr=0.1) for _ in range(2)]
    weight.grad = torch.ones(1)
    optimizers[1].step()
    rebuilt(optimizers[1], optimizers[0])
    assert optimizers[0].state[weight]["step"] == 1
    with pytest.raises(UnknownTypeError):
        rebuilt(optimizers[1])


def test_links_are_followed_and_never_copied() -> None:
    ours, theirs = nn.Linear(1, 1), nn.Linear(1, 1)
    plain = Encoder({"net.weight": theirs.weight}).encode([theirs.weight], "it")
    assert plain[2] == [("link", "net.weight")]
    rebuilder = Rebuilder(Encoder({"net.weight": ours.weight}), Mine, torch.device("cpu"))
    assert rebuilder.build(None, plain, "it")[0] is ours.weight


@pytest.mark.parametrize(
    "value",
    [
        (number for number in range(3)),
        iter([1]),
        object(),
        np.array([object()]),
        torch.ones(2).to_sparse(),
        threading.Thread(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_plain_form_is_told(value: Any) -> None:
    encoder = Encoder({})
    plain = encoder.encode({"a": value}, "it")
    assert list(encoder.opaque) == ["it[0]"]
    today = {"a": value}
    assert Rebuilder(encoder, Mine, torch.device("cpu")).build(today, plain, "it")["a"] is value
    with pytest.raises(LostError):
        Rebuilder(Encoder({}), nn.Linear, torch.device("cpu")).build({}, plain, "it")


def test_code_and_paths_are_constants() -> None:
    encoder = Encoder({})
    for value in (len, Path("x"), Mine, logging.getLogger("x"), threading.Lock(), lambda: 1):
        assert encoder.encode(value, "it")[0] == "constant"
    assert not encoder.opaque


@pytest.mark.parametrize("kind", [Dangerous, Mine])
def test_no_object_is_built_of_a_class_that_is_not_the_modules(kind: Any) -> None:
    with pytest.raises(UnknownTypeError, match=kind.__name__):
        rebuilt(kind(), owner=nn.Linear if kind is Mine else Mine)
    rebuilder = Rebuilder(Encoder({}), Mine, torch.device("cpu"))
    with pytest.raises(UnknownTypeError):
        rebuilder.build(None, ("class", "os:system"), "it")


def test_a_tensor_whose_memory_was_let_go_has_no_plain_form() -> None:
    """As those that ``fully_shard`` gathers into; reading one ends the process."""
    gathered = torch.ones(3)
    gathered.untyped_storage().resize_(0)
    encoder = Encoder({})
    encoder.encode({"gathered": gathered, "empty": torch.ones(0)}, "it")
    assert list(encoder.opaque) == ["it[0]"]
