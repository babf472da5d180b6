"""What SpikeGuard refuses, by itself; with a Trainer in test_spike_guard.py."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.callbacks.spike_checks import check_optimizers


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
