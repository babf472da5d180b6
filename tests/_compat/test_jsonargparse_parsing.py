"""One test for each private API of jsonargparse: what we rely on, on the pinned version."""

import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser, _typehints

import lightning_align
from lightning_align._compat import jsonargparse_parsing
from tests.helpers import namesake


def test_whole_class_switches_drop_what_jsonargparse_would_hand_on() -> None:
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    adam, sgd = "--optimizer=torch.optim.Adam", "--optimizer=torch.optim.SGD"
    options = [adam, "--optimizer.lr=3", "--optimizer.eps=2", sgd]
    told = set()
    with jsonargparse_parsing.whole_class_switches(lambda *switch: told.add(repr(switch))):
        assert parser.parse_args(options).optimizer.init_args.lr == 1e-3
    assert told == {"('torch.optim.Adam', 'torch.optim.SGD', ['lr', 'eps'])"}
    assert parser.parse_args(options).optimizer.init_args.lr == 3, "jsonargparse as it was"


def test_short_names_at_home_means_torch_where_another_package_has_the_name_too() -> None:
    assert namesake.Adagrad is not torch.optim.Adagrad
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    with jsonargparse_parsing.short_names_at_home():
        assert parser.parse_args(["--optimizer=Adagrad"]).optimizer.class_path.startswith("torch.")
        foreign = "tests.helpers.namesake.Adagrad"
        assert parser.parse_args([f"--optimizer={foreign}"]).optimizer.class_path == foreign
    with pytest.raises(ArgumentError, match="Multiple subclasses with name Adagrad"):
        parser.parse_args(["--optimizer=Adagrad"])  # jsonargparse as it was


def test_a_short_name_that_we_have_too_is_ours_and_the_others_are_told() -> None:
    assert lightning_align.Muon is not torch.optim.Muon
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    told = set()
    with jsonargparse_parsing.short_names_at_home(lambda *names: told.add(repr(names))):
        path = parser.parse_args(["--optimizer=Muon"]).optimizer.class_path
        theirs = parser.parse_args(["--optimizer=torch.optim.Muon"]).optimizer.class_path
    assert path.startswith("lightning_align.")
    assert path.endswith(".Muon")
    assert theirs == "torch.optim.Muon"
    assert told == {repr((path, ["torch.optim.Muon"]))}


def optimizer_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    parser.add_argument("--names", nargs="+", type=str)
    parser.add_argument("--lr", type=float, required=True)
    return parser


def test_arguments_by_name_with_their_types() -> None:
    found = jsonargparse_parsing.arguments(optimizer_parser())
    assert {"optimizer", "names", "lr"} <= set(found)
    assert jsonargparse_parsing.type_of(found["lr"]) is float
    assert jsonargparse_parsing.type_of(found["names"]) is None
    assert jsonargparse_parsing.type_of(found["help"]) is None


def test_required_are_the_arguments_without_a_default() -> None:
    assert jsonargparse_parsing.required(optimizer_parser()) == {"lr"}


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("lr", 0.1, True),
        ("lr", "1e-3", True),
        ("lr", "fast", False),
        ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}, True),
        ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lrr": 1.0}}, False),
        ("optimizer", {"clas_path": "torch.optim.SGD"}, False),
    ],
)
def test_accepts_judges_a_value_with_all_that_is_nested(
    name: str, value: object, accepted: bool
) -> None:
    assert jsonargparse_parsing.accepts(optimizer_parser(), name, value) is accepted


def test_class_path_of_a_short_name() -> None:
    base = torch.optim.Optimizer
    assert jsonargparse_parsing.class_path(base, "Rprop") == "torch.optim.Rprop"
    assert jsonargparse_parsing.class_path(base, "some.Where") == "some.Where"
    with pytest.raises(ValueError, match="Multiple subclasses"):
        jsonargparse_parsing.class_path(base, "Adagrad")


def test_subclasses_are_found_once_and_once_more_behind_an_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find, asked = _typehints.get_all_subclass_paths, list[object]()
    counted = lambda *args, **options: asked.append(args) or find(*args, **options)  # noqa: E731
    monkeypatch.setattr(_typehints, "get_all_subclass_paths", counted)

    def imported(name: str, *bases: type) -> type:
        module = ModuleType(name.lower())
        cls = type(name, bases, {"__module__": module.__name__})
        setattr(module, name, cls)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return cls

    base = imported("Base")
    imported("Early", base)
    with jsonargparse_parsing.subclasses_found_once():
        for _ in range(3):
            assert jsonargparse_parsing.class_path(base, "Early") == "early.Early"
        assert len(asked) == 1
        imported("Late", base)
        for name in ("Late", "Early", "Late"):
            assert jsonargparse_parsing.class_path(base, name) == f"{name.lower()}.{name}"
        assert len(asked) == 2
    jsonargparse_parsing.class_path(base, "Late")
    assert len(asked) == 3, "jsonargparse as it was"
