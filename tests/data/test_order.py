"""The order of samples, and that it is what it always was."""

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lightning_align.data.mixture import Mixture, draw_order
from lightning_align.data.order import Order, Sequential, mixed, shuffled
from lightning_align.data.sampler import PositionSampler

# Samples, batch size, replicas, options -> digest of the batches of all ranks over three passes and
# a half. Recorded when the sampler drew its orders itself: a checkpoint of an older version goes on
# with the batches that it would have seen.
STREAMS: list[tuple[int, int, int, dict[str, Any], str]] = [
    (1, 1, 1, {"seed": 0}, "9ac62f99a8fd50e6"),
    (1, 1, 1, {"seed": 5}, "9ac62f99a8fd50e6"),
    (1, 1, 1, {"seed": 9223372036854775807}, "9ac62f99a8fd50e6"),
    (1, 1, 1, {"shuffle": False}, "9ac62f99a8fd50e6"),
    (1, 1, 3, {"seed": 0}, "e985d4a0d4a84aa0"),
    (1, 1, 3, {"seed": 5}, "e985d4a0d4a84aa0"),
    (1, 1, 3, {"seed": 9223372036854775807}, "e985d4a0d4a84aa0"),
    (1, 1, 3, {"shuffle": False}, "e985d4a0d4a84aa0"),
    (7, 3, 1, {"seed": 0}, "88529861b183f84e"),
    (7, 3, 1, {"seed": 5}, "d8f25b6f78792608"),
    (7, 3, 1, {"seed": 9223372036854775807}, "96757e3f4cab2c81"),
    (7, 3, 1, {"shuffle": False}, "3a92a5251bb70cce"),
    (7, 3, 3, {"seed": 0}, "acc73d1a56289cc2"),
    (7, 3, 3, {"seed": 5}, "6aca526ae41b3b2d"),
    (7, 3, 3, {"seed": 9223372036854775807}, "ed39a31eebe6d953"),
    (7, 3, 3, {"shuffle": False}, "08abfbfce77e55c9"),
    (64, 8, 1, {"seed": 0}, "184c63dc9b99d377"),
    (64, 8, 1, {"seed": 5}, "eedcef4d374871ea"),
    (64, 8, 1, {"seed": 9223372036854775807}, "e757e578968f8be7"),
    (64, 8, 1, {"shuffle": False}, "5c3d011b39b5b316"),
    (64, 8, 3, {"seed": 0}, "9290167eb4f10f26"),
    (64, 8, 3, {"seed": 5}, "4119a9458cdec85d"),
    (64, 8, 3, {"seed": 9223372036854775807}, "edea4b27427d4da7"),
    (64, 8, 3, {"shuffle": False}, "7e6bf7feecb37133"),
    (1001, 4, 1, {"seed": 0}, "cbd68bfb0c6a7850"),
    (1001, 4, 1, {"seed": 5}, "ca98c8eb89424119"),
    (1001, 4, 1, {"seed": 9223372036854775807}, "2066c6b4cbf5a3fd"),
    (1001, 4, 1, {"shuffle": False}, "255cf248c42dfc2d"),
    (1001, 4, 3, {"seed": 0}, "b050ba82720ee27c"),
    (1001, 4, 3, {"seed": 5}, "91d8e3607014f927"),
    (1001, 4, 3, {"seed": 9223372036854775807}, "432f35c839480267"),
    (1001, 4, 3, {"shuffle": False}, "824fa8d86acdc99a"),
    (7, 3, 1, {"seed": 0, "mixture": [[5, 2], [1, 1]]}, "1ce368b74acf54dc"),
    (7, 3, 1, {"seed": 11, "mixture": [[5, 2], [1, 1]]}, "ace1cc4c88a32c58"),
    (7, 3, 4, {"seed": 0, "mixture": [[5, 2], [1, 1]]}, "d6597c55a5ddec1a"),
    (7, 3, 4, {"seed": 11, "mixture": [[5, 2], [1, 1]]}, "2f6cbfc6c2a78012"),
    (64, 3, 1, {"seed": 0, "mixture": [[30, 34], [0.2, 0.8]]}, "8ee36d7a76663b69"),
    (64, 3, 1, {"seed": 11, "mixture": [[30, 34], [0.2, 0.8]]}, "e1626f784601edf4"),
    (64, 3, 4, {"seed": 0, "mixture": [[30, 34], [0.2, 0.8]]}, "79532bbe7b35705b"),
    (64, 3, 4, {"seed": 11, "mixture": [[30, 34], [0.2, 0.8]]}, "6a4f634dda08d717"),
    (1001, 3, 1, {"seed": 0, "mixture": [[100, 1, 900], [3, 0.015, 1]]}, "8f2fa6e783c826aa"),
    (1001, 3, 1, {"seed": 11, "mixture": [[100, 1, 900], [3, 0.015, 1]]}, "93f5dcec22cff70b"),
    (1001, 3, 4, {"seed": 0, "mixture": [[100, 1, 900], [3, 0.015, 1]]}, "b9a5f5f467c6d93f"),
    (1001, 3, 4, {"seed": 11, "mixture": [[100, 1, 900], [3, 0.015, 1]]}, "3dc6b169a8f012b8"),
]


