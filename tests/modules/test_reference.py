"""The fingerprint of a reference model: what it tells apart, and what it must not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_align.modules.reference import fingerprint, fingerprint_until_0_1
from tests.modules.test_pretrain import gpt2, llama


def model(config: Any = None) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or llama())


class HandWritten(nn.Module):
    def __init__(self, eps: float = 1e-5, scale: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(4, eps=eps)
        self.register_buffer("scale", torch.tensor(scale))
        self.out = nn.Linear(4, 4)


@torch.no_grad()
def changed(change: Callable[[Tensor], Tensor]) -> Any:
    other = model()
    weight = other.model.layers[0].mlp.up_proj.weight
    weight.copy_(change(weight))
    return other


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of the other sign": torch.neg,
    "in another order": lambda weight: weight.flip(0),
    "two of them exchanged": lambda weight: weight[:, [1, 0, *range(2, weight.shape[1])]],
    "of the last bit": lambda weight: torch.nextafter(weight, weight + 1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights(name: str) -> None:
    ours, other = model(), changed(WEIGHTS[name])
    assert fingerprint(ours)["weights"] != fingerprint(other)["weights"]
    assert fingerprint(ours)["configuration"] == fingerprint(other)["configuration"]


def test_other_constants_and_shapes() -> None:
    """An XOR of equal bits is 0, of whatever number: all three were one to it."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 8)]
    for layer, value in zip(layers, (0.0, 1.0, 1.0), strict=True):
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
    assert len({fingerprint_until_0_1(layer) for layer in layers}) == 1
    assert len({fingerprint(layer)["weights"] for layer in layers}) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_another_configuration(settings: dict[str, Any]) -> None:
    ours, other = fingerprint(model()), fingerprint(model(llama(**settings)))
    assert ours["weights"] == other["weights"]
    assert ours["configuration"] != other["configuration"]


def test_buffers_and_settings_of_a_hand_written_module() -> None:
    ours = fingerprint(HandWritten())
    assert fingerprint(HandWritten()) == ours
    assert fingerprint(HandWritten(scale=3.0))["weights"] != ours["weights"]
    assert fingerprint(HandWritten(eps=1e-3))["configuration"] != ours["configuration"]
    other = HandWritten()
    other.norm = nn.RMSNorm(4, eps=1e-5)
    assert fingerprint(other)["configuration"] != ours["configuration"]


@pytest.mark.parametrize("config", [llama(attention_dropout=0.3), gpt2(0.3)], ids=["llama", "gpt2"])
def test_a_copy_saved_and_loaded_is_the_same(config: Any, tmp_path: Any) -> None:
    """Also one that is built to run another kernel, and whose dropout is off."""
    ours = model(config)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert fingerprint(ours) == fingerprint(loaded) == fingerprint(copy.deepcopy(ours))
    for name in ("attention_dropout", "attn_pdrop"):
        if hasattr(loaded.config, name):
            setattr(loaded.config, name, 0.0)
    assert fingerprint(ours) == fingerprint(loaded)


def test_what_is_computed_at_construction_is_left_out() -> None:
    """Rotary frequencies are powers, whose last bit depends on the processor."""
    ours, other = model(), model()
    frequencies = other.model.rotary_emb.inv_freq
    frequencies.copy_(torch.nextafter(frequencies, frequencies + 1))
    assert fingerprint(ours) == fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_layout_and_dtype(dtype: torch.dtype) -> None:
    ours, other = nn.Linear(3, 5).to(dtype), nn.Linear(3, 5).to(dtype)
    other.load_state_dict(ours.state_dict())
    assert fingerprint(ours) == fingerprint(other)
    other.weight = nn.Parameter(other.weight.detach().t().contiguous().t())
    assert not other.weight.is_contiguous()
    assert fingerprint(ours) == fingerprint(other)
    assert fingerprint(ours) != fingerprint(copy.deepcopy(ours).float())


def test_weights_that_are_not_there_have_none() -> None:
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) == {}


def test_lora_is_told_apart_by_what_it_does() -> None:
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> nn.Module:
        base = model()
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=alpha))

    ours: Any = adapted(4)
    before = fingerprint(ours)
    assert before == fingerprint(adapted(4)) == fingerprint(copy.deepcopy(ours))
    assert before != fingerprint(adapted(8))
    ours.base_model.disable_adapter_layers()
    assert before != fingerprint(ours)


def test_tensors_of_any_layout_have_a_fingerprint() -> None:
    def module(value: float) -> nn.Module:
        made = nn.Module()
        made.register_buffer("sparse", (value * torch.eye(3)).to_sparse())
        made.register_buffer("conjugate", torch.full((2,), value * 1j).conj())
        made.register_buffer("none", torch.empty(0))
        return made

    assert fingerprint(module(1.0)) == fingerprint(module(1.0))
    assert fingerprint(module(1.0))["weights"] != fingerprint(module(2.0))["weights"]
