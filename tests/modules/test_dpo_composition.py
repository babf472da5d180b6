"""Rows of pairs under other parts of the suite: the same training as on separate rows."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import LISA, AsyncCheckpoint, DPOModule, GaLoreAdamW, Muon, StableAdamW
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules.test_dpo import pairs
from tests.modules.test_dpo_layout import MISTRAL, PACKED, SHARED
from tests.modules.test_pretrain import llama, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SEPARATE: dict[str, Any] = {"prefix_sharing": False}
LAYOUTS = {"shared": SHARED, "packed": PACKED}
LORA: dict[str, Any] = {"peft_config": {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}}
SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2}
BATCHES = [pairs(0, 1, 2), pairs(3, 4), pairs(5, 6, 7), pairs(8)]
BACKWARDS = [pairs(2, 1, 0), pairs(4, 3), pairs(7, 6, 5), pairs(8)]
OPTIMIZERS: dict[str, Any] = {
    "Muon": partial(Muon, lr=1e-3, adamw_lr=1e-3),
    "GaLoreAdamW": partial(GaLoreAdamW, lr=1e-3, rank=8, update_proj_gap=2),
    "StableAdamW": partial(StableAdamW, lr=1e-3),
}


def run(
    optimizer: Any = None, batches: Any = BATCHES, config: Any = MISTRAL, **options: Any
) -> DPOModule:
    """Trained on the batches, which an optimizer of plain descent sees unless another is given."""
    trainer = {key: options.pop(key) for key in [*options] if key in TRAINER}
    ckpt_path = options.pop("ckpt_path", None)
    pl.seed_everything(1, verbose=False)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
    ours = DPOModule(copy.deepcopy(config), optimizer=optimizer, **options)
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(
            isinstance(c, AsyncCheckpoint) for c in trainer.get("callbacks", [])
        ),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"devices": 1, "max_epochs": 1, **trainer},
    ).fit(ours, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return ours


TRAINER = (
    *("callbacks", "accumulate_grad_batches", "devices", "strategy", "plugins", "precision"),
    *("max_epochs", "max_steps"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, layout: str) -> None:
    """Adam's steps are of one size whatever that of the gradient, and GaLore projects on directions
    that rounding turns: so the measure is what pairs in another order change in separate rows."""
    theirs = weights(run(OPTIMIZERS[name], **SEPARATE))
    backwards = weights(run(OPTIMIZERS[name], BACKWARDS, **SEPARATE))
    ours = weights(run(OPTIMIZERS[name], **LAYOUTS[layout]))
    apart, rounding = ((each - theirs).abs().quantile(0.99) for each in (ours, backwards))
    assert apart <= 10 * rounding + 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lisa(layout: str) -> None:
    def trained(**options: Any) -> torch.Tensor:
        lisa = LISA(activated_layers=1, interval_steps=1, filename=None)
        return weights(run(callbacks=[lisa], **options))

    torch.testing.assert_close(trained(**LAYOUTS[layout]), trained(**SEPARATE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [*LAYOUTS.values(), SYNC], ids=[*LAYOUTS, "TR-DPO"])
def test_async_checkpoint_resumes_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    saving = AsyncCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    whole = run(callbacks=[saving], **options)
    (checkpoint,) = tmp_path.glob("*step=2.ckpt")
    resumed = run(ckpt_path=str(checkpoint), **options)
    assert torch.equal(weights(resumed), weights(whole))
    references = [each.frozen_modules()["reference"] for each in (resumed, whole)]
    assert torch.equal(*map(weights, references))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing(layout: str) -> None:
    plain, recomputed = (
        run(activation_checkpointing=on, config=llama(), **LAYOUTS[layout]) for on in (False, True)
    )
    assert torch.equal(weights(plain), weights(recomputed))


@pytest.mark.parametrize("options", [*LAYOUTS.values(), LORA], ids=[*LAYOUTS, "LoRA"])
def test_ranks_with_unequal_numbers_of_pairs_equal_one_big_batch(options: dict[str, Any]) -> None:
    """Two ranks with two batches each, of 1 to 4 pairs, are one window of 10 pairs."""
    if options is LORA:
        pytest.importorskip("peft")
    parts = [[pairs(0, 1, 2), pairs(3)], [pairs(4, 5), pairs(6, 7, 8, 9)]]

    def on_rank(rank: int) -> torch.Tensor:
        spread = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        ours = run(batches=parts[rank], accumulate_grad_batches=2, **spread, **options)
        return weights(ours)

    one, other = run_ranks(on_rank, timeout_s=90)
    plain = {**options, **SEPARATE, "packing": False}
    theirs = run(batches=[pairs(*range(10))], **plain)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, weights(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16(layout: str, precision: str) -> None:
    """Against fp32, a row of pairs is not further off than separate rows are, twice that."""
    exact = weights(run(config=llama(), **SEPARATE)).float()
    separate, ours = (
        weights(run(config=llama(), precision=precision, **options)).float()
        for options in (SEPARATE, LAYOUTS[layout])
    )
    assert torch.isfinite(ours).all()
    allowed = 2 * (separate - exact).abs().mean() + 1e-6
    assert (ours - exact).abs().mean() <= allowed
