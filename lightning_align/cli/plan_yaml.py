"""A plan as a configuration that ``fit`` takes, or which part of it nobody here runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_align._errors import argument_error
from lightning_align.cli.given import over
from lightning_align.planner import ParallelSpec, Plan

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "stable_adamw": "lightning_align.StableAdamW",
    "muon": "lightning_align.Muon",
    "galore_adamw": "lightning_align.GaLoreAdamW",
    "sgd": "torch.optim.SGD",
}
_LR = {"adamw": 3e-4, "stable_adamw": 3e-4, "muon": 3e-4, "galore_adamw": 3e-3, "sgd": 1e-2}
_REFERENCES = {"precompute_ref_log_probs": "precomputed", "reference_free": "none"}
_RUNNERS = {
    "tensor": "tensor parallelism is Megatron-LM's or torchtitan's",
    "grid": "a pipeline of which there are several copies is Megatron-LM's or torchtitan's",
    "selective": "recomputing attention's scores alone is Megatron-LM's",
    "master": "16-bit weights with fp32 ones in the optimizer are DeepSpeed's or Megatron-LM's",
    "asked": "no rank of a pipeline has a whole model to ask for a reference's log-probabilities",
    "scaler": "ZeRO-Infinity takes no loss scaler",
    "schedule": "pipelines here run GPipe, 1F1B and Interleaved1F1B",
    "lisa": "LISA draws among all blocks, and a rank of a pipeline has some",
    "sharded": "ZeRO in the memory of devices is FSDP's or DeepSpeed's; ours is in that of hosts",
    "activations": "only ZeRO-Infinity's saved activations wait elsewhere",
}


def last_name(given: Any, default: str = "") -> str:
    """Name of a class without its module, from a configuration that has one, or its path alone.

    Args:
        given: A mapping with a class_path, or a path.
        default: Where there is none.
    """
    path = given.get("class_path") if isinstance(given, Mapping) else given
    return str(path or default).rpartition(".")[2]


def arguments_of(given: Any) -> Mapping[str, Any]:
    """Arguments of a class, from a configuration that may be its path alone.

    Args:
        given: A mapping with a class_path, or a path.
    """
    return (given.get("init_args") or {}) if isinstance(given, Mapping) else {}


def listed(callbacks: Any) -> list[Any]:
    """Callbacks as a configuration has them: none, one, or a list.

    Args:
        callbacks: What is under the key.
    """
    return callbacks if isinstance(callbacks, list) else [callbacks] * bool(callbacks)


def unrunnable(plan: Plan) -> str | None:
    """Which part of a split neither this suite nor Lightning runs; None if they run all of it.

    Args:
        plan: The split, and on what.
    """
    parallel = plan.parallel
    p, has_zero = parallel.pipeline_parallel, parallel.zero_stage > 0
    is_dpo, reference = parallel.objective == "dpo", parallel.reference
    found = [
        ("tensor", parallel.tensor_parallel > 1),
        ("grid", p > 1 and parallel.replicas > 1),
        ("selective", parallel.activation_checkpointing == "selective"),
        ("master", parallel.precision.endswith("master")),
        ("asked", p > 1 and is_dpo and reference != "none"),
        ("scaler", has_zero and parallel.precision == "16-mixed"),
        ("schedule", p > 1 and parallel.schedule not in ("GPipe", "1F1B", "Interleaved1F1B")),
        ("lisa", p > 1 and parallel.lisa_layers is not None),
        ("sharded", has_zero and plan.hardware.is_asynchronous and _is_on_devices(parallel)),
        ("activations", not has_zero and parallel.offload_activations != "none"),
    ]
    return next((_RUNNERS[name] for name, is_so in found if is_so), None)


def _is_on_devices(parallel: ParallelSpec) -> bool:
    """Whether what ZeRO divides lies in the memory of devices, all of it or its parameters."""
    is_divided = parallel.zero_stage == 3 and parallel.replicas > 1
    return parallel.offload_optimizer == "none" or (is_divided and parallel.offload_param == "none")


def configuration(plan: Plan, run: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run with the split of a plan.

    Args:
        plan: What is to run.
        run: A configuration that it is laid over; its model and data stay.

    Raises:
        ValueError: If nobody here runs such a split.
    """
    parallel = plan.parallel
    if reason := unrunnable(plan):
        rule = f"nobody here runs it: {reason}"
        way_out = "Set runnable to true, which ranks what runs here"
        raise argument_error("plan", "output", parallel.told(), rule, way_out)
    made = over(dict(run), {"model": _model(parallel, run), "data": _data(plan, run)})
    trainer = {**(made.get("trainer") or {}), **_trainer(plan)}
    if parallel.lisa_layers is not None:
        arguments: dict[str, Any] = {"filename": None}
        for key in trainer.keys() & {"callbacks", "callbacks+"}:
            for each in (each for each in listed(trainer[key]) if last_name(each) == "LISA"):
                arguments |= arguments_of(each)
            trainer[key] = [each for each in listed(trainer[key]) if last_name(each) != "LISA"]
        arguments["activated_layers"] = parallel.lisa_layers
        own = {"class_path": "LISA", "init_args": arguments}
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), own]
    return {"seed_everything": 0, **made, "trainer": trainer}


