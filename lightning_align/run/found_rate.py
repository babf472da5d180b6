"""The learning rate that Lightning's ``lr_find`` writes into ``module.lr``, where nobody reads it.

The finder tries one rate for all groups of the optimizer and hands the best one to an attribute.
Ours come from the callable that builds the optimizer, so the attribute is looked at once it has
been built.
"""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import parsing
from torch.optim import Optimizer

from lightning_align._compat import lightning_trainer
from lightning_align._errors import argument_error
from lightning_align.run.callbacks import callbacks_of

_ATTRIBUTES = ("lr", "learning_rate")  # that Lightning looks for if it is not told one


def attributes_sought(trainer: pl.Trainer) -> tuple[str, ...]:
    """Names that the attribute may have for which a rate is looked for in this fit; else none.

    Args:
        trainer: Who trains.
    """
    finders = (each for each in callbacks_of(trainer) if isinstance(each, LearningRateFinder))
    named = [lightning_trainer.rate_attribute(finder) for finder in finders]
    return tuple(filter(None, named)) or (_ATTRIBUTES if named else ())


def rate_of(module: pl.LightningModule, names: tuple[str, ...]) -> float | None:
    """The first of these attributes that a module or its hyperparameters have.

    Args:
        module: Any.
        names: Of the attributes.
    """
    had = (name for name in names if parsing.lightning_hasattr(module, name))
    return next((parsing.lightning_getattr(module, name) for name in had), None)


def refuse_several(where: str, optimizer: Optimizer) -> None:
    """Refuse to look for one rate for groups that have several.

    Args:
        where: Class that the user called.
        optimizer: As it was built.

    Raises:
        ValueError: If there are several.
    """
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups}, reverse=True)
    if len(rates) > 1:
        rule = (
            f"lr_find tries one learning rate for all groups, and those of"
            f" {type(optimizer).__name__} have {rates}"
        )
        way_out = "Build it with one lr while looking (Muon without adamw_lr), or try rates by hand"
        raise argument_error(where, "optimizer", "...", rule, way_out)


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Give all groups the rate that was found; before a scheduler is built.

    Args:
        optimizer: Whose groups they are.
        lr: The rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
