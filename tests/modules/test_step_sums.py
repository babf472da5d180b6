"""The KL of kto over ranks: TRL's, of any numbers of records, and nobody is left waiting."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_align import DPOModule
from lightning_align.losses.sequence_logps import model_completion_logps
from lightning_align.modules.step_sums import sum_of_step, sums_without_steps
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules.test_dpo import CONFIGS, moved, pairs
from tests.modules.test_pretrain import weights

Batch = dict[str, Tensor]
BETA = 2.0


def records(*seeds: int) -> Batch:
    """A record a seed, of which every other one is good; another's completion goes with it."""
    rows, count = pairs(*seeds), len(seeds)
    own = {name: values[:count] for name, values in rows.items()}
    other = {f"KL_{name}": values[count:] for name, values in rows.items()}
    return {**own, **other, "label": torch.tensor([seed % 2 == 0 for seed in seeds])}


def without_completions(batch: Batch) -> Batch:
    """As a sampler fills up the last batch of a rank."""
    return {name: 0 * values if "completion" in name else values for name, values in batch.items()}


def module() -> DPOModule:
    pl.seed_everything(1, verbose=False)
    sgd = partial(torch.optim.SGD, lr=0.5)
    ours = DPOModule(CONFIGS["llama"], optimizer=sgd, loss_type="kto", beta=BETA)
    pl.seed_everything(2, verbose=False)
    return moved(ours)


def trainer_of(rank: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[ForkedRanks(rank, 2)],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def batches(*of_rank: Batch) -> Any:
    return DataLoader([*of_rank], batch_size=None)


def kl_logratios(ours: DPOModule, batch: Batch) -> Tensor:
    """Of the completions that go with other prompts."""
    rows = [batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")]
    counted = rows[2].sum(1) > 0
    models = ours.model, ours.frozen_modules()["reference"]
    policy, reference = (model_completion_logps(model, *rows).logps_B for model in models)
    return (policy - reference)[counted].detach()


def trained_as_trl(windows: list[list[list[Batch]]]) -> Tensor:
    """Weights after kto as ``KTOTrainer._compute_loss`` has it, a window of [rank][micro-batch]:
    the KL of a micro-batch is clamped after the mean over ranks of their means."""
    ours = module()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    for window in windows:
        total, count = torch.zeros(()), 0
        for at_once in zip(*window, strict=True):
            ratios = [kl_logratios(ours, batch) for batch in at_once]
            kl = torch.stack([each.mean() for each in ratios if len(each)]).mean().clamp(min=0)
            for batch in at_once:
                losses, kept = trl_losses(ours, batch, kl)
                total, count = total + losses.sum(), count + kept
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return weights(ours)


def trl_losses(ours: DPOModule, batch: Batch, kl: Tensor) -> tuple[Tensor, int]:
    rows = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    with torch.no_grad():
        reference = model_completion_logps(ours.frozen_modules()["reference"], *rows)
    logratios = model_completion_logps(ours.model, *rows).logps_B - reference.logps_B
    good, counted = batch["label"], rows[2].sum(1) > 0
    losses = torch.where(
        good, 1 - F.sigmoid(BETA * (logratios - kl)), 1 - F.sigmoid(BETA * (kl - logratios))
    )
    return losses[counted], int(counted.sum())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_kto_on_two_ranks_matches_trl(accumulate: int) -> None:
    """Two records each at a time; a rank without any is left out of the mean."""
    of_rank = [
        [records(4, 5), records(8, 9), records(0, 1), records(2, 3)],
        [records(12, 13), records(10, 11), records(6, 7), without_completions(records(14, 15))],
    ]
    steps = range(0, 4, accumulate)
    windows = [[own[n : n + accumulate] for own in of_rank] for n in steps]
    means = [float(kl_logratios(module(), own[0]).mean()) for own in of_rank]
    assert min(means) < 0 < max(means), "a clamp before the mean is another value"

    def on_rank(rank: int) -> Tensor:
        ours = module()
        trainer = trainer_of(rank, accumulate_grad_batches=accumulate)
        trainer.fit(ours, batches(*of_rank[rank]))
        return weights(ours)

    one, other = run_ranks(on_rank)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, trained_as_trl(windows), rtol=0, atol=1e-5)


def test_unequal_numbers_of_records_are_the_one_big_batch() -> None:
    of_rank = [records(0, 1, 2), records(4)]
    whole = {name: torch.cat([own[name] for own in of_rank]) for name in of_rank[0]}
    assert float(kl_logratios(module(), whole).mean()) > 0

    def on_rank(rank: int) -> Tensor:
        ours = module()
        trainer_of(rank).fit(ours, batches(of_rank[rank]))
        return weights(ours)

    one, other = run_ranks(on_rank)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, trained_as_trl([[[whole]]]), rtol=0, atol=1e-5)


def test_ranks_may_have_unequal_numbers_of_batches_to_validate_on() -> None:
    """A rank at its end adds nothing and waits; then all go on together."""
    of_rank = [[records(0, 1), records(2, 3), records(4, 5)], [records(6, 7)]]

    def on_rank(rank: int) -> list[float]:
        ours, trainer = module(), trainer_of(rank)
        loader = batches(*of_rank[rank])
        (validated,) = trainer.validate(ours, loader, verbose=False)
        (tested,) = trainer.test(ours, loader, verbose=False)
        return [validated["val_kl"], tested["test_kl"]]

    together = torch.cat([kl_logratios(module(), own[0]) for own in of_rank])
    alone = [kl_logratios(module(), batch) for batch in of_rank[0][1:]]
    kls = [float(each.mean().clamp(min=0)) for each in (together, *alone)]
    expected = (4 * kls[0] + 2 * kls[1] + 2 * kls[2]) / 8
    for found in run_ranks(on_rank):
        assert found == pytest.approx([expected] * 2, rel=1e-4)


def test_one_process_sends_nothing() -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    values = torch.ones(2)
    assert sum_of_step(trainer, values) is values
    sums_without_steps(trainer, 2, torch.device("cpu"))


def test_a_batch_that_is_tried_out_asks_no_other_rank() -> None:
    """As a guard asks for the losses of its rank's batches, of which another may have none."""

    def on_rank(rank: int) -> float:
        ours = module()
        trainer = trainer_of(rank)
        trainer.fit(ours, batches(records(0, 1)))
        return float(ours.batch_loss(records(2, 3))) if rank else 0.0

    assert run_ranks(on_rank)[1] > 0
