"""Whatever torch.save takes goes through a snapshot, and comes back as torch.load returns it."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_align.checkpointing import SnapshotEngine
from lightning_align.checkpointing.frozen import freeze, thaw
from lightning_align.checkpointing.snapshot import HostBuffer


class Labelled(Tensor):
    """A subclass that a user may have."""


torch.serialization.add_safe_globals([Labelled])


def with_attribute(tensor: Tensor, value: Any) -> Tensor:
    tensor.label = value  # type: ignore[attr-defined]
    return tensor


def quantized(values: Tensor) -> Tensor:
    return torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)


def per_channel(values: Tensor, dtype: torch.dtype) -> Tensor:
    scales, zeros = torch.full((4,), 0.25), torch.zeros(4)
    return torch.quantize_per_channel(values, scales, zeros, 0, dtype)


def ragged(layout: torch.layout, grad: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.nested.nested_tensor(
        [values[0, :2], values[1, :3]], layout=layout, requires_grad=grad
    )


def viewed(dtype: torch.dtype, values: Tensor) -> Tensor:
    return values.view(torch.uint8).view(dtype)


def parts(*places: slice) -> Callable[[Tensor], list[Tensor]]:
    """Arrays of NumPy over one memory; each tensor of them has a storage of its own."""

    def views(values: Tensor) -> list[Tensor]:
        array = values.numpy().reshape(-1)
        return [torch.from_numpy(array[place]) for place in places]

    return views


# From 16 fresh values in four rows.
LEAVES: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda values: values,
    "transposed": lambda values: values.t(),
    "two of one storage": lambda values: [values[1:], values],
    "expanded": lambda values: values[:1].expand(4, 4),
    "overlapping": lambda values: values.as_strided((3, 3), (1, 1), 2),
    "empty": lambda values: values[:0],
    "scalar": lambda values: values[0, 0],
    "parameter": lambda values: nn.Parameter(values),
    "with a history": lambda values: values.requires_grad_() * 2,
    "conjugate": lambda values: torch.complex(values, values).conj(),
    "negative": lambda values: torch.complex(values, values).conj().imag,
    "half complex": lambda values: values.half().view(torch.complex32),
    "views of an array, the shorter first": parts(slice(3), slice(None)),
    "views of an array, the longer first": parts(slice(None), slice(3)),
    "views of an array that overlap": parts(slice(2, 9), slice(5, None), slice(5)),
    "nested": ragged(torch.strided),
    "nested with gradient": ragged(torch.strided, True),
    "jagged": ragged(torch.jagged),
    "coo": lambda values: values.relu().to_sparse(),
    "coo, not coalesced": lambda values: torch.sparse_coo_tensor([[0, 0, 1]], values[0, :3], (2,)),
    "coo with a history": lambda values: values.requires_grad_().to_sparse(),
    "coo and its values": lambda values: (lambda x: [x, x._values(), x])(values.to_sparse()),
    "csr": lambda values: values.relu().to_sparse_csr(),
    "csc": lambda values: values.relu().to_sparse_csc(),
    "bsr": lambda values: values.to_sparse_bsr((2, 2)),
    "quantized": quantized,
    "quantized and a part": lambda values: (lambda q: [q, q[1:]])(quantized(values)),
    "quantized by channel": lambda values: per_channel(values, torch.qint8),
    "quantized by channel in four bits": lambda values: per_channel(values, torch.quint4x2),
    "subclass": lambda values: values.as_subclass(Labelled),
    "subclass and what it shares": lambda values: [values.as_subclass(Labelled), values[1]],
    "subclass with a history": lambda values: (values.requires_grad_() + 1).as_subclass(Labelled),
    "subclass with attributes": lambda values: with_attribute(
        values.as_subclass(Labelled), {"mask": values > 0}
    ),
    "subclass as a parameter": lambda values: nn.Parameter(values.as_subclass(Labelled)),
    "attributes": lambda values: with_attribute(values, ["a", values[1:]]),
    "attributes of a parameter": lambda values: with_attribute(nn.Parameter(values), "b"),
    "buffer": lambda values: nn.Buffer(values),
    "meta": lambda values: values.to("meta"),
    "parameter on meta": lambda values: nn.Parameter(values.to("meta")),
    "untyped storage": lambda values: values.untyped_storage(),
    "key": lambda values: {values[0]: 1, (2, values[1]): 3},
    "set": lambda values: {values.requires_grad_() * 2},
    "inference": lambda values: torch.inference_mode()(lambda: torch.ones(2))(),
    "bits": lambda values: values.view(torch.bits16),
    **{
        str(dtype): partial(viewed, dtype)
        for dtype in (
            *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16),
            *(torch.uint32, torch.uint64, torch.int8, torch.bfloat16, torch.float64),
        )
    },
}

ARRAYS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda values: values.numpy(),
    "strided array": lambda values: values.numpy()[::2, ::-1],
    "array in columns": lambda values: values.numpy().T,
    "big-endian": lambda values: values.numpy().astype(">f8"),
    "structured": lambda values: np.zeros(2, [("a", "i4"), ("b", ">f8", 3)]),
    "objects": lambda values: np.array([1, "a", None, values.numpy()], dtype=object),
    "scalar of NumPy": lambda values: [np.float16(0.5), np.datetime64("2020-01-01"), np.bool_(1)],
    "masked": lambda values: np.ma.masked_array([1, 2], [0, 1]),
    "module": lambda values: nn.Linear(2, 2),
}


def looks(value: Any) -> Any:
    """Everything about a value that can be compared, memory apart."""
    if isinstance(value, (torch.TypedStorage, torch.UntypedStorage)):
        return "storage", bytes(value.untyped().tolist())
    if isinstance(value, nn.Module):
        return type(value), looks(value.state_dict())
    if isinstance(value, Tensor):
        return looks_of_tensor(value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return value.shape, looks(value.ravel().tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        native = value.dtype.newbyteorder("=")  # what unpickling makes of it
        return type(value), native, value.shape, value.astype(native).tobytes()
    if isinstance(value, dict):
        return type(value), [(looks(key), looks(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return type(value), [looks(item) for item in value]
    return type(value), str(value)


def looks_of_tensor(tensor: Tensor) -> Any:
    about = (
        *(type(tensor), tensor.dtype, tensor.layout, tensor.device),
        *(tensor.requires_grad, tensor.is_nested, tensor.is_quantized),
        looks({k: v for k, v in vars(tensor).items() if k not in ("_size", "_strides")}),
    )
    if tensor.is_nested:  # sizes of jagged ones are symbols with numbers of their own
        return *about, [looks(part.detach()) for part in tensor.unbind()]
    if tensor.is_quantized:
        return *about, str(tensor), looks(tensor.int_repr())
    if tensor.layout is not torch.strided:
        function, arguments = tensor.detach().__reduce_ex__(2)
        return *about, function, looks(list(arguments))
    plain = torch.Tensor.as_subclass(tensor, Tensor).detach()
    about = *about, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    if tensor.is_meta or not tensor.numel():
        return about
    data = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return *about, data.view(torch.uint8).numpy().tobytes()


def dense(value: Any) -> list[Tensor]:
    """All tensors in it that have memory of their own."""
    if isinstance(value, Tensor):
        inner = dense(list(vars(value).values()))
        return [value, *inner] if has_memory(value) else inner
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        return [tensor for item in items for tensor in dense(item)]
    return []


def has_memory(tensor: Tensor) -> bool:
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not odd and bool(tensor.numel())


def sharing(value: Any) -> set[tuple[int, int]]:
    """Which of its dense tensors lie in one storage."""
    pointers = [tensor.untyped_storage().data_ptr() for tensor in dense(value)]
    return {(i, j) for i, a in enumerate(pointers) for j in range(i) if pointers[j] == a}


def overwrite(value: Any) -> None:
    """What training does next."""
    with torch.inference_mode():
        for tensor in dense(value):
            tensor.untyped_storage().fill_(7)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            value.view(np.ndarray).flat = value.flat[0]


def of_torch(state: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_as_torch_saves(state: Any, buffer: HostBuffer, weights_only: bool = True) -> None:
    theirs = of_torch(state, weights_only)
    structure, tensors = freeze(state)
    buffer.copy(tensors, state)
    overwrite(state)
    data = b"".join(bytes(part) for part in buffer.file(structure))
    from_file = torch.load(io.BytesIO(data), weights_only=weights_only)
    from_memory = thaw(structure, buffer)
    for ours in (from_file, from_memory):
        assert looks(ours) == looks(theirs)
        assert sharing(ours) >= sharing(theirs)  # views of an array share with us, too


def fresh(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LEAVES)
def test_a_tensor_of_any_kind(name: str) -> None:
    assert_as_torch_saves({"x": LEAVES[name](fresh(0))}, HostBuffer())


@pytest.mark.parametrize("name", ARRAYS)
def test_a_value_that_weights_only_refuses(name: str) -> None:
    assert_as_torch_saves({"x": ARRAYS[name](fresh(0))}, HostBuffer(), weights_only=False)


some = st.lists(st.tuples(st.sampled_from(sorted(LEAVES)), st.integers(0, 99)), max_size=5)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(some, some)
def test_any_of_them_together_one_state_after_the_other(first: Any, second: Any) -> None:
    """One buffer: what it held, and how it was laid out, must not show."""
    buffer = HostBuffer()
    for leaves in (first, second, first):
        state = [LEAVES[name](fresh(seed)) for name, seed in leaves]
        assert_as_torch_saves({"a": state, "again": state[:2]}, buffer)


def freed() -> Tensor:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


def deep(levels: int) -> list[Any]:
    state: list[Any] = []
    for _ in range(levels):
        state = [state]
    return state


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no storage": (lambda: torch.ones(2, 2).to_mkldnn(), "cannot be copied or saved .*storage of"),
    "a dtype that is not stored": (
        lambda: torch.empty(2, dtype=torch.uint4),
        "cannot be copied or saved .*uint4",
    ),
    "freed": (freed, "its storage holds 0 bytes, and it shows more"),
    "too deep": (lambda: deep(30_000), "nested too deeply"),
    "a lock": (lambda: __import__("threading").Lock(), "a lock cannot be copied or saved"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_store_is_refused_by_name_and_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    make, message = REFUSED[name]
    refused = make()
    with pytest.raises((RuntimeError, NotImplementedError, KeyError, RecursionError, TypeError)):
        of_torch({"x": refused}, weights_only=False)
    with SnapshotEngine(tmp_path) as engine:
        engine.save({"x": torch.ones(2)}, "a", 1)
        engine.wait()
        with pytest.raises(ValueError, match=rf"SnapshotEngine.save\(state='.*'\): .*{message}"):
            engine.save({"x": refused}, "b", 2)
        engine.save({"x": torch.zeros(2)}, "c", 3)
        assert engine.load("c")["x"].sum() == 0
    assert [found.name for found in engine.committed] == ["c", "a"]


def test_subclasses_share_memory_with_what_they_are_tied_to() -> None:
    values = fresh(0)
    structure, tensors = freeze([values.as_subclass(Labelled), values])
    buffer = HostBuffer()
    assert buffer.copy(tensors) == 64
    first, second = thaw(structure, buffer)
    assert type(first) is Labelled
    assert first.data_ptr() == second.data_ptr()


def test_a_state_of_sparse_tensors_is_laid_out_once() -> None:
    buffer, sparse = HostBuffer(), fresh(0).to_sparse()
    for step in range(3):
        sparse._values().fill_(step)
        structure, tensors = freeze({"x": sparse})
        buffer.copy(tensors)
        assert torch.equal(thaw(structure, buffer)["x"].to_dense(), sparse.to_dense())
    assert buffer.layouts == 1
