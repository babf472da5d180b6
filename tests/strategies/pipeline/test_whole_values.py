"""Hooks that compute with gradients and weights find those of all stages."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from lightning_align.strategies.pipeline.whole_values import WholeValues
from tests.helpers.covers import cover
from tests.helpers.pipelines import Chained, Run
from tests.helpers.ranks import run_ranks

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=3, data={"masked": False})


class OwnClipping(Chained):
    """As in Lightning's documentation, and by hand."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))
        self.log_dict(grad_norm(self.head, math.inf))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.log("total", clip_grad_norm_(self.parameters(), 0.3))
        clip_grad_value_(self.parameters(), 0.05)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("clipped", get_total_norm(gradients, 1.0))


class ByHand(Chained):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.head.bias = nn.Parameter(torch.ones(VOCABULARY))

    def on_after_backward(self) -> None:
        squares = [p.grad.pow(2).sum() for p in self.parameters() if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt()
        if norm > 0.3:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.3 / norm)
        self.log("norm", norm)
        self.log("finite", float(all(bool(torch.isfinite(square)) for square in squares)))

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("head", self.head.weight.norm())
        self.log("first", self.blocks[0].norm_1.weight.detach().abs().mean().item())
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)

    def on_train_epoch_end(self) -> None:
        self.log(
            "weights", sum(float(p.detach().double().square().sum()) for p in self.parameters())
        )


VOCABULARY = Chained().head.out_features


class Watcher(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log("watched", grad_norm(pl_module, 2)["grad_2.0_norm_total"])


def fit(make: type[Chained], rank: int | None, ranks: int = 2, **options: Any) -> Any:
    run = replace(RUN, **options)
    with run.setting(rank, ranks) as (trainer, seen):
        module = make()
        trainer.fit(module, run.loader())
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert not any(p.grad is not None for p in module.parameters() if p.is_meta)
        hooks = [name for name in vars(module) if name.startswith(("on_", "configure_"))]
    return seen.losses, metrics, hooks


@cover(ranks=[3, 2], make=[ByHand, OwnClipping])
def test_hooks_see_the_gradients_and_weights_of_all_stages(make: Any, ranks: int) -> None:
    callbacks = [Watcher] if make is OwnClipping else []
    theirs = fit(make, None, callbacks=callbacks)
    for ours in run_ranks(lambda rank: fit(make, rank, ranks, callbacks=callbacks), ranks):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
        assert ours[2] == []


def test_lightnings_clipping_counts_every_gradient_once_in_such_a_hook() -> None:
    class Delegates(Chained):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.3)

    theirs = fit(Delegates, None)
    assert run_ranks(lambda rank: fit(Delegates, rank))[0][0] == pytest.approx(theirs[0], abs=1e-5)


class Mixes(Chained):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        flat = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        self.log("norm", flat.norm())


class Copies(Chained):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.copies: list[Tensor] = [p.grad.cpu().numpy() for p in self.parameters()]


class OnOneRank(Chained):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.is_global_zero:
            self.norm = self.head.weight.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Mixes,
            r"\(hook='Mixes.on_before_opt.*cat is given values of several stages\. Compute nor",
        ),
        (Copies, r"\(hook='Copies.on_before_opt.*it needs all values of a weight"),
        (OnOneRank, r"all ranks must compute with weights or gradients alike|has lost its peer"),
    ],
)
def test_what_cannot_be_told_of_all_stages_is_refused(
    make: type[Chained], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    monkeypatch.setattr(
        "lightning_align.strategies.pipeline.whole_values._TIMEOUT", timedelta(seconds=3)
    )

    def refused(rank: int) -> int:
        with RUN.setting(rank) as (trainer, _), pytest.raises(Exception, match=message):
            trainer.fit(make(), RUN.loader())
        return int(trainer.global_step)

    steps = run_ranks(refused)
    assert steps[0] == 0


class LooksAtNothing(Chained):
    def on_after_backward(self) -> None:
        self.log("seen", torch.ones(2).sum())


class LooksAlone(Chained):
    """Of one rank only, at what is there: nothing is computed that others would have to know."""

    def on_after_backward(self) -> None:
        if self.trainer.is_global_zero:
            self.gradients = sum(p.grad is not None for p in self.parameters())


@pytest.mark.parametrize("make", [LooksAtNothing, LooksAlone])
def test_gradients_are_lent_where_they_are_looked_at(
    make: type[Chained], monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[str] = []
    lend = WholeValues._lend_gradients

    def noted(values: WholeValues) -> None:
        lent.append(values._hook)
        lend(values)

    monkeypatch.setattr(WholeValues, "_lend_gradients", noted)

    def train(rank: int) -> Any:
        with RUN.setting(rank) as (trainer, _):
            module = make()
            trainer.fit(module, RUN.loader())
        return len(lent), getattr(module, "gradients", None)

    first, second = run_ranks(train)
    alone = len(list(Chained().parameters()))
    assert first == ((RUN.steps, alone) if make is LooksAlone else (0, None))
    assert second == (0, None)
