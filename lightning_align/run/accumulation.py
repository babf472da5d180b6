"""The open window of accumulation, and when it is safe to save.

Gradients wait for their optimizer step and, in modules that weight by tokens, the sums collected so
far with them; Lightning's checkpoint holds neither.
"""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_align._compat.lightning_resume import validation_follows
from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align._errors import argument_error
from lightning_align.layers.sharding import as_part_like, own_part
from lightning_align.run.protocols import HoldsGradients, SaysWhoSaves, window_sums
from lightning_align.run.replicas import of_every_rank

WINDOW_KEY = "lightning_align.accumulation"  # of the checkpoint

Window = dict[str, dict[str, Tensor]]  # "gradients" and "sums", by name


def is_safe_point(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint written now resumes without skipping anything.

    False after a batch that a validation follows, until it has run, and at the last batch of an
    epoch until its end hooks have run: Lightning resumes such a checkpoint behind them. ExactResume
    sees to it that they run; whoever can wait spares the resumed run from them.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    if progress.processed == progress.started:  # the epoch is closed
        return True
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return False
    return not (trainer.training and validation_follows(trainer))


def validation_is_to_do(trainer: pl.Trainer) -> bool:
    """Whether a batch is saved before what follows it: a validation, or the end of its epoch.

    A validation that has come to its first batch is none that could be run anew: the module has
    begun to collect.
    """
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    if trainer.validating:
        validated: Any = loop.val_loop.batch_progress.current
        return bool(validated.ready == 0)
    return bool(batches.completed < batches.processed) and not is_safe_point(trainer)


def pending_plateau(trainer: pl.Trainer) -> str:
    """Interval, or "", whose ``ReduceLROnPlateau`` schedulers Lightning steps after this hook.

    They step after the hooks in which checkpoints are written, and not on a resume.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.completed < batches.processed:
        return "step"
    return "epoch" if epochs.completed < epochs.processed == epochs.started else ""


def own_window(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Window:
    """The open accumulation window of this rank; nothing where no gradient can be waiting.

    Of a manual optimization every gradient may be waiting.
    """
    manual = not pl_module.automatic_optimization
    # Lightning empties the gradients of a manual step before a validation, and knows no window.
    if validation_follows(trainer) and trainer.training if manual else not is_accumulating(trainer):
        return {}
    given = {n: p.grad for n, p in _parameters(trainer, pl_module).items() if p.grad is not None}
    # A hook of the user may be shown gradients of other ranks, without values.
    here = {name: gradient for name, gradient in given.items() if not gradient.is_meta}
    gradients = {n: own_part(each).detach().to("cpu", copy=True) for n, each in here.items()}
    if isinstance(trainer.strategy, HoldsGradients):
        gradients |= trainer.strategy.waiting_gradients()
    sums = {name: value.to("cpu", copy=True) for name, value in window_sums(pl_module).items()}
    return {"gradients": gradients, "sums": sums}


def capture_accumulation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Window]:
    """The open accumulation window of every rank, or an empty list when no gradient is waiting.

    Collective: every rank must call it. Ranks hold different gradients until the window closes,
    and a checkpoint that is written by rank 0 alone needs all of them. Where each rank writes its
    own part, the windows of others are empty.
    """
    manual = not pl_module.automatic_optimization
    window = own_window(trainer, pl_module)
    if not window:
        return []
    strategy, size = trainer.strategy, trainer.world_size
    if size > 1 and isinstance(strategy, SaysWhoSaves) and not strategy.saves_whole_state:
        return [window if rank == trainer.global_rank else {} for rank in range(size)]
    windows = of_every_rank(trainer, window)
    return windows if not manual or any(each["gradients"] for each in windows) else []


def restore_accumulation(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    windows: list[Window],
) -> None:
    """Put this rank's open accumulation window back into the module's gradients.

    Raises:
        ValueError: If the checkpoint was written in mid-accumulation by another number of ranks.
    """
    if not windows:
        return
    if len(windows) != trainer.world_size:
        ranks = f"{len(windows)} rank(s), whose gradients cannot be redistributed"
        rule = f"the checkpoint was written in mid-accumulation by {ranks}"
        way_out = "Resume with as many ranks, or from a checkpoint written at an optimizer step"
        raise argument_error("ExactResume", "world_size", trainer.world_size, rule, way_out)
    replace_window(trainer, pl_module, windows[trainer.global_rank])


def drop_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let no gradient wait for the next step, wherever it does."""
    if isinstance(trainer.strategy, HoldsGradients):
        trainer.strategy.put_gradients({})
    for parameter in _parameters(trainer, pl_module).values():
        parameter.grad = None


def replace_window(trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> None:
    """Let the gradients and sums of a window be all that waits for the next step.

    Args:
        trainer: Who fits.
        pl_module: What is fitted.
        window: From ``own_window``.
    """
    parameters = _parameters(trainer, pl_module)
    gradients, sums = window.get("gradients", {}), window_sums(pl_module)
    strategy = trainer.strategy
    taken = strategy.put_gradients(gradients) if isinstance(strategy, HoldsGradients) else set()
    for name, parameter in parameters.items():
        saved = None if name in taken else gradients.get(name)
        parameter.grad = None if saved is None else as_part_like(parameter, saved)
    sums.clear()
    saved_sums = window.get("sums", {})
    device = pl_module.device
    sums.update({name: value.to(device, copy=True) for name, value in saved_sums.items()})


def _parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """Parameters of the module, and those that only an optimizer knows."""
    named = dict(pl_module.named_parameters())
    known = set(map(id, named.values()))
    for number, optimizer in enumerate(trainer.optimizers):
        every = enumerate(p for group in optimizer.param_groups for p in group["params"])
        own = {f"optimizer {number}, {place}": p for place, p in every if id(p) not in known}
        named |= own
    return named
