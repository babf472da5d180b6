"""TR-DPO: the reference takes on the policy when TRL's does, and a checkpoint has it."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_align import DPOModule, PipelineStrategy
from lightning_align.modules.reference_sync import ReferenceSync, mix
from tests.modules.test_dpo import CONFIGS, module, pairs
from tests.modules.test_pretrain import fit, llama

SYNC = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
BATCHES = [pairs(i, i + 1) for i in range(10)]


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class Watch(pl.Callback):
    """What policy and reference are after each optimizer step, as any callback finds them."""

    def __init__(self) -> None:
        self.policies: list[list[torch.Tensor]] = []
        self.references: list[list[torch.Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step > len(self.policies):
            self.policies.append(weights_of(pl_module.model))
            self.references.append(weights_of(pl_module.reference_layers.model))


def watched(accumulate: int = 1, **options: Any) -> tuple[list[torch.Tensor], Watch]:
    """The reference that a run of 10 batches begins with, and how it went on."""
    ours, watch = module(**{**SYNC, **options}), Watch()
    assert ours.reference_layers is not None
    first = weights_of(ours.reference_layers.model)
    fit(ours, BATCHES, callbacks=[watch], accumulate_grad_batches=accumulate)
    return first, watch


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_reference_is_mixed_every_so_many_optimizer_steps(accumulate: int) -> None:
    expected, watch = watched(accumulate, ref_model_mixup_alpha=0.25)
    assert len(watch.policies) == 10 // accumulate
    for number, policy in enumerate(watch.policies, start=1):
        if number % 2 == 0:
            expected = [0.75 * r + 0.25 * p for r, p in zip(expected, policy, strict=True)]
        found = watch.references[number - 1]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found[0], watch.references[0][0])


@pytest.mark.peer
def test_reference_matches_trl() -> None:
    """TRL's own callback, told of each step as its Trainer does."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    _, watch = watched()
    theirs = copy.deepcopy(module().model)
    policy = copy.deepcopy(theirs)
    callback = callbacks.SyncRefModelCallback(theirs, None)
    callback.sync_target_model = callback._sync_target_model  # no accelerator, no DeepSpeed
    arguments = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.6)
    for number, learned in enumerate(watch.policies, start=1):
        for parameter, value in zip(policy.parameters(), learned, strict=True):
            parameter.data.copy_(value)
        callback.on_step_end(arguments, SimpleNamespace(global_step=number), None, model=policy)
        ours = watch.references[number - 1]
        assert all(map(torch.equal, ours, weights_of(theirs))), number


def test_one_replaces_and_the_mixture_is_that_of_the_paper() -> None:
    """2 and 6 with weight 1/4 of the latter are 3."""
    reference, policy = nn.Linear(1, 1), nn.Linear(1, 1)
    for parameter in reference.parameters():
        nn.init.constant_(parameter, 2.0)
    for parameter in policy.parameters():
        nn.init.constant_(parameter, 6.0)
    mix(reference, policy, 0.25)
    assert [float(p) for p in reference.parameters()] == [3.0, 3.0]
    ReferenceSync(1.0, 3).after_step(4, reference, policy)
    assert [float(p) for p in reference.parameters()] == [3.0, 3.0]
    ReferenceSync(1.0, 3).after_step(6, reference, policy)
    assert [float(p) for p in reference.parameters()] == [6.0, 6.0]


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_with_the_reference_of_its_checkpoint(
    step: int, tmp_path: Path
) -> None:
    """Saved by a callback at a step that mixes, and at one between."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
    watch = Watch()
    whole = module(**SYNC)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving, watch],
        accumulate_grad_batches=2,
    )
    trainer.fit(whole, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    (checkpoint,) = tmp_path.glob(f"*step={step}.ckpt")
    again, later = module(**SYNC), Watch()
    later.policies = watch.policies[:step]
    fit(again, BATCHES, callbacks=[later], accumulate_grad_batches=2, ckpt_path=str(checkpoint))
    assert later.losses == watch.losses[-len(later.losses) :]
    assert len(later.losses) == 10 - 2 * step
    assert whole.reference_layers is not None
    assert again.reference_layers is not None
    pairs_of = zip(
        *map(weights_of, (m.reference_layers.model for m in (whole, again))), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs_of)


@pytest.mark.slow
def test_a_reference_that_has_moved_is_not_taken_for_one_that_has_not(tmp_path: Path) -> None:
    trainer = fit(module(**SYNC), BATCHES[:4])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"sync_ref_model=False\): the reference of the checkpoint"
    ):
        fit(module(), BATCHES, ckpt_path=tmp_path / "a.ckpt")
    # a run with a fixed one goes on with one that follows
    trainer = fit(module(), BATCHES[:4])
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    fit(module(**SYNC), BATCHES, ckpt_path=tmp_path / "b.ckpt", max_epochs=2)


LORA = {"class_path": "peft.LoraConfig"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, r"before training alone.*precompute_ref_log_probs=F"),
        ({"reference_free": True}, "there is no reference that could follow"),
        ({"loss_type": "simpo"}, "there is no reference that could follow"),
        ({"peft_config": LORA}, r"the model without its adapters.*without peft_config"),
        ({"ref_model": llama(intermediate_size=40)}, "needs a reference with the parameters of"),
        ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha=0.0\): must be in \(0, 1\]"),
        ({"ref_model_mixup_alpha": 1.5}, r"must be in \(0, 1\]"),
        ({"ref_model_sync_steps": 0}, r"ref_model_sync_steps=0\): must be at least 1"),
        ({"ref_model_sync_steps": 1.5}, r"ref_model_sync_steps=1.5\): must be a whole number"),
        ({"sync_ref_model": False}, r"ref_model_sync_steps=2\): does nothing without sync_ref"),
    ],
)
def test_what_cannot_follow_is_refused_at_construction(
    options: dict[str, Any], message: str
) -> None:
    if "peft_config" in options:
        pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"DPOModule\(.*" + message):
        DPOModule(CONFIGS["llama"], **{**SYNC, **options})


def test_strategies_under_which_no_reference_changes_are_refused_at_set_up() -> None:
    ours = module(**SYNC)
    strategy = PipelineStrategy("1F1B")
    ours._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"under PipelineStrategy the weights of a ref"):
        ours._reference.set_up(ours)
