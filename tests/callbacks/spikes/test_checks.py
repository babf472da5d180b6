"""What SpikeGuard refuses, by itself; with a Trainer in test_guard.py."""

from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)

from lightning_align import SpikeGuard, ZeROInfinityStrategy
from lightning_align.callbacks.spikes.checks import (
    check_agc,
    check_optimizers,
    check_run,
)
from tests.helpers.spiky import Regression


@pytest.mark.parametrize(
    "strategy",
    [
        FSDPStrategy(),
        DeepSpeedStrategy.__new__(DeepSpeedStrategy),
    ],
    ids=lambda each: type(each).__name__,
)
def test_strategies_whose_ranks_hold_parts_of_the_gradients_are_refused(strategy: Any) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[])
    name = type(strategy).__name__
    with pytest.raises(ValueError, match=f"strategy='{name}'.*does not say what their norm is"):
        check_run(trainer, Regression(), SpikeGuard)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
def test_strategies_that_have_whole_gradients_are_taken(strategy: Any) -> None:
    check_run(cast(Any, SimpleNamespace(strategy=strategy, callbacks=[])), Regression(), SpikeGuard)


def test_agc_is_refused_where_gradients_are_elsewhere() -> None:
    zero: Any = SimpleNamespace(strategy=ZeROInfinityStrategy())
    with pytest.raises(ValueError, match="keeps gradients apart from their weights"):
        check_agc(zero)
    check_agc(cast(Any, SimpleNamespace(strategy=DDPStrategy())))


@pytest.mark.parametrize("count", [0, 2])
def test_a_step_has_one_optimizer(count: int) -> None:
    optimizers = [torch.optim.SGD(Regression().parameters(), lr=0.1)] * count
    trainer: Any = SimpleNamespace(optimizers=optimizers)
    with pytest.raises(ValueError, match=f"the module has {count}"):
        check_optimizers(trainer)


def test_several_optimizers_and_one_that_asks_for_the_loss_again_are_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    parameters = [torch.nn.Parameter(torch.ones(1))]
    sgd, lbfgs = torch.optim.SGD(parameters), torch.optim.LBFGS(parameters)
    for optimizers, rule in (
        ([sgd, sgd], "has 2, and a step gets one"),
        ([lbfgs], "several times"),
    ):
        trainer.strategy.optimizers = optimizers
        with pytest.raises(ValueError, match=rf"SpikeGuard\(optimizer.*{rule}"):
            check_optimizers(trainer)
    trainer.strategy.optimizers = [sgd]
    check_optimizers(trainer)
