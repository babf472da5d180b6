"""Plans as configurations: one step of each kind is trained, and what nobody runs is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from lightning_align.__main__ import main
from lightning_align.cli import plan_yaml
from lightning_align.cli.given import over
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Plan, Planner
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


def planned(hardware: HardwareSpec = HARDWARE, **given: Any) -> Plan:
    model = ModelSpec.from_config(LlamaConfig(**SIZES), seq_len=32)
    spec = ParallelSpec(**{"precision": "32-true", "micro_batch_size": 2, **given})
    return Planner(hardware).predict(model, spec)


def content(run: dict[str, Any] = RUN, **given: Any) -> dict[str, Any]:
    return plan_yaml.configuration(planned(**given), run)


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
    "pairs, precomputed, stage 3": {
        "objective": "dpo",
        "reference": "precomputed",
        "zero_stage": 3,
        "offload_param": "nvme",
    },
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


def test_there_is_one_lisa_with_what_the_user_gave_it() -> None:
    given = {"activated_layers": 2, "interval_steps": 7, "filename": "draws.jsonl"}
    own: list[Any] = [{"class_path": "lightning_align.LISA", "init_args": given}, "ExactResume"]
    trainer = content({**RUN, "trainer": {"callbacks+": own}}, lisa_layers=1)["trainer"]
    assert trainer["callbacks+"] == own[1:]
    assert trainer["callbacks"] == [
        {"class_path": "LISA", "init_args": {**given, "activated_layers": 1}}
    ]
    alone = content({**RUN, "trainer": {"callbacks": own[0]}}, lisa_layers=1)["trainer"]
    assert alone["callbacks"] == trainer["callbacks"]


def test_conversations_have_a_length_of_their_own_name() -> None:
    chats = {"class_path": "lightning_align.ConversationDataModule", "init_args": {"paths": "c"}}
    made = content({**RUN, "data": chats})["data"]["init_args"]
    assert made == {"paths": "c", "batch_size": 2, "max_length": 32}


def test_the_optimizer_is_the_users_or_the_modules_own() -> None:
    """The module's AdamW has betas and a weight decay of its own."""
    assert "optimizer" not in content()["model"]["init_args"]
    arguments = {"lr": 1e-5, "betas": [0.9, 0.9]}
    for name, plan in (("torch.optim.AdamW", "adamw"), ("lightning_align.Muon", "muon")):
        own = {"class_path": name, "init_args": arguments}
        run = {**RUN, "model": over(RUN["model"], {"init_args": {"optimizer": own}})}
        assert content(run, optimizer=plan)["model"]["init_args"]["optimizer"] == own
    assert content(run)["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_what_the_file_says_otherwise_is_planned_over() -> None:
    given = {"dtype": "bfloat16", "precompute_ref_log_probs": True, "reference_free": True}
    model = {"class_path": "DPOModule", "init_args": {**RUN["model"]["init_args"], **given}}
    made = content({**RUN, "model": model}, objective="dpo")["model"]["init_args"]
    assert {name: made[name] for name in given} == {
        "dtype": "float32",
        "precompute_ref_log_probs": False,
        "reference_free": False,
    }


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ({"zero_stage": 1}, False),
        ({"zero_stage": 3}, False),
        ({"zero_stage": 3, "offload_optimizer": "cpu"}, False),  # parameters are whole on each
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, True),
        ({"zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"}, True),
    ],
)
def test_zero_of_this_suite_divides_the_memory_of_hosts(given: dict[str, Any], runs: bool) -> None:
    plan = planned(HardwareSpec.from_name("2xh100-sxm"), devices=2, **given)
    reason = plan_yaml.unrunnable(plan)
    assert (reason is None) == runs
    assert runs or "FSDP's or DeepSpeed's" in str(reason)
    assert plan_yaml.unrunnable(planned(devices=2, **given)) is None  # a processor is its host


def test_nodes_have_equally_many_devices() -> None:
    twelve = planned(HardwareSpec.from_name("12xh100-sxm"), devices=12)
    trainer = plan_yaml.configuration(twelve, RUN)["trainer"]
    assert (trainer["num_nodes"], trainer["devices"]) == (2, 6)
    with pytest.raises(ValueError, match=r"13 devices.*spread evenly over 2 nodes of 8"):
        plan_yaml.configuration(planned(twelve.hardware, devices=13), RUN)


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
        ({"zero_stage": 1, "precision": "16-mixed"}, "takes no loss scaler"),
        ({"offload_activations": "cpu"}, "only ZeRO-Infinity's saved activations"),
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
