"""FLOPs of forward against DeepSpeed's profiler, which counts in torch's functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_align.planner import analyze_step
from tests.helpers.step_models import BATCH, TOKENS, gpt, llama, loss_of

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("build", [gpt, llama])
def test_forward_matches_deepspeeds_profiler(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs has norms and activations in the same sum, which are below a percent of it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # chosen at the first import
    pytest.importorskip("deepspeed")
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    model = build()
    ours = analyze_step(model, loss_of(model))
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.zeros(BATCH, TOKENS, dtype=torch.long))
    profiler.stop_profile()
    theirs = profiler.get_total_flops()
    profiler.end_profile()
    assert ours.forward_flops == pytest.approx(theirs, rel=0.01)
