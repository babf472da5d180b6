"""What a run moves, and what that costs: told at set-up, shown while blocks are written, logged."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_align._compat import lightning_logged
from lightning_align.offload.bandwidth import (
    Bandwidth,
    BlockBytes,
    StepLayout,
    efficiency,
    hiding_tokens,
    step_bytes,
    total,
    transfer_s,
)
from lightning_align.offload.engine import OffloadEngine
from lightning_align.strategies.zero_infinity.blocks import WHERE

BAR_DELAY_S = 2.0  # what takes less needs no progress bar
_FLOPS = 1e11  # a round number to tell tokens for


class Mark(NamedTuple):
    """What had happened by a moment of a run."""

    steps: float
    seconds: float
    read: float
    written: float
    stalled_s: float
    moving_s: float


def rates(before: Mark, after: Mark) -> dict[str, float]:
    """What is logged of the time between two moments.

    Efficiency is the share of the time in which the run did not wait for transfers; that without
    overlap is what arXiv:2104.07857, section 4, leaves with the same compute, bytes and drive.
    """
    spent = Mark(*(late - early for early, late in zip(before, after, strict=True)))
    moved, computed_s = spent.read + spent.written, spent.seconds - spent.stalled_s
    found = {
        "read_gb_per_step": spent.read / spent.steps / 1e9,
        "written_gb_per_step": spent.written / spent.steps / 1e9,
        "read_gb_per_s": spent.read / spent.seconds / 1e9,
        "written_gb_per_s": spent.written / spent.seconds / 1e9,
        "stall_share": spent.stalled_s / spent.seconds,
        "efficiency": computed_s / spent.seconds,
    }
    if moved and spent.moving_s:
        bandwidth = moved / spent.moving_s
        found["drive_gb_per_s"] = bandwidth / 1e9
        found["efficiency_without_overlap"] = efficiency(computed_s / moved, bandwidth, 1.0)
    return found


class LogTraffic(pl.Callback):
    """Logs what ``ZeROInfinityStrategy`` moves, of rank 0; the strategy brings it."""

    _mark: Mark | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = _mark(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        before, step = self._mark, trainer.global_step
        if before is not None and step < before.steps:  # the run has gone back
            self._mark = before = _mark(trainer)
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if before is None or step == before.steps or not interval or step % interval:
            return
        self._mark = _mark(trainer)
        strategy: Any = trainer.strategy
        found = {**rates(before, self._mark), "resident_gb": _held(strategy) / 1e9}
        metrics = {f"zero_infinity/{name}": value for name, value in found.items()}
        for logger in trainer.loggers:  # not self.log: times are no part of a run that is resumed
            logger.log_metrics(metrics, step=lightning_logged.lightnings_line(trainer))


def _held(strategy: Any) -> int:
    """Bytes of buffers, and of what lies in host memory: values, and states of the optimizer."""
    engine, states = strategy._engine, strategy.optimizers[0].state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    held: int = engine.pool.allocated_bytes + engine.store.host_nbytes
    return held + sum(tensor.nbytes for tensor in tensors)


def _mark(trainer: pl.Trainer) -> Mark:
    strategy: Any = trainer.strategy
    traffic = strategy._engine.threads.traffic
    now = time.perf_counter()
    moved = (traffic.read, traffic.written, traffic.stalled_s, traffic.moving_s)
    return Mark(trainer.global_step, now, *moved)


def layout_of(engine: OffloadEngine, batches: int, *, gradients_wait: bool) -> StepLayout:
    """What a step will be made of, as far as it shows before the first one.

    Args:
        engine: With its optimizer.
        batches: Of a step.
        gradients_wait: Whether blocks are updated after the last backward.
    """
    stored = engine.gradients.is_stored
    blocks = [
        BlockBytes(
            block.nbytes,
            0 if block.states_stay else engine.updates.state_bytes[block.name],
            block.nbytes if stored and not block.gradients_stay else 0,
            trains=bool(block.trainable),
            stays=block.kept,
            is_stored=block.is_stored,
        )
        for block in sorted(engine.blocks, key=lambda block: not block.kept)
    ]
    alone = engine.store.ranks.size == 1
    return StepLayout(blocks, engine.residents.count, batches, gradients_wait, alone)


def tell(engine: OffloadEngine, layout: StepLayout, bandwidth: float | None = None) -> None:
    """Tell what is stored, what a step will move, and how long that takes.

    Args:
        engine: With its optimizer.
        layout: What a step is made of.
        bandwidth: Bytes a second of the drive, if that was measured.
    """
    blocks = engine.blocks
    moving = [block for block in blocks if not block.kept]
    count = sum(p.numel() for block in blocks for p in block.parameters.values())
    largest = max((block.nbytes for block in moving), default=0)
    kept = sum(block.nbytes for block in blocks if block.kept)
    moved = total(step_bytes(layout))
    states = sum(engine.updates.state_bytes.values())
    lines = [
        f"{count:,} parameters: {len(moving)} blocks of up to {largest / 1e6:,.1f} MB, of which"
        f" {layout.resident} are in memory at a time, and {kept / 1e6:,.1f} MB that stay there.",
        f"A step reads {moved.read / 1e9:.3g} GB and writes {moved.written / 1e9:.3g} GB,"
        f" {(moved.read + moved.written) / count:.1f} bytes a parameter"
        + ("; its gradients wait for their update." if layout.gradients_wait else ".")
        + ("" if states else " The optimizer's state comes on top: its size is not known yet."),
    ]
    if bandwidth is not None:
        drive = Bandwidth(bandwidth, bandwidth)
        tokens = hiding_tokens(layout, count, drive, _FLOPS)
        lines.append(
            f"At {bandwidth / 1e9:.2f} GB/s that takes {transfer_s(moved, drive):.2g} s; for each"
            f" {_FLOPS / 1e9:.0f} GFLOP/s of compute {tokens:.0f} tokens a step hide it."
        )
    for line in lines:
        rank_zero_info(f"{WHERE}: {line}")


def writing_bar(trainer: pl.Trainer, nbytes: int) -> Any:
    """A progress bar for bytes that are written at set-up, where the Trainer shows any."""
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    what = "Writing blocks"
    return tqdm(
        desc=what, total=nbytes, unit="B", unit_scale=True, delay=BAR_DELAY_S, disable=not shown
    )
