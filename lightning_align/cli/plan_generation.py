"""What ``lightning-align plan --new_tokens`` says of generation: a line for each batch."""

from __future__ import annotations

import math

from lightning_align._errors import argument_error
from lightning_align.cli.plan_report import columns
from lightning_align.planner import GenerationCost, HardwareSpec, ModelSpec, predict_generation
from lightning_align.planner.quantities import shown, shown_time

BATCHES = (1, 4, 16, 64, 256)


def generation_report(
    model: ModelSpec, hardware: HardwareSpec, new_tokens: int, precision: str
) -> list[str]:
    """Prefill and decoding by batch, and where decoding leaves the memory wall.

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

    def cost(batch_size: int, *, eager: bool = False) -> GenerationCost:
        return predict_generation(
            model,
            hardware,
            batch_size=batch_size,
            new_tokens=new_tokens,
            precision=dtype,
            tensor_parallel=hardware.devices,
            eager=eager,
        )

    first = cost(1)
    rows = [["batch", "prefill", "FLOP/B", "a token", "tokens/s", "eager", "bound by", "memory"]]
    for batch in BATCHES:
        found = cost(batch)
        memory = shown(found.memory_bytes)
        rows.append(
            [
                str(batch),
                shown_time(found.prefill.seconds),
                f"{found.decode.intensity:.3g}",
                shown_time(found.decode.seconds),
                f"{found.tokens_per_second:,.0f}",
                f"{cost(batch, eager=True).tokens_per_second:,.0f}",
                found.decode.bound,
                memory if found.fits else f"{memory}: does not fit",
            ]
        )
    return [
        "",
        f"{hardware.devices} x {hardware.name}, {dtype}: {new_tokens} new tokens for prompts of "
        f"{model.seq_len}",
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
