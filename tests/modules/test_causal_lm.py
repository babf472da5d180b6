"""What every objective inherits: parameter groups, checkpoints, folders, the tokenizer's size."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import PretrainModule
from lightning_align.modules import causal_lm
from tests.helpers.resume import VOCABULARY
from tests.modules.test_pretrain import fit, gpt2, llama, rows, sgd_module


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
