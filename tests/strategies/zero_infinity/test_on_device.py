"""Blocks that compute on a device, for which a CPU stands in: bit-equal, in order, told apart.

The code is that of a GPU, but for the streams: copies are made as late as the events that are
waited for let them, so that what does not wait computes NaN or is told so.
"""

from contextlib import nullcontext
from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.modules import PretrainModule
from lightning_align.offload import activations
from lightning_align.offload.device_blocks import DeviceBlocks
from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers import stand_in_device
from tests.helpers.offloaded import (
    ADAMW,
    Both,
    Regression,
    assert_same,
    compare,
    fit,
    points,
    small,
    text,
)
from tests.helpers.tiny_models import TINY_MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*has not been run yet")


@pytest.fixture
def copies(monkeypatch):
    with stand_in_device.stand_in_device(monkeypatch) as copies:
        yield copies


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}],
    ids=["in backward", "clipped windows"],
)
def test_a_module_trains_as_in_memory(tmp_path, copies, options):
    data = points()
    with pytest.warns(UserWarning, match="training on a GPU has not been run yet"):
        compare(tmp_path, partial(Regression, schedule=True), data, small(), **options)
    assert copies.there > copies.back > 0


def test_tied_weights_saved_activations_and_validation(tmp_path, copies, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1000)
    data = Both(text())

    def module():
        model = TINY_MODELS["llama_tied"]()
        return PretrainModule(model, optimizer=ADAMW, activation_checkpointing=True)

    options = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    compare(tmp_path, module, data, small(offload_activations="nvme"), **options)


class Most(pl.Callback):
    """The most bytes that were on the device at a time, behind the first step."""

    def __init__(self, copies):
        self.copies = copies

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            self.copies.most_there = 0


def test_the_device_holds_as_many_blocks_as_there_are_buffers(tmp_path, copies):
    """Those that stay beside them. Nothing is there when the fit has ended."""
    data, strategy = points(), small()
    module = Regression()
    fit(tmp_path, module, data, strategy, callbacks=[Most(copies)])
    blocks = strategy._engine.blocks
    largest = max(block.nbytes for block in blocks if block.comes_and_goes)
    stays = sum(block.nbytes for block in blocks if not block.comes_and_goes)
    assert 2 * largest + stays <= copies.most_there <= 3 * largest + stays
    assert strategy._engine.residents.count == 3  # one of them for gradients on their way
    assert copies.bytes_there == 0
    strategy.close()


def test_the_drive_is_read_as_often_as_without_a_device(tmp_path, monkeypatch):
    """A block whose gradients are on their way is still there when it is updated."""
    data, traffic = points(), []
    for with_device in (False, True):
        strategy = ZeROInfinityStrategy(params_buffer_count=3, sub_group_size=400, overwrite=True)
        with stand_in_device.stand_in_device(monkeypatch) if with_device else nullcontext():
            fit(tmp_path, Regression(), data, strategy)
        moved = strategy._engine.threads.traffic
        traffic.append((moved.read, moved.written))
        strategy.close()
    assert traffic[0] == traffic[1]


class Clamps(pl.Callback):
    """Edits in place what stays on the device, behind each step."""

    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            module.outlet.weight.clamp_(-0.05, 0.05)


@pytest.mark.parametrize("arguments", [{}, {"offload_params_device": "none"}], ids=str)
def test_what_is_edited_where_it_computes_is_trained_on(tmp_path, copies, arguments):
    found = []
    for strategy in ("auto", small(**arguments)):
        module = Regression()
        data = points()
        trainer = fit(tmp_path, module, data, strategy, callbacks=[Clamps()])
        found.append(trainer.strategy.lightning_module_state_dict())
    assert_same(found[1], found[0])
    assert found[1]["outlet.weight"].abs().max() <= 0.05


BROKEN = {
    "compute does not wait": (stand_in_device._Event, "compute_waits", lambda event: None),
    "the host does not wait for gradients": (stand_in_device._Event, "wait", lambda event: None),
    "updates do not wait for copies": (DeviceBlocks, "settle", lambda blocks, block: None),
    "copies are not renewed": (DeviceBlocks, "updated", lambda blocks, block: None),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_stand_in_finds_what_does_not_wait(tmp_path, monkeypatch, broken):
    """Negative controls: without one of the waits the training is told from that in memory."""
    data = points()
    monkeypatch.setattr(*broken)
    with (
        pytest.raises(AssertionError),
        pytest.MonkeyPatch.context() as patches,
        stand_in_device.stand_in_device(patches),
    ):
        compare(tmp_path, Regression, data, small(), max_steps=3)
