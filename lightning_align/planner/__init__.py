"""What a step costs, and whether and how fast it would run elsewhere."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.planner.analyze import analyze_step
    from lightning_align.planner.report import StepReport
else:
    _HOMES = {
        "StepReport": "report",
        "analyze_step": "analyze",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["StepReport", "analyze_step"]
