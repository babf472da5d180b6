import io
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_align.checkpointing.frozen import freeze, thaw
from lightning_align.checkpointing.snapshot import HostBuffer

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float8_e4m3fn,
)


def snapshot(state: Any, buffer: HostBuffer) -> Any:
    structure, tensors = freeze(state)
    buffer.copy(tensors, state)
    return structure


def from_file(structure: Any, buffer: HostBuffer) -> Any:
    data = b"".join(bytes(part) for part in buffer.file(structure))
    return torch.load(io.BytesIO(data), weights_only=True)


def flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key, value in state.items() for leaf in (key, *flat(value))]
    if isinstance(state, (list, tuple)):
        return [type(state), *(leaf for value in state for leaf in flat(value))]
    return [state]


def bits(tensor: Tensor) -> bytes:
    resolved = (
        tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    return resolved.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        if not isinstance(theirs_, Tensor):
            assert ours_ == theirs_
            continue
        assert type(ours_) is type(theirs_)
        assert (ours_.dtype, ours_.shape) == (theirs_.dtype, theirs_.shape)
        assert ours_.requires_grad == theirs_.requires_grad
        assert bits(ours_) == bits(theirs_)
    assert sharing(ours) == sharing(theirs)


def sharing(leaves: list[Any]) -> list[tuple[int, int]]:
    """Which tensors lie in the same storage."""
    storages = [
        (index, leaf.untyped_storage().data_ptr())
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.numel()
    ]
    return [(i, j) for i, a in storages for j, b in storages if i < j and a == b]


@st.composite
def tensors(draw: st.DrawFn, pool: list[Tensor]) -> Tensor:
    """A fresh tensor, or a view of one drawn before."""
    if pool and draw(st.booleans()):
        base = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(("same", "flat part", "transposed", "strided", "expanded")))
        if kind == "flat part" and base.is_contiguous() and base.numel() > 1:
            return base.reshape(-1)[draw(st.integers(0, base.numel() - 1)) :]
        if kind == "transposed" and base.dim() >= 2:
            return base.transpose(0, 1)
        if kind == "strided" and base.dim() >= 1:
            return base[:: draw(st.integers(1, 3))]
        if kind == "expanded" and base.dim() == 0:
            return base.expand(draw(st.integers(0, 4)))
        return base
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**16))
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        size = (tensor.numel(), dtype.itemsize)
        raw = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, size)
        tensor = torch.from_numpy(raw.astype(np.uint8)).view(dtype).reshape(shape)
    if draw(st.booleans()) and dtype is torch.complex64:
        tensor = tensor.conj()
    if draw(st.booleans()) and dtype.is_floating_point and dtype.itemsize > 1:
        tensor = nn.Parameter(tensor, draw(st.booleans()))
    pool.append(tensor.detach())
    return tensor


@st.composite
def states(draw: st.DrawFn) -> Any:
    pool: list[Tensor] = []
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
    )
    leaf = st.one_of(plain, st.deferred(lambda: tensors(pool)), st.deferred(lambda: tensors(pool)))
    keys = st.one_of(st.text(max_size=4), st.integers(0, 50))
    nested = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=4),
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=12,
    )
    return draw(st.dictionaries(keys, nested, max_size=4))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(states(), states())
def test_any_state_round_trips_through_file_and_memory(first: Any, second: Any) -> None:
    """One buffer for all of it: what it held before must not show."""
    buffer = HostBuffer()
    for state in (first, second, first):
        structure = snapshot(state, buffer)
        assert_same(from_file(structure, buffer), state)
        assert_same(thaw(structure, buffer), state)


def test_a_state_that_changes_after_the_save_does_not_change_the_snapshot() -> None:
    buffer, weight, counts = HostBuffer(), torch.ones(1000, 300), {"step": 3, "list": [1]}
    array = np.zeros(3)
    structure = snapshot({"weight": weight, "counts": counts, "array": array}, buffer)

    weight.zero_()
    counts["step"] = 4
    counts["list"].append(2)
    array += 1

    kept = thaw(structure, buffer)
    assert kept["weight"].sum() == 300_000
    assert kept["counts"] == {"step": 3, "list": [1]}
    assert kept["array"].sum() == 0


def test_what_restore_returns_is_not_the_buffer() -> None:
    """Optimizers keep the tensors that load_state_dict is given; the next save writes elsewhere."""
    buffer, weight = HostBuffer(), torch.ones(4)
    restored = thaw(snapshot({"weight": weight}, buffer), buffer)

    weight.zero_()
    snapshot({"weight": weight}, buffer)

    assert restored["weight"].sum() == 4


