"""What is saved and loaded under ZeROInfinityStrategy, and whole values in between."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from transformers import AutoModelForCausalLM, modeling_utils

from lightning_align import AsyncCheckpoint, ExactResume, SavePretrained
from lightning_align.checkpointing import engine, latest_valid_checkpoint
from lightning_align.checkpointing.snapshot import HostBuffer
from lightning_align.cli.export import export
from lightning_align.mapped import source_of
from lightning_align.modules import PretrainModule
from lightning_align.offload import linked
from lightning_align.offload.record import read_record
from tests.helpers.covers import cover
from tests.helpers.offloaded import (
    ADAMW,
    Both,
    Regression,
    assert_same,
    fit,
    points,
    small,
    text,
    trainer_of,
)
from tests.helpers.rewinds import Rewinds
from tests.helpers.tiny_models import TINY_MODELS


@cover(window=[1, 2], first=["ours", "theirs"])
def test_checkpoints_are_read_by_either_side(tmp_path, first, window):
    """Written in mid-epoch, with a window of accumulation that is open where it has two batches."""
    options = {"val_check_interval": 3, "accumulate_grad_batches": window}
    data = Both(points())
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    whole = Regression(schedule=True)
    begun = small() if first == "ours" else "auto"
    saving = {**options, "enable_checkpointing": True, "callbacks": [ExactResume(), save]}
    trainer = fit(tmp_path, whole, data, begun, **saving)
    expected = trainer.strategy.lightning_module_state_dict()
    states = trainer.strategy.optimizer_state(trainer.optimizers[0])
    path = tmp_path / f"step={3 // window}.ckpt"
    ended = Regression(schedule=True)
    second = "auto" if first == "ours" else small()
    trainer = fit(tmp_path, ended, data, second, path, callbacks=[ExactResume()], **options)
    assert_same(trainer.strategy.lightning_module_state_dict(), expected)
    assert_same(trainer.strategy.optimizer_state(trainer.optimizers[0]), states)


def test_edits_are_stored(tmp_path):
    strategy = small()
    module = Regression()
    fit(tmp_path, module, points(), strategy)
    name = "parts.2.0.weight"
    with strategy.gathered([name], modify=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="while it is not in memory"):
            module.parts[0][0].weight.isnan()
        module.parts[2][0].weight.fill_(2.0)
    found = strategy.lightning_module_state_dict()
    assert (found[name] == 2).all()


class Keep(pl.Callback):
    """Copies of the state after some steps."""

    def __init__(self, *steps):
        self.steps, self.states = steps, {}

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if step in self.steps:
            state = trainer.strategy.lightning_module_state_dict()
            optimizer = trainer.strategy.optimizer_state(trainer.optimizers[0])
            self.states[step] = copy.deepcopy((dict(state), optimizer))


def assert_holds(path, state):
    """Whether the checkpoint, a folder or a file, has that state of model and optimizer."""
    found = linked.read(path, "test", weights_only=True) if path.is_dir() else torch.load(path)
    module, optimizer = state
    assert_same(found["state_dict"], module)
    assert_same(found["optimizer_states"][0], optimizer)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_on_does_not_change_a_checkpoint(tmp_path):
    class Bytes(pl.Callback):
        def __init__(self):
            self.then = {}

        def on_train_batch_start(self, trainer, *_):
            for path in tmp_path.glob("*.ckpt"):
                self.then.setdefault(path, bytes_in(path))

    keep, found = Keep(1, 2, 3, 4, 5, 6), Bytes()
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    data = points()
    options = {"enable_checkpointing": True, "callbacks": [keep, save, found]}
    trainer = fit(tmp_path, Regression(), data, small(), **options)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, data)
    assert len(found.then) == 11
    for path, then in found.then.items():
        assert bytes_in(path) == then
    for step in keep.steps:
        assert_holds(tmp_path / f"step={step}.ckpt", keep.states[step])
    trainer.strategy.close()


def test_a_checkpoint_that_is_deleted_gives_its_files_free(tmp_path):
    """By ModelCheckpoint, through the CheckpointIO; the store then writes in place again."""
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=1, every_n_train_steps=1, save_last=True)
    data = points()
    options = {"enable_checkpointing": True, "callbacks": [save]}
    trainer = fit(tmp_path, Regression(), data, small(), **options)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=6.ckpt", "last.ckpt"}
    store = tmp_path / "zero_infinity" / "rank00000"
    links = [path.stat().st_nlink for path in store.glob("*.block")]
    assert sorted(set(links)) == [1, 3]
    assert links.count(3) == len(links) / 2
    trainer.strategy.close()


def test_saving_and_whole_values_work_after_fit_has_ended(tmp_path):
    data = points()
    keep = Keep(6)
    for number, distributed in enumerate((True, False)):
        strategy = small(save_distributed_checkpoint=distributed, overwrite=True)
        trainer = fit(tmp_path, Regression(), data, strategy, callbacks=[keep])
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        trainer.save_checkpoint(tmp_path / f"{number}.weights", weights_only=True)
        assert_same(dict(strategy.lightning_module_state_dict()), keep.states[6][0])
        assert (tmp_path / f"{number}.ckpt").is_dir() == distributed
        assert_holds(tmp_path / f"{number}.ckpt", keep.states[6])
        strategy.close()
    # One form in the place of the other.
    trainer = fit(tmp_path, Regression(), data, small(overwrite=True))
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    trainer.strategy.save_distributed_checkpoint = False
    trainer.save_checkpoint(tmp_path / "0.ckpt")
    assert_holds(tmp_path / "0.ckpt", keep.states[6])
    assert_holds(tmp_path / "1.ckpt", keep.states[6])


def test_what_a_file_has_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """No tensor of a block is copied on its way into a file, nor read before it is written."""
    copied = []
    copy_ = HostBuffer.copy

    def note(self, tensors, state=None):
        copied.append(copy_(self, tensors, state))
        return copied[-1]

    monkeypatch.setattr(HostBuffer, "copy", note)
    strategy = small(save_distributed_checkpoint=False)
    module = Regression(width=200)
    trainer = fit(tmp_path, module, points(), strategy)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert sum(copied) < 5000  # buffers of the norm, counters of steps
    assert (tmp_path / "file.ckpt").stat().st_size > 600_000


def test_a_place_that_is_in_use_is_refused(tmp_path):
    trainer = fit(tmp_path, Regression(), points(), small())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="the folder is in use"):
        trainer.save_checkpoint(tmp_path / "mine")
    with pytest.raises(ValueError, match="a local path, not to a URL"):
        trainer.save_checkpoint("memory://bucket/x.ckpt")


def test_async_checkpoint_writes_what_the_files_held_when_it_saved(tmp_path, monkeypatch):
    """Though the writing thread comes to it only when training has ended, and nothing is copied."""
    may_write = threading.Event()
    commit = engine.commit

    def waits(*args):
        may_write.wait()
        return commit(*args)

    monkeypatch.setattr(engine, "commit", waits)
    keep, logged = Keep(2), {}

    class End(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.update(trainer.callback_metrics)

        def on_train_end(self, *_):
            may_write.set()

    save = AsyncCheckpoint(tmp_path / "saved", every_n_train_steps=2, backpressure="skip")
    options = {"enable_checkpointing": True, "callbacks": [keep, save, End()]}
    module = Regression()
    trainer = fit(tmp_path, module, points(), small(), **options)
    path = Path(latest_valid_checkpoint(tmp_path / "saved"))
    assert torch.load(path)["global_step"] == 2
    assert_holds(path, keep.states[2])
    trainer.strategy.close()
    # It is an ordinary file, from which both sides go on.
    ends = []
    for strategy in ("auto", small(overwrite=True)):
        options = {"enable_checkpointing": True, "callbacks": [AsyncCheckpoint(tmp_path / "saved")]}
        data = points()
        trainer = fit(tmp_path, Regression(), data, strategy, path, **options)
        ends.append(dict(trainer.strategy.lightning_module_state_dict()))
    assert_same(*ends)


def test_async_checkpoint_keeps_the_best_and_last_finds_the_newest(tmp_path):
    save = AsyncCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
    data = points()
    options = {"enable_checkpointing": True, "callbacks": [save]}
    trainer = fit(tmp_path, Regression(), data, small(), **options)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=0-step=6.ckpt", "last.ckpt"}
    assert (tmp_path / "last.ckpt").resolve() == tmp_path / "epoch=0-step=6.ckpt"
    trainer.strategy.close()
    store = tmp_path / "zero_infinity" / "rank00000"
    assert {path.stat().st_nlink for path in store.glob("*.block")} == {1}
    (store / "committed").unlink()
    save = AsyncCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = trainer_of(tmp_path, small(), enable_checkpointing=True, callbacks=[save])
    trainer.fit(Regression(), data, ckpt_path="last")
    assert trainer.global_step == 6


def test_last_compares_the_committed_step_with_what_is_behind_a_url(tmp_path):
    data, url = points(), f"memory://{tmp_path.name}"
    for steps in (4, 6):
        save = AsyncCheckpoint(url, every_n_train_steps=2, save_last=True)
        options = {"enable_checkpointing": True, "callbacks": [save], "max_steps": steps}
        trainer = trainer_of(tmp_path, small(), **options)
        trainer.fit(Regression(), data, ckpt_path="last")
        assert trainer.global_step == steps
        trainer.strategy.close()


@pytest.mark.parametrize(
    ("at", "until", "options"),
    [
        (1, 2, {}),
        (2, 5, {"gradient_clip_val": 0.05}),
        (2, 5, {"accumulate_grad_batches": 2}),
        (3, 5, {"accumulate_grad_batches": 2}),  # from a window that is open, into another one
        (3, 4, {"accumulate_grad_batches": 2, "strategy": {"memory_limit": "10MB"}}),
    ],
    ids=str,
)
def test_a_run_goes_back_in_mid_fit_as_in_memory(tmp_path, at, until, options):
    arguments = options.get("strategy", {})
    options = {key: value for key, value in options.items() if key != "strategy"}
    data, ends = points(), []
    for strategy in ("auto", small(**arguments)):
        rewinds = Rewinds(at, until, 2)
        module = Regression(schedule=True)
        callbacks = [ExactResume(), rewinds]
        trainer = fit(tmp_path, module, data, strategy, callbacks=callbacks, **options)
        state = dict(trainer.strategy.lightning_module_state_dict())
        ends.append((state, trainer.strategy.optimizer_state(trainer.optimizers[0])))
        assert not rewinds.times
    assert_same(ends[1], ends[0])
    weight = rewinds.state.checkpoint["state_dict"]["parts.0.0.weight"]
    moment = rewinds.state.checkpoint["optimizer_states"][0]["state"][4]["exp_avg"]
    assert source_of(weight)
    assert source_of(moment)
    store = tmp_path / "zero_infinity" / "rank00000"
    assert read_record(store).step == trainer.global_step
    trainer.strategy.close()


def test_a_folder_for_others_is_written_from_the_files(tmp_path, monkeypatch):
    """Not one of the tensors that safetensors gets has memory of its own."""
    written = []
    save_file = modeling_utils.safe_save_file

    def note(tensors, *args, **options):
        written.append({name: source_of(tensor) is not None for name, tensor in tensors.items()})
        return save_file(tensors, *args, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", note)
    module = PretrainModule(TINY_MODELS["llama_tied"](), optimizer=ADAMW)
    data = text()
    trainer = fit(tmp_path, module, data, small(), callbacks=[SavePretrained(tmp_path / "model")])
    state = trainer.strategy.lightning_module_state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert_same(found, {name.removeprefix("model."): value for name, value in state.items()})
    assert all(all(each.values()) for each in written)
    assert sum(map(len, written)) == len({value.data_ptr() for value in state.values()})


def test_export_and_use_read_a_folder_in_no_memory_of_their_own(tmp_path, monkeypatch):
    from lightning_align.models import trained

    module = PretrainModule(TINY_MODELS["llama_tied"]().config, optimizer=ADAMW)
    data = text()
    trainer = fit(tmp_path, module, data, small())
    trainer.save_checkpoint(tmp_path / "saved")
    state = dict(trainer.strategy.lightning_module_state_dict())
    export(tmp_path / "saved", tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert_same(found, {name.removeprefix("model."): value for name, value in state.items()})
    places = []
    read = linked.read

    def note(*args, **options):
        checkpoint = read(*args, **options)
        places.extend(value.data_ptr() for value in checkpoint["state_dict"].values())
        return checkpoint

    monkeypatch.setattr(linked, "read", note)
    model = trained.load_trained(tmp_path / "saved", where="test").model
    assert {parameter.data_ptr() for parameter in model.parameters()} <= set(places)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Fails(Regression):
    """Its backward raises when the last two blocks have been updated, in the fourth step."""

    def forward(self, x):
        x = self.inlet(x)
        for number, part in enumerate(self.parts):
            x = x + part(x)
            if number == 1 and self.training and self.trainer.global_step == 3:
                x.register_hook(self.fail)
        return self.outlet(self.norm(x))

    def fail(self, _):
        raise RuntimeError("in mid-update")


@pytest.mark.parametrize("distributed", [True, False])
def test_what_is_saved_in_the_middle_of_an_update_is_the_step_before(tmp_path, distributed):
    data, keep, path = points(), Keep(3), tmp_path / "saved.ckpt"
    fit(tmp_path, Regression(), data, "auto", max_steps=3, callbacks=[keep])
    save = OnExceptionCheckpoint(tmp_path, "saved")
    strategy = small(save_distributed_checkpoint=distributed)
    with pytest.raises(RuntimeError, match="in mid-update"):
        fit(tmp_path, Fails(ADAMW), data, strategy, callbacks=[save], enable_checkpointing=True)
    assert_holds(path, keep.states[3])
    ends = []
    for kind, ckpt_path in (("auto", None), ("auto", path), (small(overwrite=True), path)):
        callbacks = [ExactResume()]
        trainer = fit(tmp_path, Regression(), data, kind, ckpt_path, callbacks=callbacks)
        ends.append(dict(trainer.strategy.lightning_module_state_dict()))
    assert_same(ends[1], ends[0])
    assert_same(ends[2], ends[0])


def test_without_a_whole_step_nothing_is_saved(tmp_path):
    strategy, save = small(atomic_step=False), OnExceptionCheckpoint(tmp_path, "saved")
    with (
        pytest.raises(RuntimeError, match="in mid-update"),
        pytest.warns(UserWarning, match="saved.ckpt is not saved: a step was interrupted"),
    ):
        fit(
            tmp_path,
            Fails(ADAMW),
            points(),
            strategy,
            callbacks=[save],
            enable_checkpointing=True,
        )
    assert not (tmp_path / "saved.ckpt").exists()


class Edits(pl.Callback):
    """Clips weights that stay in memory, as in some adversarial trainings."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.inlet.weight.clamp_(-0.1, 0.1)


def test_edits_of_what_stays_in_memory_are_saved_and_committed(tmp_path):
    data, ends = points(), []
    for strategy in ("auto", small()):
        callbacks = [Edits(), Keep(6)]
        trainer = fit(tmp_path, Regression(), data, strategy, callbacks=callbacks)
        ends.append(dict(trainer.strategy.lightning_module_state_dict()))
    assert_same(ends[1], ends[0])
    trainer.strategy.close()
    trainer = trainer_of(tmp_path, small(), callbacks=[Edits()])
    trainer.fit(Regression(), data, ckpt_path="last")
    assert_same(dict(trainer.strategy.lightning_module_state_dict()), ends[0])
