"""Both modules in bf16, mixed and true, on tiny shapes: a CPU multiplies bf16 slowly."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import DPOModule, PretrainModule
from tests.helpers.covers import cover
from tests.helpers.resume import Run
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import fit, gpt2, llama, rows
from tests.run.test_exact_resume import EVERY_STEP, checkpoints, position_of, resume

KINDS: dict[str, Any] = {
    "pretrain": (PretrainModule, rows(0, 1, 2, 3)),
    "dpo": (DPOModule, pairs(0, 1, 2)),
}
FAMILIES: dict[str, Any] = {"llama": llama, "gpt2": gpt2}


class Watch(pl.Callback):
    """Losses as logged, and the data types of loss and gradients."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.loss_dtypes: set[torch.dtype] = set()
        self.grad_dtypes: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grad_dtypes |= {p.grad.dtype for p in pl_module.parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.loss_dtypes.add(outputs["loss"].dtype)


def trained(kind: str, family: str, precision: str, **options: Any) -> tuple[Watch, Any]:
    pl.seed_everything(1, verbose=False)
    build, batch = KINDS[kind]
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module, watch = build(FAMILIES[family](), optimizer=optimizer, **options), Watch()
    fit(module, [batch] * 5, callbacks=[watch], precision=precision)
    return watch, module


def decreases(losses: list[float]) -> bool:
    return losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


@cover(kind=list(KINDS), family=list(FAMILIES), checkpointing={"all": True, "none": False})
def test_mixed_precision_trains_close_to_fp32(kind: str, family: str, checkpointing: bool) -> None:
    theirs, _ = trained(kind, family, "32-true")
    ours, module = trained(kind, family, "bf16-mixed", activation_checkpointing=checkpointing)
    assert ours.loss_dtypes == ours.grad_dtypes == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert decreases(ours.losses)
    # bf16 keeps 8 bits, so an activation is off by up to 2^-9 of itself. Before the first step
    # that is the difference of the losses; AdamW's first steps have the size lr whatever the
    # gradient, so that each may multiply it.
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=2**-9)
    assert ours.losses == pytest.approx(theirs.losses, rel=2**-5)
    assert ours.losses != theirs.losses  # it was bf16


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["cast", "built"])
@cover(kind=list(KINDS), family=list(FAMILIES))
def test_true_bf16_trains(kind: str, family: str, options: dict[str, str]) -> None:
    watch, module = trained(kind, family, "bf16-true", **options)
    assert watch.loss_dtypes == {torch.float32}  # the sum over tokens is never rounded to 8 bits
    assert watch.grad_dtypes == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert decreases(watch.losses)


@cover(kind=list(KINDS), family=list(FAMILIES))
def test_bf16_parameters_need_no_precision_of_the_trainer(kind: str, family: str) -> None:
    watch, module = trained(kind, family, "32-true", dtype="bfloat16")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert decreases(watch.losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_leaves_rotary_frequencies_in_fp32(kind: str) -> None:
    """Lightning casts buffers with the parameters; transformers loads these in fp32."""
    _, module = trained(kind, "llama", "bf16-true")
    exact, _ = KINDS[kind]
    before = exact(llama()).model.model.rotary_emb
    models = [module.model, *(module.frozen_modules().values() if kind == "dpo" else [])]
    for model in models:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for name in ("inv_freq", "original_inv_freq"):
            ours = getattr(model.model.rotary_emb, name)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, getattr(before, name))
    module.double()
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_resume_is_bit_identical(tmp_path: Path, precision: str) -> None:
    run = Run(
        str(tmp_path),
        module="gpt2",
        max_epochs=2,
        checkpoint=EVERY_STEP,
        trainer={"precision": precision, "accumulate_grad_batches": 2},
    )
    losses, digest = run.fit()
    for path in checkpoints(run.folder)[1::3]:
        resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
        assert resumed == losses[position_of(path) :], path.name
        assert resumed_digest == digest, path.name
