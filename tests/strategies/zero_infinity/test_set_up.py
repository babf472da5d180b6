"""How a run begins: folders, locks, committed steps of other runs; and a disk that fails."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.modules import PretrainModule
from lightning_align.offload.files import DirectFile
from tests.helpers.offloaded import ADAMW, Regression, fit, points, small, text, trainer_of
from tests.helpers.tiny_models import TINY_MODELS


def refused(tmp_path, match, **arguments):
    data = points()
    with pytest.raises(ValueError, match=match):
        fit(tmp_path, Regression(), data, small(**arguments))


def test_a_folder_whose_parent_is_missing(tmp_path):
    refused(tmp_path, "parent.*is not there", nvme_path=str(tmp_path / "parent/nvme"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "nvme").touch()  # a file is in its place, in which not even root can write
    refused(tmp_path, "cannot be written", nvme_path=str(tmp_path / "nvme"))


def test_without_a_path_the_folder_is_made_below_the_root(tmp_path):
    root = tmp_path / "runs" / "first"
    trainer = fit(root, Regression(), points(), small())
    assert (root / "zero_infinity" / "rank00000" / "committed").is_file()
    trainer.strategy.close()


def test_a_committed_step_is_plain_data(tmp_path):
    data = text()
    for weights_only in (None, True):
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
        trainer = trainer_of(tmp_path, small(), max_steps=2 if weights_only is None else 4)
        trainer.fit(module, data, ckpt_path="last", weights_only=weights_only)
        trainer.strategy.close()
    assert trainer.global_step == 4


def test_a_committed_step_is_not_overwritten_unasked(tmp_path):
    data = points()
    strategy = small()
    fit(tmp_path, Regression(), data, strategy, max_steps=3)
    strategy.close()
    refused(tmp_path, "holds step 3 of an earlier run")
    trainer = fit(tmp_path, Regression(), data, small(), "last")
    assert trainer.global_step == 6
    trainer.strategy.close()
    with pytest.raises(ValueError, match="the committed step is of AdamW"):
        fit(tmp_path, Regression(partial(torch.optim.Adam, lr=1e-2)), data, small(), "last")
    fit(tmp_path, Regression(), data, small(overwrite=True)).strategy.close()


def test_a_folder_of_a_live_run(tmp_path):
    folder = tmp_path / "nvme" / "rank00000"
    folder.mkdir(parents=True)
    lock = FolderLock(Folder(folder))
    lock.acquire()
    data = points()
    with pytest.raises(RuntimeError, match=r"ZeROInfinityStrategy\(nvme_path='.*is writing"):
        fit(tmp_path, Regression(), data, small(nvme_path=str(tmp_path / "nvme")))
    lock.release()


def test_an_error_of_the_disk_ends_the_run_at_a_whole_step(tmp_path, monkeypatch):
    data = points()
    write, steps = DirectFile.write, []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            steps.append(trainer.global_step)

    def full(self, memory, offset):
        if len(steps) == 3:
            raise OSError(28, "No space left on device", str(self.path))
        return write(self, memory, offset)

    monkeypatch.setattr(DirectFile, "write", full)
    strategy = small()
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, Regression(), data, strategy, callbacks=[Count()])
    strategy.close()
    monkeypatch.undo()
    trainer = fit(tmp_path, Regression(), data, small(), "last")
    theirs = Regression()
    fit(tmp_path, theirs, data)
    found = trainer.strategy.lightning_module_state_dict()
    assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items())


class Sizes(pl.Callback):
    """Bytes of the file for gradients when training starts, and when it ends."""

    def on_train_start(self, trainer, *_):
        self.found = [self.file(trainer).stat().st_size]

    def on_train_end(self, trainer, *_):
        self.found.append(self.file(trainer).stat().st_size)

    def file(self, trainer):
        return trainer.strategy._engine.store.folder / "gradients"


@pytest.mark.parametrize(
    ("options", "reserved"),
    [
        ({}, (False, False)),
        ({"gradient_clip_val": 1.0}, (True, True)),
        ({"accumulate_grad_batches": 2}, (True, True)),
        ({"callbacks": [pl.callbacks.GradientAccumulationScheduler({0: 2})]}, (False, True)),
    ],
    ids=["in backward", "clipped", "accumulated", "accumulated unforeseen"],
)
def test_room_for_gradients_is_reserved_where_they_wait(tmp_path, options, reserved):
    sizes = Sizes()
    options = {**options, "callbacks": [sizes, *options.get("callbacks", [])]}
    data = points()
    trainer = fit(tmp_path, Regression(), data, small(), max_steps=2, **options)
    engine = trainer.strategy._engine
    needed = sum(block.nbytes for block in engine.blocks if not block.gradients_stay)
    assert sizes.found == [needed * there for there in reserved]
    trainer.strategy.close()
