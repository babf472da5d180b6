"""What generation costs: prefill, then a token at a time; and when that leaves the memory wall.

Prefill runs all tokens of the prompts at once, as a training forward does. Decoding reads all
weights, and each row's own keys and values, for one new token of each row: a FLOP or two a byte for
a row by itself. A larger batch shares the weights, never the cache: products leave the memory wall
where the batch reaches the ridge of the roofline, and attention does not leave it at any batch.

Pieces and seconds are those of the planner (``block_work``, ``step_cost``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_align._errors import argument_error, check_choice
from lightning_align.planner.block_work import (
    ATTENTION,
    CACHE,
    Pass,
    Piece,
    block_passes,
    decoding_pass,
    first_passes,
    last_passes,
)
from lightning_align.planner.efficiencies import (
    Efficiencies,
    efficiencies_of,
    measured_efficiencies,
)
from lightning_align.planner.hardware_spec import HardwareSpec
from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.planner import USABLE
from lightning_align.planner.step_cost import NOTHING, pass_time

WHERE = "predict_generation"
PRECISIONS = ("32-true", "bf16-true")
# Operations that a block of transformers' Llama runs beside the kernels of ``block_work``, views
# among them: norms in six pieces each, rotary positions, projections one by one, reshapes; and
# those that it runs before and after all blocks.
EAGER_OPERATIONS, EAGER_AROUND = 60, 23


@dataclass(frozen=True)
class Phase:
    """Prefill, or the mean step of decoding, on one device.

    Attributes:
        flops: Of products.
        bytes: Read and written.
        seconds: That it takes.
        by_bound: Seconds by what they go into: compute, memory, overhead or messages.
    """

    flops: float
    bytes: float
    seconds: float
    by_bound: Mapping[str, float]

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def bound(self) -> str:
        """What most of the time goes into."""
        return max(self.by_bound, key=self.by_bound.__getitem__)


@dataclass(frozen=True)
class GenerationCost:
    """What it costs to go on from some prompts. Made by ``predict_generation``.

    Attributes:
        batch_size: Prompts at a time.
        prompt_length: Tokens of each.
        new_tokens: Tokens to generate for each.
        prefill: All tokens of the prompts at once, which gives the first new token.
        decode: One step, of the mean length of the context, which gives one more token a row.
        weight_bytes: Of the weights on a device.
        kv_bytes_per_token: Of the keys and values of a token of one row, in all blocks on a device.
        held_bytes: What a block of prefill holds besides.
        compute_bound_batch: From which batch on a step of decoding has more arithmetic than memory
            keeps up with; infinite where the cache alone is too much to read.
        products_compute_bound_batch: The same for the products with weights alone.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int
    prefill: Phase
    decode: Phase
    weight_bytes: float
    kv_bytes_per_token: float
    held_bytes: float
    compute_bound_batch: float
    products_compute_bound_batch: float
    hardware: HardwareSpec = field(repr=False)

    @property
    def seconds(self) -> float:
        """From the prompts to the last token."""
        return self.prefill.seconds + (self.new_tokens - 1) * self.decode.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, while decoding."""
        return self.batch_size / self.decode.seconds

    @property
    def kv_cache_bytes(self) -> float:
        """Of all rows at the end, on a device; the last token's keys and values are not needed."""
        return (
            self.batch_size * self.kv_bytes_per_token * (self.prompt_length + self.new_tokens - 1)
        )

    @property
    def memory_bytes(self) -> float:
        """Weights, cache, and what prefill holds besides, on a device."""
        return self.weight_bytes + self.kv_cache_bytes + self.held_bytes

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.batch_size <= self.max_batch_size

    @property
    def max_batch_size(self) -> int:
        """The largest batch for which there is room; 0 for none."""
        room = USABLE * self.hardware.memory - self.weight_bytes
        a_row = (self.kv_cache_bytes + self.held_bytes) / self.batch_size
        return max(0, math.floor(room / a_row))


