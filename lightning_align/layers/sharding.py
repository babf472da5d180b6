"""A model whose ranks hold parts of each parameter: PyTorch's ``fully_shard``, one group a block.

What is outside of the blocks (embedding, final norm, head) is one more group, that of the model
itself, and PyTorch gathers it around the model's ``forward``. Our losses run behind the hidden
states and read the head's weight by themselves, so ``as_forward`` lets a whole step count as that
forward: within it weights are what they are without sharding, and a gradient that reaches them
there is summed over the ranks, as every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from lightning_align._compat.torch_modules import STEP
from lightning_align._errors import argument_error
from lightning_align.layers.map import ModelLayers


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` has been there, or another ``fully_shard`` of the whole model."""
    return isinstance(model, FSDPModule)


def shard(layers: ModelLayers, mesh: DeviceMesh, *, where: str) -> None:
    """Leave each rank a part of each parameter. Once is enough.

    Args:
        layers: Map of the model, whose parameters become DTensors in place.
        mesh: Ranks that hold the parts, in one dimension.
        where: Class the user called.

    Raises:
        ValueError: If parts of it cannot be gathered one at a time.
    """
    model: Any = layers.model
    if is_sharded(model):
        return
    check_can_shard(layers, where)
    for block in layers.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_can_shard(layers: ModelLayers, where: str) -> None:
    """Refuse a model that ``fully_shard`` cannot take block by block.

    Raises:
        ValueError: If a block shares a parameter, or is of several data types that train.
    """
    name = type(layers.model).__name__
    blocks = tuple(f"{block}." for block in layers.block_names)
    for tied in layers.tied_parameters:
        groups = {next((b for b in blocks if each.startswith(b)), "") for each in tied}
        if len(groups) > 1:
            rule = f"parameters that blocks share cannot be sharded block by block: {tied}"
            raise argument_error(where, "model", name, rule, "Use strategy='ddp'")
    groups_of: dict[str, set[torch.dtype]] = {}
    for parameter_name, parameter in layers.model.named_parameters():
        group = next((b for b in blocks if parameter_name.startswith(b)), "")
        if parameter.requires_grad:
            groups_of.setdefault(group, set()).add(parameter.dtype)
    for group, dtypes in groups_of.items():
        if len(dtypes) > 1:
            what = f"block '{group[:-1]}'" if group else "what is outside of its blocks"
            rule = f"{what} trains in several data types ({sorted(map(str, dtypes))}), and ranks"
            rule += " sum the gradients of a block at once"
            way_out = "Load it with one dtype, or use strategy='ddp'"
            raise argument_error(where, "model", name, rule, way_out)


def as_forward(model: nn.Module, function: Callable[[], Any]) -> Any:
    """Call ``function`` as the forward of a sharded model; of another one just call it.

    Not to be nested. Collective: every rank must call it.

    Args:
        model: What the function computes with.
        function: What to compute; gradients flow through the tensors that it returns.
    """
    if not isinstance(model, FSDPModule):
        return function()
    sharded: Any = model
    if not hasattr(sharded, STEP):
        setattr(sharded, STEP, _called)
        register_fsdp_forward_method(sharded, STEP)
    step = getattr(sharded, STEP)
    if torch.is_grad_enabled():
        return step(function)
    # PyTorch reuses the memory that it gathers into, and what inference mode has made cannot train.
    with torch.inference_mode(False), torch.no_grad():
        result = step(function)
    sharded.reshard()  # else what is outside of the blocks stays whole, until a backward
    return result


def give_back_gathered(module: nn.Module) -> None:
    """Leave nothing whole behind a forward that no backward follows.

    PyTorch keeps what is outside of the blocks, which the next forward would take as it was.

    Args:
        module: What holds sharded modules, or none.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def _called(function: Callable[[], Any]) -> Any:
    return function()


def own_part(value: Any) -> Any:
    """This rank's part of a tensor, in the same memory; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def is_cut_for_all(tensor: Tensor, ranks: int) -> bool:
    """Whether each of so many ranks has a part of a tensor to itself, and all have it together."""
    if not isinstance(tensor, DTensor):
        return False
    return tensor.device_mesh.size() == ranks and all(type(p) is Shard for p in tensor.placements)


def as_part_like(parameter: nn.Parameter, own: Tensor) -> Tensor:
    """A tensor laid out as a parameter, of which ``own``, copied, is this rank's part.

    Args:
        parameter: As which it lies, in whose dtype and on whose device.
        own: As ``own_part`` gives it.
    """
    if not isinstance(parameter, DTensor):
        return own.to(parameter, copy=True)
    return DTensor.from_local(
        own.to(parameter.to_local(), copy=True),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def follow_freezing(model: nn.Module) -> None:
    """Let the groups of a sharded model take up which parameters require a gradient now.

    PyTorch looks when it gathers a group, so what is gathered already would train as before; and
    the data type of a group's gradients is that of what trains in it. Gathers one group at a time.
    Collective: every rank must call it.

    Args:
        model: What holds sharded modules.

    Raises:
        ValueError: If torch does not follow.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        asked = [parameter.requires_grad for parameter in module.parameters()]
        module.unshard()
        gathered = [parameter.requires_grad for parameter in module.parameters()]
        module.reshard()
        if gathered != asked:
            rule = f"torch {torch.__version__} does not follow where parameters are frozen"
            name = type(module).__name__
            raise argument_error("fully_shard", "module", name, rule, "Use strategy='ddp'")


@torch.no_grad()
def put_parts(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Let a model have other values, in place.

    Args:
        model: Sharded.
        parts: This rank's of each entry of its state, as ``own_part`` gives them.
    """
    for name, value in model.state_dict().items():
        own_part(value).copy_(parts[name])


def load_whole_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Let a sharded model have the values of a whole one; each rank takes its parts of them."""
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state, options=whole)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module with sharded parts, gathered on rank 0 and empty elsewhere; collective.

    Takes host memory for all of it there, and device memory for one parameter at a time.

    Args:
        module: The model, or what holds it.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=whole)
