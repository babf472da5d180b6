"""What RooflineMonitor asks of a run: whether it can be analysed, its machine, tokens, setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_align._compat.lightning_trainer import is_compiled_whole
from lightning_align._compat.torch_messages import MessageClock
from lightning_align._compat.torch_modules import is_compiled
from lightning_align._errors import argument_error
from lightning_align.planner.advice import Advice, Setting, advise
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.machine_at_hand import by_sheet, machine_at_hand, memory_of
from lightning_align.planner.spec_sheets import SPEC_SHEETS, check_dense, spec_sheet
from lightning_align.planner.step_time import StepTime
from lightning_align.reports.texts import Row
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import (
    CountsTokens,
    TellsWaits,
    data_mesh,
    frozen_modules,
    has_replicas,
    leaves_sharding,
)
from lightning_align.run.replicas import of_every_rank, replica

WHERE = "RooflineMonitor"


def check_hardware(hardware: object, available_flops: float | None) -> None:
    """Refuse hardware that is not known, and a peak that is of sparse matrices.

    Args:
        hardware: What the user gave.
        available_flops: Likewise.

    Raises:
        ValueError: If it is one of these.
    """
    if isinstance(hardware, str):
        name, sheet = spec_sheet(WHERE, hardware, argument="hardware")
        if available_flops is not None:
            for dtype in sheet.peak_flops:
                if available_flops not in sheet.peak_flops.values():
                    check_dense(WHERE, name, dtype, available_flops)
    elif hardware is not None and not isinstance(hardware, MachineBalance):
        rule = f"must be one of {', '.join(map(repr, SPEC_SHEETS))}, or a MachineBalance"
        raise argument_error(WHERE, "hardware", hardware, rule)


def check_run(trainer: Trainer, module: LightningModule, kind: type[Callback]) -> None:
    """Refuse a run whose own steps cannot be analysed.

    Args:
        trainer: Of the run.
        module: That is trained.
        kind: Class of the monitor.

    Raises:
        ValueError: If it has two monitors, or the module or the strategy is such.
    """
    monitors = sum(isinstance(callback, kind) for callback in callbacks_of(trainer))
    if monitors > 1:
        rule = f"the Trainer has {monitors} of them, and an analysis does not run inside another"
        raise argument_error(WHERE, "callbacks", "...", rule, "Leave one of them")
    if not module.automatic_optimization:
        rule = "it optimizes manually, and which batches make a step is not known"
        way_out = "Set automatic_optimization = True, or call analyze_step"
        raise argument_error(WHERE, "model", type(module).__name__, rule, way_out)
    strategy: Any = trainer.strategy
    if leaves_sharding(strategy):
        if data_mesh(strategy).size() < trainer.world_size:
            rule = "it divides layers among ranks that share a batch, whose products are in parts"
            way_out = "Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)"
            raise argument_error(WHERE, "strategy", type(strategy).__name__, rule, way_out)
    elif not has_replicas(strategy) and not isinstance(strategy, TellsWaits):
        rule = "its ranks hold parts of a model, and it does not tell how long they wait"
        way_out = "Train in one process, or with strategy 'ddp', ModelParallelStrategy,"
        way_out += " 'zero_infinity' or 'pipeline_1f1b'"
        raise argument_error(WHERE, "strategy", type(strategy).__name__, rule, way_out)
    if is_compiled_whole(module) or any(map(is_compiled, module.modules())):
        rank_zero_warn(
            f"{WHERE}: the module is compiled. Steps that are analysed run as they are written:"
            " they take longer, and round otherwise than compiled ones."
        )


def clock_of_messages(trainer: Trainer, module: LightningModule) -> MessageClock | None:
    """Follows the messages of a sharded model, where steps wait for them: on a processor.

    Args:
        trainer: Of the run.
        module: That is trained.
    """
    strategy = trainer.strategy
    if not leaves_sharding(strategy) or strategy.root_device.type != "cpu":
        return None
    models = [module, *frozen_modules(module).values()]
    return MessageClock(dict.fromkeys(part for model in models for part in model.modules()))


@contextmanager
def never_ends_run() -> Iterator[None]:
    """Context of what is told: a logger or a picture that fails is a warning."""
    try:
        yield
    except Exception as error:  # whatever a logger raises
        rank_zero_warn(f"{WHERE}: not logged ({type(error).__name__}: {error})")


def dtype_of(trainer: Trainer, module: LightningModule) -> torch.dtype:
    """Of the inputs of products: what the precision casts to, else that of most parameters.

    Args:
        trainer: Of the run.
        module: That is trained.
    """
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    sizes = Counter[torch.dtype]()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def machine_of(
    trainer: Trainer, module: LightningModule, hardware: str | MachineBalance | None
) -> MachineBalance:
    """The machine that a run is on, the same for all ranks; collective.

    Args:
        trainer: Of the run.
        module: That is trained.
        hardware: What the user gave.
    """
    if isinstance(hardware, MachineBalance):
        return hardware
    dtype = dtype_of(trainer, module)
    if isinstance(hardware, str):
        return by_sheet(hardware, dtype)
    found = None
    if trainer.is_global_zero:
        rank_zero_info(f"{WHERE}: looking at the machine; hardware=... says what it is.")
        found = machine_at_hand(trainer.strategy.root_device, dtype)
    agreed: Any = trainer.strategy.broadcast(found)
    machine: MachineBalance = agreed
    return machine


class Learned:
    """Tokens and pairs of steps, over all ranks, as far as module or batches tell of them.

    Args:
        module: That is trained; if it counts tokens, what it says.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module if isinstance(module, CountsTokens) else None
        self._before = self._seen()
        self._open, self._closed = Counter[str](), Counter[str]()  # of this rank
        self._left_out = 0

    def _seen(self) -> int:
        return 0 if self._module is None else int(self._module.tokens_seen)

    def add(self, batch: Any) -> None:
        """A batch of the open window."""
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if isinstance(ids, torch.Tensor):
            is_paired = "completion_mask" in batch and "label" not in batch
            self._open.update(tokens=ids.numel(), pairs=len(ids) // 2 if is_paired else 0)

    def close(self) -> None:
        """The open window counts."""
        self._closed.update(self._open)
        self._open.clear()

    def leave_out(self) -> None:
        """It does not."""
        self._left_out += self._open["tokens"]
        self._open.clear()

    def total(self, trainer: Trainer) -> dict[str, float]:
        """What there was since the last time; collective."""
        ours = self._closed["tokens"], self._closed["pairs"]
        places, (self._closed, self._left_out) = ours[0] + self._left_out, (Counter(), 0)
        sent = torch.tensor(ours, device=trainer.strategy.root_device)
        tokens, pairs = trainer.strategy.reduce(sent, reduce_op="sum").tolist()
        if self._module is not None:
            before, self._before = self._before, self._seen()
            # What was left out is told by its share of the batches' places.
            tokens = max(0, self._before - before) * (ours[0] / places if places else 0.0)
        return {name: n for name, n in (("tokens", tokens), ("pairs", pairs)) if n}


class Work(NamedTuple):
    """What a step computes and moves on one rank, in numbers that can be sent.

    Attributes:
        model_flops: As of the report.
        total_flops: Likewise.
        all_flops: With those of what is no product.
        bytes: Likewise.
        peak_bytes: Likewise.
        sent_bytes: Likewise.
        rows: Of the table of modules.
    """

    model_flops: int
    total_flops: int
    all_flops: int
    bytes: int
    peak_bytes: int
    sent_bytes: int
    rows: list[Row]


def shares_batch(trainer: Trainer) -> bool:
    """Whether several ranks run one batch together, each a part of the model."""
    return replica(trainer)[0] < trainer.world_size


def works_of(trainer: Trainer, step: StepTime, top_k: int) -> list[Work]:
    """Of each rank that runs the batch of this one; collective where there are several.

    Args:
        trainer: Of the run.
        step: Of this rank, analysed.
        top_k: Rows of a table; 0 for none.
    """
    report = step.report
    all_flops = report.total_flops + report.pointwise_flops
    numbers = report.model_flops, report.total_flops, all_flops, report.bytes
    memory = report.peak_bytes, report.sent_bytes
    own = Work(*numbers, *memory, module_rows(step, top_k) if top_k else [])
    return of_every_rank(trainer, own) if shares_batch(trainer) else [own]


def one_table(works: list[Work]) -> list[Row]:
    """The modules of all ranks, each with its rank if there are several.

    Args:
        works: Of these ranks.
    """
    if len(works) == 1:
        return works[0].rows
    return [{"rank": rank, **row} for rank, work in enumerate(works) for row in work.rows]


def values_of(works: list[Work], step_s: float, peak_flops: float) -> dict[str, float]:
    """What is logged of a step.

    Args:
        works: Of the ranks that run it together.
        step_s: Seconds that one takes.
        peak_flops: FLOP/s of a device.
    """
    at_peak = step_s * peak_flops * len(works)
    total_flops, moved = sum(w.total_flops for w in works), sum(w.bytes for w in works)
    return {
        "step_s": step_s,
        "mfu": sum(work.model_flops for work in works) / at_peak,
        "hfu": total_flops / at_peak,
        "tflop": total_flops / 1e12,
        "intensity": sum(work.all_flops for work in works) / moved if moved else 0.0,
        "moved_gb": moved / 1e9,
        "peak_gb": max(work.peak_bytes for work in works) / 1e9,
        "sent_gb": sum(work.sent_bytes for work in works) / 1e9,
    }


def module_rows(step: StepTime, top_k: int) -> list[Row]:
    """The modules that take longest, for a table.

    Args:
        step: Analysed.
        top_k: How many.
    """
    ranked = sorted(step.modules.items(), key=lambda item: -item[1].seconds)[:top_k]
    rows, counted = [], step.report.costs(name for name, _ in ranked)
    for name, cost in ranked:
        found = counted[name]
        rows.append(
            {
                "module": name or "(all)",
                "gflop": found.flops / 1e9,
                "mb": found.bytes / 1e6,
                "mb_at_least": found.least_bytes / 1e6,
                "flop_per_byte": found.intensity,
                "saved_mb": found.saved_bytes / 1e6,
                "predicted_ms": 1e3 * cost.seconds,
                "share": cost.seconds / step.seconds if step.seconds else 0.0,
                "bound": cost.bound,
            }
        )
    return rows


def can_fuse(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a fused update that is not in use."""
    settings = [*optimizer.param_groups, optimizer.defaults]
    return all("fused" in each and not each["fused"] for each in settings)


def advice_of(trainer: Trainer, step: StepTime, setting: Setting) -> list[Advice]:
    """What would help; of stages that of the slowest one, which sets the pace. Collective there.

    Args:
        trainer: Of the run.
        step: Of this rank, analysed.
        setting: What else is known.
    """
    own = step.seconds, advise(step.report, step.hardware, setting)
    if not shares_batch(trainer):
        return own[1]
    slowest: tuple[float, list[Advice]] = max(of_every_rank(trainer, own), key=lambda one: one[0])
    return slowest[1]


def setting_of(trainer: Trainer, values: dict[str, float], micro_batches: int) -> Setting:
    """What advice has to know of a run.

    Args:
        trainer: Of the run.
        values: What was logged last.
        micro_batches: Of a step.
    """
    seconds = values.get("step_s", 0.0)
    shares = {k.removesuffix("_share"): v for k, v in values.items() if k.endswith("_share")}
    loader: Any = trainer.train_dataloader
    return Setting(
        measured={part: share * seconds for part, share in shares.items()},
        memory_bytes=memory_of(trainer.strategy.root_device),
        micro_batches=max(1, micro_batches),
        can_fuse=can_fuse(trainer.optimizers[0]),
        num_workers=getattr(loader, "num_workers", None),
        is_offloaded=isinstance(trainer.strategy, TellsWaits) and not shares_batch(trainer),
        shares_batch=shares_batch(trainer),
    )
