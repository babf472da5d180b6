"""AlignCLI under a user's own script: the arguments of LightningCLI, its hooks, our mistakes."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import lightning_align
from lightning_align.cli import AlignCLI
from tests.cli.own_script import QUIET, Line, Points, Steep

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.cli.own_script", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def built(*words: str, **arguments: Any) -> AlignCLI:
    return AlignCLI(Line, Points, args=list(words), run=False, trainer_defaults=QUIET, **arguments)


def test_it_is_exported_at_the_top_and_in_its_room() -> None:
    assert lightning_align.AlignCLI is AlignCLI


def test_its_arguments_are_those_of_lightning_cli_in_their_order() -> None:
    ours, theirs = (list(inspect.signature(cls).parameters) for cls in (AlignCLI, LightningCLI))
    assert ours == theirs


def test_a_script_of_ones_own_runs_with_its_options_links_and_hooks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"width": 5}, "note": "hello"}))
    done = script(tmp_path, "fit", "-c", "run.yaml", "--model.lr", "0.5")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(("before", "after"))] == [
        "before hello (8, 5)",
        "after 4 5",
    ]
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["model"]["lr"], saved["seed_everything"]) == (0.5, 0)


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        (["--model.widht", "5"], "--model.widht: no such option. Did you mean --model.width?", 2),
        (["--model.width", "0"], "Line: a line needs a point", 1),
    ],
    ids=["name", "constructor"],
)
def test_its_mistakes_are_told_in_two_lines_under_the_name_of_the_script(
    tmp_path: Path, words: list[str], line: str, code: int
) -> None:
    done = script(tmp_path, "fit", *words)
    assert done.returncode == code
    said = done.stderr.replace("Seed set to 0\n", "").splitlines()
    assert said[0] == f"own_script.py: {line}"
    assert len(said) == 2


def test_run_false_builds_and_runs_nothing(tmp_path: Path) -> None:
    cli = built("--model.width", "3", "--trainer.max_steps", "2")
    assert (type(cli.model), type(cli.datamodule)) == (Line, Points)
    assert cli.subcommand is None
    assert cli.trainer.global_step == 0
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2


def test_a_subclass_is_named_in_subclass_mode() -> None:
    words = ["--model", "tests.cli.own_script.Steep", "--model.width", "3"]
    assert type(built(*words, subclass_mode_model=True).model) is Steep
    with pytest.raises(SystemExit):
        built(*words)  # the class is given; there is nothing to choose


def test_subclass_mode_of_the_data() -> None:
    cli = built("--data", "tests.cli.own_script.Points", "--data.number=4", subclass_mode_data=True)
    assert len(cli.datamodule.points) == 4


def test_seed_trainer_class_and_save_config_callback() -> None:
    class OwnTrainer(pl.Trainer):
        pass

    cli = built(seed_everything_default=7, trainer_class=OwnTrainer, save_config_callback=None)
    assert cli.config.seed_everything == 7
    assert type(cli.trainer) is OwnTrainer
    assert not any(isinstance(each, SaveConfigCallback) for each in cli.trainer.callbacks)
    first = torch.cat([p.flatten() for p in cli.model.parameters()])
    again = built(seed_everything_default=7)
    assert torch.equal(first, torch.cat([p.flatten() for p in again.model.parameters()]))
    assert any(isinstance(each, SaveConfigCallback) for each in again.trainer.callbacks)


def test_parser_kwargs_reach_the_parser_of_a_command() -> None:
    kwargs = {"prog": "mine", "fit": {"epilog": "The end.", "description": "Fits."}}

    class Parsed(AlignCLI):
        def before_instantiate_classes(self) -> None:
            fit = self._subcommand_parsers["fit"]
            assert (fit.epilog, fit.description) == ("The end.", "Fits.")
            assert self.parser.prog == "mine"
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Parsed(Line, Points, args=["fit"], parser_kwargs=kwargs)


def test_lightnings_optimizer_options_where_they_are_asked_for() -> None:
    cli = built("--optimizer=SGD", "--optimizer.lr=0.25", auto_configure_optimizers=True)
    found = cli.model.configure_optimizers()
    assert found.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"model_class": ["fit"]}, "AlignCLI(model_class=['fit']): must be a class"),
        ({"parser_class": dict}, "AlignCLI(parser_class=<class 'dict'>): must be AlignParser"),
    ],
    ids=["words", "parser"],
)
def test_what_is_no_class_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match="AlignCLI") as error:
        AlignCLI(**arguments)
    assert str(error.value).startswith(rule)


def test_from_python_a_constructor_raises_its_own_error() -> None:
    with pytest.raises(ValueError, match=r"^a line needs a point$"):
        built("--model.width=0")


class WithDebug(AlignCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--debug", type=int, default=0)


@pytest.mark.parametrize(
    ("words", "run"), [(["--debug", "3"], False), (["fit", "--debug=3"], True)]
)
def test_a_debug_option_of_ones_own_is_ones_own(words: list[str], run: bool) -> None:
    arguments: dict[str, Any] = {"trainer_defaults": {**QUIET, "max_steps": 1}, "run": run}
    cli = WithDebug(Line, Points, args=words, save_config_callback=None, **arguments)
    assert cli.config.get("debug", cli.config.get("fit.debug")) == 3


def test_ours_is_no_setting_and_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_ALIGN_DEBUG", raising=False)
    assert "debug" not in built("--debug").config
    assert "LIGHTNING_ALIGN_DEBUG" not in os.environ
