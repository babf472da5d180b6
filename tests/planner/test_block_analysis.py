"""Sizes read from real models, and what their blocks keep, against what was kept."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_align.planner import ModelSpec, ParallelSpec, analyze_step
from lightning_align.planner.block_analysis import on_meta
from lightning_align.planner.report import enclosing
from lightning_align.planner.saved_bytes import weight_copies
from tests.helpers.step_models import gpt, gpt2, llama, loss_of


@pytest.mark.parametrize(
    ("build", "gated", "ffn"),
    [pytest.param(gpt, False, 192, marks=pytest.mark.slow), (llama, True, 176)],
)
def test_what_blocks_keep_at_sizes_that_were_not_analysed(
    build: Any, gated: bool, ffn: int
) -> None:
    model = build()
    spec = ModelSpec.from_module(model, seq_len=48)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (spec.gated_ffn, spec.ffn_width, spec.num_layers) == (gated, ffn, 3)
    report = analyze_step(model, loss_of(model, batch=3, tokens=57))
    name = report.block_names[1]
    assert spec.analysis is not None
    ours = spec.analysis.saved_bytes(3, 57)
    assert ours == pytest.approx(report.modules[name].saved_bytes, rel=0.01)
    own = [r for r in report.trace.records if name in enclosing(r.scope)]
    weights = {p.nbytes for p in model.get_submodule(name).parameters()}  # as gradients are large
    for phase in ("forward", "backward"):
        made = sum(n for r in own if r.phase == phase for n in r.made if n not in weights)
        known = [each for each in spec.analysis.made if each.phase == phase]
        rows = (3 * m.times * (m.a_token * 57 + m.a_pair * 57**2) for m in known)
        assert sum(rows) == pytest.approx(made, rel=0.03)  # less a mask for all rows
        assert made > 0


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_what_blocks_keep_in_16_bits(precision: str) -> None:
    """Norms of Llama compute in fp32; autocast casts the input of each product by itself."""
    model = llama()
    parallel = ParallelSpec(precision=precision)
    spec = ModelSpec.from_module(model, seq_len=48)
    assert spec.analysis is not None
    ours = spec.analysis.of(parallel).saved_bytes(3, 57)
    assert ours is not None
    loss = loss_of(model, batch=3, tokens=57)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
        report = analyze_step(model, loss)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            report = analyze_step(model, loss)
    theirs = report.modules[report.block_names[1]].saved_bytes - weight_copies(spec, parallel)
    assert ours == pytest.approx(theirs, rel=0.01)
    in_fp32 = spec.analysis.saved_bytes(3, 57)
    assert in_fp32 is not None
    assert 0.53 * in_fp32 < ours < 0.7 * in_fp32  # as half of all would be too little
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


def test_a_model_that_does_not_run_in_16_bits_is_taken_for_half_and_says_so() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is not torch.float32:
                raise RuntimeError("for fp32 alone")
            return x

    model = gpt()
    model.layers[1].mlp.append(Wide())
    spec = ModelSpec.from_module(model, seq_len=16)
    assert spec.analysis is not None
    whole = spec.analysis.saved_bytes(3, 16)
    assert whole is not None
    with pytest.warns(UserWarning, match="taken for half of that in fp32.*for fp32 alone"):
        half = spec.analysis.of(ParallelSpec(precision="bf16-true")).saved_bytes(3, 16)
    assert half == whole / 2


def test_the_module_stays_as_it_is() -> None:
    model = gpt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(p.is_meta for p in on_meta(model).parameters())
    ModelSpec.from_module(model, seq_len=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_tied_weights_come_once() -> None:
    model = gpt2()
    spec = ModelSpec.from_module(model, seq_len=16)
    assert spec.tied_embeddings
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_experts_are_refused() -> None:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    rule = r"is a mixture of experts \(model\.layers\.0\.mlp\.experts\).*analyze_step counts"
    with pytest.raises(ValueError, match=rf"from_config\(config='MixtralForCausalLM'\): {rule}"):
        ModelSpec.from_config(config)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    with pytest.raises(ValueError, match=rf"from_module\(module='MixtralForCausalLM'\): {rule}"):
        ModelSpec.from_module(model, seq_len=16)


def test_blocks_that_differ_are_refused() -> None:
    model = gpt()
    model.layers[1].mlp.append(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"has blocks of .* parameters, which must be alike"):
        ModelSpec.from_module(model, seq_len=16)


def test_blocks_with_more_than_a_decoders_are_refused() -> None:
    model = llama()
    for block in model.model.layers:
        block.mlp.more = nn.Linear(400, 64)
    with pytest.raises(ValueError, match="what else is in them would not be planned"):
        ModelSpec.from_module(model, seq_len=16)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from_module\(module='gpt'\): must be a torch\.nn"):
        ModelSpec.from_module("gpt", seq_len=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="find_layers"):
        ModelSpec.from_module(nn.Linear(2, 2), seq_len=8)
