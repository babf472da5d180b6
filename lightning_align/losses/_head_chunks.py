"""The head on one chunk of rows at a time: logits forward, gradients backward, summed in fp32.

PyTorch offers the head and the loss as separate operations, so logits of all rows live at once,
three times over (logits, log-softmax, gradient). Here both losses of this room work on a buffer of
a few rows that is reused, in place wherever the arithmetic allows it.

Shapes: N rows, R rows of one chunk, D hidden size, V vocabulary (``logits_RV``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.layers import Head

# One buffer of logits. On a CPU it should stay in the last-level cache, and below the 32 MiB from
# which glibc maps (and zeroes) fresh pages at every allocation; benchmarks/chunked_loss.py has the
# times. An accelerator needs taller matrices to be busy.
_CPU_CHUNK_BYTES = 24 * 2**20
_ACCELERATOR_CHUNK_BYTES = 256 * 2**20


class HeadArithmetic(NamedTuple):
    """What a head does besides the product, and in which precision it is done here.

    Attributes:
        logit_scale: Factor on the logits.
        softcap: Bound of the tanh on the logits, or None.
        operand_dtype: What goes into the matrix products.
        dtype: What comes out of them, and everything after: fp32, or fp64 for fp64 models.
    """

    logit_scale: float
    softcap: float | None
    operand_dtype: torch.dtype
    dtype: torch.dtype


def head_arithmetic(hidden: Tensor, head: Head) -> HeadArithmetic:
    """Choose precisions: logits are never rounded to 16 bits, which costs 0.4 nats a sequence."""
    operand = torch.promote_types(hidden.dtype, head.weight.dtype)
    dtype = torch.promote_types(operand, torch.float32)
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not on meta
        operand = torch.get_autocast_dtype(device)
    if operand is not torch.bfloat16 or hidden.device.type != "cuda":
        # Only CUDA multiplies 16 bits into fp32 (a CPU would be some 500 times slower, too), and
        # fp16 would flush small probabilities to zero, for no loss scale reaches them here.
        operand = dtype
    return HeadArithmetic(head.logit_scale, head.softcap, operand, dtype)


def check_rows(where: str, hidden: Tensor, head: Head, ids: Tensor, ids_name: str) -> None:
    """Refuse hidden states and token ids that do not belong together.

    Raises:
        ValueError: If there is not one id per hidden state, or the width is not the head's.
    """
    if hidden.shape[:-1] != ids.shape:
        rule = f"must have one id for each hidden state, whose shape is {tuple(hidden.shape)}"
        raise argument_error(where, f"{ids_name}.shape", tuple(ids.shape), rule)
    if hidden.shape[-1] != head.weight.shape[1]:
        rule = f"the last dimension must be the width of the head, {head.weight.shape[1]}"
        raise argument_error(where, "hidden.shape", tuple(hidden.shape), rule)


def check_vocabulary(where: str, ids: Tensor, head: Head, ids_name: str, way_out: str) -> None:
    """Refuse token ids that the head has no logit for.

    Two numbers are read back from the device. Callers have just read back how many rows they keep,
    so this waits for nothing more, and a message beats a device-side assert.

    Raises:
        ValueError: If an id is negative or not below the size of the vocabulary.
    """
    if ids.numel() == 0 or ids.is_meta:
        return
    vocab_size = head.weight.shape[0]
    smallest, largest = torch.stack(ids.aminmax()).tolist()
    if smallest < 0 or largest >= vocab_size:
        offender = smallest if smallest < 0 else largest
        rule = f"must be in [0, {vocab_size}), the vocabulary of the head"
        raise argument_error(where, ids_name, offender, rule, way_out)


def rows_per_chunk(
    where: str, num_rows: int, head: Head, chunk_size: int | None, dtype: torch.dtype
) -> int:
    """Rows of one chunk: as asked for, or even parts whose logits fit the buffer.

    Raises:
        ValueError: If ``chunk_size`` is below 1.
    """
    if chunk_size is not None:
        if chunk_size < 1:
            raise argument_error(where, "chunk_size", chunk_size, "must be at least 1 row")
        return max(1, min(chunk_size, num_rows))
    on_cpu = head.weight.device.type == "cpu"
    budget = _CPU_CHUNK_BYTES if on_cpu else _ACCELERATOR_CHUNK_BYTES
    most_rows = max(1, budget // (head.weight.shape[0] * dtype.itemsize))
    num_chunks = max(1, -(-num_rows // most_rows))
    return max(1, -(-num_rows // num_chunks))


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk_rows`` that cover ``num_rows``."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


class ChunkedHead:
    """A head over some hidden states: logits of a few rows at a time, and their gradients summed.

    Rows are a slice or a tensor of indices, no more than ``chunk_rows`` of them.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        arithmetic: HeadArithmetic,
        chunk_rows: int,
    ) -> None:
        self.hidden_ND = hidden_ND
        self.weight_VD = weight_VD.to(arithmetic.operand_dtype)
        self.bias_V = bias_V
        self.arithmetic = arithmetic
        self.chunk_rows = chunk_rows
        self._buffer_RV: Tensor | None = None  # backward from kept probabilities needs none
        self.gradients: list[Tensor | None] = [None, None, None]

    def new_empty(self, *shape: int) -> Tensor:
        """Memory on the device of the head, in the dtype of its logits."""
        return self.weight_VD.new_empty(shape, dtype=self.arithmetic.dtype)

    def logits(self, rows: Tensor | slice) -> Tensor:
        """Logits of ``rows``, (R, V), in the buffer that the next call overwrites."""
        hidden_RD = self.hidden_ND[rows].to(self.weight_VD.dtype)
        if self._buffer_RV is None:
            self._buffer_RV = self.new_empty(self.chunk_rows, len(self.weight_VD))
        logits_RV = self._buffer_RV[: len(hidden_RD)]
        _matmul(hidden_RD, self.weight_VD.t(), self.arithmetic.dtype, out=logits_RV)
        if self.bias_V is not None:
            logits_RV.add_(self.bias_V)
        if self.arithmetic.logit_scale != 1.0:
            logits_RV.mul_(self.arithmetic.logit_scale)
        softcap = self.arithmetic.softcap
        if softcap is not None:
            logits_RV.div_(softcap).tanh_().mul_(softcap)
        return logits_RV

    def want_gradients(self, wanted: Sequence[bool]) -> None:
        """Start the sums of ``add_gradients`` at zero, for hidden states, weight, bias."""
        vocab_size = len(self.weight_VD)
        shapes = (self.hidden_ND.shape, self.weight_VD.shape, (vocab_size,))
        self.gradients = [
            self.new_empty(*shape).zero_() if one_wanted else None
            for shape, one_wanted in zip(shapes, wanted, strict=True)
        ]

    def add_gradients(self, rows: Tensor | slice, dlogits_RV: Tensor) -> None:
        """Go on from the gradient of the logits (before scale and softcap) of ``rows``."""
        hidden_grad_ND, weight_grad_VD, bias_grad_V = self.gradients
        if bias_grad_V is not None:
            bias_grad_V.add_(dlogits_RV.sum(0))
        dtype, operand_dtype = self.arithmetic.dtype, self.weight_VD.dtype
        dlogits_RV = dlogits_RV.to(operand_dtype)
        if hidden_grad_ND is not None:
            hidden_grad_ND[rows] = _matmul(dlogits_RV, self.weight_VD, dtype)
        if weight_grad_VD is not None:
            hidden_RD = self.hidden_ND[rows].to(operand_dtype)
            if operand_dtype == dtype:
                weight_grad_VD.addmm_(dlogits_RV.t(), hidden_RD)
            else:
                weight_grad_VD.add_(_matmul(dlogits_RV.t(), hidden_RD, dtype))


