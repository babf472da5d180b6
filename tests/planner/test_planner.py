"""Plans: what fits, what does not and why; calibration and its bad input."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_align import find_layers
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Planner, analyze_step
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.planner import USABLE
from tests.helpers.step_models import BATCH, TOKENS, gpt, llama, loss_of

GPT = ModelSpec(8, 1024, 16, vocab_size=32000, seq_len=512)
LARGE = ModelSpec(80, 8192, 64, vocab_size=32000, seq_len=2048)
HARDWARE = "8xa100-sxm-80gb"
EIGHT = ParallelSpec(devices=8, micro_batch_size=4)


def test_a_plan_adds_up_and_is_plain_data() -> None:
    plan = Planner(HARDWARE).predict(GPT, EIGHT)
    assert plan.fits
    assert plan.missing_bytes == 0
    assert sum(plan.breakdown.values()) == pytest.approx(plan.step_time)
    assert sum(plan.memory_breakdown.values()) == pytest.approx(plan.memory_per_device)
    assert plan.interval[0] < plan.step_time < plan.interval[1]
    assert plan.tokens_per_second == pytest.approx(32 * 512 / plan.step_time)
    assert 0 < plan.mfu < 1
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["parallel"] == {"devices": 8, "micro_batch_size": 4}
    assert found["bound"] == max(plan.breakdown, key=plan.breakdown.__getitem__)


def test_pairs_are_two_rows_of_tokens() -> None:
    planner = Planner(HARDWARE)
    spec = ParallelSpec(objective="dpo")
    plan = planner.predict(GPT, spec)
    assert plan.tokens_per_second == pytest.approx(2 * 512 / plan.step_time)


@pytest.mark.parametrize("build", [pytest.param(gpt, marks=pytest.mark.slow), llama])
def test_model_flops_are_those_of_the_analysed_step(build: Any) -> None:
    """Also where blocks are frozen: the first one trains, so that backward goes through all."""
    with torch.device("meta"):
        model = build()
    spec = ModelSpec.from_module(model, seq_len=TOKENS)
    planner, split = Planner(HARDWARE), ParallelSpec(micro_batch_size=BATCH)
    plain = analyze_step(model, loss_of(model)).model_flops
    assert planner.predict(spec, split).model_flops == plain
    twice = replace(split, global_batch_size=2 * BATCH, activation_checkpointing="full")
    assert planner.predict(spec, twice).model_flops == 2 * plain
    for block in list(find_layers(model).blocks)[1:]:
        block.requires_grad_(False)
    frozen = analyze_step(model, loss_of(model)).model_flops
    assert planner.predict(spec, replace(split, lisa_layers=1)).model_flops == frozen < plain


def test_model_flops_have_the_reference_and_no_shared_tokens() -> None:
    planner = Planner(HARDWARE)

    def flops(**given: Any) -> float:
        return planner.predict(GPT, ParallelSpec(objective="dpo", **given)).model_flops

    alone = flops(reference="none")
    assert flops() == pytest.approx(alone * 4 / 3)  # a forward, of one and two of backward
    assert flops(reference="none", shared_prefix=0.5) == pytest.approx(alone * 3 / 4)


def test_what_is_missing_is_said() -> None:
    plan = Planner(HARDWARE).predict(LARGE, ParallelSpec())
    assert not plan.fits
    assert plan.missing_bytes > 5e11
    no_drive = HardwareSpec.from_name("a100", nvme_read_bandwidth=0)
    spec = ParallelSpec(zero_stage=3, offload_param="nvme", offload_optimizer="nvme")
    assert not Planner(no_drive).predict(LARGE, spec).fits
    small = HardwareSpec.from_name("a100", cpu_memory="16GB")
    spec = ParallelSpec(zero_stage=3, offload_param="cpu", offload_optimizer="cpu")
    assert not Planner(small).predict(LARGE, spec).fits


def test_the_memory_of_a_processor_is_the_hosts() -> None:
    """What is in host memory is in that of the device, of which there is one."""
    spec = ParallelSpec(zero_stage=3, offload_param="cpu", offload_optimizer="cpu")
    plan = Planner("xeon-8480").predict(GPT, spec)
    needed = (plan.memory_per_device + plan.host_bytes) / USABLE
    for name, factor, fits in (
        ("xeon-8480", 1.01, True),
        ("xeon-8480", 0.99, False),
        ("a100", 0.99, True),
    ):
        both = {"memory": factor * needed, "cpu_memory": factor * needed}
        found = Planner(HardwareSpec.from_name(name, **both)).predict(GPT, spec)
        assert found.fits == fits


def rows(planner: Planner, **constants: float) -> list[tuple[ModelSpec, ParallelSpec, float]]:
    other = Planner(HARDWARE, replace(Efficiencies(), **constants))
    specs = [
        (replace(GPT, hidden_size=width), replace(EIGHT, micro_batch_size=micro))
        for width, micro in [(512, 1), (1024, 4), (2048, 8), (4096, 8)]
    ]
    return [(*spec, other.predict(*spec).step_time) for spec in specs]


def test_calibration_moves_predictions_to_what_was_measured() -> None:
    planner = Planner(HARDWARE)
    measured = rows(planner, matmul=0.5, launch_s=6e-5)
    before = [planner.predict(m, p).step_time / s for m, p, s in measured]
    wide = planner.predict(GPT, EIGHT).interval
    assert planner.calibrate(measured) is planner
    after = [planner.predict(m, p).step_time / s for m, p, s in measured]
    assert max(abs(ratio - 1) for ratio in after) < 0.08 < max(abs(r - 1) for r in before)
    narrow = planner.predict(GPT, EIGHT).interval
    assert 1.2 < narrow[1] / narrow[0] < wide[1] / wide[0]  # four rows say little of others


def test_too_few_rows_leave_what_is_known_and_warn() -> None:
    planner = Planner(HARDWARE)
    known = planner.efficiencies
    measured = rows(planner, matmul=0.5)
    with pytest.warns(UserWarning, match="2 rows, and 3 different ones are needed"):
        planner.calibrate(measured[:2])
    with pytest.warns(UserWarning, match="3 different ones are needed"):
        planner.calibrate([measured[0]] * 5)
    assert planner.efficiencies == known


def test_rows_that_say_one_thing_only_warn() -> None:
    planner = Planner(HARDWARE)
    known = planner.efficiencies
    model = replace(LARGE, num_layers=2)
    same = [
        (model, ParallelSpec(micro_batch_size=8, global_batch_size=8 * many, precision="bf16-true"))
        for many in (64, 65, 66)
    ]
    measured = [(*spec, planner.predict(*spec).step_time) for spec in same]
    with pytest.warns(UserWarning, match="one thing only"):
        planner.calibrate(measured)
    assert planner.efficiencies == known


def test_rows_have_three_parts() -> None:
    with pytest.raises(ValueError, match=r"row 0 must be a ModelSpec, a ParallelSpec and"):
        Planner(HARDWARE).calibrate([(GPT, 0.5)])  # type: ignore[list-item]


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "1", None])
def test_times_must_be_positive(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"calibrate\(rows=.*row 0 must be a positive, finite"):
        Planner(HARDWARE).calibrate([(GPT, EIGHT, seconds)])


def test_rows_of_other_hardware() -> None:
    planner = Planner(HARDWARE)
    with pytest.raises(ValueError, match=r"row 0 took less than the .* peak allows"):
        planner.calibrate([(LARGE, EIGHT, 1e-3)])
    measured = rows(planner)
    measured[1] = (*measured[1][:2], 30 * measured[1][2])
    with pytest.warns(UserWarning, match="row 1 is predicted at .* other hardware"):
        planner.calibrate(measured)


def test_what_is_recommended_fits_and_is_the_fastest_of_it() -> None:
    planner = Planner(HARDWARE)
    base = ParallelSpec(devices=8, global_batch_size=16)
    plans = planner.recommend(GPT, top_k=3, base=base)
    assert len(plans) == 3
    assert all(plan.fits for plan in plans)
    times = [plan.step_time for plan in plans]
    assert times == pytest.approx(sorted(times), rel=0.01)
    assert plans[0].parallel.batch_size == 16
    tight = planner.recommend(GPT, top_k=1, base=base, memory_limit="4GB")[0]
    assert tight.memory_per_device < 4e9
    assert tight.hardware.memory == 4e9
    whole = planner.limited_to("79GB")
    assert whole._usable * whole.hw.memory == pytest.approx(USABLE * planner.hw.memory)
    assert tight.step_time >= 0.99 * plans[0].step_time


def test_nothing_fits_and_why() -> None:
    planner = Planner("rtx-4090")
    huge = replace(LARGE, hidden_size=16384, num_layers=400)
    with pytest.raises(ValueError, match="nothing fits 1 x 24 GB;") as caught:
        planner.recommend(huge)
    message = str(caught.value)
    assert "which lacks" in message
    assert "free it" in message


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"Planner\(hw=3\): must be a HardwareSpec"):
        Planner(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Did you mean"):
        Planner("h10")
    planner = Planner(HARDWARE)
    with pytest.raises(ValueError, match="top_k=0"):
        planner.recommend(GPT, top_k=0)
    with pytest.raises(ValueError, match="memory_limit='much'"):
        planner.recommend(GPT, memory_limit="much")
    with pytest.raises(ValueError, match="must be a ModelSpec"):
        planner.predict("gpt", EIGHT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a ParallelSpec"):
        planner.predict(GPT, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stages need a layer each"):
        planner.predict(GPT, ParallelSpec(devices=16, pipeline_parallel=16))
