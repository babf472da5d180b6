"""Seconds of a whole step: forwards and backwards, messages between replicas, update, transfers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from lightning_align.offload.bandwidth import (
    BACKWARD,
    FORWARD,
    Bandwidth,
    BlockBytes,
    Moved,
    StepLayout,
    step_bytes,
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
    if phases:
        waits = _waiting_s(phases, stages, parallel, hardware, constants)
        parts[TRANSFERS] = max(0.0, waits - running)
    parts[REPLICAS] = _exposed_reduce_s(model, parallel, hardware, constants, stages)
    parts[UPDATE] = _update_s(model, parallel, hardware, constants)
    parts[OVERHEAD] += constants.step_s
    breakdown = {name: parts.get(name, 0.0) for name in PARTS}
    nvme = phases.get(NVME, [])
    drives = Moved(*(sum(n * moved[part] for _, moved, n in nvme) for part in range(3)))
    return StepPrediction(sum(breakdown.values()), breakdown, drives)


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
    if not (parallel.overlap_grad_reduce and hardware.is_asynchronous):
        return seconds  # a processor sends with the cores that compute
    first = parallel.pipeline_parallel  # whose backward is the last to end
    beside_s = sum(each.seconds for each in stages.backward[::first])
    return max(seconds - beside_s, seconds / (blocks + 1))  # the last bucket waits for backward


def _update_s(
    model: ModelSpec, parallel: ParallelSpec, hardware: HardwareSpec, constants: Efficiencies
) -> float:
    """Seconds of the optimizer: its bytes, and the products of Muon and GaLore."""
    blocks, beside = max(rank_shapes(model, parallel), key=lambda rank: rank[0])
    trained = blocks if parallel.lisa_layers is None else min(blocks, parallel.lisa_layers)
    divided = parallel.tensor_parallel * (parallel.replicas if parallel.zero_stage else 1)
    own = [(trained, model.block_shapes), (1, beside)]
    nbytes = sum(many * _update_bytes(shapes, parallel) for many, shapes in own) / divided
    flops = trained * _update_flops(model.block_shapes, parallel) / divided
    peak = hardware.product_flops(parallel.is_half) * constants.matmul
    return nbytes / (hardware.mem_bandwidth * constants.memory) + flops / peak


def _update_bytes(shapes: Shapes, parallel: ParallelSpec) -> float:
    """Weights and states read and written, gradients read."""
    elements = count(shapes)
    if parallel.has_masters:
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


class Tier(NamedTuple):
    """What a tier holds, in bytes of a block.

    Attributes:
        parameters: That are fetched, or exchanged between replicas.
        states: Of the optimizer.
        gradients: That wait for the update.
        is_stored: Whether the parameters lie there.
        activations: Of a micro-batch, of all blocks.
        beside: Of parameters of no block, which stay in memory and are written once updated.
        beside_states: Of their state.
    """

    parameters: float
    states: float
    gradients: float
    is_stored: bool
    activations: float
    beside: float = 0.0
    beside_states: float = 0.0


Phases = list[tuple[str, Moved, int]]  # name, bytes of one rank, how often it comes


def _moved(model: ModelSpec, parallel: ParallelSpec) -> dict[str, Phases]:
    """Phases of a step by tier; what replicas exchange at ZeRO's third stage rides on HOST's."""
    places = (parallel.offload_param, parallel.offload_optimizer, parallel.offload_activations)
    width = parallel.weight_bytes * count(model.block_shapes)
    waits = parallel.zero_stage >= 2 and parallel.num_microbatches > 1
    found = {}
    for name in (HOST, NVME):
        stored, has_states, has_activations = (place == name for place in places)
        moves = stored or (name == HOST and parallel.zero_stage == 3)
        if not (moves or has_states or has_activations):
            continue
        saved = model.num_layers * block_saved_bytes(model, parallel) if has_activations else 0.0
        beside = model.first_shapes + model.last_shapes
        tier = Tier(
            width if moves else 0.0,
            state_bytes(model.block_shapes, parallel) if has_states else 0.0,
            width if has_states and waits else 0.0,
            stored,
            saved,
            parallel.weight_bytes * count(beside) if name == NVME else 0.0,
            state_bytes(beside, parallel) if has_states and name == NVME else 0.0,
        )
        trained = parallel.lisa_layers or model.num_layers
        many = parallel.num_microbatches
        found[name] = _phases(tier, model.num_layers, trained, many, parallel.replicas)
    return found


@lru_cache(maxsize=4096)
def _phases(tier: Tier, num_layers: int, trained: int, many: int, ranks: int) -> Phases:
    """Phases of all micro-batches, of which those between the second and the last are alike."""
    is_stored = tier.is_stored
    blocks = [
        BlockBytes(
            *(tier.beside, tier.beside_states, 0),  # type: ignore[arg-type]
            stays=True,
            is_stored=is_stored,
        )
    ]
    blocks += [
        BlockBytes(
            *(tier.parameters, tier.states, tier.gradients),  # type: ignore[arg-type]
            trains=number >= num_layers - trained,
            stays=not tier.parameters,
            is_stored=is_stored,
        )
        for number in range(num_layers)
    ]
    few = min(many, 4)
    layout = StepLayout(blocks, FETCHED_BLOCKS, few, activation_bytes=tier.activations, ranks=ranks)
    times = [1] * 2 + [1 + many - few] * 2 + [1] * (2 * few)
    return [(name, moved, n) for (name, moved), n in zip(step_bytes(layout), times, strict=False)]


def _waiting_s(
    phases: Mapping[str, Phases],
    stages: StageTimes,
    parallel: ParallelSpec,
    hardware: HardwareSpec,
    constants: Efficiencies,
) -> float:
    """Seconds of all phases where transfers run beside arithmetic: the longer of both, each."""
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
    seconds = 0.0
    for together in zip(*phases.values(), strict=True):
        name, _, times = together[0]
        transfers = [
            transfer_s(moved, rates[tier])
            for tier, (_, moved, _) in zip(phases, together, strict=True)
        ]
        crossed = sum(moved.read + moved.written for _, moved, _ in together)
        link_s = crossed / hardware.host_bandwidth  # what is on drives comes this way, too
        busy = arithmetic[name]
        if not hardware.is_asynchronous:
            busy += sum(moved.exchanged for _, moved, _ in together) / exchange
        seconds += times * max(busy, link_s, *transfers)
    return seconds
