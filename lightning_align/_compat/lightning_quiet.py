"""What Lightning says in each fit that is not about the run, left out message by message.

Each entry is one message of one module, with what causes it, and goes when its cause does.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Two advertisements, which ask for packages that no run here needs. The first is printed while a
# Trainer is made, before anything of ours is called: that is why this filter stays.
_TIPS = ("Tip: For seamless cloud logging", "Tip: For seamless cloud uploads")
_TIPS_LOGGER = "lightning.pytorch.utilities.rank_zero"

# Of each the category, the beginning of the message, and the module that is blamed.
Entries = tuple[tuple[type[Warning], str, str], ...]
IN_A_FIT: Entries = (
    # Lightning 2.6.6 makes LeafSpec() of torch 2.13 for each loader of a run.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"lightning\.pytorch\."),
    # A datamodule that holds nothing out says so by loaders of this class.
    (UserWarning, r"Total length of `NoBatches` across ranks is zero", r"lightning\."),
)
IN_A_PIPELINE: Entries = (
    # All ranks log the values of one batch. They cannot be logged as reduced: Lightning forgets
    # ``sync_dist=True`` under strategies that it does not know to be distributed.
    (
        UserWarning,
        r"It is recommended to use `self\.log\('(val|test)_.*sync_dist=True\)`",
        r"lightning\.",
    ),
)


class NoBatches(list[Any]):
    """An empty list of batches, by intention."""


def leave_out_tips() -> None:
    """Let Lightning advertise no packages; costs nothing where Lightning is not imported."""
    logger = logging.getLogger(_TIPS_LOGGER)
    if _is_no_tip not in logger.filters:
        logger.addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not any(tip in str(record.msg) for tip in _TIPS)


def begin(entries: Entries = IN_A_FIT) -> None:
    """From here to ``end``, runs say nothing of what is listed."""
    end(entries)
    for category, message, module in entries:
        warnings.filterwarnings("ignore", message, category, module)


def end(entries: Entries = IN_A_FIT) -> None:
    """Take back what ``begin`` did, and no filter of anybody else."""
    filters: Any = warnings.filters
    for entry in list(filters):
        action, message, category, module, _ = entry
        patterns = (category, getattr(message, "pattern", None), getattr(module, "pattern", None))
        if action == "ignore" and patterns in entries:
            filters.remove(entry)


def prepare_loggers(trainer: pl.Trainer) -> None:
    """Take the causes of what wandb says of each WandbLogger, before it begins its run.

    Lightning passes ``anonymous=None``, which wandb 0.31 takes for a setting without an effect, and
    a folder that is not there yet, of which wandb says that it is no git repository.
    """
    for logger in trainer.loggers:
        options = getattr(logger, "_wandb_init", None)
        if not isinstance(options, dict):
            continue
        if "anonymous" in options and options["anonymous"] is None:
            del options["anonymous"]
        if options.get("dir") and trainer.is_global_zero:
            with suppress(OSError):  # wandb then says where it writes instead
                os.makedirs(options["dir"], exist_ok=True)
