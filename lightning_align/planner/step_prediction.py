"""Seconds of a whole step: forwards and backwards, messages between replicas, update, transfers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lightning_align.offload.bandwidth import (
    BACKWARD,
    FORWARD,
    Bandwidth,
    BlockBytes,
    Moved,
    StepLayout,
    step_bytes,
    total,
    transfer_s,
)
from lightning_align.planner.collectives import Group, all_reduce_s, bandwidth
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.hardware_spec import HardwareSpec
from lightning_align.planner.memory import FETCHED_BLOCKS, HOST, NVME, rank_shapes
from lightning_align.planner.model_spec import ModelSpec, Shapes, count
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.saved_bytes import block_saved_bytes
from lightning_align.planner.states import state_bytes
from lightning_align.planner.step_cost import (
    COMPUTE,
    MEMORY,
    MESSAGES,
    NOTHING,
    OVERHEAD,
    StageTimes,
    pipeline_s,
    stage_times,
)

BUBBLE, REPLICAS, UPDATE, TRANSFERS = "bubble", "replicas", "update", "transfers"
PARTS = (COMPUTE, MEMORY, OVERHEAD, MESSAGES, BUBBLE, REPLICAS, UPDATE, TRANSFERS)
MASTER_BYTES = 10  # of a 16-bit gradient in fp32, written and read, and of the weight, written
NEWTON_SCHULZ_STEPS = 5
INFINITE = float("inf")


@dataclass(frozen=True)
class StepPrediction:
    """Seconds of a step.

    Attributes:
        seconds: In all.
        breakdown: What they go into, of the busiest rank; its sum is the whole.
        nvme: Bytes that one rank reads from drives and writes to them.
    """

    seconds: float
    breakdown: Mapping[str, float]
    nvme: Moved


def predict_step(
    model: ModelSpec, parallel: ParallelSpec, hardware: HardwareSpec, constants: Efficiencies
) -> StepPrediction:
    """Seconds of a step and what they go into.

    Args:
        model: What is trained.
        parallel: How.
        hardware: On what.
        constants: What is reached of its sheet.
    """
    stages = stage_times(model, parallel, hardware, constants)
    running = pipeline_s(stages, parallel)
    parts = _busiest(stages, parallel)
    parts[BUBBLE] = max(0.0, running - sum(parts.values()))
    phases = _moved(model, parallel)
    waits = _waiting_s(phases, stages, parallel, hardware, constants)
    parts[TRANSFERS] = max(0.0, waits - running) if phases else 0.0
    parts[REPLICAS] = _exposed_reduce_s(model, parallel, hardware, constants, stages)
    parts[UPDATE] = _update_s(model, parallel, hardware, constants)
    parts[OVERHEAD] += constants.step_s
    breakdown = {name: parts.get(name, 0.0) for name in PARTS}
    return StepPrediction(sum(breakdown.values()), breakdown, total(phases.get(NVME, [])))


def _busiest(stages: StageTimes, parallel: ParallelSpec) -> dict[str, float]:
    """What the rank with the most to do spends its time with, without waiting."""
    pp = parallel.pipeline_parallel
    ranks = [NOTHING] * pp
    for stage, times in enumerate(zip(stages.forward, stages.backward, strict=True)):
        for each in times:
            ranks[stage % pp] = ranks[stage % pp].plus(each, parallel.num_microbatches)
    found = max(ranks, key=lambda times: times.seconds)
    return {name: found.by_bound.get(name, 0.0) for name in (COMPUTE, MEMORY, OVERHEAD, MESSAGES)}


def _exposed_reduce_s(
    model: ModelSpec,
    parallel: ParallelSpec,
    hardware: HardwareSpec,
    constants: Efficiencies,
    stages: StageTimes,
) -> float:
    """Seconds of summing gradients over replicas that nothing hides."""
    if parallel.zero_stage == 3:
        return 0.0  # block by block: see _moved
    blocks, beside = max(rank_shapes(model, parallel), key=lambda rank: rank[0])
    trained = blocks if parallel.lisa_layers is None else min(blocks, parallel.lisa_layers)
    elements = (trained * count(model.block_shapes) + count(beside)) / parallel.tensor_parallel
    group = Group(parallel.replicas, parallel.tensor_parallel)
    seconds = all_reduce_s(elements * parallel.weight_bytes, group, hardware, constants)
    if not parallel.overlap_grad_reduce:
        return seconds
    first = parallel.pipeline_parallel  # whose backward is the last to end
    beside_s = sum(each.seconds for each in stages.backward[::first])
    return max(seconds - beside_s, seconds / (blocks + 1))  # the last bucket waits for backward


def _update_s(
    model: ModelSpec, parallel: ParallelSpec, hardware: HardwareSpec, constants: Efficiencies
) -> float:
    """Seconds of the optimizer: its bytes, and the products of Muon and GaLore."""
    blocks, beside = max(rank_shapes(model, parallel), key=lambda rank: rank[0])
    trained = blocks if parallel.lisa_layers is None else min(blocks, parallel.lisa_layers)
    if parallel.offload_optimizer != "none":
        trained = 0  # what it costs is to bring it: see _moved
    divided = parallel.tensor_parallel * (parallel.replicas if parallel.zero_stage else 1)
    own = [(trained, model.block_shapes), (1, beside)]
    nbytes = sum(many * _update_bytes(shapes, parallel) for many, shapes in own) / divided
    flops = trained * _update_flops(model.block_shapes, parallel) / divided
    peak = hardware.product_flops(parallel.is_half) * constants.matmul
    return nbytes / (hardware.mem_bandwidth * constants.memory) + flops / peak


def _update_bytes(shapes: Shapes, parallel: ParallelSpec) -> float:
    """Weights and states read and written, gradients read."""
    elements = count(shapes)
    if parallel.precision.endswith("master"):
        return 2 * state_bytes(shapes, parallel) + MASTER_BYTES * elements
    return 2 * state_bytes(shapes, parallel) + 3 * parallel.weight_bytes * elements


def _update_flops(shapes: Shapes, parallel: ParallelSpec) -> float:
    matrices = [sorted(shape) for kind, shape in shapes if kind.startswith("matrices")]
    if parallel.optimizer == "muon":  # X X^T, its square, and their product with X, each step
        per_step = sum(4 * short**2 * long + 2 * short**3 for short, long in matrices)
        return NEWTON_SCHULZ_STEPS * per_step
    if parallel.optimizer == "galore_adamw":  # there and back
        return sum(4 * min(parallel.galore_rank, shape[0]) * prod(shape) for shape in matrices)
    return 0.0


def _moved(model: ModelSpec, parallel: ParallelSpec) -> dict[str, list[tuple[str, Moved]]]:
    """Phases of a step with the bytes of one rank, by tier; what replicas exchange is HOST's."""
    tiers = (parallel.offload_param, parallel.offload_optimizer, parallel.offload_activations)
    if parallel.zero_stage < 3 and tiers == ("none",) * 3:
        return {}
    found = {}
    for tier in (HOST, NVME):
        layout = _layout(model, parallel, tier)
        if layout is not None:
            found[tier] = step_bytes(layout)
    return found


