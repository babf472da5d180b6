"""The state of a whole model out of the stages, and back into them.

A checkpoint has the names and numbers it would have on one device, so it loads on one, exports, and
resumes under another number of stages. Tensors go to rank 0 one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_align.strategies.pipeline.ownership import Ownership


def gather_module(ownership: Ownership) -> dict[str, Any]:
    """The module's state, complete on rank 0 and empty elsewhere; collective."""
    state = ownership.module.state_dict()
    gathered: dict[str, Any] = {}
    seen: dict[str, Tensor] = {}
    for key, value in state.items():
        name = ownership.name_of(key)
        if name not in seen:
            seen[name] = _to_first_rank(ownership, value, ownership.ranks.get(name, [0])[0])
        gathered[key] = seen[name]
    return gathered if ownership.rank == 0 else {}


def own_module(ownership: Ownership) -> dict[str, Any]:
    """The module's state; what is on other ranks alone has a shape, and no values."""
    state = ownership.module.state_dict()
    return {key: _outline(value) for key, value in state.items()}


def _outline(value: Any) -> Any:
    is_elsewhere = isinstance(value, Tensor) and value.is_meta
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if is_elsewhere else value


def complete_first_rank(ownership: Ownership) -> None:
    """Put the whole model into the module of rank 0; collective."""
    state = gather_module(ownership)
    if ownership.rank == 0:
        ownership.module.load_state_dict(state, assign=True)


def _to_first_rank(ownership: Ownership, value: Any, owner: int) -> Any:
    if owner == 0 or not isinstance(value, Tensor):
        return value
    first = distributed.get_global_rank(ownership.group, 0)
    if ownership.rank == owner:
        distributed.send(value.contiguous(), first, group=ownership.group)
    elif ownership.rank == 0:
        device = ownership.module.device
        received = torch.empty(value.shape, dtype=value.dtype, device=device)
        distributed.recv(
            received, distributed.get_global_rank(ownership.group, owner), ownership.group
        )
        return received.cpu()  # an accelerator need not have room for the whole model
    return None


def gather_optimizer(ownership: Ownership, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by number of parameter, complete on rank 0; collective."""
    state = optimizer.state_dict()
    names = names_of(ownership, optimizer)
    whole: dict[Any, Any] = {}
    for number, name in enumerate(names):
        entry = _object_to_first_rank(
            ownership, state["state"].get(number), ownership.ranks[name][0]
        )
        if entry is not None:
            whole[number] = entry
    others = {key: value for key, value in state["state"].items() if not isinstance(key, int)}
    return {**state, "state": {**whole, **others}} if ownership.rank == 0 else {}


def _object_to_first_rank(ownership: Ownership, value: Any, owner: int) -> Any:
    if owner == 0:
        return value
    first, source = (distributed.get_global_rank(ownership.group, rank) for rank in (0, owner))
    box = [value]
    if ownership.rank == owner:
        distributed.send_object_list(box, first, group=ownership.group)
    elif ownership.rank == 0:
        distributed.recv_object_list(box, source, group=ownership.group)
    return box[0]


def names_of(ownership: Ownership, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, by their numbers."""
    names = {parameter: name for name, parameter in ownership.module.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def load_module(module: pl.LightningModule, state: Mapping[str, Any], strict: bool) -> None:
    """Load what is here of a whole model's state."""
    with warnings.catch_warnings():
        # What belongs to other ranks stays on meta, as it must.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        module.load_state_dict(state, strict=strict)


def load_optimizer(ownership: Ownership, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the entries of the parameters that are here."""
    names = dict(enumerate(names_of(ownership, optimizer)))
    here = {
        number: entry
        for number, entry in state["state"].items()
        if number not in names or ownership.is_here(names[number])
    }
    optimizer.load_state_dict({**state, "state": here})
