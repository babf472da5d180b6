"""Bytes that the fullest rank of a run needs, and what they are."""

from __future__ import annotations

from dataclasses import replace

from lightning_align.planner.model_spec import ModelSpec, Shapes, count
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.saved_bytes import (
    block_saved_bytes,
    first_saved_bytes,
    last_saved_bytes,
)
from lightning_align.planner.states import state_bytes
from lightning_align.planner.step_cost import (
    ROUNDED,
    layers_of_stages,
    peak_saved,
    simulated_microbatches,
)

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, REFERENCE, TEMPORARY = "activations", "reference", "temporary"
FETCHED_BLOCKS = 3  # blocks of parameters in memory where they come and go
CHUNK_BYTES = 24 * 2**20  # of logits that a loss in chunks has at a time
HOST, NVME = "cpu", "nvme"


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


def saved_by_rank(model: ModelSpec, parallel: ParallelSpec) -> list[float]:
    """Bytes of activations that each rank of the pipeline holds at its worst moment."""
    block = block_saved_bytes(model, parallel)
    stages = [
        (end - begin) * block for begin, end in layers_of_stages(model.num_layers, parallel.stages)
    ]
    stages[0] += first_saved_bytes(model, parallel)
    stages[-1] += last_saved_bytes(model, parallel)
    pp = parallel.pipeline_parallel
    if pp == 1:
        return stages
    order = (parallel.schedule, pp, simulated_microbatches(parallel), parallel.chunks)
    unit = max(stages) * ROUNDED
    return [unit * held for held in peak_saved(order, tuple(round(s / unit) for s in stages))]


def memory_by_rank(model: ModelSpec, parallel: ParallelSpec) -> list[dict[str, float]]:
    """What each rank of the pipeline needs on its device, by what it is for."""
    saved = saved_by_rank(model, parallel)
    return [
        _rank(model, parallel, blocks, beside, held)
        for (blocks, beside), held in zip(rank_shapes(model, parallel), saved, strict=True)
    ]


def device_memory(model: ModelSpec, parallel: ParallelSpec) -> dict[str, float]:
    """What the fullest rank needs on its device, by what it is for."""
    return max(memory_by_rank(model, parallel), key=lambda parts: sum(parts.values()))


def _rank(
    model: ModelSpec, parallel: ParallelSpec, blocks: int, beside: Shapes, saved: float
) -> dict[str, float]:
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
    if parallel.offload_optimizer != "none" and stage >= 2:
        gradients = min(trained, 2) * block + rest  # of the block that is in backward, and one more
    states = trained * state_bytes(model.block_shapes, parallel) / (t * shares[0])
    if parallel.offload_optimizer != "none":
        states = 0.0
    states += state_bytes(beside, parallel) / t
    parts = {
        WEIGHTS: width * (held + rest),
        GRADIENTS: width * gradients,
        OPTIMIZER: states,
        ACTIVATIONS: saved if parallel.offload_activations == "none" else saved / max(blocks, 1),
        TEMPORARY: _temporary(model, parallel),
    }
    if parallel.has_reference:
        parts[REFERENCE] = width * (held + rest)
    return parts


def _trained_blocks(parallel: ParallelSpec, blocks: int) -> float:
    """Blocks of a rank that have gradients and states at a time, at most."""
    return blocks if parallel.lisa_layers is None else min(blocks, parallel.lisa_layers)


def _temporary(model: ModelSpec, parallel: ParallelSpec) -> float:
    """What is there for a moment: of a block that is computed again, of the loss, of autocast."""
    found = 0.0
    if parallel.activation_checkpointing == "full":
        found += block_saved_bytes(model, replace(parallel, activation_checkpointing="none"))
    tokens = parallel.rows * model.seq_len
    logits = 4 * tokens * model.vocab_size / parallel.tensor_parallel
    found += min(CHUNK_BYTES, logits) if parallel.chunked_loss else logits
    if parallel.precision.endswith("mixed"):  # 16-bit copies of the weights of a block
        found += 2 * count(model.block_shapes) / parallel.tensor_parallel
    return found


def elsewhere(model: ModelSpec, parallel: ParallelSpec) -> dict[str, float]:
    """Bytes of a replica of the model in host memory and on drives, by tier."""
    trained = model.num_layers if parallel.lisa_layers is None else parallel.lisa_layers
    blocks = model.num_layers * count(model.block_shapes)
    found = {HOST: 0.0, NVME: 0.0}
    if parallel.offload_param != "none":
        copies = 1 + parallel.has_reference
        found[parallel.offload_param] += copies * parallel.weight_bytes * blocks
    if parallel.offload_optimizer != "none":
        states = trained * state_bytes(model.block_shapes, parallel)
        gradients = parallel.weight_bytes * trained * count(model.block_shapes)
        found[parallel.offload_optimizer] += states + gradients * (parallel.zero_stage >= 2)
    if parallel.offload_activations != "none":
        saved = sum(saved_by_rank(model, parallel)) * parallel.replicas
        found[parallel.offload_activations] += saved
    return found
