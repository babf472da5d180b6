"""A trained model and its tokenizer, from wherever they are: a checkpoint, a folder or the hub.

A Lightning checkpoint of ours has the weights, what the model was built from (a name, a folder or a
configuration) and the tokenizer. It is read as plain data and runs no code.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.data.hub import resolve_pretrained
from lightning_align.data.tokenizer import load_tokenizer, pad_token_id
from lightning_align.models import sharded_folder
from lightning_align.models.adapter_folder import (
    base_name,
    is_adapter_folder,
    load_adapter,
    read_config,
)
from lightning_align.models.adapters import add_adapter
from lightning_align.models.build import DTYPES, build_model
from lightning_align.models.tokenizer_state import unpack_tokenizer
from lightning_align.models.weights import parameters_on_meta
from lightning_align.offload import linked

GIVE_MODEL = "Give its name or folder as model (--model)"


@dataclass(frozen=True)
class Trained:
    """A Hugging Face model in evaluation mode, and its tokenizer if there is one.

    Attributes:
        model: Adapters are in its layers, if it has any.
        tokenizer: Of its texts.
        wrapper: PEFT's around a model with adapters.
    """

    model: transformers.PreTrainedModel
    tokenizer: Any | None
    wrapper: Any | None = None

    def merge(self) -> None:
        """Fold adapters into the weights, if there are any."""
        if self.wrapper is not None:
            self.wrapper.merge_and_unload()


def load_trained(
    source: str | Path,
    *,
    where: str,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Trained:
    """Load a model for use.

    Args:
        source: A Lightning checkpoint, a Hugging Face folder, that of an adapter, or a hub name.
        where: Function the user called, for error messages.
        model: Folder or hub name of the architecture, for a checkpoint that does not tell its own,
            or of the model that an adapter belongs to.
        tokenizer: Folder or hub name of another tokenizer.
        dtype: Data type of the parameters; None leaves them in the one that they are stored in.
        revision: Branch, tag or commit of a hub name.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: If the source cannot be read, or does not fit the model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise argument_error(where, "dtype", dtype, f"must be one of {sorted(DTYPES)}")
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    source = str(source)
    path = Path(source)
    if path.is_file() or linked.is_linked(path) or sharded_folder.is_one(path):
        trained = _from_checkpoint(source, where, None if model is None else str(model), dtype, hub)
    elif is_adapter_folder(source):
        trained = _from_adapter(source, where, model, dtype, hub)
    elif model is not None:
        rule = f"{source!r} is no checkpoint file, and tells its architecture itself"
        raise argument_error(where, "model", str(model), rule, "Leave model out")
    else:
        trained = _from_folder(source, where, dtype, hub)
    if tokenizer is not None:
        trained = replace(trained, tokenizer=load_tokenizer(where, str(tokenizer)))
    _check_vocabulary(trained, where)
    trained.model.eval()  # type: ignore[no-untyped-call]
    return trained


def _from_folder(source: str, where: str, dtype: str | None, hub: dict[str, Any]) -> Trained:
    folder = Path(source)
    if folder.suffix == ".ckpt" or (folder.is_dir() and not (folder / "config.json").exists()):
        rule = "must be a checkpoint file, a folder with a config.json, or a name on the hub"
        if not folder.exists():
            rule += ", and there is no such file"
        way_out = ""
        if (folder / "meta.pt").exists():  # written by all ranks of a pipeline
            tool = "python -m lightning.pytorch.utilities.consolidate_checkpoint"
            way_out = f"Make one file of it: {tool} {source}"
        raise argument_error(where, "ckpt", source, rule, way_out)
    resolve_pretrained(where, "ckpt", source, hub["revision"])
    stored = transformers.AutoConfig.from_pretrained(source, **hub).dtype
    dtype = dtype or next((name for name, kind in DTYPES.items() if kind == stored), "float32")
    model = build_model(source, where=where, argument="ckpt", dtype=dtype, strict=True, **hub)
    assert isinstance(model, transformers.PreTrainedModel)
    return Trained(model, _tokenizer_of(source, hub))


def _from_adapter(
    source: str, where: str, model_name: str | Path | None, dtype: str | None, hub: dict[str, Any]
) -> Trained:
    name, revision = (str(model_name), "main") if model_name else base_name(source, where)
    base = _from_folder(name, where, dtype, {**hub, "revision": revision})
    wrapper = add_adapter(base.model, read_config(source, where), where=where, revision=revision)
    load_adapter(base.model, source, where)
    return Trained(base.model, _tokenizer_of(source, hub) or base.tokenizer, wrapper)


