"""ZeRO-Infinity on one rank against the same module and optimizer in memory, to the bit."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import LISA, GaLoreAdamW, Muon, StableAdamW
from lightning_align.modules import PretrainModule
from lightning_align.offload.engine import OffloadEngine
from lightning_align.offload.record import read_record
from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers.covers import cover
from tests.helpers.offloaded import (
    ADAMW,
    STEPS,
    Both,
    Regression,
    assert_same,
    compare,
    fit,
    points,
    small,
    text,
    trainer_of,
)
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder, TiedDecoder


@cover(options={"plain": {}, "accumulation": {"accumulate_grad_batches": 2}}, early=["auto", False])
def test_a_module_written_by_hand_trains_as_in_memory(tmp_path, options, early):
    data = points()
    strategy = small(update_in_backward=early)
    compare(tmp_path, lambda: Regression(schedule=True), data, strategy, **options)


@cover(name=["llama", "llama_tied", "gpt2"], window=[2, 1])
def test_language_models_train_as_in_memory(tmp_path, name, window):
    data = text()
    compare(
        tmp_path,
        lambda: PretrainModule(TINY_MODELS[name](), optimizer=ADAMW),
        data,
        accumulate_grad_batches=window,
    )


@pytest.mark.parametrize(
    "build",
    [
        partial(torch.optim.AdamW, lr=1e-2),
        partial(torch.optim.AdamW, lr=1e-2, foreach=True, amsgrad=True),
        partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
        partial(torch.optim.SGD, lr=1e-2),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
        partial(StableAdamW, lr=1e-2),
        partial(Muon, lr=1e-2),
        partial(GaLoreAdamW, lr=1e-2, rank=4, update_proj_gap=2),
    ],
    ids=lambda build: f"{build.func.__module__.split('.')[0]}.{build.func.__name__}",
)
def test_each_optimizer_steps_as_in_memory(tmp_path, build):
    data = text()
    compare(tmp_path, lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=build), data)


def frozen(module):
    """Two blocks frozen, and a part of another."""
    module.parts[1].requires_grad_(False)
    module.parts[2].requires_grad_(False)
    module.parts[3][0].bias.requires_grad_(False)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("early", ["auto", False])
def test_without_the_scale_of_sums_over_tokens_it_is_another_training(tmp_path, monkeypatch, early):
    """A negative control."""
    backward = OffloadEngine.backward
    unscaled = lambda engine, **told: backward(engine, **{**told, "factor": None})  # noqa: E731
    monkeypatch.setattr(OffloadEngine, "backward", unscaled)
    monkeypatch.setattr(OffloadEngine, "scale_gradients", lambda *_: None)
    module = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)  # noqa: E731
    with pytest.raises(AssertionError, match=r"^\.model"):
        compare(tmp_path, module, text(), small(update_in_backward=early))


@pytest.mark.parametrize("early", ["auto", False])
def test_frozen_blocks_stay_and_the_others_train_as_in_memory(tmp_path, early):
    data = points()
    strategy = small(update_in_backward=early)
    compare(tmp_path, lambda: frozen(Regression()), data, strategy)


def test_clipping_by_value_and_by_norm_is_that_of_memory(tmp_path):
    """A loss that is a mean is not scaled, so that even the norm is the same, bit for bit."""
    data = points()
    for options in ({}, {"gradient_clip_algorithm": "value"}):
        options = {"gradient_clip_val": 0.05, **options}
        compare(tmp_path, Regression, data, small(overwrite=True), **options)


def test_clipping_a_sum_over_tokens_is_that_of_memory(tmp_path):
    """What the gradients are divided by is known before the last backward, so norms are exact."""
    data = text()
    compare(
        tmp_path,
        lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW),
        data,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
    )


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_blocks_that_recompute_their_activations_are_fetched_again(tmp_path, name):
    data = text()
    build = {"plain": partial(PlainDecoder, dropout=0.2), **TINY_MODELS}[name]

    def module():
        torch.manual_seed(0)
        return PretrainModule(build(), optimizer=ADAMW, activation_checkpointing=True)

    compare(tmp_path, module, data, accumulate_grad_batches=2)


@cover(
    ending={"drop": ("drop", None), "keep": ("keep", None), "clipped": ("drop", 0.5)},
    sampling=["uniform", "weight_norm"],
)
def test_lisa_trains_as_in_memory(tmp_path, ending, sampling):
    """Blocks that come back warm up, with new moments or with those that they had."""
    state, clip = ending
    data = text()
    settings = {"interval_steps": 3, "reactivation_warmup_steps": 1, "filename": None}
    found = []
    for strategy in ("auto", small()):
        lisa = LISA(1, sampling=sampling, optimizer_state=state, **settings)
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
        trainer = fit(tmp_path, module, data, strategy, callbacks=[lisa], gradient_clip_val=clip)
        states = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        found.append((lisa.history, trainer.strategy.lightning_module_state_dict(), states))
    assert len({active for _, active in found[0][0]}) > 1
    assert_same(found[1], found[0])


def test_a_frozen_block_costs_no_write_and_keeps_its_file(tmp_path):
    strategy = small()
    module = frozen(Regression())
    fit(tmp_path, module, points(), strategy)
    record = read_record(tmp_path / "zero_infinity" / "rank00000")
    assert (record.slots["parts.1"], record.slots["parts.2"]) == (0, 0)
    second = tmp_path / "zero_infinity" / "rank00000" / "00001.1.block"
    assert not second.read_bytes().strip(bytes(1))


def test_a_tied_decoder_with_dropout_and_validation(tmp_path):
    data = text()

    def module():
        torch.manual_seed(0)
        return PretrainModule(TiedDecoder(dropout=0.1), optimizer=ADAMW)

    compare(tmp_path, module, Both(data), val_check_interval=5)


def test_updates_that_have_waited_are_done_in_a_validation(tmp_path):
    """Its inference mode is no place to make an optimizer's state in, which training changes."""
    data = Both(points())

    class Validates(pl.Callback):
        """As it comes behind the first step, and behind no other."""

        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1 and isinstance(trainer.strategy, ZeROInfinityStrategy):
                with torch.inference_mode():
                    trainer.strategy.lightning_module_state_dict()

    options = {"gradient_clip_val": 0.05, "val_check_interval": 2, "callbacks": [Validates()]}
    compare(tmp_path, lambda: Regression(schedule=True), data, **options)


