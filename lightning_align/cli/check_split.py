"""How many devices a configuration asks for, whether they are here, and how it divides its work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_align.cli.plan_yaml import arguments_of, last_name
from lightning_align.strategies.pipeline.microbatches import count_that_divides

_FORMULAS = ("DDPStrategy", "SingleDeviceStrategy", "PipelineStrategy", "ZeROInfinityStrategy")
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


@dataclass
class Devices:
    """What a run takes.

    Args:
        world: Processes on all nodes.
        is_stand_in: Whether they are not here, so that one process takes their place.
        unchecked: What is then not checked.
    """

    world: int = 1
    is_stand_in: bool = False
    unchecked: list[str] = field(default_factory=list)


def devices_of(trainer: Any) -> Devices:
    """The devices that a Trainer's arguments ask for.

    Args:
        trainer: The arguments.
    """
    kind, nodes = str(trainer.accelerator), int(trainer.num_nodes or 1)
    is_gpu = kind in ("gpu", "cuda") or (kind == "auto" and torch.cuda.is_available())
    here = torch.cuda.device_count() if is_gpu else 1 if kind in ("tpu", "mps") else os.cpu_count()
    given = trainer.devices
    count = _count(given, here or 1 if is_gpu else 1)
    if isinstance(trainer.strategy, str) and trainer.strategy == "auto" and count * nodes == 1:
        name = "the run"
    else:
        name = class_of(trainer.strategy)[0]
    world = count * nodes
    why = None
    if kind not in ("auto", "cpu", "gpu", "cuda"):
        is_here = kind == "mps" and torch.backends.mps.is_available()
        why = None if is_here else f"there is no {kind} here"
    elif is_gpu and not here:
        why = "there is no GPU here"
    elif nodes > 1:
        why = f"this is one machine of {nodes}"
    elif count > (here or 1) and (is_gpu or kind == "auto"):
        why = f"there are {here} here"
    if why is None:
        return Devices(world)
    devices = f"{world} processes" if world > 1 else "process on its device"
    return Devices(world, True, [f"what {name} refuses when its {devices} set up: {why}"])


def _count(devices: Any, all_here: int) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([each for each in devices.split(",") if each.strip()])
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    return devices if isinstance(devices, int) and devices > 0 else all_here


def class_of(strategy: Any) -> tuple[str, Mapping[str, Any]]:
    """Name of a strategy's class and its arguments, from a configuration.

    Args:
        strategy: A name, or a mapping with a class_path.
    """
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        entry: Any = StrategyRegistry[strategy]
        cls: Any = entry["strategy"]
        name = getattr(cls, "__name__", strategy)
        return _named(strategy, name), dict(entry["init_params"])
    if isinstance(strategy, str):
        return ("DDPStrategy" if strategy == "auto" else last_name(strategy)), {}
    content = strategy if isinstance(strategy, Mapping) else strategy.as_dict()
    return last_name(content), arguments_of(content)


def _named(alias: str, name: str) -> str:
    """Ours are registered by functions that import them on first use."""
    if alias.startswith("pipeline_"):
        return "PipelineStrategy"
    if alias.startswith("zero_infinity"):
        return "ZeROInfinityStrategy"
    return name


def split_of(
    strategy: tuple[str, Mapping[str, Any]], world: int, rows: int, accumulate: int
) -> dict[str, Any] | str:
    """Arguments of ``ParallelSpec``, or why there is no formula.

    Args:
        strategy: Name of its class, and its arguments.
        world: Processes.
        rows: Of a batch of a process.
        accumulate: Batches of a step.
    """
    name, given = strategy
    found: dict[str, Any] = {
        "devices": world,
        "micro_batch_size": rows,
        "global_batch_size": rows * world * accumulate,
    }
    if name == "PipelineStrategy":
        stages = int(given.get("num_stages_per_rank") or 1)
        wanted = given.get("num_microbatches") or (1 if world * stages == 1 else 4 * world * stages)
        cut = count_that_divides(rows, int(wanted))
        found |= {
            "pipeline_parallel": world,
            "num_model_chunks": stages,
            "schedule": given.get("schedule") or "1F1B",
            "micro_batch_size": rows // cut,
            "global_batch_size": rows,
        }
    elif name == "ZeROInfinityStrategy":
        found |= {
            "zero_stage": int(given.get("stage") or 3),
            "offload_param": given.get("offload_params_device") or "nvme",
            "offload_optimizer": given.get("offload_optimizer_device") or "nvme",
            "offload_activations": given.get("offload_activations") or "none",
        }
    elif name in _SHARDED:
        found["zero_stage"] = 3
    elif name not in _FORMULAS:
        return f"the planner does not know {name}"
    return found
