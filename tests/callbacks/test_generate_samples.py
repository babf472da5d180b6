"""GenerateSamples: texts arrive where the logger takes them, and training does not notice."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_align import DPOModule, GenerateSamples, PretrainModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.resume import HandWritten, Run, SequenceData, weights_hash
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import fit, gpt2, rows, sgd_module
from tests.run.test_exact_resume import EVERY_STEP, checkpoints, position_of, resume

VOCABULARY = 258  # of the byte tokenizer


class Lenient(ByteTokenizer):
    """Random models write bytes that are no text, and special tokens."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        kept = [int(i) - 2 for i in ids if int(i) >= 2 or not skip_special_tokens]
        return bytes(kept).decode("latin-1")


def config(**overrides: Any) -> GPT2Config:
    options = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, **overrides}
    return GPT2Config(vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=None, **options)


def module(**overrides: Any) -> PretrainModule:
    """With dropout, so that a generator or a mode that is not put back shows in the loss."""
    pl.seed_everything(1, verbose=False)
    return PretrainModule(
        config(**overrides), optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    )


def samples(prompts: Any = ("It is",), **options: Any) -> GenerateSamples:
    options = {"tokenizer": Lenient(), "every_n_train_steps": 2, "max_new_tokens": 6, **options}
    return GenerateSamples(prompts, **options)


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def run(
    folder: Path, callback: Any = None, ours: Any = None, steps: int = 5, **options: Any
) -> Any:
    callbacks = [callback] if callback is not None else []
    callbacks += options.pop("callbacks", [])
    batches = [rows(i, i + 1, i + 2) for i in range(steps)]
    return fit(
        ours or module(), batches, callbacks=callbacks, default_root_dir=str(folder), **options
    )


# What arrives


def test_samples_at_the_start_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, samples(["It is", "a truth"]))
    rows = written(tmp_path)
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in ("It is", "a truth")
    ]
    assert all(isinstance(row["text"], str) and len(row["text"]) <= 6 for row in rows)
    assert len({row["text"] for row in rows}) > 4


def test_an_end_that_falls_on_an_nth_step_is_sampled_once(tmp_path: Path) -> None:
    run(tmp_path, samples(at_start=False), steps=4)
    assert [row["step"] for row in written(tmp_path)] == [2, 4]


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    run(tmp_path, samples(every_n_train_steps=1), steps=6, accumulate_grad_batches=3)
    assert [row["step"] for row in written(tmp_path)] == [0, 1, 2]


