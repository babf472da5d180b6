"""SpikeEvidence: what a guarded run knows of an incident, and what looking costs: nothing."""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_align as la
from lightning_align import SpikeGuard
from lightning_align.callbacks.spikes.evidence import SpikeEvidence
from lightning_align.reports.spikes import SpikeReport
from lightning_align.spike_incidents import Incident
from lightning_align.stability import SpikeVerdict
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.pipelines import Run, one_process, pipeline
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import AlarmAt, AlarmOnce, Regression, batches
from tests.modules.test_pretrain import fit, gpt2, llama, rows, sgd_module, weights


class Kept(SpikeReport):
    """Keeps incidents, and draws nothing."""

    def __init__(self) -> None:
        super().__init__("")

    def _writes(self, trainer: pl.Trainer) -> bool:
        return False


def incidents_of(
    module: pl.LightningModule, data: Any, *steps: int, action: str = "skip", **options: Any
) -> list[Incident]:
    guard = SpikeGuard(action, AlarmAt(*steps))
    guard.report = Kept()
    callbacks = [guard, *options.pop("callbacks", [])]
    fit(module, data, callbacks=callbacks, **options)
    return guard.report.incidents


class Before(pl.Callback):
    """Does something to the module before the batch of a number."""

    def __init__(self, number: int, what: Any) -> None:
        self.number, self.what = number, what

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.number:
            with torch.no_grad():
                self.what(pl_module)


def test_the_losses_of_a_window_are_those_of_its_batches(tmp_path: Any) -> None:
    """Means over the tokens of each, whatever the window weighs them with."""
    data = [rows(0), rows(1, 2, 3), rows(4, 5), rows(6)]
    (incident,) = incidents_of(
        sgd_module(), data, 1, accumulate_grad_batches=2, default_root_dir=tmp_path
    )
    assert (incident.step, incident.position, incident.num_batches) == (1, 2, 2)
    assert [batch.position for batch in incident.batches] == [2, 3]
    first, second = (float(batch.loss or 0) for batch in incident.batches)
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data[2:]]
    mean = (tokens[0] * first + tokens[1] * second) / sum(tokens)
    assert mean == pytest.approx(incident.loss, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-3)


def test_an_incident_has_layers_learning_rates_and_history(tmp_path: Any) -> None:
    data = [rows(i) for i in range(6)]
    (incident,) = incidents_of(sgd_module(), data, 4, default_root_dir=tmp_path)
    assert [layer.name for layer in incident.layers] == [
        "model.model.embed_tokens",
        "model.model.layers.0",
        "model.model.layers.1",
        "model.lm_head",
    ]
    assert all(layer.grad_norm and layer.update for layer in incident.layers)
    total = math.hypot(*(layer.grad_norm or 0 for layer in incident.layers))
    assert total == pytest.approx(incident.grad_norm, rel=1e-5)
    assert incident.lrs == [0.5] * 5
    assert incident.history["step"] == [0, 1, 2, 3, 4]
    assert incident.history["loss"][-1] == incident.loss
    assert incident.missing == []


def test_losses_after_are_by_the_weights_after_the_step(tmp_path: Any) -> None:
    """Of a step that is taken; after a skip they would be the same."""
    data, module = [rows(i) for i in range(3)], sgd_module()
    taken, skipped = (
        incidents_of(module, data, 2, action=action, default_root_dir=tmp_path)[0].batches[0]
        for action in ("log", "skip")
    )
    assert skipped.loss_after is None
    assert taken.loss_after is not None
    assert taken.loss is not None
    assert taken.loss_after < taken.loss, "a step of plain gradient descent on this very batch"


