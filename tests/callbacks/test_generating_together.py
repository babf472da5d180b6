"""Callbacks that run the model where no rank can alone: all ranks do the same, and rank 0 tells."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import GPT2Config

from lightning_align import DPOModule, GenerateSamples, PreferenceDiagnostics, PretrainModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.offloaded import small
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.modules.test_dpo import pairs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CPU = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "model_parallel": ModelParallelStrategy,
    "zero_infinity": small,
    "zero_infinity_cpu": partial(small, **CPU),
}
BY_STRATEGY = pytest.mark.parametrize("name", STRATEGIES)
SCALE = {"r": 2, "lora_alpha": 64, "fan_in_fan_out": True}
LORA = {"class_path": "peft.LoraConfig", "init_args": SCALE}


class Numbers(ByteTokenizer):
    """Random models write bytes that are no text."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(i)) for i in ids)


class Watched(pl.Callback):
    """Losses to the last bit, generators behind each batch, and whether a sharded model is so."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        draws = (random.random(), np.random.rand(), float(torch.rand(())))
        self.seen.append((float(outputs["loss"]).hex(), draws))
        assert all(part.training for part in pl_module.modules())
        if isinstance(trainer.strategy, ModelParallelStrategy):
            assert all(isinstance(p, DTensor) for p in pl_module.parameters())


def config(dropout: float = 0.0) -> GPT2Config:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2Config(
        vocab_size=258, eos_token_id=0, bos_token_id=None, initializer_range=0.3, **sizes, **drops
    )


def fit(
    folder: Path,
    build: Callable[[], Any],
    rows: Any,
    *callbacks: pl.Callback,
    rank: int | None = None,
    strategy: Any = "auto",
) -> list[Any]:
    """Train; what was ``Watched``."""
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(1, verbose=False)
    module = build()
    on_ranks = {"devices": 1} if rank is None else {"plugins": [ForkedRanks(rank, 2)], "devices": 2}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        strategy=strategy,
        callbacks=[*callbacks, watched := Watched()],
        **on_ranks,
    )
    pl.seed_everything(2, verbose=False)
    trainer.fit(module, DataLoader(rows, batch_size=None))
    if rank is not None and hasattr(strategy, "close"):
        strategy.close()
    return watched.seen


SGD = partial(torch.optim.SGD, lr=0.1)
TEXT = torch.randint(2, 258, (4, 4, 9), generator=torch.Generator().manual_seed(0))


def text_of(rank: int | None) -> list[dict[str, torch.Tensor]]:
    own = TEXT if rank is None else TEXT[:, 2 * rank : 2 * rank + 2]
    return [{"input_ids": rows, "labels": rows} for rows in own]


def pairs_of(rank: int | None) -> list[dict[str, torch.Tensor]]:
    seeds = range(2) if rank is None else range(rank, rank + 1)
    return [pairs(*(2 * step + seed for seed in seeds)) for step in range(4)]


@BY_STRATEGY
def test_texts_are_those_of_one_process_and_training_does_not_notice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reseeding before every batch would hide a generator that was not put back.
    monkeypatch.setattr("lightning_align.run.exact_resume.reseed", lambda *_: None)

    def samples(do_sample: bool) -> GenerateSamples:
        options = {"every_n_train_steps": 3, "max_new_tokens": 5, "do_sample": do_sample}
        return GenerateSamples(["It is", "a truth"], tokenizer=Numbers(), **options)

    def callbacks() -> list[pl.Callback]:
        return [samples(do_sample=True), samples(do_sample=False)]

    def build(dropout: float = 0.0) -> PretrainModule:
        return PretrainModule(config(dropout), optimizer=SGD)

    def on_a_rank(rank: int) -> tuple[list[Any], list[Any]]:
        found = []
        run = {"rank": rank}
        for given in ([], callbacks()):  # with dropout, which draws
            place = tmp_path / f"drawn{len(given)}"
            strategy = STRATEGIES[name]()
            drawn = partial(build, 0.1)
            found.append(fit(place, drawn, text_of(rank), *given, strategy=strategy, **run))
        strategy = STRATEGIES[name]()
        fit(tmp_path / "ranks", build, text_of(rank), *callbacks(), strategy=strategy, **run)
        return found[0], found[1]

    for without, with_it in run_ranks(on_a_rank, timeout_s=120):
        assert with_it == without
    fit(tmp_path / "one", build, text_of(None), *callbacks())
    written = [
        [json.loads(line) for line in (tmp_path / place / "samples.jsonl").read_text().splitlines()]
        for place in ("ranks", "one")
    ]
    assert [row["step"] for row in written[1]] == [0] * 4 + [3] * 4 + [4] * 4
    assert written[0] == written[1]
    assert len({row["text"] for row in written[1]}) > 6


@BY_STRATEGY
@pytest.mark.parametrize(
    "options", [{}, {"peft_config": LORA}], ids=["a model beside it", "adapters"]
)
def test_the_kl_and_the_first_loss_are_those_of_one_process(
    name: str, options: Any, tmp_path: Path
) -> None:
    def diagnostics() -> PreferenceDiagnostics:
        few = {"kl_every_n_train_steps": 2, "kl_max_new_tokens": 4, "every_n_train_steps": 2}
        prompts = [chr(65 + i) * (i % 5 + 1) for i in range(20)]  # two batches, one short
        return PreferenceDiagnostics(
            kl_prompts=prompts, tokenizer=Numbers(), filename=None, seed=3, **few
        )

    def build() -> DPOModule:
        return DPOModule(config(), optimizer=partial(torch.optim.SGD, lr=1.0), **options)

    def on_a_rank(rank: int) -> tuple[Any, Any]:
        found = diagnostics()
        strategy = STRATEGIES[name]()
        fit(tmp_path, build, pairs_of(rank), found, rank=rank, strategy=strategy)
        return found.kl, found.first_losses

    ranks = run_ranks(on_a_rank, timeout_s=120)
    alone = diagnostics()
    fit(tmp_path / "one", build, pairs_of(None), alone)
    assert ranks[0][0] == ranks[1][0]
    assert [step for step, _ in alone.kl] == [2, 4]
    for (step, ours), (other, theirs) in zip(ranks[0][0], alone.kl, strict=True):
        assert step == other
        assert ours.num_completions == theirs.num_completions == 20
        assert theirs.kl > 1e-3
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)  # fp32 sums, of small differences
    for _, first in ranks:
        assert first[0].loss == pytest.approx(alone.first_losses[0].loss, rel=1e-6)


@BY_STRATEGY
def test_an_error_ends_all_ranks(name: str, tmp_path: Path) -> None:
    """Whoever warned and went on would leave the others in mid-model, or worse: meet them."""

    class Broken(GenerateSamples):
        def generate(self, pl_module: Any, prompt: str) -> str:
            if pl_module.global_rank == 1:
                raise RuntimeError("no memory left")
            return super().generate(pl_module, prompt)

    def on_a_rank(rank: int) -> None:
        build = partial(PretrainModule, config(), optimizer=SGD)
        broken = Broken(["It is"], tokenizer=Numbers(), max_new_tokens=2)
        fit(tmp_path, build, text_of(rank), broken, rank=rank, strategy=STRATEGIES[name]())

    ended = end_of_ranks(on_a_rank, timeout_s=30, grace_s=3)
    assert all(end.exit_code for end in ended)
    assert "RuntimeError: no memory left" in ended[1].error