def _layout(model: ModelSpec, parallel: ParallelSpec, tier: str) -> StepLayout | None:
    """What one tier holds; exchanges of ZeRO's third stage ride on host memory's."""
    exchanges = tier == HOST and parallel.zero_stage == 3
    holds = [
        what == tier
        for what in (
            parallel.offload_param,
            parallel.offload_optimizer,
            parallel.offload_activations,
        )
    ]
    if not (any(holds) or exchanges):
        return None
    width, block = parallel.weight_bytes, count(model.block_shapes)
    states = state_bytes(model.block_shapes, parallel) if holds[1] else 0
    waits = parallel.zero_stage >= 2 and parallel.num_microbatches > 1 and holds[1]
    trained = model.num_layers if parallel.lisa_layers is None else parallel.lisa_layers
    moves = holds[0] or exchanges
    blocks = [
        BlockBytes(
            parameters=width * block if moves or holds[1] else 0,
            states=states,
            gradients=width * block if waits else 0,
            trains=number >= model.num_layers - trained or not moves,
            stays=not moves,
            is_stored=holds[0],
        )
        for number in range(model.num_layers)
    ]
    saved = block_saved_bytes(model, parallel) * model.num_layers if holds[2] else 0.0
    return StepLayout(
        blocks,
        resident=FETCHED_BLOCKS,
        batches=parallel.num_microbatches,
        activation_bytes=saved,
        ranks=parallel.replicas,
    )


def _waiting_s(
    phases: Mapping[str, list[tuple[str, Moved]]],
    stages: StageTimes,
    parallel: ParallelSpec,
    hardware: HardwareSpec,
    constants: Efficiencies,
) -> float:
    """Seconds of all phases where transfers run beside arithmetic: the longer of both, each."""
    if not phases:
        return 0.0
    arithmetic = {
        FORWARD: sum(each.seconds for each in stages.forward),
        BACKWARD: sum(each.seconds for each in stages.backward),
    }
    group = Group(parallel.replicas, parallel.tensor_parallel)
    exchange = bandwidth(group, hardware) * constants.link if parallel.replicas > 1 else INFINITE
    near = min(parallel.devices, hardware.devices_per_node)
    rates = {
        HOST: Bandwidth(hardware.host_bandwidth, hardware.host_bandwidth, exchange),
        NVME: Bandwidth(
            max(hardware.nvme_read_bandwidth, 1.0) / near,  # without drives: next to never
            max(hardware.nvme_write_bandwidth, 1.0) / near,
        ),
    }
    order = [name for name, _ in next(iter(phases.values()))]
    seconds = 0.0
    for number, name in enumerate(order):
        transfers = [transfer_s(moved[number][1], rates[tier]) for tier, moved in phases.items()]
        seconds += max(arithmetic.get(name, 0.0), *transfers)
    return seconds
