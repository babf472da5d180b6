import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

from lightning_align._compat import torch_dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {
    "model": {"a.b": torch.arange(3.0), "c": torch.ones((), dtype=torch.bfloat16)},
    "optimizer_0": {
        "state": {"a.b": {"step": torch.tensor(2), "rank": 4, "nothing": None}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.b"]}, {"params": ["c"]}],
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state_dict_saver.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_a_folder_is_read_as_it_was_saved(folder: Path) -> None:
    index = torch_dcp.read_index(folder)
    names = torch_dcp.names(index)
    state = torch_dcp.read(folder, index, names)
    torch.testing.assert_close(state["model"], STATE["model"], rtol=0, atol=0)
    assert state["model"]["c"].dtype == torch.bfloat16
    entry = state["optimizer_0"]["state"]["a.b"]
    assert (int(entry["step"]), entry["rank"], entry["nothing"]) == (2, 4, None)
    assert state["optimizer_0"]["param_groups"] == STATE["optimizer_0"]["param_groups"]


def test_only_what_is_asked_for_is_read(folder: Path) -> None:
    index = torch_dcp.read_index(folder)
    keys = [key for key, levels in torch_dcp.names(index).items() if levels == ("model", "c")]
    assert torch_dcp.read(folder, index, keys) == {"model": {"c": STATE["model"]["c"]}}


def test_shapes_and_sizes_are_known_without_reading(folder: Path) -> None:
    index = torch_dcp.read_index(folder)
    (key,) = (k for k, levels in torch_dcp.names(index).items() if levels == ("model", "a.b"))
    outline = torch_dcp.on_meta(index, key)
    assert outline.is_meta
    assert (outline.shape, outline.dtype) == ((3,), torch.float32)
    assert torch_dcp.files(index) == {
        path.name: path.stat().st_size for path in folder.glob("*.distcp")
    }


class Harm:
    def __init__(self, action: Any, *arguments: Any) -> None:
        self.call = action, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("harm", [Harm(os.system, "true"), Harm(torch.load, "x"), Harm(eval, "1")])
def test_an_index_runs_no_code(harm: Harm, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(harm))
    with pytest.raises(torch_dcp.UnreadableError, match="is not part of a checkpoint's index"):
        torch_dcp.read_index(tmp_path)


def test_a_value_runs_no_code(tmp_path: Path) -> None:
    state = {"value": Harm(os.mkdir, str(tmp_path / "made"))}
    state_dict_saver.save(state, checkpoint_id=tmp_path, no_dist=True)
    index = torch_dcp.read_index(tmp_path)
    with pytest.raises(torch_dcp.UnreadableError, match="Weights only load failed"):
        torch_dcp.read(tmp_path, index, torch_dcp.names(index))
    assert not (tmp_path / "made").exists()


def test_states_of_an_optimizer_by_the_names_of_parameters() -> None:
    """As torch saves them: a compiled layer's own name is left out."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1] = torch.compile(model[1])
    named = dict(torch_dcp.named_parameters(model))
    assert list(named) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_numbers_of_parameters_are_places_in_groups_or_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last_first: Any = [{"params": list(layer.parameters())} for layer in reversed(model)]
    optimizer = torch.optim.AdamW(last_first)

    def read(groups: list[list[Any]], states: dict[Any, int]) -> tuple[Any, list[Any]]:
        saved = {"state": states, "param_groups": [{"lr": 1, "params": own} for own in groups]}
        found = torch_dcp.by_name(model, optimizer, saved)
        return found["state"], [group["params"] for group in found["param_groups"]]

    first, second = ["0.weight", "0.bias"], ["1.weight", "1.bias"]
    # Saved by one process: AdamW counts what it has.
    assert read([[0, 1], [2, 3]], {0: 7, 3: 8}) == ({"1.weight": 7, "0.bias": 8}, [second, first])
    # Put together by torch, of a sharded model: the model's parameters are counted.
    assert read([[2, 3], [0, 1]], {0: 7, 3: 8}) == ({"0.weight": 7, "1.bias": 8}, [second, first])
    assert read([[0, 1], [2, 3]], {}) == ({}, [second, first])
    assert read([second, first], {"0.bias": 1}) == ({"0.bias": 1}, [second, first])


def test_a_step_of_zeros_makes_states_of_what_trains() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    torch_dcp.make_state(optimizer)
    assert list(optimizer.state) == [model.weight]
    assert torch.equal(model.weight, before)
    assert optimizer.param_groups[0]["lr"] == 1.0
