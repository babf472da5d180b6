"""Mistakes in a configuration, found where they are: in what was given, against what is known."""

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from torch.optim import Optimizer

from lightning_align._compat.jsonargparse_parsing import (
    short_names_at_home,
    subclasses_found_once,
)
from lightning_align.cli.app import build_parser
from lightning_align.cli.failures import refusal
from lightning_align.cli.mistakes import argument_names, did_you_mean, explain, report


class Color(Enum):
    RED = 1


class Recognisable(Optimizer):
    """A class that only this file knows."""


class Data:
    def __init__(
        self,
        paths: str,
        tokenizer: str,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        block_size: int = 8,
        betas: tuple[float, float] = (0.5, 0.75),
        length: int | float | None = None,
        color: Color = Color.RED,
        inner: "Data | None" = None,
    ) -> None:
        pass


DATA = f"{__name__}.Data"
SGD = "torch.optim.SGD"
CLASS = "a class is given by class_path and init_args."


@pytest.fixture(autouse=True)
def as_in_the_command() -> Iterator[None]:
    """Where another test has imported bitsandbytes, SGD is torch's none the less."""
    with short_names_at_home(), subclasses_found_once():
        yield


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="here", exit_on_error=False)
    parser.add_argument("--config", "-c")
    parser.add_argument("--data", type=Data)
    parser.add_argument("--optimizers", type=list[Callable[[Iterable], Optimizer]])
    parser.add_argument("--trainer.max_steps", type=int, default=1)
    parser.add_argument("--trainer.max_epochs", type=int, default=1)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def data(**init_args: Any) -> dict[str, Any]:
    return {"class_path": DATA, "init_args": {"paths": "x", "tokenizer": "y", **init_args}}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        # keys, at any depth
        ({"dta": data()}, "dta: no such key of here. Did you mean data?"),
        ({"trainr": {"max_steps": 3}}, "trainr: no such key of here. Did you mean trainer?"),
        (
            {"trainer": {"max_step": 3}},
            "trainer.max_step: no such key of here. Did you mean trainer.max_steps?",
        ),
        (
            {"data": data(blok_size=3)},
            "data.init_args.blok_size: no such argument of Data. Did you mean block_size?",
        ),
        (
            {"data": data(optimzer={"class_path": SGD})},
            "data.init_args.optimzer: no such argument of Data. Did you mean optimizer?",
        ),
        (
            {"data": data(inner=data(inner=data(innr=data())))},
            "data.init_args.inner.init_args.inner.init_args.innr: no such argument of Data."
            " Did you mean inner?",
        ),
        (
            {"optimizers": [{"class_path": SGD}, {"class_path": SGD, "init_args": {"lrr": 1}}]},
            "optimizers[1].init_args.lrr: no such argument of SGD. Did you mean lr?",
        ),
        (
            {"optimizers": [{"class_path": SGD, "init_arg": {"lr": 1}}]},
            f"optimizers.init_arg: {CLASS} Did you mean init_args?",
        ),
        ({"data": {"clas_path": DATA}}, f"data.clas_path: {CLASS} Did you mean class_path?"),
        (
            {"data": {**data(), "lr": 1}},
            f"data.lr: {CLASS} Arguments of the class go under init_args.",
        ),
        # classes
        (
            {"data": data(optimizer={"class_path": "torch.optim.Sgd"})},
            "data.init_args.optimizer: no class Sgd in torch.optim. Did you mean SGD?",
        ),
        (
            {"optimizers": ["Recognizable"]},
            "optimizers: no class of the name Recognizable. Did you mean Recognisable?",
        ),
        (
            {"data": {"class_path": "Nonsense"}},
            "data: no class of the name Nonsense. Give its full path.",
        ),
        (
            {"data": {"class_path": "torch.optm.SGD"}},
            "data: torch.optm.SGD cannot be imported: No module named 'torch.optm'.",
        ),
        ({"data": {"class_path": SGD}}, "data: torch.optim.SGD is no Data."),
        # what is missing, and values
        (
            {"data": {"class_path": DATA}},
            "data.init_args.paths, data.init_args.tokenizer: must be given for Data.",
        ),
        ({"data": data(block_size="many")}, "data.init_args.block_size: must be int, not many."),
        (
            {"data": data(betas=[0.5, "x"])},
            "data.init_args.betas: must be tuple[float, float], not [0.5, 'x'].",
        ),
        ({"data": data(length="x")}, "data.init_args.length: must be int or float, not x."),
        # a misspelt name is why something is missing
        (
            {"data": {"class_path": DATA, "init_args": {"pahts": "x", "tokenizer": "y"}}},
            "data.init_args.pahts: no such argument of Data. Did you mean paths?",
        ),
        # nothing is wrong
        ({"data": data(optimizer={"class_path": SGD, "init_args": {"lr": "1e-3"}})}, None),
        ({"trainer": {"max_steps": 3}}, None),
        ([], None),
    ],
)
def test_explains_a_layer(
    parser: ArgumentParser, tmp_path: Path, layer: Any, line: str | None
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(layer))
    assert explain(parser, ["-c", str(tmp_path / "mine.yaml")]) == line


