"""The simulator against torch's runtime: real processes whose stages sleep."""

from pathlib import Path

import pytest

from lightning_align.pipelining import Action, build_schedule, measured_costs, simulate
from tests.helpers.sleeping_pipeline import sleeping_steps, step_time

pytestmark = pytest.mark.alone

F, B = 0.02, 0.04


@pytest.mark.parametrize(("name", "v"), [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2)])
def test_a_real_run_has_the_simulated_order_and_time(name: str, v: int, tmp_path: Path) -> None:
    steps = sleeping_steps(name, 2, 4, v, forward_s=[F] * 2 * v, backward_s=[B] * 2 * v, steps=3)
    schedule = build_schedule(name, 2, 4, v)
    for events in steps:
        for rank in range(2):
            ran = [
                Action(e.stage_index, e.action, e.microbatch_index)
                for e in events
                if e.rank == rank
            ]
            assert ran == schedule.actions(rank)
    # Measured costs, because a sleep on a busy machine is longer than asked for. Between actions
    # torch's runtime takes time of its own, which the benchmark bounds and a busy machine does not.
    fastest = min(steps, key=step_time)
    simulated = simulate(schedule, **measured_costs(fastest))
    assert simulated.step_time * 0.95 < step_time(fastest) < simulated.step_time * 1.3
    simulated.to_png(tmp_path / "over.png", measured=fastest)
    assert (tmp_path / "over.png").stat().st_size > 10_000