def test_memory_holds_as_many_blocks_as_it_may(tmp_path):
    strategy = small()
    counts = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            present = [p for p in pl_module.parts.parameters() if p.stride()[-1] != 0]
            counts.append(len(present) / 4)

    module = Regression()
    trainer = fit(tmp_path, module, points(), strategy, callbacks=[Count()])
    assert counts == [2.0] * STEPS  # of 4 blocks, with 4 parameters each
    for parameter in module.parts.parameters():
        with pytest.raises(RuntimeError, match=r"parts.*strategy\.gathered"):
            parameter.isnan()
    with strategy.gathered():
        assert not any(p.isnan().any() for p in module.parameters())
    assert trainer.callback_metrics["loss"].isfinite()


def test_fit_twice_trains_as_twice_in_memory(tmp_path):
    """The second optimizer begins anew, with nothing of what the first one has stored."""
    data = points()
    modules = Regression(), Regression()
    for module, strategy in zip(modules, ("auto", small()), strict=True):
        trainer = fit(tmp_path, module, data, strategy)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data)
    assert_same(trainer.strategy.lightning_module_state_dict(), modules[0].state_dict())


def test_validation_needs_no_optimizer_and_fit_goes_on_behind_it(tmp_path):
    data = points()
    modules, found = (Regression(), Regression()), []
    for module, strategy in zip(modules, ("auto", small()), strict=True):
        trainer = trainer_of(tmp_path, strategy)
        trainer.validate(module, data, verbose=False)
        found.append(float(trainer.callback_metrics["val_loss"]))
        trainer.fit(module, data)
    assert found[0] == found[1]
    assert_same(trainer.strategy.lightning_module_state_dict(), modules[0].state_dict())


class ReadsElsewhere(Regression):
    def training_step(self, batch, batch_idx):
        decay = self.parts[0][0].weight * self.parts[0][0].weight
        return super().training_step(batch, batch_idx) + decay.sum()


def test_reading_a_parameter_that_is_away_is_told(tmp_path):
    data = points()
    with pytest.raises(RuntimeError, match=r"parts\.0\.0\.weight.*strategy\.gathered"):
        fit(tmp_path, ReadsElsewhere(ADAMW), data, small())
