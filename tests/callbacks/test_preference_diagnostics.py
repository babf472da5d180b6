"""PreferenceDiagnostics: the same sums however batches are cut, the same run with and without."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_align import DPOModule, PreferenceDataModule, PreferenceDiagnostics
from lightning_align.losses import MARGIN_BINS, CompletionLogps, PreferenceOptions, margin_counts
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.resume import HandWritten, SequenceData, weights_hash
from tests.modules.test_dpo import CONFIGS, module, moved, pairs
from tests.modules.test_pretrain import fit, gpt2, sgd_module

BATCHES = [pairs(0, 1, 2), pairs(3), pairs(4, 5), pairs(6, 7, 8, 9), pairs(10), pairs(11, 12)]


class Noted(pl.Callback):
    """What is logged after each step and each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.evaluations.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def diagnose(folder: Path, batches: Any = BATCHES, ours: Any = None, **options: Any) -> Any:
    callback = PreferenceDiagnostics(every_n_train_steps=options.pop("every", 1))
    noted = Noted()
    trainer = fit(
        ours or module(CONFIGS["gpt2"], beta=3.0),
        batches,
        callbacks=[callback, noted],
        default_root_dir=str(folder),
        **options,
    )
    return callback, noted, trainer


def merged(*batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch of all pairs."""
    halves = [{name: rows.chunk(2) for name, rows in batch.items()} for batch in batches]
    return {
        name: torch.cat([each[name][side] for side in (0, 1) for each in halves])
        for name in batches[0]
    }


# Sums


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_windows_of_unequal_batches_are_their_one_big_batch(family: str, tmp_path: Path) -> None:
    """Windows of 4 and of 2 batches, the last one ragged, 6 + 4 + 2 and 3 pairs."""
    cut, noted, _ = diagnose(
        tmp_path, ours=module(CONFIGS[family], beta=3.0), accumulate_grad_batches=4
    )
    whole, other, _ = diagnose(
        tmp_path,
        [merged(*BATCHES[:4]), merged(*BATCHES[4:])],
        ours=module(CONFIGS[family], beta=3.0),
    )
    assert cut.margins["train"].steps == whole.margins["train"].steps == [1, 2]
    for ours, theirs in zip(
        cut.margins["train"].counts, whole.margins["train"].counts, strict=True
    ):
        # where rounding puts a margin on the other side of an edge
        assert (ours - theirs).abs().sum() <= 2
    assert [int(counts.sum()) for counts in cut.margins["train"].counts] == [10, 3]
    for name in ("logps/both_fell", "length/accuracy", "length/correlation"):
        for ours, theirs in ((noted.steps[3], other.steps[0]), (noted.steps[5], other.steps[1])):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert abs(noted.steps[5]["length/correlation"]) > 0.01


def test_histograms_are_of_the_pairs_since_the_one_before(tmp_path: Path) -> None:
    each, _, _ = diagnose(tmp_path)
    some, _, _ = diagnose(tmp_path, every=4)
    assert each.margins["train"].steps == [1, 2, 3, 4, 5, 6]
    assert some.margins["train"].steps == [4, 6]  # the rest when training ends
    sums = torch.stack(each.margins["train"].counts)
    assert torch.equal(some.margins["train"].counts[0], sums[:4].sum(0))
    assert torch.equal(some.margins["train"].counts[1], sums[4:].sum(0))
    first = sums[0].nonzero().flatten().tolist()
    assert first == [MARGIN_BINS // 2]  # all margins are 0 before the first step


@pytest.mark.slow
def test_a_validation_has_a_histogram_and_metrics_of_all_its_batches(tmp_path: Path) -> None:
    callback, noted = PreferenceDiagnostics(), Noted()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, noted],
        default_root_dir=tmp_path,
    )
    loaders = [DataLoader(each, batch_size=None) for each in (BATCHES[:3], BATCHES[3:])]
    trainer.fit(ours := module(beta=3.0), *loaders)
    assert callback.margins["val"].steps == [3, 6]  # and not the one of the sanity check
    policy, reference = ours.score_pairs(batch := merged(*BATCHES[3:]))
    rewards = 3.0 * (policy.logps_B - reference.logps_B)
    margin = rewards[:7] - rewards[7:]
    counts = margin_counts(margin.detach(), torch.ones(7, dtype=torch.bool))
    assert (callback.margins["val"].counts[1] - counts).abs().sum() <= 2
    lengths = batch["completion_mask"].sum(1)
    longer = (lengths[:7] - lengths[7:]).double()
    values = noted.evaluations[-1]
    theirs = np.corrcoef(margin.detach().double(), longer)[0, 1]
    assert values["val_length/correlation"] == pytest.approx(theirs, abs=1e-4)
    fell = ((rewards[:7] < 0) & (rewards[7:] < 0)).float().mean()
    assert values["val_logps/both_fell"] == pytest.approx(float(fell))
    assert values["val_length/accuracy"] == pytest.approx(float((longer.sign() + 1).mean() / 2))


@pytest.mark.slow
def test_two_ranks_have_the_sums_of_one(tmp_path: Path) -> None:
    """Two batches of unequal size on each rank are one window, here the first and only one."""
    ranks = [BATCHES[0], BATCHES[1], BATCHES[3], BATCHES[4]]
    whole = merged(*ranks)
    ours = moved(module(beta=3.0))
    together, noted, _ = diagnose(tmp_path, [whole], ours=copy.deepcopy(ours))
    (theirs,), expected = together.margins["train"].counts, noted.steps[0]
    assert 0 < expected["logps/both_fell"] < 1

    class OnBoth(PreferenceDiagnostics):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_end(trainer, pl_module)
            (counts,) = self.margins["train"].counts
            assert (counts - theirs).abs().sum() <= 2
            assert counts.sum() == theirs.sum() == 9
            for name in ("logps/both_fell", "length/accuracy", "length/correlation"):
                assert abs(float(trainer.callback_metrics[name]) - expected[name]) < 1e-4

    fit(
        ours,
        ranks,
        callbacks=[OnBoth(every_n_train_steps=1, check_first_loss=False)],
        strategy="ddp_fork",
        devices=2,
        accumulate_grad_batches=2,
        default_root_dir=str(tmp_path),
    )


# The KL in a run


def data(folder: Path, **options: Any) -> PreferenceDataModule:
    rows = [
        {"prompt": chr(65 + i) * (1 + i % 3), "chosen": "good" * (1 + i % 2), "rejected": "bad"}
        for i in range(18)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"batch_size": 4, "val_fraction": 0.3, "seed": 5, **options}
    return PreferenceDataModule(path, ByteTokenizer(), **options)


def dpo(**options: Any) -> DPOModule:
    pl.seed_everything(1, verbose=False)
    config = gpt2(0.3)
    config.vocab_size, config.n_positions = 258, 32
    return DPOModule(config, optimizer=lambda g: torch.optim.AdamW(g, lr=1e-2), **options)


def train(
    folder: Path, callback: Any, ours: Any = None, ckpt_path: Any = None, **options: Any
) -> Any:
    pairs_of = options.pop("datamodule", None) or data(folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[each for each in [callback, *options.pop("callbacks", [])] if each is not None],
        **{"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options},
    )
    trainer.fit(ours or dpo(), datamodule=pairs_of, ckpt_path=ckpt_path)
    return trainer


def kl_callback(**options: Any) -> PreferenceDiagnostics:
    return PreferenceDiagnostics(
        **{"every_n_train_steps": 2, "kl_every_n_train_steps": 3, "kl_max_new_tokens": 4, **options}
    )


@pytest.mark.slow
def test_the_kl_is_logged_at_its_steps_and_when_training_ends(tmp_path: Path) -> None:
    callback = kl_callback()
    logger = CSVLogger(tmp_path, name="csv", version="")
    trainer = train(tmp_path, callback, logger=logger, log_every_n_steps=50)
    assert [step for step, _ in callback.kl] == [3, 6, 8]
    assert [found.num_completions for _, found in callback.kl] == [5, 5, 5]  # held-out prompts
    assert callback.kl[-1][1].kl > 0
    assert trainer.callback_metrics["kl/policy"] == pytest.approx(callback.kl[-1][1].kl)
    header = (tmp_path / "csv/metrics.csv").read_text().splitlines()[0]
    assert {"kl/policy", "kl/policy_se", "kl/policy_k1", "kl/policy_per_token"} <= {
        *header.split(",")
    }
    assert (tmp_path / "csv/preferences.png").stat().st_size > 1000


def test_prompts_may_be_given_as_texts(tmp_path: Path) -> None:
    callback = kl_callback(kl_prompts=["one", "two", "three"], kl_num_prompts=2)
    train(tmp_path, callback, datamodule=data(tmp_path, val_fraction=0.0), max_epochs=1)
    assert callback._prompts == [[byte + 2 for byte in text.encode()] for text in ("one", "two")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_with_and_without(
    tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reseeding before every batch would hide a generator that was not put back.
    monkeypatch.setattr("lightning_align.run.exact_resume.reseed", lambda *_: None)
    found = []

    class Drawn(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert all(part.training for part in pl_module.modules())
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))

    for callback in (None, kl_callback(kl_every_n_train_steps=1)):
        draws: list[Any] = []
        ours = dpo()
        pl.seed_everything(2, verbose=False)
        train(tmp_path, callback, ours, precision=precision, callbacks=[Drawn()])
        found.append((draws, weights_hash(ours)))
    assert found[0] == found[1]
    assert len(found[0][0]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_has_the_histograms_and_the_kl_of_one_that_never_stopped(
    tmp_path: Path, accumulate: int
) -> None:
    """From every batch, in mid-accumulation too."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    options: Any = {
        "accumulate_grad_batches": accumulate,
        "enable_checkpointing": True,
        "max_epochs": 3,
    }

    class EveryBatch(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            number = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            trainer.save_checkpoint(tmp_path / "saved" / f"{number}.ckpt")

    saver = EveryBatch(save_top_k=0)
    alone = kl_callback(kl_every_n_train_steps=2)
    train(tmp_path, alone, ours := dpo(), callbacks=[saver], **options)
    digest = weights_hash(ours)
    for path in sorted((tmp_path / "saved").glob("*.ckpt"))[::5]:
        resumed = kl_callback(kl_every_n_train_steps=2)
        train(tmp_path, resumed, again := dpo(), ckpt_path=path, **options)
        assert weights_hash(again) == digest
        assert resumed.kl == alone.kl
        assert resumed.first_losses == alone.first_losses
        for name in ("train", "val"):
            assert resumed.margins[name].steps == alone.margins[name].steps, path
            assert all(map(torch.equal, resumed.margins[name].counts, alone.margins[name].counts))


@pytest.mark.slow
def test_two_ranks_train_as_without_and_share_the_prompts(tmp_path: Path) -> None:
    hashes = []
    for callback in (None, kl_callback()):
        ours = dpo()
        train(tmp_path, callback, ours, strategy="ddp_fork", devices=2, logger=False)
        hashes.append(weights_hash(ours))
    assert hashes[0] == hashes[1]
    assert (tmp_path / "preferences.png").exists()


# The first loss in a run


def test_the_first_loss_is_checked_once_before_the_first_step(tmp_path: Path) -> None:
    callback, _, _ = diagnose(tmp_path)
    (found,) = callback.first_losses
    assert found.deviation < 1e-6
    again = PreferenceDiagnostics()
    again.load_state_dict(callback.state_dict())
    assert again.first_losses == callback.first_losses


def test_it_may_be_left_out(tmp_path: Path) -> None:
    callback = PreferenceDiagnostics(check_first_loss=False)
    fit(module(), [pairs(0)], callbacks=[callback], default_root_dir=str(tmp_path))
    assert callback.first_losses == []


# Others' modules, and what is refused


class OwnPairs(HandWritten):
    """A module that knows nothing of us but what the protocols ask."""

    options = PreferenceOptions()
    margin_counts: Any = None

    def score_pairs(self, batch: Any) -> Any:
        zeros = torch.zeros(4)
        logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
        scored = CompletionLogps(logps, torch.ones(4), zeros, zeros, zeros, logps[:, None])
        return scored, scored

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.margin_counts = margin_counts(
            torch.tensor([float(batch_idx), -1.0]), torch.ones(2, dtype=torch.bool)
        )
        return super().training_step(batch, batch_idx)


def test_a_module_of_ones_own_is_served_if_it_answers(tmp_path: Path) -> None:
    callback = PreferenceDiagnostics(every_n_train_steps=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    trainer.fit(OwnPairs(), datamodule=SequenceData())
    assert callback.margins["train"].steps == [4, 8]
    assert [int(counts.sum()) for counts in callback.margins["train"].counts] == [8, 8]
    assert callback.first_losses[0].deviation < 1e-7


@pytest.mark.parametrize("ours", [HandWritten, sgd_module], ids=["hand-written", "pretrain"])
def test_a_module_that_tells_of_no_pairs_is_refused(ours: Any, tmp_path: Path) -> None:
    rule = "it trains no pairs that it tells of.*Use DPOModule, or give the module margin_counts"
    with pytest.raises(ValueError, match=rule):
        fit(ours(), [], callbacks=[PreferenceDiagnostics()], default_root_dir=str(tmp_path))


def test_unpaired_records_have_no_margin(tmp_path: Path) -> None:
    ours = module(loss_type="apo_zero_unpaired")
    with pytest.raises(ValueError, match="its loss 'apo_zero_unpaired' is of single completions"):
        fit(ours, [], callbacks=[PreferenceDiagnostics()], default_root_dir=str(tmp_path))


def test_a_kl_without_prompts_or_a_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the datamodule has none\. Pass a folder"):
        fit(module(), [pairs(0)], callbacks=[kl_callback()], default_root_dir=str(tmp_path))
    with pytest.raises(ValueError, match="needs two held-out prompts or more, and of 0"):
        train(tmp_path, kl_callback(), datamodule=data(tmp_path, val_fraction=0.0))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps=0"),
        ({"kl_every_n_train_steps": 0}, "kl_every_n_train_steps=0"),
        ({"kl_num_prompts": 1}, "kl_num_prompts=1"),
        ({"kl_max_new_tokens": 0}, "kl_max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"kl_prompts": ["a", "b"]}, "serve the KL, which is not asked for"),
        ({"kl_prompts": "a", "kl_every_n_train_steps": 1}, "must be a list of texts"),
        ({"kl_prompts": ["a", ""], "kl_every_n_train_steps": 1}, "none of them empty"),
        ({"filename": "a.pdf"}, "must end in '.png'"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PreferenceDiagnostics(**options)
