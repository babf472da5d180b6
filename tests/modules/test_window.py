"""Sums of a window, their means over ranks, and what is logged of a step."""

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import PretrainModule
from lightning_align.modules import window
from lightning_align.modules.window import collect, means_over_ranks, perplexity
from tests.modules.test_pretrain import fit, llama, rows, sgd_module


def test_means_over_ranks_are_sums_over_sums() -> None:
    """Batches of 1 and 3 tokens with losses 8 and 3 + 3 + 4, on two ranks alike: 36 / 8 = 4.5.

    The mean of the means would be 5.67. The other rank is played by doubling.
    """
    collected: dict[str, torch.Tensor] = {}
    for loss, count in ((8.0, 1), (10.0, 3)):
        tokens = torch.tensor(count)
        sums = {"loss": (torch.tensor(loss), tokens), "tokens": (tokens, torch.tensor(1))}
        collect(sums, collected)
    strategy = SimpleNamespace(reduce=lambda sums, reduce_op: 2 * sums)
    means, weights = means_over_ranks(SimpleNamespace(strategy=strategy), collected)
    assert means["loss"] == 4.5
    assert weights["loss"] == 8
    assert means["tokens"] == 8
    assert collected == {}


def test_a_window_without_tokens_has_a_mean_of_zero() -> None:
    collected = {"tokens": torch.zeros(2), "loss": torch.zeros(2)}
    strategy = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
    means, weights = means_over_ranks(SimpleNamespace(strategy=strategy), collected)
    assert means["loss"] == 0
    assert weights["loss"] == 1  # the gradients are divided by it


def test_collected_sums_keep_no_graph() -> None:
    collected: dict[str, torch.Tensor] = {}
    loss = torch.ones((), requires_grad=True, dtype=torch.float64)
    collect({"loss": (loss, torch.tensor(2))}, collected)
    assert not collected["loss"].requires_grad
    assert collected["loss"].dtype == torch.float32


def test_perplexity_overflows_to_the_largest_number() -> None:
    assert perplexity(torch.tensor(0.0)) == 1
    assert perplexity(torch.tensor(1e4)) > 1e38


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
    monkeypatch.setattr(window, "log_step_value", slow)
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
