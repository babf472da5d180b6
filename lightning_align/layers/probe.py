"""The map of a model is not trusted: a few tokens show whether it is the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers.head import logit_entries
from lightning_align.layers.hugging_face import argument_names, base_model, no_cache
from lightning_align.layers.surgery import evaluating

if TYPE_CHECKING:
    from lightning_align.layers.map import ModelLayers

_PROBE_TOKENS = 8
_PROBE_LOGIT = 100.0  # Softcaps in use are 15-50: logits of this size make every one of them bite.
# Largest difference over largest value: the same products run twice, only scale and cap differ.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


def check_logits(layers: ModelLayers) -> None:
    """Refuse a model whose logits are not those of its head on its hidden states."""
    device = layers.head.weight.device
    if device.type == "meta":
        raise model_error(layers.model, "probe", "its parameters must not be on the meta device")
    allowed = tolerance(layers.model)
    tokens_BT = probe_tokens(layers.vocab_size).to(device)
    with undisturbed(layers.model):
        with _scaled_input(layers.embedding, 1) as embedded:
            hidden_BTD = layers.hidden_states(tokens_BT)
        if not any(torch.equal(tokens_BT, ids) for ids in embedded):
            rule = f"the tokens must go through its embedding '{layers.embedding_name}'"
            way_out = "Define get_input_embeddings() on the model"
            raise model_error(layers.model, "probe", rule, way_out)
        if hidden_BTD.shape[-1] != layers.hidden_size:
            rule = f"its base model gives {hidden_BTD.shape[-1]} features, not {layers.hidden_size}"
            raise model_error(layers.model, "probe", rule)
        past_BTD = hidden_BTD[:, : _PROBE_TOKENS // 2]  # The same in both rows, if causal.
        if difference(past_BTD[0], past_BTD[1]) > allowed:
            rule = "the hidden state of a token must not depend on later tokens"
            raise model_error(layers.model, "probe", rule, "Use a causal decoder")
        for factor in (1.0, _saturating_factor(layers, hidden_BTD)):
            with _scaled_input(layers.head_module, factor):
                theirs_BTV = _logits(layers.model(tokens_BT, **no_cache(layers.model)))
            _compare(layers, layers.head.logits(hidden_BTD * factor), theirs_BTV, allowed)


def gives_router_logits(layers: ModelLayers) -> bool:
    """Whether router logits come with the hidden states of a few tokens."""
    tokens_BT = probe_tokens(layers.vocab_size).to(layers.head.weight.device)
    with undisturbed(layers.model):
        return bool(layers.hidden_states_and_router_logits(tokens_BT)[1])


def is_moved_by(layers: ModelLayers, change: AbstractContextManager[None]) -> bool:
    """Whether the hidden states of a few tokens are others within a context.

    Args:
        layers: Map of the model, whose modes and generators are left as they were.
        change: What may change the model for a while.
    """
    tokens_BT = probe_tokens(layers.vocab_size).to(layers.head.weight.device)
    with undisturbed(layers.model):
        before_BTD = layers.hidden_states(tokens_BT)
        with change:
            within_BTD = layers.hidden_states(tokens_BT)
    return not difference(within_BTD, before_BTD) <= tolerance(layers.model)  # Also for NaN.


def check_documents(layers: ModelLayers) -> None:
    """Refuse a model in which documents that share a row see each other."""
    base = base_model(layers.model)
    way_out = (
        "Set separate_documents=False (of conversations packing=False), or take a model that "
        "attends by position_ids, as Llama, "
        "Qwen, Mistral, Gemma and GPT-2 of transformers do"
    )
    if "position_ids" not in argument_names(type(base or layers.model).forward):
        rule = "its forward takes no position_ids"
        raise model_error(layers.model, "probe_documents", rule, way_out)
    half = _PROBE_TOKENS // 2
    device = layers.head.weight.device
    tokens_BT = probe_tokens(layers.vocab_size).flip(1).to(device)  # the second halves agree
    positions_BT = (torch.arange(_PROBE_TOKENS, device=device) % half).expand(2, -1)
    with undisturbed(layers.model):
        # One row at a time: the same sums in the same order.
        rows = ((tokens_BT[i : i + 1], positions_BT[i : i + 1]) for i in range(2))
        one, other = (layers.hidden_states(*row)[0, half:] for row in rows)
        # Some kernels tell documents apart in a batch of one row alone (flash_attention_2).
        both = layers.hidden_states(tokens_BT, positions_BT)[:, half:]
        if torch.equal(one, other) and torch.equal(*both):
            return
        flow_BTD = _flow(layers, tokens_BT, positions_BT, half)
    if flow_BTD[:, :half].any():
        rule = "its documents must not see each other, and tokens of one move those of the next"
        raise model_error(layers.model, "probe_documents", rule, way_out)


def _flow(layers: ModelLayers, tokens_BT: Tensor, positions_BT: Tensor, begin: int) -> Tensor:
    """Gradient of the hidden states from token ``begin`` on, with respect to the embeddings."""
    with torch.enable_grad(), _leaf_output(layers.embedding) as embedded:
        hidden_BTD = layers.hidden_states(tokens_BT, positions_BT)[:, begin:]
        # Weighted, because the features of a layer norm always sum to the same.
        weight_D = torch.linspace(-1, 1, hidden_BTD.shape[-1]).to(hidden_BTD).square()
        return torch.autograd.grad((hidden_BTD * weight_D).sum(), embedded[0])[0]


def _compare(layers: ModelLayers, ours_BTV: Tensor, theirs_BTV: Tensor, allowed: float) -> None:
    if ours_BTV.shape != theirs_BTV.shape:
        rule = f"its logits must have shape {tuple(ours_BTV.shape)}, not {tuple(theirs_BTV.shape)}"
        raise model_error(layers.model, "probe", rule)
    largest_error = difference(ours_BTV, theirs_BTV)
    if not largest_error <= allowed:  # Also for NaN.
        largest = theirs_BTV.abs().max().item()
        rule = (
            f"its logits are not those of its head '{layers.head_name}' with logit_scale="
            f"{layers.logit_scale:g} and softcap={layers.softcap}: they differ by up to "
            f"{largest_error * largest:.3g}, the largest is {largest:.3g}"
        )
        way_out = (
            "Between its hidden states and its logits may only be that head and what "
            "config.logit_scale and config.final_logit_softcapping say"
        )
        if entries := logit_entries(getattr(layers.model, "config", None)):
            way_out += f"; the config has {entries}"
        raise model_error(layers.model, "probe", rule, way_out)


def _saturating_factor(layers: ModelLayers, hidden_BTD: Tensor) -> float:
    """Factor on the hidden states that makes the largest logit ``_PROBE_LOGIT``.

    The logits of an untrained model are small, and any softcap is the identity on them.
    """
    largest = replace(layers.head, softcap=None).logits(hidden_BTD).abs().max().item()
    return _PROBE_LOGIT / largest if largest > 0 else 1.0


def model_error(model: nn.Module, method: str, rule: str, way_out: str = "") -> ValueError:
    """The error of a method of the map."""
    return argument_error(f"ModelLayers.{method}", "model", type(model).__name__, rule, way_out)


@contextmanager
def _scaled_input(module: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Scale what ``module`` is called on for a while; yields the list of the original inputs."""
    inputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0])
        return (args[0] * factor, *args[1:])

    with module.register_forward_pre_hook(hook):
        yield inputs


@contextmanager
def _leaf_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph behind ``module`` for a while; yields the list of what it returned."""
    outputs: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with module.register_forward_hook(hook):
        yield outputs


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves modes and random number generators alone."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(model):
        yield


def tolerance(model: nn.Module) -> float:
    """Largest ``difference`` between two ways to compute the same, by the dtypes of a model."""
    return max(_TOLERANCE.get(parameter.dtype, 0.0) for parameter in model.parameters())


def probe_tokens(vocab_size: int) -> Tensor:
    """Two rows of random tokens, the same in the first half and different in the second."""
    generator = torch.Generator().manual_seed(0)
    row_T = torch.randint(vocab_size, (_PROBE_TOKENS,), generator=generator)
    later_T = torch.arange(_PROBE_TOKENS) >= _PROBE_TOKENS // 2
    return torch.stack([row_T, (row_T + later_T) % vocab_size])


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of theirs."""
    ours, theirs = ours.to("cpu", torch.float64), theirs.to("cpu", torch.float64)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
