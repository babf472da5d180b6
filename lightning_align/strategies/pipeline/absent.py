"""Parameters whose values are on another rank.

torch lets some operations of the CPU read memory at random where one operand is on the meta device
(2.13: ``mm``), and says nothing. So what is absent says it: neither such a parameter nor what was
made of it is computed with together with values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.strategies.pipeline.passage import WHERE, ChainError
from lightning_align.strategies.pipeline.trees import tensors_in

# Loading, moving and saving a whole module passes by what is absent.
_TENSOR: Any = Tensor
_LEAVE_ABSENT_ALONE = (Tensor.copy_, _TENSOR.data.__set__, _TENSOR.grad.__set__)
# Attributes that need no values. Every look at a gradient comes by here, some 20 times a step for
# each parameter, so these skip the search for values among the arguments.
_OF_FORM = frozenset(
    getattr(_TENSOR, name).__get__
    for name in ("grad", "is_meta", "requires_grad", "device", "shape")
)
_NEED_VALUES = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__)


class Absent(Tensor):
    """What was computed from parameters that are not here: a shape without values."""

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OF_FORM:
                return _absent(func(*args))
            if func not in _LEAVE_ABSENT_ALONE and (
                func in _NEED_VALUES or not all(t.is_meta for t in tensors_in((args, kwargs)))
            ):
                raise _error(func)
            result = func(*args, **kwargs)
        return _absent(result)


class AbsentParameter(nn.Parameter):
    """A parameter of a module that is on another rank."""

    __torch_function__ = Absent.__torch_function__


def _absent(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(map(_absent, result))
    is_plain = type(result) is Tensor
    return result.as_subclass(Absent) if is_plain else result


def _error(func: Any) -> ChainError:
    name = getattr(func, "__name__", str(func))
    rule = f"{name} is given a weight of another stage, whose values are on another rank"
    way_out = "Let weights be used by the layers that hold them only"
    return ChainError(str(argument_error(WHERE, "model", "...", rule, way_out)))
