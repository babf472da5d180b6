"""What recomputing costs beyond the operations: Python of ``torch.utils.checkpoint``.

It keeps and restores generators for each region, and is called by autograd for each tensor that
would have been saved there, in forward, in recomputation and in backward. Both costs follow from a
small step in which the same operations are recomputed in few regions and in many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.call_costs import small_step
from lightning_align.planner.module_scopes import RECOMPUTE
from lightning_align.planner.report import StepReport

STEPS = 25  # of each, in turns; the median counts


def checkpoint_costs(
    recomputed: Callable[[StepReport], float],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Seconds of a region that is recomputed, and of a tensor that would have been saved in it.

    Args:
        recomputed: Seconds of the operations that a step computes again, views included.
        device: Where.
        dtype: Of the small step's parameters.
        clock: Seconds.
    """
    model, loss = small_step(device, dtype, use_cache=False)  # which recomputation would fill twice
    blocks: list[nn.Module] = list(model.model.layers)
    parts = [part for block in blocks for part in block.children()]
    choices: tuple[Sequence[nn.Module], ...] = ((), blocks, parts)
    reports = []
    for regions in choices:
        with _checkpointed(regions):
            reports.append(analyze_step(model, loss))
    samples: list[list[float]] = [[] for _ in choices]
    for _ in range(STEPS):
        for regions, found in zip(choices, samples, strict=True):
            with _checkpointed(regions):
                model.zero_grad()
                start = clock()
                loss().backward()  # type: ignore[no-untyped-call]
                found.append(clock() - start)
    kept, *again = map(median, samples)
    rest = [s - kept - recomputed(r) for s, r in zip(again, reports[1:], strict=True)]
    return _solved(_counts(reports[1]), rest[0], _counts(reports[2]), rest[1])


def _solved(
    few: tuple[int, int], few_s: float, many: tuple[int, int], many_s: float
) -> tuple[float, float]:
    """Seconds of a region and of a tensor, from two sums of as many regions and tensors."""
    det = few[0] * many[1] - many[0] * few[1]
    region = (few_s * many[1] - many_s * few[1]) / det
    tensor = (few[0] * many_s - many[0] * few_s) / det
    if region >= 0 and tensor >= 0:
        return region, tensor
    # By what a clock can tell, one of them is nothing.
    return (max(0.0, few_s / few[0]), 0.0) if tensor < 0 else (0.0, max(0.0, few_s / few[1]))


def recomputed_seconds(report: StepReport, kernel: Callable[[Any], float], call_s: float) -> float:
    """Seconds of what a step computes again, without Python of its checkpoints.

    Args:
        report: Of the step.
        kernel: Seconds of an operation by itself.
        call_s: Seconds to call one.
    """
    records = [record for record in report.trace.records if record.phase == RECOMPUTE]
    views = sum(n for (phase, _), n in report.trace.views.items() if phase == RECOMPUTE)
    return sum(map(kernel, records)) + (len(records) + views) * call_s


def _counts(report: StepReport) -> tuple[int, int]:
    """Regions, and tensors that were not saved in them."""
    found = report.trace.checkpoints
    return len(found), sum(each.saved for each in found)


@contextmanager
def _checkpointed(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        vars(module)["forward"] = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]
