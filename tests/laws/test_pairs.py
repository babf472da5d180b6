"""Law: two callbacks work together in any order, or refuse at ``setup``."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import CALLBACKS, DATAMODULES, MODULES, OPTIMIZERS, STRATEGIES, Member
from tests.laws.runs import Outcome, Run, fit_and_be_killed, on_its_data, refusal

pytestmark = pytest.mark.slow  # minutes in all; `make test-laws` runs them

Reference = Callable[[Run], Outcome]
PAIRS = list(combinations(CALLBACKS, 2))
MODELS = [MODULES[0], MODULES[-1]]  # GPT-2 and the hand-written module


def changes_nothing(
    run: Run, callback: Member, folder: Path, material: Path, reference: Reference
) -> None:
    """The law of a neutral callback: training is the same bits without it."""
    ours = replace(run, callbacks=(*run.callbacks, callback)).fit(folder, material)
    expected = reference(run)
    assert ours == expected, "not the same bits"


def works_in_any_order(
    run: Run, pair: tuple[Member, Member], folder: Path, material: Path
) -> Outcome:
    """The law of a pair."""
    outcomes = []
    for order in (pair, pair[::-1]):
        place = folder / order[0].name
        place.mkdir()
        outcomes.append(replace(run, callbacks=order).fit(place, material))
    ours, theirs = outcomes
    assert ours == theirs, "not the same bits"
    return ours


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("callback", [c for c in CALLBACKS if c.neutral], ids=str)
def test_a_neutral_callback_changes_nothing(
    callback: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    if refusal(callback, module):
        return
    changes_nothing(on_its_data(module), callback, tmp_path, material, reference)
    note("Callbacks and modules", callback.name, module.name, "exact")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " + ".join(map(str, pair)))
def test_pairs_of_callbacks(
    pair: tuple[Member, Member],
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    # Those that are for one module alone meet the others there.
    is_for_it_alone = any(MODULES[0].name in callback.refuses for callback in pair)
    if refusal(*pair, module) or not (module in MODELS or is_for_it_alone):
        return
    run = replace(on_its_data(module), accumulate=2)
    ours = works_in_any_order(run, pair, tmp_path, material)
    lasting = tuple(callback for callback in pair if not callback.neutral)
    if len(lasting) < 2:  # a neutral callback does not change what the other one does, either
        assert ours == reference(replace(run, callbacks=lasting))
    checkpoint = fit_and_be_killed(
        replace(run, callbacks=pair), _folder(tmp_path, "killed"), material, position=5
    )
    resumed = replace(run, callbacks=pair).fit(tmp_path / "killed", material, ckpt_path=checkpoint)
    assert resumed == ours
    first, second = pair
    note("Callbacks", first.name, second.name, "any order, resumes")


EVERYTHING = [*CALLBACKS, *OPTIMIZERS, *STRATEGIES, *DATAMODULES, *MODULES]
REFUSED = [(one, other) for one in EVERYTHING for other in EVERYTHING if other.name in one.refuses]


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " + ".join(map(str, pair)))
def test_what_does_not_work_is_refused_before_training(
    pair: tuple[Member, Member], tmp_path: Path, material: Path
) -> None:
    run = _run_of(pair)
    # A strategy's processes raise what Lightning makes of the error.
    error = ValueError if run.strategy is None else Exception
    with pytest.raises(error, match=pair[0].refuses[pair[1].name]):
        run.fit(tmp_path, material)
    assert not list(tmp_path.glob("losses.*"))
    note(_table_of(pair), *(member.name for member in pair), "refuses")


def test_the_law_of_neutral_callbacks_fails_where_it_is_broken(
    tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = replace(on_its_data(MODULES[-1]), optimizer=broken.SGD)
    with pytest.raises(AssertionError):
        changes_nothing(run, broken.callback("Weaken"), tmp_path, material, reference)


def test_the_law_of_pairs_fails_where_it_is_broken(tmp_path: Path, material: Path) -> None:
    run = replace(on_its_data(MODULES[-1]), optimizer=broken.SGD)
    pair = (broken.callback("Weaken"), broken.callback("Sign"))
    with pytest.raises(AssertionError, match="not the same bits"):
        works_in_any_order(run, pair, tmp_path, material)


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def _run_of(members: tuple[Member, ...]) -> Run:
    """The run in which ``members`` take part."""
    willing = [m for m in MODULES if not refusal(m, *members)] or MODULES
    module = next((m for m in members if m in MODULES), willing[0])
    run = on_its_data(module)
    return replace(
        run,
        callbacks=tuple(m for m in members if m in CALLBACKS),
        optimizer=next((m for m in members if m in OPTIMIZERS), run.optimizer),
        strategy=next((m for m in members if m in STRATEGIES), None),
        data=next((m for m in members if m in DATAMODULES), run.data),
    )


def _table_of(pair: tuple[Member, Member]) -> str:
    kinds = ["modules" if m in MODULES else "strategies" for m in pair[1:]]
    lists = {"Callbacks": CALLBACKS, "Optimizers": OPTIMIZERS, "Modules": MODULES}
    first = next(name for name, members in lists.items() if pair[0] in members)
    return "Callbacks" if pair[1] in CALLBACKS else f"{first} and {kinds[0]}"
