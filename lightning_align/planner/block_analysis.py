"""What a block of a real model holds and keeps, read from the model itself on the meta device."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.layers.find import find_language_models
from lightning_align.optimizers.param_groups import parameter_kinds
from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.fresh_memory import Made
from lightning_align.planner.model_spec import Shapes, count
from lightning_align.planner.module_scopes import BACKWARD, FORWARD
from lightning_align.planner.report import enclosing

WHERE = "ModelSpec.from_module"
MODULE = "module"  # the argument of from_module; from_config has one of that name, too
SHORT, LONG = 32, 96  # tokens of the rows of which saved bytes are counted
UNLIKE = 0.25  # of a block's parameters, from which on it is no decoder block of its sizes


@dataclass(frozen=True)
class BlockAnalysis:
    """Parameters of a real model, and what one of its blocks keeps for backward.

    Attributes:
        block_shapes: Kind and shape of each parameter of a block.
        first_shapes: Of those before the first block.
        last_shapes: Of those after the last one that are not tied.
        saved_a_token: Bytes that a block keeps of a token, in fp32; None if that is not known.
        saved_a_pair: Bytes that it keeps of a pair of tokens of a row besides.
        shared_a_token: Bytes that it keeps of a token for all rows and blocks together.
        shared_a_pair: The same of a pair of tokens, as of a mask.
        trained_a_token: Bytes of those of a token that it keeps for gradients of its weights alone,
            and not where they are frozen.
        ends_a_token: Bytes of a token that is kept before and after all blocks, up to the head.
        made: What a block makes that grows with rows, whether kept or not; empty if not known.
    """

    block_shapes: Shapes
    first_shapes: Shapes
    last_shapes: Shapes
    saved_a_token: float | None = None
    saved_a_pair: float = 0.0
    shared_a_token: float = 0.0
    shared_a_pair: float = 0.0
    trained_a_token: float = 0.0
    ends_a_token: float | None = None
    made: tuple[Made, ...] = ()

    def saved_bytes(self, rows: float, seq_len: int, is_half: bool) -> float | None:
        """Bytes that a block keeps of a micro-batch; None if that is not known.

        Args:
            rows: Of the micro-batch.
            seq_len: Tokens of each.
            is_half: Whether activations have 16 bits.
        """
        if self.saved_a_token is None:
            return None
        a_row = self.saved_a_token * seq_len + self.saved_a_pair * seq_len**2
        return rows * a_row * (0.5 if is_half else 1.0) + self.shared_bytes(seq_len, is_half)

    def shared_bytes(self, seq_len: int, is_half: bool) -> float:
        """Bytes of those that all blocks keep together, as rotary embeddings and masks.

        Args:
            seq_len: Tokens of a row.
            is_half: Whether activations have 16 bits.
        """
        nbytes = self.shared_a_token * seq_len + self.shared_a_pair * seq_len**2
        return nbytes * (0.5 if is_half else 1.0)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without memory for its tensors.

    Args:
        module: Stays as it is.
    """
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def sizes_of_module(module: nn.Module, seq_len: int) -> dict[str, Any]:
    """Arguments of ``ModelSpec`` for a real model, with what its blocks keep.

    Args:
        module: A language model, or a module that holds one.
        seq_len: Tokens of a row.

    Raises:
        ValueError: If its layers cannot be found, or it does not run on the meta device.
    """
    if not isinstance(module, nn.Module):
        raise argument_error(WHERE, "module", module, "must be a torch.nn.Module")
    models = list(find_language_models(module).values()) or [module]
    model = on_meta(models[0])
    layers = find_layers(model)
    refuse_experts(layers, MODULE)  # which may not run on meta
    short, whole, made = _counted(model, layers, 1, SHORT)
    (long, _, made_long), (two_long, *_) = (_counted(model, layers, n, LONG) for n in (1, 2))
    two_short, _, made_two = _counted(model, layers, 2, SHORT)
    a_row = two_short - short
    own = _of_tokens(a_row, two_long - long)
    shared = _of_tokens(short - a_row, 2 * long - two_long)
    found = sizes_of_layers(layers, MODULE, saved_a_token=own[0])
    blocks = layers.blocks
    blocks[len(blocks) // 2].requires_grad_(False)
    frozen, *_ = _counted(model, layers, 1, SHORT)
    kept: dict[str, Any] = {
        "saved_a_pair": own[1],
        "shared_a_token": shared[0],
        "shared_a_pair": shared[1],
        "trained_a_token": (short - frozen) / SHORT,
        "ends_a_token": (whole - (len(blocks) - 1) * a_row - short) / SHORT,
        "made": _made(made, made_long, made_two),
    }
    return {**found, "analysis": replace(found["analysis"], **kept), "seq_len": seq_len}


def _of_tokens(short: float, long: float) -> tuple[float, float]:
    """Of bytes of two rows, how many are a token's and how many a pair of tokens'."""
    pair = (long / LONG - short / SHORT) / (LONG - SHORT)
    return short / SHORT - pair * SHORT, pair


Sizes = list[tuple[str, int]]  # phase and bytes of each tensor that is made, in order


def _made(short: Sizes, long: Sizes, two: Sizes) -> tuple[Made, ...]:
    """What grows with rows, from rows of two lengths, and two of the shorter ones."""
    if len({tuple(phase for phase, _ in each) for each in (short, long, two)}) > 1:
        return ()  # it does not run the same operations whatever the length
    found: Counter[tuple[str, float, float]] = Counter()
    for (phase, one), (_, more), (_, both) in zip(short, long, two, strict=True):
        if both == 2 * one:  # else of weights, or of all rows together
            found[(phase, *_of_tokens(one, more))] += 1
    return tuple(Made(*size, times) for size, times in found.items())


def _counted(
    model: nn.Module, layers: ModelLayers, rows: int, tokens: int
) -> tuple[float, float, Sizes]:
    """Bytes that a block in the middle keeps of a micro-batch, those of all, and what it makes."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        found: Any = model(ids)
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits.float().sum()

    try:
        report = analyze_step(model.train(), loss)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        rule = f"does not run on the meta device ({str(error).splitlines()[0]})"
        way_out = "Use ModelSpec.from_config, or give its sizes"
        name = type(model).__name__
        raise argument_error(WHERE, "module", name, rule, way_out) from error
    names = layers.block_names
    name = names[len(names) // 2]
    own = [r for r in report.trace.records if name in enclosing(r.scope)]
    made = [(r.phase, n) for r in own for n in r.made if r.phase in (FORWARD, BACKWARD)]
    return float(report.modules[name].saved_bytes), float(report.saved_bytes), made


def refuse_experts(layers: ModelLayers, argument: str) -> None:
    """Refuse blocks of which a token takes a part only: neither time nor memory is that of all.

    Args:
        layers: Map of the model.
        argument: What the user gave it as, module or config.

    Raises:
        ValueError: If there are experts in a block.
    """
    for name, _ in layers.model.named_modules():
        if name.rpartition(".")[2] == "experts":
            rule = f"is a mixture of experts ({name}), whose tokens have a part of a block each"
            way_out = "Such models are not planned; analyze_step counts a step of one"
            raise argument_error(*_asked(layers, argument), rule, way_out)


def _asked(layers: ModelLayers, argument: str) -> tuple[str, str, str]:
    """What the user called, with which argument, and what that was."""
    return f"ModelSpec.from_{argument}", argument, type(layers.model).__name__


def sizes_of_layers(layers: ModelLayers, argument: str, **saved: Any) -> dict[str, Any]:
    """Arguments of ``ModelSpec`` for a model whose layers are known, but for ``seq_len``.

    Args:
        layers: Map of the model.
        argument: What the user gave it as, module or config.
        **saved: What is known of the bytes that a block keeps.

    Raises:
        ValueError: If its blocks differ, or are not of a decoder of its sizes.
    """
    refuse_experts(layers, argument)
    kinds = parameter_kinds(layers.model, layers)
    blocks = [_shapes(kinds, block) for block in layers.blocks]
    held = {id(parameter) for block in layers.blocks for parameter in block.parameters()}
    beside = [p for p in layers.model.parameters() if id(p) not in held]
    after = {id(p) for p in layers.head_module.parameters()}
    if layers.final_norm is not None:
        after |= {id(p) for p in layers.final_norm.parameters()}
    after -= {id(p) for p in layers.embedding.parameters()}
    sizes = [count(block) for block in blocks]
    typical = sorted(blocks, key=count)[len(blocks) // 2]
    if max(sizes) > 1.02 * min(sizes):
        rule = f"has blocks of {min(sizes):,} to {max(sizes):,} parameters, which must be alike"
        raise argument_error(*_asked(layers, argument), rule)
    analysis = BlockAnalysis(
        block_shapes=typical,
        first_shapes=_shapes_of(kinds, [p for p in beside if id(p) not in after]),
        last_shapes=_shapes_of(kinds, [p for p in beside if id(p) in after]),
        **saved,
    )
    tied = layers.embedding.weight is layers.head_module.weight
    parts = [part for block in layers.blocks for part in block.modules()]
    return {
        "num_layers": len(blocks),
        "hidden_size": layers.hidden_size,
        "vocab_size": layers.vocab_size,
        "tied_embeddings": bool(tied),
        "dropout": any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts),
        "analysis": analysis,
        **_attention(layers, typical, argument),
    }


def _attention(layers: ModelLayers, block: Shapes, argument: str) -> dict[str, Any]:
    """Heads and widths: from the configuration of transformers, or by the shapes of matrices."""
    h = layers.hidden_size
    config: Any = getattr(layers.model, "config", None)
    matrices = [shape for kind, shape in block if kind.startswith("matrices")]
    wide = max((max(shape) for shape in matrices), default=h)
    heads = getattr(config, "num_attention_heads", None)
    known = {
        "num_heads": heads or 1,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads or 1,
        "head_dim": getattr(config, "head_dim", None) or h // (heads or 1),
    }
    ffn = getattr(config, "intermediate_size", None) or wide
    width = known["head_dim"] * (2 * known["num_heads"] + 2 * known["num_kv_heads"])
    held = sum(prod(s) for kind, s in block if len(s) > 1)
    by_gate = {gated: h * (width + (2 + gated) * ffn) for gated in (False, True)}
    gated, expected = min(by_gate.items(), key=lambda item: abs(item[1] - held))
    if abs(held / expected - 1) > UNLIKE:
        rule = (
            f"has blocks with {held:,} elements in matrices, and a decoder of its sizes has "
            f"{expected:,}: what else is in them would not be planned"
        )
        raise argument_error(*_asked(layers, argument), rule)
    return {**known, "ffn_hidden_size": ffn, "gated_ffn": gated}


def _shapes(kinds: Mapping[nn.Parameter, str], module: nn.Module) -> Shapes:
    return _shapes_of(kinds, list(module.parameters()))


def _shapes_of(kinds: Mapping[nn.Parameter, str], parameters: list[nn.Parameter]) -> Shapes:
    return tuple((kinds[parameter], tuple(parameter.shape)) for parameter in parameters)
