"""A state without its tensors: what is pickled behind them, and put together again from a snapshot.

Dense tensors become leaves of the structure, and their bytes go into the host buffer. All others
(sparse, nested, quantized, on the meta device, of a subclass, with attributes of their own) are
taken apart as torch.save would, into what rebuilds them and dense tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._compat import torch_storage
from lightning_align.checkpointing.archive import PROTOCOL, Leaf, Reduced, TypedLeaf
from lightning_align.checkpointing.snapshot import HostBuffer
from lightning_align.checkpointing.structure import Copier, cannot_be_saved

_LEAVES: list[Leaf] = []  # they differ in their numbers only
_STORAGES = (torch.TypedStorage, torch.UntypedStorage)


def freeze(state: Any) -> tuple[Any, list[Tensor]]:
    """Copy a state with a leaf in the place of each dense tensor, and list those tensors.

    Args:
        state: Nested dicts, lists and tuples.

    Raises:
        ValueError: If something in it can be neither copied nor saved.
    """
    frozen = _Frozen(state)
    structure, tensors = frozen.copier.copy(state), frozen.tensors
    vars(frozen).clear()  # or it and its copier would hold the state until they are collected
    return structure, tensors


class _Frozen:
    """The tensors of a state as they are found."""

    def __init__(self, state: Any) -> None:
        self.tensors: list[Tensor] = []
        self._state = state
        self._apart: list[Any] = []  # kept, as objects are told apart by their addresses
        take = self._take
        self.copier = Copier(
            {Tensor: take, nn.Parameter: take},
            {Tensor: self._take_apart, **dict.fromkeys(_STORAGES, _Clones())},
        )

    def _take(self, tensor: Tensor) -> Any:
        plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
        if not plain or tensor.is_meta or tensor.__dict__:
            return self._take_apart(tensor)
        self.tensors.append(tensor)
        if len(self.tensors) > len(_LEAVES):
            _LEAVES.append(Leaf(len(_LEAVES)))
        return _LEAVES[len(self.tensors) - 1]

    def _take_apart(self, tensor: Any) -> Any:
        try:
            reduced = tensor.__reduce_ex__(PROTOCOL)
        except Exception as error:
            raise cannot_be_saved(tensor, self._state, error) from error
        self._apart.append(reduced)
        alias = torch_storage.plain_alias(tensor) if torch_storage.rebuilds_dense(reduced) else None
        if alias is None:
            return Reduced(tuple([self.copier.walk(part) for part in reduced]))
        _, (_, kind, _, attributes) = reduced
        return TypedLeaf(self._take(alias).index, kind, self.copier.walk(attributes))


class _Clones:
    """Copies of storages, one of each however many objects there are of it."""

    def __init__(self) -> None:
        self._clones: dict[Any, torch.UntypedStorage] = {}

    def __call__(self, storage: Any) -> Any:
        plain: Any = torch_storage.untyped(storage)
        key = plain.device, plain.data_ptr(), plain.nbytes()
        if key not in self._clones:
            self._clones[key] = plain.clone() if plain.device.type == "cpu" else plain.cpu()
        return torch_storage.retyped(self._clones[key], storage)


def thaw(structure: Any, buffer: HostBuffer) -> Any:
    """The state that was frozen, with tensors of its own.

    Args:
        structure: What :func:`freeze` returned.
        buffer: Where its tensors were copied to.
    """
    buffer.ready()
    storages: dict[int, torch.UntypedStorage] = {}

    def tensor(leaf: Leaf | TypedLeaf) -> Tensor:
        return buffer.tensor(leaf.index, storages)

    def typed(leaf: TypedLeaf) -> Any:
        return torch_storage.rebuild_typed(
            lambda: tensor(leaf), leaf.kind, (), copier.walk(leaf.attributes)
        )

    def rebuilt(reduced: Reduced) -> Any:
        function, arguments, *rest = copier.walk(reduced.value)
        value = function(*arguments)
        if rest and rest[0] is not None:
            value.__setstate__(rest[0])
        return value

    copier = Copier(
        {Leaf: tensor, TypedLeaf: typed, Reduced: rebuilt}, dict.fromkeys(_STORAGES, _Clones())
    )
    state = copier.copy(structure)
    storages.clear()  # held by functions that hold each other
    return state
