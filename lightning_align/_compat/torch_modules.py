"""Private APIs of torch's modules, tensors and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction
from typing_extensions import override

# Of a module that ``fully_shard`` has been applied to: how it is sharded, and a method that it
# takes for a forward (layers/sharding.py). They hold tensors whose memory comes and goes.
STEP = "lightning_align_step"
SHARDING = frozenset({STATE_KEY, REGISTRY_KEY, STEP})


class BeforeDraws(TorchDispatchMode):
    """Context in which a function is called with each tensor that is about to be drawn into.

    Args:
        call: Gets the tensor: a parameter, a part of one, or a temporary tensor.
    """

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(args[0], Tensor):
            self._call(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """Context in which torch's functions are its own, whatever ``TorchFunctionMode`` is entered."""
    with torch._C.DisableTorchFunction():
        yield


def intercept_calls(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Have ``module(...)`` call something else, hooks included; None undoes it.

    The attribute is where ``module.compile()`` puts what it makes. It is left out of copies.
    """
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``module(...)`` does where nothing is intercepted: its hooks and its forward."""
    call: Any = module._call_impl
    return call(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` made it, or calls of it."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def is_in_reentrant_checkpoint() -> bool:
    """Whether this is called by what ``checkpoint(..., use_reentrant=True)`` runs."""
    code = CheckpointFunction.forward.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def has_spectral_norm(module: nn.Module) -> bool:
    """Whether calls of a layer iterate towards the largest singular value of its weight."""
    parametrized: Any = getattr(module, "parametrizations", {})
    steps = [step for steps in parametrized.values() for step in steps]
    steps += module._forward_pre_hooks.values()
    return any(type(step).__name__.lstrip("_") == "SpectralNorm" for step in steps)


def storage_key(tensor: Tensor) -> int | None:
    """Equal for tensors that share memory, while both live; None for those without a storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def without_frame(func: Any) -> Any:
    """What an operation of torch calls, without the frame of Python in which it does only that."""
    return func._op if type(func) is torch._ops.OpOverload else func


def default_store() -> Any:
    """The key-value store that the ranks of the default process group met in."""
    return torch.distributed.distributed_c10d._get_default_store()


@contextmanager
def one_group_of_gradients(device: torch.device) -> Iterator[None]:
    """Let torch's norm and clipping of gradients take all of them at once, wherever they are.

    They go by device and dtype otherwise, so that ranks which have the values of different
    gradients would take them in different orders.
    """
    by_device = vars(clip_grad)["_group_tensors_by_device_and_dtype"]

    def one_group(lists: list[list[Tensor]], *_: Any, **__: Any) -> Any:
        return {(device, None): (lists, [*range(len(lists[0]))])}

    vars(clip_grad)["_group_tensors_by_device_and_dtype"] = one_group
    try:
        yield
    finally:
        vars(clip_grad)["_group_tensors_by_device_and_dtype"] = by_device
