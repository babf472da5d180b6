"""The timeline of a real step, and the benchmark that lays it over the simulated one."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_align.pipelining import Action, Event, build_schedule, measured_costs, simulate
from tests.helpers.pipelines import Run
from tests.helpers.ranks import run_ranks

RUN = Run("chain", steps=3, data={"masked": False})


def timelines(run: Run, record: bool = True) -> list[Any]:
    """What ``timeline()`` gives after the run, by rank."""

    def train(rank: int) -> Any:
        assert run.strategy is not None
        with replace(run, strategy={**run.strategy, "record_timeline": record}).setting(rank) as (
            trainer,
            _,
        ):
            module, loader = run.module(), run.loader()
            trainer.fit(module, loader, loader)  # the validation after the last step is not noted
            try:
                return trainer.strategy.timeline()
            except ValueError as error:
                return str(error)

    return run_ranks(train)


@pytest.mark.parametrize(
    ("schedule", "v"),
    [("1F1B", 1), pytest.param("Interleaved1F1B", 2, marks=pytest.mark.slow)],
)
def test_the_timeline_has_the_actions_of_the_schedule_on_every_rank(
    schedule: str, v: int, tmp_path: Path
) -> None:
    run = replace(RUN, strategy={"schedule": schedule, "num_microbatches": 4})
    first, second = timelines(run)
    assert first == second
    events: list[Event] = first
    planned = build_schedule(schedule, 2, 4, v)
    for rank in range(2):
        here = [event for event in events if event.rank == rank]
        ran = [Action(e.stage_index, e.action, e.microbatch_index) for e in here]
        assert ran == planned.actions(rank)
        assert all(event.start_s < event.end_s for event in here)
        assert all(one.end_s <= other.start_s for one, other in pairwise(here))
    done = {(e.action, e.stage_index, e.microbatch_index): e for e in events}
    for microbatch in range(4):  # the clocks of both processes are one
        assert done["F", 0, microbatch].end_s <= done["F", 1, microbatch].start_s
        assert done["B", 1, microbatch].end_s <= done["B", 0, microbatch].start_s

    result = simulate(planned, **measured_costs(events))
    result.to_png(tmp_path / "alone.png")
    result.to_png(tmp_path / "over.png", measured=events)
    alone, over = (Image.open(tmp_path / name).size for name in ("alone.png", "over.png"))
    assert over[1] > alone[1], "two lanes for each rank"
    result.to_chrome_trace(tmp_path / "over.json", measured=events)
    trace = json.loads((tmp_path / "over.json").read_text())["traceEvents"]
    assert len([event for event in trace if event["ph"] == "X"]) == 2 * len(events)


def test_the_loss_is_a_part_of_the_last_forward() -> None:
    """Or the simulated step would be shorter than the real one by all losses."""

    class Slow(Run):
        def module(self) -> Any:
            module = super().module()
            loss = module.loss

            def slow_loss(batch: Any) -> Any:
                time.sleep(0.02)
                return loss(batch)

            module.loss = slow_loss
            return module

    strategy = {"schedule": "1F1B", "num_microbatches": 2}
    events = timelines(Slow("chain", strategy, steps=1, data={"masked": False}))[0]
    seconds = {(e.action, e.stage_index): e.end_s - e.start_s for e in events}
    assert seconds["F", 1] >= 0.02


def test_without_recording_there_is_no_timeline() -> None:
    run = replace(RUN, strategy={"schedule": "GPipe", "num_microbatches": 2}, steps=1)
    for told in timelines(run, record=False):
        assert "timeline(record_timeline=False): nothing was recorded." in told


@pytest.mark.slow
@pytest.mark.parametrize("case", ["--small", "--picture"])
def test_the_benchmark_of_the_bubble_runs(case: str, tmp_path: Path) -> None:
    """Its times are not judged here."""
    root = Path(__file__).parents[3]
    options = [case] if case == "--small" else [case, str(tmp_path / "run.png")]
    run = subprocess.run(
        [sys.executable, str(root / "benchmarks/pipeline/bubble.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    if case == "--small":
        rows = [line.split() for line in run.stdout.splitlines()]
        # (p - 1) / m and (p - 1) / (m v) beside what was measured
        formulas = {
            row[0]: row[-4]
            for row in rows
            if row[:3] in (["1F1B", "2", "4"], ["Interleaved1F1B", "2", "4"])
        }
        assert formulas == {"1F1B": "0.250", "Interleaved1F1B": "0.125"}
    else:
        assert Image.open(tmp_path / "run.png").size[0] == 1800
        trace = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
        assert len([event for event in trace if event["ph"] == "X"]) == 2 * 4 * 2 * 2 * 8
