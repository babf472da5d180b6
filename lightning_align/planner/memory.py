"""Bytes that the fullest rank of a run needs, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from lightning_align.planner.model_spec import ModelSpec, Shapes, count
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.saved_bytes import (
    backward_temporary,
    block_saved_bytes,
    first_saved_bytes,
    frozen_saved_bytes,
    handed_on_bytes,
    last_saved_bytes,
    loss_bytes,
    shared_bytes,
)
from lightning_align.planner.states import state_bytes
from lightning_align.planner.step_cost import (
    ROUNDED,
    layers_of_stages,
    pipeline_peaks,
    simulated_microbatches,
)

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, REFERENCE, TEMPORARY = "activations", "reference", "temporary"
UNDER_WAY = 3  # messages of a rank: the next activations, a gradient that came, one that goes
FETCHED_BLOCKS = 3  # blocks of parameters in memory where they come and go
HOST, NVME = "cpu", "nvme"
GROUP_BYTES = 16 * 2**20  # of optimizer state that is read from drives at a time


def rank_shapes(model: ModelSpec, parallel: ParallelSpec) -> list[tuple[int, Shapes]]:
    """For each rank of the pipeline its number of blocks, and its parameters outside of them."""
    stages = layers_of_stages(model.num_layers, parallel.stages)
    pp = parallel.pipeline_parallel
    blocks = [0] * pp
    beside: list[Shapes] = [()] * pp
    for stage, (begin, end) in enumerate(stages):
        blocks[stage % pp] += end - begin
    beside[0] += model.first_shapes
    beside[-1] += model.last_shapes
    if pp > 1 and model.tied_embeddings:  # a copy of its own
        beside[-1] += (("embeddings", (model.vocab_size, model.hidden_size)),)
    return list(zip(blocks, beside, strict=True))


def saved_by_stage(model: ModelSpec, parallel: ParallelSpec) -> list[float]:
    """Bytes that each stage keeps of a micro-batch until its backward."""
    block, frozen = (each(model, parallel) for each in (block_saved_bytes, frozen_saved_bytes))
    still = 0 if parallel.lisa_layers is None else model.num_layers - parallel.lisa_layers
    mean = block - (block - frozen) * still / model.num_layers
    ranges = layers_of_stages(model.num_layers, parallel.stages)
    shared = shared_bytes(model, parallel)
    stages = [(end - begin) * (mean - shared) + shared for begin, end in ranges]
    stages[0] += first_saved_bytes(model, parallel)
    stages[-1] += last_saved_bytes(model, parallel)
    return stages


def saved_by_rank(model: ModelSpec, parallel: ParallelSpec) -> list[float]:
    """Bytes of activations that each rank of the pipeline holds at its worst moment."""
    saved = saved_by_stage(model, parallel)
    return [held for held, _ in _pipelined(saved, [0.0] * len(saved), parallel)]


def _pipelined(
    saved: list[float], gradients: list[float], parallel: ParallelSpec
) -> list[tuple[float, float]]:
    """What each rank holds of activations and of gradients, when both together are the most."""
    if parallel.pipeline_parallel == 1:
        return [(saved[0], gradients[0])]
    few = simulated_microbatches(parallel)
    order = (parallel.schedule, parallel.pipeline_parallel, few, parallel.chunks)
    unit = max(saved) * ROUNDED
    told = [tuple(float(round(each / unit)) for each in both) for both in (saved, gradients)]
    return [(unit * held, unit * made) for held, made in pipeline_peaks(order, *told)]


def memory_by_rank(
    model: ModelSpec, parallel: ParallelSpec, *, is_processor: bool = False
) -> list[dict[str, float]]:
    """What each rank of the pipeline needs on its device at its worst moment, by what it is for.

    Args:
        model: Its sizes.
        parallel: How it is trained.
        is_processor: Whether it runs on one, which has no products of 16 bits with sums in fp32.
    """
    shapes = rank_shapes(model, parallel)
    ranks = [_rank(model, parallel, *each, is_processor) for each in shapes]
    if parallel.pipeline_parallel == 1:
        return [max(_moments(model, parallel, ranks[0], is_processor), key=_sum)]
    saved, own = saved_by_stage(model, parallel), _gradients_of_stages(model, parallel)
    kept, chunk = loss_bytes(model, parallel, is_processor)
    saved[-1] += kept
    # What a stage hands on stays where it was made, too; where it arrives it is a block's input.
    message = handed_on_bytes(model, parallel)
    saved[:-1] = [each + message for each in saved[:-1]]
    peaks = _pipelined(saved, own, parallel)
    largest = max(prod(shape) for _, shape in model.block_shapes) / parallel.tensor_parallel
    found = []
    again, passing = _recomputed(model, parallel), backward_temporary(model, parallel)
    # The gradient of a weight is there beside the sum that it is added to.
    passing += largest * parallel.weight_bytes
    for number, (rank, (held, gradients)) in enumerate(zip(ranks, peaks, strict=True), start=1):
        moments = [(held + again, passing)]
        if number == len(peaks):  # in the loss, and when what is behind the blocks is done
            behind = kept + last_saved_bytes(model, parallel)
            moments = [(held, chunk), (held + again - behind, passing)]
        busy = [
            {**rank, GRADIENTS: gradients, ACTIVATIONS: a, TEMPORARY: b + UNDER_WAY * message}
            for a, b in moments
        ]
        found.append(max(*busy, _updated(model, parallel, rank), key=_sum))
    return found


def device_memory(
    model: ModelSpec, parallel: ParallelSpec, *, is_processor: bool = False
) -> dict[str, float]:
    """What the fullest rank needs on its device, by what it is for; see ``memory_by_rank``."""
    return max(memory_by_rank(model, parallel, is_processor=is_processor), key=_sum)


def _sum(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def _gradients_of_stages(model: ModelSpec, parallel: ParallelSpec) -> list[float]:
    ranges = layers_of_stages(model.num_layers, parallel.stages)
    width = parallel.weight_bytes / parallel.tensor_parallel
    own = [(end - begin) * count(model.block_shapes) * width for begin, end in ranges]
    shapes = rank_shapes(model, parallel)
    own[0] += count(shapes[0][1]) * width
    own[-1] += count(shapes[-1][1]) * width
    return own


def _rank(
    model: ModelSpec, parallel: ParallelSpec, blocks: int, beside: Shapes, is_processor: bool
) -> dict[str, float]:
    """What a rank has from step to step, and its gradients when all of them are there."""
    t, width, stage = parallel.tensor_parallel, parallel.weight_bytes, parallel.zero_stage
    block, rest = count(model.block_shapes) / t, count(beside) / t
    shares = [parallel.replicas if stage >= least else 1 for least in (1, 2, 3)]
    trained = _trained_blocks(parallel, blocks)
    fetched = min(blocks, FETCHED_BLOCKS)

    if parallel.offload_param != "none":
        held = fetched * block
    elif stage >= 3 and parallel.replicas > 1:
        held = blocks * block / shares[2] + fetched * block
    else:
        held = blocks * block
    gradients = trained * block / shares[1] + rest
    if parallel.offload_optimizer != "none" and _gradients_leave(parallel, is_processor):
        gradients = min(trained, 2) * block + rest  # of the block that is in backward, and one more
    states = trained * state_bytes(model.block_shapes, parallel) + state_bytes(beside, parallel)
    states /= t * shares[0]
    if parallel.offload_optimizer != "none":  # where it lies it is stepped, also what stays here
        states = 0.0
    parts = {WEIGHTS: width * (held + rest), GRADIENTS: width * gradients, OPTIMIZER: states}
    if parallel.has_reference:
        parts[REFERENCE] = width * (held + rest)
    return parts


def _gradients_leave(parallel: ParallelSpec, is_processor: bool) -> bool:
    """Whether a block's gradients go once they are there: not where the update finds them."""
    is_there = is_processor and parallel.devices == 1 and parallel.offload_optimizer == HOST
    return parallel.zero_stage >= 2 and not is_there


