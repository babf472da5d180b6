"""An optimizer stepped for a few tensors at a time does what it does for all."""

import copy

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.optimizer_stream import (
    OptimizerStream,
    check_optimizer,
    expected_state_bytes,
)
from lightning_align.offload.store import ShardStore


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_steps_are_those_of_memory_and_state_leaves_it(tmp_path, group_bytes, count):
    theirs = [
        nn.Parameter(torch.randn(7, 5)),
        nn.Parameter(torch.randn(70)),
        nn.Parameter(torch.ones(2)),
    ]
    ours = copy.deepcopy(theirs)
    block = Block("block", {str(number): p for number, p in enumerate(ours)})
    store = ShardStore(tmp_path, [block], Threads())
    pool = BufferPool()
    memory = pool.take(block.nbytes)
    block.copy_into(memory)
    block.show(memory)
    expected = torch.optim.AdamW(theirs, lr=0.1, fused=True)
    optimizer = torch.optim.AdamW(ours, lr=0.1, fused=True)
    stream = OptimizerStream(optimizer, store, pool, group_bytes, count)
    for step in range(4):
        gradients = {str(n): torch.randn_like(p) for n, p in enumerate(theirs)}
        if step % 2:
            del gradients["1"]
        for number, parameter in enumerate(theirs):
            parameter.grad = gradients.get(str(number))
        expected.step()
        if step > 1:  # foreseen too much and too little
            stream.foresee(block, lambda name: name != "0")
        stream.update(block, memory, gradients.get)
        store.commit(step, b"")  # the next one writes the other file
        state = [value for p in ours for value in optimizer.state[p].values()]
        assert [value.numel() for value in state] == [1, 1, 1]  # counters of steps
    assert all(torch.equal(p, other) for p, other in zip(ours, theirs, strict=True))
    stream.show(block)
    for parameter, other in zip(ours, theirs, strict=True):
        for key, value in expected.state[other].items():
            assert torch.equal(optimizer.state[parameter][key], value)


@pytest.mark.parametrize("group_bytes", [16 << 10, 64 << 10])
def test_no_group_is_larger_than_it_may_be_in_the_first_step_either(tmp_path, group_bytes):
    """Moments that a step makes are in memory until it ends, of all parameters that it steps."""
    parameters = [nn.Parameter(torch.zeros(1024)) for _ in range(9)]
    block = Block("block", {str(number): p for number, p in enumerate(parameters)})
    store = ShardStore(tmp_path, [block], Threads())
    pool = BufferPool()
    memory = pool.take(block.nbytes)
    block.copy_into(memory)
    block.show(memory)
    made = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            made.append(sum(len(group["params"]) for group in self.param_groups))

    optimizer = Watched(parameters, lr=0.1, momentum=0.9)
    stream = OptimizerStream(optimizer, store, pool, group_bytes)
    for _ in range(2):
        stream.update(block, memory, lambda _: torch.ones(1024))
    at_first, later = group_bytes // 8192, group_bytes // 4096  # two tensors are expected
    assert max(made) <= later
    assert made[0] == min(9, at_first)


def test_room_is_reserved_for_what_is_known():
    zeros = [nn.Parameter(torch.zeros(n)) for n in (1024, 1024, 1)]
    parameters = dict(zip("abc", zeros, strict=True))
    block = Block("block", parameters)
    for build, tensors in (
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (lambda p: torch.optim.SGD(p, lr=1), 0),
        (lambda p: torch.optim.SGD(p, lr=1, momentum=0.9), 1),
    ):
        assert (
            expected_state_bytes(build([parameters["a"], parameters["c"]]), block) == tensors * 4096
        )


def test_what_looks_across_parameters_is_refused():
    parameter = nn.Parameter(torch.zeros(1))
    check_optimizer(torch.optim.AdamW([parameter]), "Strategy")
    for kind in (torch.optim.LBFGS, torch.optim.Rprop):
        with pytest.raises(ValueError, match=rf"Strategy\(optimizer='{kind.__name__}'\)"):
            check_optimizer(kind([parameter]), "Strategy")


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1, 1, 1, 1]), (2, [2, 2, 2, 1]), (3, [3, 3, 2, 1])]
)
def test_as_many_groups_are_read_ahead_as_may_be_in_memory(tmp_path, monkeypatch, count, expected):
    parameters = {str(n): nn.Parameter(torch.ones(2000)) for n in range(4)}
    block = Block("block", parameters)
    store, pool = ShardStore(tmp_path, [block], Threads()), BufferPool()
    memory = pool.take(block.nbytes)
    block.copy_into(memory)
    block.show(memory)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    stream = OptimizerStream(optimizer, store, pool, 1, count)
    gradients = {name: torch.ones(2000) for name in parameters}
    stream.update(block, memory, gradients.get)
    held, step = [], OptimizerStream._step_parameters

    def counted(self, block, names, gradients):
        held.append(len(names) + len(self._reading))
        step(self, block, names, gradients)

    monkeypatch.setattr(OptimizerStream, "_step_parameters", counted)
    stream.foresee(block, lambda _: True)
    stream.update(block, memory, gradients.get)
    assert held == expected


def test_states_that_lie_one_behind_the_other_are_moved_at_once(tmp_path, monkeypatch):
    """Of four parameters in two groups the second one has no gradient in the third step."""
    parameters = [nn.Parameter(torch.randn(1024)) for _ in range(4)]
    block = Block("block", {str(number): p for number, p in enumerate(parameters)})
    store = ShardStore(tmp_path, [block], Threads(), atomic_step=False)
    pool = BufferPool()
    memory = pool.take(block.nbytes)
    block.copy_into(memory)
    block.show(memory)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    stream = OptimizerStream(optimizer, store, pool, 16 << 10)
    moved = []
    for what in ("read_more", "write"):
        call = getattr(ShardStore, what)

        def note(self, name, memory, offset=0, call=call, what=what):
            if offset:
                moved.append((what[0], (offset - block.nbytes) >> 12, len(memory) >> 12))
            return call(self, name, memory, offset)

        monkeypatch.setattr(ShardStore, what, note)
    gradients = {str(number): torch.ones(1024) for number in range(4)}
    stream.update(block, memory, gradients.get)  # makes the states, each in memory of its own
    moved.clear()
    stream.update(block, memory, gradients.get)
    assert moved == [("r", 0, 4), ("r", 4, 4), ("w", 0, 4), ("w", 4, 4)]
    moved.clear()
    del gradients["1"]
    stream.update(block, memory, gradients.get)
    assert moved == [("r", 0, 2), ("r", 4, 2), ("r", 6, 2), ("w", 0, 2), ("w", 4, 2), ("w", 6, 2)]
