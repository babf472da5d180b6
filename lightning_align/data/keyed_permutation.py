"""Permutations that are never written down: where a place lands is computed from it and a key.

An order of 1e8 samples that is drawn as a whole costs 400 MB and seconds. A block cipher on as many
numbers as there are samples is an order as well, of which any place can be looked up: here a small
Feistel network, as in format-preserving encryption (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002: what lands outside is sent through again until it is inside). It mixes
samples; it keeps no secrets.

Shapes: P places that are looked up at once, each in a permutation of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_align._errors import argument_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]
    Keys = NDArray[np.uint64]

ROUNDS = 6
SMALL = 1024  # up to this size more rounds are needed to mix the few bits that there are
ROUNDS_SMALL = 16


def keys(seed: int, *parts: NDArray[np.integer[Any]] | int) -> Keys:
    """A 64-bit key for each place from a seed and the numbers it depends on, (P,)."""
    mixed = np.array([seed], dtype=np.uint64)
    for part in parts:
        # SplitMix64, doi:10.1145/2714064.2660195: the increment tells the parts apart.
        number = np.atleast_1d(part).astype(np.uint64) + np.uint64(1)
        mixed = mixed + number * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def permuted(places_P: NDArray[Any], sizes_P: NDArray[Any], keys_P: Keys) -> NDArray[np.int64]:
    """Where each place lands in a permutation of its size that belongs to its key.

    Args:
        places_P: Places, each in ``[0, size)``.
        sizes_P: Sizes, from 1 to 2**31.
        keys_P: One key for every place; equal sizes and keys are one permutation.

    Raises:
        ValueError: If a place is outside of its size: it might be sent through without end.
    """
    if ((places_P < 0) | (places_P >= sizes_P)).any():
        rule = "must be in [0, size)"
        raise argument_error("permuted", "places_P", places_P, rule)
    places, sizes = places_P.astype(np.uint32), sizes_P.astype(np.uint32)
    small = np.flatnonzero(sizes <= SMALL)
    if len(small) == len(places_P):
        return _walked(places, sizes, keys_P, ROUNDS_SMALL).astype(np.int64)
    landed = _walked(places, sizes, keys_P, ROUNDS)
    if len(small):
        landed[small] = _walked(places[small], sizes[small], keys_P[small], ROUNDS_SMALL)
    return landed.astype(np.int64)


def _walked(places: Words, sizes: Words, keys_P: Keys, rounds: int) -> Words:
    """What lands outside of its size is sent through again."""
    bits = np.frexp((sizes - np.uint32(1)).astype(np.float64))[1].astype(np.uint32)
    # A place is two digits, the right one of half the bits, the left one of as many values as
    # it takes to hold the size: so little lands outside.
    right_bits = (bits + np.uint32(1)) >> np.uint32(1)
    left_values = ((sizes - np.uint32(1)) >> right_bits) + np.uint32(1)
    low, high = keys_P & np.uint64(0xFFFFFFFF), keys_P >> np.uint64(32)
    network = np.stack([right_bits, left_values, low.astype(np.uint32), high.astype(np.uint32)])
    landed = _feistel(places, network, rounds)
    outside = np.flatnonzero(landed >= sizes)
    while len(outside):
        again = _feistel(landed[outside], network[:, outside], rounds)
        landed[outside] = again
        outside = outside[again >= sizes[outside]]
    return landed


def _feistel(words: Words, network: Words, rounds: int) -> Words:
    """A permutation of the numbers that two digits make, (P,)."""
    right_bits, left_values, key, step = network
    left: Words = words >> right_bits
    right: Words = words ^ (left << right_bits)
    right_shift, step = np.uint32(32) - right_bits, step | np.uint32(1)
    half = np.uint32(16)
    for number in range(rounds):
        # One digit is moved by a hash of the other, which could move it back as well.
        if number % 2:
            right ^= _hash(left, key) >> right_shift
        else:
            left += (_hash(right, key) >> half) * left_values >> half
            np.minimum(left, left - left_values, out=left)  # modulo: what is below 0 wraps around
        key = key + step
    joined: Words = left << right_bits
    joined |= right
    return joined


def _hash(half: Words, key: Words) -> Words:
    """32 bits of which the upper ones depend on all of a digit and the key, (P,)."""
    mixed = (half ^ key) * np.uint32(0x85EBCA6B)  # the constants of MurmurHash3's finalizer
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x9E3779B1)
    return mixed
