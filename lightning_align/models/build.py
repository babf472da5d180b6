"""Turn what a user passes as ``model`` into a module in training mode and the wanted dtype."""

import json
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from lightning_align._compat.transformers_bars import without_bars
from lightning_align._errors import argument_error
from lightning_align.data.hub import resolve_pretrained
from lightning_align.models import weights
from lightning_align.models.adapter_folder import is_adapter_folder, save_adapter
from lightning_align.models.adapters import has_adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loading(TypedDict, total=False):
    """How a model is loaded or built, as arguments of ``build_model``."""

    dtype: str
    attn_implementation: str | None
    revision: str
    trust_remote_code: bool


def build_model(
    model: nn.Module | str | Path | PretrainedConfig,
    *,
    where: str,
    argument: str = "model",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Build or load a causal language model.

    Under ``trainer.init_module(empty_init=True)`` of a strategy that spreads models, the model
    comes without its weights, which that strategy loads or draws in parts (models/weights.py).

    Args:
        model: A module (used as it is, in its own dtype), a Hugging Face name or folder, a
            configuration to build random weights from, or such a configuration as JSON text (as our
            checkpoints keep it).
        where: Class the user called, for error messages.
        argument: Argument the user passed, for error messages.
        dtype: Data type of the parameters; ``from_pretrained`` alone would take the folder's.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; None leaves the
            choice to transformers.
        revision: Branch, tag or commit of a hub name.
        trust_remote_code: Whether code that comes with the model may run.
        strict: Whether a folder must have every weight of the model and no others, where
            transformers draws what is missing and warns.

    Raises:
        ValueError: If the dtype or model name is unknown, the folder holds no causal language
            model, or an adapter without its model.
    """
    if dtype not in DTYPES:
        raise argument_error(where, "dtype", dtype, f"must be one of {sorted(DTYPES)}")
    if isinstance(model, nn.Module):
        return model.train()
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if isinstance(model, str) and model.lstrip().startswith("{"):
        model = AutoConfig.for_model(**json.loads(model))
    on_meta = weights.is_built_on_meta()
    if isinstance(model, PretrainedConfig):
        with weights.parameters_on_meta() if on_meta else nullcontext():
            return _from_config(model, options, where, argument)
    if not isinstance(model, (str, Path)):
        rule = "must be a module, a Hugging Face name or folder, or a transformers configuration"  # type: ignore[unreachable]
        raise argument_error(where, argument, model, rule)
    resolve_pretrained(where, argument, str(model), revision)
    if is_adapter_folder(model):
        rule = "is the folder of an adapter, which is no model by itself"
        way_out = "Load both: PeftModel.from_pretrained(model, folder, is_trainable=True)"
        raise argument_error(where, argument, str(model), rule, way_out)
    if on_meta:
        return _empty(str(model), revision, options, where, argument)
    if weights.are_read_in_parts():
        try:
            return _read_in_parts(str(model), revision, options, where, argument)
        except ValueError as error:
            warnings.warn(f"{model} is loaded into memory as a whole: {error}", stacklevel=2)
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, output_loading_info=strict, **options
            )
    except (OSError, ValueError) as error:
        rule = f"transformers cannot load a causal language model from it ({error})"
        raise argument_error(where, argument, model, rule) from error
    if strict:
        loaded, found = loaded
        _refuse_lack(str(model), found, where, argument)
    return _module(loaded).train()  # from_pretrained returns eval mode


def _refuse_lack(name: str, found: dict[str, Any], where: str, argument: str) -> None:
    """Refuse a folder that is not exactly the model's, naming the first difference."""
    kinds = {"missing_keys": "has no", "unexpected_keys": "has, for nothing,"}
    for kind, what in {**kinds, "mismatched_keys": "has another shape of"}.items():
        if keys := sorted(map(str, found.get(kind) or ())):
            rule = (
                f"it {what} {keys[0]!r} ({len(keys)} such), so its weights are of another model"
                " than its configuration"
            )
            way_out = "Write it anew from the model that was trained"
            raise argument_error(where, argument, name, rule, way_out)


def _empty(
    name: str, revision: str, options: dict[str, Any], where: str, argument: str
) -> nn.Module:
    """The model of a folder without its weights, which are remembered."""
    hub = {"revision": revision, "trust_remote_code": options["trust_remote_code"]}
    with weights.parameters_on_meta():
        settings = AutoConfig.from_pretrained(name, **hub)
        empty = _from_config(settings, options, where, argument)
    weights.remember_weights(empty, name, revision)
    return empty


def _read_in_parts(
    name: str, revision: str, options: dict[str, Any], where: str, argument: str
) -> nn.Module:
    model: Any = _empty(name, revision, options, where, argument)
    read = weights.weights_reader(model)
    assert read is not None

    def filled(empty: nn.Parameter, names: list[str]) -> nn.Parameter:
        value = read(names).to(empty.dtype, copy=True)  # of the file, which is let go
        return nn.Parameter(value, empty.requires_grad)

    weights.fill_parameters(model, filled)
    with suppress(OSError):  # a folder may have none
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    loaded: nn.Module = model
    return loaded


def plain_model(model: nn.Module | str | PretrainedConfig | None) -> str | None:
    """``model`` as text that hyperparameters can keep, or None for a module object."""
    if isinstance(model, PretrainedConfig):
        return json.dumps(model.to_dict(), default=str)
    return model if isinstance(model, str) else None


def refuse_adapter_of_another(
    model: nn.Module, folder: str | Path, where: str, argument: str
) -> None:
    """Refuse to write a model beside an adapter, which whoever loads the folder would add to it.

    Raises:
        ValueError: If the folder has an adapter, and the model has none.
    """
    if is_adapter_folder(Path(folder).expanduser()) and not has_adapters(model):
        rule = "holds an adapter, which whoever loads the folder would add to the model"
        raise argument_error(where, argument, str(folder), rule, "Give another folder")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads, with its tokenizer.

    Of a model with adapters of PEFT it is their folder, which ``PeftModel.from_pretrained`` loads.

    Args:
        model: A Hugging Face model.
        folder: Where to write.
        tokenizer: Goes with it, if there is one.
        state: The model's state; None takes it from the model.

    Raises:
        ValueError: If the model is not a Hugging Face model, or the folder has an adapter that is
            not the model's.
    """
    refuse_adapter_of_another(model, folder, "save_pretrained", "folder")
    folder = Path(folder).expanduser()
    save = getattr(model, "save_pretrained", None)
    if save is None:
        rule = f"{type(model).__name__} has no save_pretrained"
        raise argument_error("save_pretrained", "model", type(model).__name__, rule)
    if has_adapters(model) and not hasattr(model, "get_base_model"):
        # A plain folder would have names that no model of its configuration knows.
        save_adapter(model, folder, state)
    else:
        with without_bars():
            save(folder, **({} if state is None else {"state_dict": state}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


def _from_config(
    config: PretrainedConfig, options: dict[str, Any], where: str, argument: str
) -> nn.Module:
    auto: Any = AutoModelForCausalLM
    try:
        return _module(auto.from_config(config, **options)).train()
    except (ValueError, ImportError) as error:
        if "attn_implementation" in options and "ttention" in str(error):
            rule = f"transformers refuses it ({str(error).splitlines()[0]})"
            asked = options["attn_implementation"]
            raise argument_error(where, "attn_implementation", asked, rule) from error
        rule = "transformers has no causal language model for this configuration"
        raise argument_error(where, argument, type(config).__name__, rule) from error


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
