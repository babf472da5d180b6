"""Constants from measured steps: found again where the steps were made with them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec
from lightning_align.planner.calibration import fitted
from lightning_align.planner.efficiencies import PRIORS, Efficiencies
from lightning_align.planner.step_prediction import predict_step

HARDWARE = HardwareSpec.from_name("8xa100-sxm-80gb")
ROWS = [
    (
        ModelSpec(layers, width, 16, vocab_size=32000, seq_len=512),
        ParallelSpec(devices=8, tensor_parallel=t, micro_batch_size=micro),
    )
    for layers, width, t, micro in [
        (8, 512, 1, 1),
        (8, 2048, 1, 8),
        (16, 2048, 2, 4),
        (8, 4096, 4, 8),
        (12, 1024, 8, 2),
        (24, 1024, 1, 16),
    ]
]


def predict(constants: Efficiencies) -> Sequence[float]:
    return [predict_step(*row, HARDWARE, constants).seconds for row in ROWS]


def test_steps_made_with_other_constants_are_predicted_again() -> None:
    truth = replace(Efficiencies(), matmul=0.6, memory=0.9, launch_s=5e-5, link=0.5)
    seconds = predict(truth)
    found = fitted(predict, seconds, Efficiencies())
    assert max(map(abs, found.errors)) < 0.04
    assert found.constants.matmul == pytest.approx(0.6, rel=0.1)
    assert found.directions >= 2


def test_what_one_row_got_wrong_moves_little() -> None:
    seconds = np.array(predict(Efficiencies()))
    seconds[2] *= 3
    found = fitted(predict, seconds.tolist(), Efficiencies())
    assert max(abs(error) for row, error in enumerate(found.errors) if row != 2) < 0.1


def test_no_constant_leaves_its_bounds() -> None:
    """Steps a hundred times faster than any such device could make them."""
    found = fitted(predict, [seconds / 100 for seconds in predict(Efficiencies())], Efficiencies())
    for name, prior in PRIORS.items():
        value = getattr(found.constants, name)
        assert prior.low * (1 - 1e-9) <= value <= prior.high * (1 + 1e-9)
