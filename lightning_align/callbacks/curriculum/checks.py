"""Whether what a Curriculum orders is what the training loader draws."""

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_align._compat.lightning_resume import train_loaders
from lightning_align._errors import argument_error
from lightning_align.data.sampler import PositionSampler
from lightning_align.run.protocols import HasPosition, datamodule_of

WHERE = "Curriculum"
_OWN = "Give CurriculumSampler to a DataLoader(..., sampler=..., batch_size=None) of your own"


def check_orders(
    trainer: pl.Trainer, arguments: list[str], given: PositionSampler | None = None
) -> None:
    """Refuse loaders that another than the datamodule's sampler has the say in.

    To be called in ``on_train_start``, where the loaders are there.

    Args:
        trainer: Who fits.
        arguments: What of a Curriculum decides which samples a batch has.
        given: The sampler of a loader of one's own, which has the say then.

    Raises:
        ValueError: If the training loader draws from something else, with the reason.
    """
    if not arguments:
        return
    loaders = train_loaders(trainer)
    data = datamodule_of(trainer)
    own = given or (data.train_sampler if isinstance(data, HasPosition) else None)
    for loader in loaders.flattened if loaders is not None else ():
        if own is not None and getattr(loader, "sampler", None) is own:
            continue
        name, way_out = type(loader).__name__, _OWN
        batch_sampler = getattr(loader, "batch_sampler", None)
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            rule = "a stream has no indices: what comes next is its own choice, and nobody can"
            rule += " order it"
            way_out = "Leave it out; length works with any stream, and StreamBatches grows batches"
        elif batch_sampler is not None and type(batch_sampler) is not BatchSampler:
            rule = f"its batch_sampler, {type(batch_sampler).__name__}, has the say in what is in"
            rule += " a batch"
        elif isinstance(loader, DataLoader):
            whose = "the datamodule's" if given is None else "that of order"
            rule = f"its sampler, {type(loader.sampler).__name__}, is not {whose}"
        else:
            rule = f"{name} does not draw from the datamodule's sampler"
        raise argument_error(WHERE, arguments[0], _shown(loader), rule, way_out)


def _shown(loader: Any) -> str:
    return f"train_dataloader: {type(loader).__name__}"
