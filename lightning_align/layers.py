"""The one map of a model: embedding, blocks, final norm, head, and what the head does.

Freezing, cutting, fetching, checkpointing and reporting all work by block, and every loss of ours
needs the hidden state before the head. They ask this map, so nobody else walks ``named_modules()``.

Hugging Face decoders are uniform (base model, input and output embeddings, one ModuleList of
``num_hidden_layers`` blocks) and are read through that interface. Any other module is read from
its structure. Neither is trusted: ``ModelLayers.probe`` compares with the model's own logits.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N anything (``hidden_BTD``).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_align._errors import argument_error

# What the config calls the numbers that a head applies to its logits (or, equally, to its input).
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, ...
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3, ...
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, ...

_PROBE_TOKENS = 8
_PROBE_LOGIT = 100.0  # Softcaps in use are 15-50: logits of this size make every one of them bite.
# Largest difference over largest value: the same products run twice, only scale and cap differ.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection with everything it does besides the matrix product.

    Attributes:
        weight: Projection, (V, D).
        bias: Added to the product, (V,), or None.
        logit_scale: Factor on the logits.
        softcap: Bound ``c`` of ``c * tanh(logits / c)``, or None.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in the dtype of the hidden states."""
        logits_NV = F.linear(hidden_ND, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits_NV = logits_NV * self.logit_scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """Where the layers of ``model`` are. Made by ``find_layers``.

    Holds names, and looks the modules up at every access: a head that was resized or tied again is
    the one you get. The numbers are those of the moment of ``find_layers``.

    Attributes:
        model: The model that was read. All names are relative to it.
        embedding_name: Dotted name of the token embedding.
        blocks_name: Dotted name of the list of blocks.
        final_norm_name: Dotted name of the norm after the last block, or None.
        head_name: Dotted name of the output projection.
        hidden_size: Width D that the head takes.
        vocab_size: Number V of logits.
        logit_scale: Factor on the logits.
        softcap: Bound of the tanh on the logits, or None.
    """

    model: nn.Module = field(repr=False)
    embedding_name: str
    blocks_name: str
    final_norm_name: str | None
    head_name: str
    hidden_size: int
    vocab_size: int
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_submodule(self.embedding_name)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order of the model's list."""
        return list(self.model.get_submodule(self.blocks_name).children())

    @property
    def block_names(self) -> list[str]:
        """Dotted names of the blocks."""
        blocks = self.model.get_submodule(self.blocks_name)
        return [f"{self.blocks_name}.{name}" for name, _ in blocks.named_children()]

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, or None."""
        if self.final_norm_name is None:
            return None
        return self.model.get_submodule(self.final_norm_name)

    @property
    def head_module(self) -> nn.Module:
        """The module of the output projection."""
        return self.model.get_submodule(self.head_name)

    @property
    def head(self) -> Head:
        """The output projection as it is now."""
        module: Any = self.head_module
        return Head(module.weight, module.bias, self.logit_scale, self.softcap)

    @property
    def tied_parameters(self) -> tuple[tuple[str, ...], ...]:
        """Groups of dotted names that share one parameter."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        return tuple(tuple(group) for group in names.values() if len(group) > 1)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the model up to its head, which is not computed.

        Args:
            input_ids_BT: Tokens, (B, T).
            position_ids: Positions as the model's own forward takes them.
            attention_mask: Mask as the model's own forward takes it.

        Returns:
            What the head would have been given, (B, T, D).

        Raises:
            ValueError: If the model has no such argument, or does not give its head every token.
        """
        base: Any = _base_model(self.model)
        called = self.model if base is None else base
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        extra: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
        for name in extra.keys() - _argument_names(type(called).forward):
            rule = f"{type(called).__name__}.forward has no argument of that name"
            raise argument_error("ModelLayers.hidden_states", name, "...", rule, "Leave it out")
        extra.update(_no_cache(self.model))
        if base is not None:
            return base(input_ids_BT, **extra)[0]  # type: ignore[no-any-return]

        with _identity(self.head_module) as inputs:
            self.model(input_ids_BT, **extra)
        shapes = [tuple(hidden.shape[:-1]) for hidden in inputs]
        if shapes != [tuple(input_ids_BT.shape)]:
            rule = (
                f"forward must call its head '{self.head_name}' once, on every token; given tokens "
                f"of shape {tuple(input_ids_BT.shape)} it did on {shapes or 'nothing'}"
            )
            raise self._error("hidden_states", rule, "Give all the logits, through that module")
        return inputs[0]

    def probe(self) -> None:
        """Check on a few tokens that ``head`` on ``hidden_states`` gives the model's own logits.

        Costs three forwards of 16 tokens. Modes and random number generators are left as they were.

        Raises:
            ValueError: If the logits differ, or if the hidden state of a token depends on later
                tokens, so that the model is no decoder.
        """
        device = self.head.weight.device
        if device.type == "meta":
            raise self._error("probe", "its parameters must not be on the meta device")
        tolerance = max(_TOLERANCE.get(p.dtype, 0.0) for p in self.model.parameters())
        tokens_BT = _probe_tokens(self.vocab_size).to(device)
        with _undisturbed(self.model):
            with _scaled_input(self.embedding, 1) as embedded:
                hidden_BTD = self.hidden_states(tokens_BT)
            if not any(torch.equal(tokens_BT, ids) for ids in embedded):
                rule = f"the tokens must go through its embedding '{self.embedding_name}'"
                raise self._error("probe", rule, "Define get_input_embeddings() on the model")
            if hidden_BTD.shape[-1] != self.hidden_size:
                rule = (
                    f"its base model gives {hidden_BTD.shape[-1]} features, not {self.hidden_size}"
                )
                raise self._error("probe", rule)
            past_BTD = hidden_BTD[:, : _PROBE_TOKENS // 2]  # The same in both rows, if causal.
            if _difference(past_BTD[0], past_BTD[1]) > tolerance:
                rule = "the hidden state of a token must not depend on later tokens"
                raise self._error("probe", rule, "Use a causal decoder")
            for factor in (1.0, self._saturating_factor(hidden_BTD)):
                with _scaled_input(self.head_module, factor):
                    theirs_BTV = _logits(self.model(tokens_BT, **_no_cache(self.model)))
                self._compare(self.head.logits(hidden_BTD * factor), theirs_BTV, tolerance)

    def probe_documents(self) -> None:
        """Check that documents that share a row do not see each other.

        Their ``position_ids`` start again at 0. Other tokens in the first document must not move
        the hidden states of the second by a bit. In a mixture of experts they may, because an
        expert multiplies the tokens of all documents at once and rounds by their number: then no
        gradient may flow from the second document to the first, exactly. Costs up to three forwards
        of 16 tokens.

        Raises:
            ValueError: If the model takes no ``position_ids`` or its documents see each other.
        """
        base = _base_model(self.model)
        way_out = (
            "Set separate_documents=False, or take a model that attends by position_ids, as Llama, "
            "Qwen, Mistral, Gemma and GPT-2 of transformers do"
        )
        if "position_ids" not in _argument_names(type(base or self.model).forward):
            raise self._error("probe_documents", "its forward takes no position_ids", way_out)
        half = _PROBE_TOKENS // 2
        device = self.head.weight.device
        tokens_BT = _probe_tokens(self.vocab_size).flip(1).to(device)  # the second halves agree
        positions_BT = (torch.arange(_PROBE_TOKENS, device=device) % half).expand(2, -1)
        with _undisturbed(self.model):
            # One row at a time: the same sums in the same order.
            rows = ((tokens_BT[i : i + 1], positions_BT[i : i + 1]) for i in range(2))
            one, other = (self.hidden_states(*row)[0, half:] for row in rows)
            if torch.equal(one, other):
                return
            flow_BTD = self._flow(tokens_BT, positions_BT, half)
        if flow_BTD[:, :half].any():
            rule = "its documents must not see each other, and tokens of one move those of the next"
            raise self._error("probe_documents", rule, way_out)

    def _flow(self, tokens_BT: Tensor, positions_BT: Tensor, begin: int) -> Tensor:
        """Gradient of the hidden states from token ``begin`` on, with respect to the embeddings."""
        with torch.enable_grad(), _leaf_output(self.embedding) as embedded:
            hidden_BTD = self.hidden_states(tokens_BT, positions_BT)[:, begin:]
            # Weighted, because the features of a layer norm always sum to the same.
            weight_D = torch.linspace(-1, 1, hidden_BTD.shape[-1]).to(hidden_BTD).square()
            return torch.autograd.grad((hidden_BTD * weight_D).sum(), embedded[0])[0]

    def _compare(self, ours_BTV: Tensor, theirs_BTV: Tensor, tolerance: float) -> None:
        if ours_BTV.shape != theirs_BTV.shape:
            rule = (
                f"its logits must have shape {tuple(ours_BTV.shape)}, not {tuple(theirs_BTV.shape)}"
            )
            raise self._error("probe", rule)
        difference = _difference(ours_BTV, theirs_BTV)
        if not difference <= tolerance:  # Also for NaN.
            largest = theirs_BTV.abs().max().item()
            rule = (
                f"its logits are not those of its head '{self.head_name}' with logit_scale="
                f"{self.logit_scale:g} and softcap={self.softcap}: they differ by up to "
                f"{difference * largest:.3g}, the largest is {largest:.3g}"
            )
            way_out = (
                "Between its hidden states and its logits may only be that head and what "
                "config.logit_scale and config.final_logit_softcapping say"
            )
            if entries := _logit_entries(getattr(self.model, "config", None)):
                way_out += f"; the config has {entries}"
            raise self._error("probe", rule, way_out)

    def _saturating_factor(self, hidden_BTD: Tensor) -> float:
        """Factor on the hidden states that makes the largest logit ``_PROBE_LOGIT``.

        The logits of an untrained model are small, and any softcap is the identity on them.
        """
        largest = replace(self.head, softcap=None).logits(hidden_BTD).abs().max().item()
        return _PROBE_LOGIT / largest if largest > 0 else 1.0

    def _error(self, method: str, rule: str, way_out: str = "") -> ValueError:
        name = type(self.model).__name__
        return argument_error(f"ModelLayers.{method}", "model", name, rule, way_out)


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
    logit_scale, softcap = _head_arithmetic(getattr(model, "config", None))
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


def checkpoint_blocks(layers: ModelLayers) -> None:
    """Recompute the activations of each block in backward instead of keeping them.

    Active while a block is in training mode and gradients are enabled. Loss and gradients stay
    bit-identical, dropout included. Applying it twice is the same as once.

    Args:
        layers: Map of the model, whose blocks are changed in place.
    """
    model: Any = layers.model
    if is_hugging_face(model) and model.supports_gradient_checkpointing:
        # Their own blocks also keep the cache out of the recomputation.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        else:  # its name before transformers 5.23
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        # It also makes the embedding's output require gradients, which only reentrant
        # checkpointing needs and which would send backward through frozen blocks to the bottom.
        model.disable_input_require_grads()
        return
    for block in layers.blocks:
        attributes = vars(block)
        theirs = attributes.get("forward")
        if getattr(theirs, "func", None) is not _checkpointed_forward:
            # copy.deepcopy rebinds a partial to the copied block; a closure would keep this one.
            attributes["forward"] = partial(_checkpointed_forward, block, theirs)


def _checkpointed_forward(
    block: nn.Module, override: Callable[..., Any] | None, /, *args: Any, **kwargs: Any
) -> Any:
    """Forward of a checkpointed block: its class's, unless the block itself had an override."""
    forward = override or partial(type(block).forward, block)
    if block.training:  # Without gradients, checkpoint just calls.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    # Nobody has such a model without having imported transformers, so we need not import it.
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if is_hugging_face(model) else {}


def _base_model(model: Any) -> nn.Module | None:
    """The decoder below the head of a Hugging Face model, None where we must find out."""
    if not is_hugging_face(model) or model.base_model is model:
        return None
    return model.base_model  # type: ignore[no-any-return]


@cache
def _argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    """Its named arguments. ``**kwargs`` does not count: it would be ignored in silence."""
    return frozenset(inspect.signature(forward).parameters)


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


def _head_arithmetic(config: Any) -> tuple[float, float | None]:
    """Logit scale and softcap that a config asks for."""
    scale = math.prod(_numbers(config, _MULTIPLIERS).values())
    scale /= math.prod(_numbers(config, _DIVISORS).values())
    return scale, next(iter(_numbers(config, _SOFTCAPS).values()), None)


def _logit_entries(config: Any) -> str:
    """Entries of a config that may explain what a model does to its logits."""
    words = ("logit", "softcap", "soft_cap", "lm_head", "multiplier", "scal")
    names = [name for name in getattr(config, "__dict__", {}) if any(w in name for w in words)]
    return ", ".join(f"{name}={value:g}" for name, value in _numbers(config, names).items())


def _numbers(config: Any, names: Iterable[str]) -> dict[str, float]:
    """Those entries of a config that are set to a number; 0 means off."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = {name: getattr(config, name, None) for name in names}
    return {n: float(v) for n, v in values.items() if isinstance(v, (int, float)) and v}


@contextmanager
def _identity(module: nn.Module) -> Iterator[list[Tensor]]:
    """Make ``module`` the identity for a while; yields the list of what it is called on."""
    inputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    attributes = vars(module)  # An override in the instance keeps hooks and the module tree.
    before = {name: value for name, value in attributes.items() if name == "forward"}
    attributes["forward"] = forward
    try:
        yield inputs
    finally:
        del attributes["forward"]
        attributes.update(before)


@contextmanager
def _scaled_input(module: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Scale what ``module`` is called on for a while; yields the list of the original inputs."""
    inputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0])
        return (args[0] * factor, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _leaf_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph behind ``module`` for a while; yields the list of what it returned."""
    outputs: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves modes and random number generators alone."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _probe_tokens(vocab_size: int) -> Tensor:
    """Two rows of random tokens, the same in the first half and different in the second."""
    generator = torch.Generator().manual_seed(0)
    row_T = torch.randint(vocab_size, (_PROBE_TOKENS,), generator=generator)
    later_T = torch.arange(_PROBE_TOKENS) >= _PROBE_TOKENS // 2
    return torch.stack([row_T, (row_T + later_T) % vocab_size])


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return logits


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of theirs."""
    ours, theirs = ours.to("cpu", torch.float64), theirs.to("cpu", torch.float64)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
