"""One test for each private API we touch: what we rely on, on the pinned versions."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_align import _compat
from tests.helpers.resume import HandWritten, SequenceData


class Watch(pl.Callback):
    """Notes what the private APIs say after every batch."""

    def __init__(self) -> None:
        self.accumulating: list[bool] = []
        self.starts: list[int | None] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.accumulating.append(_compat.is_accumulating(trainer))
        self.starts.append(trainer.datamodule.train_sampler.start)
        if len(self.starts) == 2:
            _compat.restart_train_iteration(trainer)
            self.starts.append(trainer.datamodule.train_sampler.start)


def watched() -> Watch:
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=5,
        limit_val_batches=0,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(HandWritten(), SequenceData())
    return watch


def test_is_accumulating_is_false_exactly_after_an_optimizer_step() -> None:
    assert watched().accumulating == [True, True, False, True, False]


def test_restart_train_iteration_makes_the_sampler_read_the_position_again() -> None:
    assert watched().starts[:3] == [0, 0, 2]


def test_built_by_cli_sees_the_context_of_lightning_cli() -> None:
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

    assert not _compat.built_by_cli()
    with _given_hyperparameters_context({"lr": 1.0}, "instantiator"):
        assert _compat.built_by_cli()


def test_whole_class_switches_drop_what_jsonargparse_would_hand_on() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    options = ["--optimizer=Adam", "--optimizer.lr=3", "--optimizer.eps=2", "--optimizer=SGD"]
    told = set()
    with _compat.whole_class_switches(lambda *switch: told.add(repr(switch))):
        assert parser.parse_args(options).optimizer.init_args.lr == 1e-3
    assert told == {"('torch.optim.Adam', 'torch.optim.SGD', ['lr', 'eps'])"}
    assert parser.parse_args(options).optimizer.init_args.lr == 3, "jsonargparse as it was"


def test_lightning_puts_the_hyperparameters_of_a_checkpoint_over_the_configuration() -> None:
    """If that method is gone or renamed, ``AlignCLI`` overrides nothing."""
    from lightning.pytorch.cli import LightningCLI

    from lightning_align.cli import AlignCLI

    assert "hyper_parameters" in inspect.getsource(LightningCLI._parse_ckpt_path)
    assert AlignCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path
