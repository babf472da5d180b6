"""Laws of DPOModule with another reference than a model beside it: cached, adapters, TR-DPO.

The other laws ask what callbacks, optimizers and strategies do to a module. Here is asked what they
do to such a reference: with all callbacks at once that change nothing, which each alone would then
not do either, and with each of those that change weights or what is done with them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.laws.composition import note
from tests.laws.members import (
    ADAPTED,
    CACHED,
    CALLBACKS,
    FOLLOWED,
    OPTIMIZERS,
    STRATEGIES,
    Member,
)
from tests.laws.runs import Outcome, Run, on_its_data, refusal
from tests.laws.test_capture import goes_back
from tests.laws.test_resume import resumes, resumes_with
from tests.laws.test_strategies import equals_one_process

pytestmark = pytest.mark.slow  # `make test-laws` runs them

Reference = Callable[[Run], Outcome]
REFERENCES = [CACHED, ADAPTED, FOLLOWED]
OTHERS = [*CALLBACKS, *STRATEGIES[1:]]
REFUSED = [(module, other) for module in REFERENCES for other in OTHERS if refusal(module, other)]
LASTING = [callback for callback in CALLBACKS if not callback.neutral]
OUR_OPTIMIZERS = [member for member in OPTIMIZERS if "torch" not in member.name]


@pytest.mark.parametrize("module", REFERENCES, ids=str)
def test_callbacks_that_change_nothing(
    module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    """Killed and resumed with all of them, a run has the bits of one without any."""
    callbacks = tuple(c for c in CALLBACKS if c.neutral and not refusal(c, module))
    run = replace(on_its_data(module), accumulate=2)
    with_all = replace(run, callbacks=callbacks)
    resumes(with_all, tmp_path, material, reference(run), position=5)
    for callback in callbacks:
        note("Callbacks and modules", callback.name, module.name, "exact, resumes")


@pytest.mark.parametrize("module", REFERENCES, ids=str)
@pytest.mark.parametrize("callback", LASTING, ids=str)
def test_callbacks(
    callback: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    resumes_with(callback, module, tmp_path, material, reference)


@pytest.mark.parametrize("optimizer", OUR_OPTIMIZERS, ids=str)
def test_optimizers_of_adapters(
    optimizer: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    """Whose matrices are narrow, and all that learns."""
    run = replace(on_its_data(ADAPTED), optimizer=optimizer)
    resumes(run, tmp_path, material, reference(run), position=5)
    note("Optimizers and modules", optimizer.name, ADAPTED.name, "resumes")


@pytest.mark.parametrize("module", REFERENCES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=str)
def test_strategies(
    strategy: Member, module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    if refusal(strategy, module):
        return
    run = on_its_data(module)
    for dropout in (True, False):  # the cache is filled: no rank of a pipeline can ask a model
        reference(replace(run, dropout=dropout))
    equal, resumed = tmp_path / "equal", tmp_path / "resumed"
    equal.mkdir()
    resumed.mkdir()
    equals_one_process(run, strategy, equal, material, reference)
    run = replace(run, strategy=strategy, devices=2, accumulate=2)
    resumes(run, resumed, material, reference(run), position=5)
    note("Modules and strategies", module.name, strategy.name, "equal, resumes")


@pytest.mark.parametrize("module", REFERENCES, ids=str)
def test_a_run_goes_back(
    module: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    goes_back(replace(on_its_data(module), accumulate=2), tmp_path, material, reference)


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " + ".join(map(str, pair)))
def test_what_does_not_work_is_refused_before_training(
    pair: tuple[Member, Member], tmp_path: Path, material: Path
) -> None:
    module, other = pair
    run = on_its_data(module)
    is_callback = other in CALLBACKS
    kind = {"callbacks": (other,)} if is_callback else {"strategy": other}
    with pytest.raises(Exception, match=module.refuses[other.name]):  # Lightning's, of processes
        replace(run, **kind).fit(tmp_path, material)
    assert not list(tmp_path.glob("losses.*"))
    if is_callback:
        note("Callbacks and modules", other.name, module.name, "refuses")
    else:
        note("Modules and strategies", module.name, other.name, "refuses")
