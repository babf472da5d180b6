"""Prefill and decoding: by hand, against real steps and real caches, and where the wall ends."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lightning_align.planner import (
    GenerationCost,
    HardwareSpec,
    ModelSpec,
    analyze_step,
    predict_generation,
)
from lightning_align.planner.efficiencies import IDEAL
from lightning_align.planner.few_rows import FewRows
from lightning_align.planner.op_flops import ATTENTION

# 3.35e12 B/s and 989.4e12 FLOP/s: a ridge of 295
H100 = HardwareSpec.from_name("h100-sxm")
LLAMA_8B = ModelSpec(
    *(32, 4096, 32, 8, 14336),
    vocab_size=128256,
    seq_len=8192,
    gated_ffn=True,
    bias=False,
    norm_bias=False,
    num_positions=0,
    tied_embeddings=False,
)
# A single block without a head to speak of, whose matrices are 8 x 1024^2 elements.
SQUARE = ModelSpec(1, 1024, 8, 8, 2048, vocab_size=1, seq_len=1, bias=False, norm_bias=False)


def cost(model: ModelSpec = LLAMA_8B, **given: Any) -> GenerationCost:
    return predict_generation(model, H100, **given)


def test_the_cache_by_hand() -> None:
    """Llama 3.1 8B: 2 x 32 blocks x 8 heads x 128 x 2 bytes are 128 KiB a token."""
    found = cost(prompt_length=8192, new_tokens=1)
    assert found.kv_bytes_per_token == 128 * 1024
    assert found.kv_cache_bytes == 2**30
    assert cost(replace(LLAMA_8B, num_kv_heads=32)).kv_bytes_per_token == 4 * 128 * 1024
    assert cost(precision="32-true").kv_bytes_per_token == 2 * 128 * 1024
    assert cost(tensor_parallel=4).kv_bytes_per_token == 32 * 1024
    assert found.weight_bytes == 2 * LLAMA_8B.parameters


def test_a_step_of_decoding_by_hand() -> None:
    """B rows of 1024 with a context of 101: products of 8 x 1024^2 weights and a head of one."""
    rows, h, context = 3, 1024, 101
    found = cost(SQUARE, batch_size=rows, prompt_length=100, new_tokens=2)
    weights = 8 * h * h + h
    assert found.decode.flops == 2 * rows * weights + 4 * rows * context * h
    elements = (
        weights
        + rows * (h + 3 * h + 2 * h + h + 2 * h + 2 * h + h + h + 1)  # what products read and write
        + rows * context * 2 * h  # the cache
        + rows * (2 * h + 4 * h)  # queries and what they found; keys and values that join
        + rows * (2 * 2 * h + 2 * 3 * h + 2 * 2 * h)  # norms, residuals, activation
        + rows * (3 * h + 2 * h)  # embedding, last norm
    )
    assert found.decode.bytes == 2 * elements


def test_the_mean_step_is_the_mean_of_all_steps() -> None:
    whole = cost(prompt_length=16, new_tokens=9)
    steps = [cost(prompt_length=16 + before, new_tokens=2).decode for before in range(8)]
    assert whole.decode.flops == pytest.approx(sum(step.flops for step in steps) / 8)
    assert whole.decode.bytes == pytest.approx(sum(step.bytes for step in steps) / 8)
    assert whole.seconds == pytest.approx(whole.prefill.seconds + sum(s.seconds for s in steps))
    assert cost(new_tokens=1).seconds == cost(new_tokens=1).prefill.seconds


def test_the_wall_of_the_lecture() -> None:
    """Of wide matrices in bf16 products leave the wall at a batch of peak / bandwidth.

    With activations, of which each row has its own, a little later: m n weights and m + n of a row
    meet at B = r / (1 - r (m + n) / (m n)), here 10 % later.
    """
    ridge = 989.4e12 / 3.35e12
    found = cost(prompt_length=1, new_tokens=2)
    assert found.products_compute_bound_batch == pytest.approx(ridge, rel=0.15)
    assert found.products_compute_bound_batch > ridge
    at = round(found.products_compute_bound_batch)
    below, above = (
        predict_generation(
            LLAMA_8B, H100, batch_size=b, prompt_length=1, new_tokens=2, efficiencies=IDEAL
        ).decode
        for b in (at // 2, 2 * at)
    )
    assert (below.bound, above.bound) == ("memory", "compute")
    fp32 = predict_generation(LLAMA_8B, H100, prompt_length=1, precision="32-true")
    assert fp32.products_compute_bound_batch == pytest.approx(2 * 66.9e12 / 3.35e12, rel=0.15)


def test_where_intensity_meets_the_ridge() -> None:
    short = cost(prompt_length=8, new_tokens=2)
    batch = round(short.compute_bound_batch)
    ridge = 989.4e12 / 3.35e12
    at = cost(prompt_length=8, new_tokens=2, batch_size=batch).decode
    assert at.intensity == pytest.approx(ridge, rel=0.01)


def test_a_long_context_never_leaves_the_wall_and_grouped_heads_help() -> None:
    """At 8192 tokens a row reads 1 GiB of cache for 16 + 4 GFLOP: 19 FLOP/B, whatever the batch."""
    long = cost(prompt_length=8192, new_tokens=2, batch_size=64)
    assert math.isinf(long.compute_bound_batch)
    assert math.isfinite(long.products_compute_bound_batch)
    crowd = cost(prompt_length=8192, new_tokens=2, batch_size=4096).decode
    assert crowd.intensity < 19
    assert crowd.bound == "memory"
    every_head = cost(replace(LLAMA_8B, num_kv_heads=32), prompt_length=8192, batch_size=64)
    assert long.tokens_per_second > 2.5 * every_head.tokens_per_second


def test_more_rows_cost_little_until_the_wall_ends() -> None:
    one, sixteen = (cost(prompt_length=1024, batch_size=b) for b in (1, 16))
    assert sixteen.decode.seconds < 1.2 * one.decode.seconds
    assert one.decode.by_bound["memory"] == pytest.approx(one.decode.bytes / (0.8 * 3.35e12))
    assert sixteen.prefill.seconds == pytest.approx(16 * one.prefill.seconds, rel=0.2)
    assert sixteen.prefill.bound == "compute"


def test_memory_and_the_largest_batch() -> None:
    found = cost(prompt_length=8192, new_tokens=1)
    a_row = found.kv_cache_bytes + found.held_bytes
    assert found.max_batch_size == math.floor((0.94 * 80e9 - found.weight_bytes) / a_row)
    assert cost(prompt_length=8192, new_tokens=1, batch_size=found.max_batch_size).fits
    assert not cost(prompt_length=8192, new_tokens=1, batch_size=found.max_batch_size + 1).fits
    large = replace(LLAMA_8B, num_layers=400)
    assert cost(large).max_batch_size == 0
    assert predict_generation(large, H100, tensor_parallel=8).max_batch_size > 0


def test_ranks_divide_what_is_read_and_send_messages() -> None:
    one, four = (cost(tensor_parallel=t, batch_size=8) for t in (1, 4))
    assert four.decode.flops == pytest.approx(one.decode.flops / 4)
    assert four.decode.by_bound["messages"] > 0
    assert one.decode.seconds / 4 < four.decode.seconds < one.decode.seconds


def test_eager_steps_are_launched_and_copy_the_cache() -> None:
    graph, eager = (cost(prompt_length=2048, batch_size=8, eager=e) for e in (False, True))
    assert eager.decode.bound == "overhead"
    more = eager.decode.bytes - graph.decode.bytes
    context = 2048 + 64
    assert more == pytest.approx(2 * 8 * context * graph.kv_bytes_per_token)


SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 211, "num_hidden_layers": 3}


@pytest.fixture(scope="module", params=[8, 2], ids=["MHA", "GQA"])
def llama(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=request.param)
    return LlamaForCausalLM(config).eval()


def test_against_a_real_model_and_its_cache(llama: LlamaForCausalLM) -> None:
    """Bytes of the cache and FLOPs are equal; fused prefill leaves out what the mask hides."""
    rows, prompt, steps = 2, 24, 3
    model = ModelSpec.from_config(llama.config, seq_len=prompt)
    ours = predict_generation(
        model,
        H100,
        batch_size=rows,
        new_tokens=steps + 1,
        precision="32-true",
        eager=True,
    )
    cache = DynamicCache(config=llama.config)
    ids = torch.zeros(rows, prompt, dtype=torch.long)

    def forward(tokens: torch.Tensor) -> Any:
        with torch.no_grad():
            reports.append(
                analyze_step(
                    llama,
                    lambda: llama(tokens, past_key_values=cache, logits_to_keep=1) and None,
                )
            )

    reports: list[Any] = []
    forward(ids)
    for _ in range(steps):
        forward(ids[:, :1])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert ours.kv_cache_bytes == held
    flops = [report.total_flops for report in reports]
    hidden = SIZES["num_hidden_layers"] * rows * 2 * prompt**2 * 64
    assert ours.prefill.flops == flops[0] - hidden
    assert ours.decode.flops == sum(flops[1:]) / steps
    step = reports[2]
    attended = sum(r.bytes for r in step.trace.records if r.kind == ATTENTION)
    queries = 3 * rows * 2 * 64 * 4
    by_hand = rows * (prompt + 2) * ours.kv_bytes_per_token + queries
    assert attended == pytest.approx(by_hand, rel=0.02)  # and a sum for each head
    assert ours.decode.bytes == pytest.approx(sum(r.bytes for r in reports[1:]) / steps, rel=0.1)


def test_operations_of_an_eager_block(llama: LlamaForCausalLM) -> None:
    """As many as ``EAGER_OPERATIONS`` says, with the kernels that are counted anyway."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        report = analyze_step(llama, lambda: llama(ids, past_key_values=cache) and None)
    block = report.block_names[1]
    views = sum(n for (_, scope), n in report.trace.views.items() if block in scope)
    real = report.modules[block].calls + views
    model = ModelSpec.from_config(llama.config, seq_len=1)
    known = predict_generation(
        replace(model, num_layers=1001),
        H100,
        new_tokens=2,
        eager=True,
        efficiencies=replace(IDEAL, kernel_s=1.0),
    )
    fewer = predict_generation(
        replace(model, num_layers=1),
        H100,
        new_tokens=2,
        eager=True,
        efficiencies=replace(IDEAL, kernel_s=1.0),
    )
    ours = (known.decode.seconds - fewer.decode.seconds) / 1000
    assert ours == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"prompt_length": 1.5}, "prompt_length=1.5.*whole number"),
        ({"new_tokens": -1}, "new_tokens=-1"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed'.*'32-true', 'bf16-true'"),
        ({"tensor_parallel": 3}, "tensor_parallel=3.*must divide"),
    ],
)
def test_bad_arguments(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cost(**given)


def test_learned_positions_must_suffice() -> None:
    gpt = ModelSpec(2, 64, 4, vocab_size=100, seq_len=32, num_positions=64)
    assert cost(gpt, new_tokens=33).kv_cache_bytes == 64 * 2 * 2 * 64 * 2
    with pytest.raises(ValueError, match=r"new_tokens=34\).*65 tokens, .* positions for 64"):
        cost(gpt, new_tokens=34)


def test_what_is_no_spec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hardware=3\): must be a HardwareSpec"):
        predict_generation(LLAMA_8B, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model='gpt2'\): must be a ModelSpec"):
        predict_generation("gpt2", H100, prompt_length=1)  # type: ignore[arg-type]


