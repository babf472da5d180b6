"""What ``lightning-align plan --new_tokens`` says of generation: a line for each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_align._errors import argument_error
from lightning_align.cli.plan_report import columns
from lightning_align.planner import GenerationCost, HardwareSpec, ModelSpec, predict_generation
from lightning_align.planner.quantities import shown, shown_time

BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Generation:
    """What generation costs on one kind of hardware.

    Attributes:
        hardware: The devices of a node, which divide the model.
        precision: Of the weights.
        costs: Of each batch, as a graph and with operations launched one by one.
    """

    hardware: HardwareSpec
    precision: str
    costs: Sequence[tuple[GenerationCost, GenerationCost]]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        first = self.costs[0][0]
        return {
            "hardware": self.hardware.name,
            "devices": self.hardware.devices,
            "precision": self.precision,
            "prompt_length": first.prompt_length,
            "new_tokens": first.new_tokens,
            "weight_bytes": first.weight_bytes,
            "kv_bytes_per_token": first.kv_bytes_per_token,
            "max_batch_size": first.max_batch_size,
            "compute_bound_batch": _finite(first.compute_bound_batch),
            "products_compute_bound_batch": _finite(first.products_compute_bound_batch),
            "batches": [
                {
                    "batch_size": cost.batch_size,
                    "prefill_s": cost.prefill.seconds,
                    "decode_s": cost.decode.seconds,
                    "decode_intensity": cost.decode.intensity,
                    "tokens_per_second": cost.tokens_per_second,
                    "eager_tokens_per_second": eager.tokens_per_second,
                    "bound": cost.decode.bound,
                    "memory_bytes": cost.memory_bytes,
                    "fits": cost.fits,
                }
                for cost, eager in self.costs
            ],
        }


def generation_of(
    model: ModelSpec, hardware: HardwareSpec, new_tokens: int, precision: str
) -> Generation:
    """Prefill and decoding by batch.

    Args:
        model: What generates; its rows are the prompts.
        hardware: The devices of a node, which divide the model.
        new_tokens: Tokens to generate for each prompt.
        precision: Of training; anything but 32-true generates in bf16.

    Raises:
        ValueError: If there are more devices than a node has, or they cannot divide the model.
    """
    if hardware.devices > hardware.devices_per_node:
        rule = f"generation is planned in a node, which has {hardware.devices_per_node} of them"
        given = f"{hardware.devices}x{hardware.name}"
        raise argument_error("plan", "hardware", given, rule, "Copies of it serve more prompts")
    dtype = "32-true" if precision == "32-true" else "bf16-true"

    def cost(batch_size: int, eager: bool) -> GenerationCost:
        return predict_generation(
            model,
            hardware,
            batch_size=batch_size,
            new_tokens=new_tokens,
            precision=dtype,
            tensor_parallel=hardware.devices,
            eager=eager,
        )

    costs = [(cost(batch, False), cost(batch, True)) for batch in BATCHES]
    return Generation(hardware, dtype, costs)


def generation_report(generation: Generation) -> list[str]:
    """Prefill and decoding by batch, and where decoding leaves the memory wall.

    Args:
        generation: What it costs.
    """
    hardware, first = generation.hardware, generation.costs[0][0]
    rows = [["batch", "prefill", "FLOP/B", "a token", "tokens/s", "eager", "bound by", "memory"]]
    for found, eager in generation.costs:
        memory = shown(found.memory_bytes)
        rows.append(
            [
                str(found.batch_size),
                shown_time(found.prefill.seconds),
                f"{found.decode.intensity:.3g}",
                shown_time(found.decode.seconds),
                f"{found.tokens_per_second:,.0f}",
                f"{eager.tokens_per_second:,.0f}",
                found.decode.bound,
                memory if found.fits else f"{memory}: does not fit",
            ]
        )
    return [
        "",
        f"{hardware.devices} x {hardware.name}, {generation.precision}: {first.new_tokens} new "
        f"tokens for prompts of {first.prompt_length}",
        f"a device has {shown(first.weight_bytes)} of weights, and "
        f"{shown(first.kv_bytes_per_token)} of cache for each token of a row",
        *columns(rows),
        f"room for a batch of {first.max_batch_size:,} on {shown(hardware.memory)}",
        "decoding leaves the memory wall at a batch of "
        f"{_batch(first.compute_bound_batch)}; its products alone at "
        f"{_batch(first.products_compute_bound_batch)}",
    ]


def _batch(size: float) -> str:
    return "none (each row reads a cache of its own)" if math.isinf(size) else f"{size:,.0f}"


def _finite(size: float) -> float | None:
    """JSON has no infinity."""
    return None if math.isinf(size) else size
