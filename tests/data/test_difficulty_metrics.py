import functools
import math
import zlib

import numpy as np
import pytest
import torch

from lightning_align.data.difficulty_metrics import (
    CompressionRatio,
    VocabularyRarity,
    count_tokens,
    length,
    metric_key,
    tokens_of,
)

PADDED = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]),
}


@pytest.mark.parametrize(
    ("sample", "tokens"),
    [
        ("aé", [97, 195, 169]),
        (b"a\xff", [97, 255]),
        ([1, 2, 3], [1, 2, 3]),
        (np.array([[1, 2]]), [1, 2]),
        (torch.tensor([4, 5]), [4, 5]),
        ({"input_ids": [1, 2]}, [1, 2]),
        (PADDED, [5, 6, 7, 8]),
        ({"input_ids": [[1, 2, 0, 0]], "labels": [[-100, 2, -100, -100]]}, [1, 2]),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, []),
    ],
)
def test_tokens_are_those_of_no_padding(sample, tokens):
    assert tokens_of(sample).tolist() == tokens


def test_what_has_no_tokens_is_refused():
    with pytest.raises(ValueError, match="must have input_ids; it has 'text'"):
        tokens_of({"text": "a"})
    with pytest.raises(ValueError, match="tokens must be whole numbers"):
        tokens_of([0.5])


def test_length_is_of_characters_or_tokens():
    assert length("aé") == 2
    assert length(PADDED) == 4


def test_rarity_is_the_sum_of_minus_log_p():
    """Token 1 is half of all, tokens 0 and 3 a quarter each: 2 log 2 + log 4 = 4 log 2."""
    counts = count_tokens([[1], [0, 3, 1]])
    assert counts.tolist() == [1, 2, 0, 1]
    assert VocabularyRarity(counts)([1, 1, 3]) == pytest.approx(4 * math.log(2))
    assert VocabularyRarity(counts, per_token=True)([1, 1]) == pytest.approx(math.log(2))
    assert VocabularyRarity(counts)([]) == 0
    assert VocabularyRarity(counts)([99]) == pytest.approx(math.log(4)), "as rare as the rarest"


def test_what_repeats_itself_is_easy():
    text = "to and fro " * 20
    ratio = len(zlib.compress(text.encode(), 6)) / len(text)
    assert CompressionRatio()(text) == ratio < 0.2
    decode = functools.partial(bytes.decode, encoding="ascii")
    assert CompressionRatio(lambda ids: decode(bytes(ids)))(list(text.encode())) == ratio
    assert CompressionRatio()([7] * 100) < CompressionRatio()(list(range(100)))
    assert CompressionRatio()("") == 1


def same(sample):
    return len(sample)


def test_a_key_tells_metrics_apart():
    def other(sample):
        return len(sample) + 1

    def like_other(sample):
        return len(sample) + 2

    like_other.__qualname__ = other.__qualname__
    rare = [VocabularyRarity(np.array(counts)) for counts in ([1, 2], [1, 3])]
    metrics = [same, other, like_other, length, *rare, CompressionRatio(), CompressionRatio(str)]
    assert len({metric_key(metric) for metric in metrics}) == len(metrics)
    assert metric_key(same) == metric_key(same)
    assert metric_key(len) != metric_key(sum)


def test_a_metric_that_holds_what_cannot_be_compared_needs_a_key():
    model = torch.nn.Linear(2, 2)

    def scored(sample):
        return float(model(sample))

    with pytest.raises(
        ValueError, match=r"metrics='.*scored'\): cannot be told .*a Linear.*attribute key"
    ):
        metric_key(scored)
    scored.key = "scored by the first model"
    assert metric_key(scored) == "scored by the first model"
