"""Laws of the zoo: modules that know nothing of us train as without us, and resume to the bit.

A member is refused before its first step or is what plain Lightning makes of it. Which of the two,
its row declares; the other is a failure.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.laws import broken, zoo_broken
from tests.laws.composition import note
from tests.laws.zoo import EQUAL, EXACT, Row, Verdict
from tests.laws.zoo_rows import PENDING, ZOO
from tests.laws.zoo_runs import MIDDLE, Record, Runs, fit, killed_and_resumed, plain_options, runs

pytestmark = pytest.mark.slow  # minutes in all; `make test-laws` runs them

TABLE = "Modules that know nothing of us"


def members(column: str, rows: list[Row] = ZOO) -> list[Any]:
    """Rows as parameters; the law of one that is pending must fail."""
    pending = pytest.mark.xfail(strict=True, reason="pending")
    late = PENDING.get(column, ())
    return [
        pytest.param(row, id=row.name, marks=[pending] if row.name in late else []) for row in rows
    ]


def is_exact(theirs: Record, ours: Record) -> None:
    """The law of our callbacks and of resumes: every number is the same, to the last bit."""
    assert not theirs.error + ours.error
    assert theirs.events, "nothing was written down"
    assert ours.events == theirs.events, "not the same bits"
    assert ours.weights == theirs.weights, "not the same bits"


def is_refused(record: Record, verdict: Verdict) -> None:
    """The law of a refusal: its reason, and no step before it."""
    assert record.error, "it trains"
    assert verdict.text in record.error
    assert not record.events, "refused after a step"


def resumes(ranks: list[Runs]) -> None:
    """The law of resumes: behind the stop all is as in the run that never stopped."""
    for rank in ranks:
        assert not rank.ours.error
        assert len(rank.resumed) == 2
        for batches, record in rank.resumed.items():
            is_exact(rank.ours.after(batches), record)


def equals_one_process(theirs: Record, ranks: list[Runs]) -> None:
    """The law of the pipeline, for losses, learning rates, all that is logged, and weights."""
    first, second = (rank.ours for rank in ranks)
    assert not first.error + second.error
    assert first.events == second.events, "ranks have seen different numbers"
    assert [event[:2] for event in first.events] == [event[:2] for event in theirs.events]
    for (batches, what, ours), (*_, expected) in zip(first.events, theirs.events, strict=True):
        # fp32 sums in another order, and what ten steps of AdamW make of it
        assert ours == pytest.approx(expected, rel=2e-5, abs=2e-6), f"{what} of {batches}"
    for name, values in theirs.weights.items():
        assert first.weights[name] == pytest.approx(values, rel=2e-5, abs=2e-5), name


def warns_once(ranks: list[Runs], verdict: Verdict) -> None:
    """The law of what differs by construction: it trains, and says so."""
    assert not "".join(rank.ours.error for rank in ranks)
    assert sum(verdict.text in text for text in ranks[0].ours.warned) == 1


@pytest.mark.parametrize("row", members("one process"))
def test_in_one_process(row: Row) -> None:
    (rank,) = runs(row, "auto")
    if row.draws_order:
        assert rank.ours.events != rank.plain.events
        note(TABLE, row.name, "one process", "own order")
        return
    is_exact(rank.plain, rank.ours)
    note(TABLE, row.name, "one process", EXACT.word)


@pytest.mark.parametrize("row", members("DDP"))
def test_under_ddp(row: Row) -> None:
    for rank in runs(row, "ddp"):
        if row.ddp is EXACT:
            is_exact(rank.plain, rank.ours)
        else:
            is_refused(rank.ours, row.ddp)
    note(TABLE, row.name, "DDP, 2 ranks", row.ddp.word)


@pytest.mark.parametrize("row", members("resumes in one process"))
def test_resumes_in_one_process(row: Row) -> None:
    resumes(runs(row, "auto"))
    note(TABLE, row.name, "one process", "resumes")


TRAIN_UNDER_DDP = [row for row in ZOO if row.ddp is EXACT]


@pytest.mark.parametrize("row", members("resumes under DDP", TRAIN_UNDER_DDP))
def test_resumes_under_ddp(row: Row) -> None:
    if row.drifts:
        with pytest.raises(AssertionError, match="not the same bits"):
            resumes(runs(row, "ddp"))
        note(TABLE, row.name, "DDP, 2 ranks", "ranks drift apart")
        return
    resumes(runs(row, "ddp"))
    note(TABLE, row.name, "DDP, 2 ranks", "resumes")


@pytest.mark.parametrize("row", members("pipeline"))
def test_under_the_pipeline(row: Row) -> None:
    ranks = runs(row, "pipeline")
    if row.pipeline is EQUAL:
        (alone,) = runs(row, "auto")
        equals_one_process(alone.ours if row.draws_order else alone.plain, ranks)
    elif row.pipeline.word == "warns":
        warns_once(ranks, row.pipeline)
    else:
        for rank in ranks:
            is_refused(rank.ours, row.pipeline)
    note(TABLE, row.name, "pipeline, 2 ranks", row.pipeline.word)


TRAIN_UNDER_THE_PIPELINE = [row for row in ZOO if row.pipeline.word != "refuses"]


@pytest.mark.parametrize("row", members("resumes under the pipeline", TRAIN_UNDER_THE_PIPELINE))
def test_resumes_under_the_pipeline(row: Row) -> None:
    resumes(runs(row, "pipeline"))
    note(TABLE, row.name, "pipeline, 2 ranks", "resumes")


@pytest.mark.parametrize("row", members("zero_infinity"))
def test_under_zero_infinity(row: Row) -> None:
    (rank,) = runs(row, "zero_infinity")
    if row.zero is EXACT:
        (alone,) = runs(row, "auto")
        is_exact(alone.ours if row.draws_order else alone.plain, rank.ours)
    else:
        is_refused(rank.ours, row.zero)
    note(TABLE, row.name, "zero_infinity, 1 rank", row.zero.word)


TRAIN_UNDER_ZERO_INFINITY = [row for row in ZOO if row.zero is EXACT]


@pytest.mark.parametrize("row", members("resumes under zero_infinity", TRAIN_UNDER_ZERO_INFINITY))
def test_resumes_under_zero_infinity(row: Row) -> None:
    resumes(runs(row, "zero_infinity"))
    note(TABLE, row.name, "zero_infinity, 1 rank", "resumes")


# The least that shows it: state, hooks, layers and a model that ranks hold in parts.
ON_RANKS = {
    "counter in an attribute",
    "metric object in validation",
    "parameter groups",
    "frozen part",
    "shared layer",
    "BatchNorm",
    "Hugging Face, labels=",
}


@pytest.mark.parametrize(
    "row", [row for row in TRAIN_UNDER_ZERO_INFINITY if row.name in ON_RANKS], ids=str
)
def test_under_zero_infinity_on_two_ranks(row: Row) -> None:
    ranks, theirs = runs(row, "zero_infinity, 2 ranks"), runs(row, "ddp")
    for rank, ddp in zip(ranks, theirs, strict=True):
        assert not rank.ours.error
        assert [event[:2] for event in rank.ours.events] == [e[:2] for e in ddp.plain.events]
        for (batches, what, ours), (*_, expected) in zip(
            rank.ours.events, ddp.plain.events, strict=True
        ):
            # norms that clip are sums in another order
            assert ours == pytest.approx(expected, rel=2e-5, abs=2e-6), f"{what} of {batches}"
        for name, values in ddp.plain.weights.items():
            assert rank.ours.weights[name] == pytest.approx(values, rel=2e-5, abs=2e-6), name
    resumes(ranks)


KILLED = {"list in training", "counter in an attribute", "Hugging Face, labels="}


def is_killed_and_resumes(row: Row, strategy: str) -> None:
    """The same law where SIGKILL ends every process of the run."""
    for rank, resumed in zip(runs(row, strategy), killed_and_resumed(row, strategy), strict=True):
        is_exact(rank.ours.after(MIDDLE), resumed)


@pytest.mark.parametrize(
    "row", members("resumes in one process", [row for row in ZOO if row.name in KILLED])
)
def test_resumes_a_killed_process(row: Row) -> None:
    is_killed_and_resumes(row, "auto")


@pytest.mark.parametrize(
    "row", members("resumes under DDP", [row for row in TRAIN_UNDER_DDP if row.name in KILLED])
)
def test_resumes_killed_ranks_under_ddp(row: Row) -> None:
    is_killed_and_resumes(row, "ddp")


@pytest.mark.parametrize(
    "row",
    members(
        "resumes under the pipeline",
        [row for row in TRAIN_UNDER_THE_PIPELINE if row.name in KILLED],
    ),
)
def test_resumes_killed_ranks_under_the_pipeline(row: Row) -> None:
    is_killed_and_resumes(row, "pipeline")


@pytest.mark.parametrize(
    "row", [row for row in TRAIN_UNDER_ZERO_INFINITY if row.name in KILLED], ids=str
)
def test_resumes_a_killed_process_under_zero_infinity(row: Row) -> None:
    is_killed_and_resumes(row, "zero_infinity")


def test_the_zoo_is_large_and_most_of_it_trains_under_the_pipeline() -> None:
    assert len({row.name for row in ZOO}) == len({row.module for row in ZOO}) == len(ZOO) >= 30
    assert sum(row.pipeline is EQUAL for row in ZOO) >= 20


# Every law on a member that breaks it.


def test_the_exact_law_fails_where_it_is_broken(tmp_path: Path) -> None:
    run = partial(fit, ZOO[0], str(tmp_path), plain_options, ours=False)
    with pytest.raises(AssertionError, match="not the same bits"):
        is_exact(run(), run(extra=[broken.Weaken()]))


def test_the_law_of_resumes_fails_where_it_is_broken() -> None:
    with pytest.raises(AssertionError, match="not the same bits"):
        resumes(runs(zoo_broken.FORGETFUL, "auto"))


def test_the_law_of_the_pipeline_fails_where_it_is_broken() -> None:
    ranks = runs(zoo_broken.BY_MICROBATCH, "pipeline")
    (alone,) = runs(zoo_broken.BY_MICROBATCH, "auto")
    with pytest.raises(AssertionError, match="loss"):
        equals_one_process(alone.plain, ranks)


def test_the_law_of_refusals_fails_where_it_is_broken() -> None:
    with pytest.raises(AssertionError, match="it trains"):
        is_refused(runs(ZOO[0], "auto")[0].ours, Verdict("refuses", "anything"))
    with pytest.raises(AssertionError, match="refused after a step"):
        is_refused(runs(zoo_broken.LATE, "auto")[0].ours, Verdict("refuses", "too late"))


def test_the_law_of_warnings_fails_where_it_is_broken() -> None:
    with pytest.raises(AssertionError):
        warns_once(runs(replace(ZOO[0]), "auto"), Verdict("warns", "BatchNorm"))
