"""A message is read as what was packed, and its form tells when it means something else."""

from collections import deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.strategies.pipeline.messages import length_of, packed, unpacked

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.lists(st.integers(-9, 9)).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.lists(inner, max_size=3).map(lambda entries: deque(entries, 3))
    ),
    max_leaves=8,
)


def same(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple, deque)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return bool(ours == theirs)


@settings(deadline=None)
@given(value=PLAIN)
def test_a_message_is_read_as_what_was_packed(value: Any) -> None:
    message = packed(value, CPU)
    assert len(message.data) == length_of(message.form)
    assert message.form == packed(value, CPU).form
    assert same(unpacked(message.form, message.data), value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64, torch.complex64])
def test_every_bit_of_a_tensor_arrives(dtype: torch.dtype) -> None:
    value = [True, torch.tensor([[1, 0], [3, 2**40]]).to(dtype), 2**70, np.arange(3.0), 0.1]
    message = packed(value, CPU)
    read = unpacked(message.form, message.data)
    assert torch.equal(read[1], value[1])
    assert (read[0], read[2], read[4]) == (True, 2**70, 0.1)
    assert isinstance(read[3], np.ndarray)
    assert np.array_equal(read[3], value[3])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([True], [1]),
        ([1], [1.0]),
        ([torch.zeros(2)], [torch.zeros(3)]),
        ([torch.zeros(2)], [torch.zeros(2).double()]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 1.0}, {"b": 1.0, "a": 1}),
        (["word"], ["another"]),
        ([1], (1,)),
    ],
)
def test_what_is_read_otherwise_has_another_form(one: Any, other: Any) -> None:
    assert packed(one, CPU).form != packed(other, CPU).form
    assert (
        packed({"n": 1, "x": torch.ones(2)}, CPU).form
        == packed({"n": 2, "x": torch.zeros(2)}, CPU).form
    )
