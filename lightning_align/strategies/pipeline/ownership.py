"""Whose parameter is whose: each rank keeps those of its stages, the others are on meta.

All ranks have all parameters, in the same order, so optimizers number them alike and a checkpoint
is put together by number. A parameter that several ranks need (tied embeddings, and what is in no
layer of the chain) is on each of them; its gradients are summed once the accumulation window
closes, and it counts once in a norm. Each gets the part that its stages make of it: before the
chain on the first stage, after it on the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_align.strategies.pipeline.absent import AbsentParameter
from lightning_align.strategies.pipeline.chain import Chain


class Ownership:
    """The parameters of a module, by the ranks that need them.

    Args:
        chain: The module as a chain; its modules must still share what is tied.
        stretches: ``(begin, end)`` of each stage's layers.
        group: The ranks of the pipeline; stage s is on rank s modulo their number.

    Attributes:
        module: The module.
        ranks: name -> ranks (in the group) that need the parameter or buffer.
    """

    def __init__(
        self,
        chain: Chain,
        stretches: Sequence[tuple[int, int]],
        group: distributed.ProcessGroup,
    ) -> None:
        self.group = group
        self.rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        self.module = module = chain.module
        needed: dict[Tensor, set[int]] = {}
        for index, stretch in enumerate(stretches):
            for part in chain.owned(*stretch):
                for tensor in [*part.parameters(), *part.buffers()]:
                    needed.setdefault(tensor, set()).add(index % size)
        everywhere, last = set(range(size)), {(len(stretches) - 1) % size}
        # A buffer outside the chain is on all ranks; only the last stage runs steps to their end.
        ranks = {name: needed.get(p, everywhere) for name, p in module.named_parameters()}
        together = sorted({tuple(sorted(several)) for several in ranks.values()})
        ranks |= {name: needed.get(b, last) for name, b in module.named_buffers()}
        self.ranks = {name: sorted(several) for name, several in ranks.items()}
        self._groups = {
            several: distributed.new_group([distributed.get_global_rank(group, r) for r in several])
            for several in together
            if len(several) > 1
        }
        self._first_names = _first_names(module)

    def name_of(self, key: str) -> str:
        """The first name of what ``key`` of a state dict names; tied parameters have several."""
        return self._first_names.get(key, key)

    def names_of(self, name: str) -> list[str]:
        """All names of what ``name`` is the first of."""
        return [other for other, first in self._first_names.items() if first == name]

    def is_here(self, name: str) -> bool:
        """Whether this rank needs a parameter."""
        return self.rank in self.ranks[name]

    def leave_others_on_meta(self) -> None:
        """Free the memory of what belongs to other ranks; what is tied stays tied."""
        here = {p for name, p in self.module.named_parameters() if self.is_here(name)}
        on_meta: dict[nn.Parameter, nn.Parameter] = {}
        for part in self.module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter in here:
                    continue
                if parameter not in on_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    on_meta[parameter] = AbsentParameter(empty, parameter.requires_grad)
                setattr(part, name, on_meta[parameter])

    def fill(self, read: Callable[[list[str]], Tensor] | None) -> dict[str, nn.Parameter]:
        """Give memory to what is here and has none yet.

        Args:
            read: Reads a parameter by its names; None leaves the values open.

        Returns:
            What was filled, by its first name.
        """
        filled: dict[nn.Parameter, nn.Parameter] = {}
        by_name: dict[str, nn.Parameter] = {}
        for prefix, part in self.module.named_modules():
            for name, empty in list(part.named_parameters(recurse=False)):
                key = self.name_of(f"{prefix}.{name}" if prefix else name)
                if not empty.is_meta or not self.is_here(key):
                    continue
                if empty not in filled:
                    value = torch.empty_like(empty, device="cpu")
                    if read is not None:
                        value.copy_(read(self.names_of(key)))
                    filled[empty] = nn.Parameter(value, empty.requires_grad)
                    by_name[key] = filled[empty]
                setattr(part, name, filled[empty])
        return by_name

    @torch.no_grad()
    def agree_on_shared(self) -> None:
        """Start parameters that several ranks hold from one value."""
        for parameter, group in self._shared():
            distributed.broadcast(parameter, distributed.get_global_rank(group, 0), group=group)

    @torch.no_grad()
    def sum_shared_gradients(self) -> None:
        """Add up the gradients of parameters that several ranks hold."""
        shared = [(p, group) for p, group in self._shared() if p.requires_grad]
        for group in dict.fromkeys(group for _, group in shared):
            parameters = [p for p, of in shared if of is group]
            # A weight that one of its stages has not used there: it has no gradient to add there,
            # and the others would wait.
            has_one = torch.tensor([p.grad is not None for p in parameters]).int()
            has_one = has_one.to(parameters[0].device)
            distributed.all_reduce(has_one, distributed.ReduceOp.MAX, group=group)
            for parameter, is_used in zip(parameters, has_one.tolist(), strict=True):
                if not is_used:  # as without a pipeline: an optimizer leaves it alone
                    continue
                if parameter.grad is None:  # another rank has one
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad, group=group)

    def _shared(self) -> list[tuple[nn.Parameter, distributed.ProcessGroup]]:
        return [
            (parameter, self._groups[tuple(self.ranks[name])])
            for name, parameter in self.module.named_parameters()
            if len(self.ranks[name]) > 1 and self.is_here(name)
        ]

    def total_norm(self, parameters: Iterable[Tensor] | None = None) -> Tensor:
        """Norm of the gradients of all stages; collective.

        Args:
            parameters: Those that count, on this rank; None means all.
        """
        # What several ranks hold has the same gradient on each, and counts on the first.
        named = self.module.named_parameters()
        counted = {parameter for name, parameter in named if self.ranks[name][0] == self.rank}
        asked = list(self.module.parameters() if parameters is None else parameters)
        gradients = [p.grad for p in asked if p.grad is not None and p in counted]
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        # Norms of parts add up as squares; in double precision, as those of fp16 overflow.
        squared = norm.to(self.module.device, torch.float64) ** 2
        distributed.all_reduce(squared, group=self.group)
        return squared.sqrt().float()

    def clip_by_norm(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """What ``clip_grad_norm_`` does, with the norm over all stages."""
        here = [p for p in parameters if not p.is_meta and p.grad is not None]
        norm = self.total_norm(here)
        nn.utils.clip_grads_with_norm_(here, max_norm, norm)


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first one."""
    first: dict[Tensor, str] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(tensor, name) for name, tensor in named}


def move_here(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)`` for what is not on meta."""
    move: Any = module._apply
    move(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