def predict_generation(
    model: ModelSpec,
    hardware: HardwareSpec | str,
    *,
    batch_size: int = 1,
    prompt_length: int | None = None,
    new_tokens: int = 128,
    precision: str = "bf16-true",
    tensor_parallel: int = 1,
    eager: bool = False,
    efficiencies: Efficiencies | None = None,
) -> GenerationCost:
    """Predict prefill and decoding.

    Args:
        model: What generates.
        hardware: On what, or its name such as ``"h100-sxm"``.
        batch_size: Prompts at a time.
        prompt_length: Tokens of each; None takes the model's ``seq_len``.
        new_tokens: Tokens to generate for each.
        precision: Of weights, cache and arithmetic: ``"bf16-true"`` or ``"32-true"``.
        tensor_parallel: Devices that divide each matrix and the heads of the cache.
        eager: Whether each operation is launched from Python, and the cache copied as it grows, as
            ``generate`` of transformers does by default; if not, a step is launched as one graph
            and the cache stays where it is, as engines that serve models do.
        efficiencies: Constants of the hardware; None takes those that the planner begins with, or
            what was measured of a processor (``HardwareSpec.measure``). There products of few rows
            and attention for one token take what they were found to; the maker's sheet of any
            hardware is taken at its word.

    Raises:
        ValueError: If a number is below 1, the precision is another, heads cannot be divided, or
            learned positions do not suffice.

    Example:
        >>> llama = ModelSpec(32, 4096, 32, 8, 14336, vocab_size=128256, seq_len=1024,
        ...     gated_ffn=True, bias=False, norm_bias=False, num_positions=0, tied_embeddings=False)
        >>> cost = predict_generation(llama, "h100-sxm", batch_size=1)
        >>> cost.decode.bound, round(cost.kv_bytes_per_token / 1024)
        ('memory', 128)
    """
    if isinstance(hardware, str):
        hardware = HardwareSpec.from_name(hardware)
    prompt = model.seq_len if prompt_length is None else prompt_length
    _check(model, hardware, batch_size=batch_size, prompt_length=prompt, new_tokens=new_tokens)
    check_choice(WHERE, "precision", precision, PRECISIONS)
    spec = ParallelSpec(
        devices=tensor_parallel,
        tensor_parallel=tensor_parallel,
        micro_batch_size=batch_size,
        precision=precision,
    )
    spec.check_model(model)
    model = replace(model, dropout=False)
    few = hardware.few_rows_half if spec.is_half else hardware.few_rows
    constants = efficiencies or (
        efficiencies_of(hardware.overhead_s, hardware.is_asynchronous)
        if few is None
        else measured_efficiencies(few.call_s)
    )
    context = prompt + max(new_tokens, 2) / 2  # the mean of prompt + 1 ... prompt + new_tokens - 1
    filling, step = _prefill(model, spec, prompt), _decoding(model, spec, context)
    if eager:
        copied = _token_bytes(model, spec) / model.num_layers * batch_size
        filling = _launched_apart(filling, prompt * copied)
        step = _launched_apart(step, context * copied)
    else:
        constants = replace(constants, launch_s=0.0, collective_s=0.0)
    if few is not None:
        share, whole = few.share(batch_size), few.share(batch_size * prompt)
        filling = (_reaching(filling[0], whole), filling[1], _reaching(filling[2], share))
        step = (_reaching(step[0], share, few.attention), step[1], _reaching(step[2], share))
    ridge = hardware.product_flops(spec.is_half) / hardware.mem_bandwidth
    one, two = (_decoding(model, replace(spec, micro_batch_size=rows), context) for rows in (1, 2))
    return GenerationCost(
        batch_size=batch_size,
        prompt_length=prompt,
        new_tokens=new_tokens,
        prefill=_phase(filling, model, spec, hardware, constants),
        decode=_phase(step, model, spec, hardware, constants),
        weight_bytes=model.parameters * spec.weight_bytes / tensor_parallel,
        kv_bytes_per_token=_token_bytes(model, spec),
        held_bytes=batch_size * prompt * _held(model, spec),
        compute_bound_batch=_compute_bound_batch(one, two, model, ridge),
        products_compute_bound_batch=_compute_bound_batch(
            _products(one), _products(two), model, ridge
        ),
        hardware=hardware,
    )


Passes = tuple[Pass, Pass, Pass]  # of a block, of what is before all blocks, and after


def _decoding(model: ModelSpec, spec: ParallelSpec, context: float) -> Passes:
    one = model.with_seq_len(1)
    last = last_passes(one, spec)[0]
    return decoding_pass(model, spec, context), first_passes(one, spec)[0], _without_loss(last)


