"""What a strategy whose blocks are on disk saves and loads, and shows of whole values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.offload.engine import OffloadEngine
from lightning_align.offload.record import FILE
from lightning_align.strategies.zero_infinity.blocks import WHERE
from lightning_align.strategies.zero_infinity.commits import load_payload

_CLASS = "class"  # key of an optimizer's state in a commit record


class BlockCheckpoints(ParallelStrategy):
    """Checkpoints of blocks on disk, for the strategy that puts them there."""

    _engine: OffloadEngine | None = None
    _record: dict[str, Any] | None = None  # what is resumed from, if it is a commit
    _is_committing = False

    # Whole values

    @contextmanager
    def gathered(
        self, parameters: Collection[str | nn.Parameter] | None = None, *, modify: bool = False
    ) -> Iterator[None]:
        """Parameters in memory for a while, to be read or edited.

        Args:
            parameters: They or their names; None means all.
            modify: Whether what was edited is stored.

        Raises:
            ValueError: If nothing is stored.
        """
        if self._engine is None:
            rule = "no model is stored"
            raise argument_error(f"{WHERE}.gathered", "parameters", "...", rule, "Call fit first")
        with self._engine.whole.gathered(parameters, modify=modify):
            yield

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state; in a commit, names and shapes in the place of parameters."""
        module = self.lightning_module
        assert module is not None
        if self._engine is None:
            return super().lightning_module_state_dict()
        copies = {} if self._is_committing else self._engine.whole.values()
        return {
            name: _stored(value, copies) if isinstance(value, nn.Parameter) else value
            for name, value in module.state_dict(keep_vars=True).items()
        }

    def whole_state_dict(self) -> dict[str, Any]:
        """The module's state with the values of all blocks, in memory."""
        return self.lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self._engine is not None
        if self._is_committing:  # what is large is in the blocks' files
            state = getattr(optimizer, "_optimizer", optimizer).state_dict()
            return {**state, _CLASS: type(self.optimizers[0]).__name__}
        return self._engine.updates.state()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(checkpoint_path)
        if path.name == FILE:
            self._record = load_payload(path.parent, weights_only=bool(weights_only))
            return self._record
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if self._record is None:
            context: Any = nullcontext() if self._engine is None else self.gathered(modify=True)
            with context:
                super().load_model_state_dict(checkpoint, strict)
            return
        state = checkpoint["state_dict"]
        stands_in = {name for name, value in state.items() if _is_outline(value)}
        module.load_state_dict({n: v for n, v in state.items() if n not in stands_in}, strict=False)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._engine is not None
        optimizer, state = self.optimizers[0], checkpoint["optimizer_states"][0]
        written = state.get(_CLASS, type(optimizer).__name__)
        if written != type(optimizer).__name__:
            rule = f"the committed step is of {written}"
            way_out = "Go on with that, or begin anew with overwrite=True"
            raise argument_error(WHERE, "optimizer", type(optimizer).__name__, rule, way_out)
        optimizer.load_state_dict({key: value for key, value in state.items() if key != _CLASS})
        if self._record is None:
            self._engine.updates.put_state()

    def commit(self, trainer: pl.Trainer, dump: Callable[[], bytes]) -> None:
        """Make the present step the one that a kill leaves."""
        assert self._engine is not None
        self._is_committing = True
        try:
            payload = dump()
        finally:
            self._is_committing = False
        self._engine.store.commit(trainer.global_step, payload)


def _stored(parameter: nn.Parameter, copies: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """A parameter's value; without one, its shape and dtype on the meta device."""
    return copies[parameter] if copies else torch.empty_like(parameter, device="meta")


def _is_outline(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
