"""Private parts of torch's autograd engine, of its attention, and of tensors without values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config
from torch.utils.checkpoint import CheckpointFunction, _recomputation_hook

_AGAIN = _recomputation_hook
_REENTRANT: Any = CheckpointFunction._backward_cls
# Hook of a recomputation -> weak reference to its frame; it is asked for at each operation.
_FRAMES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_OF_LEAVES = 2**64 - 1  # what torch gives to the nodes that accumulate a leaf's gradient


# Number of the backward that runs on this thread; -1 outside.
running_backward: Callable[[], int] = torch._C._current_graph_task_id


_current_node: Any = torch._C._current_autograd_node
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


def next_sequence_number() -> int:
    """What the next node of the graph will be numbered with on this thread; it only grows."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def running_node() -> tuple[int | None, Tensor | None, bool]:
    """Number of the node whose backward runs, or the leaf whose gradient is accumulated.

    Returns:
        Both None where the engine itself is at work; and whether a checkpoint calls forward again.
    """
    node: Any = _current_node()
    again = _recomputes(node)
    if node is None:
        return None, None, again
    number = node._sequence_nr()
    return (None, node.variable, again) if number == _OF_LEAVES else (number, None, again)


def is_result(tensor: Tensor) -> bool:
    """Whether the newest node gave it, as when a node saves what it has found, not what it got."""
    node: Any = tensor.grad_fn
    return node is not None and int(node._sequence_nr()) == next_sequence_number() - 1


def is_recomputing() -> bool:
    """Whether a checkpoint calls forward again, on this thread and inside of a backward."""
    return _recomputes(_current_node())


def _recomputes(node: Any) -> bool:
    if isinstance(node, _REENTRANT):
        return True  # use_reentrant=True; what it computes has other nodes
    hooks: Any = _top_hooks(True)
    return hooks is not None and _is_of_recomputation(hooks[0])


def running_checkpoint() -> tuple[object, int] | None:
    """Which checkpoint calls forward again, and how many tensors it has not kept.

    Returns:
        What is equal for the same checkpoint alone, and holds nothing of it; None outside of one.
    """
    hooks: Any = _top_hooks(True)
    if hooks is not None and _is_of_recomputation(hooks[0]):
        frame = _frame_of(hooks[0])
        return frame, len(frame().weak_holders)
    node: Any = _current_node()
    if isinstance(node, _REENTRANT):
        return int(node._sequence_nr()), 0
    return None


def _frame_of(hook: Any) -> Any:
    found = _FRAMES.get(hook)
    if found is None:
        pack: Any = inspect.unwrap(hook)
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
        found = _FRAMES[hook] = cells["target_frame_ref"].cell_contents
    return found


def _is_of_recomputation(pack: Any) -> bool:
    if getattr(pack, "__module__", None) != _AGAIN.__module__:
        return False
    return str(getattr(pack, "__qualname__", "")).startswith(f"{_AGAIN.__name__}.")


def takes_flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> bool:
    """Whether the processor would take its flash kernel for tensors of such shapes.

    Args:
        query: Of any size and device: only its shape and dtype are looked at.
        key: Likewise.
        value: Likewise.
        **options: Of ``torch.nn.functional.scaled_dot_product_attention``.
    """
    choice: Any = torch._fused_sdp_choice
    with torch._C._DisableTorchDispatch():
        given = {n: _stand_in(v) if isinstance(v, Tensor) else v for n, v in options.items()}
        chosen = int(choice(*map(_stand_in, (query, key, value)), **given))
    return chosen == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of that shape, a row of which is all the memory that it takes."""
    row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device="cpu")
    return row.expand(tensor.shape).requires_grad_(tensor.requires_grad)


def without_values() -> AbstractContextManager[Any]:
    """Context in which tensors take no memory, and yet are of a device, whose autocast they obey.

    Those of before do not work in it.
    """
    return FakeTensorMode()


def nothing_is_zero_on_meta() -> AbstractContextManager[Any]:
    """Context in which ``nonzero`` of a tensor on meta finds all of its places."""
    found: Any = _config
    return found.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[no-any-return]


@contextmanager
def hooks_give_way() -> Iterator[None]:
    """Context in which ``torch.func.grad`` and its kin run under hooks of saved tensors.

    They refuse to otherwise. What they save is theirs: hooks do not change it.
    """
    graph: Any = torch.autograd.graph
    theirs = graph.disable_saved_tensors_hooks
    graph.disable_saved_tensors_hooks = _disabled
    try:
        yield
    finally:
        graph.disable_saved_tensors_hooks = theirs


@contextmanager
def _disabled(message: str) -> Iterator[None]:
    """What torch does there, but that hooks which there are already are no error."""
    hooks: Any = torch._C._autograd
    before = hooks._saved_tensors_hooks_get_disabled_error_message()
    hooks._saved_tensors_hooks_disable(message, False)
    try:
        yield
    finally:
        if before is None:
            hooks._saved_tensors_hooks_enable()
        else:
            hooks._saved_tensors_hooks_disable(before, False)
