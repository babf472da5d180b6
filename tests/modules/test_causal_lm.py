"""What every objective inherits: parameter groups, checkpoints, folders, the tokenizer's size."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau as CLIPlateau
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from torch.utils.data import DataLoader

from lightning_align import Muon, PretrainModule
from tests.helpers.resume import VOCABULARY
from tests.modules.test_pretrain import gpt2, llama, rows, sgd_module


def test_groups_name_every_parameter_once_and_decay_only_matrices() -> None:
    module = PretrainModule(gpt2())
    optimizer = module.configure_optimizers()
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices_transposed": 0.1,  # GPT-2 stores them (in, out); its head is its embedding
        "embeddings": 0.0,
        "norms_biases": 0.0,
    }
    assert all(p.ndim == 2 for p in groups["matrices_transposed"]["params"])
    assert any(p is module.layers.embedding.weight for p in groups["embeddings"]["params"])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    names = groups["matrices_transposed"]["param_names"]
    assert "model.transformer.h.0.attn.c_attn.weight" in names


@pytest.mark.parametrize(
    ("scheduler", "lost"),
    [
        (partial(CosineAnnealingLR, T_max=9), False),
        (partial(CosineAnnealingLR, T_max=9, eta_min=1e-4), True),
    ],
)
def test_scheduler_that_loses_the_ratio_of_learning_rates_is_warned_of(
    scheduler: Any, lost: bool
) -> None:
    muon = partial(Muon, lr=0.02, adamw_lr=1e-3)
    module = PretrainModule(llama(), optimizer=muon, lr_scheduler=scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.configure_optimizers()
    assert any("ratio is lost" in str(warning.message) for warning in caught) is lost


@pytest.mark.parametrize(
    ("kind", "monitored"), [(TorchPlateau, {}), (CLIPlateau, {"monitor": "val_loss"})]
)
def test_a_plateau_steps_after_epochs(kind: Any, monitored: dict[str, str], tmp_path: Path) -> None:
    """Nothing is nine tenths better than before, so that each epoch but the first reduces it."""
    scheduler = partial(kind, patience=0, threshold=0.9, factor=0.5, **monitored)
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = PretrainModule(llama(), optimizer=sgd, lr_scheduler=scheduler)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader([rows(0), rows(1)], batch_size=None)
    trainer.fit(module, loader, loader)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 4)


def test_saved_folder_loads_with_equal_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = sgd_module()
    module.save_pretrained(str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = rows(0, 1)["input_ids"]
    torch.testing.assert_close(theirs(tokens).logits, module.eval()(tokens), rtol=1e-5, atol=1e-5)


class TokenizerOf(pl.LightningDataModule):
    """A datamodule whose tokenizer makes more ids than the model has."""

    tokenizer = range(VOCABULARY + 1)

    def train_dataloader(self) -> Any:
        return DataLoader([rows(0)], batch_size=None)


def test_tokenizer_with_a_larger_vocabulary_is_refused() -> None:
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"vocabulary has 61 rows, but the tokenizer makes ids up"):
        trainer.fit(sgd_module(), datamodule=TokenizerOf())


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_module_that_its_user_has_put_in_eval_learns_the_same(
    evaluates: bool, tmp_path: Path
) -> None:
    """Lightning leaves modes as it finds them; of a Llama they change no value."""

    def weights(mode: bool) -> dict[str, torch.Tensor]:
        pl.seed_everything(1)
        module = PretrainModule(llama()).train(mode)
        trainer = pl.Trainer(
            max_steps=3,
            accumulate_grad_batches=2,
            val_check_interval=3 if evaluates else 1.0,  # in the middle of a window, too
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        batches = DataLoader([rows(seed) for seed in range(6)], batch_size=None)
        trainer.fit(module, batches, batches if evaluates else None)
        assert "train_loss" in trainer.callback_metrics
        return module.state_dict()

    expected, found = weights(True), weights(False)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_lr_find_sets_the_rate_of_all_groups_or_is_refused(tmp_path: Path) -> None:
    """The module reads no ``lr`` of its own, so what was found would be of no effect."""

    def found(module: PretrainModule) -> tuple[float | None, set[float]]:
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        batches = DataLoader([rows(seed) for seed in range(16)], batch_size=None)
        finder = Tuner(trainer).lr_find(module, batches, num_training=16)
        trainer.fit(module, batches)
        assert finder is not None
        return finder.suggestion(), {group["lr"] for group in trainer.optimizers[0].param_groups}

    for optimizer in (None, partial(Muon, lr=0.02)):
        rate, rates = found(PretrainModule(llama(), optimizer=optimizer))
        assert rates == {rate}
    with pytest.raises(ValueError, match=r"PretrainModule\(optimizer=.*have \[0.02, 0.003\]. B"):
        found(PretrainModule(llama(), optimizer=partial(Muon, lr=0.02, adamw_lr=3e-3)))
