"""Batches left out in mid-run: as if the run had been told before it began, bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.capture import RunState, capture, restore
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.skipping import (
    add_skipped,
    check_begins_anew,
    skip_batches,
    skipped_batches,
    stream_position,
)
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.run.test_capture import Calls, Parts, everything, fit, lisa, ours

Ranges = list[tuple[int, int]]


class Told(pl.Callback):
    """Passes over ranges from the start, or in the middle."""

    def __init__(self, ranges: Ranges, after: int = 0) -> None:
        self.ranges, self.after = ranges, after
        self.positions: list[int] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        if self.after == 0:
            skip_batches(trainer, self.ranges)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.positions.append(stream_position(trainer))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.after == len(self.positions):
            skip_batches(trainer, self.ranges)


class GoesBack(pl.Callback):
    """After batch ``until`` it goes back to ``at`` and leaves out what came between, and more."""

    def __init__(self, *jumps: tuple[int, int, int]) -> None:
        self.jumps = list(jumps)
        self.states: dict[int, RunState] = {}
        self.before: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        position = stream_position(trainer)
        if not self.jumps:
            return
        at, until, more = self.jumps[0]
        if position == at:
            self.states[at] = capture(trainer)
        if position == until:
            self.jumps.pop(0)
            restore(trainer, self.states[at])
            skip_batches(trainer, [(at, until + more)])
            self.went_back(trainer)

    def went_back(self, trainer: Any) -> None:
        """For a test to look at."""


def run(build: Callable[[], Parts], *callbacks: pl.Callback, **options: Any) -> list[str]:
    pl.seed_everything(3, verbose=False)
    module, others, data = build()
    return fit(module, *others, *callbacks, data=data, **options)


def told_before_and_in_the_middle(
    build: Callable[[], Parts], ranges: Ranges, after: int, **options: Any
) -> list[int]:
    """The law; returns the numbers of the batches that were trained."""
    before, later = Told(ranges), Told(ranges, after)
    assert run(build, before, **options) == run(build, later, **options)
    assert before.positions == later.positions
    return before.positions


KINDS = ["shuffled", "stateful", "stream", "stateful-stream"]
MORE = ["generator", "workers", "two", "mixed", "persistent", "stream-workers"]


@pytest.mark.parametrize(
    "loader",
    [*KINDS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in (*KINDS[2:], *MORE))],
)
def test_told_in_mid_epoch(loader: str) -> None:
    positions = told_before_and_in_the_middle(lambda: everything(loader), [(3, 5), (8, 9)], after=2)
    kept = [n for n in range(100) if n not in {3, 4, 8}]
    assert positions == kept[: len(positions)]


# Six batches are a pass: to its end, over an end, whole passes, from the start.
RANGES: list[Ranges] = [[(4, 6)], [(5, 8)], [(3, 17)], [(0, 2), (6, 7)], [(2, 3), (12, 20)]]


@pytest.mark.slow
@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize("loader", [*KINDS, "mixed"])
def test_wherever_the_ranges_lie(loader: str, ranges: Ranges) -> None:
    after = 2 if ranges[0][0] >= 2 else 0
    told_before_and_in_the_middle(lambda: everything(loader), ranges, after)
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    told_before_and_in_the_middle(lambda: everything(loader), ranges, after, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["shuffled", "stateful", "workers"])
def test_in_limited_epochs(loader: str) -> None:
    """A pass then has four batches; the number of a batch says so."""
    options = {"limit_train_batches": 4, "val_check_interval": 2}
    told_before_and_in_the_middle(lambda: everything(loader), [(2, 3), (7, 9)], 2, **options)


class Still(Stranger):
    """It never learns, so that a loss is of a batch and its draws alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class ByPosition(Told):
    """Notes the loss of each batch by its number in the stream."""

    def __init__(self, ranges: Ranges, after: int = 0) -> None:
        super().__init__(ranges, after)
        self.losses: dict[int, str] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses[self.positions[-1]] = float(outputs["loss"]).hex()
        super().on_train_batch_end(trainer)


