"""Every recipe is listed, copied and run, as a user would, on tiny models and few steps.

Those that train are slow: `make test-laws` runs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lightning_align import recipes
from lightning_align.__main__ import main
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.tokenizer import train_tokenizer
from tests.helpers.children import in_child

ROOT = Path(__file__).parent.parent
NOVEL = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a token cache of its own."""
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    monkeypatch.setenv("LIGHTNING_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(folder: Path) -> str:
    """What stands in for the hub's model."""
    tokenizer = train_tokenizer([NOVEL * 9], 300)
    tokenizer.chat_template = TEMPLATE
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    return "base"


def fit(name: str, *overrides: str) -> None:
    main(["recipes", "copy", name])
    main(["fit", "-c", f"{name}.yaml", *QUIET, *overrides])


def moved(model: str, base: str) -> bool:
    """Whether a run left a model that loads, with its tokenizer, and is another one."""
    ids = torch.arange(1, 9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (model, base)]
    assert len(AutoTokenizer.from_pretrained(model)) == len(AutoTokenizer.from_pretrained(base))
    return not torch.equal(*logits)


# Those that go over another recipe.
LAYERS = {
    "curriculum": "pretrain",
    "curriculum_difficulty": "pretrain",
    "galore": "pretrain",
    "galore_hub": "sft_chat.yaml -c size_8b",
    "gpus_8": "sft_chat.yaml -c size_3b",
    "host_memory": "sft_chat.yaml -c size_8b",
    "lisa": "sft_chat.yaml -c size_8b",
    "muon": "ddp",
    "preference_diagnostics": "dpo",
    "roofline": "pretrain",
    "size_3b": "sft_chat",
    "size_8b": "sft_chat",
    "spike_guard": "pretrain",
    "stable_adamw": "ddp",
}
OF_CALLBACKS = {
    "curriculum",
    "curriculum_difficulty",
    "gpus_8",
    "host_memory",
    "lisa",
    "preference_diagnostics",
    "roofline",
    "spike_guard",
}

TINY = [
    "--model.model.hidden_size=20",
    "--model.model.intermediate_size=24",
    "--model.model.num_hidden_layers=1",
    "--data.batch_size=2",
    "--trainer.max_steps=3",
    "--trainer.limit_val_batches=1",
]


def drawn(run: str, picture: str) -> list[Path]:
    """Where a picture lies: in the folder of the run's logger."""
    return list(Path(f"outputs/{run}").rglob(f"{picture}.png"))


@pytest.mark.slow
def test_pretrain_then_dpo(folder: Path) -> None:
    schedule = ["--model.lr_scheduler.total_steps=3", "--trainer.log_every_n_steps=1"]
    fit("pretrain", *TINY, *schedule)
    assert (folder / "outputs/pretrain/checkpoints/last.ckpt").exists()
    pair = {"prompt": "It is a", "chosen": " truth", "rejected": " lie"}
    Path("outputs/pairs").mkdir()
    for split in ("train", "val"):
        Path(f"outputs/pairs/{split}.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    steps = ["--trainer.max_steps=2", "--data.batch_size=2", "--trainer.log_every_n_steps=1"]
    fit("dpo", *steps)
    assert moved("outputs/dpo/model", "outputs/pretrain/model")
    assert drawn("dpo", "dpo")
    diagnosed_over_dpo(steps)
    fit("zero_infinity_dpo", *steps, "--model.optimizer.init_args.fused=true")
    assert moved("outputs/zero_infinity_dpo/model", "outputs/pretrain/model")
    assert Path("zero_infinity_dpo/rank00000/committed").exists()


def diagnosed_over_dpo(steps: list[str]) -> None:
    """The recipe laid over, on held-out prompts that leave room for what is written after them."""
    prompts = ["It is a", "It is"]
    rows = [{"prompt": prompt, "chosen": " truth", "rejected": " lie"} for prompt in prompts]
    Path("outputs/pairs/val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["recipes", "copy", "preference_diagnostics"])
    layers = ["-c", "dpo.yaml", "-c", "preference_diagnostics.yaml"]
    main(["fit", *layers, *QUIET, *steps])
    for name in ("dpo", "preferences"):
        assert drawn("dpo", name)
    logged = Path("outputs/dpo/csv/version_1/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"kl/policy", "kl/policy_se", "logps/both_fell", "length/correlation"} <= {*logged}


def over_ddp(layer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's state and its groups by name after a run in one process."""
    for name in ("ddp", layer):
        main(["recipes", "copy", name])
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.log_every_n_steps=1"]
    main(["fit", "-c", "ddp.yaml", "-c", f"{layer}.yaml", *QUIET, *TINY, *alone])
    checkpoint = torch.load("outputs/ddp/checkpoints/last.ckpt", weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]
    return optimizer, {group["name"]: group for group in optimizer["param_groups"]}


@pytest.mark.slow
def test_stable_adamw_over_ddp(folder: Path) -> None:
    optimizer, groups = over_ddp("stable_adamw")
    assert groups["matrices"]["steps"] == 3, "of ours: torch's AdamW does not count"
    assert "exp_avg" in optimizer["state"][groups["matrices"]["params"][0]]


@pytest.mark.slow
def test_muon_over_ddp(folder: Path) -> None:
    optimizer, groups = over_ddp("muon")
    assert groups["matrices"]["adjust_lr_fn"] == "match_rms_adamw"
    assert "momentum_buffer" in optimizer["state"][groups["matrices"]["params"][0]]
    assert "exp_avg" in optimizer["state"][groups["embeddings"]["params"][0]]
    rates = {group["lr"] for group in groups.values()}
    assert len(rates) == 1
    assert 0.0099 < rates.pop() < 0.01, "the cosine begins at the optimizer's learning rate"


@pytest.mark.slow
def test_galore_over_pretrain(folder: Path) -> None:
    for name in ("pretrain", "galore"):
        main(["recipes", "copy", name])
    layers = ["-c", "pretrain.yaml", "-c", "galore.yaml"]
    small = [*TINY, "--model.optimizer.init_args.rank=5", "--trainer.log_every_n_steps=1"]
    main(["fit", *layers, *QUIET, *small])
    checkpoint = torch.load("outputs/pretrain/checkpoints/last.ckpt", weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]
    groups = {group["name"]: group for group in optimizer["param_groups"]}
    bases = [
        {"basis_left", "basis_right"} & {*optimizer["state"][p]}
        for p in groups["matrices"]["params"]
    ]
    assert all(len(sides) == 1 for sides in bases)
    assert not {"basis_left", "basis_right"} & {
        *optimizer["state"][groups["embeddings"]["params"][0]]
    }
    assert groups["matrices"]["rank"] == 5


@pytest.mark.slow
def test_spike_guard_over_pretrain(folder: Path) -> None:
    """Beside the callbacks of the recipe below it, and with its own detector."""
    for name in ("pretrain", "spike_guard"):
        main(["recipes", "copy", name])
    layers = ["-c", "pretrain.yaml", "-c", "spike_guard.yaml"]
    schedule = ["--model.lr_scheduler.total_steps=3", "--trainer.log_every_n_steps=1"]
    own = ["--trainer.callbacks.rewind_steps=2", "--trainer.callbacks.detector=SpikeDetector"]
    window = ["--trainer.callbacks.detector.window=16", "--trainer.callbacks.detector.warmup=8"]
    main(["fit", *layers, *QUIET, *TINY, *schedule, *own, *window])
    checkpoint = torch.load("outputs/pretrain/checkpoints/last.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if k.startswith("SpikeGuard")]
    assert state["detector"]["window"] == 16
    assert (folder / "outputs/pretrain/model/config.json").exists()
    assert any(key.startswith("MetricPlot") for key in checkpoint["callbacks"])


@pytest.mark.slow
def test_curriculum_over_pretrain(folder: Path) -> None:
    for name in ("pretrain", "curriculum"):
        main(["recipes", "copy", name])
    layers = ["-c", "pretrain.yaml", "-c", "curriculum.yaml"]
    schedule = ["--model.lr_scheduler.total_steps=3", "--trainer.log_every_n_steps=1"]
    main(["fit", *layers, *QUIET, *TINY, *schedule])
    checkpoint = torch.load("outputs/pretrain/checkpoints/last.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if k.startswith("Curriculum")]
    assert state["settings"]["length"]["lengths"][:2] == [[1, 16], [151, 32]]
    assert checkpoint["tokens_seen"] == 3 * 2 * 128, "as many as without"
    assert drawn("pretrain", "curriculum")


@pytest.mark.slow
def test_curriculum_difficulty_over_pretrain(folder: Path) -> None:
    for name in ("pretrain", "curriculum_difficulty"):
        main(["recipes", "copy", name])
    main(["difficulty", "-c", "pretrain.yaml", "--metrics", "vocabulary_rarity"])
    layers = ["-c", "pretrain.yaml", "-c", "curriculum_difficulty.yaml"]
    schedule = ["--model.lr_scheduler.total_steps=3", "--trainer.log_every_n_steps=1"]
    main(["fit", *layers, *QUIET, *TINY, *schedule])
    checkpoint = torch.load("outputs/pretrain/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["TextDataModule"]["curriculum"]["global_batch_size"] == 2
    values = DifficultyIndex.open("outputs/difficulty/vocabulary_rarity").values
    logged = Path("outputs/pretrain/csv").rglob("metrics.csv")
    assert "curriculum/eligible" in next(logged).read_text().splitlines()[0]
    assert len(values) > 1000
    assert drawn("pretrain", "curriculum")


@pytest.mark.slow
def test_sft_chat(folder: Path, base: str) -> None:
    def chat(i: int) -> dict[str, Any]:
        said = [("user", f"What is number {i}?"), ("assistant", "A truth.")]
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    Path("chats.jsonl").write_text("\n".join(json.dumps(chat(i)) for i in range(20)))
    names = [f"--model.model={base}", f"--data.tokenizer={base}"]
    fit("sft_chat", *names, "--data.val_fraction=0.2", "--trainer.max_steps=2")
    assert moved("outputs/sft/model", base)


def of_preferences(name: str, base: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What two steps on ``rows`` logged at last."""
    file = "records.jsonl" if name == "kto" else "pairs.jsonl"
    Path(file).write_text("\n".join(map(json.dumps, rows)))
    steps = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--data.val_fraction=0.2"]
    fit(name, f"--model.model={base}", f"--data.tokenizer={base}", *steps)
    assert moved(f"outputs/{name}/model", base)
    assert drawn(name, name)
    lines = Path(f"outputs/{name}/csv/version_0/metrics.csv").read_text().splitlines()
    logged = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    return {key: float(value) for row in logged for key, value in row.items() if value}


@pytest.mark.slow
def test_dpo_simpo(folder: Path, base: str) -> None:
    rows = [{"prompt": f"{n} is", "chosen": " truth", "rejected": " a lie"} for n in range(40)]
    logged = of_preferences("dpo_simpo", base, rows)
    assert {"loss/simpo", "loss/sft", "val_rewards/accuracies"} <= logged.keys()
    assert "kl/k2" not in logged


@pytest.mark.slow
def test_dpo_cached(folder: Path, base: str) -> None:
    rows = [{"prompt": f"{n} is", "chosen": " truth", "rejected": " a lie"} for n in range(40)]
    logged = of_preferences("dpo_cached", base, rows)
    assert {"kl/k2", "val_rewards/accuracies"} <= logged.keys()
    (kept,) = Path("outputs/reference").glob("*/*.safetensors")
    assert kept.stat().st_size > 80 * 16, "80 completions, each found by 16 bytes"


@pytest.mark.slow
def test_dpo_lora(folder: Path, base: str) -> None:
    rows = [{"prompt": f"{n} is", "chosen": " truth", "rejected": " a lie"} for n in range(40)]
    logged = of_preferences("dpo_lora", base, rows)
    assert {"kl/k2", "val_rewards/accuracies"} <= logged.keys()
    written = {path.name for path in Path("outputs/dpo_lora/model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    assert not {"config.json", "model.safetensors"} & written
    main(["export", "--ckpt", "outputs/dpo_lora/model", "--output", "merged", "--merge"])
    assert moved("merged", base)


@pytest.mark.slow
def test_kto(folder: Path, base: str) -> None:
    rows = [
        {"prompt": f"{n} is", "completion": " truth" if n % 2 else " a lie", "label": n % 2 == 1}
        for n in range(40)
    ]
    logged = of_preferences("kto", base, rows)
    assert {"kl", "rewards/chosen", "rewards/rejected", "val_loss"} <= logged.keys()


@pytest.mark.slow
def test_finetune_hub(folder: Path, base: str) -> None:
    Path("texts").mkdir()
    for i in range(4):
        Path(f"texts/{i}.txt").write_text(NOVEL * 30)
    names = [f"--model.model={base}", f"--data.tokenizer={base}", "--data.val_fraction=0.25"]
    sizes = ["--data.block_size=16", "--trainer.max_steps=2", "--trainer.val_check_interval=4"]
    fit("finetune_hub", *names, *sizes)
    assert moved("outputs/finetune/model", base)


@pytest.mark.slow
def test_roofline_over_pretrain(folder: Path) -> None:
    for name in ("pretrain", "roofline"):
        main(["recipes", "copy", name])
    layers = ["-c", "pretrain.yaml", "-c", "roofline.yaml"]
    hardware = ["--trainer.callbacks.hardware=cpu"]  # the last callback's: nothing is measured
    main(["fit", *layers, *QUIET, *TINY, *hardware, "--trainer.max_steps=3"])
    outputs = folder / "outputs/pretrain"
    tables = list(outputs.rglob("media/table/roofline/modules*.json"))  # of W&B
    assert any("(all)" in path.read_text() for path in tables)
    assert list(outputs.rglob("media/images/roofline*.png"))


@pytest.mark.slow
def test_ddp_in_two_processes(folder: Path) -> None:
    """The command starts the second process itself: itself again."""
    main(["recipes", "copy", "ddp"])
    command = [sys.executable, "-m", "lightning_align", "fit", "-c", "ddp.yaml", *QUIET, *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = torch.load("outputs/ddp/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["TextDataModule"]["batch"] == 4, "2 blocks in each of 2 processes"
    assert checkpoint["global_step"] == 3
    assert (folder / "outputs/ddp/model/config.json").exists()


@pytest.mark.slow
def test_zero_infinity_goes_on_from_its_last_step(folder: Path) -> None:
    heads = [f"--model.model.num_{part}_heads=2" for part in ("attention", "key_value")]
    small = [*TINY, *heads, "--data.block_size=32", "--trainer.log_every_n_steps=1"]
    fit("zero_infinity", *small, "--trainer.strategy.nvme_path=whole")
    expected = AutoModelForCausalLM.from_pretrained("outputs/zero_infinity/model").state_dict()
    run = ["fit", "-c", "zero_infinity.yaml", *QUIET, *small]
    assert in_child(lambda: main([*run, "--trainer.max_steps=2"])) == 0  # and lets the folder go
    main([*run, "--ckpt_path=last"])
    resumed = AutoModelForCausalLM.from_pretrained("outputs/zero_infinity/model").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert Path("zero_infinity/rank00000/committed").exists()


# The list


def test_every_recipe_is_run_here() -> None:
    assert recipes.names() == [
        "curriculum",
        "curriculum_difficulty",
        "ddp",
        "dpo",
        "dpo_cached",
        "dpo_hub",
        "dpo_lora",
        "dpo_simpo",
        "finetune_hub",
        "galore",
        "galore_hub",
        "gpus_8",
        "host_memory",
        "kto",
        "lisa",
        "muon",
        "preference_diagnostics",
        "pretrain",
        "roofline",
        "sft_chat",
        "size_3b",
        "size_8b",
        "spike_guard",
        "stable_adamw",
        "zero_infinity",
        "zero_infinity_dpo",
    ]


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert all(line.endswith(".") and 30 < len(line) < 110 for line in lines), lines


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_prints_as_its_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", name])
    printed = capsys.readouterr().out
    assert printed == (ROOT / f"lightning_align/recipes/{name}.yaml").read_text()
    of_layers = {"trainer"} if name in OF_CALLBACKS else {"model"}
    parts = of_layers if name in LAYERS else {"model", "data", "trainer"}
    assert parts <= set(yaml.safe_load(printed))
    how = f"-c {LAYERS[name]}.yaml -c {name}.yaml" if name in LAYERS else f"-c {name}.yaml"
    assert f"lightning-align fit {how}" in printed, "how to run it, in its head"


def test_copies_to_a_name_and_into_a_folder(folder: Path) -> None:
    main(["recipes", "copy", "ddp", "mine.yaml"])
    (folder / "configs").mkdir()
    main(["recipes", "copy", "ddp.yaml", "configs"])
    for path in ("mine.yaml", "configs/ddp.yaml"):
        assert Path(path).read_text() == recipes.text("ddp")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "recipes(name='pretrian'): there is no such recipe. Did you mean pretrain?"),
        (
            ["copy", "xyz"],
            "There are: curriculum, curriculum_difficulty, ddp, dpo, dpo_cached, dpo_hub, dpo_",
        ),
        (["copy", "ddp", "there.yaml"], "recipes(file='there.yaml'): exists already."),
        (["copy"], "must be nothing, NAME, or copy NAME [FILE]."),
        (["ddp", "dpo"], "must be nothing, NAME, or copy NAME [FILE]."),
    ],
)
def test_refuses(folder: Path, words: list[str], message: str) -> None:
    Path("there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", *words])
    assert message in str(stopped.value)
    assert Path("there.yaml").read_text() == "mine"
