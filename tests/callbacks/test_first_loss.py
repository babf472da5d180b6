"""A first loss that is off is named by its cause, found by taking it away; all is put back."""

import copy
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lightning_align import DPOModule
from lightning_align.callbacks.first_loss import _Attempts, check_first_loss, in_float32
from lightning_align.losses import FirstLoss
from tests.modules.test_dpo import CONFIGS, module, moved, pairs

MODELS = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}


def check(ours: DPOModule, precision: Any = "32-true") -> Any:
    trainer = pl.Trainer(accelerator="cpu", logger=False, precision=precision)
    trainer.strategy.connect(ours)
    ours.train()
    return check_first_loss(trainer, ours, pairs(0, 1, 2))


def void(_: Any) -> None:
    """For hooks, which would replace an output by what they return."""


def functional_dropout(model: nn.Module) -> None:
    """A dropout that no module, and no attribute of that name, tells of."""

    def drop(_: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        dropped = F.dropout(hidden, 0.3, training=model.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    blocks[0].register_forward_hook(drop)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["hinge", "sft"]])
def test_equal_models_are_as_in_theory(family: str, loss_type: Any) -> None:
    found = check(module(CONFIGS[family], loss_type=loss_type))
    assert len(found) == 1
    assert found[0].deviation < 1e-5 * found[0].theory


def test_a_loss_without_a_theory_is_not_compared() -> None:
    assert check(module(loss_type="simpo")) == []


@pytest.mark.parametrize("family", CONFIGS)
def test_dropout_is_named(family: str) -> None:
    ours = module(CONFIGS[family])
    functional_dropout(ours.model)
    rule = r"first loss \(sigmoid\) is .*it is 0.693147 for every.*In eval mode it is right"
    with pytest.warns(UserWarning, match=rule) as said:
        check(ours)
    assert "it is the dtype" not in str(said[0].message)
    assert "it is the kernel" not in str(said[0].message)


def test_a_cause_is_none_that_brings_the_loss_within_the_tolerance_by_chance() -> None:
    """A loss a little beyond it, and one a little below, as dropout that is drawn anew may give."""
    attempts: Any = _Attempts(pl.Trainer(accelerator="cpu", logger=False), module(), None, [])
    wrong = FirstLoss("sigmoid", 0.7, 0.7, 1.2e-4)
    for deviation, helps in ((0.9e-4, False), (1e-6, True)):
        found = [FirstLoss("sigmoid", 0.7, 0.7, deviation)]
        attempts.losses = lambda *_, found=found: found
        assert attempts._helps(wrong, "dropout") is helps


def test_modules_that_drop_out_are_named() -> None:
    ours = module(CONFIGS["gpt2"])
    ours.model.transformer.h[1].mlp.dropout.p = 0.4
    with pytest.warns(UserWarning, match=r"Modules with one: model\.transformer\.h\.1\.mlp\.dropo"):
        check(ours)


def test_a_reference_in_another_dtype_is_named() -> None:
    """The same weights, rounded: they part by 1e-2 nats, and a large beta shows it."""
    pl.seed_everything(1, verbose=False)
    policy = LlamaForCausalLM(CONFIGS["llama"])
    reference = copy.deepcopy(policy).to(torch.bfloat16)
    ours = DPOModule(policy, ref_model=reference, beta=5.0, prefix_sharing=False)
    with pytest.warns(UserWarning, match=r"In fp32 it is right: it is the dtype.*bfloat16") as said:
        check(ours)
    assert "In eval mode" not in str(said[0].message)
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}


def test_a_kernel_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's kernel is one that scales its output; the reference has the plain one."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def wrong(*args: Any, **options: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **options)
        return 1.05 * output, weights

    AttentionInterface.register("wrong", wrong)
    ours = module(CONFIGS["llama"], beta=5.0, prefix_sharing=False)
    ours.model.set_attn_implementation("wrong")
    rule = r"By eager attention in separate rows it is right: it is the kernel.*\['wrong', 'sdpa'\]"
    with pytest.warns(UserWarning, match=rule):
        check(ours)
    assert ours.model.config._attn_implementation == "wrong"


def test_other_weights_are_none_of_these() -> None:
    with pytest.warns(UserWarning, match="too: policy and reference have other weights"):
        check(moved(module(beta=5.0)))


def test_two_causes_are_told_together() -> None:
    pl.seed_everything(1, verbose=False)
    policy = LlamaForCausalLM(CONFIGS["llama"])
    reference = copy.deepcopy(policy).to(torch.bfloat16)
    ours = DPOModule(policy, ref_model=reference, beta=5.0, prefix_sharing=False)
    functional_dropout(ours.model)
    with pytest.warns(UserWarning, match="It is right only without dropout, in fp32 and by eager"):
        check(ours)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_equal_models_in_half_precision_are_as_in_theory(precision: str) -> None:
    ours = module(CONFIGS["llama"], beta=1.0)
    if precision == "bf16-true":
        ours = ours.to(torch.bfloat16)
    (found,) = check(ours, precision)
    assert found.deviation < 1e-5


def test_nothing_is_left_changed() -> None:
    """With a cause, so that all is tried; buffers of running statistics among it."""
    ours = module(CONFIGS["gpt2"])
    functional_dropout(ours.model)
    ours.model.statistics = nn.BatchNorm1d(3)
    counts = ours.model.statistics  # of a part that runs; the model itself is not called
    ours.model.transformer.register_forward_hook(lambda *_: void(counts(torch.randn(4, 3) + 1)))
    ours.model.transformer.h[1].eval()
    state = copy.deepcopy(ours.state_dict())
    storages = {name: p.data_ptr() for name, p in ours.named_parameters()}
    ours.train()
    ours.model.transformer.h[1].eval()
    modes = {name: part.training for name, part in ours.named_modules()}
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(3)
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(ours)
    with pytest.warns(UserWarning, match="first loss"):
        check_first_loss(trainer, ours, pairs(0, 1, 2))
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert {name: part.training for name, part in ours.named_modules()} == modes
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == storages
    assert not ours.accumulated
    assert all(p.grad is None for p in ours.parameters())


def test_in_float32_rounds_to_the_coarsest_and_gives_back() -> None:
    fine, coarse = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 2).to(torch.bfloat16)
    held = fine.weight.data.clone()
    with in_float32([fine, coarse]):
        assert fine.weight.dtype == coarse.weight.dtype == torch.float32
        assert torch.equal(fine.weight, held.to(torch.bfloat16).float())
    assert torch.equal(fine.weight, held)
    assert coarse.weight.dtype == torch.bfloat16
