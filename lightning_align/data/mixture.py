"""A weighted mixture of corpora: how many samples of each a pass has, and which.

A pass has as many samples as all corpora together. Corpus i gives its share of them, the next ones
of its own endless stream of permutations: whatever the weights, each of its samples comes once
before one comes again.

Shapes: C corpora, N samples in a pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lightning_align._errors import argument_error, finite_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Permutation = NDArray[np.integer]


class Mixture:
    """Corpora that lie one behind the other, and the weight of each.

    Args:
        sizes: Number of samples of each corpus.
        weights: Weight of each corpus; only their ratios matter.

    Attributes:
        shares: Samples of each corpus per pass, exact to one sample.

    Raises:
        ValueError: If there are other weights than corpora, a weight is not positive and finite, or
            one is so small that its corpus has no sample in a pass.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        if len(sizes) != len(weights):
            rule = f"must be as many as there are corpora, {len(sizes)}"
            raise argument_error("Mixture", "weights", list(weights), rule)
        for weight in weights:
            check_weight("Mixture", "weights", weight)
        self.sizes = list(sizes)
        self.weights = list(weights)
        self.shares = largest_remainder(sum(sizes), weights)
        if 0 in self.shares:
            weight = weights[self.shares.index(0)]
            rule = f"gives its corpus not one of the {sum(sizes)} samples of a pass"
            raise argument_error("Mixture", "weights", weight, rule, "Raise it, or leave it out")

    def samples(self, seed: int, pass_number: int) -> NDArray[np.int64]:
        """The N samples of a pass, corpus after corpus: a pure function of the seed and the pass.

        Args:
            seed: Seed of every order.
            pass_number: Number of the pass, counted from 0.
        """
        first_C = np.cumsum([0, *self.sizes[:-1]])
        parts = [
            first + self._stream(seed, corpus, pass_number * share, (pass_number + 1) * share)
            for corpus, (first, share) in enumerate(zip(first_C, self.shares, strict=True))
        ]
        return np.concatenate(parts)

    def plain(self) -> dict[str, list[float]]:
        """What decides which samples come, as plain data."""
        return {"sizes": list(self.sizes), "weights": self.weights}

    def _stream(self, seed: int, corpus: int, begin: int, end: int) -> NDArray[np.int64]:
        """Places ``begin`` to ``end`` in the endless stream of permutations of one corpus."""
        size = self.sizes[corpus]
        first, last = begin // size, -(-end // size)
        orders = [draw_order(size, seed, f"corpus {corpus}", n) for n in range(first, last)]
        return np.concatenate(orders)[begin - first * size : end - first * size].astype(np.int64)


def draw_order(size: int, *key: object) -> Permutation:
    """A permutation of ``size`` samples that is a pure function of ``key``."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    # 32 bits where they suffice: 1e8 samples then cost 400 MB and not 800.
    dtype = torch.int32 if size < 2**31 else torch.int64
    return cast("Permutation", torch.randperm(size, generator=generator, dtype=dtype).numpy())


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total``, each within 1 of its part by weight."""
    # By a power of two, which rounds nothing: weights of 1e308 have no sum, and have ratios.
    _, exponent = math.frexp(max(weights))
    weights = [math.ldexp(weight, -exponent) for weight in weights]
    exact = [total * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(part) for part in exact]
    # The parts left over go to the largest remainders, of equal ones to the first.
    order = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def check_weight(where: str, argument: str, weight: object) -> None:
    """Refuse what is not a positive, finite number.

    Args:
        where: Class the user called.
        argument: Name of the argument that holds the weight.
        weight: What the user gave.

    Raises:
        ValueError: If it is anything else.
    """
    number = finite_number(weight)
    if number is None or number <= 0:
        way_out = "Leave the corpus out to give it no weight"
        rule = "a weight must be a positive, finite number"
        raise argument_error(where, argument, weight, rule, way_out)
