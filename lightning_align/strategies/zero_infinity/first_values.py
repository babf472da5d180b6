"""Values before there are blocks: on disk while a module is built, or where it is built empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn

from lightning_align._errors import argument_error
from lightning_align.models.weights import fill_parameters, weights_in_parts
from lightning_align.offload.building import Building
from lightning_align.run.protocols import FillsFrozenModules, frozen_modules
from lightning_align.strategies.empty_weights import fill_empty
from lightning_align.strategies.zero_infinity.blocks import WHERE

if TYPE_CHECKING:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy

_BUDGET = 64 << 20  # bytes of parameters that are in memory while a module is built


@contextmanager
def built_on_disk(strategy: ZeROInfinityStrategy) -> Iterator[None]:
    """Around code that builds modules, whose parameters are in memory only as they are used.

    Raises:
        ValueError: If there is no folder to put them in.
    """
    if not strategy.devices.uses_drive:  # all of it is to be in memory
        yield
        return
    building = _building(strategy)
    with building.taking_over(), weights_in_parts():
        yield
    leave(strategy, [])


def leave(strategy: ZeROInfinityStrategy, parameters: Iterable[nn.Parameter]) -> None:
    """Parameters are in blocks now; the file goes when all are."""
    if strategy._building is not None:
        strategy._building.forget(parameters)
        if strategy._building.is_empty:
            strategy._building.close()
            strategy._building = None


def fill(strategy: ZeROInfinityStrategy, trainer: pl.Trainer) -> None:
    """Values for what was built without them, drawn or read; on disk, as what is built with them.

    Raises:
        ValueError: If nothing says what they are.
    """
    module = strategy.lightning_module
    assert module is not None
    if _is_empty(module):
        fill_empty(trainer, _Whole(module, _building(strategy)), where=WHERE)
    answers = module if isinstance(module, FillsFrozenModules) else None
    frozen = {name: part for name, part in frozen_modules(module).items() if _is_empty(part)}
    for name, part in frozen.items():
        whole = part
        if answers is not None and name in answers.frozen_copies():
            whole = nn.Module()  # values are drawn by name: it gets those of what it is a copy of
            whole.add_module(answers.frozen_copies()[name], part)
        fill_empty(trainer, _Whole(whole, _building(strategy)), where=WHERE, is_saved=False)
    if frozen and answers is not None:
        answers.frozen_modules_filled()


def _is_empty(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


class _Whole:
    """All of a module, as ``fill_empty`` asks for it.

    Args:
        module: Some of its parameters are on the meta device.
        building: Where their values go.
    """

    def __init__(self, module: nn.Module, building: Building) -> None:
        self.module, self._building = module, building
        self.group = distributed.group.WORLD

    def is_here(self, name: str) -> bool:  # noqa: ARG002
        return True

    @torch.no_grad()
    def fill(self, read: Callable[[list[str]], Tensor] | None) -> dict[str, nn.Parameter]:
        def made(empty: nn.Parameter, names: list[str]) -> nn.Parameter:
            parameter = self._building.empty_like(empty)
            if read is not None:
                parameter.copy_(read(names))
            return parameter

        return fill_parameters(self.module, made)


def _building(strategy: ZeROInfinityStrategy) -> Building:
    if strategy._building is None:
        folder = _folder(strategy)
        budget = min(_BUDGET, 8 * (strategy.buffers.sub_group_size or _BUDGET))
        try:
            strategy._building = Building(folder, budget, strategy.direct_io)
        except OSError as error:
            rule = f"{folder} cannot be written ({error.strerror})"
            raise argument_error(WHERE, "nvme_path", strategy.nvme_path, rule) from error
    return strategy._building


def _folder(strategy: ZeROInfinityStrategy) -> Path:
    """Where blocks will be; ``trainer.init_module()`` tells of no ``default_root_dir``."""
    module, given = strategy.lightning_module, strategy.nvme_path
    if given is None:
        return Path.cwd() if module is None else Path(module.trainer.default_root_dir)
    folder = Path(given if isinstance(given, str) else given[0])
    if not folder.parent.is_dir():
        rule, way_out = f"the folder {folder.parent} is not there", "Make it, or mount it"
        raise argument_error(WHERE, "nvme_path", given, rule, way_out)
    return folder
