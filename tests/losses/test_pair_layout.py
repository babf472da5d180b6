import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.losses import lay_out_pairs

PAD = 0


def batch_of(sequences, side="right", extra=1):
    """Sequences [chosen; rejected] of tokens above 0, padded, with masks of what is a token."""
    width = max(map(len, sequences)) + extra
    ids = torch.full((len(sequences), width), PAD)
    for row, tokens in enumerate(sequences):
        start = 0 if side == "right" else width - len(tokens)
        ids[row, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return ids, (ids != PAD).long()


def test_a_pair_is_a_row_of_what_both_have_then_chosen_then_rejected():
    """Prompts 1 2 3 and 1 2; the second pair's completions both begin with 7, which is shared.

    shared | chosen | rejected
    1 2 3  | 4 5    | 6          positions 0 1 2 3 4 3
    1 2 7  |        | 8 9        positions 0 1 2 3 4
    """
    ids, mask = batch_of([[1, 2, 3, 4, 5], [1, 2, 7], [1, 2, 3, 6], [1, 2, 7, 8, 9]])
    layout = lay_out_pairs(ids, mask)
    assert layout.input_ids_RL.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9, PAD]]
    assert layout.position_ids_RL.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 4, 0]]
    assert layout.part_RL.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 2, 0]]
    assert layout.pair_RL.tolist() == [[0] * 6, [1] * 5 + [-1]]
    assert layout.name == "shared"


def test_the_mask_of_a_row():
    """Rows see columns. Of [1 2 | 3 4 | 5 6] with a window of 2 the rejected 5, at position 2, sees
    the shared 2 at position 1, three places away, and not 1 or the chosen 3 and 4."""
    ids, mask = batch_of([[1, 2, 3, 4], [1, 2, 5, 6]], extra=0)
    layout = lay_out_pairs(ids, mask)
    assert layout.visible().long()[0, 0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert layout.visible(window=2).long()[0, 0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@st.composite
def some_pairs(draw):
    """Sequences [chosen; rejected] that begin alike, or not; also empty and identical ones."""
    tokens = st.lists(st.integers(1, 3), max_size=5)
    pairs = draw(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=6))
    return [p + c for p, c, _ in pairs] + [p + r for p, _, r in pairs]


@settings(max_examples=60, deadline=None)
@given(
    sequences=some_pairs(),
    side=st.sampled_from(["right", "left"]),
    packing=st.booleans(),
    hidden_size=st.sampled_from([None, 1, 64]),
    window=st.sampled_from([None, 1, 3]),
)
def test_each_token_sees_exactly_its_own_sequence(sequences, side, packing, hidden_size, window):
    ids, mask = batch_of(sequences, side)
    layout = lay_out_pairs(ids, mask, packing=packing, hidden_size=hidden_size)
    tokens, positions = layout.input_ids_RL.flatten(), layout.position_ids_RL.flatten()
    rows, width = layout.input_ids_RL.shape
    visible = layout.visible(window)[:, 0]
    used = set()
    for row, sequence in enumerate(sequences):
        places = layout.index_BT[row, mask[row].bool()].tolist()
        used.update(places)
        assert tokens[places].tolist() == sequence
        assert positions[places].tolist() == list(range(len(sequence)))
        for position, place in enumerate(places):
            begin = 0 if window is None else max(0, position + 1 - window)
            seen = (
                visible[place // width, place % width].nonzero().flatten() + place // width * width
            )
            assert seen.tolist() == sorted(places[begin : position + 1])
    for place in set(range(rows * width)) - used:
        row, column = divmod(place, width)
        assert layout.pair_RL[row, column] == -1
        assert tokens[place] == PAD
        assert visible[row, column].nonzero().flatten().tolist() == [column]
        assert visible[row, :, column].nonzero().flatten().tolist() == [column]


@settings(max_examples=40, deadline=None)
@given(sequences=some_pairs())
def test_nothing_that_a_pair_has_in_common_is_there_twice(sequences):
    """As many places as there are different beginnings among the sequences of a pair."""
    ids, mask = batch_of(sequences)
    for packing in (False, True):
        layout = lay_out_pairs(ids, mask, packing=packing)
        num_pairs = len(sequences) // 2
        beginnings = {
            (row % num_pairs, *sequence[: end + 1])
            for row, sequence in enumerate(sequences)
            for end in range(len(sequence))
        }
        assert int((layout.pair_RL >= 0).sum()) == len(beginnings)
    assert len(layout.input_ids_RL) <= num_pairs


def lengths(prompts, completions):
    """Pairs with prompts and completions of these lengths, no two tokens alike but in prompts."""
    fresh = iter(range(1, 10**6))
    heads = [[next(fresh) for _ in range(length)] for length in prompts]
    return [
        head + [next(fresh) for _ in range(length)]
        for _ in range(2)
        for head, length in zip(heads, completions, strict=True)
    ]


def test_packing_takes_as_many_rows_as_cost_least():
    """Rows of 90, 50, 40, 10 places: 4 x 90; in two rows 90 + 10 and 50 + 40; in one 190.

    Compared with everything in its row a place of a narrow model costs its row's width.
    """
    ids, mask = batch_of(lengths([70, 30, 20, 2], [10, 10, 10, 4]))
    packed = lay_out_pairs(ids, mask, packing=True, hidden_size=1)
    assert packed.input_ids_RL.shape == (2, 100)
    assert packed.name == "packed"
    one_row = lay_out_pairs(ids, mask, packing=True)
    assert one_row.input_ids_RL.shape == (1, 190)
    assert lay_out_pairs(ids, mask).input_ids_RL.shape == (4, 90)
    alone = lay_out_pairs(ids, mask, packing=True, hidden_size=1, pairs_alone=True)
    assert alone.input_ids_RL.shape == (1, 190)  # no pair is compared with another
    options = {"hidden_size": 1, "only_if_cheaper": True, "pairs_alone": True}
    assert lay_out_pairs(ids, mask, packing=True, **options).input_ids_RL.shape == (1, 190)


def test_separate_rows_are_taken_where_they_are_cheaper():
    """A prompt of 4 in front of 60 tokens saves 4 of 128 places; in a narrow model each token is
    then compared with both completions. A prompt of 60 saves half."""
    options = {"hidden_size": 8, "only_if_cheaper": True}
    assert lay_out_pairs(*batch_of(lengths([4, 4], [60, 60])), **options) is None
    assert lay_out_pairs(*batch_of(lengths([60, 60], [8, 8])), **options) is not None
