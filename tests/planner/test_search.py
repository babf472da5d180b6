"""Candidates: all of them possible, each once, with what the user chose."""

from collections import Counter
from dataclasses import replace

from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Planner
from lightning_align.planner.search import TOLD, candidates, ranked

HARDWARE = HardwareSpec.from_name("8xh100-sxm")
GPT = ModelSpec(8, 1024, 16, vocab_size=32000, seq_len=512)


def test_candidates_are_possible_and_different() -> None:
    base = ParallelSpec(devices=16, global_batch_size=64, optimizer="muon", precision="bf16-true")
    found = list(candidates(GPT, base, HARDWARE))
    assert len(set(found)) == len(found) > 50
    for each in found:
        each.check_model(GPT)
        assert each.devices == 16
        assert each.batch_size == 64
        assert (each.optimizer, each.precision) == ("muon", "bf16-true")
        assert each.tensor_parallel <= HARDWARE.devices_per_node
    assert {each.pipeline_parallel for each in found} == {1, 2, 4, 8}
    assert {each.schedule for each in found} == {"1F1B", "Interleaved1F1B"}


def test_impossible_splits_are_counted_by_what_forbids_them() -> None:
    refused: Counter[str] = Counter()
    grouped = replace(GPT, num_kv_heads=2)
    base = ParallelSpec(devices=8, global_batch_size=24)
    found = list(candidates(grouped, base, HARDWARE, refused))
    assert {each.tensor_parallel for each in found} == {1, 2}
    assert refused["tensor_parallel=4 must divide the model's num_kv_heads=2"] > 0
    rule = "must be a multiple of micro_batch_size * data_parallel"
    assert refused[f"global_batch_size=24 {rule}"] > 0


def test_without_drives_nothing_lies_on_them() -> None:
    bare = HardwareSpec.from_name("h100-sxm", nvme_read_bandwidth=0)
    found = candidates(GPT, ParallelSpec(), bare)
    assert not any("nvme" in (each.offload_param, each.offload_optimizer) for each in found)


def test_batches_that_no_split_divides_have_no_candidates() -> None:
    base = ParallelSpec(devices=1, global_batch_size=7)
    found = list(candidates(GPT, base, HARDWARE))
    assert {each.micro_batch_size for each in found} == {1}


def test_a_stage_of_zero_that_gains_less_than_can_be_told_is_left_out() -> None:
    """It divides the update, which is a hundredth of the step here."""
    planner, long = Planner(HARDWARE), replace(GPT, seq_len=2048)
    base = ParallelSpec(devices=8, global_batch_size=512)
    plain, divided = (
        planner.predict(long, replace(base, micro_batch_size=64, zero_stage=stage))
        for stage in (0, 1)
    )
    assert plain.step_time / TOLD < divided.step_time < plain.step_time
    told = [plan.parallel for plan in ranked(planner, long, base)]
    assert plain.parallel in told
    assert divided.parallel not in told


def test_tiers_that_gain_nothing_are_left_out() -> None:
    """Of splits that take the same time the one that keeps most on the device is named."""
    plans = ranked(Planner(HARDWARE), GPT, ParallelSpec(devices=8, global_batch_size=8))
    assert all(plan.fits for plan in plans)
    assert plans[0].parallel.offload_param == "none"
    told = [(plan.parallel.micro_batch_size, f"{plan.step_time:.3g}") for plan in plans]
    splits = [
        (p.parallel.tensor_parallel, p.parallel.pipeline_parallel, p.parallel.schedule)
        for p in plans
    ]
    recomputed = [plan.parallel.activation_checkpointing for plan in plans]
    rows = list(zip(told, splits, recomputed, strict=True))
    assert len(set(rows)) == len(rows)


def fastest_pipelines(inter_bandwidth: float) -> dict[str, float]:
    """Seconds by schedule, the fastest first, of eight nodes of one device."""
    slow = HardwareSpec.from_name("8xh100-sxm", devices_per_node=1, inter_bandwidth=inter_bandwidth)
    plans = ranked(Planner(slow), GPT, ParallelSpec(devices=8, global_batch_size=16))
    found: dict[str, float] = {}
    for plan in plans:
        if plan.parallel.pipeline_parallel > 1:
            found.setdefault(plan.parallel.schedule, plan.step_time)
    return found


def test_pipelines_without_bubbles_are_proposed() -> None:
    """Few micro-batches leave bubbles, and messages are quick."""
    found = fastest_pipelines(50e9)
    assert next(iter(found)) == "InterleavedZeroBubble"
    assert found["InterleavedZeroBubble"] * TOLD < found["1F1B"]


def test_gpipe_is_proposed_where_messages_are_slow() -> None:
    """1F1B waits for one in each turn, GPipe for those of the first and last micro-batch alone."""
    found = fastest_pipelines(2e9)
    assert next(iter(found)) == "GPipe"
    assert "InterleavedZeroBubble" not in found, "what is slower than 1F1B is not in the list"


def test_activations_wait_elsewhere_where_nothing_fits_else() -> None:
    long = replace(GPT, seq_len=8192)
    base = ParallelSpec(precision="bf16-true")
    planner = Planner("h100-sxm")
    assert all(plan.parallel.offload_activations == "none" for plan in ranked(planner, long, base))
    nearest = min(
        ranked(planner.limited_to("1MB"), long, base), key=lambda plan: plan.missing_bytes
    )
    assert nearest.parallel.offload_activations == "cpu"
    enough = nearest.memory_per_device / 0.93
    plan = planner.recommend(long, memory_limit=enough, base=base)[0]
    assert plan.parallel.offload_activations == "cpu"
    assert plan.fits
