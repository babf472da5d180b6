"""Where the parts of a model lie, and what of a run that changes."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_align.strategies.zero_infinity.devices import spread


@given(st.lists(st.integers(1, 1000), max_size=40), st.floats(0, 1))
def test_a_share_is_chosen_and_spread(sizes, share):
    chosen = list(spread(sizes, share))
    assert len(chosen) == len(sizes)
    for end in range(1, len(sizes) + 1):
        taken = sum(s for s, c in zip(sizes[:end], chosen, strict=False) if c)
        assert abs(taken - share * sum(sizes[:end])) <= max(sizes[:end])
    if share in (0, 1):
        assert set(chosen) <= {bool(share)}


def test_a_half_is_every_second():
    assert list(spread([10] * 6, 0.5)) == [True, False, True, False, True, False]
