"""The whole job by the command line, in seconds: every file, every metric, every logger."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_align.demo.run import SAMPLED_PROMPTS, kl_divergence, likelihood_accuracy
from tests.helpers.wandb_reader import read_wandb_run

pytestmark = pytest.mark.slow  # `make test-laws` runs them

# The last two: bars of transformers, and samples longer than the model's rows.
WARNS = ("warning", "deprecated", "recommended", "tip:", "loading weights", "friendly reminder")
KL = "KL to the reference, nats per token"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "LIGHTNING_ALIGN_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "lightning_align", "demo", "--fast", "--output=here"]
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (folder / "here/stdout.txt").write_text(run.stdout)
    (folder / "here/stderr.txt").write_text(run.stderr)
    return folder / "here"


def test_report_names_all_metrics_and_places(output: Path) -> None:
    printed = (output / "stdout.txt").read_text()
    for words in (
        "validation perplexity",
        "preference accuracy, held-out chapters",
        "reward margin",
        "KL to the reference",
        "Kneser-Ney trigram",
        "the longer text",
        "likelier to an untrained model",
        "Everything is in here/",
    ):
        assert words in printed
    report = json.loads((output / "report.json").read_text())
    before, after = report["table"]["validation perplexity"]
    assert 1 < before < 1100
    assert before != after


def test_nothing_is_said_that_is_not_about_the_run(output: Path) -> None:
    printed = "".join((output / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    # DeepSpeed, which is here as a peer, says so wherever it is imported by others.
    printed = "\n".join(line for line in printed.splitlines() if "real_accelerator" not in line)
    assert "sampling pairs" in printed
    for words in WARNS:
        assert words not in printed.lower(), words


def test_folders_load_and_differ(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "dpo/model")
    ids = torch.tensor([tokenizer.encode("It is a truth universally acknowledged")])
    before, after = (
        AutoModelForCausalLM.from_pretrained(output / stage / "model")(ids).logits
        for stage in ("pretrain", "dpo")
    )
    assert before.shape == after.shape == (1, ids.shape[1], 1024)
    assert not torch.equal(before, after)
    checkpoint = torch.load(output / "pretrain/checkpoints/last.ckpt", weights_only=True)
    saved = AutoModelForCausalLM.from_pretrained(output / "pretrain/model").state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(value, checkpoint["state_dict"][f"model.{name}"])


def test_pretrains_with_muon_and_adamw_in_one_optimizer(output: Path) -> None:
    checkpoint = torch.load(output / "pretrain/checkpoints/last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    states = {
        group["name"]: {*optimizer["state"][group["params"][0]]}
        for group in optimizer["param_groups"]
    }
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    assert states == {"matrices": {"momentum_buffer"}, "embeddings": adamw, "norms_biases": adamw}


def test_reported_divergence_is_of_held_out_prompts(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "dpo/model")
    after, before = (
        AutoModelForCausalLM.from_pretrained(output / stage / "model")
        for stage in ("dpo", "pretrain")
    )
    expected = {}
    for split in ("train", "val"):
        lines = (output / f"pairs/{split}.jsonl").read_text().splitlines()[:SAMPLED_PROMPTS]
        prompts = torch.tensor([tokenizer.encode(json.loads(line)["prompt"]) for line in lines])
        expected[split] = kl_divergence(after, before, tokenizer, prompts, 0)
    report = json.loads((output / "report.json").read_text())
    # The number of threads may change the last bits.
    assert report["table"][KL][1] == pytest.approx(expected["val"], rel=1e-3)
    assert report["table"][KL][1] != pytest.approx(expected["train"], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "metrics"),
    [
        ("pretrain", ["train_loss", "train_perplexity", "tokens_per_second", "grad_norm", "lr"]),
        ("dpo", ["train_loss", "rewards/accuracies", "rewards/margins", "val_rewards/chosen"]),
    ],
)
def test_loggers_hold_the_metrics_and_the_picture(
    output: Path, stage: str, metrics: list[str]
) -> None:
    with (output / stage / "csv/version_0/metrics.csv").open() as file:
        assert set(metrics) <= set(csv.DictReader(file).fieldnames or [])
    run = read_wandb_run(output / stage)
    logged = {name for row in run.history for name in row}
    assert set(metrics) <= logged
    assert stage in logged
    assert any(path.suffix == ".png" for path in run.media)
    assert (output / stage / f"csv/version_0/{stage}.png").stat().st_size > 10_000


def test_pairs_are_written_for_both_splits(output: Path) -> None:
    for split, number in (("train", 64), ("val", 32)):
        assert len((output / f"pairs/{split}.jsonl").read_text().splitlines()) == number


def test_stages_are_ordinary_yaml_that_runs_alone(output: Path) -> None:
    """dpo.yaml, as the demo wrote it, by `fit -c` from the folder it names its files in."""
    command = [sys.executable, "-m", "lightning_align", "fit", "-c", str(output / "dpo.yaml")]
    options = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.limit_val_batches=1"]
    before = (output / "dpo/model/model.safetensors").stat().st_mtime_ns
    run = subprocess.run([*command, *options], cwd=output.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (output / "dpo/model/model.safetensors").stat().st_mtime_ns > before


def test_divergence_from_itself_is_zero_and_from_another_positive(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "dpo/model")
    one = AutoModelForCausalLM.from_pretrained(output / "pretrain/model")
    other = AutoModelForCausalLM.from_pretrained(output / "dpo/model")
    prompts = torch.randint(1, 1024, (4, 8))
    assert kl_divergence(one, one, tokenizer, prompts, 0) == 0.0
    assert kl_divergence(other, one, tokenizer, prompts, 0) > 0.0
    pairs = [json.loads(line) for line in (output / "pairs/val.jsonl").read_text().splitlines()]
    assert 0.0 <= likelihood_accuracy(one, tokenizer, pairs) <= 1.0
