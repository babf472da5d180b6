"""lightning-align check: what it tells, what it refuses with 2, and that it leaves nothing."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_align.__main__ import main
from tests.cli.test_app import config, write
from tests.cli.test_check_recipes import base_model, lines


@pytest.fixture(autouse=True)
def _in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    monkeypatch.chdir(tmp_path)


def names(folder: Path) -> set[str]:
    """All files and folders, less the token cache, which the run would use."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if not name.startswith("cache")}


def checked(folder: Path, content: dict[str, Any], *options: str) -> None:
    recipe = write(folder, content)
    before = names(folder)
    try:
        main(["check", "-c", recipe, *options])
    finally:
        assert names(folder) == before, "it left something"


def test_it_tells_shapes_length_and_memory_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would save checkpoints in two ways, log, draw and write a model."""
    content = config(tmp_path, max_steps=100, logger=True, accumulate_grad_batches=2)
    content["trainer"]["callbacks"] += [
        {"class_path": "AsyncCheckpoint", "init_args": {"dirpath": str(tmp_path / "async")}},
        {"class_path": "SavePretrained", "init_args": {"dirpath": str(tmp_path / "model")}},
        {"class_path": "MetricPlot", "init_args": {"metrics": ["train_loss"]}},
    ]
    checked(tmp_path, content)
    text = capsys.readouterr().out
    rows = content["data"]["init_args"]["batch_size"]
    columns = content["data"]["init_args"]["block_size"] + 1
    assert f"input_ids ({rows}, {columns}) int64" in text
    assert "PretrainModule, " in text
    assert "2 of them a step, ends after 100 steps" in text
    assert "on the fullest device, by formula" in text
    assert "not checked" not in text
    assert text.endswith("nothing is refused\n")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--data.paths=absent.txt"], "TextDataModule(paths='absent.txt'): is neither"),
        (["--data.blok_size=8"], "no such argument of TextDataModule. Did you mean block_size?"),
        (["--model.z_loss=-1"], "PretrainModule(z_loss=-1.0): must not be negative"),
        (["--trainer.callbacks+=LISA", "--trainer.callbacks.activated_layers=9"], "LISA(activated"),
        (["--model.optimizer.lr=-1"], "SGD: Invalid learning rate: -1.0"),
        (["--hardware=h1000"], "HardwareSpec"),
        (["--weights=some"], "check(weights='some'): must be one of"),
    ],
    ids=["data", "name", "constructor", "set-up", "optimizer", "hardware", "own"],
)
def test_a_refusal_of_any_stage_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], rule: str
) -> None:
    with pytest.raises(SystemExit) as end:
        checked(tmp_path, config(tmp_path), *options)
    assert end.value.code == 2
    assert f"{rule}" in capsys.readouterr().err


def pipeline(folder: Path, devices: int, **arguments: Any) -> dict[str, Any]:
    strategy = {
        "class_path": "PipelineStrategy",
        "init_args": {"num_microbatches": 2, **arguments},
    }
    return config(folder, strategy=strategy, accelerator="gpu", devices=devices, num_nodes=1)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.mark.usefixtures("_no_gpu")
def test_a_pipeline_of_devices_that_are_not_here_is_cut_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(tmp_path, pipeline(tmp_path, 2))
    text = capsys.readouterr().out
    assert "partition\n  stage  rank  layers" in text
    assert "what PipelineStrategy refuses when its 2 processes set up: there is no GPU here" in text
    assert "nothing is refused" in text


@pytest.mark.usefixtures("_no_gpu")
def test_more_stages_than_layers_are_refused_without_the_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        checked(tmp_path, pipeline(tmp_path, 8))
    assert end.value.code == 2
    assert "PipelineStrategy(devices=8): 8 stages need a layer each" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_gpu")
def test_data_of_several_nodes_is_shared_among_their_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tmp_path, accelerator="gpu", devices=4, num_nodes=2, strategy="ddp")
    checked(tmp_path, content)
    text = capsys.readouterr().out
    assert "on each process" in text
    assert "DDPStrategy refuses when its 8 processes set up" in text


def test_a_model_that_does_not_fit_on_the_hardware_is_refused_before_any_weight_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tmp_path, max_steps=10)
    sizes = content["model"]["init_args"]["model"]["init_args"]
    sizes |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 64}
    with pytest.raises(SystemExit) as end:
        checked(tmp_path, content, "--hardware", "h100-sxm")
    assert end.value.code == 2
    told = capsys.readouterr()
    assert "check(hardware='h100-sxm'): has too little memory" in told.err
    assert "the weights have shapes only" in told.out


def test_the_reference_is_not_asked_about_all_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"{n} is", "chosen": " truth", "rejected": " a lie"} for n in range(20)]
    content = config(tmp_path)
    base_model(tmp_path / "base")
    lines(tmp_path / "pairs.jsonl", pairs)
    content["model"] = {
        "class_path": "DPOModule",
        "init_args": {
            "model": "base",
            "precompute_ref_log_probs": True,
            "ref_cache_dir": str(tmp_path / "reference"),
        },
    }
    content["data"] = {
        "class_path": "PreferenceDataModule",
        "init_args": {"paths": "pairs.jsonl", "tokenizer": "base", "val_fraction": 0.2},
    }
    checked(tmp_path, content)
    text = capsys.readouterr().out
    assert "what the reference says of the data" in text
    assert "completion_mask" in text
