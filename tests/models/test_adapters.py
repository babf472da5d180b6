"""Adapters in a model: who trains, who is inside of whom, and which ones have no reference."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align._compat.peft_layers import switched_off
from lightning_align.layers import find_layers
from lightning_align.models.adapters import (
    check_reference,
    has_adapters,
    only_adapter,
    own_modules,
    with_adapters,
)
from lightning_align.models.build import build_model
from tests.modules.test_pretrain import llama

peft = pytest.importorskip("peft")

LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "lora_dropout": 0.1}}
TOKENS = torch.arange(1, 9)[None]


def model() -> Any:
    torch.manual_seed(0)
    return build_model(llama(), where="T")


def moved(adapted: nn.Module) -> nn.Module:
    """The same with what trains a little elsewhere."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def test_the_model_itself_holds_them_and_they_alone_train() -> None:
    base = model()
    before = {id(parameter) for parameter in base.parameters()}
    ours = with_adapters(base, LORA, where="T")
    assert ours is base
    assert has_adapters(ours)
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert before == {id(p) for name, p in ours.named_parameters() if "lora_" not in name}
    assert only_adapter(ours)[1].task_type == "CAUSAL_LM"


def test_without_a_configuration_a_model_is_as_it_was() -> None:
    base = model()
    assert with_adapters(base, None, where="T") is base
    assert not has_adapters(base)


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_that_peft_has_wrapped_goes_on(inside: bool) -> None:
    base = model()
    wrapper = peft.get_peft_model(base, peft.LoraConfig(r=2))
    given = wrapper.get_base_model() if inside else wrapper
    assert with_adapters(given, None, where="T") is base
    assert has_adapters(base)


def frozen(wrapper: Any) -> Any:
    return wrapper.requires_grad_(False)


def with_two(wrapper: Any) -> Any:
    wrapper.add_adapter("other", peft.LoraConfig(r=2))
    return wrapper


def with_trained_norm(wrapper: Any) -> Any:
    wrapper.get_base_model().model.norm.weight.requires_grad_(True)
    return wrapper


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (frozen, r"nothing in it trains.*is_trainable=True"),
        (with_two, r"must have one adapter, and it has 2: default, other.*delete_adapter"),
        (with_trained_norm, r"'model.norm.weight' trains.*modules_to_save"),
    ],
)
def test_wrapped_models_that_are_refused(change: Any, message: str) -> None:
    wrapper = change(peft.get_peft_model(model(), peft.LoraConfig(r=2)))
    with pytest.raises(ValueError, match=r"T\(model=.*" + message):
        with_adapters(wrapper, None, where="T")


def test_what_a_wrapped_model_cannot_have() -> None:
    wrapper = peft.get_peft_model(model(), peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"has adapters already.*merge_and_unload\(\)"):
        with_adapters(wrapper, LORA, where="T")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapper = with_adapters(peft.get_peft_model(model(), prompts), None, where="T")
    with pytest.raises(ValueError, match="it is a wrapper around a model"):
        find_layers(wrapper)


def test_layers_that_are_not_there_are_named() -> None:
    wrong = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["c_attn"]}}
    with pytest.raises(ValueError, match=r"PEFT cannot add such adapters.*c_attn.* not found"):
        with_adapters(model(), wrong, where="T")


def test_weights_that_are_not_there_yet_are_refused() -> None:
    with torch.device("meta"):
        empty = build_model(llama(), where="T")
    with pytest.raises(ValueError, match=r"not there yet. Build the module without empty_init"):
        with_adapters(empty, LORA, where="T")


def test_the_dropout_of_adapters_is_their_own() -> None:
    ours = with_adapters(model(), LORA, where="T")
    theirs = own_modules(ours)
    dropouts = {part for part in ours.modules() if isinstance(part, nn.Dropout)}
    assert dropouts
    assert dropouts <= theirs
    assert not any(part in theirs for part in ours.modules() if type(part) is nn.RMSNorm)
    base = ours.model.layers[0].self_attn.q_proj.base_layer
    assert base not in theirs


def test_off_is_the_reference_and_on_is_not() -> None:
    expected = model().eval()(TOKENS).logits
    ours: Any = moved(with_adapters(model(), LORA, where="T")).eval()
    assert not torch.allclose(ours(TOKENS).logits, expected)
    with switched_off(ours):
        assert torch.equal(ours(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": "all"}, r"with bias='all' biases of the model itself train.*bias='none'"),
        ({"init_lora_weights": False}, r"another one than the model that training begins with"),
    ],
)
def test_adapters_without_a_reference_are_refused(arguments: dict[str, Any], message: str) -> None:
    config = {"class_path": "peft.LoraConfig", "init_args": arguments}
    layers = find_layers(with_adapters(model(), config, where="T"))
    with pytest.raises(ValueError, match=message):
        check_reference(layers, "T")


def test_adapters_that_were_trained_before_are_refused_as_a_reference() -> None:
    ours = with_adapters(model(), LORA, where="T")
    check_reference(find_layers(ours), "T")
    check_reference(find_layers(copy.deepcopy(ours)), "T")
    with pytest.raises(ValueError, match=r"Merge them with merge_and_unload\(\).*ref_model"):
        check_reference(find_layers(moved(ours)), "T")
