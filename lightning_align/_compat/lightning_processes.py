"""Private APIs of Lightning and torch that a strategy of several processes needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import distributed
from lightning.pytorch.strategies import launchers
from lightning_utilities.core import rank_zero
from torch import Tensor
from typing_extensions import override


class ScriptLauncher(launchers._SubprocessScriptLauncher):
    """Lightning's launcher that runs the script again for each further process, with a common end.

    Where the processes are there already, it only does what comes after.

    Args:
        environment: Lightning's cluster environment.
        num_processes: Processes on this machine.
        num_nodes: Machines that the run is on.
        at_end: Called on every rank when ``fit`` or the like has come to its end there.
    """

    def __init__(
        self, environment: Any, num_processes: int, num_nodes: int, at_end: Callable[[], None]
    ) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self._at_end = at_end

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.cluster_environment.creates_processes_externally:
            kwargs.pop("trainer", None)  # the launcher's own
            result = function(*args, **kwargs)
        else:
            result = super().launch(function, *args, **kwargs)
        self._at_end()
        return result


def multiprocessing_launcher(
    strategy: Any, start_method: Any, whole: Callable[[], AbstractContextManager[None]]
) -> Any:
    """Lightning's launcher that forks or spawns the processes, and takes the module's state back.

    Args:
        strategy: Whose processes.
        start_method: How they are started.
        whole: Around the reading of that state, on every rank.
    """
    launcher: Any = launchers._MultiProcessingLauncher(strategy, start_method=start_method)
    collect = launcher._collect_rank_zero_results
    launcher._collect_rank_zero_results = partial(_within, whole, collect)
    return launcher


def _within(
    around: Callable[[], AbstractContextManager[None]], call: Callable[..., Any], *args: Any
) -> Any:
    """A call in a context; at the top of a module, so that spawned processes find it."""
    with around():
        return call(*args)


def join_process_group(
    environment: Any, device: torch.device, backend: str | None, timeout: timedelta
) -> None:
    """Make the processes one group, unless they are one already."""
    backend = backend or distributed._get_default_process_group_backend_for_device(device)
    device_id = device if device.type != "cpu" else None
    distributed._init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)


def reduce_in_place(tensor: Tensor, group: Any, reduce_op: Any) -> Tensor:
    """Reduce a tensor over ranks, if there are several, as Lightning's DDP does."""
    return distributed._sync_ddp_if_available(tensor, group, reduce_op=reduce_op)


def share_overflow(scaler: torch.amp.GradScaler, add_up: Callable[[Tensor], Any]) -> None:
    """Let a loss scaler count what ``add_up`` brings from other ranks as its own overflow."""
    unscale = scaler.unscale_

    def unscale_(optimizer: torch.optim.Optimizer) -> None:
        unscale(optimizer)
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if not found:  # no parameter of this rank has a gradient
            found[torch.device("cpu")] = torch.zeros(1)
        for value in found.values():
            add_up(value)

    vars(scaler)["unscale_"] = unscale_


def set_rank(rank: int) -> None:
    """Tell ``rank_zero_only``, which all of Lightning shares, which rank this is."""
    vars(rank_zero.rank_zero_only)["rank"] = rank
