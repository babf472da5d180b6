"""What a step costs, and whether and how fast it would run elsewhere."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.planner.analyze import analyze_step
    from lightning_align.planner.balance import MachineBalance
    from lightning_align.planner.failures import Reliability, TimeToTrain, time_to_train
    from lightning_align.planner.generation import GenerationCost, predict_generation
    from lightning_align.planner.hardware_spec import HardwareSpec
    from lightning_align.planner.model_spec import ModelSpec
    from lightning_align.planner.parallel_spec import ParallelSpec
    from lightning_align.planner.planner import Plan, Planner
    from lightning_align.planner.report import StepReport
    from lightning_align.planner.step_time import predict_step_time
else:
    _HOMES = {
        "GenerationCost": "generation",
        "HardwareSpec": "hardware_spec",
        "MachineBalance": "balance",
        "ModelSpec": "model_spec",
        "ParallelSpec": "parallel_spec",
        "Plan": "planner",
        "Planner": "planner",
        "Reliability": "failures",
        "StepReport": "report",
        "TimeToTrain": "failures",
        "analyze_step": "analyze",
        "predict_generation": "generation",
        "predict_step_time": "step_time",
        "time_to_train": "failures",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "GenerationCost",
    "HardwareSpec",
    "MachineBalance",
    "ModelSpec",
    "ParallelSpec",
    "Plan",
    "Planner",
    "Reliability",
    "StepReport",
    "TimeToTrain",
    "analyze_step",
    "predict_generation",
    "predict_step_time",
    "time_to_train",
]
