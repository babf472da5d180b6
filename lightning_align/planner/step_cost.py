"""Seconds of forward and backward, and of a pipeline of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lightning_align.pipelining import partition, simulate
from lightning_align.pipelining.actions import F, I, Schedule
from lightning_align.pipelining.schedule import build_schedule
from lightning_align.planner.block_work import (
    Pass,
    block_passes,
    first_passes,
    frozen,
    last_passes,
)
from lightning_align.planner.collectives import Group, all_reduce_s, bandwidth
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.fresh_memory import fresh_seconds
from lightning_align.planner.hardware_spec import HardwareSpec
from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec

COMPUTE, MEMORY, OVERHEAD, MESSAGES = "compute", "memory", "overhead", "messages"
SETTLED = 3  # rounds of a pipeline after which each further micro-batch costs the same
ROUNDED, LONG = 1e-3, 8  # pipelines of more ranks that differ by less are simulated once


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass.

    Attributes:
        seconds: In all.
        by_bound: Seconds by what they go into: compute, memory, overhead or messages.
    """

    seconds: float
    by_bound: Mapping[str, float]

    def plus(self, other: PassTime, times: float = 1.0) -> PassTime:
        """This and several of another."""
        names = {*self.by_bound, *other.by_bound}
        sums = {
            name: self.by_bound.get(name, 0.0) + times * other.by_bound.get(name, 0.0)
            for name in names
        }
        return PassTime(self.seconds + times * other.seconds, sums)


NOTHING = PassTime(0.0, {})


def pass_time(
    work: Pass, parallel: ParallelSpec, hardware: HardwareSpec, constants: Efficiencies
) -> PassTime:
    """Seconds of a pass on one rank.

    Args:
        work: Its pieces.
        parallel: How it is split.
        hardware: On what.
        constants: What is reached of its sheet.
    """
    peak = hardware.product_flops(parallel.is_half) * constants.matmul
    stream = hardware.mem_bandwidth * constants.memory
    compute = memory = 0.0
    kernels = work.collectives
    for piece in work.pieces:
        share = piece.depth / (piece.depth + constants.half_depth)
        product_s = piece.flops / (peak * share * piece.share)
        bytes_s = piece.bytes / (stream * piece.share)
        if product_s >= bytes_s:
            compute += product_s
        else:
            memory += bytes_s
        kernels += piece.kernels
    group = Group(parallel.tensor_parallel)
    messages = work.collectives * all_reduce_s(work.message, group, hardware, constants)
    gaps = kernels * constants.kernel_s
    device = compute + memory + gaps + messages
    host = kernels * constants.launch_s + work.collectives * constants.collective_s
    power = constants.overlap
    seconds = device * (1 + (host / device) ** power) ** (1 / power) if device else host
    waits = seconds - device
    parts = {COMPUTE: compute, MEMORY: memory, OVERHEAD: gaps + waits, MESSAGES: messages}
    return PassTime(seconds, parts)


def _with_reference(
    passes: list[tuple[PassTime, ...]], parallel: ParallelSpec
) -> list[tuple[PassTime, ...]]:
    """A reference model runs forward beside the policy."""
    if not parallel.has_reference:
        return passes
    return [(forward.plus(forward), backward) for forward, backward in passes]


@lru_cache(maxsize=2048)
def all_passes(model: ModelSpec, parallel: ParallelSpec) -> tuple[tuple[Pass, Pass], ...]:
    """Forward and backward of a block, of what is before all of them and of what is after."""
    return (
        block_passes(model, parallel),
        first_passes(model, parallel),
        last_passes(model, parallel),
    )


@lru_cache(maxsize=256)
def layers_of_stages(num_layers: int, num_stages: int) -> list[tuple[int, int]]:
    """First and last layer of each stage, as even as can be."""
    return partition([1.0] * num_layers, num_stages, "uniform", where="Planner.predict")


@dataclass(frozen=True)
class StageTimes:
    """Forward and backward of one micro-batch in each stage.

    Attributes:
        forward: Of each stage.
        backward: Of each stage.
        message_s: From one stage to the next.
    """

    forward: tuple[PassTime, ...]
    backward: tuple[PassTime, ...]
    message_s: float


