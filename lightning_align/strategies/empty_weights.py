"""Values for a module that was built without them, where each rank keeps a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn

from lightning_align._errors import argument_error
from lightning_align.models.initial import initialize
from lightning_align.models.weights import weights_reader
from lightning_align.strategies.failure import failing_together


class KeptParameters(Protocol):
    """What a rank keeps of a module."""

    @property
    def module(self) -> nn.Module:
        """The whole module; what other ranks keep may be on the meta device."""
        ...

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The ranks that share the module; None for one rank without a group."""
        ...

    def is_here(self, name: str) -> bool:
        """Whether this rank keeps a parameter or buffer."""
        ...

    def fill(self, read: Callable[[list[str]], Tensor] | None) -> dict[str, nn.Parameter]:
        """Give memory to what is kept and has none yet, and its values where ``read`` has them."""
        ...


def fill_empty(
    trainer: pl.Trainer, kept: KeptParameters, *, where: str, is_saved: bool = True
) -> None:
    """Values for what this rank keeps of a module that was built without them; collective.

    They come from the checkpoint that will be loaded, from the safetensors files of the folder that
    the model was built from, or are drawn.

    Args:
        trainer: It knows whether a checkpoint will be loaded, and whether this is a fit.
        kept: What this rank keeps of the module.
        where: Class of the strategy, for error messages.
        is_saved: Whether checkpoints have the module.

    Raises:
        ValueError: If nothing says what they are, on all ranks.
    """
    module = kept.module
    with failing_together(kept.group) if kept.group is not None else nullcontext():
        named = [*module.named_parameters(), *module.named_buffers()]
        empty = {name: tensor for name, tensor in named if tensor.is_meta and kept.is_here(name)}
        if not empty:
            return
        is_loaded = is_saved and bool(trainer.ckpt_path)
        read = None if is_loaded else weights_reader(module)
        is_fresh = read is None and not is_loaded
        may_draw = trainer.state.fn == TrainerFn.FITTING
        _check_origin(module, empty, is_known=may_draw or not is_fresh, where=where)
        filled = kept.fill(read)
        if is_fresh:
            initialize(module, filled, torch.initial_seed(), where=where)


def _check_origin(
    module: nn.Module, empty: Mapping[str, Tensor], is_known: bool, where: str
) -> None:
    buffer = next((n for n, tensor in empty.items() if not isinstance(tensor, nn.Parameter)), None)
    if buffer is not None:
        rule = f"its buffer {buffer!r} is on the meta device, and nothing computes it"
        way_out = "Build it in trainer.init_module(empty_init=True), which computes buffers"
    elif not is_known:
        rule = "its parameters are on the meta device, and nothing says where their values are"
        way_out = "Build it from a folder with safetensors, or not on meta; or pass ckpt_path"
    else:
        return
    raise argument_error(where, "model", type(module).__name__, rule, way_out)
