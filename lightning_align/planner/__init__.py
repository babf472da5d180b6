"""What a step costs, and whether and how fast it would run elsewhere."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.planner.analyze import analyze_step
    from lightning_align.planner.balance import MachineBalance
    from lightning_align.planner.report import StepReport
    from lightning_align.planner.step_time import predict_step_time
else:
    _HOMES = {
        "MachineBalance": "balance",
        "StepReport": "report",
        "analyze_step": "analyze",
        "predict_step_time": "step_time",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["MachineBalance", "StepReport", "analyze_step", "predict_step_time"]
