"""Law: a run that goes back to an earlier batch goes on to the same losses and the same weights.

It holds for every module with every datamodule, every callback and every optimizer.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.rewinds import Rewinds
from tests.laws import broken
from tests.laws.members import CALLBACKS, DATAMODULES, MODULES, OPTIMIZERS, STRATEGIES, Member
from tests.laws.runs import Outcome, Run, on_its_data, refusal

pytestmark = pytest.mark.slow  # minutes in all; `make test-laws` runs them

Reference = Callable[[Run], Outcome]


def goes_back(run: Run, folder: Path, material: Path, reference: Reference) -> None:
    """The law: in a window of two batches, after its first; within an epoch, and across its end."""
    expected = reference(run)
    last = max(expected.losses[0])  # which a callback may have made earlier than the epochs' end
    for name, at, until in (("within", 1, 4), ("across", 5, min(11, last))):
        (folder / name).mkdir()
        ours = run.fit(folder / name, material, extra=[Rewinds(at, until, times=2)])
        lines = (folder / name / "losses.0").read_text().splitlines()
        assert len(lines) == last + 2 * (until - at), "it has not gone back"
        assert ours == expected, f"not the same bits, {name} an epoch"


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("data", DATAMODULES, ids=str)
def test_datamodules(
    module: Member, data: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    if module.batches == data.batches:
        goes_back(Run(module, data, accumulate=2), tmp_path, material, reference)


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
def test_callbacks(
    callback: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    if not refusal(callback, module):
        run = replace(on_its_data(module), callbacks=(callback,), accumulate=2)
        goes_back(run, tmp_path, material, reference)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_optimizers(
    optimizer: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = replace(on_its_data(MODULES[0]), optimizer=optimizer)
    if not refusal(optimizer, run.module):
        goes_back(run, tmp_path, material, reference)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_two_ranks(module: Member, tmp_path: Path, material: Path, reference: Reference) -> None:
    ddp = next(each for each in STRATEGIES if "ddp" in str(each.spec))
    run = replace(on_its_data(module), strategy=ddp, devices=2, accumulate=2, max_epochs=3)
    goes_back(run, tmp_path, material, reference)


_RUN = on_its_data(MODULES[-1])
BROKEN = {
    "callback": replace(_RUN, callbacks=(broken.callback("ForgetfulCallback"),)),
    "module": replace(_RUN, module=broken.OWN_GENERATOR),
    "optimizer": replace(_RUN, optimizer=broken.FORGETFUL_ADAMW),
}


@pytest.mark.parametrize("run", BROKEN.values(), ids=BROKEN)
def test_the_law_fails_where_it_is_broken(
    run: Run, tmp_path: Path, material: Path, reference: Reference
) -> None:
    with pytest.raises(AssertionError, match="not the same bits"):
        goes_back(run, tmp_path, material, reference)
