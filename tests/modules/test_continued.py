"""What a module asks of the checkpoint that it goes on from."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import PretrainModule
from tests.modules.test_pretrain import fit, gpt2, llama, rows, sgd_module, weights


class TwoGroups(PretrainModule):
    """As parameters were sorted before ``build_param_groups``: wpe of GPT-2 decayed, for one."""

    def parameter_groups(self) -> Any:
        embedding = self.layers.embedding.weight
        decay, no_decay = [], []
        for name, parameter in self.named_parameters():
            matrix = parameter.ndim >= 2 and parameter is not embedding
            (decay if matrix else no_decay).append((name, parameter))
        return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]


def test_run_of_two_groups_goes_on_bit_identically(tmp_path: Path) -> None:
    adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
    batches = [rows(0, 1), rows(2), rows(3, 4)]

    def module(cls: type[PretrainModule]) -> PretrainModule:
        pl.seed_everything(1, verbose=False)
        return cls(gpt2(), optimizer=adamw)

    old = module(TwoGroups)
    fit(old, batches).save_checkpoint(tmp_path / "old.ckpt")
    continued = module(TwoGroups)
    fit(continued, batches, ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    ours = module(PretrainModule)
    trainer = fit(ours, batches, ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    assert torch.equal(weights(ours), weights(continued))
    groups = [group["param_names"] for group in trainer.optimizers[0].param_groups]
    assert len(groups) == 2
    assert "model.transformer.wpe.weight" in groups[0]
    # what is trained next, or was only loaded, is sorted anew
    assert len(ours.parameter_groups()) == 3
    loaded = PretrainModule.load_from_checkpoint(tmp_path / "old.ckpt", model=gpt2())
    assert len(loaded.parameter_groups()) == 3


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = fit(sgd_module(), [rows(0, 1)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = sgd_module(llama(hidden_size=32))
    fit_again = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"the checkpoint is of another model: \d+ parameter"):
        fit_again.fit(other, DataLoader([rows(0)], batch_size=None), ckpt_path=tmp_path / "a.ckpt")


def test_hyperparameters_are_the_arguments_that_are_plain_data() -> None:
    """A callable among them breaks ``load_from_checkpoint``; a module would be saved twice."""
    module = PretrainModule(llama(), optimizer=partial(torch.optim.SGD, lr=0.5), z_loss=0.1)
    assert module.hparams["z_loss"] == 0.1
    assert json.loads(module.hparams["model"])["hidden_size"] == module.layers.hidden_size
    assert not {"optimizer", "lr_scheduler", "self"} & module.hparams.keys()
    built = PretrainModule(module.model)
    assert "model" not in built.hparams
