"""What is said of plans: prices, words, changes, and the roofline of a block."""

from collections import Counter
from dataclasses import replace

import pytest

from lightning_align.cli.plan_report import price_of, report, roofline, split_of, what_if
from lightning_align.planner import ModelSpec, ParallelSpec, Planner

GPT = ModelSpec(8, 1024, 16, vocab_size=32000, seq_len=512)


def test_the_price_of_tokens_is_that_of_all_devices() -> None:
    planner = Planner("8xh100")
    plan = planner.predict(GPT, ParallelSpec(devices=8))
    assert price_of(plan, 1e9) == 0
    priced = replace(plan, hardware=replace(planner.hw, price_per_hour=3.0))
    hours = 1e9 / plan.tokens_per_second / 3600
    assert price_of(priced, 1e9) == pytest.approx(24 * hours)


def test_changes_that_are_impossible_say_so() -> None:
    planner = Planner("8xh100")
    odd = replace(GPT, seq_len=510)
    spec = ParallelSpec(devices=8, tensor_parallel=2, sequence_parallel=True)
    plan = planner.predict(odd, spec)
    told = {row[0]: row for row in what_if(planner, plan)[1:]}
    assert told["rows half as long"][3].startswith("impossible: must divide seq_len=255")
    assert told["twice the micro-batch"][1].startswith("+")
    assert told["full recomputation"][1].startswith("-")


def test_splits_in_words() -> None:
    spec = ParallelSpec(
        devices=8, pipeline_parallel=4, schedule="Interleaved1F1B", global_batch_size=8
    )
    assert split_of(spec) == "dp 2, pp 4 x 2, micro-batch 1"
    away = ParallelSpec(zero_stage=3, offload_param="nvme", activation_checkpointing="full")
    told = "dp 1, micro-batch 1, ZeRO 3, parameters on nvme, full recomputation"
    assert split_of(away) == told


def test_products_are_on_one_side_of_the_ridge_and_norms_on_the_other() -> None:
    big = replace(GPT, hidden_size=4096)
    plan = Planner("a100").predict(big, ParallelSpec(micro_batch_size=8))
    head, *rows = roofline(plan)
    assert head[2] == "ridge 153"  # 312 TFLOP/s over 2.039 TB/s
    sides = {name: side for name, _, side, _ in rows}
    assert sides["feed-forward in"] == "compute"
    assert all(float(flops) < 153 for name, flops, side, _ in rows if side == "memory")
    unfused = replace(GPT, hidden_size=512, attention="unfused", seq_len=4096)
    plan = Planner("a100").predict(unfused, ParallelSpec(micro_batch_size=8))
    assert {name: side for name, _, side, _ in roofline(plan)[1:]}["softmax"] == "memory"


def test_what_does_not_fit_is_told_with_what_is_missing() -> None:
    planner = Planner("a100")
    fits = planner.predict(GPT, ParallelSpec(micro_batch_size=1, activation_checkpointing="full"))
    large = planner.predict(replace(GPT, seq_len=65536), ParallelSpec(micro_batch_size=64))
    refused = Counter({"tensor_parallel=8 must divide the model's num_heads=4": 7})
    text = "\n".join(report(planner, [fits], [fits, large], refused, 3, None))
    assert "1 do not fit; nearest is dp 1, micro-batch 64 lacks" in text
    assert "others fit" not in text
    told = "7 are impossible: tensor_parallel=8 must divide the model's num_heads=4 (7)"
    assert told in text
