"""Folders of adapters: PEFT loads what we write, we load what PEFT writes, and nothing half."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_align.models.adapter_config import plain_config
from lightning_align.models.adapter_folder import WEIGHTS_FILE, save_adapter
from lightning_align.models.adapters import with_adapters
from lightning_align.models.build import build_model, save_pretrained
from lightning_align.models.trained import load_trained
from tests.models.test_adapters import LORA, TOKENS, model, moved

peft = pytest.importorskip("peft")

MLP = {"target_modules": ["gate_proj", "up_proj"]}
CONFIGS = {
    "LoRA": peft.LoraConfig(r=3, target_modules="all-linear"),
    "LoRA of embeddings": peft.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]),
    "DoRA, norm whole": peft.LoraConfig(r=2, use_dora=True, modules_to_save=["norm"]),
    "biases": peft.LoraConfig(r=2, bias="lora_only", target_modules=["o_proj"]),
    "LoHa": peft.LoHaConfig(r=2, **MLP),
    "LoKr": peft.LoKrConfig(r=2, **MLP),
    "OFT": peft.OFTConfig(r=0, oft_block_size=2, **MLP),
    "IA3": peft.IA3Config(),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_pretrained(model(), tmp_path / "base")


def trained(base: Path, config: Any = CONFIGS["LoRA"]) -> Any:
    """A model of a folder with adapters that have learned something."""
    loaded = build_model(str(base), where="T")
    return moved(with_adapters(loaded, plain_config(config, "T"), where="T")).eval()


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        return of.eval()(TOKENS).logits


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if "LoRA" in name else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ],
)
def test_peft_and_we_load_what_is_written(config: Any, base: Path, tmp_path: Path) -> None:
    ours = trained(base, config)
    expected = logits(ours)
    assert not torch.allclose(expected, logits(build_model(str(base), where="T")), atol=1e-4)
    save_pretrained(ours, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    again = load_trained(tmp_path / "out", where="T")
    torch.testing.assert_close(logits(again.model), expected, rtol=0, atol=1e-5)
    again.merge()
    # in fp32 the products are rounded once more
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-4, atol=1e-5)


def test_what_peft_writes_is_what_we_write(base: Path, tmp_path: Path) -> None:
    wrapper = peft.get_peft_model(build_model(str(base), where="T"), CONFIGS["DoRA, norm whole"])
    inside = moved(wrapper.get_base_model())
    wrapper.save_pretrained(tmp_path / "theirs")
    save_adapter(inside, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    save_pretrained(wrapper, tmp_path / "wrapped")
    torch.testing.assert_close(
        logits(load_trained(tmp_path / "wrapped", where="T").model), logits(inside)
    )
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
        config.pop("auto_mapping"), config.pop("task_type")
    assert configs[0] == configs[1]


def changed(folder: Path, change: Any) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights, next(iter(weights)))
    save_file(weights, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, name: w.pop(name), r"1 weight\(s\) differ.*and None in the file"),
        (lambda w, name: w.update(more=torch.ones(1)), r"first 'more' with shape None by the"),
        (lambda w, name: w.update({name: torch.ones(1)}), r"and \(1,\) in the file"),
    ],
)
def test_missing_unexpected_and_other_weights_are_refused(
    change: Any, message: str, base: Path, tmp_path: Path
) -> None:
    save_adapter(trained(base), tmp_path / "out")
    changed(tmp_path / "out", change)
    with pytest.raises(ValueError, match="holds another adapter.*" + message):
        load_trained(tmp_path / "out", where="T")


def test_folders_that_cannot_be_read(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_adapter(trained(base), out)
    whole = (out / WEIGHTS_FILE).read_bytes()
    (out / WEIGHTS_FILE).write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"T\(ckpt=.*its {WEIGHTS_FILE} cannot be read"):
        load_trained(out, where="T")
    (out / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(ValueError, match=r"PEFT cannot read its adapter_config\.json"):
        load_trained(out, where="T", model=base)


def test_a_model_without_a_name_is_named_by_the_user(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = moved(with_adapters(model(), LORA, where="T"))
    with pytest.warns(UserWarning, match="holds an adapter alone.*export --merge"):
        save_pretrained(ours, tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not tell the model.*Give that model's name"):
        load_trained(tmp_path / "out", where="T")
    again = load_trained(tmp_path / "out", where="T", model=base)
    torch.testing.assert_close(logits(again.model), logits(ours), rtol=0, atol=1e-5)


def test_an_adapter_is_no_model_to_train(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "out")
    with pytest.raises(ValueError, match=r"the folder of an adapter.*is_trainable=True"):
        build_model(str(tmp_path / "out"), where="T")


def test_a_plain_folder_with_the_names_of_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    """What ``save_pretrained`` of the model inside writes: other weights under a plain config."""
    inside = trained(base)
    inside.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"it has no 'model.layers.*_proj.weight'"):
        load_trained(tmp_path / "bad", where="T")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, name: w.pop(name), "it has no '"),
        (lambda w, name: w.update({"model.more.weight": torch.ones(1)}), "it has, for nothing, '"),
    ],
)
def test_plain_folders_are_read_strictly(
    change: Any, message: str, base: Path, tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights, "model.norm.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"T\(ckpt=.*" + message + ".*of another model"):
        load_trained(base, where="T")
