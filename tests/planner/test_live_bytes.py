"""Live bytes against what must be there, and a step on meta against the real run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align.layers import checkpoint_blocks, find_layers
from lightning_align.planner import analyze_step
from lightning_align.planner.live_bytes import Held, LiveBytes, Saved, Storages
from tests.helpers.step_models import gpt, llama, loss_of


def test_a_storage_counts_once_and_until_it_is_gone() -> None:
    storages = Storages()
    a = torch.ones(100)
    assert storages.number(a) == storages.number(a.view(10, 10)[3:]) == 0
    b = torch.ones(50)
    assert storages.number(b) == 1
    assert (storages.now, storages.peak) == (600, 600)
    view = a[:5]
    del a
    assert storages.now == 600  # a view holds it
    del view
    assert (storages.now, storages.peak) == (200, 600)
    assert storages.number(torch.ones(10, device="meta")) == 2
    assert (storages.now, storages.sizes) == (200, [400, 200, 40])


def test_what_was_there_counts_at_every_moment() -> None:
    storages = Storages()
    storages.number(torch.ones(100))
    batch = torch.ones(25)
    assert storages.now == 0
    storages.number(batch, was_there=True)
    assert (storages.now, storages.peak) == (100, 500)


def test_memory_that_is_given_back_and_taken_again_counts_while_it_is_there() -> None:
    """As FSDP's parameters of two blocks, of which one is whole at a time."""
    storages = Storages()
    blocks = [torch.ones(100), torch.ones(100)]
    blocks[1].untyped_storage().resize_(0)
    storages.follow_size(blocks[0])
    assert (storages.now, storages.peak) == (400, 400)
    blocks[0].untyped_storage().resize_(0)
    blocks[1].untyped_storage().resize_(400)
    for _ in range(2):
        storages.follow_size(blocks[1])
        assert (storages.now, storages.peak) == (400, 400)
    blocks[0].untyped_storage().resize_(400)
    storages.look()
    assert (storages.now, storages.peak, storages.sizes) == (800, 800, [400, 400])
    assert storages.there == {0, 1}
    del blocks
    assert storages.now == 0


def test_without_a_storage_nothing_is_counted() -> None:
    sparse = torch.ones(3, 3).to_sparse()
    assert Storages().number(sparse) == -1
    held = Held()
    held.hold(sparse)
    held.release(sparse)
    assert held.peak == 0


def test_held_counts_a_storage_once_however_many_hold_it() -> None:
    held, a = Held(), torch.ones(10)
    first, second = Saved(held, a), Saved(held, a[2:])
    assert held.bytes == 40
    del first
    assert held.bytes == 40
    del second
    assert (held.bytes, held.peak) == (0, 40)


@pytest.mark.parametrize("build", [gpt, llama])
def test_kinds_match_the_report_of_the_same_step_on_meta(build: Callable[[], Any]) -> None:
    model = build()
    live = LiveBytes(model)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = loss_of(model)
    tokens = [cell.cell_contents for cell in loss.__closure__ or ()]
    with live.saving([each for each in tokens if isinstance(each, Tensor)]):
        value = loss()
    value.backward()
    optimizer.step()
    live.look(optimizer)
    with torch.device("meta"):
        meta = build()
    stepped = torch.optim.AdamW(meta.parameters())
    report = analyze_step(meta, loss_of(meta), optimizer=stepped)
    assert report.saved_bytes == live.saved_peak
    assert live.gradient_peak == live.weights == sum(p.nbytes for p in model.parameters())
    assert live.optimizer_peak == 2 * live.weights + 4 * len(list(model.parameters()))
    assert report.peak_bytes > live.peak  # it has temporary tensors, too


class Following(TorchDispatchMode):
    """Every storage of a real run, from nothing but what its operations return."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.storages = Storages()
        for tensor in there:
            self.storages.number(tensor, was_there=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.storages.number(each)
        return out


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_on_meta_is_that_of_the_real_run(checkpointed: bool) -> None:
    """Measured by following storages in a run that knows nothing of an analysis."""

    def build() -> Any:
        model = gpt()
        if checkpointed:
            checkpoint_blocks(find_layers(model))
        return model

    real = build()
    loss = loss_of(real)
    optimizer = torch.optim.AdamW(real.parameters())
    with Following(*real.parameters()) as following:
        loss().backward()
        optimizer.step()
    with torch.device("meta"):
        meta = build()
    report = analyze_step(meta, loss_of(meta), optimizer=torch.optim.AdamW(meta.parameters()))
    assert report.peak_bytes == pytest.approx(following.storages.peak, rel=0.02)


def _peak_of_profiler(run: Callable[[], object]) -> int:
    """The most that was allocated at a time while ``run`` was, by the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    totals = [0]
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for _, change in sorted(changes):
        totals.append(totals[-1] + change)
    return max(totals)


def test_the_peak_is_that_of_the_allocator() -> None:
    """Buffers inside of kernels are the allocator's alone; here they are small."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4)))
    batch = torch.ones(512, 256)
    loss = lambda: model(batch).square().mean()  # noqa: E731
    report = analyze_step(model, loss)
    there = sum(p.nbytes for p in model.parameters()) + batch.nbytes
    allocated = _peak_of_profiler(lambda: loss().backward())
    assert report.peak_bytes - there == pytest.approx(allocated, rel=0.02)
