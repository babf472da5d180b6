"""What it costs to call an operation: Python, autograd and the dispatcher, from a small step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.curves import Curve, class_of, interpolated, work_of
from lightning_align.planner.module_scopes import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE
from lightning_align.planner.records import Record
from lightning_align.planner.report import StepReport

STEPS = 40  # of which the median counts
MOST_S, FEWEST = 3.0, 3  # seconds of all of them, on a processor that is slow; then fewer count


def small_llama() -> Any:
    """A Llama whose kernels are short, so that calling them is what a step takes."""
    from transformers import LlamaConfig, LlamaForCausalLM  # loads for a second

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config)


def small_step(
    device: torch.device, dtype: torch.dtype, *, use_cache: bool = True
) -> tuple[Any, Callable[[], Tensor]]:
    """A small model and its loss.

    It is transformers' Llama: what Python adds to an operation depends on whose modules call it,
    and theirs are what is trained. It is as large that its kernels drive Python's own code and data
    out of the inner caches, as those of any real step do: with nothing in between, calls cost half.

    Args:
        device: Where.
        dtype: Of its parameters.
        use_cache: Whether keys and values are kept, as is transformers' default.
    """
    model = small_llama().to(device, dtype)
    tokens = torch.arange(64, device=device)[None]

    def loss() -> Tensor:
        found: Tensor = model(tokens, use_cache=use_cache).logits.square().mean()
        return found

    return model, loss


def call_costs(
    curves: Mapping[str, Curve],
    softmax: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> dict[str | None, float]:
    """What a small step takes beyond its kernels, an operation of each phase."""
    model, loss = small_step(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def kernel(record: Record) -> float:
        return interpolated(curves[class_of(record)], work_of(record, softmax))

    parts: Sequence[Callable[[], None]] = _parts(loss, optimizer)
    report = analyze_step(model, loss, optimizer=optimizer)
    samples: list[list[float]] = []
    begin = clock()
    while len(samples) < STEPS and not (len(samples) >= FEWEST and clock() - begin > MOST_S):
        marks = [clock()]
        for part in parts:
            part()
            marks.append(clock())
        samples.append([later - earlier for earlier, later in pairwise(marks)])
    seconds = dict(
        zip((FORWARD, BACKWARD, OPTIMIZER), map(median, zip(*samples, strict=True)), strict=True)
    )
    overheads: dict[str | None, float] = {
        phase: _left(report, kernel, phase, total, waits=device.type == "cpu")
        for phase, total in seconds.items()
    }
    overheads[RECOMPUTE] = overheads[FORWARD]
    overheads[None] = sum(overheads[phase] for phase in seconds) / len(seconds)
    return overheads


def _parts(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Callable[[], None], ...]:
    kept: list[Tensor] = []

    def forward() -> None:
        kept.append(loss())

    def backward() -> None:
        kept.pop().backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return forward, backward, update


def _left(
    report: StepReport,
    kernel: Callable[[Record], float],
    phase: str,
    seconds: float,
    *,
    waits: bool,
) -> float:
    records = [record for record in report.trace.records if record.phase == phase]
    views = sum(n for (when, _), n in report.trace.views.items() if when == phase)
    return max(0.0, seconds - waits * sum(map(kernel, records))) / (len(records) + views)
