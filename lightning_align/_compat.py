"""Every private API of torch, Lightning and transformers that we touch, with a test each.

When one of them changes, ``tests/test_compat.py`` names it before a user meets it.
"""

import lightning.pytorch as pl
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of the current window still wait for their optimizer step."""
    return trainer.fit_loop._should_accumulate()


def restart_train_iteration(trainer: pl.Trainer) -> None:
    """Start the training data loader anew, so that its sampler reads the position again."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def built_by_cli() -> bool:
    """Whether a module's ``__init__`` runs in LightningCLI, which knows its arguments as data."""
    return _given_hyperparameters.get() is not None
