"""lightning-align profile on tiny models: figures, files, and nothing left behind."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_align.__main__ import main
from tests.cli.test_app import config, write


@pytest.fixture(autouse=True)
def _in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def profiled(folder: Path, content: dict[str, Any], *options: str) -> dict[str, Any]:
    """Figures of a profile of the configuration, in which nothing else was written."""
    recipe = write(folder, content)
    cache = {name for name in files(folder) if name.startswith("cache")}
    before = files(folder) - cache
    main(["profile", "-c", recipe, "--hardware", "cpu", "--json_file", "figures.json", *options])
    after = {name for name in files(folder) if not name.startswith("cache")}
    assert after - before == {"figures.json"} | {
        o for o in options if o.endswith((".png", ".trace"))
    }
    return json.loads((folder / "figures.json").read_text())


def test_figures_of_a_run_that_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would write checkpoints and logs, validate, and look at what validation found."""
    content = config(tmp_path, max_steps=100, logger=True, min_steps=50, log_every_n_steps=1)
    content["trainer"]["callbacks"] += [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": "RooflineMonitor"},
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val_loss"},
        },
    ]
    options = ["--steps", "2", "--png", "roof.png", "--trace", "ops.trace"]
    found = profiled(tmp_path, content, *options)
    text = capsys.readouterr().out
    assert "xeon-8480" in text
    assert "MFU" in text
    assert "| module | ms |" in text
    assert "wrote roof.png" in text
    assert found["measured"]["step_s"] > 0
    assert found["report"]["model_flops"] > 0
    assert found["time"]["seconds"] > 0
    assert {"name", "text", "gain"} <= set(found["advice"][0])


def test_a_rate_that_waits_for_validation_is_left_alone(tmp_path: Path) -> None:
    """An epoch ends within the profile, where Lightning asks for the monitored value."""
    content = config(tmp_path, max_steps=100, limit_train_batches=2)
    content["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
        "init_args": {"monitor": "val_loss"},
    }
    assert profiled(tmp_path, content, "--steps", "3")["measured"]["step_s"] > 0


def test_on_meta_there_are_neither_weights_nor_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tmp_path, max_steps=100, accumulate_grad_batches=3)
    content["data"]["init_args"]["paths"] = "nowhere.txt"
    found = profiled(tmp_path, content, "--meta")
    assert "nothing measured; rows as long as they may be" in capsys.readouterr().out
    assert found["measured"] == {}
    assert found["report"]["total_flops"] > 0


def test_what_cannot_be_profiled(tmp_path: Path) -> None:
    recipe = write(tmp_path, config(tmp_path, max_steps=2))
    with pytest.raises(SystemExit, match=r"the run has only 2"):
        main(["profile", "-c", recipe, "--hardware", "cpu"])
    with pytest.raises(SystemExit, match="casts on a device"):
        main(["profile", "-c", recipe, "--meta", "--trainer.precision", "bf16-mixed"])
    assert not list(tmp_path.glob(".profile-*"))


@pytest.mark.slow
def test_files_of_the_real_run_on_the_drive_stay(tmp_path: Path) -> None:
    content = config(tmp_path, max_steps=3)
    content["trainer"]["strategy"] = {
        "class_path": "ZeROInfinityStrategy",
        "init_args": {"nvme_path": "drive", "overwrite": True},
    }
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "committed").write_text("of the real run")
    found = profiled(tmp_path, {**content, "trainer": {**content["trainer"], "max_steps": 100}})
    assert found["measured"]["waiting_share"] >= 0
    assert (tmp_path / "drive" / "committed").read_text() == "of the real run"
