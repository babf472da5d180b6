"""Arguments are of the types that constructors declare, and text means what YAML means by it."""

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import LlamaConfig

from lightning_align import PretrainModule, TextDataModule
from lightning_align._declared import declared, described, fits, read
from tests.helpers.checkpoints import save_checkpoint


@declared
class Told:
    def __init__(
        self,
        number: int,
        rate: float = 0.1,
        *,
        flag: bool = True,
        names: Sequence[str] = (),
        kind: Literal["a", "b"] = "a",
        later: "Unknown | None" = None,  # noqa: F821 (as what only type checkers import)
    ) -> None:
        self.given = (number, rate, flag, names, kind, later)


class Own(Told):
    def __init__(self, mine: str) -> None:
        super().__init__(3)
        self.mine = mine


@declared
@dataclass(frozen=True)
class Plain:
    size: int = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Told("x"), r"Told\(number='x'\): must be a whole number, an int\."),
        (lambda: Told(1e2), r"Told\(number=100\.0\): must be a whole number, an int\. Write 100\."),
        (lambda: Told(True), r"Told\(number=True\): must be a whole number"),
        (lambda: Told(None), r"Told\(number=None\): must be a whole number"),
        (lambda: Told(1, [0.1]), r"Told\(rate=\[0\.1\]\): must be a number\."),
        (lambda: Told(1, flag=1), r"Told\(flag=1\): must be True or False\."),
        (lambda: Told(1, names="ab"), r"names='ab'\): must be a list of texts\. Write \['ab'\]\."),
        (lambda: Told(1, names=["a", 1]), r"Told\(names=.*must be a list of texts\."),
        (lambda: Told(1, kind="c"), r"Told\(kind='c'\): must be 'a' or 'b'\."),
        (lambda: Told(1, flags=True), r"flags=True\): there is no such argument\. Did you mean fl"),
        (lambda: Told(1, xyz=True), r"no such argument\. help\(Told\) has them\."),
        (lambda: Told(rate=1.0), r"Told\(number\): must be given\."),
        (lambda: Plain("two"), r"Plain\(size='two'\): must be a whole number"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_taken() -> None:
    assert Told("32", "1e-3", flag="yes").given[:3] == (32, 0.001, True)
    rest = Told(numpy.int64(2), torch.tensor(0.5), names=("a",), later=object()).given
    assert rest[0] == 2
    assert rest[3] == ("a",)
    assert Plain("2") == Plain(2)


def test_a_class_is_what_it_was_to_whoever_looks_at_it() -> None:
    assert [*inspect.signature(Told).parameters][:2] == ["number", "rate"]
    assert inspect.isfunction(Told.__init__)
    assert Own("x").mine == "x"
    assert copy.deepcopy(Own("x")).given == pickle.loads(pickle.dumps(Own("x"))).given
    with pytest.raises(TypeError, match="no such argument"):
        Told(1, other=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Own(other="x")  # a subclass answers for its own arguments


def test_hyperparameters_of_a_subclass_are_found() -> None:
    """Lightning looks for them in the frames of ``__init__``, one after the other."""

    class Mine(TextDataModule):
        def __init__(self, mine: int, **options: Any) -> None:
            super().__init__(**options)

    assert Mine(5, block_size=32).hparams["mine"] == 5
    assert Mine(5, block_size=32).hparams["block_size"] == 32
    assert TextDataModule(block_size="32").hparams["block_size"] == 32


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "32"),
        (int, "-1"),
        (int, "3.0"),
        (int, "1e3"),
        (int, "many"),
        (float, "1e-3"),
        (float, "3"),
        (float, "nan"),
        (bool, "true"),
        (bool, "no"),
        (bool, "1"),
        (list[float], "[1, 2.5]"),
        (list[float], "[1, x]"),
        (tuple[float, float], "[0.9, 0.95]"),
        (tuple[float, float], "[0.9]"),
        (dict[str, Any], "{a: 1}"),
        (timedelta, "0:01:00"),
        (timedelta, "1 day, 2:00:00"),
        (timedelta, "60"),
        (int | None, "null"),
        (str | None, "null"),
        (int | str, "32"),
    ],
    ids=str,
)
def test_text_means_what_yaml_means(hint: Any, text: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=hint)
    try:
        theirs = parser.parse_object({"x": text}).x
    except Exception:
        with pytest.raises(ValueError, match=r"^Here\(x="):
            read("Here", "x", text, hint)
        return
    if fits(text, hint):  # text that may be text stays what it is in Python
        assert read("Here", "x", text, hint) == text
    else:
        ours = read("Here", "x", text, hint)
        same = tuple(ours) if isinstance(theirs, tuple) else ours
        assert (same, type(same)) == (theirs, type(theirs)) or float(same) == theirs


def test_objects_are_taken_for_what_they_are() -> None:
    class Duck:
        pass

    assert fits(Duck(), torch.nn.Module)
    assert not fits(3, torch.nn.Module)
    assert fits(Path("a"), str)
    assert fits("anything", Callable[[Iterable[int]], int])
    assert not fits(["a"] * 3 + [1], list[str])
    assert not fits(60, timedelta | None)


def test_a_time_says_how_to_write_it() -> None:
    with pytest.raises(ValueError, match=r"Write datetime\.timedelta\(seconds=60\)\.$"):
        read("Here", "x", 60, timedelta | None)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number, an int or None"),
        (list[str] | str, "a list of texts or text"),
        (tuple[float, float], "a list of 2 numbers"),
        (dict[str, int], "a mapping"),
        (Literal["a"], "'a'"),
        (pl.Trainer, "a Trainer"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert described(hint) == words


def test_a_checkpoint_of_a_subclass_loads_without_its_arguments(tmp_path):
    """Lightning drops hyperparameters that a class does not take, if it can see what it takes."""

    class Noted(PretrainModule):
        def __init__(self, note, **options):
            super().__init__(**options)
            self.save_hyperparameters("note")

    config = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", Noted("of mine", model=config))
    assert torch.load(checkpoint, weights_only=False)["hyper_parameters"]["note"] == "of mine"
    ours = PretrainModule.load_from_checkpoint(checkpoint, model=config, weights_only=False)
    assert type(ours) is PretrainModule
