"""Seeds that follow from what a draw belongs to, so that no generator state is ever saved."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from all that a draw may depend on; close parts, unrelated seeds."""
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
