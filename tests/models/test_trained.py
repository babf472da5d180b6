"""A model and its tokenizer from a checkpoint or a folder; families are in test_export.py."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_align import PretrainModule
from lightning_align.data.tokenizer import tokenizer_fingerprint, train_tokenizer
from lightning_align.models import trained
from lightning_align.models.trained import load_trained
from tests.helpers.checkpoints import SIZES, llama_folder, save_checkpoint, small_tokenizer
from tests.helpers.tiny_models import VOCAB_SIZE, PlainDecoder


@pytest.fixture
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    return llama_folder(tmp_path / "base", tokenizer)


def same(model: Any, module: PretrainModule) -> bool:
    ours, theirs = model.state_dict(), module.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_what_is_loaded_is_ready_for_use(
    kind: str, tmp_path: Path, base: Path, tokenizer: Any
) -> None:
    module = PretrainModule(str(base))
    if kind == "checkpoint":
        with torch.no_grad():
            module.model.lm_head.weight.add_(1)  # as training does
    source = save_checkpoint(tmp_path / "a.ckpt", module) if kind == "checkpoint" else base
    loaded = load_trained(source, where="T")
    assert same(loaded.model, module)
    assert not loaded.model.training
    assert tokenizer_fingerprint(loaded.tokenizer) == tokenizer_fingerprint(tokenizer)
    assert loaded.model.generation_config.eos_token_id == [0, 7]


def test_a_configuration_has_no_tokenizer_and_the_one_that_is_given_is_taken(
    tmp_path: Path, base: Path, tokenizer: Any
) -> None:
    module = PretrainModule(LlamaConfig(**SIZES))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    loaded = load_trained(checkpoint, where="T")
    assert loaded.tokenizer is None
    assert same(loaded.model, module)
    given = load_trained(checkpoint, where="T", tokenizer=base).tokenizer
    assert tokenizer_fingerprint(given) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("asked", [None, "float32"])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(
    asked: str | None, tmp_path: Path, base: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    module = PretrainModule(str(base), dtype="bfloat16")
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    for source in (tmp_path / "half", checkpoint):
        loaded = load_trained(source, where="T", dtype=asked).model
        assert loaded.lm_head.weight.dtype is (torch.float32 if asked else torch.bfloat16)


def test_a_folder_of_parts_says_how_to_make_a_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "parts.ckpt").mkdir()
    (tmp_path / "parts.ckpt" / "meta.pt").touch()
    message = r"T\(ckpt='.*parts.ckpt'\): must be a checkpoint file.*consolidate_checkpoint .*parts"
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path / "parts.ckpt", where="T")


def test_the_revision_of_the_run_is_the_one_that_is_read(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    resolve = trained.resolve_pretrained
    monkeypatch.setattr(
        trained, "resolve_pretrained", lambda *words: asked.append(words[-1]) or resolve(*words)
    )
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", PretrainModule(str(base), revision="v2"))
    load_trained(checkpoint, where="T")
    assert set(asked) == {"v2"}


def test_a_tokenizer_that_could_not_be_saved_is_left_to_the_model(
    tmp_path: Path, base: Path, tokenizer: Any
) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", PretrainModule(str(base)))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["TextDataModule"] = {"fingerprint": "tokens", "tokenizer": {}}
    torch.save(checkpoint, path)
    theirs = load_trained(path, where="T").tokenizer
    assert tokenizer_fingerprint(theirs) == tokenizer_fingerprint(tokenizer)


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["PAYLOAD_FOLDER"],))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "trap"))
    torch.save({"state_dict": {"model.a": Payload()}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read as plain data"):
        load_trained(tmp_path / "evil.ckpt", where="T")
    module = PretrainModule(LlamaConfig(**SIZES))
    content = torch.load(save_checkpoint(tmp_path / "a.ckpt", module), weights_only=True)
    trap = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "trap")}}
    content["hyper_parameters"]["model"] = trap
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"'os\.mkdir' is no configuration of transformers"):
        load_trained(tmp_path / "evil.ckpt", where="T")
    assert not (tmp_path / "trap").exists()
    content["hyper_parameters"]["model"] = {
        "class_path": "of_a_stranger.LlamaConfig",
        "init_args": {**SIZES},
    }
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"'of_a_stranger\.LlamaConfig' is no configuration"):
        load_trained(tmp_path / "evil.ckpt", where="T")


def test_a_module_that_is_not_hugging_faces_is_refused(tmp_path: Path, base: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", PretrainModule(PlainDecoder()))
    with pytest.raises(ValueError, match="given a model that was built already"):
        load_trained(checkpoint, where="T")
    with pytest.raises(ValueError, match=r"holds another model: \d+ parameter\(s\) differ, first"):
        load_trained(checkpoint, where="T", model=base)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("other.ckpt", "list.ckpt"):
        with pytest.raises(ValueError, match="must be a checkpoint of a PretrainModule or DPO"):
            load_trained(tmp_path / name, where="T")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    module = PretrainModule(LlamaConfig(**SIZES))
    path = save_checkpoint(tmp_path / "a.ckpt", module)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read as plain data"):
        load_trained(path, where="T")


def test_another_models_folder_is_refused(tmp_path: Path, base: Path) -> None:
    module = PretrainModule(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    with pytest.raises(ValueError, match=r"T\(ckpt=.*holds another model: 9 parameter"):
        load_trained(checkpoint, where="T", model=base)
    with pytest.raises(ValueError, match="is no checkpoint file, and tells its architecture"):
        load_trained(base, where="T", model=base)


def test_a_model_that_is_gone_is_named(tmp_path: Path, base: Path) -> None:
    module = PretrainModule(str(base))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"was trained from '.*base', which cannot be found"):
        load_trained(checkpoint, where="T")
    model = load_trained(checkpoint, where="T", model=tmp_path / "elsewhere").model
    assert same(model, module)


@pytest.mark.parametrize("name", ["absent.ckpt", "folder"])
def test_what_is_neither_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    rule = r"must be a checkpoint file, a folder with a config\.json, or a name on the hub"
    if name == "absent.ckpt":
        rule += ", and there is no such file"
    with pytest.raises(ValueError, match=f"{rule}\\.$"):
        load_trained(tmp_path / name, where="T")


def test_dtype_and_tokenizer_are_checked(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=r"T\(dtype='int8'\): must be one of"):
        load_trained(base, where="T", dtype="int8")
    train_tokenizer([f"word{i} " * 9 for i in range(999)], 400).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"makes ids up to 399, but the model has 300 rows"):
        load_trained(base, where="T", tokenizer=tmp_path / "large")
    assert VOCAB_SIZE < 300
