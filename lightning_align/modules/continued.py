"""What a module asks of the checkpoint that it goes on from, and what it keeps for the next one."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from transformers import PretrainedConfig

from lightning_align._compat.lightning_trainer import built_by_cli
from lightning_align._errors import argument_error
from lightning_align.models.build import plain_model


def save_plain_hyperparameters(
    module: pl.LightningModule, **models: nn.Module | str | PretrainedConfig | None
) -> None:
    """Keep plain data only, for a callable there breaks ``load_from_checkpoint``.

    Lightning finds the arguments in the frame of the ``__init__`` that this is called from.
    """
    if built_by_cli():  # the CLI hands over its configuration, plain already
        module.save_hyperparameters()
        return
    module.save_hyperparameters(ignore=[*models, "optimizer", "lr_scheduler"])
    for name, model in models.items():
        if (plain := plain_model(model)) is not None:
            module.save_hyperparameters({name: plain})


def refuse_another_model(
    module: pl.LightningModule, model: nn.Module, checkpoint: dict[str, Any]
) -> None:
    """Say which parameters differ, before torch says it of each.

    Raises:
        ValueError: If names or shapes in the checkpoint are not the module's, which loads strictly.
    """
    if "state_dict" not in checkpoint:  # the strategy has loaded it into the model already
        return
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    state = module.state_dict(keep_vars=True)  # of values that are away, shapes may be asked
    ours = {name: tuple(value.shape) for name, value in state.items()}
    different = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    if different and module.strict_loading:
        name = different[0]
        rule = (
            f"the checkpoint is of another model: {len(different)} parameter(s) differ, first"
            f" {name!r} with shape {ours.get(name)} here and {theirs.get(name)} there"
        )
        way_out = "Build the module with the model that wrote the checkpoint"
        raise argument_error(type(module).__name__, "model", type(model).__name__, rule, way_out)


def groups_of_an_older_run(
    trainer: pl.Trainer | None, checkpoint: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """Names and decay of the groups of a run that is resumed, if they were sorted otherwise.

    Until 0.1.0 there were two: what has two dimensions, but for the embedding, and the rest.
    """
    states = checkpoint.get("optimizer_states") or [{"param_groups": []}]
    groups = states[0]["param_groups"]
    is_named = bool(groups) and all("param_names" in group for group in groups)
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or not is_named:
        return None
    if any("use_muon" in group for group in groups):
        return None
    kept = ("param_names", "weight_decay")
    return [{name: group[name] for name in kept if name in group} for group in groups]
