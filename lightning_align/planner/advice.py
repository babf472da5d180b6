"""Advice on a step, in words and with its predicted gain: functions of what was counted of it.

Each function changes the operations of the step as its advice would, and predicts the time of both
on the same machine; a gain is a ratio of two predictions, in which what both leave out cancels.
What is about waiting takes measured seconds instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.module_scopes import BACKWARD, OPTIMIZER, RECOMPUTE
from lightning_align.planner.op_flops import MESSAGE
from lightning_align.planner.records import Record, Region
from lightning_align.planner.report import StepReport
from lightning_align.planner.step_time import OVERHEAD, time_of

# Of what is measured; the rest are phases.
DATA, WAITING, COMMIT, OTHER = "data", "waiting", "commit", "other"
COMMUNICATION = "communication"  # and of a sharded model, on a processor
LEAST_GAIN = 0.01  # below which advice is noise
HALF = "bfloat16"
_SOFTMAX = ("_log_softmax", "nll_loss")  # of which an unfused cross-entropy consists


@dataclass(frozen=True)
class Advice:
    """Something to change.

    Attributes:
        name: Of what would change.
        text: What to do, and what it costs.
        gain: By which fraction more steps a second are predicted; of a larger batch, more rows.
    """

    name: str
    text: str
    gain: float

    def __str__(self) -> str:
        return f"{self.text} ({self.gain:+.1%})"


@dataclass(frozen=True)
class Setting:
    """What advice has to know beside the step.

    Attributes:
        measured: Seconds of a step, by what they went to; empty where nothing was measured.
        memory_bytes: Of the device; None if unknown, which is taken for enough.
        micro_batches: Of a step.
        can_fuse: Whether the optimizer has a fused update that is not in use.
        num_workers: Processes that load data; None if that is not known.
        is_offloaded: Whether the strategy brings values from another tier.
        shares_batch: Whether other ranks have other stages of the model, which see it in parts.
    """

    measured: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: float | None = None
    micro_batches: int = 1
    can_fuse: bool = False
    num_workers: int | None = None
    is_offloaded: bool = False
    shares_batch: bool = False


def advise(report: StepReport, hardware: MachineBalance, setting: Setting) -> list[Advice]:
    """Everything that is predicted to help, the most first.

    Args:
        report: Of a step.
        hardware: What it runs on.
        setting: What else is known.
    """
    ways: tuple[Callable[[StepReport, MachineBalance, Setting], Advice | None], ...] = (
        larger_micro_batch,
        no_recomputation,
        fused_optimizer,
        chunked_loss,
        half_precision,
        more_workers,
        nearer_tier,
    )
    found = [way(report, hardware, setting) for way in ways]
    worth = [each for each in found if each is not None and each.gain >= LEAST_GAIN]
    return sorted(worth, key=lambda each: -each.gain)


def larger_micro_batch(
    report: StepReport, hardware: MachineBalance, setting: Setting
) -> Advice | None:
    """Twice the rows at a time: each operation does more for one call, and weights move once.

    Args:
        report: Of a step.
        hardware: What it runs on.
        setting: Micro-batches and memory.
    """
    needed = report.peak_bytes + report.saved_bytes
    lacks = setting.memory_bytes is not None and needed > setting.memory_bytes
    if lacks or setting.shares_batch:  # whose schedule decides
        return None
    there = report.trace.storages.there
    records = report.trace.records
    of_batch = [record for record in records if record.phase != OPTIMIZER]
    twice = _seconds((_doubled(record, there) for record in of_batch), hardware)
    twice += _views(report, hardware, lambda phase: phase != OPTIMIZER)
    twice += _checkpoints(report, hardware)
    update = _seconds((record for record in records if record.phase == OPTIMIZER), hardware)
    update += _views(report, hardware, lambda phase: phase == OPTIMIZER)
    now = _total(report, hardware)
    calls = _of_loops(hardware, setting, now)
    if setting.micro_batches > 1:
        text = "Double the micro-batch and halve accumulate_grad_batches: the same step, in fewer"
        then = twice / 2 + update + calls / 2
        gain = _with_messages(_gain(now + calls, then), setting)
        return Advice("larger micro-batch", f"{text} calls", gain)
    text = "Double the batch size; the optimizer then takes half as many steps, of other gradients"
    gain = _with_messages(_gain(2 * (now + calls), twice + update + calls), setting)
    return Advice("larger micro-batch", text, gain)


def no_recomputation(
    report: StepReport, hardware: MachineBalance, setting: Setting
) -> Advice | None:
    """Keeping what is computed again, where memory has room for it.

    Args:
        report: Of a step.
        hardware: What it runs on.
        setting: Memory.
    """
    again = [record for record in report.trace.records if record.phase == RECOMPUTE]
    kept = sum(region.bytes for record in again for region in record.writes)
    kept //= setting.micro_batches
    lacks = setting.memory_bytes is not None and report.peak_bytes + kept > setting.memory_bytes
    if not again or lacks:
        return None
    saved = _seconds(again, hardware) + _views(report, hardware, lambda phase: phase == RECOMPUTE)
    saved += _checkpoints(report, hardware)
    now = _total(report, hardware)
    text = f"Leave out activation checkpointing, for at most {kept / 1e9:.2g} GB of memory more"
    return Advice("no recomputation", text, _gain(now, now - saved))


def fused_optimizer(
    report: StepReport, hardware: MachineBalance, setting: Setting
) -> Advice | None:
    """An update that reads and writes everything once.

    Args:
        report: Of a step.
        hardware: What it runs on.
        setting: Whether the optimizer has one.
    """
    records = report.trace.records
    numbers = [n for n, record in enumerate(records) if record.phase == OPTIMIZER]
    # Clipping and its norm come before the update, and stay.
    norms = [place for place, n in enumerate(numbers) if records[n].name.endswith("_norm")]
    numbers = numbers[norms[-1] + 1 :] if norms else numbers
    if not setting.can_fuse or not numbers:
        return None
    now = _total(report, hardware)
    update = _seconds((records[n] for n in numbers), hardware)
    # It writes where it reads, so that no memory is made, which curves of operations include.
    fused = hardware.overhead(OPTIMIZER) + report.least_bytes_of(numbers) / hardware.mem_bandwidth
    gain = _gain(now, now - update + fused)
    return Advice("fused optimizer", "Give the optimizer fused=True", gain)


def chunked_loss(report: StepReport, hardware: MachineBalance, setting: Setting) -> Advice | None:
    """Logits a few rows at a time, which then stay in the caches, in memory that is kept.

    Args:
        report: Of a step.
        hardware: What it runs on; its cache bandwidth says what is gained, and what memory costs
            that is new each time.
        setting: Unused: every step may do so.
    """
    del setting
    cache = hardware.cache_bandwidth
    records = [r for r in report.trace.records if any(name in r.name for name in _SOFTMAX)]
    if not records or cache is None or cache <= hardware.mem_bandwidth:
        return None
    bound = [record for record in records if time_of(record, hardware).bound != OVERHEAD]
    faster = sum(hardware.kernel_seconds(record) for record in bound)
    faster *= 1 - hardware.mem_bandwidth / cache
    regions = [region for record in records for region in (*record.reads, *record.writes)]
    whole = {region.storage for region in regions}
    makes = [r for r in report.trace.records if whole.intersection(w.storage for w in r.writes)]
    faster += sum(map(hardware.fresh_seconds, makes))
    logits = max(region.bytes for region in regions)
    now = _total(report, hardware)
    text = f"Compute the loss in chunks, as PretrainModule does: {logits / 1e6:.3g} MB of logits"
    return Advice("chunked loss", f"{text} are then never whole", _gain(now, now - faster))


def half_precision(report: StepReport, hardware: MachineBalance, setting: Setting) -> Advice | None:
    """Products in bf16, where the machine has units for them.

    Args:
        report: Of a step.
        hardware: What it runs on; its peaks by dtype say what is gained.
        setting: Unused: every step may do so.
    """
    del setting
    half = hardware.peaks.get(HALF, 0.0)
    if half <= hardware.peak_flops:
        return None
    saved = 0.0
    for record in report.trace.records:
        timed = time_of(record, hardware)
        is_full = str(record.dtype) == "torch.float32" and record.flops
        if is_full and timed.bound != OVERHEAD:
            at_peak = record.flops * (1 / hardware.peak_flops - 1 / half)
            fewer = record.bytes / 2 / hardware.mem_bandwidth
            kernel = hardware.kernel_seconds(record)
            saved += min(max(at_peak, fewer), kernel * (1 - hardware.peak_flops / half))
    now = _total(report, hardware)
    return Advice("bf16", "Set precision to bf16-mixed", _gain(now, now - saved))


def more_workers(report: StepReport, hardware: MachineBalance, setting: Setting) -> Advice | None:
    """Loading data while the step runs.

    Args:
        report: Unused.
        hardware: Unused.
        setting: Measured seconds, and how many workers there are.
    """
    del report, hardware
    total, data = sum(setting.measured.values()), setting.measured.get(DATA, 0.0)
    if not data or setting.num_workers is None:
        return None
    now = "there are none" if not setting.num_workers else f"there are {setting.num_workers}"
    text = f"Load data in more workers (num_workers; {now})"
    return Advice("more workers", text, _gain(total, total - data))


def nearer_tier(report: StepReport, hardware: MachineBalance, setting: Setting) -> Advice | None:
    """Values that are waited for, kept where they need not be, and steps with them.

    Without a drive there is nothing to commit, and what commits compute goes with the waits.

    Args:
        report: Unused.
        hardware: Unused.
        setting: Measured seconds, and whether values come from another tier.
    """
    del report, hardware
    total, waiting = sum(setting.measured.values()), setting.measured.get(WAITING, 0.0)
    if not setting.is_offloaded or not waiting:
        return None
    away = waiting + setting.measured.get(COMMIT, 0.0)
    text = "Keep more in host memory (offload_fraction), or give a step more tokens: it waits"
    return Advice("another tier", f"{text} for the drive", _gain(total, total - away))


def _gain(now: float, then: float) -> float:
    return now / then - 1 if then > 0 else 0.0


def _with_messages(gain: float, setting: Setting) -> float:
    """The gain of twice the rows where a model is gathered, and its gradients summed, once for all.

    What these take is measured, and so are the seconds that the gain of all else is of.
    """
    total = sum(setting.measured.values())
    messages = setting.measured.get(COMMUNICATION, 0.0)
    return _gain(total, (total - messages) / (1 + gain) + messages / 2) if messages else gain


def _seconds(records: Iterable[Record], hardware: MachineBalance) -> float:
    return sum(time_of(record, hardware).seconds for record in records)


def _views(report: StepReport, hardware: MachineBalance, chosen: Callable[[str], bool]) -> float:
    """Seconds of making views, whose calls alone cost; nothing where a device does not wait."""
    if hardware.is_asynchronous:
        return 0.0
    counted = report.trace.views.items()
    return sum(n * hardware.overhead(phase) for (phase, _), n in counted if chosen(phase))


def _checkpoints(report: StepReport, hardware: MachineBalance) -> float:
    return sum(map(hardware.checkpoint_seconds, report.trace.checkpoints))


def _of_loops(hardware: MachineBalance, setting: Setting, predicted: float) -> float:
    """Seconds of a step that no operation takes: loops, hooks, logs; as many for twice the rows.

    Known only of a processor that was measured: a sheet's peak is what no operation reaches. More
    than is predicted for all operations is no loop, but something else that the machine does.
    """
    if not hardware.curves or hardware.is_asynchronous:
        return 0.0
    outside = (DATA, WAITING, COMMIT, COMMUNICATION, OTHER)
    computed = sum(s for part, s in setting.measured.items() if part not in outside)
    left = computed - predicted
    return left if 0 < left < predicted else 0.0


def _total(report: StepReport, hardware: MachineBalance) -> float:
    calls = _views(report, hardware, lambda _: True) + _checkpoints(report, hardware)
    return _seconds(report.trace.records, hardware) + calls


def _doubled(record: Record, there: set[int]) -> Record:
    """The operation on twice as many rows; weights and their gradients are as large as before."""

    def grows(region: Region) -> bool:
        return region.storage not in there

    if record.kind == MESSAGE or record.name.startswith("fsdp."):
        return record
    if record.phase == BACKWARD and record.writes and not any(map(grows, record.writes)):
        return record  # adds to gradients that were there
    regions = (*record.reads, *record.writes)
    fixed = sum(region.bytes for region in regions if not grows(region))
    return record._replace(
        flops=2 * record.flops,
        pointwise_flops=2 * record.pointwise_flops,
        bytes=2 * record.bytes - min(fixed, record.bytes),
        made=tuple(2 * nbytes for nbytes in record.made),
    )