def _from_checkpoint(
    path: str, where: str, model_name: str | None, dtype: str | None, hub: dict[str, Any]
) -> Trained:
    checkpoint = _read(path, where)
    saved = checkpoint["state_dict"].items()
    weights = {k.removeprefix("model."): w for k, w in saved if k.startswith("model.")}
    hyper = checkpoint.get("hyper_parameters", {})
    if model_name is None:  # the module's own revision belongs to its model's name
        hub = {**hub, "revision": hyper.get("revision", hub["revision"])}
    spec = hyper.get("model") if model_name is None else model_name
    config = _config(spec, path, where, hub)
    stored = next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
    auto: Any = transformers.AutoModelForCausalLM
    try:
        kind, trust = DTYPES[dtype] if dtype else stored, hub["trust_remote_code"]
        with parameters_on_meta():
            model = auto.from_config(config, dtype=kind, trust_remote_code=trust)
    except ValueError as error:
        rule = f"transformers has no causal language model for its {type(config).__name__}"
        raise argument_error(where, "ckpt", path, rule) from error
    wrapper, adapter = None, checkpoint.get("peft_config")
    if adapter is not None:
        model.name_or_path = spec if isinstance(spec, str) and not _is_json(spec) else ""
        with parameters_on_meta():
            wrapper = add_adapter(model, adapter, where=where, revision=hub["revision"])
    _check_weights(model.state_dict(), weights, path, where)
    # They take the place of the model's own, so that what was read by mmap takes no memory.
    # As they are stored, adapters may be in another data type than what they were added to.
    floating = {n: w.to(kind) if dtype and w.is_floating_point() else w for n, w in weights.items()}
    model.load_state_dict(floating, assign=True)
    model.tie_weights()
    name = spec if isinstance(spec, str) and not _is_json(spec) else None
    tokenizer = _checkpoint_tokenizer(checkpoint, name, where, hub)
    if name is not None:
        with suppress(OSError):  # a folder without one
            found = transformers.GenerationConfig.from_pretrained(name, revision=hub["revision"])
            model.generation_config = found
    elif tokenizer is not None:
        # Built from a configuration, whose default ids (2 ends a text for Llama) nobody chose.
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = pad_token_id(tokenizer)
    return Trained(model, tokenizer, wrapper)


def _read(path: str, where: str) -> dict[str, Any]:
    if linked.is_linked(Path(path)):
        checkpoint = linked.read(Path(path), where, weights_only=True, may_be_fixed=True)
    elif sharded_folder.is_one(Path(path)):
        checkpoint = sharded_folder.read(Path(path), where)
    else:
        checkpoint = _read_file(path, where)
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any(name.startswith("model.") for name in weights):
        rule = "must be a checkpoint of a PretrainModule or DPOModule: it has no weights of a model"
        raise argument_error(where, "ckpt", path, rule)
    return checkpoint


def _read_file(path: str, where: str) -> Any:
    try:
        # mmap: the optimizer's state, twice the weights, is never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        rule = f"cannot be read as plain data ({str(error).splitlines()[0]})"
        way_out = "Give a checkpoint that Lightning wrote"
        raise argument_error(where, "ckpt", path, rule, way_out) from error


def _config(spec: Any, path: str, where: str, hub: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration that the checkpoint's model was built from."""
    if spec is None:
        rule = "does not tell its architecture: the module was given a model that was built already"
        raise argument_error(where, "ckpt", path, rule, GIVE_MODEL)
    if isinstance(spec, dict):
        # A class in a checkpoint is run by instantiating it: transformers' own only.
        module, _, name = str(spec.get("class_path", "")).rpartition(".")
        found = getattr(transformers, name, None) if module.startswith("transformers") else None
        if not (isinstance(found, type) and issubclass(found, transformers.PretrainedConfig)):
            rule = f"its model {spec.get('class_path')!r} is no configuration of transformers"
            way_out = f"Only Hugging Face models can be loaded. {GIVE_MODEL} if it is one"
            raise argument_error(where, "ckpt", path, rule, way_out)
        return found(**spec.get("init_args", {}))
    if _is_json(spec):
        return transformers.AutoConfig.for_model(**json.loads(spec))
    try:
        resolve_pretrained(where, "model", spec, hub["revision"])
        return transformers.AutoConfig.from_pretrained(spec, **hub)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        rule = f"was trained from {spec!r}, which cannot be found or read ({error})"
        raise argument_error(where, "ckpt", path, rule, GIVE_MODEL) from error


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _check_weights(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], path: str, where: str
) -> None:
    """Refuse a checkpoint of another architecture, naming the first difference."""
    shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (ours, theirs)]
    here, there = shapes
    names = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if names:
        rule = (
            f"holds another model: {len(names)} parameter(s) differ, first {names[0]!r} with shape"
            f" {here.get(names[0])} in the architecture and {there.get(names[0])} in the"
            " checkpoint"
        )
        raise argument_error(where, "ckpt", path, rule, GIVE_MODEL)


# What a folder with a tokenizer has at least one of.
_TOKENIZERS = {
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt"),
}


def _tokenizer_of(name: str, hub: dict[str, Any]) -> Any | None:
    if os.path.isdir(name) and not _TOKENIZERS & set(os.listdir(name)):
        return None  # older transformers would make up one that knows no words
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError):  # a folder without one
        return None


def _checkpoint_tokenizer(
    checkpoint: dict[str, Any], name: str | None, where: str, hub: dict[str, Any]
) -> Any | None:
    """The datamodule's, or else the one that came with the model."""
    for state in checkpoint.values():
        # Empty for a tokenizer that cannot be saved.
        if isinstance(state, dict) and "fingerprint" in state and state.get("tokenizer"):
            return unpack_tokenizer(state["tokenizer"], where=where)
    return _tokenizer_of(name, hub) if name is not None else None


def _check_vocabulary(trained: Trained, where: str) -> None:
    embedding: Any = trained.model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])  # one with adapters has no num_embeddings
    if trained.tokenizer is not None and len(trained.tokenizer) > rows:
        rule = f"makes ids up to {len(trained.tokenizer) - 1}, but the model has {rows} rows"
        way_out = "Give the model's own"
        raise argument_error(where, "tokenizer", type(trained.tokenizer).__name__, rule, way_out)