def _model(parallel: ParallelSpec, run: Mapping[str, Any]) -> dict[str, Any]:
    is_dpo = parallel.objective == "dpo"
    named = {"class_path": "DPOModule" if is_dpo else "PretrainModule"}
    given = (run.get("model") or {}).get("init_args") or {}
    arguments: dict[str, Any] = {
        "activation_checkpointing": parallel.activation_checkpointing == "full"
    }
    if parallel.optimizer != "adamw" or given.get("optimizer"):  # the module's own is AdamW
        arguments["optimizer"] = _optimizer(parallel, given.get("optimizer"))
    if parallel.precision == "bf16-true":
        arguments["dtype"] = "bfloat16"
    elif given.get("dtype"):
        arguments["dtype"] = "float32"
    for name, reference in _REFERENCES.items():
        is_so = is_dpo and parallel.reference == reference
        if is_so or (is_dpo and given.get(name)):
            arguments[name] = is_so
    return {**named, "init_args": arguments}


def _optimizer(parallel: ParallelSpec, given: Any) -> dict[str, Any]:
    """The file's, if it is the one that is planned; else with a rate to begin with."""
    path, name = OPTIMIZERS[parallel.optimizer], parallel.optimizer
    own: dict[str, Any] = {"rank": parallel.galore_rank} if name == "galore_adamw" else {}
    if last_name(given) == last_name(path):
        known = given["class_path"] if isinstance(given, Mapping) else given
        return {"class_path": known, "init_args": own}
    own["lr"] = _LR[name]
    if name == "muon":
        own["adjust_lr_fn"] = "match_rms_adamw"
    return {"class_path": path, "init_args": own}


def _data(plan: Plan, run: Mapping[str, Any]) -> dict[str, Any]:
    parallel = plan.parallel
    rows = parallel.micro_batch_size
    if parallel.pipeline_parallel > 1:  # which cuts the batch itself
        rows *= parallel.num_microbatches
    is_dpo = parallel.objective == "dpo"
    given = run.get("data") or {}
    named = given.get("class_path") or ("PreferenceDataModule" if is_dpo else "TextDataModule")
    length = "block_size" if last_name(named) == "TextDataModule" else "max_length"
    return {"class_path": named, "init_args": {"batch_size": rows, length: plan.model.seq_len}}


def _trainer(plan: Plan) -> dict[str, Any]:
    parallel, hardware = plan.parallel, plan.hardware
    nodes = -(-parallel.devices // hardware.devices_per_node)
    if parallel.devices % nodes:
        rule = f"cannot be spread evenly over {nodes} nodes of {hardware.devices_per_node}"
        raise argument_error("plan", "output", f"{parallel.devices} devices", rule)
    is_pipeline = parallel.pipeline_parallel > 1
    return {
        "accelerator": "gpu" if hardware.is_asynchronous else "cpu",
        "devices": parallel.devices // nodes,
        "num_nodes": nodes,
        "precision": parallel.precision,
        "accumulate_grad_batches": 1 if is_pipeline else parallel.num_microbatches,
        "strategy": _strategy(parallel),
    }


def _strategy(parallel: ParallelSpec) -> str | dict[str, Any]:
    if parallel.pipeline_parallel > 1:
        arguments: dict[str, Any] = {
            "schedule": parallel.schedule,
            "num_microbatches": parallel.num_microbatches,
            "num_stages_per_rank": parallel.chunks,
            "partition_method": "uniform",
        }
        return {"class_path": "PipelineStrategy", "init_args": arguments}
    if parallel.zero_stage:
        arguments = {
            "stage": parallel.zero_stage,
            "offload_params_device": parallel.offload_param,
            "offload_optimizer_device": parallel.offload_optimizer,
            "offload_activations": parallel.offload_activations,
        }
        return {"class_path": "ZeROInfinityStrategy", "init_args": arguments}
    return "ddp" if parallel.replicas > 1 else "auto"


def write(path: str | Path, content: Mapping[str, Any], head: str) -> None:
    """Write a configuration with a comment above it.

    Args:
        path: Of the file.
        content: What it says.
        head: The comment.

    Raises:
        ValueError: If it cannot be written.
    """
    text = "".join(f"# {line}\n" for line in head.splitlines())
    text += yaml.safe_dump(dict(content), sort_keys=False)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise argument_error("plan", "output", str(path), rule) from error


def checked(path: str | Path) -> str:
    """What ``fit`` says of a file: empty if it takes it, or the first line of its refusal.

    Args:
        path: Of the file.
    """
    from jsonargparse import ArgumentError

    from lightning_align.cli.app import build_parser

    parser = build_parser()
    parser.exit_on_error = False
    try:
        parser.parse_args(["fit", "-c", str(path)])
    except (ArgumentError, ValueError, TypeError, SystemExit) as error:
        return str(error).splitlines()[0]
    return ""
