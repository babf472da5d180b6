"""Private APIs of torch for the rooms that never import Lightning, with a test each.

The twin of ``_compat.py``, which does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction
from typing_extensions import override


def torch_pipeline_rank(
    schedule: str, rank: int, pp: int, num_microbatches: int, num_stages_per_rank: int
) -> list[Any]:
    """The actions that torch's schedule class makes for one rank, without stages or processes.

    ``get_schedule_ops`` answers the same question, but it also plans the communication of all
    ranks, which takes a second for 32 of them and grows with the square.
    """
    maker = object.__new__(schedules.get_schedule_class(schedule))
    rounds = max(1, num_microbatches // pp)
    maker.__dict__.update(
        pp_group_size=pp,
        n_local_stages=num_stages_per_rank,
        num_stages=pp * num_stages_per_rank,
        number_of_rounds=rounds,
        microbatches_per_round=num_microbatches // rounds,
        _n_microbatches=num_microbatches,
    )
    actions = maker._calculate_single_rank_operations(rank)
    # An overlapped forward and backward is a pair of actions under one that has no number.
    return [
        part
        for action in actions
        if action is not None
        for part in (action.sub_actions or (action,))
    ]


class BeforeDraws(TorchDispatchMode):
    """Context in which a function is called with each tensor that is about to be drawn into.

    Args:
        call: Gets the tensor: a parameter, a part of one, or a temporary tensor.
    """

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(args[0], Tensor):
            self._call(args[0])
        return func(*args, **(kwargs or {}))


def intercept_calls(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Have ``module(...)`` call something else, hooks included; None undoes it.

    The attribute is where ``module.compile()`` puts what it makes. It is left out of copies.
    """
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``module(...)`` does where nothing is intercepted: its hooks and its forward."""
    call: Any = module._call_impl
    return call(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` made it, or calls of it."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def is_in_reentrant_checkpoint() -> bool:
    """Whether this is called by what ``checkpoint(..., use_reentrant=True)`` runs."""
    code = CheckpointFunction.forward.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def has_spectral_norm(module: nn.Module) -> bool:
    """Whether calls of a layer iterate towards the largest singular value of its weight."""
    parametrized: Any = getattr(module, "parametrizations", {})
    steps = [step for steps in parametrized.values() for step in steps]
    steps += module._forward_pre_hooks.values()
    return any(type(step).__name__.lstrip("_") == "SpectralNorm" for step in steps)


def storage_key(tensor: Tensor) -> int | None:
    """Equal for tensors that share memory, while both live; None for those without a storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


class LeanStage(PipelineStage):
    """torch's stage, with a receive buffer only while its micro-batch is in flight.

    torch allocates buffers for all micro-batches at once: memory that grows with their number even
    under 1F1B.

    Args:
        submodule: What the stage runs.
        stage_index: Place in the chain of stages, counted from 0.
        num_stages: Stages in all.
        device: Where it runs.
        around_backward: Makes the context for the backward of a micro-batch.
        **metadata: ``input_args``, ``output_args`` and ``group`` of torch's stage.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        around_backward: Callable[[int, int], AbstractContextManager[None]],
        **metadata: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **metadata)
        self.around_backward = around_backward

    def prepare_forward(self, num_microbatches: int) -> None:
        """Be ready for ``forward_one_chunk`` without a schedule; shapes must have been given."""
        self._stage_meta.inputs = self._user_meta.inputs
        self._stage_meta.outputs = self._user_meta.outputs
        self._setup_forward_recv_info(num_microbatches, False)
        self._setup_forward_send_info()

    def free_forward(self, chunk_id: int) -> None:
        """Forget a micro-batch that no backward will follow."""
        self.fwd_cache.pop(chunk_id, None)
        _free(self.args_recv_info[chunk_id])

    @override
    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    @override
    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    @override
    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.around_backward(self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _free(self.args_recv_info[bwd_chunk_id])
        _free(self.grad_recv_info.get(bwd_chunk_id, ()))

    @override
    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _free(infos)

    @override
    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _free(infos)

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if not info.is_root_arg and info.buffer is None and info.tensor_meta is not None:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)


def _free(infos: Iterable[Any]) -> None:
    for info in infos:
        info.buffer = None


def load_schedule_csv(
    path: str, stages: list[Any], num_microbatches: int, loss_fn: Callable[..., Any]
) -> Any:
    """Torch's runtime for the actions of a CSV file."""
    make: Any = schedules._PipelineScheduleRuntime
    schedule = make(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
    schedule._load_csv(path)
    return schedule


def default_store() -> Any:
    """The key-value store that the ranks of the default process group met in."""
    return torch.distributed.distributed_c10d._get_default_store()


@contextmanager
def one_group_of_gradients(device: torch.device) -> Iterator[None]:
    """Let torch's norm and clipping of gradients take all of them at once, wherever they are.

    They go by device and dtype otherwise, so that ranks which have the values of different
    gradients would take them in different orders.
    """
    by_device = vars(clip_grad)["_group_tensors_by_device_and_dtype"]

    def one_group(lists: list[list[Tensor]], *_: Any, **__: Any) -> Any:
        return {(device, None): (lists, [*range(len(lists[0]))])}

    vars(clip_grad)["_group_tensors_by_device_and_dtype"] = one_group
    try:
        yield
    finally:
        vars(clip_grad)["_group_tensors_by_device_and_dtype"] = by_device
