"""Memory that is touched for the first time in every step, where large allocations are given back.

``ZeROInfinityStrategy`` with anything on a drive has allocations from 256 KiB on mapped by
themselves (``glibc_memory``). What operations make of that size, and gradients, are then pages that
the system fills with zeros as they are touched; training in memory takes what it has.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from lightning_align._compat.glibc_memory import LARGE
from lightning_align.offload.bandwidth import BlockBytes, StepLayout, fresh_memory_s
from lightning_align.planner.block_work import Sizes, sizes
from lightning_align.planner.hardware_spec import HardwareSpec
from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.module_scopes import BACKWARD, FORWARD
from lightning_align.planner.parallel_spec import ParallelSpec


class Made(NamedTuple):
    """Tensors of one size that a block makes of a micro-batch, whether they are kept or not.

    Attributes:
        phase: Forward or backward.
        a_token: Bytes of a token.
        a_pair: Bytes of a pair of tokens of a row besides.
        times: How many.
    """

    phase: str
    a_token: float
    a_pair: float
    times: int


def fresh_seconds(
    model: ModelSpec, parallel: ParallelSpec, hardware: HardwareSpec
) -> tuple[float, float]:
    """Seconds of fresh memory in forward and in backward of one micro-batch.

    Of a model whose blocks were not analysed, gradients and logits alone are known.

    Args:
        model: What is trained.
        parallel: How.
        hardware: On what; nothing is fresh on a device, whose memory PyTorch keeps.
    """
    rate = hardware.fresh_bandwidth
    on_drive = "nvme" in (parallel.offload_param, parallel.offload_optimizer)
    if rate is None or hardware.is_asynchronous or not on_drive:
        return 0.0, 0.0
    z = sizes(model, parallel)
    logits = 4 * z.N * z.V  # of a loss in chunks each is as large as the last one, and new
    ahead = model.num_layers * _made_bytes(model, parallel, z, FORWARD)
    back = model.num_layers * _made_bytes(model, parallel, z, BACKWARD)
    if parallel.activation_checkpointing == "full":
        back += ahead
    ahead = (ahead + logits * (logits >= LARGE)) * (1 + parallel.has_reference)
    return ahead / rate, back / rate + fresh_memory_s(_gradients(model, parallel), rate)


def _made_bytes(model: ModelSpec, parallel: ParallelSpec, z: Sizes, phase: str) -> float:
    """Bytes of large tensors that a block makes."""
    found = 0.0
    for made in () if model.analysis is None else model.analysis.of(parallel).made:
        nbytes = z.rows * (made.a_token * z.s + made.a_pair * z.s**2)
        if made.phase == phase and nbytes >= LARGE:
            found += made.times * nbytes
    return found


def _gradients(model: ModelSpec, parallel: ParallelSpec) -> StepLayout:
    """A step whose blocks are as large as their gradients that are mapped."""
    width = parallel.weight_bytes
    each = [width * prod(shape) for _, shape in model.block_shapes]
    large = sum(nbytes for nbytes in each if nbytes >= LARGE)
    trained = model.num_layers if parallel.lisa_layers is None else parallel.lisa_layers
    return StepLayout([BlockBytes(large, 0, 0)] * trained)
