"""The command line on tiny models: fit, resume, evaluate, and the mistakes that users make."""

import os
import re
import runpy
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig

from lightning_align.__main__ import main
from lightning_align.cli.app import AlignCLI
from lightning_align.cli.commands import COMMANDS
from tests.helpers.covers import with_slow

NOVEL = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"

MODEL = {
    "class_path": "transformers.LlamaConfig",
    "init_args": {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
}


@pytest.fixture(autouse=True)
def _quiet_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])


def config(folder: Path, **trainer: Any) -> dict[str, Any]:
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Chapter {i}\n{NOVEL * 12}" for i in range(6)))
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    return {
        "seed_everything": 1,
        "model": {
            "class_path": "PretrainModule",
            "init_args": {"model": deepcopy(MODEL), "optimizer": optimizer},
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "paths": str(corpus),
                "document_pattern": r"^Chapter \d+$",
                "vocab_size": 300,
                "block_size": 16,
                "batch_size": 4,
                "cache_dir": str(folder / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(folder / "checkpoints"),
                        "every_n_train_steps": 2,
                        "save_top_k": -1,
                        "filename": "{step}",
                    },
                }
            ],
            **trainer,
        },
    }


def write(folder: Path, content: dict[str, Any], name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(*arguments: str, folder: Path) -> AlignCLI:
    # With logger=False the configuration is saved to the working folder.
    before = Path.cwd()
    os.chdir(folder)
    try:
        return AlignCLI(args=list(arguments))
    finally:
        os.chdir(before)


def weights(cli: AlignCLI) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in cli.model.parameters()])


def test_fit_saves_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    recipe = write(tmp_path, config(tmp_path))
    whole = run("fit", "-c", recipe, folder=tmp_path)
    checkpoint = tmp_path / "checkpoints/step=2.ckpt"
    torch.load(checkpoint, weights_only=True)
    resumed = run("fit", "-c", recipe, f"--ckpt_path={checkpoint}", folder=tmp_path)
    assert resumed.trainer.global_step == 4
    assert torch.equal(weights(resumed), weights(whole))


def test_yaml_and_plain_trainer_give_the_same_run(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from lightning_align import PretrainModule, TextDataModule

    content = config(tmp_path, callbacks=[])
    ours = run("fit", "-c", write(tmp_path, content), folder=tmp_path)
    pl.seed_everything(1, verbose=False)
    data = TextDataModule(**content["data"]["init_args"])
    module = PretrainModule(
        LlamaConfig(**MODEL["init_args"]), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)
    )
    options = {**content["trainer"], "enable_checkpointing": False}
    pl.Trainer(**options).fit(module, data)
    theirs = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.equal(weights(ours), theirs)


@pytest.mark.parametrize(
    "subcommand", with_slow(["validate", "test", "predict"], ["validate", "predict"])
)
def test_evaluates_a_checkpoint(tmp_path: Path, subcommand: str) -> None:
    recipe = write(tmp_path, config(tmp_path))
    run("fit", "-c", recipe, folder=tmp_path)
    checkpoint = str(tmp_path / "checkpoints/step=4.ckpt")
    content = config(tmp_path, callbacks=[])
    evaluated = run(
        subcommand, "-c", write(tmp_path, content), f"--ckpt_path={checkpoint}", folder=tmp_path
    )
    metrics = evaluated.trainer.callback_metrics
    if subcommand != "predict":
        assert float(metrics[f"{subcommand.removesuffix('idate')}_loss"]) < 6.0
    else:
        assert len(evaluated.trainer.predict_loop.predictions) > 0


def test_checkpoint_rebuilds_the_module_that_the_yaml_described(tmp_path: Path) -> None:
    from lightning_align import PretrainModule

    cli = run("fit", "-c", write(tmp_path, config(tmp_path)), folder=tmp_path)
    restored = PretrainModule.load_from_checkpoint(
        tmp_path / "checkpoints/step=4.ckpt", weights_only=True
    )
    ours = torch.cat([p.detach().flatten() for p in restored.parameters()])
    assert torch.equal(ours, weights(cli))


