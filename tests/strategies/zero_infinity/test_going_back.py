"""A run that goes back to an older checkpoint than the committed step, and several callbacks."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_align import AsyncCheckpoint, ExactResume
from tests.helpers.offloaded import ADAMW, Both, Regression, assert_same, fit, points, small


def savers(folder):
    """Two callbacks of each kind, side by side."""
    return [
        ExactResume(),
        ModelCheckpoint(folder / "a", "{step}", save_top_k=-1, every_n_train_steps=2),
        ModelCheckpoint(folder / "b", "{step}", save_top_k=1, monitor="val_loss"),
        AsyncCheckpoint(folder / "c", every_n_train_steps=2, save_top_k=-1),
        AsyncCheckpoint(folder / "d", every_n_train_steps=3),
    ]


def train(folder, strategy, ckpt_path=None):
    module = Regression(ADAMW, schedule=True)
    data = Both(DataLoader(points(), batch_size=8))
    options = {"val_check_interval": 3, "enable_checkpointing": True}
    return fit(folder, module, data, strategy, ckpt_path, callbacks=savers(folder), **options)


@pytest.mark.parametrize("kind", ["a", "c"])
def test_an_older_checkpoint_is_gone_back_to_if_asked(tmp_path, kind):
    theirs = train(tmp_path / "theirs", "auto").lightning_module.state_dict()
    ours = tmp_path / "ours"
    trainer = train(ours, small())
    assert_same(trainer.strategy.lightning_module_state_dict(), theirs)
    trainer.strategy.close()
    for folder in "abcd":
        saved = {path.stem for path in (tmp_path / "theirs" / folder).glob("*.ckpt")}
        assert saved == {path.stem for path in (ours / folder).glob("*.ckpt")} != set()
    (older,) = [path for path in (ours / kind).glob("*.ckpt") if path.stem.endswith("step=2")]
    with pytest.raises(ValueError, match=r"holds step 6 of an earlier run.*overwrite=True"):
        train(ours, small(), older)
    trainer = train(ours, small(overwrite=True), older)
    assert trainer.global_step == 6
    assert_same(trainer.strategy.lightning_module_state_dict(), theirs)
    trainer.strategy.close()
