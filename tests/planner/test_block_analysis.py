"""Sizes read from real models, and what their blocks keep, against what was kept."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_align.planner import ModelSpec, analyze_step
from lightning_align.planner.block_analysis import on_meta
from lightning_align.planner.report import enclosing
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
    ours = spec.analysis.saved_bytes(3, 57, is_half=False)
    assert ours == pytest.approx(report.modules[name].saved_bytes, rel=0.01)
    own = [r for r in report.trace.records if name in enclosing(r.scope)]
    weights = {p.nbytes for p in model.get_submodule(name).parameters()}  # as gradients are large
    for phase in ("forward", "backward"):
        made = sum(n for r in own if r.phase == phase for n in r.made if n not in weights)
        known = [each for each in spec.analysis.made if each.phase == phase]
        rows = (3 * m.times * (m.a_token * 57 + m.a_pair * 57**2) for m in known)
        assert sum(rows) == pytest.approx(made, rel=0.03)  # less a mask for all rows
        assert made > 0


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
