"""Public names that are imported on first use (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports nothing before it is asked.

    Type checkers read imports under ``TYPE_CHECKING`` instead, and must not see this
    ``__getattr__``: they would take every name for one of the package.

    Args:
        package: ``__name__`` of the package.
        homes: Public name -> the submodule that defines it; a submodule is its own home.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = importlib.import_module(f"{package}.{homes[name]}")
        value: object = home if name == homes[name] else getattr(home, name)
        setattr(sys.modules[package], name, value)  # the next access is a plain attribute
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
