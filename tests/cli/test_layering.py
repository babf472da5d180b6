"""Layers of configuration: what a later one inherits, and what it must not."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_align import recipes
from lightning_align.cli.app import Program, build_parser
from lightning_align.cli.layering import AlignParser

Read = Callable[..., Any]


class ReadError(Exception):
    """Raised once the configuration is complete: nothing needs to run."""


class ReadOnly(Program):
    def instantiate_classes(self) -> None:
        raise ReadError(self)


@pytest.fixture(scope="module")
def parser() -> AlignParser:
    """Built once: that takes longer than parsing."""
    return build_parser()


@pytest.fixture(autouse=True)
def _quiet_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])


# Full paths: looking up a short name takes longer than all the rest of parsing.
BASE = {
    "model": {
        "class_path": "lightning_align.PretrainModule",
        "init_args": {
            "model": "base/model",
            "z_loss": 0.5,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.125, "weight_decay": 0.25, "betas": [0.5, 0.75]},
            },
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.StepLR",
                "init_args": {"step_size": 7, "gamma": 0.75, "last_epoch": 5},
            },
        },
    },
    "data": {
        "class_path": "lightning_align.TextDataModule",
        "init_args": {"paths": "base.txt", "tokenizer": "base/tokenizer", "batch_size": 77},
    },
    "trainer": {
        "strategy": {
            "class_path": "lightning.pytorch.strategies.DDPStrategy",
            "init_args": {"process_group_backend": "gloo", "find_unused_parameters": True},
        },
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"monitor": "base", "mode": "max"},
            }
        ],
    },
}


def layer(folder: Path, content: Any, name: str = "mine.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(content))
    return str(folder / name)


@pytest.fixture
def read(parser: AlignParser, tmp_path: Path) -> Read:
    """Configuration of ``fit`` from the base file and what follows it."""
    base = layer(tmp_path, BASE, "base.yaml")
    return lambda *arguments: parser.parse_args(["fit", "-c", base, *arguments]).fit


def as_layer(path: str, value: Any, where: str, folder: Path) -> list[str]:
    """One change as a second file, or as an option of the command line."""
    if where == "option":
        return [f"--{path}", value]
    content: Any = value
    for key in reversed(path.split(".")):
        content = {key: content}
        if key not in ("model", "data", "trainer", "strategy"):
            content = {"init_args": content}
    return ["-c", layer(folder, content)]


PLACES = pytest.mark.parametrize("where", ["file", "option"])


@PLACES
def test_another_optimizer_begins_from_its_own_defaults(
    read: Read, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jsonargparse hands on lr and weight_decay, because SGD has arguments of that name too."""
    model = read(*as_layer("model.optimizer", "SGD", where, tmp_path)).model.init_args
    assert model.optimizer.class_path == "torch.optim.SGD"
    assert (model.optimizer.init_args.lr, model.optimizer.init_args.weight_decay) == (1e-3, 0)
    assert (model.model, model.z_loss) == ("base/model", 0.5), "the class around it stays"
    told = "SGD replaces AdamW, whose settings are dropped: betas, lr, weight_decay."
    assert capsys.readouterr().err == f"lightning-align: {told}\n"


