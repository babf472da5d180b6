"""What ``lightning-align check`` prints: shapes, the length of the run, the cut, the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.cli import plan_given
from lightning_align.cli.check_split import class_of, split_of
from lightning_align.cli.plan_report import columns
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Planner
from lightning_align.planner.memory import HOST, NVME, device_memory, elsewhere
from lightning_align.planner.quantities import shown, shown_time
from lightning_align.strategies.pipeline.cutting import cut
from lightning_align.strategies.pipeline.find_chain import find_chain
from lightning_align.strategies.pipeline.layer_costs import count_parameters

if TYPE_CHECKING:
    from lightning_align.cli.check_run import CheckCLI


def tell(cli: CheckCLI, batch: Any) -> None:
    """Print the report, in one of the processes.

    Args:
        cli: Whose set-up is over.
        batch: The first one, or the shapes of the largest.

    Raises:
        ValueError: If there is no batch, or hardware that was named has too little memory.
    """
    if batch is None:
        rule = "the training data make no batch"
        raise argument_error("check", "data", type(cli.datamodule).__name__, rule)
    if not cli.trainer.is_global_zero:
        return
    lines = [*_model(cli), *_batch(cli, batch), *_run(cli), *_partition(cli)]
    try:
        lines += _memory(cli, batch)
    except ValueError:
        print("\n".join([*lines, *_not_checked(cli)]))  # noqa: T201
        raise
    print("\n".join([*lines, *_not_checked(cli), "nothing is refused"]))  # noqa: T201


def _not_checked(cli: CheckCLI) -> list[str]:
    lines = [f"  {each}" for each in cli.unchecked]
    return ["not checked", *lines] if lines else []


def _model(cli: CheckCLI) -> Iterator[str]:
    numbers = [parameter.numel() for parameter in cli.model.parameters()]
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    yield f"model      {type(cli.model).__name__}, {shown(sum(numbers), '')} parameters"
    if trained != sum(numbers):
        yield f"           {shown(trained, '')} of them train"


def _batch(cli: CheckCLI, batch: Any) -> Iterator[str]:
    name = type(cli.datamodule).__name__ if cli.datamodule is not None else "its own loaders"
    yield f"data       {name}"
    for path, tensor in tensors(batch, ""):
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield f"           {path or 'batch'} {tuple(tensor.shape)} {dtype}"


def tensors(batch: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a batch by where they are in it, such as ``rows.input_ids`` or ``pair[0]``.

    Args:
        batch: Mappings, lists and tuples of tensors.
        path: Of the batch itself.
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(batch, (list, tuple)):
        for number, value in enumerate(batch):
            yield from tensors(value, f"{path}[{number}]")


def _run(cli: CheckCLI) -> Iterator[str]:
    trainer = cli.trainer
    batches = getattr(trainer, "num_training_batches", 0)
    steps = trainer.max_steps if trainer.max_steps > 0 else None
    told = []
    if cli.has_values and batches not in (0, float("inf")):
        name, world = class_of(cli.config_dump["trainer"]["strategy"])[0], cli.devices.world
        copies = 1 if name == "PipelineStrategy" else world
        if cli.devices.is_stand_in:  # one process has seen all of the data
            batches = -(-batches // copies)
        told.append(f"{batches:,} batches in an epoch" + " on each process" * (copies > 1))
    if trainer.accumulate_grad_batches > 1:
        told.append(f"{trainer.accumulate_grad_batches} of them a step")
    epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
    told.append(f"ends after {steps:,} steps" if steps else f"ends after {epochs} epochs")
    yield f"run        {', '.join(told)}"


def _partition(cli: CheckCLI) -> Iterator[str]:
    """Where a pipeline is cut: as its strategy has it, or as it would."""
    table = getattr(cli.trainer.strategy, "table", None)
    name, given = class_of(cli.config_dump["trainer"]["strategy"])
    if table is None and name == "PipelineStrategy" and cli.devices.world > 1:
        method = given.get("partition_method") or "parameters"
        if method == "profile":
            cli.unchecked.append("the times of layers, which partition_method='profile' cuts by")
            method = "parameters"
        chain = find_chain(cli.model)
        try:
            stages = int(given.get("num_stages_per_rank") or 1)
            _, table = cut(chain, count_parameters(chain), method, cli.devices.world, stages)
        finally:
            chain.close()
    if table:
        yield "partition"
        yield from (f"  {line}" for line in str(table).splitlines())


def _memory(cli: CheckCLI, batch: Any) -> list[str]:
    """By the planner's formulas, and whether it fits, where it is known on what."""
    try:
        model, parallel = _planned(cli, batch)
        parts = device_memory(model, parallel)
    except ValueError as error:
        reason = str(error).partition("): ")[2] or str(error)
        cli.unchecked.append(f"memory, for which there is no formula here: {reason}")
        return []
    is_gpu = str(cli.config_dump["trainer"]["accelerator"]) in ("gpu", "cuda", "auto")
    rows = [[name, shown(value)] for name, value in parts.items() if value]
    beside = elsewhere(model, parallel, on_device=is_gpu)
    names = {HOST: "in host memory", NVME: "on drives"}
    rows += [[names[tier], shown(value)] for tier, value in beside.items() if value]
    lines = [f"memory     {shown(sum(parts.values()))} on the fullest device, by formula"]
    lines += [f"           {line}" for line in columns(rows)]
    return [*lines, f"           {_compared(cli, model, parallel, sum(parts.values()))}"]


def _compared(cli: CheckCLI, model: ModelSpec, parallel: ParallelSpec, needed: float) -> str:
    hardware = cli.check.hardware
    if hardware is None:
        if cli.devices.is_stand_in:
            return "whether a device has that: --hardware h100-sxm"
        if torch.cuda.is_available():
            return f"of {shown(torch.cuda.get_device_properties(0).total_memory)} that it has"
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"of {shown(host)} that this machine has, for {parallel.devices} processes"
    plan = Planner(HardwareSpec.from_name(hardware).of(parallel.devices)).predict(model, parallel)
    if not plan.fits:
        rule = f"has too little memory: {shown(plan.missing_bytes)} of {shown(needed)} are missing"
        way_out = f"What fits: lightning-align plan --hardware {parallel.devices}x{hardware}"
        raise argument_error("check", "hardware", hardware, rule, f"{way_out} --model FILE")
    return f"fits on {hardware}, and a step takes about {shown_time(plan.step_time)}"


def _planned(cli: CheckCLI, batch: Any) -> tuple[ModelSpec, ParallelSpec]:
    """The run in the planner's words.

    Raises:
        ValueError: If the planner has none for it.
    """
    content = cli.config_dump
    file = Path(cli.folder) / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    rows = getattr(cli.datamodule, "batch_size", None)
    if not isinstance(rows, int):
        rows = next((len(tensor) for _, tensor in tensors(batch, "") if tensor.dim()), 1)
    accumulate = cli.trainer.accumulate_grad_batches
    split = split_of(class_of(content["trainer"]["strategy"]), cli.devices.world, rows, accumulate)
    if isinstance(split, str):
        raise ValueError(split)
    model = ModelSpec.from_config(str(file))
    asked = dict.fromkeys([*plan_given.DEFAULTS, "shared_prefix"])
    chosen, _ = plan_given.chosen(str(file), {**asked, "shared_prefix": 0.0})
    if content["model"]["init_args"].get("activation_checkpointing"):
        split["activation_checkpointing"] = "full"
    return model, ParallelSpec(**{**split, **chosen})
