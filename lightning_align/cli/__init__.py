"""The ``lightning-align`` command."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.cli.app import AlignCLI
else:
    _HOMES = {"AlignCLI": "app"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["AlignCLI"]
