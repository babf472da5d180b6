"""Hashes of what samples and functions are: equal content, equal hash, in every process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from types import CodeType, MethodType
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOOKED_AT = 256  # samples that the fingerprint of a data set without its own is made from

Update = Callable[[bytes], object]


class UnknownContentError(TypeError):
    """A value whose content cannot be compared with another one's."""


def data_fingerprint(dataset: Any) -> str:
    """Hash of the number of samples, and of a few of them from the first to the last.

    Args:
        dataset: Has a length and gives sample i as ``dataset[i]``.

    Raises:
        UnknownContentError: As ``add_content``.
    """
    digest = hashlib.blake2b(str(len(dataset)).encode(), digest_size=16)
    for number in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)).tolist():
        add_content(digest.update, dataset[number])
    return f"{len(dataset)} samples {digest.hexdigest()}"


def add_content(update: Update, value: Any) -> None:
    """Feed a value to a hash: text, numbers, arrays, tensors, functions, and what is made of them.

    Args:
        update: Of the hash.
        value: Such as a sample.

    Raises:
        UnknownContentError: If it holds anything else.
    """
    if isinstance(value, Mapping):
        update(f"mapping {len(value)}\n".encode())
        for key, item in value.items():
            add_content(update, key)
            add_content(update, item)
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)}\n".encode())
        for item in value:
            add_content(update, item)
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        update(f"{type(value).__name__} {len(data)}\n".encode() + data)
    elif value is None or isinstance(value, (bool, int, float)):
        update(f"{value!r}\n".encode())
    elif callable(value):
        _add_function(update, value)
    else:
        array = _array(value)
        update(f"array {array.dtype.str} {array.shape}\n".encode() + array.tobytes())


def _array(value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, RuntimeError, ValueError):  # such as a bfloat16 tensor's
        array = np.empty(0, object)
    if array.dtype == object:
        raise _unknown(value)
    return array


def _unknown(value: Any) -> UnknownContentError:
    return UnknownContentError(f"holds a {type(value).__name__}, whose content is not known")


def _add_function(update: Update, value: Any) -> None:
    """Its code and what it holds: values closed over, defaults, ``self``, a partial's arguments.

    Functions and globals that it calls by name are not looked into.
    """
    if isinstance(value, functools.partial):
        add_content(update, ["partial", value.func, value.args, value.keywords])
        return
    function = value if hasattr(value, "__code__") else type(value).__call__
    code = getattr(function, "__code__", None)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    update(f"function {getattr(value, '__module__', '')}.{name}\n".encode())
    if not isinstance(code, CodeType):
        return  # of C
    update(_code(code).encode())
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    add_content(update, [held, function.__defaults__, function.__kwdefaults__])
    owner = value.__self__ if isinstance(value, MethodType) else value
    if owner is not function:
        try:
            add_content(update, [type(owner).__qualname__, vars(owner)])
        except (UnknownContentError, TypeError) as error:  # no __dict__
            raise _unknown(owner) from error


def _code(code: CodeType) -> str:
    return repr((code.co_code.hex(), code.co_names, [_constant(c) for c in code.co_consts]))


def _constant(constant: object) -> str:
    if isinstance(constant, CodeType):
        return _code(constant)
    # The set of `x in {"a", "b"}` is in another order in another process.
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