def _moments(
    model: ModelSpec, parallel: ParallelSpec, rank: Mapping[str, float], is_processor: bool
) -> Iterator[dict[str, float]]:
    """What is there when forward ends, when backward begins and ends, and in the update.

    In Lightning's order gradients of the step before go after the next forward; LISA lets them go
    at once.
    """
    kept, chunk = loss_bytes(model, parallel, is_processor)
    saved = saved_by_stage(model, parallel)[0]
    if parallel.offload_activations != "none":
        saved /= model.num_layers
    held = parallel.lisa_layers is None or parallel.num_microbatches > 1
    ends = {GRADIENTS: rank[GRADIENTS] * held, ACTIVATIONS: saved + kept, TEMPORARY: chunk}
    yield {**rank, **ends}
    again, passing = _recomputed(model, parallel), backward_temporary(model, parallel)
    width = parallel.weight_bytes / parallel.tensor_parallel
    head, first = model.vocab_size * model.hidden_size, count(model.first_shapes)
    accumulates = parallel.num_microbatches > 1  # then new gradients are there beside their sums
    is_pooled = parallel.zero_stage >= 2 and parallel.offload_optimizer == NVME  # and used again
    before = rank[GRADIENTS] * (accumulates or is_pooled)
    made = before + width * head * (accumulates or not is_pooled)
    begins = {GRADIENTS: made, ACTIVATIONS: saved + again, TEMPORARY: passing}
    yield {**rank, **begins}
    # The block that is in backward has no gradients yet, unless it is frozen, and gets none; those
    # that are divided or leave are few at any time.
    trained = _trained_blocks(parallel, model.num_layers)
    left = (model.num_layers - trained) * frozen_saved_bytes(model, parallel)
    leave = _gradients_leave(parallel, is_processor)
    missing = (first + count(model.block_shapes) * (not left)) * (not leave)
    made = max(before, rank[GRADIENTS] - width * missing)
    yield {**rank, GRADIENTS: made, ACTIVATIONS: left + again, TEMPORARY: passing}
    yield _updated(model, parallel, rank)


