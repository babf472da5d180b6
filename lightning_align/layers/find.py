"""Finding the language models in a module, and the layers of a decoder.

Hugging Face decoders are uniform (base model, input and output embeddings, one ModuleList of
``num_hidden_layers`` blocks) and are read through that interface. Any other module is read from
its structure. Neither is trusted: ``ModelLayers.probe`` compares with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from typing_extensions import Protocol, runtime_checkable

from lightning_align._errors import argument_error
from lightning_align.layers.head import head_arithmetic
from lightning_align.layers.hugging_face import is_hugging_face
from lightning_align.layers.map import ModelLayers


@runtime_checkable
class KeepsLayers(Protocol):
    """A module that keeps the map of its language model, as ours do."""

    layers: ModelLayers


def find_layers(model: nn.Module, layers_attribute: str | None = None) -> ModelLayers:
    """Find embedding, blocks, final norm and head of a decoder.

    Looks at the modules and at ``model.config`` only: nothing is computed. A module of your own
    may say what it is with ``get_input_embeddings()`` and ``get_output_embeddings()``, and what it
    does to its logits with ``config.logit_scale`` and ``config.final_logit_softcapping``.

    Args:
        model: A Hugging Face decoder with a language-model head, or any module whose
            ``forward(input_ids)`` gives logits.
        layers_attribute: Dotted name of the list of blocks, for example ``"model.layers"``.

    Returns:
        The map of the model. Call its ``probe`` before you rely on the head.

    Raises:
        ValueError: If a part is not there, or if more than one module could be it.
    """
    _refuse_wrappers(model)
    if is_hugging_face(model):
        _refuse_headless(model)
    blocks_name = _blocks_name(model, layers_attribute)
    outside = {
        name: module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{blocks_name}.")
    }
    embedding_name, head_name = _embedding_and_head_names(model, outside)
    head: Any = outside[head_name]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        # An adapter or a quantised weight computes something else than weight and bias say.
        rule = f"its head '{head_name}' is a {type(head).__name__} and must be a plain nn.Linear"
        raise argument_error("find_layers", "model", type(model).__name__, rule)
    logit_scale, softcap = head_arithmetic(getattr(model, "config", None))
    return ModelLayers(
        model=model,
        embedding_name=embedding_name,
        blocks_name=blocks_name,
        final_norm_name=_final_norm_name(model, outside, blocks_name),
        head_name=head_name,
        hidden_size=head.in_features,
        vocab_size=head.out_features,
        logit_scale=logit_scale,
        softcap=softcap,
    )


def find_language_models(
    module: nn.Module, method: str = "get_output_embeddings"
) -> dict[str, nn.Module]:
    """The language models in a module: those of its parts that have a method of language models.

    The class is asked for it, because wrappers of models pass attributes on. What is inside of a
    model belongs to it, and is none.

    Args:
        module: Any module; it may be a language model itself.
        method: What a part must be able to do: to say where its head is, as all models of
            transformers do, or for example ``"generate"``.

    Returns:
        Dotted name of each (empty for the module itself) and the model, in the module's order.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, part in module.named_modules():
        if part not in inside and hasattr(type(part), method):
            found[name] = part
            inside.update(part.modules())
    return found


def inner_attribute(module: nn.Module, model: nn.Module, layers_attribute: str) -> str:
    """The name of a list of blocks in a model, given as it is, or as a path from its holder.

    Args:
        module: What holds the model, or the model itself.
        model: The language model.
        layers_attribute: Such as ``"model.layers"``, or from the holder ``"net.model.layers"``.
    """
    known = {name for name, _ in model.named_modules()}
    names = (name for name, part in module.named_modules(remove_duplicate=False) if part is model)
    paths = [layers_attribute, *(layers_attribute.removeprefix(f"{name}.") for name in names)]
    return next((path for path in paths if path in known), layers_attribute)


def find_held_model(
    module: nn.Module, method: str, *, where: str, way_out: str
) -> tuple[str, nn.Module]:
    """The first language model that a module holds, and its dotted name.

    A method of that name on the module itself is the user's own, and not asked.

    Args:
        module: Any module.
        method: What the model must be able to do.
        where: Class that needs it, for the error message.
        way_out: What to do without one.

    Raises:
        ValueError: If the module holds none.
    """
    for name, child in module.named_children():
        for inner, model in find_language_models(child, method).items():
            return f"{name}.{inner}".rstrip("."), model
    rule = f"holds no module with a {method} method"
    raise argument_error(where, "pl_module", type(module).__name__, rule, way_out)


def kept_layers(module: nn.Module) -> ModelLayers | None:
    """The map that a module keeps of its model, None for any other."""
    kept = module.layers if isinstance(module, KeepsLayers) else None
    return kept if isinstance(kept, ModelLayers) else None  # others have modules of that name


