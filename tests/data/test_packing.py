import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.packing import PackedDataset
from lightning_align.data.sampler import PositionSampler, padding
from lightning_align.data.token_cache import TokenSplit

PAD = 9999


def packed(tokens, block_size):
    """A dataset over tokens in memory: what is memory-mapped is put in its place."""
    tokens = np.asarray(tokens, dtype=np.uint16)
    split = TokenSplit("folder", "train", "uint16", len(tokens), 1, "hash")
    split.__dict__["tokens"] = tokens
    return PackedDataset(split, block_size, PAD)


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