def test_losses_after_a_rewind_are_by_the_weights_gone_back_to(tmp_path: Any) -> None:
    """Batch 5 by the weights of step 4, and with it the report is written again."""

    class Asks(pl.Callback):
        loss = math.nan

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4 and math.isnan(self.loss):
                with torch.no_grad():
                    self.loss = float(pl_module.batch_loss(rows(5)))

    class Updates(Kept):
        def update(self, trainer: pl.Trainer, incident: Incident) -> None:
            updated.append(asdict(incident))

    asks, updated = Asks(), list[dict[str, Any]]()
    options = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 0}
    guard = SpikeGuard("rewind", AlarmOnce(5), **options)
    guard.report = Updates()
    data = [rows(i) for i in range(9)]
    fit(sgd_module(), data, callbacks=[asks, guard], default_root_dir=tmp_path)
    (incident,) = guard.report.incidents
    (batch,) = incident.batches
    assert batch.loss_after == asks.loss
    assert batch.loss != asks.loss, "a step later"
    assert (incident.rewound_to, incident.skipped) == (4, [[4, 6]])
    assert updated == [asdict(incident)]
    outside = guard.evidence._layers.histories()["outside"]  # type: ignore[union-attr]
    assert {change for history in outside.values() for change in history} == {0.0}


class AlarmAtCalls(AlarmAt):
    """Raises an alarm at some of the verdicts that it is asked for, whatever their steps."""

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        reason = "told" if len(self.seen) in self.steps else ""
        self.seen.append((step, loss, grad_norm))
        return SpikeVerdict(step, bool(reason), reason, loss, grad_norm)


def test_nothing_of_the_stretch_that_was_left_explains_what_comes_behind_a_rewind(
    tmp_path: Any,
) -> None:
    """Step 5 is taken at an alarm, 6 rewound, and 4 has the next alarm: the healthy batch before
    it was seen by other weights, and no incident is the one before."""
    options = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 0}
    guard = SpikeGuard(["log", "rewind"], AlarmAtCalls(5, 6, 7), **options)
    guard.report = Kept()
    far = Before(5, lambda module: module.optimizers().param_groups[0].update(lr=50.0))
    data = [rows(i) for i in range(12)]
    fit(sgd_module(), data, callbacks=[far, guard], default_root_dir=tmp_path)
    incidents = guard.report.incidents
    assert [each.step for each in incidents] == [5, 6, 4]
    causes = [each.cause for each in incidents if each.cause is not None]
    assert ["healthy_loss" in each.figures for each in causes] == [True, True, False]
    assert ["incident before" in each.text for each in causes] == [False, True, False]


def test_what_was_seen_before_a_resume_is_said_to_be_missing(tmp_path: Any) -> None:
    data, path = [rows(i) for i in range(7)], tmp_path / "some.ckpt"
    fit(sgd_module(), data, max_steps=3, default_root_dir=tmp_path).save_checkpoint(path)
    options: dict[str, Any] = {"default_root_dir": tmp_path, "max_epochs": 2}
    (incident,) = incidents_of(sgd_module(), data, 5, ckpt_path=path, **options)
    assert incident.history["step"] == [3, 4, 5]
    assert incident.missing == ["steps before 3: where a run is resumed, evidence begins anew"]


class Draws(la.PretrainModule):
    """Its loss draws, in whatever mode it is."""

    def batch_loss(self, batch: Any) -> torch.Tensor:
        return super().batch_loss(batch) + 0 * torch.rand(())


@pytest.mark.parametrize("steps", [(), (2, 5)], ids=["calm", "alarms"])
def test_looking_changes_nothing(steps: tuple[int, ...], tmp_path: Any) -> None:
    """With dropout: weights, modes and draws are those of a run without a guard."""
    data = [rows(i, i + 1) for i in range(6)]

    def train(*callbacks: Any) -> torch.Tensor:
        pl.seed_everything(1, verbose=False)
        module = Draws(gpt2(dropout=0.1), optimizer=partial(torch.optim.SGD, lr=0.5))
        fit(module, data, callbacks=list(callbacks), default_root_dir=tmp_path)
        return torch.cat([weights(module), torch.rand(1)])

    guard = SpikeGuard("log", AlarmAt(*steps))
    guard.report = Kept()
    assert torch.equal(train(guard), train())
    assert len(guard.report.incidents) == len(steps)


def test_a_module_that_cannot_tell_a_batchs_loss_has_all_the_rest(tmp_path: Any) -> None:
    (incident,) = incidents_of(Regression(), batches(5), 3, default_root_dir=tmp_path)
    assert incident.missing == ["losses of batches after the step: the module has no batch_loss"]
    assert [layer.name for layer in incident.layers] == ["net.0", "net.2"]
    assert incident.batches[0].loss == pytest.approx(incident.loss)