def test_hardware_by_name() -> None:
    assert predict_generation(LLAMA_8B, "h100").decode == cost().decode
    with pytest.raises(ValueError, match="Did you mean 'h100-sxm'"):
        predict_generation(LLAMA_8B, "h10")


def test_few_rows_reach_what_was_measured() -> None:
    """A machine on which a product of two rows takes four times as long, and attention twice."""
    few = FewRows(((1.0, 1.0), (2.0, 0.25), (256.0, 1.0)), attention=0.5, call_s=1.0)
    sheet = replace(H100, mem_bandwidth=1.0, peak_flops=1e30, fp32_flops=1e30)
    known = replace(sheet, few_rows=few, few_rows_half=few)

    def decode(hardware: HardwareSpec, batch_size: int, **given: Any) -> Any:
        more = {"prompt_length": 100, "new_tokens": 2, "batch_size": batch_size, **given}
        found = predict_generation(SQUARE, hardware, efficiencies=IDEAL, **more)
        return found.decode.seconds

    weights, read = (8 * 1024**2 + 1024) * 2, 2 * 101 * 1024 * 2
    one, two = (decode(known, rows) - decode(sheet, rows) for rows in (1, 2))
    assert one == pytest.approx(read, rel=0.02)  # once more, and queries
    assert two == pytest.approx(3 * weights + 2 * read, rel=0.02)
    filled = [
        predict_generation(SQUARE, hardware, prompt_length=2, new_tokens=1, efficiencies=IDEAL)
        for hardware in (known, sheet)
    ]
    more = filled[0].prefill.seconds - filled[1].prefill.seconds
    assert more == pytest.approx(3 * weights, rel=0.02)  # two tokens, of which the head has one
    plain = predict_generation(SQUARE, replace(sheet, mem_bandwidth=1e30), eager=True)
    calls = predict_generation(SQUARE, replace(known, mem_bandwidth=1e30), eager=True)
    assert calls.decode.seconds > 60
    assert calls.decode.seconds == pytest.approx(round(calls.decode.seconds), rel=1e-6)
    assert plain.decode.seconds < 1e-2
