"""Law of a callback's state: plain data that comes back as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.covers import with_slow
from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import CALLBACKS, MODULES, Member, build, class_of
from tests.laws.runs import Run, on_its_data, refusal


def state_round_trips(run: Run, callback: Member, folder: Path, material: Path) -> None:
    """Train, save, and give the saved state to a fresh callback."""
    run = replace(run, callbacks=(callback,), max_epochs=1)
    with run.trainer(folder, material) as (trainer, module, data):
        trainer.fit(module, data)
        trainer.save_checkpoint(folder / "end.ckpt")
        kind = class_of(callback.spec)
        live = next(c for c in trainer.callbacks if type(c) is kind)
        checkpoint = torch.load(folder / "end.ckpt", weights_only=True)
        saved = checkpoint["callbacks"].get(live.state_key)
        fresh = build(callback.spec, {"data": str(material), "run": str(folder)})
        if saved is None:
            assert not live.state_dict(), "a state was left out of the checkpoint"
        else:
            fresh.load_state_dict(saved)
        assert same(fresh.state_dict(), live.state_dict()), "the state has changed"


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("module", with_slow(MODULES, ("PretrainModule",)))
@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
def test_callbacks(callback: Member, module: Member, tmp_path: Path, material: Path) -> None:
    if refusal(callback, module):
        return
    state_round_trips(on_its_data(module), callback, tmp_path, material)
    note("Callbacks alone", "state round-trips", callback.name, "yes")


def test_the_law_fails_where_it_is_broken(tmp_path: Path, material: Path) -> None:
    run = on_its_data(MODULES[-1])
    with pytest.raises(AssertionError, match="the state has changed"):
        state_round_trips(run, broken.callback("SecretiveCallback"), tmp_path, material)