def softmax_(logits_RV: Tensor, out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row into ``out_RV``, which may be ``logits_RV``.

    Returns:
        The largest logit of each row and log(sum(exp(logits - largest))), each (R, 1). Their sum
        is the log-sum-exp; kept apart they lose nothing when the largest logit is large.
    """
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    torch.softmax(logits_RV, -1, out=out_RV)
    # The largest logit has the probability 1 / sum(exp(logits - largest)): the sum that softmax
    # kept to itself comes back without a second exponential.
    log_sum_R1 = out_RV.amax(-1, keepdim=True).log_().neg_()
    return largest_R1, log_sum_R1


def softcap_slope(logits_RV: Tensor, softcap: float) -> Tensor:
    """Derivative of ``c tanh(x / c)`` from its value: 1 - (value / c)^2."""
    return logits_RV.square().mul_(-1 / softcap**2).add_(1)


def refuse_second_derivative(where: str) -> None:
    """Say so, instead of giving a gradient that is silently a constant.

    Raises:
        RuntimeError: If backward runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{where}: its gradient cannot be differentiated again, so create_graph must be False. "
            "For second derivatives use head.logits(hidden) and torch.nn.functional.cross_entropy."
        )


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Matrix product with a result in ``dtype``, even if the operands have 16 bits."""
    device = left.device.type
    # It would choose other precisions; on meta there is none.
    is_there = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if is_there else nullcontext():
        if left.dtype == dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=dtype, out=out)
