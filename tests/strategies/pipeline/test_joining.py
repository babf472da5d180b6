"""What micro-batches come to, against the same rows in one piece."""

from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.strategies.pipeline.joining import Joiner, Mismatch, appended, fitting

EACH = [0.25] * 4
ROWS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()


def cut(rows: Tensor, count: int = 4) -> list[Tensor]:
    return list(rows.chunk(count))


REDUCTIONS: dict[str, Any] = {
    "sum": lambda rows: rows.sum(),
    "mean": lambda rows: rows.mean(),
    "max": lambda rows: rows.max(),
    "min": lambda rows: rows.min(),
    "geometric mean": lambda rows: rows.mean().exp(),  # a perplexity
    "root mean square": lambda rows: rows.square().mean().sqrt(),
    "norm": lambda rows: rows.square().sum().sqrt(),
    "rows": lambda rows: rows * 2,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_rule_of_a_reduction_is_found_and_holds_for_other_rows(name: str) -> None:
    reduce, joiner = REDUCTIONS[name], Joiner()
    joiner.learn("x", None, [reduce(part) for part in cut(ROWS)], reduce(ROWS), EACH)
    assert joiner.rules["x"][0] == name
    others = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    ours = joiner.join("x", None, [reduce(part) for part in cut(others)], EACH)
    torch.testing.assert_close(ours, reduce(others))


@pytest.mark.parametrize("reduce", [torch.median, lambda rows: rows.sum() / rows.abs().max()])
def test_what_no_rule_makes_is_said(reduce: Any) -> None:
    with pytest.raises(Mismatch) as caught:
        Joiner().learn("x", None, [reduce(part) for part in cut(ROWS)], reduce(ROWS), EACH)
    assert caught.value.path == "x"


class State:
    """One step of everything that modules keep in attributes."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {
            "rows": 10,
            "steps": 3,
            "ema": 0.5,
            "best": -9.0,
            "last": None,
            "outputs": [torch.zeros(2)],
            "predictions": [1, 2],
            "recent": deque([0.1, 0.2], maxlen=2),
            "totals": [1.0, 5],
            "pair": torch.tensor([3.0, 2.0]),
            "seen": {7},
            "counts": Counter({1: 2}),
            "by name": {"loss": 1.0},
            "numpy": np.zeros(3),
            "flag": False,
        }

    def after(self, rows: Tensor) -> dict[str, Any]:
        """The attributes after a step on rows, the old ones left as they are."""
        old, mean = self.value, float(rows.mean())
        signs = [int(value > 0) for value in rows[:, 0]]
        return {
            "rows": old["rows"] + len(rows),
            "steps": old["steps"] + 1,
            "ema": 0.9 * old["ema"] + 0.1 * mean,
            "best": max(old["best"], float(rows.max())),
            "last": rows[:, 0],
            "outputs": [*old["outputs"], {"x": rows, "loss": rows.mean()}],
            "predictions": [*old["predictions"], *signs],
            "recent": deque([*old["recent"], mean], maxlen=2),
            "totals": [old["totals"][0] + float(rows.sum()), old["totals"][1] + len(rows)],
            "pair": old["pair"] + torch.tensor([float(rows.sum()), 1.0]),
            "seen": {*old["seen"], *signs},
            "counts": old["counts"] + Counter(signs),
            "by name": {**old["by name"], "new": mean, "n": len(rows)},
            "numpy": old["numpy"] + rows.sum(0).numpy(),
            "flag": old["flag"] or bool(rows.max() > 0),
        }


# Always the same seeds: in one of 4000 (764) another rule makes the first batch's value by chance,
# which a run notices only when it compares again.
@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 10**6))
@example(seed=383)  # 3.0 and a sum of nearly -3.0
def test_attributes_of_every_kind_come_to_those_of_one_process(seed: int) -> None:
    """Learned on some rows, applied to others, from the state that the former left."""
    joiner, state = Joiner(), State()
    generator = torch.Generator().manual_seed(seed)
    for batch in range(3):
        rows = torch.randn(8, 3, generator=generator).double()
        whole, parts = state.after(rows), [state.after(part) for part in cut(rows)]
        for name, before in state.value.items():
            values = [part[name] for part in parts]
            if batch == 0:
                joiner.learn(name, before, values, whole[name], EACH)
            ours = joiner.join(name, before, values, EACH)
            if joiner.undecided:  # zero before, which does not tell a sum from a new value
                joiner.learn(name, before, values, whole[name], EACH)
                ours = joiner.join(name, before, values, EACH)
            assert not joiner.undecided
            assert type(ours) is type(whole[name]) or name == "counts"
            assert_same(ours, whole[name])
        state.value = whole
    assert not joiner.unseen


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, (list, deque)):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    elif isinstance(theirs, (float, Tensor, np.ndarray)):
        # Rules whose values are nearer than this are not told apart.
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=1e-4
        )
    else:
        assert ours == theirs


def test_weights_make_a_mean_over_uneven_numbers() -> None:
    joiner, shares = Joiner(), [0.1, 0.2, 0.3, 0.4]
    values = [1.0, 2.0, 3.0, 4.0]
    joiner.learn("x", None, values, 3.0, shares)
    assert joiner.rules["x"] == ["mean"]
    joiner.learn("y", None, values, 2.5, shares)
    assert joiner.rules["y"] == ["mean over rows"]


def test_zeros_do_not_tell_their_rule_until_they_differ() -> None:
    joiner = Joiner()
    joiner.learn("correct", 5, [5, 5], 5, [0.5, 0.5])
    assert len(joiner.rules["correct"]) > 1
    joiner.join("correct", 5, [6, 7], [0.5, 0.5])
    assert joiner.undecided == {"correct"}
    joiner.learn("correct", 5, [6, 7], 8, [0.5, 0.5])
    assert joiner.undecided == set()
    assert joiner.rules["correct"] == ["sum"]


def test_what_was_not_learned_is_named() -> None:
    joiner = Joiner()
    assert joiner.join("n", 5, [6, 6], [0.5, 0.5]) == 7
    assert torch.equal(joiner.join("p", None, [torch.ones(1)] * 2, [0.5, 0.5]), torch.ones(2))
    assert joiner.unseen == {"n", "p"}


def test_outputs_that_nothing_was_learned_of_are_joined_by_their_kind() -> None:
    first = {"logits": torch.ones(2, 3), "loss": torch.tensor(1.0), "texts": ["a", "b"], "no": None}
    second = {"logits": torch.zeros(2, 3), "loss": torch.tensor(3.0), "texts": ["c"], "no": None}
    joined = Joiner().join("output", None, [first, second], [0.5, 0.5])
    assert joined["logits"].shape == (4, 3)
    assert joined["loss"] == 2.0
    assert joined["texts"] == ["a", "b", "c"]
    assert joined["no"] is None
    rows, count = Joiner().join(
        "output", None, [(torch.zeros(1), 1), (torch.ones(1), 1)], [0.5] * 2
    )
    assert torch.equal(rows, torch.tensor([0.0, 1.0]))
    assert count == 2


def test_appended_entries_of_lists_and_of_bounded_deques() -> None:
    first, second, third = object(), object(), object()
    assert appended([first], [first, second]) == [second]
    assert appended(None, [first]) == [first]
    assert appended([first], [second]) == []  # put in its place
    bounded = deque([first, second], maxlen=2)
    assert appended(bounded, deque([second, third], maxlen=2)) == [third]


def test_a_list_that_one_micro_batch_began_may_have_an_entry_each_or_all() -> None:
    """As in ``by_class[predicted].append(target)``, where only one had the class at first."""
    joiner = Joiner()
    joiner.learn("by_class", {}, [{1: [5]}, {}], {1: [5]}, [0.5, 0.5])
    begun, parts = {1: [5]}, [{1: [5, 6]}, {1: [5, 7]}]
    joiner.join("by_class", begun, parts, [0.5, 0.5])
    assert "by_class[1]" in joiner.undecided
    joiner.learn("by_class", begun, parts, {1: [5, 6, 7]}, [0.5, 0.5])
    assert joiner.join("by_class", begun, parts, [0.5, 0.5]) == {1: [5, 6, 7]}


def test_a_sum_that_cancels_is_as_exact_as_its_summands() -> None:
    before, parts = torch.tensor(3.0), [torch.tensor(v) for v in (3.5966, 3.5316, 4.0472, -2.1831)]
    whole = before + sum(part - before for part in parts) + 2e-7
    assert fitting(before, parts, whole, [0.25] * 4, 2e-5) == ["sum"]