def test_tied_weights_are_stored_once() -> None:
    model = nn.Linear(100, 100, bias=False)
    state = {"embedding": model.weight.detach(), "head": model.weight.detach()}
    buffer = HostBuffer()
    structure = snapshot(state, buffer)

    loaded = from_file(structure, buffer)

    assert sum(len(part) for part in buffer.file(structure)) < 1.1 * 40_000
    assert loaded["embedding"].data_ptr() == loaded["head"].data_ptr()


def test_a_small_view_of_a_large_storage_costs_what_it_shows() -> None:
    """torch.save writes the whole storage."""
    buffer, logits = HostBuffer(), torch.randn(1000, 1000)
    structure = snapshot({"row": logits[500]}, buffer)

    assert sum(len(part) for part in buffer.file(structure)) < 8000
    assert torch.equal(from_file(structure, buffer)["row"], logits[500])


def test_one_storage_under_two_dtypes() -> None:
    """torch.save refuses these."""
    buffer, raw = HostBuffer(), torch.arange(16, dtype=torch.uint8)
    structure = snapshot({"bytes": raw, "floats": raw.view(torch.float32)}, buffer)

    loaded = from_file(structure, buffer)

    assert torch.equal(loaded["bytes"], raw)
    assert torch.equal(loaded["floats"].view(torch.uint8), raw)
    assert loaded["bytes"].data_ptr() == loaded["floats"].data_ptr()


def test_a_conjugate_that_becomes_a_plain_view() -> None:
    """Same address, same shape; only a bit of the tensor differs."""
    buffer, base = HostBuffer(), torch.complex(torch.ones(3), torch.ones(3))
    for tensor in (base, base.conj(), base.imag, base.conj().imag, base):
        structure = snapshot([base, tensor], buffer)
        assert_same(from_file(structure, buffer), [base, tensor])


def test_the_same_state_again_is_laid_out_once() -> None:
    buffer, model = HostBuffer(), nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(5):
        model(torch.randn(2, 50)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        structure = snapshot(state, buffer)
        assert_same(from_file(structure, buffer), state)

    assert (buffer.layouts, buffer.allocations) == (1, 1)


def test_a_tensor_that_only_moved_keeps_the_layout() -> None:
    """Gradients, states of generators: made anew at each save."""
    buffer, weight = HostBuffer(), torch.randn(100)
    kept = []
    for _ in range(3):
        state = {"weight": weight, "rng": torch.get_rng_state()}
        kept.append(state["rng"])
        torch.rand(1)
        structure = snapshot(state, buffer)
        assert_same(from_file(structure, buffer), state)

    assert buffer.layouts == 1


def test_sharing_that_appears_is_seen() -> None:
    """Same shapes, same dtypes; but now two weights are tied."""
    buffer, a, b = HostBuffer(), torch.ones(5), torch.zeros(5)
    snapshot([a, b], buffer)

    structure = snapshot([a, a], buffer)

    assert_same(from_file(structure, buffer), [a, a])
    assert buffer.layouts == 2


def test_tensors_that_are_now_in_a_storage_of_their_own() -> None:
    """Same addresses, same shapes; but no longer parts of one storage."""
    buffer, array = HostBuffer(), np.arange(8.0)
    whole = torch.from_numpy(array)
    halves = [torch.from_numpy(array[:4]), torch.from_numpy(array[4:])]
    for state in ([whole[:4], whole[4:]], halves):
        assert_same(from_file(snapshot(state, buffer), buffer), state)


def test_a_state_that_grows_gets_more_memory() -> None:
    buffer, state = HostBuffer(), {}
    for step in range(40):  # unfreezing: optimizer state appears
        state[f"tensor{step}"] = torch.randn(1000)
        structure = snapshot(state, buffer)
        assert_same(from_file(structure, buffer), state)

    assert 2 < buffer.allocations < 25  # an eighth is added each time
    del state["tensor0"]
    before = buffer.allocations
    assert_same(from_file(snapshot(state, buffer), buffer), state)
    assert buffer.allocations == before


def test_a_parameter_that_is_frozen_in_between() -> None:
    buffer, weight = HostBuffer(), nn.Parameter(torch.ones(3))
    snapshot([weight], buffer)
    weight.requires_grad_(False)

    loaded = from_file(snapshot([weight], buffer), buffer)

    assert not loaded[0].requires_grad


def test_versions_of_modules_are_in_the_file() -> None:
    """state_dict() hides them in an attribute of its OrderedDict."""
    buffer = HostBuffer()
    loaded = from_file(snapshot({"model": nn.BatchNorm1d(2).state_dict()}, buffer), buffer)
    assert loaded["model"]._metadata[""]["version"] == 2
