"""Laws of a datamodule alone: batch n is a function of (seed, n), whatever asks for it."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import DATAMODULES, Member, build
from tests.laws.runs import with_arguments

Batches = list[dict[str, Tensor]]


def make(member: Member, material: Path, *, position: int = 0, **arguments: Any) -> Any:
    """The datamodule, set up, in a run that has consumed ``position`` batches."""
    spec = with_arguments(member.spec, **{"batch_size": 4, **arguments})
    data = build(spec, {"data": str(material), "run": ""})
    data.setup("fit")
    data.skipped = position
    return data


def same(ours: Batches, theirs: Batches) -> bool:
    return len(ours) == len(theirs) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(ours, theirs, strict=True)
    )


def starts_anywhere(member: Member, material: Path) -> None:
    """Two passes from the beginning; then from a position, what is left of them."""
    data = make(member, material)
    whole = list(data.train_dataloader())
    length = len(whole)
    data.skipped = length
    whole += list(data.train_dataloader())
    for position in (1, length - 1, length):
        ours = list(make(member, material, position=position).train_dataloader())
        assert same(ours, whole[position : position + length]), "another stream of batches"


def needs_no_number_of_workers(member: Member, material: Path) -> None:
    ours = list(make(member, material, num_workers=2).train_dataloader())
    assert same(ours, list(make(member, material).train_dataloader())), "workers change batches"


def follows_its_seed(member: Member, material: Path) -> None:
    # Nothing held out: the seed would also choose what.
    streams = [
        list(make(member, material, seed=seed, val_fraction=0.0).train_dataloader())
        for seed in (0, 0, 1)
    ]
    assert same(streams[0], streams[1]), "one seed, two streams"
    assert not same(streams[0], streams[2]), "the seed has no effect"


def round_trips(member: Member, material: Path) -> None:
    """Its state is plain, comes back as it was, and is refused by a run of other batches."""
    state = make(member, material, position=3).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make(member, material)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state, "the state has changed"
    for other in ({"batch_size": 2}, {"seed": 5}):
        refused = False
        try:
            make(member, material, **other).load_state_dict(state)
        except ValueError:
            refused = True
        assert refused, f"a state was taken in spite of {other}"


def covers_everything_once(member: Member, material: Path) -> None:
    """Over two ranks, a pass has every sample exactly once."""
    rows = []
    for rank in range(2):
        data = make(member, material)
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"num_replicas": 2, "rank": rank},
            overfit_batches=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(
                    batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0))
                )
            ),
        )
        rows += [sample for batch in data.train_dataloader() for sample in samples(batch)]
    one = [
        sample for batch in make(member, material).train_dataloader() for sample in samples(batch)
    ]
    assert len(one) == len(set(one)), "a sample came twice"
    assert sorted(rows) == sorted(one), "two ranks saw other samples than one"


def samples(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """What there is to learn in a batch, as one tuple of tokens per row; padding is left out."""
    if "completion_mask" in batch:
        kept = batch["attention_mask"].bool()
        taught = batch["completion_mask"].any(1)
    else:
        kept = batch["labels"] != -100
        taught = kept.any(1)
    tokens = batch["input_ids"]
    return [
        tuple(row[mask].tolist())
        for row, mask, any_ in zip(tokens, kept, taught, strict=True)
        if any_
    ]


Law = Callable[[Member, Path], None]
LAWS: dict[str, Law] = {
    "starts anywhere": starts_anywhere,
    "any number of workers": needs_no_number_of_workers,
    "follows its seed": follows_its_seed,
    "state round-trips, other runs' is refused": round_trips,
    "every sample once, over the ranks": covers_everything_once,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("data", DATAMODULES, ids=str)
def test_datamodules(data: Member, law: str, material: Path) -> None:
    if law in data.exempt:
        with pytest.raises(AssertionError):
            LAWS[law](data, material)
        note("Datamodules alone", law, data.name, f"no: {data.exempt[law]}")
    else:
        LAWS[law](data, material)
        note("Datamodules alone", law, data.name, "yes")


@pytest.mark.parametrize("law", LAWS)
def test_the_law_fails_where_it_is_broken(law: str, material: Path) -> None:
    with pytest.raises(AssertionError):
        LAWS[law](broken.DATAMODULES[law], material)