@pytest.mark.parametrize(
    "loader",
    ["shuffled", *(pytest.param(n, marks=pytest.mark.slow) for n in (*KINDS[1:], *MORE))],
)
def test_the_others_are_what_they_would_have_been(loader: str) -> None:
    """The same rows, noise and dropout as in a run that leaves nothing out."""
    whole, ours = ByPosition([]), ByPosition([(3, 5), (6, 8)], after=2)
    run(lambda: (Still(loader), [], None), whole)
    run(lambda: (Still(loader), [], None), ours)
    assert len(set(whole.losses.values())) == 18
    common = whole.losses.keys() & ours.losses.keys()
    assert common == set(range(18)) - {3, 4, 6, 7}
    assert {n: whole.losses[n] for n in common} == {n: ours.losses[n] for n in common}


def test_an_epoch_trains_as_many_batches_and_goes_on_in_the_next_pass() -> None:
    told = Told([(1, 3), (11, 13)])
    lines = run(lambda: everything("shuffled"), told)
    assert told.positions == [0, *range(3, 11), *range(13, 22)]
    assert [line.split()[:2] for line in lines[1:] if " batch " not in line] == [
        [str(n), what] for n in (6, 12, 18) for what in ("validation", "epoch")
    ]


def test_data_without_a_length_end_an_epoch_where_they_end() -> None:
    """Nothing is left of the first pass behind the third batch, nor of the whole second one."""
    told = Told([(3, 12), (15, 16)])
    lines = run(lambda: everything("stream"), told)
    assert told.positions == [0, 1, 2, 12, 13, 14, 16, 17, *range(18, 24)]
    epochs = [line.split()[0] for line in lines if line.split()[1] == "epoch"]
    assert epochs == ["3", "8", "14"]


def test_an_epoch_that_ends_because_the_rest_is_left_out() -> None:
    ranges = [(3, 6)]
    positions = told_before_and_in_the_middle(lambda: everything("stream", "epoch"), ranges, 3)
    assert positions == [0, 1, 2, *range(6, 18)]
    told = Told(ranges, after=3)
    with pytest.warns(UserWarning, match="in mid-accumulation: the batches of the open window"):
        run(lambda: everything("stateful-stream"), told, accumulate_grad_batches=2)


# Back, and on without the batches in between


def goes_back_as_if_told(
    build: Callable[[], Parts], *jumps: tuple[int, int, int], **options: Any
) -> None:
    """The law: behind its last jump the run is one that was told all ranges before it began."""
    told = run(build, Told([(at, until + more) for at, until, more in jumps]), **options)
    ours = run(build, GoesBack(*jumps), **options)
    last = jumps[-1][0] - sum(until + more - at for at, until, more in jumps[:-1])
    behind = [line for line in told if int(line.split()[0]) > last]
    assert len(behind) > 2
    assert ours[-len(behind) :] == behind


@pytest.mark.parametrize(
    ("loader", "accumulate"),
    [
        ("shuffled", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in [*KINDS[1:], *MORE]),
    ],
)
def test_back_within_an_epoch(loader: str, accumulate: int) -> None:
    goes_back_as_if_told(lambda: everything(loader), (2, 4, 1), accumulate_grad_batches=accumulate)


@pytest.mark.slow
@pytest.mark.parametrize("loader", KINDS)
def test_back_twice_in_one_epoch_and_to_its_start(loader: str) -> None:
    goes_back_as_if_told(lambda: everything(loader), (7, 9, 0), (10, 11, 1))
    goes_back_as_if_told(lambda: everything(loader), (6, 9, 2))


@pytest.mark.slow
def test_our_datamodule_goes_back_under_lisa() -> None:
    goes_back_as_if_told(lambda: ours(lisa), (3, 5, 2), max_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_our_datamodule_goes_back_twice(workers: int) -> None:
    build = partial(ours, num_workers=workers)
    goes_back_as_if_told(build, (2, 4, 0), (5, 6, 1), accumulate_grad_batches=2, max_epochs=2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ours(),
        pytest.param(lambda: everything("stateful-stream"), marks=pytest.mark.slow),
        pytest.param(everything, marks=pytest.mark.slow),
        pytest.param(lambda: ours(num_workers=2), marks=pytest.mark.slow),
    ],
)
def test_what_was_left_out_is_resumed(tmp_path: Path, build: Callable[[], Parts]) -> None:
    """In mid-epoch and mid-window, with ranges behind, around and ahead of the position."""
    path = tmp_path / "ckpt"

    class Saves(Told):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            if len(self.positions) == 4:
                trainer.save_checkpoint(path)

    told = Saves([(1, 3), (6, 8), (10, 12)], after=1)
    whole = run(build, told, accumulate_grad_batches=3, max_epochs=2)
    again = run(build, accumulate_grad_batches=3, max_epochs=2, ckpt_path=path)
    assert told.positions[:6] == [0, 3, 4, 5, 8, 9]
    saved = next(n for n, line in enumerate(whole) if line.startswith("4 batch"))
    assert again == whole[saved + 1 :]
    assert torch.load(path, weights_only=True)


