"""What a block of a real model holds and keeps, read from the model itself on the meta device."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._compat.torch_autograd import without_values
from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.layers.find import find_language_models
from lightning_align.optimizers.param_groups import parameter_kinds
from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.fresh_memory import Made
from lightning_align.planner.model_spec import Shapes, count
from lightning_align.planner.module_scopes import BACKWARD, FORWARD
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.report import enclosing

WHERE = "ModelSpec.from_module"
MODULE = "module"  # the argument of from_module; from_config has one of that name, too
SHORT, BETWEEN, LONG = 32, 64, 96  # tokens of the rows of which saved bytes are counted
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
        in_half: Gives the same of a step in which products have 16 bits, for a way to have them
            (``TRUE`` or ``MIXED``). Where it is not known, all bytes are taken for half.
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
    in_half: Callable[[str], Kept | None] | None = field(default=None, repr=False, compare=False)

    def of(self, parallel: ParallelSpec) -> BlockAnalysis:
        """The same in bytes of a precision; parameters are as they were.

        Args:
            parallel: Has the precision.
        """
        if not parallel.is_half:
            return self
        way = MIXED if parallel.weight_bytes == 4 else TRUE
        kept = None if self.in_half is None else self.in_half(way)
        return self._halved() if kept is None else replace(self, **kept)

    def _halved(self) -> BlockAnalysis:
        found = {name: getattr(self, name) for name in _BYTES}
        halves: Kept = {n: None if each is None else each / 2 for n, each in found.items()}
        made = tuple(m._replace(a_token=m.a_token / 2, a_pair=m.a_pair / 2) for m in self.made)
        return replace(self, **halves, made=made)

    def saved_bytes(self, rows: float, seq_len: int) -> float | None:
        """Bytes that a block keeps of a micro-batch; None if that is not known.

        Args:
            rows: Of the micro-batch.
            seq_len: Tokens of each.
        """
        if self.saved_a_token is None:
            return None
        a_row = self.saved_a_token * seq_len + self.saved_a_pair * seq_len**2
        return rows * a_row + self.shared_bytes(seq_len)

    def shared_bytes(self, seq_len: int) -> float:
        """Bytes of those that all blocks keep together, as rotary embeddings and masks.

        Args:
            seq_len: Tokens of a row.
        """
        return self.shared_a_token * seq_len + self.shared_a_pair * seq_len**2


TRUE, MIXED = "true", "mixed"  # 16 bits as Lightning has them: of the weights too, or by autocast
Kept = dict[str, Any]  # by the names of a BlockAnalysis, without its parameters
_BYTES = (
    *("saved_a_token", "saved_a_pair", "shared_a_token", "shared_a_pair"),
    *("trained_a_token", "ends_a_token"),
)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without memory for its tensors.

    Args:
        module: Stays as it is.
    """
    return _copied(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def _copied(module: nn.Module, empty: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        new = empty(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
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
    kept = _kept(model)
    found = sizes_of_layers(layers, MODULE, saved_a_token=kept.pop("saved_a_token"))
    analysis = replace(found["analysis"], **kept, in_half=_InHalf(model))
    return {**found, "analysis": analysis, "seq_len": seq_len}


class _InHalf:
    """What blocks keep in 16 bits, counted when it is asked for, once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model  # on meta: it takes no memory
        self._found: dict[str, Kept | None] = {}

    def __call__(self, way: str) -> Kept | None:
        if way not in self._found:
            ways = {TRUE: _kept_in_half, MIXED: _kept_in_mixed}
            try:
                self._found[way] = ways[way](self._model)
            except ValueError as error:
                taken = "what its blocks keep in 16 bits is taken for half of that in fp32"
                warnings.warn(f"{taken}: {error}", stacklevel=2)
                self._found[way] = None
        return self._found[way]


def _kept_in_half(model: nn.Module) -> Kept:
    """Of a module that is cast, with a default dtype as Lightning's ``bf16-true`` sets it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return _kept(on_meta(model).to(torch.bfloat16))
    finally:
        torch.set_default_dtype(before)


def _kept_in_mixed(model: nn.Module) -> Kept:
    """Under autocast, which is that of a device: of the processor, for tensors without memory."""
    with without_values():
        fake = _copied(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        return _kept(fake, lambda: torch.autocast("cpu", torch.bfloat16))


def _kept(model: nn.Module, context: Callable[[], Any] = nullcontext) -> Kept:
    """What a block keeps, by rows of two lengths, one and two of each.

    Args:
        model: On meta, or of tensors that are not real.
        context: In which forward runs.
    """
    layers = find_layers(model)
    counted = partial(_counted, model, layers, context)
    short, whole, made = counted(1, SHORT)
    (long, _, made_long), (two_long, *_) = counted(1, LONG), counted(2, LONG)
    two_short, whole_two, made_two = counted(2, SHORT)
    a_row = two_short - short
    own = _of_tokens(a_row, two_long - long)
    copies = 0.0
    if context is not nullcontext:  # 16-bit copies of weights, which do not grow with tokens
        between, *_ = counted(1, BETWEEN)
        rest = between - (own[0] * BETWEEN + own[1] * BETWEEN**2)
        # c + a t + b t^2 at three lengths that are 1, 2 and 3 times the first one
        copies = 3 * (short - a_row) - 3 * rest + 2 * long - two_long
    shared = _of_tokens(short - a_row - copies, 2 * long - two_long - copies)
    blocks = layers.blocks
    middle = blocks[len(blocks) // 2]
    trains = [parameter.requires_grad for parameter in middle.parameters()]
    middle.requires_grad_(False)
    frozen, *_ = counted(1, SHORT)
    for parameter, trained in zip(middle.parameters(), trains, strict=True):
        parameter.requires_grad_(trained)
    return {
        "saved_a_token": own[0],
        "saved_a_pair": own[1],
        "shared_a_token": shared[0],
        "shared_a_pair": shared[1],
        "trained_a_token": (short - frozen) / SHORT,
        "ends_a_token": (whole_two - whole - len(blocks) * a_row) / SHORT,
        "made": _made(made, made_long, made_two),
    }


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
    model: nn.Module, layers: ModelLayers, context: Callable[[], Any], rows: int, tokens: int
) -> tuple[float, float, Sizes]:
    """Bytes that a block in the middle keeps of a micro-batch, those of all, and what it makes."""
    device = next(model.parameters()).device
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)

    def loss() -> Tensor:
        with context():
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
