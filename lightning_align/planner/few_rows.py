"""What a processor reaches with few rows, as in decoding, and what a call costs there.

The roofline says that a product of one row takes as long as reading its matrix. Libraries have no
kernels for 2 to 16 rows that do, and attention for one token reads its cache slower than a stream.
Both are shares of the roofline, at most 1, measured on operands that are not in caches. Calls cost
less than in training: nothing is written down for a backward.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.call_costs import small_llama

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MATRIX = (1024, 768)  # outputs and inputs
CACHE = (2, 8, 512, 64)  # rows, heads, tokens and width of the keys that attention reads
STEPS = 30  # of a small model, of which the median counts
Timed = Callable[[Callable[..., Any], list[tuple[int, ...]]], float]


@dataclass(frozen=True)
class FewRows:
    """Shares of the roofline, and the cost of a call without autograd.

    Attributes:
        products: Rows of a product and the share that it reaches, by growing rows.
        attention: Share that attention for one token of each row reaches.
        call_s: Seconds to call an operation from Python.
    """

    products: tuple[tuple[float, float], ...]
    attention: float
    call_s: float

    def share(self, rows: float) -> float:
        """Share of the roofline that a product with a matrix reaches.

        Between two numbers of rows that were measured it is a power law; beyond the last one
        nothing is known, and the share is that of the last.

        Args:
            rows: Of the product.
        """
        known = [each for each, _ in self.products]
        place = bisect_left(known, rows)
        if place == 0 or place == len(known):
            return self.products[min(place, len(known) - 1)][1]
        (low, low_share), (high, high_share) = self.products[place - 1 : place + 1]
        slope = math.log(high_share / low_share) / math.log(high / low)
        return float(low_share * (rows / low) ** slope)


def few_rows(
    seconds: Timed, peak_flops: float, mem_bandwidth: float, dtype: torch.dtype, call_s: float
) -> FewRows:
    """Measure the shares.

    Args:
        seconds: Of a call on operands of some shapes.
        peak_flops: Of products in that dtype.
        mem_bandwidth: Of memory.
        dtype: Of operands.
        call_s: Seconds to call an operation.
    """
    outputs, inputs = MATRIX
    products = []
    for rows in ROWS:
        moved = (rows * inputs + outputs * inputs + rows * outputs) * dtype.itemsize
        roofline = max(2.0 * rows * outputs * inputs / peak_flops, moved / mem_bandwidth)
        took = seconds(F.linear, [(rows, inputs), (outputs, inputs)])
        products.append((float(rows), min(1.0, roofline / took)))
    batch, heads, tokens, width = CACHE
    query = (batch, 2 * heads, 1, width)
    read = 2 * batch * heads * tokens * width * dtype.itemsize
    took = seconds(_attend, [query, CACHE, CACHE])
    return FewRows(tuple(products), min(1.0, read / mem_bandwidth / took), call_s)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def call_without_autograd(clock: Callable[[], float], bandwidth: float) -> float:
    """Seconds of calling an operation of transformers' Llama while it decodes.

    Args:
        clock: Seconds.
        bandwidth: At which the small model's bytes are read, from caches.
    """
    from transformers import DynamicCache  # loads for a second

    model = small_llama()
    model.eval()
    # transformers 5.24 has another name for it, and warns of the one before
    names = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config)}
    token = torch.zeros(1, 1, dtype=torch.long)

    def decode() -> None:
        model(token, logits_to_keep=1, **cache)

    samples = []
    with torch.inference_mode():
        decode()
        report = analyze_step(model, decode)
        for _ in range(STEPS):
            start = clock()
            decode()
            samples.append(clock() - start)
    calls = len(report.trace.records) + sum(report.trace.views.values())
    return max(0.0, median(samples) - report.bytes / bandwidth) / calls
