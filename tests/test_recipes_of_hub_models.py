"""Recipes of hub models: what their heads say they need, and tiny twins of them that train."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lightning_align import recipes
from lightning_align.__main__ import main
from lightning_align.callbacks import LISA
from lightning_align.cli.app import AlignCLI, build_parser
from lightning_align.cli.plan_given import split_of_run
from lightning_align.planner import ModelSpec, Plan, Planner
from lightning_align.planner.memory import device_memory
from lightning_align.planner.quantities import shown
from tests.helpers.hub_twins import laid, save_configurations, save_twins
from tests.helpers.live_peak import LivePeak

TASKS = ("finetune_hub", "sft_chat", "dpo_hub")
NEEDS = [(task, need) for task in TASKS for need in recipes.needs(task)]
ROWS = pytest.mark.parametrize(
    ("task", "need"), NEEDS, ids=[f"{task}-{need.layers[3:]}" for task, need in NEEDS]
)
DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all recipes, and a token cache of its own."""
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    monkeypatch.setenv("LIGHTNING_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in recipes.names():
        recipes.copy(name)
    return tmp_path


def planned(content: dict[str, Any], devices: str) -> Plan:
    """The plan of a configuration as it stands."""
    Path("laid.yaml").write_text(yaml.safe_dump(content))
    spec = ModelSpec.from_config("laid.yaml")
    return Planner(devices.replace(" x ", "x")).predict(spec, split_of_run(content, "laid.yaml"))


def test_sizes_techniques_and_places_are_there() -> None:
    for task in TASKS:
        found = {(need.size, need.technique, need.devices[0]) for need in recipes.needs(task)}
        assert {size for size, *_ in found} == {"0.5 B", "3 B", "8 B"}
        assert {technique for _, technique, _ in found} == {"AdamW", "LISA", "GaLore"}
        assert {(size, number) for size, _, number in found} >= {
            (size, number) for size in ("0.5 B", "3 B", "8 B") for number in "18"
        }
        content = laid(f"-c {task}.yaml")
        callbacks = [each["class_path"] for each in content["trainer"]["callbacks"]]
        assert "TokenSchedule" in callbacks or content["model"]["init_args"]["lr_scheduler"]


@ROWS
def test_the_head_says_what_the_planner_does(folder: Path, task: str, need: recipes.Need) -> None:
    save_configurations(folder)
    content = laid(need.layers)
    assert need.layers.startswith(f"-c {task}.yaml")
    plan = planned(content, need.devices)
    assert need.memory == shown(plan.memory_per_device)
    assert need.host == (shown(plan.host_bytes) if plan.host_bytes else "")
    assert plan.fits
    assert plan.model.parameters / 1e9 == pytest.approx(float(need.size.split()[0]), rel=0.05)
    technique = {"adamw": "AdamW", "galore_adamw": "GaLore"}[plan.parallel.optimizer]
    assert need.technique == ("LISA" if plan.parallel.lisa_layers else technique)
    assert int(need.devices.split()[0]) == plan.parallel.devices
    row = f"| {need.size} | {need.technique} | {need.devices} | {need.memory} | {need.host or '-'} "
    assert f"{row}| {plan.tokens_per_second:,.0f} | `{need.layers}` |" in DOCS.read_text()


@pytest.mark.slow
def test_fit_takes_all_of_them(folder: Path) -> None:
    parser = build_parser()
    for _, need in NEEDS:
        found = parser.parse_args(["fit", *need.layers.split()])
        assert found.fit.model.init_args.model == laid(need.layers)["model"]["init_args"]["model"]


SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
]


def sized(task: str) -> list[str]:
    """Rows of as many tokens as the twins take."""
    return [*SMALL, f"--data.{'block_size' if task == 'finetune_hub' else 'max_length'}=64"]


# On one device; of 3 B once, as that layer is the same over all tasks.
ALONE = [
    (task, need)
    for task, need in NEEDS
    if need.devices.startswith("1 ") and (task == "sft_chat" or need.size != "3 B")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "need"), ALONE, ids=[f"{task}-{need.layers[3:]}" for task, need in ALONE]
)
def test_a_twin_of_each_trains(folder: Path, task: str, need: recipes.Need) -> None:
    save_twins(folder)
    main(["fit", *need.layers.split(), *sized(task)])
    (left,) = Path("outputs").glob("*/model")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in left.iterdir()}


@pytest.mark.slow
def test_a_twin_trains_on_several_devices(folder: Path) -> None:
    save_twins(folder)
    few = ["--trainer.devices=2", "--trainer.strategy.start_method=fork"]
    layers = ["-c", "sft_chat.yaml", "-c", "size_3b.yaml", "-c", "gpus_8.yaml"]
    main(["fit", *layers, *few, *sized("sft_chat")])
    assert Path("outputs/sft/model/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "layer"),
    [
        ("finetune_hub", ""),
        ("sft_chat", ""),
        ("dpo_hub", ""),
        ("sft_chat", "lisa"),
        ("sft_chat", "galore_hub"),
    ],
)
def test_the_formula_is_what_a_twin_holds(folder: Path, task: str, layer: str) -> None:
    """In fp32, at the peak of a step; what blocks save is counted, not by the sizes alone.

    By the sizes it is 6 to 9 % less here, and 1 % at those of the hub, where weights are the most.
    """
    save_twins(folder)
    layers = f"-c {task}.yaml" + (f" -c {layer}.yaml" if layer else "")
    own = "--trainer.precision 32-true --trainer.accumulate_grad_batches 1"
    own += f" --data.{'block_size' if task == 'finetune_hub' else 'max_length'} 64"
    if layer == "galore_hub":
        own += " --model.optimizer.init_args.rank 8"
    off = ["--model.prefix_sharing=false"] if task == "dpo_hub" else []
    more = "--trainer.callbacks+=tests.helpers.live_peak.LivePeak"
    steps = ["--trainer.max_steps=4", "--trainer.limit_val_batches=0"]
    cli = AlignCLI(args=["fit", *layers.split(), *own.split(), *SMALL, *steps, *off, more])
    (peak,) = (each for each in cli.trainer.callbacks if isinstance(each, LivePeak))
    content = laid(f"{layers} {own.replace('--data.', '--data.init_args.')}")
    Path("laid.yaml").write_text(yaml.safe_dump(content))
    parallel = split_of_run(content, "laid.yaml")
    assert any(isinstance(each, LISA) for each in cli.trainer.callbacks) == (layer == "lisa")
    twin = AutoModelForCausalLM.from_pretrained(content["model"]["init_args"]["model"])
    parts = device_memory(ModelSpec.from_module(twin, seq_len=64), parallel)
    assert parts["optimizer"] == peak.states
    assert sum(parts.values()) == pytest.approx(peak.peak, rel=0.06)


def test_the_list_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert re.split(r"  +", table[0])[:4] == ["size", "technique", "devices", "memory of each"]
    assert len(table) == 1 + len(NEEDS) == 31
    assert table[1].endswith("-c dpo_hub.yaml")
