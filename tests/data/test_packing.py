import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.packing import PackedDataset
from lightning_align.data.sampler import PositionSampler, padding
from lightning_align.data.token_cache import TokenSplit

PAD = 9999


def packed(tokens, block_size, lengths=None, **options):
    """A dataset over tokens in memory: what is memory-mapped is put in its place."""
    tokens = np.asarray(tokens, dtype=np.uint16)
    lengths = lengths or [len(tokens)]
    split = TokenSplit("folder", "train", "uint16", len(tokens), len(lengths), "hash")
    split.__dict__["tokens"] = tokens
    split.__dict__["offsets"] = np.cumsum([0, *lengths])
    return PackedDataset(split, block_size, PAD, **options)


def test_worked_example():
    """Seven tokens in blocks of four: blocks share token 14, and the second is filled up."""
    batch = packed([10, 11, 12, 13, 14, 15, 16], 4)[[1, 0]]
    expected = [[14, 15, 16, PAD, PAD], [10, 11, 12, 13, 14]]
    assert batch["input_ids"].tolist() == expected
    assert batch["labels"].tolist() == [[14, 15, 16, -100, -100], expected[1]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_token_is_predicted_exactly_once(num_tokens, block_size, batch_size, world):
    """Over all ranks and batches of a pass, each with the right token before it."""
    dataset = packed(range(num_tokens), block_size)
    predicted = []
    for rank in range(world):
        sampler = PositionSampler(len(dataset), batch_size, num_replicas=world, rank=rank)
        for indices in sampler:
            batch = dataset[indices]
            inputs, labels = batch["input_ids"][:, :-1], batch["labels"][:, 1:]
            kept = labels != -100
            assert (inputs[kept] == labels[kept] - 1).all()
            predicted += labels[kept].tolist()
    assert sorted(predicted) == list(range(1, num_tokens))


def test_a_padding_index_is_the_same_block_with_nothing_to_predict():
    dataset = packed(range(20), 6)
    real, empty = dataset[[2]], dataset[[padding(2)]]
    assert torch.equal(real["input_ids"], empty["input_ids"])
    assert (empty["labels"] == -100).all()
    assert (real["labels"] != -100).all()


def test_a_batch_owns_its_tokens():
    """Changing a batch in place must not change the corpus."""
    dataset = packed(range(20), 6)
    dataset[[0]]["input_ids"][:] = 0
    assert dataset[[0]]["input_ids"][0].tolist() == list(range(7))


def test_separate_documents_worked_example():
    """Documents of 3, 2 and 4 tokens in blocks of six: positions start again at each of them.

    The first tokens of the documents, 10, 20 and 30, are never predicted. The last block begins in
    the middle of the third document, and what fills it up is a document of its own.
    """
    tokens = [10, 11, 12, 20, 21, 30, 31, 32, 33]
    batch = packed(tokens, 6, [3, 2, 4], separate_documents=True)[[0, 1]]
    assert batch["input_ids"].tolist() == [tokens[:7], [31, 32, 33, PAD, PAD, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [
        [-100, 11, 12, -100, 21, -100, 31],
        [-100, 32, 33, -100, -100, -100, -100],
    ]
    assert batch["position_ids"].dtype == torch.int64
    assert "position_ids" not in packed(tokens, 6, [3, 2, 4])[[0]]


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda found: sum(found) > 1)


@settings(deadline=None)
@given(lengths, st.integers(1, 40), st.integers(1, 5), st.integers(1, 3))
def test_separate_documents_predict_every_token_but_their_first_exactly_once(
    lengths, block_size, batch_size, world
):
    """And each from the token before it, which is of the same document."""
    number = sum(lengths)
    first = set(np.cumsum([0, *lengths[:-1]]).tolist())
    dataset = packed(range(number), block_size, lengths, separate_documents=True)
    predicted = []
    for rank in range(world):
        for indices in PositionSampler(len(dataset), batch_size, num_replicas=world, rank=rank):
            batch = dataset[indices]
            inputs, labels = batch["input_ids"][:, :-1], batch["labels"][:, 1:]
            kept = labels != -100
            assert (inputs[kept] == labels[kept] - 1).all()
            assert (batch["position_ids"][:, 1:][kept] > 0).all()
            predicted += labels[kept].tolist()
    assert sorted(predicted) == sorted(set(range(1, number)) - first)


@settings(deadline=None)
@given(lengths, st.integers(1, 40))
def test_positions_count_from_the_beginning_of_the_document_or_of_the_block(lengths, block_size):
    number = sum(lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    dataset = packed(range(number), block_size, lengths, separate_documents=True)
    for block in range(len(dataset)):
        begin = block * block_size
        [positions] = dataset[[block]]["position_ids"].tolist()
        expected = [
            min(int(place[token]), token - begin)
            for token in range(begin, min(begin + block_size + 1, number))
        ]
        assert positions[: len(expected)] == expected


@settings(deadline=None)
@given(st.lists(st.integers(2, 80), min_size=1, max_size=4), st.integers(1, 20), st.booleans())
def test_no_block_reaches_from_one_corpus_into_the_next(corpora, block_size, separate):
    """Every token of every corpus is predicted exactly once, but for the first of each."""
    options = {"corpora": corpora, "separate_documents": separate}
    dataset = packed(range(sum(corpora)), block_size, corpora, **options)
    assert len(dataset) == sum(dataset.sizes)
    assert dataset.sizes == [-(-(number - 1) // block_size) for number in corpora]
    first = np.cumsum([0, *corpora]).tolist()
    block = 0
    for number, begin in zip(dataset.sizes, first[:-1], strict=True):
        batch = dataset[range(block, block + number)]
        labels = batch["labels"][:, 1:]
        end = first[first.index(begin) + 1]
        assert labels[labels != -100].tolist() == list(range(begin + 1, end))
        assert batch["input_ids"][0, 0] == begin
        block += number
