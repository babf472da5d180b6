"""What layers return, walked, told without values and made again."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lightning_align.strategies.pipeline.trees import (
    Meta,
    Unknown,
    filled,
    leaves,
    metas_of,
    tensors_in,
)

Pair = namedtuple("Pair", ["hidden", "rest"])
ONE, TWO = torch.ones(2, 3), torch.zeros(4, dtype=torch.long)
ONE_META, TWO_META = Meta((2, 3), torch.float32), Meta((4,), torch.long)
TREES: dict[str, tuple[Any, Any]] = {
    "tensor": (ONE, ONE_META),
    "tuple": ((ONE, None, TWO), (ONE_META, None, TWO_META)),
    "list in dict": ({"a": [ONE, 3], "b": "word"}, {"a": [ONE_META, 3], "b": "word"}),
    "named tuple": (Pair(ONE, (TWO, True)), Pair(ONE_META, (TWO_META, True))),
    "ordered": (OrderedDict(b=ONE, a=TWO), OrderedDict(b=ONE_META, a=TWO_META)),
    "of transformers": (
        BaseModelOutput(last_hidden_state=ONE),
        BaseModelOutput(last_hidden_state=ONE_META),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_keeps_its_kind_without_values_and_with_them_again(name: str) -> None:
    tree, metas = TREES[name]
    found = metas_of(tree)
    assert type(found) is type(metas)
    assert found == metas
    made: list[Meta] = []

    def make(meta: Meta) -> Tensor:
        made.append(meta)
        return torch.full(meta.shape, 7, dtype=meta.dtype)

    again = filled(found, make)
    assert type(again) is type(tree)
    assert made == [Meta(tuple(t.shape), t.dtype) for t in tensors_in(tree)]
    for ours, theirs in zip(leaves(again), leaves(tree), strict=True):
        if isinstance(theirs, Tensor):
            assert torch.equal(ours, torch.full_like(theirs, 7))
        else:
            assert ours == theirs


def test_tensors_come_in_the_order_of_the_tree() -> None:
    parts = [torch.tensor(float(number)) for number in range(4)]
    tree = {"b": (parts[0], [parts[1]]), "a": Pair(parts[2], {"x": parts[3]})}
    assert tensors_in(tree) == parts


def test_of_anything_else_only_the_class_is_told() -> None:
    metas = metas_of([ONE, nn.Identity()])
    assert metas == [ONE_META, Unknown("Identity")]
    assert list(leaves(metas)) == metas


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_like_a_meta_has_no_memory_and_carries_a_gradient_if_it_can(
    dtype: torch.dtype,
) -> None:
    like = Meta((2, 3), dtype).like()
    assert (like.shape, like.dtype, like.is_meta) == ((2, 3), dtype, True)
    assert like.requires_grad is dtype.is_floating_point