def test_greedy_text_is_the_likeliest_continuation(tmp_path: Path) -> None:
    """Token by token from the model's own logits, in eval mode."""
    ours = module(initializer_range=0.5)
    run(tmp_path, samples(do_sample=False, at_start=False), ours, steps=4)
    tokens = Lenient()(["It is"])["input_ids"][0]
    ours.model.eval()
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(ours.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = Lenient().decode(tokens[5:], skip_special_tokens=True)
    assert written(tmp_path)[-1]["text"] == expected


def test_draws_follow_from_seed_and_step(tmp_path: Path) -> None:
    texts = []
    for name, seed in [("first", 0), ("again", 0), ("other", 1)]:
        run(tmp_path / name, samples(seed=seed))
        texts.append([row["text"] for row in written(tmp_path / name)])
    assert texts[0] == texts[1]
    assert all(ours != theirs for ours, theirs in zip(texts[0], texts[2], strict=True))


def test_draws_are_from_the_whole_vocabulary_unless_told_otherwise(tmp_path: Path) -> None:
    """An untrained model is close to uniform over 258 tokens; transformers would keep 50."""
    many = samples(["It is"] * 40, at_start=True, every_n_train_steps=9, top_p=1.0)
    few = samples(["It is"] * 40, at_start=True, every_n_train_steps=9, top_p=0.05)
    letters = []
    for name, callback in [("many", many), ("few", few)]:
        run(tmp_path / name, callback, steps=1)
        first = [row["text"] for row in written(tmp_path / name) if row["step"] == 0]
        letters.append(len(set("".join(first))))
    assert letters[0] > 100
    assert letters[1] < 100


# Where it arrives


class TakesTables(CSVLogger):
    """Any logger with W&B's word for it; we have never seen its class."""

    def __init__(self, save_dir: Any) -> None:
        super().__init__(save_dir)
        self.got: list[Any] = []

    def log_table(self, key: str, columns: Any, data: Any, step: Any) -> None:
        self.got.append((key, columns, data, step))


def test_loggers_with_tables_get_them_and_no_file_is_written(tmp_path: Path) -> None:
    logger = TakesTables(tmp_path)
    run(tmp_path, samples(), logger=[CSVLogger(tmp_path), logger])
    assert [got[3] for got in logger.got] == [0, 2, 4, 5]
    for key, columns, ((step, prompt, text),), at in logger.got:
        assert (key, columns) == ("samples", ["step", "prompt", "text"])
        assert (step, prompt) == (at, "It is")
        assert len(text) <= 6
    assert not (tmp_path / "samples.jsonl").exists()


def test_fast_dev_run_generates_and_keeps_nothing(tmp_path: Path) -> None:
    prompts: list[str] = []

    class Counted(GenerateSamples):
        def generate(self, pl_module: Any, prompt: str) -> str:
            prompts.append(prompt)
            return super().generate(pl_module, prompt)

    callback = Counted(["It is"], max_new_tokens=6, tokenizer=Lenient())
    run(tmp_path, callback, fast_dev_run=True)
    assert len(prompts) == 2
    assert list(tmp_path.iterdir()) == []


# Training does not notice


class Recorded(pl.Callback):
    """Losses to the last bit, and the state of the random generators after each batch."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.draws: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]).hex())
        self.draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert all(part.training for part in pl_module.modules())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_generates_under_the_precision_of_the_trainer(tmp_path: Path, precision: str) -> None:
    seen: list[bool] = []

    class Noted(GenerateSamples):
        def generate(self, pl_module: Any, prompt: str) -> str:
            seen.append(torch.is_autocast_enabled("cpu"))
            return ""

    run(tmp_path, Noted(["It is"]), steps=1, precision=precision)
    assert seen == [precision == "bf16-mixed"] * 2


@pytest.mark.parametrize("kind", ["pretrain", "dpo"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_losses_and_generators_are_the_same_with_and_without(
    tmp_path: Path, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reseeding before every batch would hide a generator that was not put back.
    monkeypatch.setattr("lightning_align.run.exact_resume.reseed", lambda *_: None)
    found = []
    for callback in (None, samples(every_n_train_steps=1)):
        recorded = Recorded()
        if kind == "pretrain":
            ours: Any = module()
            batches = [rows(i, i + 1) for i in range(4)]
        else:
            pl.seed_everything(1, verbose=False)
            ours = DPOModule(config())
            batches = [pairs(i, i + 1) for i in range(4)]
        pl.seed_everything(2, verbose=False)
        callbacks = [c for c in (callback, recorded) if c is not None]
        fit(ours, batches, callbacks=callbacks, default_root_dir=str(tmp_path), precision=precision)
        hashed = weights_hash(ours.float())
        found.append((recorded.losses, recorded.draws, hashed))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 4
    assert len(written(tmp_path)) == 5


def test_configuration_modes_and_gradients_are_left_alone(tmp_path: Path) -> None:
    ours = module()
    ours.model.transformer.h[0].eval().requires_grad_(False)  # a block frozen by the user
    ours.model.config.use_cache = False
    before = copy.deepcopy((ours.model.config.to_dict(), ours.model.generation_config.to_dict()))
    modes = {name: part.training for name, part in ours.named_modules()}
    seen: list[Any] = []

    class Watched(GenerateSamples):
        def generate(self, pl_module: Any, prompt: str) -> str:
            seen.append(
                (any(part.training for part in pl_module.modules()), torch.is_grad_enabled())
            )
            return super().generate(pl_module, prompt)

    gradients = {name: p.requires_grad for name, p in ours.named_parameters()}
    callback = Watched(["It is"], tokenizer=Lenient(), max_new_tokens=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(ours)
    callback.setup(trainer, ours, "fit")
    callback._sample(trainer, ours)
    assert seen == [(False, False)]
    assert {name: part.training for name, part in ours.named_modules()} == modes
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == gradients
    assert (ours.model.config.to_dict(), ours.model.generation_config.to_dict()) == before
    assert all(p.grad is None for p in ours.parameters())


def test_a_model_of_nan_does_not_end_the_run(tmp_path: Path) -> None:
    class Broken(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            torch.nn.init.constant_(pl_module.model.transformer.wte.weight, float("nan"))

    callback = samples(at_start=False)
    with pytest.warns(UserWarning, match="GenerateSamples: no sample at step 2: prob"):
        trainer = run(tmp_path, callback, callbacks=[Broken()])
    assert trainer.global_step == 5


def test_file_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.warns(UserWarning, match="'samples' of step 2 was not written: .*Is a directory"):
        trainer = run(tmp_path, samples())
    assert trainer.global_step == 5


@pytest.mark.parametrize("name", ["hand-written", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_resume_is_bit_identical(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(kind: str, options: dict[str, Any]) -> pl.Callback:
        if name == "gpt2":
            return samples(**options)
        return Echo(["It is"], **options)

    monkeypatch.setattr("tests.helpers.resume.callback", build)
    sampled = Run(
        str(tmp_path),
        module=name,
        max_epochs=2,
        checkpoint=EVERY_STEP,
        trainer={"accumulate_grad_batches": 2},
        callbacks={"GenerateSamples": {"every_n_train_steps": 3}},
    )
    # The helper's model has 61 tokens and 16 positions.
    monkeypatch.setattr(Lenient, "__call__", lambda self, texts, **_: {"input_ids": [[5, 6]]})
    losses, digest = sampled.fit()
    without = Run(str(tmp_path), module=name, name="plain", max_epochs=2, trainer=sampled.trainer)
    assert without.fit() == (losses, digest)
    for path in checkpoints(sampled.folder)[1::3]:
        resumed, resumed_digest = resume(sampled, path, tmp_path / "resumed")
        assert resumed == losses[position_of(path) :]
        assert resumed_digest == digest


def test_a_resumed_run_has_no_sample_before_training(tmp_path: Path) -> None:
    trainer = run(tmp_path / "first", samples(), steps=4)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path / "second",
        callbacks=[samples()],
    )
    loader = torch.utils.data.DataLoader([rows(0, 1)] * 4, batch_size=None)
    trainer.fit(module(), loader, ckpt_path=tmp_path / "first.ckpt")
    assert [row["step"] for row in written(tmp_path / "second")] == [6, 8]


def test_two_ranks_train_as_without_and_rank_zero_writes(tmp_path: Path) -> None:
    """Forked gloo ranks; nothing in the generation may wait for the other rank."""

    class Noted(GenerateSamples):
        def generate(self, pl_module: Any, prompt: str) -> str:
            assert pl_module.global_rank == 0
            return super().generate(pl_module, prompt)

    noted = Noted(["It is"], every_n_train_steps=2, max_new_tokens=6, tokenizer=Lenient())
    hashes = []
    for name, callback in [("plain", None), ("sampled", noted)]:
        ours = module()
        run(tmp_path / name, callback, ours, steps=8, strategy="ddp_fork", devices=2)
        hashes.append(weights_hash(ours))
    assert hashes[0] == hashes[1]
    assert [row["step"] for row in written(tmp_path / "sampled")] == [0, 2, 4]


# Models and tokenizers


class Echo(GenerateSamples):
    """What a user writes for a model of their own."""

    def generate(self, pl_module: pl.LightningModule, prompt: str) -> str:
        assert isinstance(pl_module, HandWritten)
        ids = torch.tensor([[5]])
        logits = pl_module.head(pl_module.body(pl_module.embedding(ids)))
        return f"{prompt} {torch.multinomial(logits[0, -1].softmax(0), 1).item()}"


def test_hand_written_module_with_its_own_generate(tmp_path: Path) -> None:
    run(tmp_path, Echo(["one"], every_n_train_steps=2), HandWritten())
    rows = written(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert all(row["text"].startswith("one ") for row in rows)


def test_hand_written_module_around_a_hugging_face_model(tmp_path: Path) -> None:
    class Wrapped(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = GPT2LMHeadModel(config())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.network(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run(tmp_path, samples(), Wrapped())
    assert len(written(tmp_path)) == 4


def test_tokenizer_of_the_datamodule_is_the_default(tmp_path: Path) -> None:
    class Data(SequenceData):
        tokenizer = Lenient()

    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[samples(tokenizer=None)],
    )
    trainer.fit(module(), Data())
    assert [row["step"] for row in written(tmp_path)] == [0, 2]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"prompts": []}, r"prompts=\[\]\): must be a list of texts, none of them empty"),
        ({"prompts": ["a", ""]}, r"prompts=\['a', ''\]\): must be a list of texts.*end-of-text"),
        ({"prompts": "It is"}, r"prompts='It is'\): must be a list of texts"),
        ({"every_n_train_steps": 0}, r"every_n_train_steps=0\): must be at least 1"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0\): must be at least 1"),
        ({"seed": -1}, r"seed=-1\): must be at least 0"),
        ({"temperature": 0.0}, r"temperature=0.0\): must be above 0\. .*do_sample=False"),
        ({"top_p": 0.0}, r"top_p=0.0\): must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5\): must be in \(0, 1\]"),
        ({"do_sample": False, "top_p": 0.9}, r"top_p=0.9\): only changes draws, and do_sample"),
        ({"do_sample": False, "temperature": 0.9}, r"temperature=0.9\): only changes draws"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^GenerateSamples\({rule}"):
        GenerateSamples(**{"prompts": ["It is"], **arguments})


@pytest.mark.parametrize(
    ("callback", "ours", "rule"),
    [
        (samples(tokenizer=None), module, r"tokenizer=None\): the datamodule has no tokenizer"),
        (samples(tokenizer="no/folder/here"), module, r"tokenizer='no/folder/here'\)"),
        (
            samples(),
            HandWritten,
            r"pl_module='HandWritten'\): holds no module with a generate.*override generate\(pl",
        ),
        (
            samples(["x" * 27]),
            module,
            r"prompts='x+'\): has 27 tokens, and with max_new_tokens=6 that is more than the"
            r" model's 32 positions\. Shorten",
        ),
        (
            samples(max_new_tokens=4),
            lambda: sgd_module(gpt2()),
            r"prompts='It is'\): has token 118, and the model's vocabulary ends at 60",
        ),
    ],
)
def test_what_cannot_generate_is_refused_before_training(
    tmp_path: Path, callback: Any, ours: Any, rule: str
) -> None:
    built = ours()
    with pytest.raises(ValueError, match=rf"^GenerateSamples\({rule}"):
        run(tmp_path, callback, built)
    assert built.trainer.global_step == 0


def test_a_prompt_that_just_fits_is_taken(tmp_path: Path) -> None:
    run(tmp_path, samples(["x" * 26]))
    assert len(written(tmp_path)) == 4


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_may_divide_the_model_are_refused(strategy: Any) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy.__new__(strategy), datamodule=None)
    rule = rf"under {strategy.__name__} rank zero may not hold the whole model.*Use one device"
    with pytest.raises(ValueError, match=rule):
        samples().setup(trainer, module(), "fit")


def test_arguments_come_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(GenerateSamples, "samples")
    parsed = parser.parse_string("samples: {prompts: [It is, a truth], max_new_tokens: 9}")
    made = parser.instantiate_classes(parsed).samples
    assert (made.prompts, made.max_new_tokens) == (["It is", "a truth"], 9)