def test_a_foreign_batch_loss_that_takes_something_else_ends_no_run(tmp_path: Any) -> None:
    class Own(Regression):
        def batch_loss(self, batch: Any, targets: Any) -> None:
            raise AssertionError

    (incident,) = incidents_of(Own(), batches(5), 3, action="log", default_root_dir=tmp_path)
    assert [text.partition(": ")[0] for text in incident.missing] == ["loss of a batch"] * 2
    assert all("missing 1 required positional argument" in text for text in incident.missing)


class Sparse(pl.LightningModule):
    """Batches, gradients and parameters of which not every kernel knows."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(9, 4, sparse=True)
        self.scale = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.wide = torch.nn.Linear(4, 4).double()
        self.head = torch.nn.LazyLinear(1) if lazy else torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows = self.table(torch.tensor([batch_idx, batch_idx])) + batch["x"].to_dense()
        hidden = self.wide((rows * self.scale).abs().double()).float()
        return self.head(hidden).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("action", "lazy"), [("log", True), ("clip", False), ("skip", False), ("rewind", True)]
)
def test_what_kernels_do_not_know_ends_no_run(action: str, lazy: bool, tmp_path: Any) -> None:
    """Sparse, complex and wide numbers, those that come later, and fp8 in a batch."""
    small = torch.ones(2).to(torch.float8_e4m3fn)
    data = [{"x": (n * torch.eye(2, 4)).to_sparse(), "small": small} for n in range(1, 9)]
    options: dict[str, Any] = {"default_root_dir": tmp_path}
    kept = SpikeGuard(action, AlarmOnce(5), rewind_steps=1, snapshot_every_n_steps=2)
    kept.report = Kept()
    fit(ours := Sparse(lazy), data, callbacks=[kept], **options)
    fit(theirs := Sparse(lazy), data, **options)
    (incident,) = kept.report.incidents
    assert [math.isfinite(value) for value in (incident.loss, incident.grad_norm or 0)] == [
        True
    ] * 2
    same = all(map(torch.equal, ours.parameters(), theirs.parameters()))
    # This gradient norm is no outlier, of which clipping would leave less.
    assert same == (action in {"log", "clip"})


def test_nan_in_the_weights_names_the_layer(tmp_path: Any) -> None:
    def corrupt(module: Any) -> None:
        module.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan

    callbacks = [Before(3, corrupt)]
    data = [rows(i) for i in range(5)]
    incident, _ = incidents_of(
        sgd_module(), data, 3, 4, callbacks=callbacks, default_root_dir=tmp_path
    )
    assert incident.cause is not None
    assert (incident.cause.kind, incident.cause.layer) == ("numerics", "model.model.layers.1")


def test_a_layer_whose_output_overflows_is_found_by_a_forward(tmp_path: Any) -> None:
    """Its weights are finite; loss and all gradients are not."""

    def overflow(module: Any) -> None:
        module.model.model.layers[1].mlp.down_proj.weight.fill_(3e38)

    data = [rows(i) for i in range(5)]
    (incident,) = incidents_of(
        sgd_module(), data, 3, callbacks=[Before(3, overflow)], default_root_dir=tmp_path
    )
    assert incident.cause is not None
    assert (incident.cause.kind, incident.cause.layer) == ("numerics", "model.model.layers.1")


def test_samples_and_a_preview_come_from_the_datamodule(tmp_path: Any) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh " * 60)
    data = la.TextDataModule(
        [str(tmp_path / "text.txt")],
        ByteTokenizer(),
        block_size=8,
        batch_size=2,
        val_fraction=0.0,
        cache_dir=tmp_path,
    )
    module = la.PretrainModule(
        llama(vocab_size=len(ByteTokenizer())), optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    for tokens, expected in ((4, 4), (0, 0)):
        guard = SpikeGuard("skip", AlarmAt(2), preview_tokens=tokens)
        guard.report = Kept()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            callbacks=[guard],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)
        ((batch,),) = (incident.batches for incident in guard.report.incidents)
        assert data.train_sampler is not None
        assert batch.samples == data.train_sampler.batch(2)
        assert [len(text) for text in batch.preview] == ([expected] * 2 if tokens else [])
        assert all(text in "abcdefgh " * 3 for text in batch.preview)


def test_a_tokenizer_that_cannot_read_a_batch_ends_no_run(tmp_path: Any) -> None:
    class Strict:
        def __len__(self) -> int:
            return 1

        def decode(self, ids: list[int]) -> str:
            raise KeyError(ids[0])

    class Data(pl.LightningDataModule):
        tokenizer = Strict()

        def train_dataloader(self) -> Any:
            return DataLoader([rows(i) for i in range(4)], batch_size=None)

    guard = SpikeGuard("skip", AlarmAt(2))
    guard.report = Kept()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=4, callbacks=[guard], **quiet)
    trainer.fit(sgd_module(), datamodule=Data())
    (incident,) = guard.report.incidents
    assert any(text.startswith("text of batches: KeyError: ") for text in incident.missing)


def test_a_preview_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SpikeGuard\(preview_tokens=-1\): must be at least 0"):
        SpikeEvidence(preview_tokens=-1)


def test_two_ranks_tell_each_other_what_they_have_seen(tmp_path: Any) -> None:
    """A batch that is not finite on the second rank alone: both know which one it was."""

    class Noisy(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if batch_idx == 2 and self.global_rank == 1 else 1.0)

    def train(rank: int) -> dict[str, Any]:
        options: dict[str, Any] = {"devices": 2, "plugins": [ForkedRanks(rank, 2)]}
        (incident,) = incidents_of(
            Noisy(), batches(8), 2, strategy="ddp", default_root_dir=tmp_path, **options
        )
        return asdict(incident)

    one, two = run_ranks(train)
    assert repr(one) == repr(two)
    batches_seen = [(each["rank"], each["position"]) for each in one["batches"]]
    assert batches_seen == [(0, 2), (1, 2)]
    assert [math.isnan(each["loss"]) for each in one["batches"]] == [False, True]
    assert one["cause"]["kind"] == "numerics"


@pytest.mark.slow
def test_ranks_of_a_pipeline_put_their_layers_together() -> None:
    """Each has gradients of its own stages; batches and losses are those of one process."""
    kept: list[Kept] = []

    def guard() -> SpikeGuard:
        made = SpikeGuard("skip", AlarmAt(4))
        made.report = Kept()
        kept.append(made.report)
        return made

    class Asked(Run):
        def fit(self, rank: int | None = None, ranks: int = 2, **options: Any) -> dict[str, Any]:
            super().fit(rank, ranks, **options)
            (incident,) = kept.pop().incidents
            return asdict(incident)

    strategy = {"schedule": "1F1B", "num_microbatches": 4}
    run = Asked(model="llama", steps=6, strategy=strategy, callbacks=[guard])
    ranks, alone = pipeline(run), one_process(run)
    for ours in ranks:
        assert [each["name"] for each in ours["layers"]] == [e["name"] for e in alone["layers"]]
        for figure in ("grad_norm", "update", "gradient_ratio"):
            assert [each[figure] for each in ours["layers"]] == pytest.approx(
                [each[figure] for each in alone["layers"]], rel=1e-3
            )
        assert [each["position"] for each in ours["batches"]] == [4]
        assert ours["batches"][0]["loss"] == pytest.approx(alone["batches"][0]["loss"], rel=1e-5)
        assert ours["missing"] == [
            "losses of batches after the step: not computed under PipelineStrategy"
        ]


@pytest.mark.slow
def test_what_a_strategy_keeps_elsewhere_is_said_to_be_missing(tmp_path: Any) -> None:
    """Weights and gradients on disk: losses, learning rates and the batch are there."""
    strategy = la.ZeROInfinityStrategy(nvme_path=str(tmp_path / "nvme"))
    (incident,) = incidents_of(
        sgd_module(), [rows(i) for i in range(5)], 3, strategy=strategy, default_root_dir=tmp_path
    )
    where = "ZeROInfinityStrategy"
    assert incident.missing == [
        f"figures by layer: {where} keeps weights and gradients elsewhere",
        f"losses of batches after the step: not computed under {where}",
    ]
    assert incident.batches[0].loss == pytest.approx(incident.loss, rel=1e-5)
    assert incident.lrs == [0.5] * 4
    assert incident.cause is not None
