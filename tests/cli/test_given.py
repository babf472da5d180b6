"""What a command line gives: the laying of files and options, without a parser."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli.given import (
    by_argument,
    lay_over,
    option_as_layer,
    options_with_values,
    over,
    read_layer,
)

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1, "momentum": 0.5}}


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ({"lr": 2}, {**SGD, "init_args": {"lr": 2, "momentum": 0.5}}),
        ({"init_args": {"lr": 2}}, {**SGD, "init_args": {"lr": 2, "momentum": 0.5}}),
        ({"class_path": "SGD", "init_args": {"lr": 2}}, None),
        ({"class_path": "Adam"}, {"class_path": "Adam"}),
        ("SGD", {**SGD, "class_path": "SGD"}),
        ("Adam", "Adam"),
        ("mine.yaml", "mine.yaml"),
        (["SGD"], ["SGD"]),
    ],
)
def test_a_class_keeps_its_arguments_and_another_begins_anew(new: Any, expected: Any) -> None:
    expected = expected or {"class_path": "SGD", "init_args": {"lr": 2, "momentum": 0.5}}
    assert over(SGD, new) == expected


def test_an_option_goes_to_the_last_element_of_a_list() -> None:
    assert over(["Adam", SGD], {"lr": 2})[1]["init_args"] == {"lr": 2, "momentum": 0.5}
    assert over(["Adam", "SGD"], ["Adagrad"]) == ["Adagrad"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--a=1", "--b", "2", "-c3", "-d", "4"], [("--a", "1"), ("--b", "2"), ("-c", "3")]),
        (["--flag", "--a", "-1"], [("--flag", ""), ("--a", "-1")]),
        (["--a.b+=x=y", "word"], [("--a.b+", "x=y")]),
    ],
)
def test_options_with_values(args: list[str], expected: list[tuple[str, str]]) -> None:
    assert list(options_with_values(args))[: len(expected)] == expected


def test_an_option_is_a_layer_whose_numbers_stay_text() -> None:
    assert option_as_layer("model.lr", "1e-3") == {"model": {"lr": "1e-3"}}
    assert option_as_layer("a", "[1, {b: 2}]") == {"a": [1, {"b": 2}]}
    assert option_as_layer("a", "{unclosed") == {"a": "{unclosed"}


def test_values_go_by_the_names_of_arguments() -> None:
    layer = {"trainer": {"max_steps": 3}, "data": {"paths": "x"}}
    known = ["trainer.max_steps", "data"]
    assert dict(by_argument(layer, known)) == {"trainer.max_steps": 3, "data": {"paths": "x"}}


def test_layers_are_laid_over_each_other_and_appended() -> None:
    given: dict[str, Any] = {}
    lay_over(given, {"optimizers": "SGD"}, ["optimizers"], append=True)
    lay_over(given, {"optimizers": ["Adam"]}, ["optimizers"], append=True)
    lay_over(given, {"optimizers": {"betas": 1}, "steps": 3}, ["optimizers", "steps"])
    adam = {"class_path": "Adam", "init_args": {"betas": 1}}
    assert given == {"optimizers": ["SGD", adam], "steps": 3}


def test_what_yaml_cannot_read_is_an_error_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "date.yaml").write_text("day: 2020-99-99")
    with pytest.raises(yaml.YAMLError, match="month must be in"):
        read_layer(str(tmp_path / "date.yaml"))
    with pytest.raises(OSError, match=r"absent.yaml"):
        read_layer(str(tmp_path / "absent.yaml"))
