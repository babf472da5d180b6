"""Several optimizers are refused with a way out that a strategy can go."""

import pytest

from lightning_align.strategies.one_optimizer import one_optimizer


def test_several_optimizers_are_told_from_other_failures() -> None:
    message = (
        r"Some\(optimizers='\.\.\.'\): the module must have one optimizer.* Put all parameters"
    )
    with pytest.raises(ValueError, match=message), one_optimizer("Some"):
        raise RuntimeError("Training with multiple optimizers is only supported with manual ...")
    with pytest.raises(RuntimeError, match="something else"), one_optimizer("Some"):
        raise RuntimeError("something else")
