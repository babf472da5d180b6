"""Where something else than the host computes: what goes there with the blocks, and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.offload.device import copies_for
from lightning_align.run.protocols import frozen_modules
from lightning_align.strategies.zero_infinity.blocks import WHERE

if TYPE_CHECKING:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy


def find_device(strategy: ZeROInfinityStrategy) -> None:
    """Let the strategy have copies to the device of its rank, if that is not the host."""
    if strategy._copies is None:
        strategy._copies = copies_for(strategy.root_device, pinned=bool(strategy.pin_memory))
        if strategy._copies is not None:
            rank_zero_warn(
                f"{WHERE}: training on a GPU has not been run yet. Its copies and their order are"
                " tested on a CPU only, with a stand-in for the device. Compare the first losses"
                " with another strategy's before you rely on it."
            )


def move_there(strategy: ZeROInfinityStrategy) -> None:
    """Let blocks compute on the device, and buffers and metrics be there."""
    if strategy._copies is not None and strategy._engine is not None:
        strategy._engine.compute_on(strategy._copies)
        _move(strategy, strategy._copies.device)


def move_back(strategy: ZeROInfinityStrategy) -> None:
    """Let nothing be on the device any more."""
    if strategy._copies is not None and strategy._engine is not None:
        strategy._engine.compute_on(None)
        _move(strategy, torch.device("cpu"))


def _move(strategy: ZeROInfinityStrategy, device: torch.device) -> None:
    """Move what is no parameter: those are there already, with or without their values."""
    module = strategy.lightning_module
    assert module is not None
    for part in (module, *frozen_modules(module).values()):
        part.to(device)
