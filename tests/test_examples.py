"""The plain Python examples run as a user would run them, on fewer steps and pairs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_pretrain_and_align_leave_models_that_load_and_differ(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    environment = {**os.environ, "LIGHTNING_ALIGN_CACHE": str(tmp_path / "cache")}
    for script, option in (("pretrain.py", "--max_steps=40"), ("align.py", "--pairs=32")):
        command = [sys.executable, str(EXAMPLES / script), option]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
    tokens = torch.arange(1, 9)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / stage / "model")(tokens).logits
        for stage in ("pretrain", "dpo")
    )
    assert not torch.equal(before, after)
    assert (tmp_path / "outputs/pretrain/csv/version_0/pretrain.png").stat().st_size > 10_000


@pytest.mark.slow
def test_zero_infinity_is_killed_and_comes_to_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTNING_ALIGN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(EXAMPLES / "zero_infinity.py"), "--max_steps=6"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "killed after step 3" in run.stdout
    assert run.stdout.endswith("the same bits\n")


@pytest.mark.slow
def test_a_planted_spike_is_healed(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "spike_guard.py"), "--steps=120"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    words = [line.split() for line in run.stdout.splitlines()[1:]]
    last = {" ".join(line[:-2]): float(line[-1]) for line in words if line[0] != "step"}
    assert list(last) == ["no spike", "unguarded", "skip", "rewind"]
    assert [line[-1] for line in words if line[:2] == ["step", "80:"]] == ["skip", "rewind"]
    # So few steps leave the unguarded run near the others, by processor before or behind them.
    assert max(last["skip"], last["rewind"]) < 1.02 * last["no spike"]


@pytest.mark.slow
def test_rows_grow(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTNING_ALIGN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(EXAMPLES / "curriculum.py"), "--steps=16"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    words = [line.split() for line in run.stdout.splitlines()]
    lengths = [int(line[1]) for line in words if len(line) == 2 and line[0].isdigit()]
    assert lengths == [16, 32, 64, 128, 256, 256, 256, 256]
    losses = {line[0]: float(line[2]) for line in words if line[0] in ("whole", "growing")}
    assert len(losses) == 2
    assert losses["whole"] != losses["growing"]
    assert (tmp_path / "curriculum.png").stat().st_size > 10_000


@pytest.mark.slow
def test_advice_on_a_run_is_followed(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "roofline.py"), "--steps=12"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    machine, step, *advice, outcome = run.stdout.splitlines()
    assert machine.startswith("this processor: ")
    assert step.startswith("a step: ")
    assert any(line.startswith("  Leave out activation checkpointing") for line in advice)
    found = re.fullmatch(r"without recomputation: predicted \+(.+)%, measured .+%", outcome)
    assert found is not None
    assert 5 < float(found[1]) < 40
    assert (tmp_path / "outputs/roofline/roofline.jsonl").stat().st_size > 100


def test_yaml_examples_are_those_of_the_demo() -> None:
    for name in ("pretrain.yaml", "dpo.yaml"):
        packaged = EXAMPLES.parent / "lightning_align/recipes" / name
        assert (EXAMPLES / name).read_text() == packaged.read_text()
