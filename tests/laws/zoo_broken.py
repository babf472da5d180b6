"""Members that break the laws of the zoo on purpose."""

from itertools import count
from typing import Any

from torch import Tensor

from tests.laws.zoo import Regression, Row

STEPS = count(1)


class Forgetful(Regression):
    """Weighs its loss by a count outside of it, which no checkpoint holds."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + 1 / next(STEPS))


class Late(Regression):
    """Notices after two batches what it cannot train."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ValueError("too late")
        return super().training_step(batch, batch_idx)


class ByMicrobatch(Regression):
    """Weighs its loss, once in a run, by the number of rows that it is shown."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (len(batch[0]) if batch_idx == 4 else 1)


FORGETFUL = Row("forgetful", Forgetful)
LATE = Row("late", Late)
BY_MICROBATCH = Row("by micro-batch", ByMicrobatch)
