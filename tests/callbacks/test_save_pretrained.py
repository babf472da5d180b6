from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from lightning_align import SavePretrained
from tests.helpers.resume import HandWritten, SequenceData
from tests.modules.test_pretrain import fit, gpt2, rows, sgd_module


class Plain(pl.LightningModule):
    """A LightningModule that knows nothing of us, around GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.network = GPT2LMHeadModel(gpt2())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.network(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("build", [sgd_module, lambda: sgd_module(gpt2()), Plain])
def test_folder_holds_the_trained_weights(tmp_path: Path, build: Any) -> None:
    module = build()
    fit(module, [rows(0, 1)], callbacks=[SavePretrained(str(tmp_path / "model"))])
    ours = module.network if isinstance(module, Plain) else module.model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = rows(0, 1)["input_ids"]
    # Saved in fp32 and loaded in fp32: the same bits.
    torch.testing.assert_close(theirs(tokens).logits, ours.eval()(tokens).logits, rtol=0, atol=0)


def test_module_without_a_hugging_face_model_is_refused_before_training(tmp_path: Path) -> None:
    callback = SavePretrained(str(tmp_path / "model"))
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    with pytest.raises(
        ValueError,
        match=r"SavePretrained\(pl_module='HandWritten'\): holds no module with a save_pretrained",
    ):
        trainer.fit(HandWritten(), SequenceData())
    assert trainer.global_step == 0


@pytest.mark.parametrize("place", ["afile", "afile/model"])
def test_a_place_where_no_folder_can_be_is_refused_before_training(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "afile").write_text("kept")
    module = sgd_module()
    with pytest.raises(ValueError, match=r"SavePretrained\(dirpath='.*'\): .*is a file\. Give"):
        fit(module, [rows(0, 1)], callbacks=[SavePretrained(str(tmp_path / place))])
    assert module.trainer.global_step == 0
    assert (tmp_path / "afile").read_text() == "kept"


def test_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dirpath='s3://a/b'\): must be a local folder\. Write"):
        SavePretrained("s3://a/b")


def test_what_a_folder_of_adapters_would_not_hold_is_refused(tmp_path: Path) -> None:
    """A module of one's own, which trains the head beside the adapters of the model in it."""
    peft = pytest.importorskip("peft")
    module = Plain()
    config = peft.LoraConfig(r=2, fan_in_fan_out=True)
    module.network = peft.get_peft_model(module.network, config).get_base_model()
    callbacks = [SavePretrained(str(tmp_path / "model"))]
    fit(module, [rows(0, 1)], callbacks=callbacks)
    module.network.transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"SavePretrained\(model=.*'transformer.ln_f.weight' trains"
    ):
        fit(module, [rows(0, 1)], callbacks=callbacks)


def test_a_model_is_not_written_beside_an_adapter(tmp_path: Path) -> None:
    """Whoever loads such a folder takes it for the adapter, and gets other logits."""
    pytest.importorskip("peft")
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
    folder = str(tmp_path / "model")
    fit(sgd_module(peft_config=lora), [rows(0, 1)], callbacks=[SavePretrained(folder)])
    with pytest.raises(ValueError, match=r"SavePretrained\(dirpath=.*\): holds an adapter"):
        fit(sgd_module(), [rows(0, 1)], callbacks=[SavePretrained(folder)])
    with pytest.raises(ValueError, match=r"save_pretrained\(folder=.*\): holds an adapter"):
        sgd_module().save_pretrained(folder)
    fit(sgd_module(peft_config=lora), [rows(0, 1)], callbacks=[SavePretrained(folder)])


def test_a_home_folder_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fit(sgd_module(), [rows(0, 1)], callbacks=[SavePretrained("~/model")])
    assert (tmp_path / "model" / "config.json").is_file()
