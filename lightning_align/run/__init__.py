"""Position, randomness and state of a run; everything above may use this room."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.run.exact_resume import ExactResume
else:
    _HOMES = {"ExactResume": "exact_resume"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["ExactResume"]