def digest(num_samples: int, batch_size: int, replicas: int, options: dict[str, Any]) -> str:
    if mixture := options.get("mixture"):
        options = {**options, "mixture": Mixture(*mixture)}
    samplers = [
        PositionSampler(num_samples, batch_size, num_replicas=replicas, rank=rank, **options)
        for rank in range(replicas)
    ]
    batches = len(samplers[0])
    stream = [[s.batch(n) for s in samplers] for n in range(3 * batches + batches // 2 + 1)]
    far = [[s.batch(n) for s in samplers] for n in (1000 * batches, 7)]  # and back again
    return hashlib.blake2b(json.dumps([stream, far]).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(("num_samples", "batch_size", "replicas", "options", "recorded"), STREAMS)
def test_streams_are_those_of_older_versions(
    num_samples: int, batch_size: int, replicas: int, options: dict[str, Any], recorded: str
) -> None:
    assert digest(num_samples, batch_size, replicas, options) == recorded


# Any order


class Paced:
    """A curriculum: of samples from easy to hard, the easiest two at first, and one more per four.

    Knows nothing of the sampler, and is pure, as an order must be.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed = num_samples, seed

    def indices(self, first: int, last: int) -> list[int]:
        reach = [min(self.num_samples, 2 + place // 4) for place in range(first, last)]
        places = zip(range(first, last), reach, strict=True)
        return [int(draw_order(hardest, self.seed, "paced", n)[0]) for n, hardest in places]


ORDERS: dict[str, Callable[[int, int], Order]] = {
    "sequential": lambda num_samples, _: Sequential(num_samples),
    "shuffled": shuffled,
    "mixed": lambda num_samples, seed: mixed(Mixture([1, num_samples - 1], [1, 1]), seed),
    "paced": Paced,
}
every_order = pytest.mark.parametrize("name", ORDERS)


@every_order
@settings(deadline=None)
@given(data=st.data(), num_samples=st.integers(2, 40), seed=st.integers(0, 2**63 - 1))
def test_a_stretch_is_the_same_however_it_is_asked_for(
    name: str, data: st.DataObject, num_samples: int, seed: int
) -> None:
    """Over the ends of passes as well, and whatever was asked before."""
    cuts = data.draw(st.lists(st.integers(0, 130), min_size=2, max_size=6).map(sorted))
    order = ORDERS[name](num_samples, seed)
    pieces = [order.indices(first, last) for first, last in reversed([*pairwise(cuts)])]
    whole = ORDERS[name](num_samples, seed).indices(cuts[0], cuts[-1])
    assert [index for piece in reversed(pieces) for index in piece] == whole
    assert len(whole) == cuts[-1] - cuts[0]
    assert all(0 <= index < num_samples for index in whole)


@every_order
@settings(deadline=None)
@given(num_samples=st.integers(2, 40), batch_size=st.integers(1, 5), world=st.integers(1, 4))
def test_the_batches_of_all_ranks_are_the_stream(
    name: str, num_samples: int, batch_size: int, world: int
) -> None:
    """Whatever the order is, it takes its place in the sampler by being put there."""
    samplers = [
        PositionSampler(num_samples, batch_size, num_replicas=world, rank=rank)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.order = ORDERS[name](num_samples, 3)
    batches = range(2 * len(samplers[0]))
    seen = [i for n in batches for sampler in samplers for i in sampler.batch(n) if i >= 0]
    assert seen == ORDERS[name](num_samples, 3).indices(0, 2 * num_samples)


class Rows(Dataset[list[int]]):
    def __getitem__(self, indices: list[int]) -> list[int]:  # type: ignore[override]
        return indices


def test_a_curriculum_reaches_the_loader() -> None:
    """Four samples per batch, of the easiest two, three and four: each of them may come twice."""
    sampler = PositionSampler(12, 4)
    sampler.order = Paced(12, seed=0)
    batches = list(DataLoader(Rows(), sampler=sampler, batch_size=None))
    assert [index for batch in batches for index in batch] == Paced(12, seed=0).indices(0, 12)
    assert all(max(batch) <= limit for batch, limit in zip(batches, (1, 2, 3), strict=True))


def test_a_shuffled_pass_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order, drawn = shuffled(10, seed=0), []
    look_up = order.look_up
    monkeypatch.setattr(order, "look_up", lambda place: drawn.append(place // 10) or look_up(place))
    for first in (0, 3, 8, 12, 15):
        order.indices(first, first + 3)
    assert drawn == [0, 1]
