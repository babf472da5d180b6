"""Models without weights, and weights without the rest of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_align.models.weights import (
    is_built_on_meta,
    parameters_on_meta,
    remember_weights,
    weights_reader,
)


class Model(nn.Module):
    """A base model with a head around it, as transformers has them."""

    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3, bias=False)


def remembered(folder: Path, tensors: dict[str, Any]) -> Model:
    save_file(tensors, folder / "model.safetensors")
    model = Model()
    remember_weights(model, str(folder), "main")
    return model


# Built on meta


def test_parameters_are_on_meta_and_buffers_are_computed() -> None:
    with parameters_on_meta():
        module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    assert [p.is_meta for p in module.parameters()] == [True] * 3
    assert [tuple(p.shape) for p in module.parameters()] == [(3, 2), (3,), (3,)]
    assert module[1].running_var.tolist() == [1, 1, 1]
    assert module[0].bias is None


def test_shared_parameters_stay_shared_and_keep_whether_they_train() -> None:
    with parameters_on_meta():
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        shared = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        first.bias = shared
        second.bias = shared
        second.weight = first.weight  # which is on meta already
    assert first.bias is second.bias
    assert second.weight is first.weight
    assert (first.bias.is_meta, first.bias.requires_grad) == (True, False)
    assert first.bias.dtype is torch.float64
    assert shared.sum() == 2
    assert first.weight.requires_grad


def test_torch_is_as_before_afterwards_even_after_an_error() -> None:
    register = nn.Module.register_parameter
    found: list[bool] = []

    def build() -> None:
        with parameters_on_meta():
            found.append(is_built_on_meta())
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert found == [True]
    assert nn.Module.register_parameter is register
    assert not is_built_on_meta()
    assert not nn.Linear(1, 1).weight.is_meta


def test_within_another_device_buffers_are_still_computed() -> None:
    with torch.device("meta"):
        assert is_built_on_meta()
        with parameters_on_meta():
            module = nn.BatchNorm1d(2)
            assert is_built_on_meta()
    assert module.weight.is_meta
    assert module.running_var.tolist() == [1, 1]


def test_contexts_nest() -> None:
    with parameters_on_meta():
        with parameters_on_meta():
            inner = nn.Linear(1, 1)
        assert is_built_on_meta()
        outer = nn.Linear(1, 1)
    assert inner.weight.is_meta
    assert outer.weight.is_meta


# Read in parts


def test_a_parameter_is_read_by_its_name_with_or_without_the_base_model(tmp_path: Path) -> None:
    """Files of a base model lack its prefix; a model asked for as a base model lacks it itself."""
    values = {"base.weight": torch.rand(2, 2), "bias": torch.rand(2), "head.weight": torch.rand(3)}
    read = weights_reader(remembered(tmp_path, values))
    assert read is not None
    assert torch.equal(read(["base.weight"]), values["base.weight"])
    assert torch.equal(read(["weight"]), values["base.weight"])
    assert torch.equal(read(["base.bias"]), values["bias"])
    assert torch.equal(read(["tied.weight", "head.weight"]), values["head.weight"])


def test_the_model_may_be_a_part_of_the_module(tmp_path: Path) -> None:
    value = torch.rand(3, 2)
    inner = remembered(tmp_path, {"head.weight": value})
    module = nn.ModuleDict({"other": nn.Linear(1, 1), "inner": nn.ModuleDict({"model": inner})})
    read = weights_reader(module)
    assert read is not None
    assert torch.equal(read(["inner.model.head.weight"]), value)


def test_only_the_file_that_has_the_tensor_is_opened(tmp_path: Path) -> None:
    value = torch.rand(2, 2)
    save_file({"base.weight": value}, tmp_path / "one.safetensors")
    index = {"base.weight": "one.safetensors", "head.weight": "two.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    model = Model()
    remember_weights(model, str(tmp_path), "main")
    read = weights_reader(model)
    assert read is not None
    assert torch.equal(read(["base.weight"]), value)
    with pytest.raises(ValueError, match=r"has no two\.safetensors, and only safetensors can be"):
        read(["head.weight"])


def test_where_nothing_is_remembered_there_is_no_reader() -> None:
    assert weights_reader(Model()) is None


def test_a_name_of_the_hub_is_downloaded_in_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.extend([name, revision, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_file({"head.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    model = Model()
    remember_weights(model, "someone/model", "v2")
    assert asked == ["someone/model", "v2", ["*.safetensors", "*.safetensors.index.json"]]
    read = weights_reader(model)
    assert read is not None
    assert read(["head.weight"]).sum() == 6


def test_a_folder_in_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    save_file({"head.weight": torch.ones(3, 2)}, tmp_path / "mine" / "model.safetensors")
    model = Model()
    remember_weights(model, "~/mine", "main")
    assert weights_reader(model) is not None


def test_a_tensor_that_no_file_has_is_named(tmp_path: Path) -> None:
    model = remembered(tmp_path, {"head.weight": torch.ones(3, 2)})
    read = weights_reader(nn.ModuleDict({"model": model}))
    assert read is not None
    message = r"init_module\(model='.*'\): its safetensors files have no 'base\.weight'\. Build the"
    with pytest.raises(ValueError, match=message):
        read(["model.base.weight"])


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    model = Model()
    remember_weights(model, str(tmp_path), "main")
    with pytest.raises(ValueError, match=r"has no model\.safetensors, and only safetensors can be"):
        weights_reader(model)