def _updated(
    model: ModelSpec, parallel: ParallelSpec, rank: Mapping[str, float]
) -> dict[str, float]:
    """In the update, AdamW has two copies of a weight for a moment, on a CPU."""
    shapes = (*model.first_shapes, *model.block_shapes, *model.last_shapes)
    largest = max(prod(shape) for _, shape in shapes) / parallel.tensor_parallel
    return {**rank, ACTIVATIONS: 0.0, TEMPORARY: 2 * parallel.weight_bytes * largest}


def _recomputed(model: ModelSpec, parallel: ParallelSpec) -> float:
    """What a block keeps while it is computed again for its backward, but for its input."""
    if parallel.activation_checkpointing != "full":
        return 0.0
    whole = block_saved_bytes(model, replace(parallel, activation_checkpointing="none"))
    return whole - block_saved_bytes(model, parallel)


def _trained_blocks(parallel: ParallelSpec, blocks: int) -> float:
    """Blocks of a rank that have gradients and states at a time, at most."""
    return blocks if parallel.lisa_layers is None else min(blocks, parallel.lisa_layers)


def elsewhere(
    model: ModelSpec, parallel: ParallelSpec, *, on_device: bool = False
) -> dict[str, float]:
    """Bytes of a replica of the model in host memory and on drives, by tier.

    Everything on drives is there twice: a step counts once it is whole. Gradients are there only
    while they wait for further micro-batches. Of what stays on a device that is not the host each
    rank has a copy beside the states, which are stepped there.
    """
    trained = model.num_layers if parallel.lisa_layers is None else parallel.lisa_layers
    blocks = model.num_layers * count(model.block_shapes)
    beside = model.first_shapes + model.last_shapes
    copies = 2 if parallel.offload_param == parallel.offload_optimizer == NVME else 1
    found = {HOST: 0.0, NVME: 0.0}
    if parallel.offload_param != "none":
        on_drives = parallel.offload_param == NVME  # then also what stays in memory, for resuming
        weights = parallel.weight_bytes * (blocks + count(beside) * on_drives)
        found[parallel.offload_param] += (copies + parallel.has_reference) * weights
    if parallel.offload_optimizer != "none":
        states = trained * state_bytes(model.block_shapes, parallel) + state_bytes(beside, parallel)
        waits = parallel.zero_stage >= 2 and parallel.num_microbatches > 1
        gradients = parallel.weight_bytes * trained * count(model.block_shapes)
        found[parallel.offload_optimizer] += copies * states + gradients * waits
        if on_device:
            stays = count(beside) + blocks * (parallel.offload_param == "none")
            found[HOST] += parallel.devices * parallel.weight_bytes * stays
    if parallel.offload_optimizer == NVME:
        found[HOST] += parallel.devices * _staged(model, parallel)
    if parallel.offload_activations != "none":
        saved = sum(saved_by_rank(model, parallel)) * parallel.replicas
        found[parallel.offload_activations] += saved
    return found


def _staged(model: ModelSpec, parallel: ParallelSpec) -> float:
    """What a rank has in host memory of state that is on drives, and the sums of a block.

    One group of states is read, one is stepped, and one is written.
    """
    states = state_bytes(model.block_shapes, parallel)
    largest = max(
        state_bytes((each,), parallel)
        for each in model.first_shapes + model.block_shapes + model.last_shapes
    )
    sums = parallel.weight_bytes * count(model.block_shapes) * (parallel.zero_stage >= 2)
    return 3 * min(max(GROUP_BYTES, largest), max(states, largest)) + sums
