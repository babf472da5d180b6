"""What every objective inherits: parameter groups, checkpoints, folders, the tokenizer's size."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import PretrainModule
from tests.helpers.resume import VOCABULARY
from tests.modules.test_pretrain import fit, gpt2, llama, rows, sgd_module


def test_groups_name_every_parameter_once_and_decay_only_matrices() -> None:
    module = PretrainModule(gpt2())
    optimizer = module.configure_optimizers()
    decay, no_decay = optimizer.param_groups
    assert decay["weight_decay"] == 0.1
    assert no_decay["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decay["params"])
    assert any(p is module.layers.embedding.weight for p in no_decay["params"])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    assert "model.transformer.h.0.attn.c_attn.weight" in decay["param_names"]


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = fit(sgd_module(), [rows(0, 1)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = sgd_module(llama(hidden_size=32))
    fit_again = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"the checkpoint is of another model: \d+ parameter"):
        fit_again.fit(other, DataLoader([rows(0)], batch_size=None), ckpt_path=tmp_path / "a.ckpt")


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
