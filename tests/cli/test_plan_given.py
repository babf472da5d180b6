"""What a run's file says is planned with, unless something else is asked for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli.plan_given import DEFAULTS, chosen, said

NOTHING: dict[str, Any] = dict.fromkeys([*DEFAULTS, "shared_prefix"])


def written(path: Path, trainer: Any = None, name: str = "PretrainModule", **init: Any) -> str:
    model = {"class_path": f"lightning_align.{name}", "init_args": {"model": "m", **init}}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer or {}}))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_a_name_says_nothing() -> None:
    found, file = chosen("meta-llama/Llama-3.1-8B", NOTHING)
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS
    assert file == {}


def test_a_file_has_optimizer_precision_and_callbacks(path: Path) -> None:
    galore = {"class_path": "lightning_align.GaLoreAdamW", "init_args": {"rank": 16, "lr": 1e-3}}
    trainer = {
        "precision": "bf16-true",
        "callbacks": [{"class_path": "LISA", "init_args": {"activated_layers": 3}}],
    }
    model = written(path, trainer, optimizer=galore)
    found, file = chosen(model, NOTHING)
    expected = {"optimizer": "galore_adamw", "rank": 16, "lisa_layers": 3}
    expected |= {"objective": "pretrain", "precision": "bf16-true"}
    assert file == expected
    assert {name: found[name] for name in expected} == expected


def test_what_is_asked_for_comes_first(path: Path) -> None:
    galore = {"class_path": "GaLoreAdamW", "init_args": {"rank": 16}}
    model = written(path, {"precision": 32}, "DPOModule", optimizer=galore, reference_free=True)
    asked = {**NOTHING, "optimizer": "muon", "objective": "pretrain"}
    found, file = chosen(model, asked)
    assert (found["optimizer"], found["rank"]) == ("muon", None)  # the rank was GaLore's
    assert (found["objective"], found["reference"]) == ("pretrain", "model")
    assert file == {"precision": "32-true"}


@pytest.mark.parametrize(
    ("init", "reference"),
    [
        ({}, None),
        ({"precompute_ref_log_probs": True}, "precomputed"),
        ({"reference_free": True}, "none"),
    ],
)
def test_pairs_and_their_reference(path: Path, init: dict[str, Any], reference: Any) -> None:
    found = said(written(path, None, "DPOModule", **init))
    assert (found["objective"], found.get("reference")) == ("dpo", reference)


@pytest.mark.parametrize(
    "callbacks", [{"callbacks+": [{"class_path": "LISA"}]}, {"callbacks": "lightning_align.LISA"}]
)
def test_a_callback_may_be_added_and_have_defaults(path: Path, callbacks: Any) -> None:
    assert said(written(path, callbacks))["lisa_layers"] == 2


@pytest.mark.parametrize(
    ("trainer", "init", "precision"),
    [
        (None, {}, "32-true"),  # a Trainer's own
        ({"precision": "bf16"}, {}, "bf16-mixed"),
        (None, {"dtype": "bfloat16"}, "bf16-true"),
    ],
)
def test_precision_is_that_of_the_run(path: Path, trainer: Any, init: Any, precision: str) -> None:
    assert said(written(path, trainer, **init))["precision"] == precision


def test_an_optimizer_that_is_not_planned_is_left_to_be_refused(path: Path) -> None:
    assert said(written(path, optimizer="torch.optim.Adagrad"))["optimizer"] == "Adagrad"


@pytest.mark.parametrize(
    ("name", "init", "told"),
    [
        ("PretrainModule", {"peft_config": {"r": 8}}, "trains adapters.*which are not planned"),
        ("MyModule", {}, "its module is a MyModule, and must be a PretrainModule"),
    ],
)
def test_other_runs_are_refused(path: Path, name: str, init: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"plan\(model=.*run\.yaml.*{told}"):
        said(written(path, None, name, **init))
