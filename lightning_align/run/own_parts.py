"""What each rank has of a model that is sharded over all of them, to go back to in mid-fit.

Nothing is gathered and nothing sent: a part is a tensor like any other, in the memory that trains.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from lightning_align._errors import argument_error
from lightning_align.layers.sharding import own_part

_PARTS = "lightning_align.parts"  # of a module, in its first optimizer's state
_LAYOUTS = "lightning_align.layouts"  # of an optimizer's state: those of its tensors in parts

Layout = tuple[list[int], list[int | None]]  # shape, and by dimension of the ranks what they cut


def snapshot_state(strategy: Strategy) -> dict[str, Any]:
    """This rank's parts of module and optimizers, under Lightning's names; not copied.

    Names and shapes stand in the place of parameters that it has in part: hooks look at them.

    Args:
        strategy: Lightning's ModelParallelStrategy, between two steps.
    """
    assert strategy.lightning_module is not None
    values = strategy.lightning_module.state_dict()
    parts = {name: own_part(value) for name, value in values.items() if isinstance(value, DTensor)}
    outlines = {name: _outline(values[name]) for name in parts}
    states = [_own_state(optimizer) for optimizer in strategy.optimizers]
    for state in states[:1]:  # of a run without an optimizer no weights change
        state[_PARTS] = parts
    return {"state_dict": {**values, **outlines}, "optimizer_states": states}


@torch.no_grad()
def restore_state(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Put back, in place, what this rank has taken.

    Args:
        strategy: As it was.
        state: From ``snapshot_state``, whose tensors it may go on with.
    """
    module = strategy.lightning_module
    assert module is not None
    now = module.state_dict()
    for own in state["optimizer_states"][:1]:
        for name, value in own[_PARTS].items():
            now[name].to_local().copy_(value)
    parts = {name for name, value in now.items() if isinstance(value, DTensor)}
    whole = {name: value for name, value in state["state_dict"].items() if name not in parts}
    module.load_state_dict(whole, strict=False)
    for optimizer, own in zip(strategy.optimizers, state["optimizer_states"], strict=True):
        _put_state(optimizer, own)


def is_own_state(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a state is what ``snapshot_state`` has taken, and is to be put back in mid-fit."""
    optimizers = checkpoint.get("optimizer_states") or [{}]
    return _PARTS in optimizers[0]


def _outline(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _own_state(optimizer: Optimizer) -> dict[str, Any]:
    whole = optimizer.state_dict()
    own: dict[Any, Any] = {}
    layouts: dict[Any, dict[str, Layout]] = {}
    for number, values in whole["state"].items():
        own[number] = {name: own_part(value) for name, value in values.items()}
        parts = {name: value for name, value in values.items() if isinstance(value, DTensor)}
        layouts[number] = {name: _layout(optimizer, value) for name, value in parts.items()}
    return {**whole, "state": own, _LAYOUTS: layouts}


def _put_state(optimizer: Optimizer, own: Mapping[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[Any, Any] = {}
    for number, values in own["state"].items():
        state[number] = dict(values)
        for name, layout in own[_LAYOUTS][number].items():
            state[number][name] = _in_parts(values[name], layout, parameters[number])
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _layout(optimizer: Optimizer, value: DTensor) -> Layout:
    known = (Shard, Replicate)
    if not all(type(placement) in known for placement in value.placements):
        rule = f"its state lies as {value.placements}, of which a rank has no part to itself"
        way_out = "Take AdamW, StableAdamW or Muon, or another action than 'rewind'"
        raise argument_error("SpikeGuard", "optimizer", type(optimizer).__name__, rule, way_out)
    return list(value.shape), [getattr(placement, "dim", None) for placement in value.placements]


def _in_parts(own: Tensor, layout: Layout, parameter: DTensor) -> DTensor:
    shape, dims = torch.Size(layout[0]), layout[1]
    return DTensor.from_local(
        own.to(parameter.to_local().device),
        parameter.device_mesh,
        [Replicate() if dim is None else Shard(dim) for dim in dims],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
