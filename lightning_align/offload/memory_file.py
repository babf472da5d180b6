"""Values that lie in host memory, with the interface of a file.

Who reads them to look at them needs no copy: ``view`` is the memory itself. What lies behind the
values, an optimizer's state, may be in a real file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_align.host_block import HostBlock
from lightning_align.offload.files import DirectFile, Transfer
from lightning_align.offload.striped import StripedFile

_DONE = Transfer()


class MemoryFile:
    """Bytes in memory, and a file for what lies behind them.

    Args:
        nbytes: What lies in memory.
        behind: Where the rest is; None if there is none.
        memory: The values; None makes room for them.
        pinned: Whether to register that room with CUDA.
    """

    def __init__(
        self,
        nbytes: int,
        behind: DirectFile | StripedFile | None = None,
        memory: Tensor | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        if memory is None:
            block = HostBlock(nbytes, pinned=pinned)
            memory = torch.frombuffer(block.memory, dtype=torch.uint8)[:nbytes]
        self._memory: Tensor = memory
        self._behind = behind

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the values."""
        return len(self._memory)

    def view(self, offset: int, nbytes: int) -> Tensor:
        """The memory itself.

        Args:
            offset: Where in it.
            nbytes: How much.
        """
        assert offset + nbytes <= len(self._memory)
        return self._memory[offset : offset + nbytes]

    def read(self, memory: Tensor, offset: int) -> Transfer:
        """Copy the values to ``memory``, or begin to read what lies behind them."""
        if offset >= len(self._memory):
            assert self._behind is not None
            return self._behind.read(memory, offset - len(self._memory))
        memory.copy_(self.view(offset, len(memory)))
        return _DONE

    def write(self, memory: Tensor, offset: int) -> Transfer:
        """Copy ``memory`` to the values, or begin to write what lies behind them."""
        if offset >= len(self._memory):
            assert self._behind is not None
            return self._behind.write(memory, offset - len(self._memory))
        target = self.view(offset, len(memory))
        if target.data_ptr() != memory.data_ptr():
            target.copy_(memory)
        return _DONE

    def sync(self) -> Transfer:
        """Make durable what lies behind the values; they themselves never are."""
        return _DONE if self._behind is None else self._behind.sync()

    def allocate(self, nbytes: int) -> None:
        """Reserve room for what lies behind the values.

        Raises:
            OSError: If there is none.
        """
        if self._behind is not None:
            self._behind.allocate(nbytes - len(self._memory))

    @property
    def is_held(self) -> bool:
        """Whether what lies behind the values must not be written."""
        return self._behind is not None and self._behind.is_held

    def shown(self, offset: int, nbytes: int) -> Tensor:
        """The memory itself, or what lies behind it as ``DirectFile`` shows it."""
        if offset < len(self._memory) or self._behind is None:
            return self.view(offset, nbytes)
        return self._behind.shown(offset - len(self._memory), nbytes)

    def rename(self, name: str) -> None:
        """Let what lies behind the values take the place of what has a name in its folder."""
        if self._behind is not None:
            self._behind.rename(name)

    def let_go(self) -> None:
        """Give up the values, for good."""
        self._memory = self._memory[:0].clone()

    def close(self) -> None:
        """Close the file; who looks at the memory keeps it."""
        if self._behind is not None:
            self._behind.close()
