import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from lightning_align.models.build import build_model, plain_model, save_pretrained
from lightning_align.models.weights import weights_in_parts
from tests.helpers.tiny_models import TINY_MODELS
from tests.modules.test_pretrain import llama


def test_config_folder_and_json_build_the_same_architecture(tmp_path: Path) -> None:
    from_config = build_model(llama(), where="T")
    save_pretrained(from_config, tmp_path)
    from_folder = build_model(tmp_path, where="T")
    from_json = build_model(plain_model(llama()), where="T")
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (from_config, from_folder, from_json)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    for name, value in from_config.state_dict().items():
        assert torch.equal(from_folder.state_dict()[name], value)


def test_is_in_training_mode_and_the_wanted_dtype_whatever_the_folder_has(tmp_path: Path) -> None:
    save_pretrained(build_model(llama(), where="T", dtype="bfloat16"), tmp_path)
    loaded = build_model(str(tmp_path), where="T")
    assert loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    halved = build_model(str(tmp_path), where="T", dtype="bfloat16")
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}


def test_attention_implementation_is_passed_on() -> None:
    model = build_model(llama(), where="T", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_revision_reaches_the_check_and_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached revision must not be looked for under 'main', nor another one be loaded."""
    seen = []
    checked = "lightning_align.models.build.resolve_pretrained"
    monkeypatch.setattr(checked, lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(
        "lightning_align.models.build.AutoModelForCausalLM.from_pretrained",
        lambda name, **options: seen.append((name, options["revision"])) or nn.Linear(1, 1),
    )
    build_model("acme/m", where="T", revision="v2")
    assert seen == [("T", "model", "acme/m", "v2"), ("acme/m", "v2")]


def test_module_is_used_as_it_is() -> None:
    module = nn.Linear(2, 2).eval()
    assert build_model(module, where="T") is module
    assert module.training


def test_plain_model_is_text_or_nothing() -> None:
    assert plain_model("name") == "name"
    assert plain_model(nn.Linear(1, 1)) is None
    assert plain_model(None) is None
    assert json.loads(plain_model(llama()) or "")["model_type"] == "llama"


def test_folder_without_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"T\(model='.*'\): transformers cannot load a causal"):
        build_model(str(tmp_path), where="T")


def test_model_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no save_pretrained"):
        save_pretrained(nn.Linear(1, 1), tmp_path)


def test_code_of_a_model_never_runs_unasked(tmp_path: Path) -> None:
    """The config points to code in the folder: without trust_remote_code it must not run."""
    trap = tmp_path / "trap"
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    with pytest.raises(ValueError, match="cannot load"):
        build_model(str(tmp_path), where="T")
    assert not trap.exists()


def test_unknown_configuration_is_refused() -> None:
    class Strange(LlamaConfig):
        model_type = "strange"

    with pytest.raises(ValueError, match="no causal language model for this configuration"):
        build_model(Strange(), where="T")


def test_on_meta_only_parameters_have_no_values() -> None:
    with torch.device("meta"):
        model = build_model(llama(), where="T")
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_read_in_parts_is_the_model_that_is_loaded_whole(
    tmp_path: Path, dtype: str
) -> None:
    written = build_model(TINY_MODELS["llama_tied"]().config, where="T")
    written.generation_config.max_length = 33  # type: ignore[union-attr]
    save_pretrained(written, tmp_path)
    theirs: Any = build_model(tmp_path, where="T", dtype=dtype)
    with weights_in_parts(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours: Any = build_model(tmp_path, where="T", dtype=dtype)
    assert ours.training
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == value.dtype
        assert torch.equal(ours.state_dict()[name], value)


def test_a_folder_that_lacks_a_weight_is_loaded_whole_with_a_warning(tmp_path: Path) -> None:
    save_pretrained(build_model(llama(), where="T"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    match = r"loaded into memory as a whole: .* have no 'lm_head\.weight'"
    with weights_in_parts(), pytest.warns(UserWarning, match=match):
        model = build_model(tmp_path, where="T")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