def _prefill(model: ModelSpec, spec: ParallelSpec, prompt: int) -> Passes:
    """The head is for the last token of each prompt alone."""
    whole = model.with_seq_len(prompt)
    last = last_passes(model.with_seq_len(1), spec)[0]
    return block_passes(whole, spec)[0], first_passes(whole, spec)[0], _without_loss(last)


def _without_loss(last: Pass) -> Pass:
    norm, head, _ = last.pieces
    return last._replace(pieces=(norm, head))


def _launched_apart(passes: Passes, copied: float) -> Passes:
    """With all operations of eager blocks, and a cache that is copied to a longer one."""
    block, first, last = passes
    more = (
        Piece("eager operations", kernels=EAGER_OPERATIONS),
        Piece(f"{CACHE} copied", bytes=2 * copied, kernels=2),
    )
    around = Piece("eager operations", kernels=EAGER_AROUND)
    first = first._replace(pieces=(*first.pieces, around))
    return block._replace(pieces=(*block.pieces, *more)), first, last


def _reaching(work: Pass, products: float, attention: float = 1.0) -> Pass:
    """With the shares of the roofline that products with weights, and attention, reach."""
    pieces = (
        piece._replace(share=attention if piece.name == ATTENTION else products)
        if piece.flops
        else piece
        for piece in work.pieces
    )
    return work._replace(pieces=tuple(pieces))


def _phase(
    passes: Passes,
    model: ModelSpec,
    spec: ParallelSpec,
    hardware: HardwareSpec,
    constants: Efficiencies,
) -> Phase:
    total = NOTHING
    for each, times in zip(passes, (model.num_layers, 1, 1), strict=True):
        total = total.plus(pass_time(each, spec, hardware, constants), times)
    return Phase(*_work(passes, model), total.seconds, total.by_bound)


def _work(passes: Sequence[Pass], model: ModelSpec) -> tuple[float, float]:
    """FLOPs and bytes of all blocks and what is around them."""
    flops = moved = 0.0
    for each, times in zip(passes, (model.num_layers, 1, 1), strict=True):
        flops += times * sum(piece.flops for piece in each.pieces)
        moved += times * sum(piece.bytes for piece in each.pieces)
    return flops, moved


def _products(passes: Iterable[Pass]) -> list[Pass]:
    """With weights."""
    return [
        each._replace(pieces=tuple(p for p in each.pieces if p.flops and p.name != ATTENTION))
        for each in passes
    ]


def _compute_bound_batch(
    one: Sequence[Pass], two: Sequence[Pass], model: ModelSpec, ridge: float
) -> float:
    """Where FLOPs and bytes of a step, which are linear in its rows, meet at the ridge.

    rows x flops = ridge x (shared bytes + rows x bytes of a row)
    """
    (flops, bytes_of_one), (_, bytes_of_two) = (_work(each, model) for each in (one, two))
    of_a_row = bytes_of_two - bytes_of_one
    shared = bytes_of_one - of_a_row
    spare = flops / ridge - of_a_row  # bytes a row that arithmetic leaves time for
    return shared / spare if spare > 0 else math.inf


def _token_bytes(model: ModelSpec, spec: ParallelSpec) -> float:
    width = 2 * model.key_width / spec.tensor_parallel
    return model.num_layers * width * spec.element_bytes


def _held(model: ModelSpec, spec: ParallelSpec) -> float:
    """Bytes of a prompt's token while a block runs without gradients: stream and feed-forward."""
    inside = (1 + model.gated_ffn) * model.ffn_width / spec.tensor_parallel
    return (2 * model.hidden_size + inside) * spec.element_bytes


def _check(model: object, hardware: object, **counts: int) -> None:
    if not isinstance(model, ModelSpec):
        raise argument_error(WHERE, "model", model, "must be a ModelSpec")
    if not isinstance(hardware, HardwareSpec):
        rule = "must be a HardwareSpec, or the name of hardware"
        raise argument_error(WHERE, "hardware", hardware, rule)
    for argument, value in counts.items():
        if type(value) is not int or value < 1:
            raise argument_error(WHERE, argument, value, "must be a whole number of at least 1")
    tokens, learned = counts["prompt_length"] + counts["new_tokens"] - 1, model.num_positions
    if learned and tokens > learned:
        rule = f"with the prompt that is {tokens} tokens, and the model has positions for {learned}"
        raise argument_error(WHERE, "new_tokens", counts["new_tokens"], rule)
