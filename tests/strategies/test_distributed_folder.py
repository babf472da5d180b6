"""A folder of torch.distributed.checkpoint, read in parts."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

from lightning_align.strategies.distributed_folder import META_FILE, DistributedFolder, is_one


@pytest.fixture
def folder(tmp_path):
    """Of a module with two parameters, whose optimizer has two groups."""
    state = {
        "model": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)},
        "optimizer_0": {
            "state": {"weight": {"step": torch.tensor(4.0), "exp_avg": torch.full((2, 3), 7.0)}},
            "param_groups": [{"lr": 0.1, "params": ["weight"]}, {"lr": 0.2, "params": ["bias"]}],
        },
    }
    state_dict_saver.save(state, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"epoch": 1}, tmp_path / META_FILE)
    return tmp_path


def test_an_outline_has_shapes_and_parts_have_values(folder):
    assert is_one(folder)
    saved = DistributedFolder(folder, "test")
    outline = saved.outline(0)
    assert outline["state_dict"]["weight"].is_meta
    assert [group["params"] for group in outline["optimizer_states"][0]["param_groups"]] == [
        [0],
        [1],
    ]
    assert list(saved.values(["bias"])) == ["bias"]
    state = saved.module_state(["weight"])
    assert (state["weight"].sum(), state["bias"].is_meta) == (6, True)


def test_states_are_under_the_numbers_of_the_run_that_reads(folder):
    saved = DistributedFolder(folder, "test")
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias]}]
    optimizer = torch.optim.AdamW(groups)
    settings = saved.outline(0)["optimizer_states"][0]["param_groups"]
    names = ["weight", "bias"]
    state = saved.optimizer_state(0, settings, optimizer, names, lambda name: name == "weight")
    assert state["state"][0]["exp_avg"].unique() == 7
    assert not saved.optimizer_state(0, settings, optimizer, names, lambda _: False)["state"]
    with pytest.raises(ValueError, match="other groups of parameters"):
        saved.optimizer_state(0, settings, torch.optim.AdamW(layer.parameters()), names, bool)


def test_another_model_and_a_folder_that_is_not_whole_are_refused(folder):
    with pytest.raises(ValueError, match=r"'bias' with shape \(5,\) here and \(2,\) there"):
        DistributedFolder(folder, "test").check(nn.Linear(3, 5), strict=True)
    (folder / META_FILE).unlink()
    with pytest.raises(ValueError, match=r"test\(ckpt_path=.*no meta.pt"):
        DistributedFolder(folder, "test")
