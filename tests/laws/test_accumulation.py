"""Law: accumulated batches with unequal numbers of tokens are the one big batch.

Backpropagating means, as Lightning does by default, breaks it: the hand-written module shows that
the law notices.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.covers import with_slow
from tests.laws.composition import note
from tests.laws.members import DATAMODULES, MODULES, OBJECTIVES, Member
from tests.laws.runs import Run, on_its_data


def equals_one_big_batch(run: Run, folder: Path, material: Path) -> None:
    """The law: the sum of losses over each window, with clipped gradients in between."""
    run = replace(run, dropout=False, batch_size=4)  # micro-batches draw masks of their own
    for name in ("big", "small"):
        (folder / name).mkdir()
    big = run.fit(folder / "big", material).losses[0]
    small = replace(run, batch_size=2, accumulate=2).fit(folder / "small", material).losses[0]
    scale = 2.0 if run.module.sums else 1.0  # Lightning divides every loss by the window's length
    # The last window of a pass may have a single micro-batch.
    ours = {n: scale * (small[2 * n - 1] + small.get(2 * n, 0.0)) for n in big}
    # fp32 sums over some hundred tokens in another order
    assert ours == pytest.approx(big, rel=1e-5), "not the big batch"


@pytest.mark.parametrize("data", with_slow(DATAMODULES, ("TextDataModule", "PreferenceDataModule")))
@pytest.mark.parametrize("module", [m for m in MODULES if m.sums], ids=str)
def test_modules(module: Member, data: Member, tmp_path: Path, material: Path) -> None:
    if module.batches != data.batches:
        return
    # One pass: after a last window that is not full, the two count batches differently.
    equals_one_big_batch(Run(module, data, max_epochs=1), tmp_path, material)
    note("Modules and datamodules", module.name, data.name, "accumulates")


@pytest.mark.parametrize(
    "module", with_slow(OBJECTIVES, ("DPOModule, list", "DPOModule, kto", "DPOModule, router"))
)
def test_objectives(module: Member, tmp_path: Path, material: Path) -> None:
    """A loss that couples the pairs of a batch is taken per micro-batch, and so is no sum."""
    run = replace(on_its_data(module), max_epochs=1)
    if "accumulates" in module.exempt:
        with pytest.raises(AssertionError, match="not the big batch"):
            equals_one_big_batch(run, tmp_path, material)
        finding = f"accumulates not: {module.exempt['accumulates']}"
    else:
        equals_one_big_batch(run, tmp_path, material)
        finding = "accumulates"
    note("Modules and datamodules", module.name, run.data.name, finding)


def test_the_law_fails_where_it_is_broken(tmp_path: Path, material: Path) -> None:
    run = Run(MODULES[-1], DATAMODULES[0], max_epochs=1)
    with pytest.raises(AssertionError, match="not the big batch"):
        equals_one_big_batch(run, tmp_path, material)
