"""A run that goes back to an older checkpoint than the committed step, and several callbacks."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import AsyncCheckpoint, ExactResume
from tests.helpers.offloaded import Both, Regression, assert_same, fit, points, small
from tests.helpers.spiky import Told, rewinding


def guarded(folder, strategy, told, *alarms, **more):
    """A run that a guard rewinds; what it ends with."""
    data = Both(points(shuffle=True))
    callbacks = [ExactResume(), rewinding(*alarms, **more), told]
    trainer = fit(folder, Regression(schedule=True), data, strategy, callbacks=callbacks)
    assert told.ranges == [[2, 4]]
    state = dict(trainer.strategy.lightning_module_state_dict())
    return trainer, (state, trainer.strategy.optimizer_state(trainer.optimizers[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ({}, {"lr_factor": 0.5, "lr_steps": 2}),
        ({"memory_limit": "10MB"}, {"moments": "reset"}),
        ({"offload_optimizer_device": "cpu", "offload_params_device": "cpu"}, {}),
    ],
    ids=str,
)
def test_a_guard_rewinds_as_in_memory_and_says_what_it_takes_of_the_disk(
    tmp_path, caplog, arguments, more
):
    _, theirs = guarded(tmp_path, "auto", Told(), 3, **more)
    caplog.clear()
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer, ours = guarded(tmp_path, small(**arguments), Told(), 3, **more)
    assert_same(ours, theirs)
    stated = trainer.strategy.state_nbytes()
    for place, nbytes in stated.items():
        on = f"{place} once its weights have changed" if place else "host memory"
        assert f"each of about {nbytes:,} bytes of {on}" in caplog.text
    assert ("cpu" in arguments.values()) is not any(stated.keys() - {""})
    trainer.strategy.close()


@pytest.mark.slow
def test_with_weights_in_tiles_it_is_as_if_told_what_to_leave_out(tmp_path):
    trainer, ours = guarded(tmp_path / "ours", small(tile_numel=256), Told(), 3)
    trainer.strategy.close()
    trainer, theirs = guarded(tmp_path / "theirs", small(tile_numel=256), Told([[2, 4]]))
    assert_same(ours, theirs)
    trainer.strategy.close()


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
    module = Regression(schedule=True)
    data = Both(points())
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
