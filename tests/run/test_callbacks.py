"""Which callback of a Trainer comes first, and which is brought along."""

from typing import Any

import lightning.pytorch as pl

from lightning_align.run.callbacks import bring, callbacks_of, put_first


class Needed(pl.Callback):
    stage = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stage = stage


class Derived(Needed):
    pass


def trainer_with(*callbacks: pl.Callback) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def test_the_first_one_is_there_once_and_lists_that_are_read_stay() -> None:
    one, other = pl.Callback(), pl.Callback()
    trainer = trainer_with(one, other)
    before = callbacks_of(trainer)
    put_first(trainer, other)
    assert callbacks_of(trainer) == [other, one]
    put_first(trainer, new := pl.Callback())
    assert callbacks_of(trainer) == [new, other, one]
    assert before == [one, other]


def test_what_is_needed_is_brought_and_set_up_once() -> None:
    trainer, module = trainer_with(other := pl.Callback()), pl.LightningModule()
    bring(Needed, trainer, module, "fit")
    bring(Needed, trainer, module, "fit")
    brought, rest = callbacks_of(trainer)
    assert (type(brought), rest) == (Needed, other)
    assert brought.stage == "fit"  # type: ignore[attr-defined]


def test_one_of_the_users_own_stays_where_it_is() -> None:
    trainer = trainer_with(pl.Callback(), own := Derived())
    bring(Needed, trainer, pl.LightningModule(), "fit")
    assert callbacks_of(trainer)[1:] == [own]
    assert own.stage == ""  # Lightning sets it up itself