def stage_times(
    model: ModelSpec, parallel: ParallelSpec, hardware: HardwareSpec, constants: Efficiencies
) -> StageTimes:
    """Forward and backward of one micro-batch in each stage of the pipeline."""
    passes = [
        tuple(pass_time(each, parallel, hardware, constants) for each in both)
        for both in all_passes(model, parallel)
    ]
    blocks, first, last = _with_reference(passes, parallel)
    if parallel.lisa_layers is not None:
        backward = frozen(block_passes(model, parallel)[1])
        still = pass_time(backward, parallel, hardware, constants)
        share = parallel.lisa_layers / model.num_layers
        blocks = (blocks[0], NOTHING.plus(still, 1 - share).plus(blocks[1], share))
    alike = layers_of_stages(model.num_layers, parallel.stages)
    own = PassTime(constants.microbatch_s / 2, {OVERHEAD: constants.microbatch_s / 2})
    fresh = fresh_seconds(model, parallel, hardware)
    found = []
    for direction in (0, 1):
        times = [own.plus(blocks[direction], end - begin) for begin, end in alike]
        touched = PassTime(fresh[direction], {MEMORY: fresh[direction]})
        times[0] = times[0].plus(first[direction]).plus(touched)
        times[-1] = times[-1].plus(last[direction])
        found.append(tuple(times))
    message = 0.0
    if parallel.pipeline_parallel > 1:
        tokens = parallel.rows * model.seq_len / parallel.tensor_parallel
        group = Group(2, parallel.tensor_parallel * parallel.replicas)
        nbytes = tokens * model.hidden_size * parallel.element_bytes
        link = bandwidth(group, hardware) * constants.link
        message = nbytes / link + constants.latency_s
    return StageTimes(found[0], found[1], message)


@lru_cache(maxsize=256)
def built_schedule(name: str, pp: int, num_microbatches: int, chunks: int) -> Schedule:
    """The schedule, built once."""
    return build_schedule(name, pp, num_microbatches, chunks, where="Planner.predict")


def simulated_microbatches(parallel: ParallelSpec) -> int:
    """Micro-batches of the rounds in which a pipeline fills, empties, and is the same after.

    After them the busiest rank is never idle, and each further one costs what it computes.
    """
    many, few = parallel.num_microbatches, SETTLED * parallel.pipeline_parallel
    settles = {"1F1B": True, "Interleaved1F1B": many % parallel.pipeline_parallel == 0}
    return min(many, few) if settles.get(parallel.schedule, False) else many


def pipeline_s(times: StageTimes, parallel: ParallelSpec) -> float:
    """Seconds of all micro-batches in the pipeline.

    Args:
        times: Of the stages.
        parallel: How many micro-batches, in which order.
    """
    forward = [each.seconds for each in times.forward]
    backward = [each.seconds for each in times.backward]
    pp, many = parallel.pipeline_parallel, parallel.num_microbatches
    if pp == 1:
        return many * (forward[0] + backward[0])
    few = simulated_microbatches(parallel)
    order = (parallel.schedule, pp, few, parallel.chunks)
    unit = max(*forward, *backward) * ROUNDED
    if pp <= LONG:
        whole, busiest = simulated(order, tuple(forward), tuple(backward), times.message_s)
        return whole + (many - few) * busiest / few
    rounded = [tuple(float(round(cost / unit)) for cost in costs) for costs in (forward, backward)]
    whole, busiest = simulated(order, *rounded, float(round(times.message_s / unit)))
    return unit * (whole + (many - few) * busiest / few)


@lru_cache(maxsize=4096)
def simulated(
    order: tuple[str, int, int, int],
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    message: float,
) -> tuple[float, float]:
    """Time of a pipeline and of its busiest rank, in the unit of the costs.

    Args:
        order: Name, ranks, micro-batches and stages on each rank of the schedule.
        forward: Cost of each stage.
        backward: Cost of each stage.
        message: Cost of each message.
    """
    schedule = built_schedule(*order)
    found = simulate(schedule, forward_cost=forward, backward_cost=backward, comm_latency=message)
    return found.step_time, max(found.busy)


@lru_cache(maxsize=4096)
def pipeline_peaks(
    order: tuple[str, int, int, int], saved: tuple[float, ...], gradients: tuple[float, ...]
) -> tuple[tuple[float, float], ...]:
    """What each rank holds for backward, and of gradients, when both together are the most.

    Gradients of a stage are there from its first backward on.

    Args:
        order: Name, ranks, micro-batches and stages on each rank of the schedule.
        saved: What each stage keeps of a micro-batch.
        gradients: Of each stage.
    """
    schedule = built_schedule(*order)
    found = []
    for rank in range(schedule.num_ranks):
        held = most = (0.0, 0.0)
        begun = set()
        for stage, kind, _ in schedule.rows[rank].tolist():
            if kind == F:
                held = held[0] + saved[stage], held[1]
            most = max(most, held, key=sum)
            if kind == F:
                continue
            if stage not in begun:
                begun.add(stage)
                held = held[0], held[1] + gradients[stage]
            if kind != I:  # W lets go of what I still needs
                held = held[0] - saved[stage], held[1]
        found.append(max(most, held, key=sum))
    return tuple(found)
