"""lightning-align plan: tables, files, and mistakes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from lightning_align.__main__ import main
from lightning_align.cli import plan_yaml
from lightning_align.planner import HardwareSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ).save_pretrained(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def test_it_ranks_says_why_and_what_if(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    text = run(capsys, "--model", folder, "--hardware", "4xh100-sxm", "--top_k", "2")
    lines = text.splitlines()
    assert lines[0].startswith("962 k parameters: 4 blocks of width 128")
    assert "4 x h100-sxm" in lines
    assert any(line.startswith("1  dp") for line in lines)
    assert not any(line.startswith("3  dp") for line in lines)
    assert "others fit and take" in text
    for head in ("memory of a device (80 GB)", "time of a step", "what if"):
        assert head in lines
    assert "weights" in text
    assert "twice the batch" in text


def test_hardware_stands_side_by_side_with_its_price(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    figures = tmp_path / "plans.json"
    text = run(
        capsys,
        *("--model", folder, "--hardware", "2xh100@3", "--hardware", "2xa100@1.5"),
        *("--train_tokens", "1e12", "--tokens_per_batch", "1024"),
        *("--json_file", str(figures)),
    )
    last = [line for line in text.splitlines() if line.startswith(("2 x h100", "2 x a100"))][-2:]
    assert len(last) == 2
    assert not any(" -  " in line for line in last)
    assert "days for 1e+12 tokens" in text
    assert [each["hardware"] for each in json.loads(figures.read_text())] == [
        "h100-sxm",
        "a100-sxm-80gb",
    ]


def test_failures_take_their_days(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    given = ("--model", folder, "--hardware", "8xh100@2", "--train_tokens", "1e15")
    plain = run(capsys, *given)
    figures = tmp_path / "plans.json"
    more = ("--mtbf", "10d", "--checkpoint_time", "30s", "--restart_time", "1h")
    text = run(capsys, *given, *more, "--json_file", str(figures))
    days, failing = (
        float(re.search(r"([\d,.e+]+) days for 1e\+15", told)[1].replace(",", ""))  # type: ignore[index]
        for told in (plain, text)
    )
    assert 1.04 * days < failing < 1.07 * days  # restarts of 1 h each 30 h, and what is lost
    assert "one of 8 devices fails every 1.25 d; a checkpoint every 42.1 min" in text
    assert "restarts" in text
    told = json.loads(figures.read_text())[0]["time_to_train"]
    assert told["seconds"] == pytest.approx(failing * 86400, rel=0.01)
    assert told["interval_s"] == pytest.approx(42.1 * 60, rel=0.01)


def test_new_tokens_plan_generation(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    text = run(capsys, "--model", folder, "--hardware", "h100", "--new_tokens", "32")
    assert "1 x h100-sxm, bf16-true: 32 new tokens for prompts of 256" in text
    assert "what if" not in text


def test_figures_of_generation_are_written(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    figures = tmp_path / "generation.json"
    given = ("--model", folder, "--hardware", "h100", "--hardware", "rtx-4090")
    text = run(capsys, *given, "--new_tokens", "32", "--json_file", str(figures))
    assert text.splitlines()[-1] == f"wrote {figures}"
    found = json.loads(figures.read_text())
    assert [each["hardware"] for each in found] == ["h100-sxm", "rtx-4090"]
    assert [each["batch_size"] for each in found[0]["batches"]] == [1, 4, 16, 64, 256]
    assert {"new_tokens": 32, "prompt_length": 256}.items() <= found[0].items()
    assert f"room for a batch of {found[1]['max_batch_size']:,}" in text
    assert json.dumps(found, allow_nan=False), "a batch that there is none of is null"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["1000"], "a batch has 3 rows of 256 tokens, 768 of the 1,000 in tokens_per_batch"),
        (["768"], None),
        (["1600", "--objective", "dpo"], "a batch has 3 pairs of 512 tokens, 1,536 of the 1,600"),
    ],
)
def test_tokens_that_fill_no_row_are_said(
    capsys: pytest.CaptureFixture[str], folder: str, given: list[str], told: str | None
) -> None:
    hardware = ("--hardware", "h100", "--hardware", "a100")
    lines = run(capsys, "--model", folder, *hardware, "--tokens_per_batch", *given).splitlines()
    said = [line for line in lines if "in tokens_per_batch" in line]
    assert len(said) == (told is not None)
    assert told is None or said[0].startswith(told)


def test_what_shared_prompts_would_give(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    text = run(capsys, "--model", folder, "--hardware", "h100", "--objective", "dpo")
    (line,) = (each for each in text.splitlines() if each.startswith("prompts of half a row"))
    assert "+" in line
    assert "prompts of half" not in run(capsys, "--model", folder, "--hardware", "h100")


def test_the_machine_at_hand_is_measured(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def measured(device: str, **given: Any) -> HardwareSpec:
        asked.append(given)
        found = HardwareSpec.from_name("xeon-8480", devices=given["devices"])
        return replace(found, name=f"this {device}")

    monkeypatch.setattr(HardwareSpec, "measure", measured)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = run(capsys, "--model", folder, "--hardware", "2xhere", "--hardware", "here@1")
    assert [given["devices"] for given in asked] == [2, 1]
    assert asked[1]["price_per_hour"] == 1
    assert "2 x this cpu" in text.splitlines()


def test_a_file_is_planned_as_it_trains(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    model = {"model": folder, "optimizer": {"class_path": "lightning_align.Muon"}}
    path.write_text(yaml.safe_dump({"model": {"class_path": "DPOModule", "init_args": model}}))
    text = run(capsys, "--model", str(path), "--hardware", "h100")
    assert (
        text.splitlines()[1]
        == "as its file has it: objective dpo, optimizer muon, precision 32-true"
    )
    assert "reference" in text


def test_few_rows_are_for_splits_with_few_replicas(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    text = run(capsys, "--model", folder, "--hardware", "8xh100", "--tokens_per_batch", "768")
    assert "1  dp 1," in text


@pytest.mark.slow  # fit's parser needs Lightning
def test_the_best_plan_becomes_a_file_that_fit_takes(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    text = run(
        capsys,
        *("--model", folder, "--hardware", "xeon-8480", "--seq_len", "64"),
        *("--precision", "32-true", "--optimizer", "muon", "--runnable", "true"),
        *("--output", str(path)),
    )
    assert f"wrote {path}" in text
    assert plan_yaml.checked(path) == ""
    content = yaml.safe_load(path.read_text())
    assert content["model"]["init_args"]["optimizer"]["class_path"] == "lightning_align.Muon"
    assert content["data"]["init_args"]["block_size"] == 64
    assert content["trainer"]["accelerator"] == "cpu"


def test_tables_are_there_before_a_file_cannot_be_written(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "no" / "plans.json")
    with pytest.raises(SystemExit, match=r"json_file=.*cannot be written"):
        main(["plan", "--model", folder, "--hardware", "h100", "--json_file", path])
    assert "what if" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--hardware", "8xh10"], "Did you mean 'h100-sxm'"),
        (["--hardware", "h100@cheap"], "must be the price of an hour"),
        (["--hardware", "h100@-1"], "price_per_hour=-1.0.*not negative"),
        (["--hardware", "h100", "--tokens_per_batch", "3"], "at least one row of 256 tokens"),
        (["--hardware", "h100", "--memory_limit", "1KB"], "nothing fits.*which lacks"),
        (["--hardware", "h100", "--optimizer", "lion"], "must be one of 'adamw'"),
        (["--hardware", "h100", "--top_k", "0"], "top_k=0.*at least 1"),
        (["--hardware", "h100", "--train_tokens", "0"], "train_tokens=0.*positive and finite"),
        (["--hardware", "h100", "--seq_len", "0"], "seq_len=0"),
        (
            [
                *("--hardware", "h100", "--train_tokens", "9"),
                "--mtbf=5y",
                "--checkpoint_interval=0s",
            ],
            "checkpoint_interval='0s'.*positive",
        ),
        (["--hardware", "h100", "--mtbf", "5y"], "mtbf='5y'.*not given in train_tokens"),
        (["--hardware", "h100", "--restart_time", "1h"], "restart_time='1h'.*without mtbf"),
        (["--hardware", "h100", "--new_tokens", "9", "--rank", "8"], "rank=8.*plans generation"),
        (["--hardware", "h100", "--mtbf", "5", "--train_tokens", "1e9"], "without a failure"),
        (["--hardware", "h100", "--new_tokens", "0"], "new_tokens=0"),
        (["--hardware", "h100", "--objective", "dpo", "--shared_prefix", "1"], "to below 1"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: str, given: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        main(["plan", "--model", folder, *given])


CONFIGS = {
    "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": (8192, 28672, 80, 64),
}


@pytest.mark.slow
def test_the_answers_in_the_docs_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = Path(__file__).parents[2] / "docs" / "planner.md"
    answers = re.findall(r"```console\n\$ lightning-align (.+)\n((?:.*\n)+?)```", docs.read_text())
    assert len(answers) == 13
    monkeypatch.chdir(tmp_path)
    for name, (width, ffn, blocks, heads) in CONFIGS.items():
        LlamaConfig(
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
        ).save_pretrained(name)
    for command, shown in answers:
        main(command.split())
        printed = iter(capsys.readouterr().out.splitlines())
        for line in shown.splitlines():
            assert line == "..." or line in printed, f"{command} does not print {line!r}"
