"""Saved tensors on their way to a file and back."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_align.offload.activations import LEAST_BYTES, Activations, Moved
from lightning_align.offload.files import Threads

LARGE = LEAST_BYTES // 4  # elements


@pytest.fixture
def threads():
    threads = Threads()
    yield threads
    threads.close()


@pytest.fixture
def moving(tmp_path, threads):
    activations = Activations(tmp_path, threads)
    yield activations
    activations.close()


def hooks(activations):
    return torch.autograd.graph.saved_tensors_hooks(
        activations.pack,
        lambda saved: activations.unpack(saved) if isinstance(saved, Moved) else saved,
    )


VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.view(64, -1).t(),
    "part": lambda x: x[17:-9],
    "every other": lambda x: x[::2],
    "expanded": lambda x: x.view(1, -1).expand(3, -1),
    "double": lambda x: x.view(torch.float64),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_comes_back_as_it_was(moving, name):
    tensor = VIEWS[name](torch.randn(LARGE + 64))
    moved = moving.pack(tensor)
    assert isinstance(moved, Moved)
    for _ in range(4):  # the copy leaves memory when others come
        others = moving.pack(torch.randn(LARGE))
    assert isinstance(others, Moved)
    assert moved.copy.memory is None
    found = moving.unpack(moved)
    assert torch.equal(found, tensor)
    assert (found.dtype, found.shape, found.stride()) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
    )


def test_views_of_one_storage_are_written_once_unless_it_changed(moving, threads):
    tensor = torch.randn(LARGE)
    before, first = moving.pack(tensor[:9]), tensor.clone()
    moving.pack(tensor.view(4, -1))
    assert threads.traffic.written == LEAST_BYTES
    tensor.add_(1)
    after = moving.pack(tensor)
    assert threads.traffic.written == 2 * LEAST_BYTES
    assert torch.equal(moving.unpack(before), first[:9])
    assert torch.equal(moving.unpack(after), tensor)


def test_another_storage_in_the_place_of_one_that_is_gone_is_another(moving):
    for value in range(20):
        moved = moving.pack(torch.full((LARGE,), float(value)))
        assert (moving.unpack(moved) == value).all()


def test_what_is_small_stays(moving):
    assert isinstance(moving.pack(torch.randn(LARGE - 1)), torch.Tensor)


def test_on_a_cpu_host_memory_is_where_it_is_anyway(threads):
    tensor = torch.randn(LARGE)
    assert Activations(None, threads).pack(tensor) is tensor


def test_a_kill_leaves_no_file(moving, tmp_path):
    moving.pack(torch.randn(LARGE))
    assert not list(tmp_path.iterdir())


def deep(x, weights, each):
    for weight in weights:
        x = each(lambda x, weight: torch.tanh(x * weight), x, weight)
    return x.sum()


CALLS = {
    "all that is saved": lambda f, *x: f(*x),
    "checkpointing": lambda f, *x: checkpoint(f, *x, use_reentrant=False),
    "reentrant checkpointing": lambda f, *x: checkpoint(f, *x, use_reentrant=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_memory_does_not_grow_with_depth_and_gradients_are_the_same(moving, name):
    for depth in (8, 24):
        weights = [torch.full((1,), 0.9 + i / 50, requires_grad=True) for i in range(depth)]
        x = torch.linspace(-1, 1, 4 * LARGE).requires_grad_()
        deep(x, weights, CALLS[name]).backward()
        expected = [p.grad for p in (x, *weights)]
        for p in (x, *weights):
            p.grad = None
        moving.begin()
        with hooks(moving):
            loss = deep(x, weights, CALLS[name])
        loss.backward()
        grads = [p.grad for p in (x, *weights)]
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        assert moving._number >= depth
        assert moving._pool.allocated_bytes <= 8 * 4 * LEAST_BYTES


def test_nothing_is_moved_without_gradients(moving, threads):
    with hooks(moving), torch.no_grad():
        deep(torch.randn(LARGE), [torch.ones(1)] * 3, CALLS["checkpointing"])
    assert threads.traffic.written == 0


def test_a_file_begins_anew_when_nothing_of_it_is_needed(moving):
    first = moving.pack(torch.randn(LARGE))
    moving.begin()
    second = moving.pack(torch.randn(LARGE))
    assert second.copy.offset == LEAST_BYTES  # the first is still needed
    del first, second
    moving.begin()
    assert moving.pack(torch.randn(LARGE)).copy.offset == 0
