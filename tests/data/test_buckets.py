"""Documents cut into powers of two, and batches of one length: counted piece by piece."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.buckets import BucketBatches, BucketedDataset, decompose, stretches
from lightning_align.data.sampler import padding
from lightning_align.data.token_cache import TokenSplit

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=12).filter(lambda x: max(x) > 1)


def offsets_of(lengths):
    return np.cumsum([0, *lengths])


def a_split(folder: Path, lengths: list[int]) -> TokenSplit:
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    tokens.tofile(folder / "train.tokens")
    offsets_of(lengths).astype(np.int64).tofile(folder / "train.offsets")
    return TokenSplit(folder, "train", "uint16", len(tokens), len(lengths), "content")


def test_a_document_is_cut_by_the_binary_digits_of_its_predictions():
    """45 tokens have 44 predictions: 2 x 16, and 12 = 8 + 4; the next has 6 = 4 + 2."""
    pieces = decompose(offsets_of([45, 7]), 2, 16)
    assert pieces.lengths.tolist() == [2, 4, 8, 16]
    assert pieces.sizes.tolist() == [1, 2, 1, 2]
    assert pieces.first_token.tolist() == [45 + 4, 40, 45, 32, 0, 16]
    assert pieces.filled_up == 0


def test_a_rest_below_the_least_length_is_filled_up():
    """12 predictions are 8 and 4, of which a piece of 8 has 4 that are padding."""
    pieces = decompose(offsets_of([13]), 8, 16)
    assert (pieces.lengths.tolist(), pieces.sizes.tolist()) == ([8], [2])
    assert pieces.first_token.tolist() == [0, 8]
    assert (pieces.last_token.tolist(), pieces.filled_up) == ([13], 4)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(3, 6))
def test_every_prediction_of_every_document_is_in_one_piece(lengths, least, greatest):
    offsets = offsets_of(lengths)
    pieces = decompose(offsets, 2**least, 2**greatest)
    length_N = np.repeat(pieces.lengths, pieces.sizes)
    predicted: Counter[int] = Counter()
    documents = [range(begin, end) for begin, end in pairwise(offsets)]
    beyond = 0
    for first, length in zip(pieces.first_token.tolist(), length_N.tolist(), strict=True):
        own = next(document for document in documents if first in document)
        inside = range(first + 1, min(first + 1 + length, own.stop))
        predicted.update(inside)
        beyond += length - len(inside)
    assert predicted == Counter(token for document in documents for token in document[1:])
    assert beyond == pieces.filled_up


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.integers(0, 2**32))
def test_a_batch_has_one_length_and_the_labels_of_its_pieces(tmp_path_factory, lengths, seed):
    split = a_split(tmp_path_factory.mktemp("split"), lengths)
    data = BucketedDataset(split, 32, 0, least=4)
    batches = BucketBatches(data.pieces.sizes, data.pieces.lengths, 64, seed)
    offsets = offsets_of(lengths)
    predicted: Counter[int] = Counter()
    for n in range(len(batches)):
        batch = data[batches.batch(n)]
        length = batches.length(n)
        assert all(part.shape == batch["labels"].shape for part in batch.values())
        assert batch["labels"].shape[1] == length + 1
        assert batch["labels"].shape[0] <= 64 // length
        kept = batch["labels"] != -100
        predicted.update(batch["labels"][kept].tolist())
        assert torch.equal(batch["input_ids"][kept], batch["labels"][kept])
        # The token before a label is that before it in the document.
        before = torch.roll(batch["input_ids"], 1, dims=1)[kept]
        assert torch.equal(before + 1, batch["labels"][kept])
        assert batch["position_ids"].tolist() == [list(range(length + 1))] * len(kept)
    documents = [range(begin + 1, end + 1) for begin, end in pairwise(offsets)]
    assert predicted == Counter(token for document in documents for token in document[1:])


def test_a_padding_index_has_nothing_to_predict(tmp_path):
    data = BucketedDataset(a_split(tmp_path, [40]), 32, 0)
    last = len(data) - 1
    batch, empty = data[[last]], data[[padding(last)]]
    assert torch.equal(batch["input_ids"], empty["input_ids"])
    assert (empty["labels"] == -100).all()


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(0, 2**32))
def test_every_pass_has_each_piece_once(sizes, more, grow, cycles, seed):
    """Counted after every batch: in a bucket the times seen never differ by more than one."""
    lengths = [8 << number for number in range(len(sizes))]
    tokens = lengths[-1] << more
    plain = BucketBatches(sizes, lengths, tokens, seed)
    batches = BucketBatches(
        sizes,
        lengths,
        tokens,
        seed,
        odds="grow_p2" if grow else None,
        cycles=min(cycles, len(plain)),
    )
    first = np.cumsum([0, *sizes])
    seen = np.zeros(sum(sizes), dtype=int)
    for n in range(2 * len(batches)):
        pieces = batches.batch(n)
        bucket, _ = batches.bucket(n)
        assert len({*pieces}) == len(pieces) <= tokens // lengths[bucket]
        assert all(first[bucket] <= piece < first[bucket + 1] for piece in pieces)
        seen[pieces] += 1
        assert all(np.ptp(seen[a:b]) <= 1 for a, b in pairwise(first))
        if n + 1 in (len(batches), 2 * len(batches)):
            assert {*seen.tolist()} == {(n + 1) // len(batches)}


def test_buckets_take_turns_in_proportion_to_their_tokens():
    batches = BucketBatches([64, 64, 64], [8, 16, 32], 32)
    assert batches.batches.tolist() == [16, 32, 64]
    taken = np.cumsum(np.eye(3)[[batches.bucket(n)[0] for n in range(112)]], axis=0)
    even = np.arange(1, 113)[:, None] * np.array([16, 32, 64]) / 112
    assert np.abs(taken - even).max() <= 2  # one for each halving of the buckets


def test_with_odds_short_ones_come_first_and_the_shares_are_those_of_the_odds():
    """Rates are 4 x 20, 2 x 20 and 20: when the first is empty, half of the next is left."""
    assert stretches(np.array([20, 20, 20]), [4, 2, 1], 1) == [[20, 10, 5], [20, 20, 10], [20] * 3]
    assert stretches(np.array([4, 4]), [2, 1], 2) == [[2, 1], [2, 2], [4, 3], [4, 4]]
    batches = BucketBatches([80, 40, 20], [8, 16, 32], 32, odds="grow_p2")
    lengths = [batches.length(n) for n in range(60)]
    assert np.mean(lengths[:20]) < np.mean(lengths[20:40]) < np.mean(lengths[40:])
    assert lengths[-10:] == [32] * 10


def test_passes_and_seeds_have_orders_of_their_own():
    def stream(seed):
        batches = BucketBatches([200], [8], 80, seed)
        return [batches.batch(n) for n in range(2 * len(batches))]

    first = stream(0)
    assert first[:20] != first[20:]
    assert stream(1) != first == stream(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompose(offsets_of([9]), 8, 24), r"greatest=24\): must be a power of two"),
        (lambda: decompose(offsets_of([9]), 3, 8), r"least=3\): must be a power of two"),
        (lambda: decompose(offsets_of([9]), 16, 8), r"least=16\): must not be above the greatest"),
        (lambda: decompose(offsets_of([1, 1]), 8, 8), "no document has two tokens"),
        (lambda: BucketBatches([2], [16], 24), r"tokens=24\): must be a multiple of .*, 16"),
        (lambda: BucketBatches([2, 2], [8, 16], 16, odds=[1]), r"odds=\[1\]\): .*: 8, 16\."),
        (lambda: BucketBatches([2, 2], [8, 16], 16, odds="shrink"), "must be 'grow_p2', or"),
        (lambda: BucketBatches([2], [16], 16, odds=[0]), r"odds=0\): must be a positive"),
        (lambda: BucketBatches([2], [16], 16, cycles=3), r"cycles=3\): a pass has 2 batches"),
        (lambda: BucketBatches([2], [16], 16, cycles=0), r"cycles=0\): must be at least 1"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
