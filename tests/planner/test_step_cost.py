"""Passes and pipelines: by hand, and against whole simulations."""

from dataclasses import replace

import pytest

from lightning_align.pipelining import simulate
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec
from lightning_align.planner.block_work import Pass, Piece
from lightning_align.planner.efficiencies import IDEAL, Efficiencies
from lightning_align.planner.step_cost import (
    PassTime,
    StageTimes,
    pass_time,
    pipeline_peaks,
    pipeline_s,
    stage_times,
)

# 100 FLOPs and 10 bytes a second
HARDWARE = HardwareSpec(100.0, 10.0, 1e9)
ONE = ParallelSpec()
MODEL = ModelSpec(8, 64, 4, vocab_size=100, seq_len=32)


@pytest.mark.parametrize(
    ("piece", "seconds", "bound"),
    [
        (Piece("product", flops=1000, bytes=10), 10, "compute"),
        (Piece("product", flops=1000, bytes=200), 20, "memory"),
    ],
)
def test_a_piece_takes_the_longer_of_arithmetic_and_bytes(
    piece: Piece, seconds: float, bound: str
) -> None:
    found = pass_time(Pass((piece,)), ONE, HARDWARE, IDEAL)
    assert found.seconds == pytest.approx(seconds)
    assert found.by_bound[bound] == pytest.approx(seconds)


def test_shallow_products_reach_less_of_the_peak() -> None:
    constants = replace(IDEAL, half_depth=64.0)
    work = Pass((Piece("scores", flops=1000, depth=64),))
    assert pass_time(work, ONE, HARDWARE, constants).seconds == pytest.approx(20)


@pytest.mark.parametrize(("overlap", "seconds"), [(1.0, 20 + 5), (2.0, 425**0.5), (32.0, 20)])
def test_host_and_device_overlap(overlap: float, seconds: float) -> None:
    """Five kernels of a second of the host each, and 20 seconds of arithmetic."""
    constants = replace(IDEAL, launch_s=1.0, overlap=overlap)
    work = Pass((Piece("products", flops=2000, kernels=5),))
    assert pass_time(work, ONE, HARDWARE, constants).seconds == pytest.approx(seconds)


def test_launches_are_what_a_tiny_layer_costs() -> None:
    """Without its overhead a layer that small would take next to nothing."""
    hardware, constants = HardwareSpec.from_name("a100-sxm-80gb"), Efficiencies()
    free = replace(constants, launch_s=1e-9, microbatch_s=1e-9, kernel_s=1e-9)
    bound, unbound = (
        stage_times(MODEL, ONE, hardware, each).forward[0] for each in (constants, free)
    )
    assert bound.seconds > 10 * unbound.seconds
    assert max(bound.by_bound, key=lambda name: bound.by_bound[name]) == "overhead"


def stages(forward: list[float], backward: list[float], message: float) -> StageTimes:
    made = [tuple(PassTime(each, {}) for each in costs) for costs in (forward, backward)]
    return StageTimes(made[0], made[1], message)


@pytest.mark.parametrize("microbatches", [1, 3, 6, 8, 24, 64, 203])
@pytest.mark.parametrize(("schedule", "chunks"), [("1F1B", 1), ("Interleaved1F1B", 2)])
def test_a_long_run_of_a_pipeline_is_that_of_the_whole_simulation(
    microbatches: int, schedule: str, chunks: int
) -> None:
    pp = 4
    if schedule != "1F1B" and microbatches % max(1, microbatches // pp):
        microbatches += pp - microbatches % pp
    spec = ParallelSpec(
        devices=pp,
        pipeline_parallel=pp,
        schedule=schedule,
        num_model_chunks=chunks,
        global_batch_size=microbatches,
    )
    forward = [1.0 + 0.1 * (stage == 0) for stage in range(pp * chunks)]
    backward = [2.0 + 0.7 * (stage == pp * chunks - 1) for stage in range(pp * chunks)]
    ours = pipeline_s(stages(forward, backward, 0.01), spec)
    theirs = simulate(
        schedule,
        pp,
        microbatches,
        chunks,
        forward_cost=forward,
        backward_cost=backward,
        comm_latency=0.01,
    )
    assert ours == pytest.approx(theirs.step_time, rel=2e-3)


def test_long_pipelines_are_rounded_and_scaled() -> None:
    spec = ParallelSpec(devices=16, pipeline_parallel=16, global_batch_size=40)
    forward, backward = [0.0123] * 16, [0.0246] * 15 + [0.03]
    ours = pipeline_s(stages(forward, backward, 1e-5), spec)
    theirs = simulate("1F1B", 16, 40, forward_cost=forward, backward_cost=backward)
    assert ours == pytest.approx(theirs.step_time, rel=2e-3)


def test_one_f_one_b_holds_as_many_microbatches_as_ranks_follow() -> None:
    peaks = pipeline_peaks(("1F1B", 4, 8, 1), (1000.0,) * 4, (0.0,) * 4)
    assert [held for held, _ in peaks] == [4000, 3000, 2000, 1000]


def test_gradients_are_there_from_the_first_backward_on() -> None:
    """With more micro-batches than are in flight, while as many are held; without, not all."""
    made, saved = (70.0, 80.0), (10.0, 10.0)
    assert pipeline_peaks(("1F1B", 2, 4, 1), saved, made) == ((20, 70), (10, 80))
    # Four forwards, then backwards: at the second there is one less.
    assert pipeline_peaks(("GPipe", 2, 4, 1), saved, made) == ((30, 70), (30, 80))
    assert pipeline_peaks(("GPipe", 2, 4, 1), saved, (5.0, 0.0)) == ((40, 0), (40, 0))


def test_a_reference_runs_forward_and_frozen_blocks_need_less() -> None:
    hardware, constants = HardwareSpec.from_name("a100-sxm-80gb"), Efficiencies()

    def both(**given: object) -> tuple[float, float]:
        found = stage_times(MODEL, ParallelSpec(**given), hardware, constants)  # type: ignore[arg-type]
        return found.forward[0].seconds, found.backward[0].seconds

    plain, beside = both(objective="dpo", reference="precomputed"), both(objective="dpo")
    assert beside[0] == pytest.approx(2 * plain[0], rel=0.2)
    assert beside[1] == plain[1]
    whole, few = both(), both(lisa_layers=2)
    assert few[0] == whole[0]
    assert few[1] < whole[1]
