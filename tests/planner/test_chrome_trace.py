"""Operations one after the other, as a file that Perfetto reads."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_align.planner import MachineBalance, predict_step_time
from lightning_align.planner.chrome_trace import write_chrome_trace


def test_events_follow_each_other_and_last_as_long_as_the_step(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    hardware = MachineBalance("m", 1e6, 1e6, overheads={None: 1e-6})
    step = predict_step_time(model, lambda: model(torch.ones(2, 4)).square().mean(), hardware)
    write_chrome_trace(step, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ends = [event["ts"] + event["dur"] for event in events]
    assert [event["ts"] for event in events[1:]] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(1e6 * step.seconds)
    product = next(event for event in events if event["name"] == "addmm")
    assert product["args"]["flops"] == 2 * 2 * 4 * 3
    assert product["cat"] == "forward"