def _refuse_wrappers(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        way_out = "Pass the model from before torch.compile; block.compile() works in place"
    elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        way_out = "Pass model.get_base_model(), which holds the adapters"
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        way_out = "Pass model.module"
    else:
        return
    name = type(model).__name__
    raise argument_error("find_layers", "model", name, "it is a wrapper around a model", way_out)


def _refuse_headless(model: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        rule = "it is an encoder-decoder and must be a decoder"
    elif model.get_output_embeddings() is None:
        rule = "it has no language-model head"
    else:
        return
    name = type(model).__name__
    raise argument_error("find_layers", "model", name, rule, "Load it by AutoModelForCausalLM")


def _blocks_name(model: nn.Module, layers_attribute: str | None) -> str:
    """Name of the list of blocks, as given or as found."""
    lists = {name: len(m) for name, m in model.named_modules() if name and _is_block_list(m)}
    candidates = ", ".join(f"'{name}' ({lists[name]})" for name in _outermost(lists)) or "none"
    where = type(model).__name__
    if layers_attribute is not None:
        if layers_attribute not in lists:
            rule = f"must name a list of blocks of {where}; candidates (lengths): {candidates}"
            raise argument_error("find_layers", "layers_attribute", layers_attribute, rule)
        return layers_attribute
    if is_hugging_face(model):
        config: Any = model.config
        length = config.get_text_config().num_hidden_layers
        found = _outermost(name for name in lists if lists[name] == length)
    else:
        found = _dominant(model, _outermost(lists))
    if len(found) != 1:
        rule = f"cannot tell which list holds its blocks; candidates (lengths): {candidates}"
        way_out = "Name it with layers_attribute='...'"
        raise argument_error("find_layers", "model", where, rule, way_out)
    return found[0]


def _is_block_list(module: nn.Module) -> bool:
    """An nn.ModuleList, or an nn.Sequential of modules of one class."""
    if isinstance(module, nn.ModuleList):
        return len(module) > 0
    return isinstance(module, nn.Sequential) and len({type(child) for child in module}) == 1


def _outermost(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _dominant(model: nn.Module, names: list[str]) -> list[str]:
    """The list with three quarters of the parameters of all, if there is one.

    Below that the blocks may well be spread over parallel lists (attentions here, MLPs there).
    """
    sizes = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names]
    total = sum(sizes)
    return [name for name, size in zip(names, sizes, strict=True) if 0 < 3 * total <= 4 * size]


def _embedding_and_head_names(model: nn.Module, outside: dict[str, nn.Module]) -> tuple[str, str]:
    """Names of the token embedding and of the head: those the model declares, or that fit."""
    embeddings = _declared(model, "get_input_embeddings", outside)
    heads = _declared(model, "get_output_embeddings", outside)
    if embeddings and heads:
        return embeddings[0], heads[0]
    tables = {n: m for n, m in outside.items() if isinstance(m, nn.Embedding)}
    linears = {n: m for n, m in outside.items() if isinstance(m, nn.Linear)}
    pairs = [
        (embedding, head)
        for embedding in embeddings or tables
        for head in heads or linears
        if outside[embedding].num_embeddings == outside[head].out_features
    ]
    tied = [(e, h) for e, h in pairs if outside[e].weight is outside[h].weight]
    # As many positions as tokens: only the name tells the tables apart (the probe checks it).
    by_name = [(e, h) for e, h in tied or pairs if "pos" not in e and "wpe" not in e]
    pairs = by_name or tied or pairs
    if len(pairs) != 1:
        rows = {name: table.num_embeddings for name, table in tables.items()}
        outputs = {name: linear.out_features for name, linear in linears.items()}
        rule = (
            "cannot tell which embedding and head are a pair, with as many rows as outputs; "
            f"embeddings outside its blocks (rows): {rows}, linears (outputs): {outputs}"
        )
        way_out = "Define get_input_embeddings() and get_output_embeddings() on the model"
        raise argument_error("find_layers", "model", type(model).__name__, rule, way_out)
    return pairs[0]


def _declared(model: Any, getter: str, modules: dict[str, nn.Module]) -> list[str]:
    """Name of the module that the model's own method returns, if it has one."""
    declared = getattr(model, getter)() if hasattr(model, getter) else None
    return [name for name, module in modules.items() if module is declared][:1]


def _final_norm_name(
    model: nn.Module, outside: dict[str, nn.Module], blocks_name: str
) -> str | None:
    """The last norm registered after the blocks, or one before them that is named the final one."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    norms = [name for name, module in outside.items() if "norm" in type(module).__name__.lower()]
    after = [name for name in norms if order[name] > order[blocks_name]]
    home = blocks_name.rpartition(".")[0]
    siblings = [name for name in after if name.rpartition(".")[0] == home]
    named = [name for name in norms if "final" in name.rpartition(".")[2]]
    found = siblings or after or named
    return found[-1] if found else None