@pytest.mark.slow
def test_on_two_ranks() -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        goes_back_as_if_told(everything, (1, 2, 1), max_epochs=2, **ranks)
        goes_back_as_if_told(lambda: ours(), (1, 2, 1), max_epochs=2, **ranks)

    run_ranks(on)


# What is said and refused


def test_only_what_lies_ahead_is_left_out() -> None:
    found = []

    class Asks(GoesBack):
        def went_back(self, trainer: Any) -> None:
            found.append(stream_position(trainer))
            found.append(skip_batches(trainer, [(0, 7)]))
            found.append(add_skipped(trainer, [(20, 21)]))
            found.append(skipped_batches(trainer))

    run(everything, Asks((2, 3, 0)))
    ahead = SkippedBatches([(3, 7)])
    assert found == [3, ahead, SkippedBatches([(20, 21)]), SkippedBatches([(2, 7), (20, 21)])]


def test_the_place_of_a_run_that_knows_nothing_of_us() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    assert (stream_position(trainer), len(skipped_batches(trainer))) == (0, 0)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_elsewhere_it_is_refused(hook: str) -> None:
    skips = Calls(hook, lambda trainer: skip_batches(trainer, [(9, 10)]))
    with pytest.raises(ValueError, match=rf"skip_batches\(hook='{hook}'\): .*on_train_batch_end"):
        run(everything, skips, max_steps=1)


def test_without_exact_resume_it_is_refused() -> None:
    skips = Calls("on_train_start", lambda trainer: skip_batches(trainer, [(9, 10)]))
    with pytest.raises(ValueError, match=r"skip_batches\(callbacks=.*Add ExactResume"):
        run(everything, callbacks=[skips])


def test_loaders_that_are_made_anew_are_refused() -> None:
    skips = Calls("on_train_start", lambda trainer: skip_batches(trainer, [(9, 10)]))
    rule = r"skip_batches\(reload_dataloaders_every_n_epochs=1\)"
    with pytest.raises(ValueError, match=rule):
        run(everything, skips, reload_dataloaders_every_n_epochs=1)


def test_another_run_of_the_same_callback_leaves_nothing_out() -> None:
    exact, plain = ExactResume(), Told([])
    run(everything, callbacks=[exact, Told([(1, 2)])], max_steps=2)
    assert exact.skipping.ranges
    run(everything, callbacks=[exact, plain], max_steps=2)
    assert plain.positions == [0, 1]


class Once(IterableDataset):
    """Data that are their own iterator."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> torch.Tensor:
        return torch.zeros(8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: (torch.zeros(4, 8) for _ in range(9)), "generator"),
        (lambda: DataLoader(Once(), batch_size=4), "Once"),
        (lambda: {"a": DataLoader(Once(), batch_size=4)}, "Once"),
    ],
)
def test_what_cannot_be_begun_anew_is_refused(make: Any, name: str) -> None:
    class Loads(Still):
        def train_dataloader(self) -> Any:
            return make()

    looks = Calls("on_train_start", lambda trainer: check_begins_anew(trainer, "SpikeGuard"))
    rule = rf"SpikeGuard\(train_dataloader='{name}'\): an iterator cannot be begun anew"
    with pytest.raises(ValueError, match=rule):
        fit(Loads(), looks, max_steps=1)


@pytest.mark.parametrize("loader", ["shuffled", "stateful-stream", "two"])
def test_what_can_is_not(loader: str) -> None:
    looks = Calls("on_train_start", lambda trainer: check_begins_anew(trainer, "SpikeGuard"))
    run(lambda: everything(loader), looks, max_steps=1)
