"""What RooflineMonitor asks of a run: whether it can be analysed, its machine, tokens, setting."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_align._compat.lightning_trainer import is_compiled_whole
from lightning_align._compat.torch_modules import is_compiled
from lightning_align._errors import argument_error
from lightning_align.planner.advice import Setting
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.machine_at_hand import by_sheet, machine_at_hand, memory_of
from lightning_align.planner.report import StepReport
from lightning_align.planner.spec_sheets import SPEC_SHEETS, check_dense, spec_sheet
from lightning_align.planner.step_time import StepTime
from lightning_align.reports.texts import Row
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import CountsTokens, TellsWaits, has_replicas

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
        name, sheet = spec_sheet(WHERE, hardware)
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
    if not has_replicas(strategy) and not isinstance(strategy, TellsWaits):
        rule = "its ranks hold parts of a model, and it does not tell how long they wait"
        way_out = "Train in one process, or with strategy='ddp' or 'zero_infinity'"
        raise argument_error(WHERE, "strategy", type(strategy).__name__, rule, way_out)
    if is_compiled_whole(module) or any(map(is_compiled, module.modules())):
        rank_zero_warn(
            f"{WHERE}: the module is compiled. Steps that are analysed run as they are written:"
            " they take longer, and round otherwise than compiled ones."
        )


def dtype_of(trainer: Trainer) -> torch.dtype:
    """Of the inputs of products, by the Trainer's precision."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def machine_of(trainer: Trainer, hardware: str | MachineBalance | None) -> MachineBalance:
    """The machine that a run is on, the same for all ranks; collective.

    Args:
        trainer: Of the run.
        hardware: What the user gave.
    """
    if isinstance(hardware, MachineBalance):
        return hardware
    dtype = dtype_of(trainer)
    if isinstance(hardware, str):
        return by_sheet(hardware, dtype)
    found = None
    if trainer.is_global_zero:
        rank_zero_info(f"{WHERE}: looking at the machine; hardware=... says what it is.")
        found = machine_at_hand(trainer.strategy.root_device, dtype)
    machine: MachineBalance = trainer.strategy.broadcast(found)
    return machine


class TokenCount:
    """Tokens of steps, over all ranks; nothing where neither module nor batches tell.

    Args:
        module: That is trained; if it counts tokens, what it says.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module if isinstance(module, CountsTokens) else None
        self._before = self._seen()
        self._open = self._closed = 0  # of this rank: of the open window, and before
        self._left_out = 0

    def _seen(self) -> int:
        return 0 if self._module is None else int(self._module.tokens_seen)

    def add(self, batch: Any) -> None:
        """A batch of the open window."""
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        self._open += ids.numel() if isinstance(ids, torch.Tensor) else 0

    def close(self) -> None:
        """The open window counts."""
        self._closed, self._open = self._closed + self._open, 0

    def leave_out(self) -> None:
        """It does not."""
        self._left_out, self._open = self._left_out + self._open, 0

    def total(self, trainer: Trainer) -> float | None:
        """Tokens since the last time; collective."""
        closed, left_out, self._closed, self._left_out = self._closed, self._left_out, 0, 0
        if self._module is not None:
            before, self._before = self._before, self._seen()
            # What was left out is told by its share of the batches' places.
            share = closed / (closed + left_out) if closed + left_out else 0.0
            return max(0, self._before - before) * share
        device = trainer.strategy.root_device
        counted = torch.tensor(float(closed), device=device)
        found = float(trainer.strategy.reduce(counted, reduce_op="sum"))
        return found or None


def values_of(report: StepReport, step_s: float, peak_flops: float) -> dict[str, float]:
    """What is logged of a step.

    Args:
        report: Of what it computes and moves, of this rank.
        step_s: Seconds that one takes.
        peak_flops: FLOP/s of a device.
    """
    return {
        "step_s": step_s,
        "mfu": report.model_flops / step_s / peak_flops,
        "hfu": report.total_flops / step_s / peak_flops,
        "tflop": report.total_flops / 1e12,
        "intensity": report.intensity,
        "moved_gb": report.bytes / 1e9,
        "peak_gb": report.peak_bytes / 1e9,
    }


def module_rows(step: StepTime, top_k: int) -> list[Row]:
    """The modules that take longest, for a table.

    Args:
        step: Analysed.
        top_k: How many.
    """
    ranked = sorted(step.modules.items(), key=lambda item: -item[1].seconds)[:top_k]
    rows = []
    for name, cost in ranked:
        found = step.report.modules[name]
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


def setting_of(trainer: Trainer, values: dict[str, float], micro_batches: int) -> Setting:
    """What advice has to know of a run.

    Args:
        trainer: Of the run.
        values: What was logged last.
        micro_batches: Of a step.
    """
    seconds = values.get("step_s", 0.0)
    shares = {k.removesuffix("_share"): v for k, v in values.items() if k.endswith("_share")}
    settings = [*trainer.optimizers[0].param_groups, trainer.optimizers[0].defaults]
    loader: Any = trainer.train_dataloader
    return Setting(
        measured={part: share * seconds for part, share in shares.items()},
        memory_bytes=memory_of(trainer.strategy.root_device),
        micro_batches=max(1, micro_batches),
        can_fuse=all("fused" in each and not each["fused"] for each in settings),
        num_workers=getattr(loader, "num_workers", None),
        is_offloaded=isinstance(trainer.strategy, TellsWaits),
    )
