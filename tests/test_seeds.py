from hypothesis import given
from hypothesis import strategies as st

from lightning_align.seeds import derive_seed


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 4096))
def test_fits_torchs_generator(seed: int, position: int, rank: int) -> None:
    assert 0 <= derive_seed(seed, position, rank, "train") < 2**64


def test_parts_cannot_be_confused_with_each_other() -> None:
    """1, 23 and 12, 3 would collide if the parts were simply strung together."""
    assert derive_seed(1, 23, 0, "train") != derive_seed(12, 3, 0, "train")


def test_close_parts_give_different_seeds() -> None:
    parts = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len({derive_seed(*part) for part in parts}) == 64


def test_stays_what_it_was() -> None:
    """A checkpoint that is resumed under a later version draws on as before."""
    assert derive_seed(1, 2, 3, "train") == 9281974865080600825
