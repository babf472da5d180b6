"""What the file of a run says of its training already, in the planner's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_align._errors import argument_error
from lightning_align.cli.plan_yaml import OPTIMIZERS, arguments_of, last_name, listed
from lightning_align.planner import ParallelSpec

# What is planned with where neither the user nor the file says anything.
DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw",
    "rank": None,
    "lisa_layers": None,
    "objective": "pretrain",
    "reference": "model",
    "precision": "bf16-mixed",
}
_OBJECTIVES = {"PretrainModule": "pretrain", "DPOModule": "dpo"}
_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # as Lightning reads them
_LISA_LAYERS = 2  # LISA's own default


def chosen(model: str, asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a model is to be trained, and what of that its file says.

    Args:
        model: What the user named: a Hugging Face name, a folder, or the YAML of a run.
        asked: Arguments by name, None where the user said nothing.

    Raises:
        ValueError: If the file's run is none that can be planned.
    """
    file = said(model) if model.endswith((".yaml", ".yml")) else {}
    found = {name: file.get(name) if given is None else given for name, given in asked.items()}
    found = {name: DEFAULTS.get(name) if v is None else v for name, v in found.items()}
    for name, of in (("rank", "optimizer"), ("reference", "objective")):
        if asked[name] is None and found[of] != file.get(of, found[of]):
            found[name] = DEFAULTS[name]  # the file's is of another one
    return found, {name: file[name] for name in file if found[name] == file[name]}


def said(path: str | Path) -> dict[str, Any]:
    """Arguments of ``ParallelSpec`` that the file of a run has.

    Args:
        path: Of the file.

    Raises:
        ValueError: If it trains adapters, or a module that is none of ours.
    """
    return said_by(yaml.safe_load(Path(path).read_text()), path)


def said_by(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The same of what a file holds, or of several that lie over each other.

    Args:
        content: All of it.
        path: To name in an error.

    Raises:
        ValueError: If it trains adapters, or a module that is none of ours.
    """
    model, trainer = content.get("model") or {}, content.get("trainer") or {}
    given: Mapping[str, Any] = model.get("init_args") or {}
    if given.get("peft_config"):
        rule = "its run trains adapters (peft_config), which are not planned"
        way_out = "Take peft_config out to plan the training of all weights"
        raise argument_error("plan", "model", str(path), rule, way_out)
    name = last_name(model, "PretrainModule")
    if name not in _OBJECTIVES:
        rule = f"its module is a {name}, and must be a PretrainModule or a DPOModule"
        way_out = "Plan the model inside of it: by name, folder, or Planner in Python"
        raise argument_error("plan", "model", str(path), rule, way_out)
    found: dict[str, Any] = {"objective": _OBJECTIVES[name], **_optimizer(given.get("optimizer"))}
    if given.get("precompute_ref_log_probs"):
        found["reference"] = "precomputed"
    if given.get("reference_free"):
        found["reference"] = "none"
    precision = str(trainer.get("precision") or "32-true")  # a Trainer's own
    found["precision"] = _PRECISIONS.get(precision, precision)
    if last_name(given.get("dtype")) == "bfloat16":
        found["precision"] = "bf16-true"
    for each in (each for key in ("callbacks", "callbacks+") for each in listed(trainer.get(key))):
        if last_name(each) == "LISA":
            found["lisa_layers"] = arguments_of(each).get("activated_layers", _LISA_LAYERS)
    return found


def split_of_run(content: Mapping[str, Any], path: str | Path) -> ParallelSpec:
    """How a configuration splits a run, as it stands.

    Args:
        content: All layers of it.
        path: To name in an error.

    Raises:
        ValueError: If its run is none that can be planned.
    """
    trainer = content.get("trainer") or {}
    strategy, of_strategy = (
        last_name(trainer.get("strategy")),
        arguments_of(trainer.get("strategy")),
    )
    rows = arguments_of(content.get("data")).get("batch_size", 8)
    many = trainer.get("accumulate_grad_batches") or 1
    devices = _number_of(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
    split: dict[str, Any] = {}
    if strategy == "PipelineStrategy":
        many = of_strategy["num_microbatches"]
        rows //= many
        split = {
            "pipeline_parallel": devices,
            "schedule": of_strategy.get("schedule", "1F1B"),
            "num_model_chunks": of_strategy.get("num_stages_per_rank") or 1,
        }
    elif strategy == "ZeROInfinityStrategy":
        split = {
            "zero_stage": of_strategy.get("stage", 3),
            "offload_param": of_strategy.get("offload_params_device", "nvme"),
            "offload_optimizer": of_strategy.get("offload_optimizer_device", "nvme"),
            "offload_activations": of_strategy.get("offload_activations", "none"),
        }
    recomputes = arguments_of(content.get("model")).get("activation_checkpointing")
    replicas = 1 if "pipeline_parallel" in split else devices
    return ParallelSpec(
        devices=devices,
        micro_batch_size=rows,
        global_batch_size=rows * many * replicas,
        activation_checkpointing="full" if recomputes else "none",
        **said_by(content, path),
        **split,
    )


def _number_of(devices: Any) -> int:
    """Of a list its length; one, where only the machine knows."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _optimizer(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    name = last_name(given)
    ours = {path.rpartition(".")[2]: key for key, path in OPTIMIZERS.items()}
    found = {"optimizer": ours.get(name, name)}  # another one is refused, if none is asked for
    options = arguments_of(given)
    return {**found, "rank": options["rank"]} if options.get("rank") else found