CHOSEN = ["--data", "Data", "--data.paths=x", "--data.tokenizer", "y"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["-cabsent.yaml"], "--config: there is no file absent.yaml."),
        (["--overwrit"], "--overwrit: no such option. Did you mean --overwrite?"),
        (
            ["--trainr.max_steps=3"],
            "--trainr.max_steps: no such option. Did you mean --trainer.max",
        ),
        (["--data", DATA, "--data.paths=x"], "data.init_args.tokenizer: must be given for Data."),
        ([*CHOSEN, "--data.block_size=many"], "data.init_args.block_size: must be int, not many."),
        (
            [*CHOSEN, "--data.optimizer=SGD", "--data.optimizer.momentm", "1"],
            "data.init_args.optimizer.init_args.momentm: no such argument of SGD."
            " Did you mean momentum?",
        ),
        (
            [*CHOSEN, "--data.optimizer=SGD", "--data.optimizer.init_args.momentm", "1"],
            "data.init_args.optimizer.init_args.momentm: no such argument of SGD."
            " Did you mean momentum?",
        ),
        (
            ["--optimizers+=SGD", "--optimizers+=Adam", "--optimizers.bets=1"],
            "optimizers[1].init_args.bets: no such argument of Adam. Did you mean betas?",
        ),
        (["--trainer.max_steps"], None),
        (["--data", "absent.yaml"], None),
        ([*CHOSEN, "--data", DATA, "--overwrite", "--trainer.max_steps", "-1"], None),
    ],
)
def test_explains_options(parser: ArgumentParser, options: list[str], line: str | None) -> None:
    found = explain(parser, options)
    assert found == line or (line and found and found.startswith(line))


def test_layers_lie_over_each_other(parser: ArgumentParser, tmp_path: Path) -> None:
    """The class comes from the first file, the mistake from the second, in short form."""
    layers = [{"data": data(optimizer={"class_path": SGD})}, {"data": {"blok_size": 3}}]
    options = []
    for i, layer in enumerate(layers):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(layer))
        options += ["-c", str(tmp_path / f"{i}.yaml")]
    mistake = "data.init_args.blok_size: no such argument of Data. Did you mean block_size?"
    assert explain(parser, options) == mistake
    another = ["--data.optimizer", "torch.optim.Adam", "--data.optimizer.momentum=1"]
    assert explain(parser, [*options[:2], *another]) == (
        "data.init_args.optimizer.init_args.momentum: no such argument of Adam."
    )


def test_a_class_in_a_file_of_its_own(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data(blok_size=3)))
    mistake = "data.init_args.blok_size: no such argument of Data. Did you mean block_size?"
    assert explain(parser, ["--data", str(tmp_path / "data.yaml")]) == mistake


def test_commands() -> None:
    told_of_help = "--hlp: no such option. Did you mean --help?"
    commands = {"fit": ArgumentParser(prog="here fit"), "test": ArgumentParser(prog="here test")}
    top = ArgumentParser(prog="here")
    assert explain(top, ["fitt"], commands) == "fitt: no such command. Did you mean fit?"
    assert explain(top, ["x", "--y"], commands) == "x: no such command. There are: fit, test."
    assert explain(top, ["fit", "--hlp"], commands) == told_of_help
    assert explain(top, [], commands) is None


MODEL = {"class_path": "lightning_align.PretrainModule", "init_args": {"model": "base/model"}}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.125}}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (
            {"model": {**MODEL, "init_args": {**MODEL["init_args"], "optimzer": ADAMW}}},
            "model.init_args.optimzer: no such argument of PretrainModule. Did you mean optimizer?",
        ),
        (
            {"trainr": {"max_steps": 3}},
            "trainr: no such key of fit. Did you mean trainer?",
        ),
        (
            {"trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": {"timeot": 1}}}},
            "trainer.strategy.init_args.timeot: no such argument of DDPStrategy."
            " Did you mean timeout?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_arg": {}}]}},
            f"trainer.callbacks.init_arg: {CLASS} Did you mean init_args?",
        ),
        ({"trainer": {"max_steps": 3}}, "model: must be given."),
    ],
)
def test_the_whole_command_answers_in_two_lines(
    tmp_path: Path, layer: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": MODEL, **layer}))
    if line.startswith("model:"):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(layer))
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(["fit", "-c", str(tmp_path / "mine.yaml")])
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"lightning-align: {line}"
    assert second.startswith("Options: lightning-align")


def test_what_cannot_be_explained_is_told_as_it_is(
    parser: ArgumentParser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report("the parser's own words", None, parser)
    monkeypatch.setattr("lightning_align.cli.mistakes.explain", lambda *_: 1 / 0)
    report("the parser's own words", None, parser)
    told = "here: the parser's own words\nOptions: here --help.\n"
    assert capsys.readouterr().err == 2 * told


def test_a_refusal_is_found_beneath_what_the_parser_makes_of_it() -> None:
    error = ValueError("Does not validate: 17 types, among them A(b=1)")
    error.__cause__ = ValueError("A(b=1): must be 2.")
    assert refusal(error) == "A(b=1): must be 2."
    assert refusal(ValueError("of somebody else")) is None


def test_did_you_mean_ignores_case_and_keeps_quiet_when_nothing_is_near() -> None:
    assert did_you_mean("adamw", ["AdamW", "SGD"]) == " Did you mean AdamW?"
    assert did_you_mean("something else", ["AdamW", "SGD"]) == ""


def test_argument_names_of_what_cannot_be_imported() -> None:
    assert {"lr", "momentum"} <= set(argument_names("torch.optim.SGD"))
    assert argument_names("torch.optim.Nothing") == argument_names("nowhere.Nothing") == []
