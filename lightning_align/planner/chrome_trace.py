"""The operations of a step as a Chrome trace, for ui.perfetto.dev: one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_align.planner.step_time import StepTime


def trace_events(step: StepTime) -> list[dict[str, Any]]:
    """Events in Chrome's format; times are predicted, in microseconds.

    Views come last: when they are made is not written down.

    Args:
        step: With its operations.
    """
    records = step.report.trace.records
    events, now = [], 0.0
    for number, op in enumerate(step.op_times):
        record = records[number] if number < len(records) else None
        known: dict[str, Any] = {"module": op.scope[-1] if op.scope else "", "bound": op.bound}
        if record is not None:
            known |= {"flops": record.flops, "bytes": record.bytes}
        events.append(
            {
                "name": op.name.removeprefix("aten."),
                "cat": op.phase,
                "ph": "X",
                "ts": 1e6 * now,
                "dur": 1e6 * op.seconds,
                "pid": "step, predicted",
                "tid": "operations",
                "args": known,
            }
        )
        now += op.seconds
    return events


def write_chrome_trace(step: StepTime, path: str | Path) -> None:
    """Write them to a file.

    Args:
        step: With its operations.
        path: A JSON file.

    Raises:
        OSError: If it cannot be written.
    """
    Path(path).write_text(json.dumps({"traceEvents": trace_events(step)}), encoding="utf-8")
