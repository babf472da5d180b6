"""Private parts of torch's messages between ranks: for which group, and how long FSDP's take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule


def group_size(arguments: Iterable[Any]) -> int:
    """Ranks of the group that a message is for; 1 if its arguments do not tell.

    Args:
        arguments: Of an operation of ``c10d`` or ``_c10d_functional``.
    """
    groups: Any = torch.distributed.distributed_c10d
    for each in arguments:
        if isinstance(each, torch.ScriptObject):
            try:
                return int(ProcessGroup.unbox(each).size())
            except (RuntimeError, TypeError, ValueError):
                continue  # how to reduce, or what to wait for
        if isinstance(each, ProcessGroup):
            return int(each.size())
        if isinstance(each, str):
            try:
                return int(groups._resolve_process_group(each).size())
            except (KeyError, RuntimeError, ValueError):
                continue  # "sum"
    return 1


class _Timed:
    """Stands in the place of what gathers or reduces for a group of FSDP's parameters."""

    def __init__(self, message: Any, clock: MessageClock) -> None:
        self._message, self._clock = message, clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._message(*args, **kwargs)
        finally:
            self._clock.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


class MessageClock:
    """Seconds in which FSDP gathers parameters and sums gradients.

    On a processor, which waits for both; a device goes on meanwhile, and here nothing is waited
    for.

    Args:
        modules: Those that may be sharded; others are left alone.

    Attributes:
        seconds: So far.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.seconds = 0.0
        self._undo: list[Callable[[], None]] = []
        for module in modules:
            if isinstance(module, FSDPModule):
                self._follow(module)

    def _follow(self, module: FSDPModule) -> None:
        state: Any = module._get_fsdp_state()
        # One of them before torch could have several.
        groups = getattr(state, "_fsdp_param_groups", None)
        groups = [state._fsdp_param_group] if groups is None else groups
        for group in filter(None, groups):
            for name in ("_all_gather_comm", "_reduce_scatter_comm"):
                message = getattr(group, name)
                setattr(group, name, _Timed(message, self))
                self._undo.append(lambda g=group, n=name, m=message: setattr(g, n, m))  # type: ignore[misc]

    def stop(self) -> None:
        """Leave everything as it was."""
        while self._undo:
            self._undo.pop()()
