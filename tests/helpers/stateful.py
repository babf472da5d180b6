"""A DataLoader with a state, which does as torchdata's StatefulDataLoader without workers does."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def has_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


class StatefulLoader(DataLoader[Any]):
    """What has a state is asked for it; else what was yielded is passed over."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.__dict__.update(yielded=0, loaded=None)

    @property
    def part(self) -> Any:
        """What decides what comes next."""
        return self.dataset if isinstance(self.dataset, IterableDataset) else self.sampler

    def __iter__(self) -> Iterator[Any]:
        state, self.__dict__["loaded"] = self.loaded, None
        self.__dict__["yielded"] = state["yielded"] if state else 0
        if state and has_state(self.part):
            self.part.load_state_dict(state["part"])
            iterator = super().__iter__()
        else:
            iterator = islice(super().__iter__(), self.yielded, None)
        return self.counted(iterator)

    def counted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self.__dict__["yielded"] += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        part = self.part.state_dict() if has_state(self.part) else None
        return {"yielded": self.yielded, "part": part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__["loaded"] = state
