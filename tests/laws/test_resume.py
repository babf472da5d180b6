"""Law: kill a run at any batch, resume it, and every later loss and the weights are the same bits.

It holds for every module with every datamodule, every callback, every optimizer and every strategy.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.read_checkpoint import read_checkpoint
from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import (
    CALLBACKS,
    DATAMODULES,
    MODULES,
    OBJECTIVES,
    OPTIMIZERS,
    STRATEGIES,
    Member,
)
from tests.laws.runs import Outcome, Run, fit_and_be_killed, on_its_data, refusal

pytestmark = pytest.mark.slow  # minutes in all; `make test-laws` runs them

Reference = Callable[[Run], Outcome]

# In a window of two batches: after its first, at its end; the last but one of an epoch of 7 or 9.
POSITIONS = (1, 4, 6)


def resumes(run: Run, folder: Path, material: Path, expected: Outcome, position: int) -> None:
    """The law."""
    checkpoint = fit_and_be_killed(run, folder, material, position)
    state = read_checkpoint(checkpoint)
    assert state["global_step"] > 0 or position < run.accumulate
    ours = run.fit(folder, material, ckpt_path=checkpoint)
    assert ours == expected, "not the same bits"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("data", DATAMODULES, ids=str)
def test_datamodules(
    module: Member,
    data: Member,
    position: int,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if module.batches != data.batches:
        return
    run = Run(module, data, accumulate=2)
    resumes(run, tmp_path, material, reference(run), position)
    note("Modules and datamodules", module.name, data.name, "resumes")


@pytest.mark.parametrize("module", OBJECTIVES, ids=str)
def test_objectives(module: Member, tmp_path: Path, material: Path, reference: Reference) -> None:
    run = replace(on_its_data(module), accumulate=2)
    resumes(run, tmp_path, material, reference(run), position=3)
    note("Modules and datamodules", module.name, run.data.name, "resumes")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
def test_callbacks(
    callback: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    resumes_with(callback, module, tmp_path, material, reference)


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_optimizers(
    optimizer: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    if refusal(optimizer, module):
        return
    run = replace(on_its_data(module), optimizer=optimizer)
    resumes(run, tmp_path, material, reference(run), position=5)
    note("Optimizers and modules", optimizer.name, module.name, "resumes")


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=str)
def test_strategies(
    strategy: Member,
    ranks: int,
    module: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    if refusal(strategy, module) or ranks > strategy.ranks:
        return
    run = replace(on_its_data(module), strategy=strategy, devices=ranks, accumulate=2)
    resumes(run, tmp_path, material, reference(run), position=5)
    note("Modules and strategies", module.name, strategy.name, "resumes")


_RUN = on_its_data(MODULES[-1])
BROKEN = {
    "callback": replace(_RUN, callbacks=(broken.callback("ForgetfulCallback"),)),
    "module": replace(_RUN, module=broken.OWN_GENERATOR),
    "datamodule": replace(_RUN, data=broken.OWN_DRAWS),
    "optimizer": replace(_RUN, optimizer=broken.FORGETFUL_ADAMW),
}


@pytest.mark.parametrize("run", BROKEN.values(), ids=BROKEN)
def test_the_law_fails_where_it_is_broken(
    run: Run, tmp_path: Path, material: Path, reference: Reference
) -> None:
    with pytest.raises(AssertionError, match="not the same bits"):
        resumes(run, tmp_path, material, reference(run), position=5)


def resumes_with(
    callback: Member, module: Member, folder: Path, material: Path, reference: Reference
) -> None:
    if refusal(callback, module):
        return
    run = replace(on_its_data(module), callbacks=(callback,), accumulate=2)
    resumes(run, folder, material, reference(run), position=5)
    note("Callbacks and modules", callback.name, module.name, "resumes")
