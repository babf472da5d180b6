"""Law: a strategy changes where tensors live, and nothing else.

One rank gives the bits of ``strategy="auto"``; two ranks give its losses up to summation order.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import CALLBACKS, MODULES, OPTIMIZERS, STRATEGIES, Member
from tests.laws.runs import Outcome, Run, on_its_data, refusal

pytestmark = pytest.mark.slow  # minutes in all; `make test-laws` runs them

Reference = Callable[[Run], Outcome]
AUTO, *OTHERS = STRATEGIES
ON_RANKS = [strategy for strategy in OTHERS if strategy.ranks > 1]


def keeps_every_bit(
    run: Run, strategy: Member, folder: Path, material: Path, reference: Reference
) -> None:
    """The law on one rank."""
    expected = reference(run)
    ours = replace(run, strategy=strategy).fit(folder, material)
    assert ours == expected, "not the same bits"


def equals_one_process(
    run: Run, strategy: Member, folder: Path, material: Path, reference: Reference
) -> None:
    """The law on two ranks, with half the batch on each, or half the model."""
    run = replace(run, dropout=False)  # each rank draws masks of its own
    if not strategy.splits_batch:
        whole = replace(run, strategy=strategy, devices=2).fit(folder, material)
        first, second = whole.losses
        assert first == second, "ranks have different losses"
        # fp32 sums over some hundred tokens in another order
        assert first == pytest.approx(reference(run).losses[0], rel=1e-5)
        return
    if not run.module.sums:
        # Lightning weighs ranks alike, however many tokens they have: without the last batch of the
        # pass, which is smaller, all have as many.
        run = replace(run, max_epochs=1, limit_batches=8)
    expected = reference(run).losses[0]
    split = replace(run, strategy=strategy, devices=2, batch_size=run.batch_size // 2)
    ranks = split.fit(folder, material).losses
    assert len(ranks) == 2
    scale = 1.0 if run.module.sums else 0.5
    ours = {position: scale * (ranks[0][position] + ranks[1][position]) for position in ranks[0]}
    # fp32 sums over some hundred tokens in another order
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("strategy", OTHERS, ids=str)
def test_optimizers_under_one_rank(
    strategy: Member,
    optimizer: Member,
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if refusal(strategy, optimizer, module):
        return
    run = replace(on_its_data(module), optimizer=optimizer)
    keeps_every_bit(run, strategy, tmp_path, material, reference)
    note("Optimizers and strategies", optimizer.name, f"{strategy.name}, 1 rank", "exact")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("strategy", ON_RANKS, ids=str)
def test_optimizers_under_two_ranks(
    strategy: Member,
    optimizer: Member,
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if refusal(strategy, optimizer, module):
        return
    run = replace(on_its_data(module), optimizer=optimizer)
    equals_one_process(run, strategy, tmp_path, material, reference)
    note("Optimizers and strategies", optimizer.name, f"{strategy.name}, 2 ranks", "equal")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
@pytest.mark.parametrize("strategy", OTHERS, ids=str)
def test_callbacks_under_one_rank(
    strategy: Member,
    callback: Member,
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if refusal(strategy, callback, module):
        return
    run = replace(on_its_data(module), callbacks=(callback,))
    keeps_every_bit(run, strategy, tmp_path, material, reference)
    note("Callbacks and strategies", callback.name, f"{strategy.name}, 1 rank", "exact")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
@pytest.mark.parametrize("strategy", ON_RANKS, ids=str)
def test_callbacks_under_two_ranks(
    strategy: Member,
    callback: Member,
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if refusal(strategy, callback, module):
        return
    run = replace(on_its_data(module), callbacks=(callback,))
    column = f"{strategy.name}, 2 ranks"
    if (rule := callback.refuses.get(column)) is not None:
        with pytest.raises(Exception, match=rule):  # what Lightning makes of a process's error
            equals_one_process(run, strategy, tmp_path, material, reference)
        assert not list(tmp_path.glob("losses.*"))
        note("Callbacks and strategies", callback.name, column, "refuses")
        return
    equals_one_process(run, strategy, tmp_path, material, reference)
    note("Callbacks and strategies", callback.name, column, "equal")


def test_the_law_of_one_rank_fails_where_it_is_broken(
    tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = replace(on_its_data(MODULES[-1]), optimizer=broken.SGD)
    with pytest.raises(AssertionError, match="not the same bits"):
        keeps_every_bit(run, broken.LOUDER, tmp_path, material, reference)


def test_the_law_of_two_ranks_fails_where_it_is_broken(
    tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = on_its_data(MODULES[0])
    for number, strategy in enumerate((broken.UNSYNCHRONISED, broken.UNTIED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(AssertionError, match="approx"):
            equals_one_process(run, strategy, folder, material, reference)
