"""DPOModule under PipelineStrategy: the same training as in one process, or refused at set-up."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import DPOModule, PipelineStrategy, PreferenceDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.pipelines import Seen
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules.test_precomputed import write_pairs
from tests.modules.test_pretrain import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
]

ADAMW = partial(torch.optim.AdamW, lr=3e-3)
STEPS = 20
RECORDS = "records.jsonl"
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Files of pairs and of records, and a cache that one process has filled."""
    path: Path = tmp_path_factory.mktemp("pairs")
    write_pairs(path / "pairs.jsonl", number=18)
    write_records(path / RECORDS)
    fit(module(path, **CASES["cached"]), path, max_steps=1)
    return path


def write_records(path: Path) -> None:
    rows = [
        {"prompt": chr(65 + i) * (1 + i % 4), "completion": "so" * (1 + i % 3), "label": i % 3 > 0}
        for i in range(18)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def module(path: Path, **options: Any) -> DPOModule:
    pl.seed_everything(1, verbose=False)
    if options.get("precompute_ref_log_probs"):
        options["ref_cache_dir"] = str(path / options.pop("cache", "cache"))
    config = llama(vocab_size=len(ByteTokenizer()), num_hidden_layers=4)
    return DPOModule(config, optimizer=ADAMW, **options)


def fit(
    ours: DPOModule,
    path: Path,
    rank: int | None = None,
    ckpt_path: Any = None,
    val_fraction: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Train on batches of 4 pairs, the last one of an epoch of 2; in a pipeline of two ranks if
    there is a rank."""
    schedule = options.pop("schedule", "1F1B")
    if rank is not None:
        options |= {
            "devices": 2,
            "strategy": PipelineStrategy(schedule),
            "plugins": [ForkedRanks(rank, 2)],
        }
    seen = Seen()
    callbacks = [seen, *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{
            "devices": 1,
            "max_epochs": -1,
            "max_steps": STEPS,
            "num_sanity_val_steps": 0,
            **options,
        },
    )
    file = RECORDS if ours.options.is_unpaired else "pairs.jsonl"
    data = PreferenceDataModule(
        str(path / file), ByteTokenizer(), batch_size=4, val_fraction=val_fraction
    )
    trainer.fit(ours, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    validated = {n: v for n, v in trainer.callback_metrics.items() if n.startswith("val_")}
    return {
        "losses": seen.losses,
        "logged": seen.logged,
        "validated": validated,
        "layout": ours.layout,
    }


CASES: dict[str, dict[str, Any]] = {
    "cached": {"prefix_sharing": True, "precompute_ref_log_probs": True},
    "separate": {"prefix_sharing": False, "precompute_ref_log_probs": True},
    "auto": {"precompute_ref_log_probs": True, "loss_type": ["ipo", "sft"], "sft_mean": "pairs"},
    "no reference": {"prefix_sharing": True, "loss_type": "simpo"},
    "adapters": {"precompute_ref_log_probs": True, "peft_config": LORA},
    "unpaired": {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired"},
    "unpaired, free": {"reference_free": True, "loss_type": "apo_zero_unpaired", "beta": 0.01},
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "schedule"),
    [
        pytest.param("cached", "1F1B", marks=SLOW),
        pytest.param("cached", "Interleaved1F1B", marks=SLOW),
        pytest.param("separate", "1F1B", marks=SLOW),
        pytest.param("auto", "GPipe", marks=SLOW),
        pytest.param("no reference", "1F1B", marks=SLOW),
        pytest.param("adapters", "1F1B", marks=SLOW),
        pytest.param("unpaired", "1F1B", marks=SLOW),
        pytest.param("unpaired, free", "Interleaved1F1B", marks=SLOW),
    ],
)
def test_trains_as_in_one_process(folder: Path, case: str, schedule: str) -> None:
    """20 steps: losses, and all that is logged."""
    if "peft_config" in CASES[case]:
        pytest.importorskip("peft")
    theirs = fit(module(folder, **CASES[case]), folder)  # and fills the cache

    def piped(rank: int) -> Any:
        return fit(module(folder, **CASES[case]), folder, rank, schedule=schedule)

    for ours in run_ranks(piped, timeout_s=90):
        assert len(ours["losses"]) == STEPS
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=2e-5, atol=2e-5)
        for one, other in zip(ours["logged"], theirs["logged"], strict=True):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4, msg=name)
        assert ours["layout"] == theirs["layout"]


@SLOW
@pytest.mark.parametrize("case", ["cached", "unpaired"])
def test_validates_in_mid_fit_as_in_one_process(folder: Path, case: str) -> None:
    """After each of six epochs, of which the last one is the most moved."""
    theirs = fit(module(folder, **CASES[case]), folder, val_fraction=0.3, max_steps=24)

    def piped(rank: int) -> Any:
        return fit(module(folder, **CASES[case]), folder, rank, val_fraction=0.3, max_steps=24)

    for ours in run_ranks(piped, timeout_s=90):
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=2e-5, atol=2e-5)
        assert ours["validated"].keys() == theirs["validated"].keys()
        assert {"val_loss", "val_rewards/margins"} <= ours["validated"].keys()
        for name, value in theirs["validated"].items():
            torch.testing.assert_close(
                ours["validated"][name], value, rtol=1e-4, atol=1e-4, msg=name
            )


@SLOW
def test_a_resumed_run_is_that_without_a_stop(folder: Path, tmp_path: Path) -> None:
    def whole(rank: int) -> Any:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
        ours = module(folder, **CASES["cached"])
        return fit(ours, folder, rank, callbacks=[saving], accumulate_grad_batches=2)["losses"]

    def resumed(rank: int) -> Any:
        (checkpoint,) = tmp_path.glob("*step=14.ckpt")
        ours = module(folder, **CASES["cached"])
        return fit(ours, folder, rank, str(checkpoint), accumulate_grad_batches=2)["losses"]

    (losses, _), (again, _) = run_ranks(whole, timeout_s=90), run_ranks(resumed, timeout_s=90)
    assert 0 < len(again) < len(losses)
    assert again == losses[-len(again) :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "its reference would have to run beside it.*precompute_ref_log_probs=True"),
        ({**CASES["no reference"], "loss_type": ["simpo", "sft"]}, "sft of a batch depends on all"),
        ({**CASES["no reference"], "packing": True}, "packed rows cannot be cut.*packing=False"),
        pytest.param(
            {**CASES["cached"], "cache": "empty"},
            r"lacks values, and the reference cannot be asked.*under PipelineStrategy.*Fill the",
            marks=SLOW,
        ),
    ],
    ids=["reference", "coupled", "packed", "cold cache"],
)
def test_what_cannot_be_cut_is_refused_at_set_up(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    def refused(rank: int) -> None:
        with pytest.raises(ValueError, match=message):
            fit(module(folder, **options), folder, rank)

    run_ranks(refused, timeout_s=60)
