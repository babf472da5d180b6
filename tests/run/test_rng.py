import random
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_align.run.rng import generator_state, reseed, set_generator_state, undrawn
from lightning_align.seeds import derive_seed


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_same_position_gives_the_same_draws_whatever_came_before() -> None:
    reseed(1, 7, 0, "train")
    first = draws()
    draws()
    reseed(1, 7, 0, "train")
    assert draws() == first


@pytest.mark.parametrize(
    "other", [(2, 7, 0, "train"), (1, 8, 0, "train"), (1, 7, 1, "train"), (1, 7, 0, "validate")]
)
def test_seed_position_rank_and_stage_each_change_the_draws(
    other: tuple[int, int, int, str],
) -> None:
    reseed(1, 7, 0, "train")
    first = draws()
    reseed(*other)
    assert all(ours != theirs for ours, theirs in zip(first, draws(), strict=True))


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 4096))
def test_any_seed_and_position_fit_all_three_generators(
    seed: int, position: int, rank: int
) -> None:
    reseed(seed, position, rank, "train")
    assert torch.initial_seed() == derive_seed(seed, position, rank, "train")


def test_costs_no_note_of_the_callers_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each accelerator that was not started ``torch.manual_seed`` takes one, 0.2 ms each."""
    monkeypatch.setattr(traceback, "format_stack", lambda: pytest.fail("a stack was noted"))
    reseed(1, 7, 0, "train")


OWN: dict[str, tuple[Any, Callable[[Any], float]]] = {
    "random": (random.Random(1), lambda own: own.random()),
    "RandomState": (np.random.RandomState(1), lambda own: own.rand()),
    "default_rng": (np.random.default_rng(1), lambda own: own.random()),
    "torch": (torch.Generator().manual_seed(1), lambda own: float(torch.rand((), generator=own))),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_generator_goes_on_from_a_state_of_it(kind: str) -> None:
    own, draw = OWN[kind]
    state = generator_state(own)
    first = [draw(own), draw(own)]
    set_generator_state(own, state)
    assert [draw(own), draw(own)] == first


def test_only_generators_have_such_a_state() -> None:
    assert [generator_state(value) for value in (1, "random", torch.zeros(1), nn.ReLU())] == [
        None
    ] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_apart_is_drawn_again(fails: bool) -> None:
    reseed(1, 7, 0, "train")
    try:
        with undrawn(torch.device("cpu")):
            first = draws()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert draws() == first
