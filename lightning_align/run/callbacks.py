"""The callbacks of a Trainer: which are there, which comes first, which one brings along."""

import lightning.pytorch as pl


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All of them, in the order of their hooks; Lightning's types do not know of the attribute."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def put_first(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Let the hooks of a callback, which may be a new one, run before those of all others."""
    others = [other for other in callbacks_of(trainer) if other is not callback]
    # A new list: Lightning may be on its way through the old one, and sets up what is in it.
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]


def bring(
    kind: type[pl.Callback], trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
) -> None:
    """Add and set up, in a ``setup``, a callback that is needed, unless there is one of its class.

    Args:
        kind: Its class, made without arguments.
        trainer: Which is being set up.
        pl_module: What it is to run.
        stage: Of the set-up.
    """
    if not any(isinstance(callback, kind) for callback in callbacks_of(trainer)):
        callback = kind()
        put_first(trainer, callback)
        callback.setup(trainer, pl_module, stage)
