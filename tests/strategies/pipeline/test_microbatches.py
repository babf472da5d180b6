import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.strategies.pipeline import microbatches
from tests.helpers.tiny_models import VOCAB_SIZE


@given(rows=st.integers(1, 40), wanted=st.integers(1, 40))
def test_a_batch_is_cut_into_equal_parts_that_make_it_up(rows: int, wanted: int) -> None:
    batch = {"x": torch.arange(rows * 2).reshape(rows, 2), "scale": torch.tensor(3.0), "name": "a"}
    count = microbatches.count_that_divides(rows, wanted)
    parts = microbatches.split_batch(batch, count)
    assert 1 <= count <= wanted
    assert len({len(part["x"]) for part in parts}) == 1
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert all(part["scale"] == 3.0 and part["name"] == "a" for part in parts)
    larger = range(count + 1, min(rows, wanted) + 1)
    assert not any(rows % other == 0 for other in larger)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([3])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4])},
        {"a": torch.tensor([1.0, 2.0, 0.0]), "b": torch.tensor([3])},
    ],
    ids=["order", "value", "size"],
)
def test_checksum_tells_batches_apart(other: dict[str, torch.Tensor]) -> None:
    batch = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    assert torch.equal(microbatches.checksum(batch), microbatches.checksum(batch))
    assert not torch.equal(microbatches.checksum(batch), microbatches.checksum(other))


def test_tokens_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one first dimension"):
        microbatches.batch_rows({"a": torch.zeros(2), "b": torch.zeros(3, VOCAB_SIZE)})