@PLACES
def test_a_name_that_torch_has_too_is_ours_which_is_said_once(
    read: Read, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read(*as_layer("model.optimizer", "Muon", where, tmp_path)).model.init_args
    assert model.optimizer.class_path == "lightning_align.Muon"
    told = "Muon is lightning_align.Muon; for torch.optim.Muon write the whole name."
    assert capsys.readouterr().err.count(f"lightning-align: {told}\n") == 1


@PLACES
def test_a_scheduler_that_torch_and_lightning_have_is_lightnings_which_has_a_monitor(
    read: Read, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ReduceLROnPlateau"
    options = as_layer("model.lr_scheduler", name, where, tmp_path)
    model = read(*options, "--model.lr_scheduler.monitor", "train_loss").model.init_args
    assert model.lr_scheduler.class_path == f"lightning.pytorch.cli.{name}"
    assert model.lr_scheduler.init_args.monitor == "train_loss"
    told = f"{name} is lightning.pytorch.cli.{name}; for torch.optim.lr_scheduler.{name} write"
    assert capsys.readouterr().err.count(told) == 1


@PLACES
def test_another_scheduler_begins_from_its_own_defaults(
    read: Read, tmp_path: Path, where: str
) -> None:
    change = as_layer("model.lr_scheduler", "ConstantLR", where, tmp_path)
    scheduler = read(*change).model.init_args.lr_scheduler
    assert scheduler.init_args.last_epoch == -1
    assert not hasattr(scheduler.init_args, "gamma")


@PLACES
def test_another_module_inherits_nothing(read: Read, tmp_path: Path, where: str) -> None:
    change = as_layer("model", "DPOModule", where, tmp_path)
    model = read(*change, "--model.model", "mine/model").model
    assert model.class_path == "lightning_align.DPOModule"
    assert model.init_args.model == "mine/model"
    assert model.init_args.optimizer is None
    assert model.init_args.lr_scheduler is None


@PLACES
def test_another_datamodule_inherits_nothing(read: Read, tmp_path: Path, where: str) -> None:
    change = as_layer("data", "PreferenceDataModule", where, tmp_path)
    arguments = ["--data.paths", "mine.jsonl", "--data.tokenizer", "mine/tokenizer"]
    data = read(*change, *arguments).data.init_args
    assert (data.paths, data.tokenizer, data.batch_size) == ("mine.jsonl", "mine/tokenizer", 8)


@PLACES
def test_what_another_class_lacks_then_is_asked_for(
    read: Read, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change = as_layer("data", "PreferenceDataModule", where, tmp_path)
    with pytest.raises(SystemExit):
        read(*change)
    message = "data.init_args.paths, data.init_args.tokenizer: must be given"
    assert message in capsys.readouterr().err


@PLACES
def test_another_strategy_inherits_nothing(read: Read, tmp_path: Path, where: str) -> None:
    change = as_layer("trainer.strategy", {"class_path": "FSDPStrategy"}, where, tmp_path)
    if where == "option":
        change = ["--trainer.strategy.class_path", "FSDPStrategy"]
    strategy = read(*change).trainer.strategy
    assert strategy.class_path == "lightning.pytorch.strategies.FSDPStrategy"
    assert strategy.init_args.process_group_backend is None


def test_a_string_replaces_a_strategy_with_arguments(read: Read, tmp_path: Path) -> None:
    assert read("--trainer.strategy", "ddp").trainer.strategy == "ddp"


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_a_list_of_a_later_file_replaces_the_earlier_list(
    read: Read, tmp_path: Path, name: str
) -> None:
    """Jsonargparse merges lists of equal length by number: mode="max" would go on."""
    callback = {"class_path": name, "init_args": {"monitor": "mine"}}
    change = layer(tmp_path, {"trainer": {"callbacks": [callback]}})
    (callback,) = read("-c", change).trainer.callbacks
    assert callback.class_path == f"lightning.pytorch.callbacks.{name}"
    assert (callback.init_args.monitor, callback.init_args.mode) == ("mine", "min")


def test_a_callback_added_by_an_option_inherits_nothing(read: Read, tmp_path: Path) -> None:
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=mine"]
    first, second = read(*options).trainer.callbacks
    assert (first.init_args.monitor, first.init_args.mode) == ("base", "max")
    assert (second.init_args.monitor, second.init_args.mode) == ("mine", "min")


def test_the_same_class_keeps_what_a_later_layer_leaves_out(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0}}
    change = {"model": {"class_path": "PretrainModule", "init_args": {"optimizer": optimizer}}}
    model = read("-c", layer(tmp_path, change), "--data.batch_size=3")
    assert model.model.init_args.optimizer.init_args.lr == 1.0
    assert model.model.init_args.optimizer.init_args.weight_decay == 0.25
    assert (model.data.init_args.batch_size, model.data.init_args.paths) == (3, "base.txt")
    assert capsys.readouterr().err == ""


# Strategies


def chosen_strategy(*options: str) -> Any:
    with pytest.raises(ReadError) as finished:
        ReadOnly(["fit", "--model=PretrainModule", "--model.model=x", *options])
    return finished.value.args[0].config.fit.trainer.strategy


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp"])
@PLACES
def test_strategy_by_registered_name(read: Read, tmp_path: Path, where: str, name: str) -> None:
    assert chosen_strategy(*as_layer("trainer.strategy", name, where, tmp_path)) == name


@pytest.mark.parametrize("name", ["DDPStrategy", "lightning.pytorch.strategies.DDPStrategy"])
@PLACES
def test_strategy_by_the_bare_name_of_a_class(
    read: Read, tmp_path: Path, where: str, name: str
) -> None:
    """Jsonargparse leaves it as text, which the Trainer then refuses."""
    strategy = chosen_strategy(*as_layer("trainer.strategy", name, where, tmp_path))
    assert strategy.class_path.endswith(".DDPStrategy")


@pytest.mark.parametrize("name", ["PipelineStrategy", "ZeROInfinityStrategy"])
def test_our_strategies_by_their_names(name: str) -> None:
    strategy = chosen_strategy(f"--trainer.strategy={name}")
    assert strategy.class_path.endswith(f".{name}")


def test_a_misspelt_strategy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen_strategy("--trainer.strategy=dpp")
    assert "no strategy of the name dpp. Did you mean ddp?" in capsys.readouterr().err


def test_strategy_with_arguments_on_the_command_line(read: Read, tmp_path: Path) -> None:
    options = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.static_graph", "true"]
    assert read(*options).trainer.strategy.init_args.static_graph is True


# Mistakes


def error_of(read: Read, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        read(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer_or_options", "line"),
    [
        (
            {"data": {"init_args": {"blok_size": 8}}},
            "data.init_args.blok_size: no such argument of TextDataModule."
            " Did you mean block_size?",
        ),
        (
            ["--data.blok_size=8"],
            "data.init_args.blok_size: no such argument of TextDataModule."
            " Did you mean block_size?",
        ),
        (
            {"model": {"init_args": {"z_los": 0.1}}},
            "model.init_args.z_los: no such argument of PretrainModule. Did you mean z_loss?",
        ),
        (
            {"model": {"init_args": {"optimizer": {"init_args": {"weigth_decay": 0.1}}}}},
            "model.init_args.optimizer.init_args.weigth_decay: no such argument of AdamW."
            " Did you mean weight_decay?",
        ),
        (
            ["--model.optimizer.weigth_decay", "1"],
            "model.init_args.optimizer.init_args.weigth_decay: no such argument of AdamW."
            " Did you mean weight_decay?",
        ),
        (
            {
                "model": {
                    "init_args": {
                        "model": {
                            "class_path": "transformers.LlamaConfig",
                            "init_args": {"hiden_size": 8},
                        }
                    }
                }
            },
            "model.init_args.model.init_args.hiden_size: no such argument of LlamaConfig."
            " Did you mean hidden_size?",
        ),
        (
            {"model": {"init_args": {"model": {"class_path": "transformers.LlamaConfg"}}}},
            "model.init_args.model: no class LlamaConfg in transformers. Did you mean LlamaConfig?",
        ),
        (
            {"trainer": {"max_step": 8}},
            "trainer.max_step: no such key of fit. Did you mean trainer.max_steps?",
        ),
        (
            ["--trainer.max_step", "8"],
            "--trainer.max_step: no such option. Did you mean --trainer.max_steps?",
        ),
        ({"modl": 8}, "modl: no such key of fit. Did you mean model?"),
        (
            ["--modl.model", "x"],
            "--modl.model: no such option. Did you mean --model.model?",
        ),
        (
            {
                "trainer": {
                    "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpat": "x"}}]
                }
            },
            "trainer.callbacks.init_args.dirpat: no such argument of ModelCheckpoint."
            " Did you mean dirpath?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "SavePretraned"}]}},
            "trainer.callbacks: no class of the name SavePretraned. Did you mean SavePretrained?",
        ),
        (
            {"trainer": {"logger": {"class_path": "CSVLoger"}}},
            "trainer.logger: no class of the name CSVLoger. Did you mean CSVLogger?",
        ),
        (
            {"model": {"class_path": "PretrainModul"}},
            "model: no class of the name PretrainModul. Did you mean PretrainModule?",
        ),
        (["--data", "TextDataModul"], "no class of the name TextDataModul. Did you mean TextData"),
        (
            {"data": {"class_path": "lightning_align.TextDataModul"}},
            "data: no class TextDataModul in lightning_align. Did you mean TextDataModule?",
        ),
        (
            ["--model.optimizer", "AdmW"],
            "model.init_args.optimizer: no class of the name AdmW. Did you mean AdamW?",
        ),
        (
            {"data": {"class_path": "TextDataModule", "block_size": 8}},
            "data.block_size: a class is given by class_path and init_args."
            " Arguments of the class go under init_args.",
        ),
        (
            {"data": {"class_path": "TextDataModule", "init_arg": {"block_size": 8}}},
            "data.init_arg: a class is given by class_path and init_args. Did you mean init_args?",
        ),
        (
            {"data": {"init_args": {"block_size": "many"}}},
            "data.init_args.block_size: must be int, not many.",
        ),
        (
            {"trainer": {"strategy": {"class_path": "DDPStrateg"}}},
            "trainer.strategy: no class of the name DDPStrateg. Did you mean DDPStrategy?",
        ),
        (["-c", "absent.yaml"], "--config: there is no file "),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_name(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str], layer_or_options: Any, line: str
) -> None:
    options = layer_or_options
    if isinstance(options, dict):
        options = ["-c", layer(tmp_path, options)]
    message = error_of(read, capsys, *options)
    assert f"lightning-align: {line}" in message or line in message.splitlines()[0]
    assert len(message.splitlines()) <= 3, "no wall of types"


def test_a_broken_file_is_named(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n")
    message = error_of(read, capsys, "-c", str(tmp_path / "broken.yaml"))
    assert "broken.yaml: must be YAML." in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[" * 100_000, "must not nest lists and mappings that deep"),
        (b"a: &a [*a]", "must not nest lists and mappings that deep"),
        (b"trainer:\n  max_steps: " + b"9" * 5000, "must be YAML. Exceeds the limit"),
        (b"trainer:\n  max_steps: 2020-99-99", "must be YAML. month must be in 1..12"),
        (b"trainer: \xff", "must be YAML. 'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["deep", "endless", "integer", "date", "bytes"],
)
def test_a_hostile_file_ends_in_two_lines(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, rule: str
) -> None:
    (tmp_path / "hostile.yaml").write_bytes(content)
    message = error_of(read, capsys, "-c", str(tmp_path / "hostile.yaml"))
    assert f"hostile.yaml: {rule}" in message
    assert len(message.splitlines()) == 2


def test_the_whole_message_is_one_variable_away(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    change = layer(tmp_path, {"data": {"init_args": {"blok_size": 8}}})
    with pytest.raises(ArgumentError, match=r"(?s)Union subtypes.*'blok_size' is not accepted"):
        read("-c", change)


def test_a_name_of_two_classes_asks_for_the_path(
    read: Read, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which none is ours, and two are Lightning's."""
    for name in ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", __name__):
        monkeypatch.setattr(sys.modules[name], "RMSprop", namesake(name), raising=False)
    message = error_of(read, capsys, "--model.optimizer", "RMSprop")
    assert "model.init_args.optimizer: RMSprop is the name of several classes: " in message
    assert "torch.optim.RMSprop" in message.splitlines()[0]


def namesake(module: str) -> type[torch.optim.Optimizer]:
    return type("RMSprop", (torch.optim.RMSprop,), {"__module__": module})


DOCS = Path(__file__).parents[2] / "docs/cli.md"
CONSOLE = re.findall(r"```console\n\$ lightning-align (.*)\n(.*)\n```", DOCS.read_text())


@pytest.mark.parametrize(("command", "answer"), CONSOLE)
def test_the_answers_in_the_docs_are_real(
    command: str,
    answer: str,
    parser: AlignParser,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes.copy("pretrain")
    with pytest.raises(SystemExit):  # --print_config ends, too
        parser.parse_args(command.split())
    assert answer in capsys.readouterr().err.splitlines()


def test_the_docs_show_some_mistakes() -> None:
    assert len(CONSOLE) >= 7
