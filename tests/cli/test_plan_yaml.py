"""Plans as configurations: one step of each kind is trained, and what nobody runs is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from lightning_align.__main__ import main
from lightning_align.cli import plan_yaml
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Planner
from tests.helpers.checkpoints import small_tokenizer
from tests.modules.test_precomputed import write_pairs

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RUN: dict[str, Any] = {
    "model": {
        "class_path": "PretrainModule",
        "init_args": {"model": {"class_path": "transformers.LlamaConfig", "init_args": SIZES}},
    },
    "data": {
        "class_path": "TextDataModule",
        "init_args": {"paths": "pride_and_prejudice", "vocab_size": 512, "val_fraction": 0.0},
    },
}
HARDWARE = HardwareSpec.from_name("2xxeon-8480")


def of_pairs(folder: Path) -> dict[str, Any]:
    """A run on pairs, which are written into the folder."""
    small_tokenizer().save_pretrained(folder / "tokenizer")
    given = {"paths": str(write_pairs(folder / "pairs.jsonl", number=18))}
    given["tokenizer"] = str(folder / "tokenizer")
    return {
        "model": {**RUN["model"], "class_path": "DPOModule"},
        "data": {"class_path": "PreferenceDataModule", "init_args": given},
    }


def content(run: dict[str, Any] = RUN, **given: Any) -> dict[str, Any]:
    model = ModelSpec.from_config(LlamaConfig(**SIZES), seq_len=32)
    spec = ParallelSpec(**{"precision": "32-true", "micro_batch_size": 2, **given})
    return plan_yaml.configuration(Planner(HARDWARE).predict(model, spec), run)


PIPELINE = {"devices": 2, "pipeline_parallel": 2, "global_batch_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"global_batch_size": 4},
    "recomputed": {"activation_checkpointing": "full"},
    "muon": {"optimizer": "muon"},
    "galore": {"optimizer": "galore_adamw", "rank": 8},
    "stable_adamw": {"optimizer": "stable_adamw"},
    "lisa": {"lisa_layers": 1},
    "bf16": {"precision": "bf16-true"},
    "stage 1": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "stage 2": {"zero_stage": 2, "offload_optimizer": "nvme"},
    "stage 3": {"zero_stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"},
    "activations": {
        "zero_stage": 3,
        "offload_param": "cpu",
        "offload_optimizer": "cpu",
        "offload_activations": "nvme",
        "activation_checkpointing": "full",
    },
    "sgd": {"optimizer": "sgd"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "lisa, stage 3": {"lisa_layers": 1, "zero_stage": 3, "offload_param": "cpu"},
    "replicas": {"devices": 2},
    "pipeline": PIPELINE,
    "GPipe": {**PIPELINE, "schedule": "GPipe"},
    "pairs": {"objective": "dpo"},
    "pairs, precomputed": {"objective": "dpo", "reference": "precomputed"},
    "pairs, stage 3": {"objective": "dpo", "zero_stage": 3, "offload_param": "nvme"},
    "pairs in a pipeline": {**PIPELINE, "objective": "dpo", "reference": "none"},
    "interleaved": {
        "devices": 2,
        "pipeline_parallel": 2,
        "schedule": "Interleaved1F1B",
        "num_model_chunks": 2,
        "global_batch_size": 8,
    },
}


FORKED = {"start_method": "fork"}


def test_names_go_into_the_file_unchanged() -> None:
    made = content(**KINDS["interleaved"])
    assert made["trainer"]["strategy"] == {
        "class_path": "PipelineStrategy",
        "init_args": {
            "schedule": "Interleaved1F1B",
            "num_microbatches": 4,
            "num_stages_per_rank": 2,
            "partition_method": "uniform",
        },
    }
    assert made["data"]["init_args"]["batch_size"] == 8
    assert made["trainer"]["accumulate_grad_batches"] == 1
    away = content(**KINDS["stage 3"])["trainer"]["strategy"]["init_args"]
    assert (away["stage"], away["offload_params_device"]) == (3, "nvme")
    waits = content(**KINDS["accumulated"])
    assert (waits["trainer"]["accumulate_grad_batches"], waits["trainer"]["strategy"]) == (
        2,
        "auto",
    )


def test_what_the_user_wrote_stays() -> None:
    made = content(**KINDS["lisa"])
    assert made["model"]["init_args"]["model"]["init_args"] == SIZES
    assert made["data"]["init_args"]["paths"] == "pride_and_prejudice"
    assert made["trainer"]["callbacks"][-1]["init_args"]["activated_layers"] == 1
    assert "trainer" not in RUN


def test_there_is_one_lisa() -> None:
    own = [{"class_path": "lightning_align.LISA"}, {"class_path": "ExactResume"}]
    trainer = content({**RUN, "trainer": {"callbacks+": own}}, lisa_layers=1)["trainer"]
    assert trainer["callbacks+"] == own[1:]
    assert [each["class_path"] for each in trainer["callbacks"]] == ["LISA"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices": 2, "tensor_parallel": 2}, "tensor parallelism is Megatron-LM's"),
        ({"precision": "bf16-master"}, "fp32 ones in the optimizer"),
        ({"activation_checkpointing": "selective"}, "scores alone"),
        (
            {"devices": 4, "pipeline_parallel": 2, "global_batch_size": 4},
            "several copies",
        ),
        ({**PIPELINE, "lisa_layers": 1}, "LISA draws among all blocks"),
        ({**PIPELINE, "objective": "dpo"}, "has a whole model to ask"),
        ({**PIPELINE, "objective": "dpo", "reference": "precomputed"}, "has a whole model to ask"),
        (
            {"zero_stage": 1, "objective": "dpo", "reference": "precomputed"},
            "ask no reference before training",
        ),
        ({"zero_stage": 1, "precision": "16-mixed"}, "takes no loss scaler"),
    ],
)
def test_what_nobody_here_runs_is_said(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"nobody here runs it: .*{told}"):
        content(**given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_of_each_kind_trains_a_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, given = tmp_path / "plan.yaml", KINDS[kind]
    run = of_pairs(tmp_path) if "objective" in given else RUN
    plan_yaml.write(path, content(run, **given), "a plan")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    short: dict[str, Any] = {"max_steps": 1, "default_root_dir": str(tmp_path), **quiet}
    strategy = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    if kind == "replicas":  # processes that begin anew would be pytest's
        short["strategy"] = "ddp_fork"
    elif "PipelineStrategy" in str(strategy):
        short["strategy"] = {**strategy, "init_args": {**strategy["init_args"], **FORKED}}
    over = tmp_path / "short.yaml"
    over.write_text(yaml.safe_dump({"trainer": short}))
    main(["fit", "-c", str(path), "-c", str(over)])
