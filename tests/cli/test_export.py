"""From a checkpoint to a folder: the same logits, tokenizer, template and generation config."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from lightning_align import DPOModule, PretrainModule, TextDataModule
from lightning_align.__main__ import main
from lightning_align.cli.export import export
from lightning_align.data.tokenizer import tokenizer_fingerprint
from tests.helpers.checkpoints import (
    SIZES,
    TEMPLATE,
    llama_folder,
    save_checkpoint,
    small_tokenizer,
)
from tests.helpers.tiny_models import TINY_MODELS

IDS = torch.arange(1, 25).reshape(2, 12)


def logits_of(folder: Path, ids: Tensor = IDS) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def logits_in(module: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return module.eval()(ids)


@pytest.fixture
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    return llama_folder(tmp_path / "base", tokenizer)


def moved(module: Any) -> Any:
    """The module after something like training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "gpt2", "qwen3", "gemma2", "cohere", "granite", "opt", "phi"]
)
def test_logits_are_those_of_the_module(tmp_path: Path, family: str) -> None:
    module = moved(PretrainModule(TINY_MODELS[family]().config))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    folder = export(checkpoint, tmp_path / "out")
    torch.testing.assert_close(logits_of(folder), logits_in(module), atol=1e-5, rtol=0)


def test_what_came_with_the_model_is_kept(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    module = moved(PretrainModule(str(base)))
    folder = export(save_checkpoint(tmp_path / "a.ckpt", module), tmp_path / "out")
    torch.testing.assert_close(logits_of(folder), logits_in(module), atol=1e-5, rtol=0)
    kept = GenerationConfig.from_pretrained(folder)
    assert (kept.eos_token_id, kept.do_sample, kept.top_p) == ([0, 7], True, 0.75)
    again = AutoTokenizer.from_pretrained(folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again.chat_template == TEMPLATE


def test_a_trained_tokenizer_comes_out_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("It is a truth universally acknowledged.\n" * 40)
    options = {"block_size": 8, "val_fraction": 0, "cache_dir": tmp_path / "cache"}
    data = TextDataModule(str(tmp_path / "corpus.txt"), vocab_size=280, **options)
    data.setup()
    module = moved(PretrainModule(LlamaConfig(**SIZES)))
    folder = export(save_checkpoint(tmp_path / "a.ckpt", module, data), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(data.tokenizer)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == data.tokenizer.eos_token_id, "not Llama's default of 2"


def test_dpo_exports_the_policy(tmp_path: Path, base: Path) -> None:
    module = moved(DPOModule(str(base)))
    folder = export(save_checkpoint(tmp_path / "a.ckpt", module), tmp_path / "out")
    ours = logits_in(module)
    torch.testing.assert_close(logits_of(folder), ours, atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(base), ours, atol=1e-3), "the reference is another model"


def test_a_checkpoint_of_the_command_line(tmp_path: Path) -> None:
    """There the model is a class path with arguments."""
    module = moved(PretrainModule(LlamaConfig(**SIZES)))
    save_checkpoint(tmp_path / "a.ckpt", module)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["hyper_parameters"]["model"] = {
        "class_path": "transformers.LlamaConfig",
        "init_args": {**SIZES},
    }
    torch.save(content, tmp_path / "a.ckpt")
    folder = export(tmp_path / "a.ckpt", tmp_path / "out")
    torch.testing.assert_close(logits_of(folder), logits_in(module), atol=1e-5, rtol=0)


def test_a_folder_is_copied_in_another_dtype(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    folder = export(base, tmp_path / "out", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(logits_of(folder), logits_of(base), atol=0.1, rtol=0.1)
    assert not torch.equal(logits_of(folder), logits_of(base))
    again = AutoTokenizer.from_pretrained(folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert GenerationConfig.from_pretrained(folder).top_p == 0.75


def test_dtype_of_the_checkpoint_is_kept_unless_another_is_asked_for(
    tmp_path: Path, base: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", PretrainModule(str(base), dtype="bfloat16"))
    for asked, written in [(None, "bfloat16"), ("float32", "float32")]:
        folder = export(checkpoint, tmp_path / f"{asked}", dtype=asked)
        assert json.loads((folder / "config.json").read_text())["dtype"] == written


def test_a_model_that_was_an_object_needs_its_name(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    module = moved(PretrainModule(model))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    with pytest.raises(ValueError, match=r"built already.*Give its name or folder.*\(--model\)"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = export(checkpoint, tmp_path / "out", model=base)
    torch.testing.assert_close(logits_of(folder), logits_in(module), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


# Folders


def test_a_folder_in_use_is_left_alone(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"export\(output='.*out'\): the folder is not empty"):
        export(base, out)
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\), and will not be"):
        export(base, out, overwrite=True)
    with pytest.raises(ValueError, match="must be a folder, and it is a file"):
        export(base, out / "thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_overwriting_replaces_the_whole_model(tmp_path: Path, base: Path) -> None:
    out = export(base, tmp_path / "out")
    (out / "stale.safetensors").write_text("of an older model")
    with pytest.raises(ValueError, match="not empty"):
        export(base, out)
    export(base, out, overwrite=True)
    assert not (out / "stale.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"], "nothing left over"
    with pytest.raises(ValueError, match="holds what is to be exported"):
        export(out, out, overwrite=True)


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(base, tmp_path / "out") / "config.json").exists()


def test_a_failed_export_leaves_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is written last: by then a naive export looks complete."""
    complete = export(base, tmp_path / "out")
    before = (complete / "config.json").stat().st_ino

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    tokenizer_class = type(AutoTokenizer.from_pretrained(base))
    monkeypatch.setattr(tokenizer_class, "save_pretrained", full_disk)
    for target in ("new", "out"):
        with pytest.raises(OSError, match="No space left"):
            export(base, tmp_path / target, overwrite=True)
    assert (complete / "config.json").stat().st_ino == before, "the older model is intact"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_older_model_survives_a_failed_move(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = export(base, tmp_path / "out")
    before = (complete / "config.json").stat().st_ino
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "model":
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr("lightning_align.cli.export.os.replace", fail)
    with pytest.raises(OSError, match="busy"):
        export(base, tmp_path / "out", overwrite=True)
    assert (complete / "config.json").stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


# As a command


def test_the_command_exports(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    main(["export", "--ckpt", str(base), "--output", out, "--dtype", "float16"])
    assert "MB)" in capsys.readouterr().out
    assert json.loads(Path(out, "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(SystemExit) as stopped:
        main(["export", f"--ckpt={base}", f"--output={out}"])
    assert str(stopped.value).startswith("lightning-align: export(output=")
    main(["export", f"--ckpt={base}", f"--output={out}", "--overwrite"])
    assert json.loads(Path(out, "config.json").read_text())["dtype"] == "float32"


def test_a_misspelt_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--ckpt=a", "--output=b", "--overwrit"])
    assert stopped.value.code == 2
    assert "--overwrit: no such option. Did you mean --overwrite?" in capsys.readouterr().err


def test_mistakes_are_told_before_transformers_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    code = (
        "import sys; from lightning_align.__main__ import main\n"
        "try: main(['export', '--ckpt=a', '--output=.'])\n"
        "except SystemExit: print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False"
