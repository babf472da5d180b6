"""Parameters whose values are away: what they are is known, and who reads them is told.

A parameter is the same object all the time. While its values are away it is of another class, and
torch asks that class before it does anything with the object. So what is plain ``nn.Parameter``
while it computes costs nothing there, and an average, a copy, a histogram or a saved state of one
that is away is an error and no number. Only compiled code (TorchScript) does not ask; it sees NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

# Attributes that are values, of all that a tensor has.
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag", "__cuda_array_interface__"}
# Functions that ask for no value: by name, as a function and a method are the same.
_KNOWN = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__"),
    *("is_contiguous", "element_size", "get_device", "is_floating_point", "is_complex"),
    *("is_signed", "is_same_size", "is_pinned", "is_shared", "has_names", "__hash__"),
    *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
    "_has_compatible_shallow_copy_type",  # asked by module.to
}
# Functions of another tensor that is to become like the parameter.
_LIKE = {"to", "type_as", "view_as", "expand_as", "reshape_as"}
# Functions that return the parameter itself where there is nothing to do.
_UNCHANGED = {"to", "cpu", "float", "double", "half", "bfloat16", "type"}


class Away:
    """What the class of a parameter has first while its values are away.

    Attributes:
        kind: The class that the parameter has otherwise.
        away_as: Its name, and that of its block.
        bring: What brings it back for who uses it, if anything does.
    """

    kind: type[nn.Parameter]
    away_as: str
    bring: Callable[[list[nn.Parameter]], None] | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        """What torch asks before it does anything with the parameter."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            is_known = func.__self__.__name__ not in _VALUES  # type: ignore[attr-defined]
            is_known |= name == "__set__" and args[1] is args[0]  # module.to where nothing changes
        else:
            is_known = name in _KNOWN or (name in _LIKE and not isinstance(args[0], Away))
        if is_known or name in _UNCHANGED:
            plain: Any = nn.Parameter
            result = plain.__torch_function__(func, types, args, kwargs or {})
            if is_known or result is args[0]:
                return result
        _bring_all(args, kwargs)
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy of what the parameter is when its values are there."""
        _bring_all(self)
        return copy.deepcopy(self, memo)

    @override
    def __repr__(self) -> str:
        parameter: Any = self
        return f"Parameter away: {self.away_as}, {tuple(parameter.shape)}, {parameter.dtype}"


def go_away(
    parameter: nn.Parameter,
    name: str,
    stand_in: Tensor,
    bring: Callable[[list[nn.Parameter]], None] | None = None,
) -> None:
    """Take a parameter's values away.

    Args:
        parameter: Whose.
        name: What those who read it are told.
        stand_in: What compiled code reads.
        bring: Brings it back for who uses it, and keeps other parameters of the same call; without
            this its use is an error.
    """
    come_back(parameter, stand_in)
    changing: Any = parameter
    changing.away_as, changing.bring = name, bring
    parameter.__class__ = _away(type(parameter))


def come_back(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter its values.

    Args:
        parameter: Whose.
        values: They.
    """
    changing: Any = parameter
    if isinstance(parameter, Away):
        changing.__class__ = parameter.kind
        del changing.away_as, changing.bring
    parameter.data = values


@cache
def _away(kind: type[nn.Parameter]) -> type[nn.Parameter]:
    return type(f"Away{kind.__name__}", (Away, kind), {"kind": kind})


def _bring_all(*given: Any) -> None:
    """Bring parameters that a call is given; one that nothing brings is an error."""
    parameters = [leaf for leaf in tree_leaves(given) if isinstance(leaf, nn.Parameter)]
    for parameter in parameters:
        if isinstance(parameter, Away):
            if parameter.bring is None:
                raise RuntimeError(
                    f"Parameter {parameter.away_as} was used while it is not in memory: only the"
                    " forward of its block may read it. Read it in `with"
                    " strategy.gathered([name])`, or choose blocks with wrap_policy so that it is"
                    " in none."
                )
            parameter.bring(parameters)
