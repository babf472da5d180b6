"""A step from shapes alone is the step of a full batch, with weights and tokens."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import LlamaConfig

import lightning_align as la
from lightning_align.cli.profile_meta import full_batch, meta_report, nothing_is_odd
from lightning_align.cli.profile_meta import on_meta as whole_step_on_meta
from lightning_align.models.weights import parameters_on_meta
from lightning_align.planner import StepReport, analyze_step
from tests.helpers.covers import with_slow

CONFIG = LlamaConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def pretrain(**options: Any) -> la.PretrainModule:
    return la.PretrainModule(CONFIG, **{"optimizer": ADAMW, **options})


def dpo(**options: Any) -> la.DPOModule:
    return la.DPOModule(CONFIG, **{"optimizer": ADAMW, **options})


def text(**options: Any) -> la.TextDataModule:
    return la.TextDataModule("nowhere.txt", block_size=12, batch_size=3, **options)


def pairs(**options: Any) -> la.PreferenceDataModule:
    return la.PreferenceDataModule("nowhere.jsonl", "nowhere", batch_size=3, max_length=12)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, **options})


def on_meta(module: Any, data: Any, **options: Any) -> StepReport:
    module.to("meta")
    return meta_report(trainer(**options), module, data, module.configure_optimizers())


STEPS: dict[str, Any] = {
    "pretrain": (pretrain, text),
    "checkpointing": (partial(pretrain, activation_checkpointing=True, z_loss=1e-4), text),
    "muon": (partial(pretrain, optimizer=partial(la.Muon, lr=1e-3)), text),
    "dpo": (dpo, pairs),
    "several losses": (partial(dpo, loss_type=["sigmoid", "sft"], use_weighting=True), pairs),
    "no reference": (partial(dpo, loss_type="simpo"), pairs),
}


@pytest.mark.parametrize("built", with_slow(STEPS, ("pretrain", "several losses")))
def test_a_step_on_meta_is_the_one_of_a_full_batch(built: Any) -> None:
    module, data = built
    with parameters_on_meta():
        empty = module()
    ours = on_meta(empty, data())
    full = module()
    batch = {name: torch.ones(like.shape).long() for name, like in full_batch(full, data()).items()}
    optimizer = full.configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        full.training_step(batch, 0).backward()
        optimizer.step()

    step()  # which makes states
    optimizer.zero_grad()
    theirs = analyze_step(full, step, optimizer=optimizer)
    assert ours.total_flops == theirs.total_flops
    assert ours.model_flops == theirs.model_flops
    assert ours.bytes == pytest.approx(theirs.bytes, rel=0.02)  # less what is looked at
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.02)


def test_micro_batches_are_parts_of_a_step() -> None:
    reports = []
    for count in (1, 3):
        with parameters_on_meta():
            module = pretrain()
        reports.append(on_meta(module, text(), accumulate_grad_batches=count))
    one, three = reports
    assert three.total_flops == 3 * one.total_flops
    assert three.phases["optimizer"].bytes == one.phases["optimizer"].bytes
    assert three.peak_bytes < 1.2 * one.peak_bytes


def test_rows_are_as_long_as_they_may_be(tmp_path: Path) -> None:
    chats = la.ConversationDataModule("nowhere", "nowhere", batch_size=5, max_length=7)
    assert full_batch(pretrain(), chats)["input_ids"].shape == (5, 7)
    assert full_batch(pretrain(), text())["labels"].shape == (3, 13)
    assert full_batch(dpo(), pairs())["completion_mask"].shape == (6, 12)


def test_what_is_only_known_with_data_is_refused() -> None:
    with pytest.raises(ValueError, match="LightningDataModule is only known with its data"):
        full_batch(pretrain(), pl.LightningDataModule())
    with pytest.raises(ValueError, match="an unpaired record is compared with"):
        full_batch(dpo(loss_type="kto"), pairs())
    with pytest.raises(ValueError, match="casts on a device"):
        on_meta(pretrain(), text(), precision="bf16-mixed")


def test_what_looks_at_values_is_refused() -> None:
    class Looks(la.PretrainModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * loss.item()

    with pytest.raises(ValueError, match="does not run without values"):
        on_meta(Looks(CONFIG, optimizer=ADAMW), text())
    galore = partial(la.GaLoreAdamW, lr=1e-3, rank=4)  # whose projection is found from gradients
    with pytest.raises(ValueError, match="does not run without values"):
        on_meta(pretrain(optimizer=galore), text())
    with pytest.raises(ValueError, match="does not run without values"):
        on_meta(dpo(precompute_ref_log_probs=True), pairs())


def test_only_values_on_meta_are_not_odd() -> None:
    with nothing_is_odd():
        assert torch.zeros(2, device="meta").all()
        assert not torch.ones(2, device="meta").any()
        assert torch.ones(2).any()
        assert not torch.zeros(2, 2).all(1).any()
    assert "all" not in vars(torch.Tensor)
    assert "any" not in vars(torch.Tensor)


def test_a_step_on_meta_is_in_the_precision_of_the_run() -> None:
    steps = {}
    for precision in ("32-true", "bf16-true"):
        with parameters_on_meta():
            module = pretrain()
        run = trainer(precision=precision)
        steps[precision], _, _ = whole_step_on_meta(run, module, text(), "h100-sxm")
    wide, half = steps.values()
    products = [r for r in half.report.trace.records if r.name == "aten.mm" and r.scope]
    assert {r.dtype for r in products} == {torch.bfloat16}  # logits and positions are in fp32
    assert half.report.total_flops == wide.report.total_flops
    assert half.report.bytes < 0.7 * wide.report.bytes
    assert (wide.hardware.dtype, half.hardware.dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("callback", [la.LISA(), la.OptimizerSwap(ADAMW)], ids=["LISA", "swap"])
def test_what_trains_otherwise_in_a_run_is_refused(callback: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(callback).__name__} changes what trains"):
        on_meta(pretrain(), text(), callbacks=[callback])
