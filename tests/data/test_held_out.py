import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.held_out import draw_held_out


def draw(number, fraction, seed=0):
    return draw_held_out("X", number, fraction, seed, what="documents", way_out="Set val_paths")


@settings(deadline=None)
@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_some_but_never_all_and_the_same_for_the_same_seed(number, fraction, seed):
    held_out = draw(number, fraction, seed)
    assert 1 <= held_out.sum() < number
    assert abs(held_out.sum() - fraction * number) <= 1
    assert (held_out == draw(number, fraction, seed)).all()


def test_the_seed_decides():
    assert len({draw(100, 0.5, seed).tobytes() for seed in range(10)}) == 10


def test_nothing_is_held_out_of_nothing():
    assert not draw(1, 0.0).any()


def test_a_single_document_cannot_be_held_out():
    message = (
        r"X\(val_fraction=0\.1\): holds out whole documents, and there is only one\. Set val_p"
    )
    with pytest.raises(ValueError, match=message):
        draw(1, 0.1)