class Payload:
    """What a crafted pickle would run."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["PAYLOAD_FOLDER"],))


def test_crafted_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("PAYLOAD_FOLDER", str(trap))
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "evil.ckpt")
    recipe = write(tmp_path, config(tmp_path))
    with pytest.raises(Exception, match="Weights only load failed"):
        run("fit", "-c", recipe, f"--ckpt_path={tmp_path / 'evil.ckpt'}", folder=tmp_path)
    assert not trap.exists()


def test_seed_is_fixed_by_default(tmp_path: Path) -> None:
    content = config(tmp_path, max_steps=1, callbacks=[])
    del content["seed_everything"]
    cli = run("fit", "-c", write(tmp_path, content), folder=tmp_path)
    assert cli.config["fit"]["seed_everything"] == 0


# Configurations


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        AlignCLI(args=["fit", *arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_reads_back_as_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, config(tmp_path, strategy={"class_path": "DDPStrategy"}))
    first = printed(capsys, "-c", recipe, "--data.batch_size=3", "--trainer.max_steps=7")
    (tmp_path / "my.yaml").write_text(first)
    assert printed(capsys, "-c", str(tmp_path / "my.yaml")) == first
    content = yaml.safe_load(first)
    assert content["data"]["init_args"]["batch_size"] == 3
    assert content["trainer"]["max_steps"] == 7
    assert content["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1


def test_a_printed_configuration_without_a_file_is_a_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model=PretrainModule", "--model.model=gpt2", "--data=TextDataModule"]
    first = printed(capsys, *options)
    (tmp_path / "my.yaml").write_text(first)
    assert printed(capsys, "-c", str(tmp_path / "my.yaml")) == first
    # Without the required ones, too: what is missing stands there as null.
    assert "model: null" in printed(capsys, options[0], options[2])


def test_the_saved_configuration_reruns_to_the_same_weights(tmp_path: Path) -> None:
    recipe = write(tmp_path, config(tmp_path))
    first = run("fit", "-c", recipe, "--trainer.max_steps=3", folder=tmp_path)
    saved = str((tmp_path / "config.yaml").rename(tmp_path / "saved.yaml"))
    again = run("fit", "-c", saved, folder=tmp_path)
    assert again.trainer.global_step == 3
    assert torch.equal(weights(first), weights(again))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == yaml.safe_load(
        Path(saved).read_text()
    )


def test_a_checkpoint_changes_no_setting(tmp_path: Path) -> None:
    """Lightning itself puts the hyperparameters of the checkpoint over what the user wrote."""
    content = config(tmp_path)
    run("fit", "-c", write(tmp_path, content), folder=tmp_path)
    content["model"]["init_args"]["z_loss"] = 0.25
    checkpoint = f"--ckpt_path={tmp_path / 'checkpoints/step=2.ckpt'}"
    resumed = run("fit", "-c", write(tmp_path, content), checkpoint, folder=tmp_path)
    assert resumed.model.z_loss == 0.25
    assert resumed.config.fit.model.init_args.z_loss == 0.25


def test_strategy_of_two_processes_by_class(tmp_path: Path) -> None:
    strategy = {"class_path": "DDPStrategy", "init_args": {"start_method": "fork"}}
    content = config(tmp_path, strategy=strategy, devices=2, max_steps=2)
    run("fit", "-c", write(tmp_path, content), folder=tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoints/step=2.ckpt", weights_only=True)
    assert checkpoint["TextDataModule"]["batch"] == 8, "4 samples on each of 2 ranks"


def test_a_strategy_by_the_bare_name_of_its_class_runs(tmp_path: Path) -> None:
    recipe = write(tmp_path, config(tmp_path, callbacks=[], max_steps=1))
    option = "--trainer.strategy=SingleDeviceStrategy"
    cli = run("fit", "-c", recipe, option, folder=tmp_path)
    assert type(cli.trainer.strategy).__name__ == "SingleDeviceStrategy"


# Mistakes


def test_missing_corpus_is_named_before_training(tmp_path: Path) -> None:
    content = config(tmp_path)
    content["data"]["init_args"]["paths"] = str(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"TextDataModule\(paths='.*absent.txt'\)"):
        run("fit", "-c", write(tmp_path, content), folder=tmp_path)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    content = config(tmp_path)
    content["data"]["init_args"]["vocab_size"] = 310
    with pytest.raises(ValueError, match="vocabulary has 300 rows, but the tokenizer makes ids"):
        run("fit", "-c", write(tmp_path, content), folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"action": ["skip", "clip"]}, "SpikeGuard(action=['skip', 'clip']): each must be once"),
        (
            {"detector": {"class_path": "SpikeDetector", "init_args": {"window": 4}}},
            "SpikeDetector(window=4): must be at least 8.",
        ),
    ],
    ids=["of a callback", "of a class in it"],
)
def test_what_a_class_refuses_is_told_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], rule: str
) -> None:
    content = config(tmp_path, callbacks=[{"class_path": "SpikeGuard", "init_args": arguments}])
    path = write(tmp_path, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["fit", "-c", path])
    assert str(error.value).startswith(f"lightning-align: {rule}")
    assert len(str(error.value).splitlines()) == 2
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="Union subtypes"):
        main(["fit", "-c", path])


def test_from_python_a_refusal_of_a_class_is_its_own_exception(tmp_path: Path) -> None:
    """Not the parser's, which quotes it among what each type of a union says."""
    arguments = {"detector": {"class_path": "SpikeDetector", "init_args": {"window": 4}}}
    guard = {"class_path": "SpikeGuard", "init_args": arguments}
    path = write(tmp_path, config(tmp_path, callbacks=[guard]))
    with pytest.raises(ValueError, match=r"^SpikeDetector\(window=4\): must be at least 8"):
        run("fit", "-c", path, folder=tmp_path)


def test_what_a_run_refuses_is_told_in_two_lines_by_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind of as many steps as the run has, which SpikeGuard knows in its setup."""
    guard = {"class_path": "SpikeGuard", "init_args": {"action": "rewind", "rewind_steps": 4}}
    path = write(tmp_path, config(tmp_path, callbacks=[guard]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["fit", "-c", path])
    first, second = str(error.value).splitlines()
    assert first.startswith("lightning-align: SpikeGuard(rewind_steps=4): the run has 4 steps")
    assert second == "Where it was raised: add --debug."


# As a program


def test_help_lists_every_command_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lightning_align", run_name="__main__")  # what `python -m` does
    assert stopped.value.code == 0
    overview = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", *COMMANDS):
        assert re.search(rf"^    {name} +\w", overview, re.M), name


def test_nothing_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert "recipes" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: lightning-align {name}" in shown
    options = COMMANDS[name].load().parser()._actions
    assert options
    assert all(action.help for action in options), "an option without help"


def test_help_of_a_class_describes_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        AlignCLI(args=["fit", "--model.help=lightning_align.PretrainModule"])
    details = capsys.readouterr().out
    assert "--model.z_loss" in details
    assert "Weight of the squared log-partition" in details


def test_a_misspelt_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fitt"])
    assert stopped.value.code == 2
    assert "fitt: no such command. Did you mean fit?" in capsys.readouterr().err
