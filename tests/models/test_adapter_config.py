"""Configurations of PEFT as plain data, and back; what is refused before a model is touched."""

import importlib
import json
from typing import Any

import pytest

from lightning_align.models.adapter_config import build_config, plain_config, refuse_another_adapter

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=8, target_modules={"v_proj", "q_proj"}, use_dora=True),
        peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, modules_to_save=["norm"]),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.LoHaConfig(r=3),
        peft.OFTConfig(r=0, oft_block_size=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_plain_data_and_back_is_the_same(config: Any) -> None:
    plain = plain_config(config, "T")
    assert plain == json.loads(json.dumps(plain))
    again = build_config(plain, "T")
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert plain_config(plain, "T") == plain


def test_the_callers_own_is_not_changed() -> None:
    config = peft.LoraConfig(r=4)
    before = config.to_dict()
    plain = plain_config(config, "T")
    assert config.to_dict() == before
    assert plain == {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}


@pytest.mark.parametrize("path", ["LoraConfig", "peft.LoraConfig", "peft.tuners.lora.LoraConfig"])
def test_spellings_of_a_class(path: str) -> None:
    expected = {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}
    assert plain_config({"class_path": path, "init_args": {"r": 4}}, "T") == expected
    # as the command line hands over --peft_config.init_args.r=4
    assert plain_config({"class_path": path, "r": 4}, "T") == expected


PEFT = "peft.LoraConfig"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lora", r"must be a configuration of PEFT, such as peft.LoraConfig\(r=16\), or a mapping"),
        ({"r": 4}, "its class_path must be a configuration of PEFT"),
        ({"class_path": "torch.nn.Linear"}, "its class_path must be a configuration of PEFT"),
        ({"class_path": "os.system"}, "its class_path must be a configuration of PEFT"),
        ({"class_path": "mine.LoraConfig"}, "its class_path must be a configuration of PEFT"),
        (
            {"class_path": PEFT, "init_args": {"lora_dropuot": 0.1}},
            "LoraConfig has no argument 'lora_dropuot'. Did you mean 'lora_dropout'",
        ),
        (
            {"class_path": PEFT, "init_args": {"layers_pattern": "h", "target_modules": "a"}},
            "LoraConfig cannot be built from it",
        ),
        (peft.PromptTuningConfig(), "of a kind whose adapters lie in the layers that they adapt"),
        (peft.AdaLoraConfig(total_step=9), "of a kind whose adapters lie in the layers"),
        (peft.LoraConfig(init_lora_weights="pissa"), "changes the weights of the model itself"),
        (peft.LoraConfig(init_lora_weights="olora"), "changes the weights of the model itself"),
        (peft.LoraConfig(target_parameters=["w"]), "target_parameters is not supported"),
    ],
)
def test_what_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"T\(peft_config=.*" + message):
        plain_config(config, "T")


@pytest.mark.parametrize(
    ("name", "value", "is_another"),
    [
        ("lora_alpha", 16, True),
        ("use_rslora", True, True),
        ("alpha_pattern", {"q_proj": 2}, True),
        ("lora_dropout", 0.1, False),
        ("init_lora_weights", "gaussian", False),
        ("base_model_name_or_path", "moved/since", False),
        ("target_modules", {"q_proj"}, False),  # names of weights tell
    ],
)
def test_an_adapter_is_another_where_no_weight_tells(
    name: str, value: Any, is_another: bool
) -> None:
    here, saved = peft.LoraConfig(**{"r": 4, name: value}), plain_config(peft.LoraConfig(r=4), "T")
    refuse_another_adapter(here, None, "T")
    if is_another:
        with pytest.raises(ValueError, match=rf"T\(peft_config.{name}=.*the default of PEFT"):
            refuse_another_adapter(here, saved, "T")
    else:
        refuse_another_adapter(here, saved, "T")


def test_without_the_library_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"No module named 'peft'.*lightning-align\[peft\]"):
        plain_config({"class_path": PEFT}, "T")
    assert plain_config(None, "T") is None
