"""What every objective inherits: parameter groups, checkpoints, folders, the tokenizer's size."""

import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_align import Muon, PretrainModule
from lightning_align.modules import causal_lm
from tests.helpers.resume import VOCABULARY
from tests.modules.test_pretrain import fit, gpt2, llama, rows, sgd_module, weights


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


class Everything(pl.Callback):
    """All that a step leaves for other callbacks, the progress bar and the logger."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for metrics in (
            trainer.callback_metrics,
            trainer.logged_metrics,
            trainer.progress_bar_metrics,
        ):
            timeless = {key: float(metrics[key]) for key in metrics if key != "tokens_per_second"}
            self.seen.append(timeless | {"timed": "tokens_per_second" in metrics})


class LogsMore(PretrainModule):
    """A user's own value in the same hook, which at a new epoch resets what the hook has logged."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.log("mine", float(self.trainer.global_step))


def metrics_of_two_epochs(accumulate_grad_batches: int) -> list[dict[str, float]]:
    pl.seed_everything(1, verbose=False)
    module = LogsMore(llama(), optimizer=partial(torch.optim.SGD, lr=0.5))
    watch = Everything()
    batches = [rows(0, 1), rows(2), rows(3, 4), rows(5)]
    options = {"accumulate_grad_batches": accumulate_grad_batches, "callbacks": [watch]}
    fit(module, batches, max_epochs=2, **options)
    return watch.seen


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_quick_logging_leaves_what_lightnings_own_leaves(
    monkeypatch: pytest.MonkeyPatch, accumulate_grad_batches: int
) -> None:
    ours = metrics_of_two_epochs(accumulate_grad_batches)
    slow = lambda module, name, value, **options: module.log(name, value, **options)  # noqa: E731
    monkeypatch.setattr(causal_lm, "log_step_value", slow)
    theirs = metrics_of_two_epochs(accumulate_grad_batches)
    assert ours == theirs
    assert {"train_loss", "lr", "grad_norm", "mine", "tokens_seen"} <= ours[-3].keys()


def test_each_value_is_logged_by_lightning_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs 0.5 ms a call."""
    calls = Counter()
    log = PretrainModule.log

    def counted(self: Any, name: str, *values: Any, **options: Any) -> None:
        calls[name] += 1
        log(self, name, *values, **options)

    monkeypatch.setattr(PretrainModule, "log", counted)
    fit(sgd_module(), [rows(0), rows(1), rows(2)], max_epochs=2)
    assert calls["train_loss"] == 2  # a new epoch's first step
    assert calls["grad_norm"] <= 2
