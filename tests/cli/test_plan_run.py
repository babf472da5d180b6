"""The run that a plan is laid over, and a file whose module is of another objective."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.__main__ import main
from lightning_align.cli import plan_yaml
from lightning_align.cli.plan_run import run_for
from tests.cli.test_plan_yaml import RUN, SIZES, of_pairs


def written(folder: Path, **parts: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **parts}))
    return str(path)


def test_a_name_gets_a_first_run() -> None:
    made, told = run_for("some/model", "dpo")
    assert made["model"] == {"class_path": "DPOModule", "init_args": {"model": "some/model"}}
    assert made["data"]["init_args"] == {"tokenizer": "some/model", "paths": "pairs.jsonl"}
    assert told == []


def test_a_file_of_the_objective_stays_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, trainer={"max_steps": 7})
    assert run_for(path, "pretrain") == (yaml.safe_load(Path(path).read_text()), [])


def test_the_other_module_gets_what_both_take(tmp_path: Path) -> None:
    own = {"z_loss": 1e-4, "label_smoothing": 0.1, "chunk_size": 64}
    model = {**RUN["model"], "init_args": {**RUN["model"]["init_args"], **own}}
    data = {"class_path": "TextDataModule", "init_args": {"paths": "a.txt", "tokenizer": "mine"}}
    made, told = run_for(written(tmp_path, model=model, data=data), "dpo")
    arguments = made["model"]["init_args"]
    assert made["model"]["class_path"] == "DPOModule"
    assert (arguments["chunk_size"], arguments["model"]["init_args"]) == (64, SIZES)
    assert not {"z_loss", "label_smoothing"} & arguments.keys(), "of another meaning in DPO"
    assert made["data"]["init_args"] == {"tokenizer": "mine", "paths": "pairs.jsonl"}
    assert told == [
        "DPOModule takes the place of the file's PretrainModule, without label_smoothing, z_loss;"
        " data.paths is pairs.jsonl, for yours"
    ]


def test_pairs_need_a_tokenizer_that_is_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(
        ValueError, match=r"objective='dpo'\): .*makes its tokenizer from its texts"
    ):
        run_for(path, "dpo")


@pytest.mark.slow  # fit's parser needs Lightning
@pytest.mark.parametrize("objective", ["dpo", "pretrain"])
def test_the_other_objective_becomes_a_file_that_fit_takes(objective: str, tmp_path: Path) -> None:
    run = of_pairs(tmp_path)
    if objective == "dpo":
        given = {"paths": "a.txt", "tokenizer": run["data"]["init_args"]["tokenizer"]}
        run = {**RUN, "data": {"class_path": "TextDataModule", "init_args": given}}
    path, output = written(tmp_path, **run), tmp_path / "plan.yaml"
    asked = ["--objective", objective, "--precision", "32-true", "--seq_len", "32"]
    main(["plan", "--model", path, "--hardware", "xeon-8480", *asked, "--output", str(output)])
    assert plan_yaml.checked(output) == ""
    named = yaml.safe_load(output.read_text())["model"]["class_path"]
    assert named == {"dpo": "DPOModule", "pretrain": "PretrainModule"}[objective]
