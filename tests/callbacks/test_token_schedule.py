"""TokenSchedule on our modules and on one that knows nothing of us: which learning rate each step
has, when training ends, over batches, windows and ranks, and what a resume keeps."""

import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from transformers import BatchEncoding, get_cosine_schedule_with_warmup

from lightning_align import DPOModule, PretrainModule, TokenSchedule
from lightning_align.schedules import lr_fraction
from tests.helpers.resume import HandWritten, Run, SequenceData
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import fit, gpt2, rows, sgd_module, weights
from tests.run.test_exact_resume import (
    EVERY_STEP,
    checkpoints,
    kill_when,
    position_of,
    resume,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:TokenSchedule.max_tokens")


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Watch(pl.Callback):
    """The learning rates with which each step is taken, and the tokens known when it is done."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.tokens: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.tokens.append(schedule_of(trainer).tokens_seen)


def schedule_of(trainer: pl.Trainer) -> TokenSchedule:
    (found,) = [c for c in trainer.callbacks if isinstance(c, TokenSchedule)]
    return found


def targets(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def unequal_groups(groups: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=0.4)
    optimizer.param_groups[1]["lr"] = 0.1
    return optimizer


BATCHES = [rows(0), rows(1, 2, 3), rows(4, 5), rows(6, 7, 8), rows(9)]
COUNTS = [targets(batch) for batch in BATCHES]
TOTAL = sum(COUNTS)


def watched(
    module: pl.LightningModule, callback: TokenSchedule, batches: Any = BATCHES, **options: Any
) -> tuple[Watch, pl.Trainer]:
    watch = Watch()
    callbacks = [watch, callback, *options.pop("callbacks", [])]
    return watch, fit(module, batches, callbacks=callbacks, **options)


def fractions(starts: list[int], callback: TokenSchedule) -> list[float]:
    return [lr_fraction(tokens, **callback.settings) for tokens in starts]


# The learning rate of each step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_rate_of_a_step_follows_from_the_tokens_before_it(schedule: str, accumulate: int) -> None:
    """Batches of unequal size; the last of five is a window of its own under accumulation."""
    windows = [COUNTS[i : i + accumulate] for i in range(0, 5, accumulate)]
    starts = [sum(map(sum, windows[:i])) for i in range(len(windows))]
    callback = TokenSchedule(TOTAL, schedule, warmup_tokens=COUNTS[0] + 1)
    pl.seed_everything(1, verbose=False)
    module = PretrainModule(gpt2(), optimizer=unequal_groups)
    watch, trainer = watched(module, callback, accumulate_grad_batches=accumulate)
    # Each group keeps its own peak.
    peaks = (0.4, 0.1, 0.4)  # matrices, embeddings, norms and biases
    expected = [[peak * f for peak in peaks] for f in fractions(starts, callback)]
    assert watch.rates == [pytest.approx(rates, rel=1e-12) for rates in expected]
    assert len({rates[0] for rates in watch.rates}) > 1
    assert callback.tokens_seen == module.tokens_seen == TOTAL
    assert trainer.callback_metrics["lr"] == pytest.approx(watch.rates[-1][0])
    assert trainer.callback_metrics["tokens_seen"] == TOTAL


def test_equal_steps_match_transformers_by_step() -> None:
    """Without floor and with as many tokens in each step, the whole run is theirs."""
    batch = {"input_ids": rows(0, 1)["input_ids"], "labels": rows(0, 1)["input_ids"]}
    each = targets(batch)
    ours, theirs = sgd_module(gpt2()).double(), sgd_module(gpt2()).double()
    callback = TokenSchedule(10 * each, warmup_tokens=3 * each, min_lr_ratio=0.0)
    fit(ours, [batch] * 10, callbacks=[callback])
    theirs.lr_scheduler = lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 3, 10)
    fit(theirs, [batch] * 10)
    # In float64: the factors differ by rounding, 1e-16, in ten steps of at most 0.5.
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-12)


def test_constant_schedule_changes_nothing() -> None:
    ours, theirs = sgd_module(gpt2()), sgd_module(gpt2())
    fit(ours, BATCHES, callbacks=[TokenSchedule(TOTAL, "constant")])
    fit(theirs, BATCHES)
    assert torch.equal(weights(ours), weights(theirs))


def test_pairs_count_their_completion_tokens() -> None:
    batches = [pairs(0, 1), pairs(2), pairs(3, 4, 5)]
    counts = [int(batch["completion_mask"][:, 1:].sum()) for batch in batches]
    callback = TokenSchedule(sum(counts), "linear")
    module = DPOModule(gpt2(), optimizer=unequal_groups)
    watch, _ = watched(module, callback, batches)
    expected = fractions([0, counts[0], counts[0] + counts[1]], callback)
    assert [rates[0] for rates in watch.rates] == pytest.approx([0.4 * f for f in expected])
    assert callback.tokens_seen == module.tokens_seen == sum(counts)


def test_hand_written_module_gets_rates_and_logs(tmp_path: Path) -> None:
    callback = TokenSchedule(TOTAL, "linear")
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor(logging_interval="step")
    module = HandWritten(scheduler=False)
    watch, _ = watched(module, callback, logger=logger, callbacks=[monitor])
    ends = [sum(COUNTS[: i + 1]) for i in range(5)]
    expected = [1e-2 * f for f in fractions([0, *ends[:-1]], callback)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    columns = {
        name: [float(row[name]) for row in table if row[name]]
        for name in ("tokens_seen", "lr", "lr-AdamW")
    }
    assert columns["tokens_seen"] == ends
    assert columns["lr"] == pytest.approx(expected)
    # Lightning's own monitor, which reads before the step, sees the same rates.
    assert columns["lr-AdamW"] == pytest.approx(expected)


class TwoOptimizers(HandWritten):
    """Optimises by hand: body and head have an optimizer each, one with its rate in a tensor."""

    def __init__(self) -> None:
        super().__init__(scheduler=False)
        self.automatic_optimization = False
        self.used: list[tuple[float, float]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        first, second = self.optimizers()
        self.used.append((first.param_groups[0]["lr"], float(second.param_groups[0]["lr"])))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        self.rate = torch.tensor(0.5)
        head = torch.optim.Adam(self.head.parameters(), lr=self.rate, capturable=True)
        body = [*self.embedding.parameters(), *self.body.parameters()]
        return torch.optim.SGD(body, lr=0.1), head


def test_every_optimizer_of_a_manual_module_is_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: None)  # no CUDA graph
    callback, module = TokenSchedule(TOTAL, "linear"), TwoOptimizers()
    fit(module, BATCHES, callbacks=[callback])
    expected = fractions([sum(COUNTS[:i]) for i in range(5)], callback)
    assert [lr for lr, _ in module.used] == pytest.approx([0.1 * f for f in expected])
    assert [lr for _, lr in module.used] == pytest.approx([0.5 * f for f in expected], rel=1e-6)
    # A captured graph reads this very tensor.
    assert module.optimizers()[1].param_groups[0]["lr"] is module.rate


# The end


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (2, 2)])
def test_ends_with_the_step_that_spends_the_budget(accumulate: int, steps: int) -> None:
    """The third batch spends it; with windows of two its window is finished first."""
    budget = sum(COUNTS[:3]) - 1
    module = sgd_module(gpt2())
    callback = TokenSchedule(budget, "constant")
    watch, trainer = watched(module, callback, max_epochs=9, accumulate_grad_batches=accumulate)
    assert trainer.global_step == len(watch.rates) == steps
    assert callback.tokens_seen == module.tokens_seen == sum(COUNTS[: steps * accumulate])
    assert callback.tokens_seen >= budget
    assert trainer.state.finished


def test_goes_on_at_the_floor_without_stop() -> None:
    callback = TokenSchedule(sum(COUNTS[:2]), stop=False)
    watch, trainer = watched(sgd_module(gpt2()), callback)
    assert trainer.global_step == 5
    assert [rates[0] for rates in watch.rates[2:]] == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("limit", [{"min_steps": 7}, {"min_epochs": 2}])
def test_least_number_of_steps_goes_first(limit: dict[str, int]) -> None:
    callback = TokenSchedule(COUNTS[0], "constant")
    _, trainer = watched(sgd_module(gpt2()), callback, max_epochs=9, **limit)
    assert trainer.global_step == (7 if "min_steps" in limit else 10)


def test_validates_after_the_last_step(tmp_path: Path) -> None:
    """Ten batches an epoch; the budget ends in the middle of the second."""
    steps: list[int] = []
    note = pl.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, _: steps.append(trainer.global_step)
    )
    trainer = pl.Trainer(
        max_epochs=9,
        num_sanity_val_steps=0,
        accelerator="cpu",
        **QUIET,
        default_root_dir=tmp_path,
        callbacks=[TokenSchedule(400, "constant"), note],
    )
    trainer.fit(HandWritten(scheduler=False), SequenceData())
    assert steps == [10, trainer.global_step]
    assert 10 < trainer.global_step < 20


def test_warns_when_something_else_ends_training_first() -> None:
    rule = rf"max_tokens={10 * TOTAL}\): training ended after {TOTAL} tokens, with 0.98 of the"
    with pytest.warns(UserWarning, match=rule):
        fit(sgd_module(gpt2()), BATCHES, callbacks=[TokenSchedule(10 * TOTAL)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TokenSchedule")
        fit(sgd_module(gpt2()), BATCHES, callbacks=[TokenSchedule(TOTAL)])
        fit(sgd_module(gpt2()), BATCHES, callbacks=[TokenSchedule(9 * TOTAL)], fast_dev_run=True)


def test_a_second_fit_starts_anew() -> None:
    callback = TokenSchedule(TOTAL)
    first, _ = watched(sgd_module(gpt2()), callback)
    second, _ = watched(sgd_module(gpt2()), callback)
    assert first.rates == second.rates
    assert len(second.rates) == 5


class Notes(pl.Callback):
    """Rates of this rank, as a file: the ranks are other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.watch = folder, Watch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.watch.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        tokens = [schedule_of(trainer).tokens_seen, pl_module.tokens_seen]
        notes = {"rates": self.watch.rates, "tokens": tokens, "steps": trainer.global_step}
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(notes))


class Dealt(pl.LightningDataModule):
    """Rank 0 has batches 0, 2 and 4, rank 1 batches 1, 3 and 0."""

    def train_dataloader(self) -> Any:
        dealt = [*BATCHES, BATCHES[0]][self.trainer.global_rank :: 2]  # type: ignore[union-attr]
        return torch.utils.data.DataLoader(dealt, batch_size=None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_with_unequal_counts_share_rates_and_end(tmp_path: Path, accumulate: int) -> None:
    """Forked gloo ranks."""
    counts = [COUNTS[0] + COUNTS[1], COUNTS[2] + COUNTS[3], COUNTS[4] + COUNTS[0]]
    budget = counts[0] + 1 if accumulate == 1 else counts[0] + counts[1] + 1
    callback = TokenSchedule(budget, "linear")
    trainer = pl.Trainer(
        max_epochs=9,
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, Notes(tmp_path)],
        **QUIET,
    )
    trainer.fit(sgd_module(gpt2()), Dealt())
    notes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert notes[0] == notes[1]
    windows = counts[:2] if accumulate == 1 else [counts[0] + counts[1], counts[2]]
    assert (notes[0]["tokens"], notes[0]["steps"]) == ([sum(windows)] * 2, 2)
    expected = fractions([0, windows[0]], callback)
    assert [r[0] for r in notes[0]["rates"]] == pytest.approx([0.5 * f for f in expected])


# Resume

# About 1030 targets in four epochs of the helper's data; the decay fills the second half.
WSD = {"max_tokens": 800, "schedule": "wsd", "warmup_tokens": 150, "decay_tokens": 400}
MODULES = ["gpt2, no scheduler", "hand-written, no scheduler"]


def test_state_round_trips() -> None:
    ours = TokenSchedule(100, "wsd", warmup_tokens=7)
    ours.tokens_seen, ours._window = 41, torch.tensor(3)
    state = ours.state_dict()
    restored = TokenSchedule(100, "wsd", warmup_tokens=7)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert state["tokens_seen"] == 41
    assert state["window"] == 3
    assert state["settings"] is not ours.settings


WINDOWS: dict[str, Any] = {"accumulate_grad_batches": 4}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("trainer", "module"),
    [
        pytest.param({}, MODULES[0], marks=SLOW),
        ({}, MODULES[1]),
        pytest.param(WINDOWS, MODULES[0], marks=SLOW),
        (WINDOWS, MODULES[1]),
    ],
    ids=["plain-gpt2", "plain-hand-written", "windows-gpt2", "windows-hand-written"],
)
def test_resume_from_every_batch_repeats_the_run(
    tmp_path: Path, module: str, trainer: dict[str, Any]
) -> None:
    """Saved also in the middle of a window."""
    run = Run(
        str(tmp_path),
        module=module,
        max_epochs=9,
        save_every_batch=True,
        trainer=trainer,
        callbacks={"TokenSchedule": WSD},
    )
    losses, digest = run.fit()
    written = checkpoints(run.folder)
    assert 25 <= len(losses) <= 40
    for path in written[2::4]:
        resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
        assert resumed == losses[position_of(path) :], path.name
        assert resumed_digest == digest, path.name


def test_callbacks_before_it_save_the_tokens_of_the_batch_too(tmp_path: Path) -> None:
    class First(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(sgd_module(gpt2()), BATCHES, callbacks=[First(), TokenSchedule(TOTAL)])
    for step in range(1, 6):
        state = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["callbacks"]
        assert state["TokenSchedule"]["tokens_seen"] == sum(COUNTS[:step])


def test_forgotten_tokens_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(
        str(tmp_path),
        module=MODULES[0],
        max_epochs=9,
        checkpoint=EVERY_STEP,
        callbacks={"TokenSchedule": WSD},
    )
    losses, digest = run.fit()
    path = checkpoints(run.folder)[-5]
    load = TokenSchedule.load_state_dict
    monkeypatch.setattr(
        TokenSchedule, "load_state_dict", lambda self, s: load(self, {**s, "tokens_seen": 300})
    )
    resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
    assert resumed != losses[position_of(path) :]
    assert resumed_digest != digest


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_sigkill_and_resume_is_bit_identical(tmp_path: Path, devices: int) -> None:
    """Killed while the rate falls, and continued by another process (or two)."""
    whole = Run(
        str(tmp_path / "whole"),
        module=MODULES[0],
        max_epochs=9,
        devices=devices,
        trainer={"accumulate_grad_batches": 2},
        callbacks={"TokenSchedule": WSD},
    )
    Path(whole.folder).mkdir()
    train(whole, fresh=False)
    killed = replace(whole, folder=str(tmp_path / "killed"), checkpoint=EVERY_STEP, pause_s=0.03)
    Path(killed.folder).mkdir()
    kill_when(killed, 24 // devices, fresh=False)
    path = checkpoints(killed.folder)[-1]
    saved = torch.load(path, weights_only=True)["callbacks"]["TokenSchedule"]
    assert 400 < saved["tokens_seen"] < 800
    resumed = replace(killed, name="resumed", ckpt_path=str(path), checkpoint={}, pause_s=0.0)
    train(resumed, fresh=False)
    for rank in range(devices):
        assert resumed.losses(rank) == whole.losses(rank)[position_of(path) :]
    hashes = [Path(run.folder, f"{run.name}.hash").read_text() for run in (whole, resumed)]
    assert hashes[0] == hashes[1]


def budget_run(folder: Path, name: str, **arguments: Any) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(
        str(folder),
        module=MODULES[0],
        name=name,
        max_epochs=9,
        checkpoint=EVERY_STEP,
        callbacks={"TokenSchedule": arguments},
    )


@pytest.mark.parametrize(
    "short",
    [
        {"max_tokens": 300, "schedule": "constant"},
        pytest.param({"max_tokens": 500, "schedule": "wsd"}, marks=SLOW),
    ],
    ids=["from-constant", "from-wsd"],
)
def test_a_run_is_prolonged_until_its_decay_begins(tmp_path: Path, short: dict[str, Any]) -> None:
    """Ends (or is taken up before its decay) at 300-450 tokens, and continues as if it had been
    planned as long from the start."""
    long = {"max_tokens": 700, "schedule": "wsd", "decay_tokens": 200}
    whole = budget_run(tmp_path / "long", "whole", **long)
    losses, digest = whole.fit()
    first = budget_run(tmp_path / "short", "first", **short)
    first.fit()
    steady = [
        path
        for path in checkpoints(first.folder)
        if torch.load(path)["callbacks"]["TokenSchedule"]["tokens_seen"] <= 450
    ]
    resumed = budget_run(tmp_path / "resumed", "second", **long)
    Path(resumed.folder, "second.0").touch()
    resumed_losses, resumed_digest = replace(resumed, ckpt_path=str(steady[-1])).fit()
    assert resumed_losses == losses[position_of(steady[-1]) :]
    assert resumed_digest == digest


@pytest.mark.parametrize(
    ("then", "now", "rule"),
    [
        (
            {"schedule": "cosine"},
            {"max_tokens": 600, "schedule": "cosine"},
            r"max_tokens=600\): the checkpoint was written with 300, and after \d+ tokens the"
            r" learning rate would jump from 0.1 to 0.\d+ of its peak\. Resume from a checkpoint"
            r" before the decay began",
        ),
        (
            {"schedule": "wsd"},
            {"max_tokens": 600, "schedule": "wsd"},
            r"max_tokens=600\): the checkpoint was written with 300, .* from 0.1 to 1 of",
        ),
        (
            {"schedule": "cosine", "stop": False},
            {"max_tokens": 300, "schedule": "linear", "min_lr_ratio": 0.0},
            r"schedule='linear'\): the checkpoint was written with 'cosine'",
        ),
    ],
)
def test_a_resume_at_which_the_rate_would_jump_is_refused(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], rule: str
) -> None:
    first = replace(budget_run(tmp_path, "first", max_tokens=300, **then), max_epochs=2)
    first.fit()
    second = replace(
        first,
        name="second",
        ckpt_path=str(checkpoints(first.folder)[-1]),
        callbacks={"TokenSchedule": now},
        checkpoint={},
        max_epochs=3,
    )
    with pytest.raises(ValueError, match=rf"^TokenSchedule\({rule}"):
        second.fit()
    assert not Path(second.folder, "second.0").exists()


def test_finished_run_resumed_with_the_same_budget_trains_no_further(tmp_path: Path) -> None:
    first = budget_run(tmp_path, "first", max_tokens=200)
    _, digest = first.fit()
    again = replace(first, name="again", ckpt_path=str(checkpoints(first.folder)[-1]))
    Path(again.folder, "again.0").touch()
    losses, again_digest = again.fit()
    assert losses == []
    assert again_digest == digest


def test_checkpoint_without_a_schedule_continues_our_modules_count(tmp_path: Path) -> None:
    """The first epoch ran without the callback; its tokens are known to the module."""
    module = sgd_module(gpt2())
    trainer = fit(module, BATCHES)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = TokenSchedule(2 * TOTAL, "linear")
    again, watch = sgd_module(gpt2()), Watch()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        **QUIET,
        callbacks=[callback, watch],
    )
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer.fit(again, loader, ckpt_path=tmp_path / "first.ckpt")
    starts = [TOTAL + sum(COUNTS[:i]) for i in range(5)]
    expected = [0.5 * f for f in fractions(starts, callback)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected)


def test_checkpoint_without_any_count_is_refused(tmp_path: Path) -> None:
    trainer = fit(HandWritten(scheduler=False), BATCHES)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        **QUIET,
        callbacks=[TokenSchedule(9)],
    )
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    with pytest.raises(ValueError, match=r"max_tokens=9\): the checkpoint is of step 5 and does"):
        trainer.fit(HandWritten(scheduler=False), loader, ckpt_path=tmp_path / "first.ckpt")


# Counting


def test_counts_what_a_batch_teaches() -> None:
    callback = TokenSchedule(1)
    labels = torch.tensor([[5, -100, 6, 7], [8, 9, -100, -100]])
    ids = torch.zeros(2, 4, dtype=torch.long)
    # The first label of a row is predicted by nothing: 6 and 7, and 9, are left.
    assert callback.count_tokens({"input_ids": ids, "labels": labels}) == 3
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    assert callback.count_tokens({"input_ids": ids, "completion_mask": mask}) == 3
    assert callback.count_tokens({"input_ids": ids}) == 8
    assert callback.count_tokens(BatchEncoding({"input_ids": ids})) == 8


class Bytes(TokenSchedule):
    """A user's own idea of a token."""

    def count_tokens(self, batch: Any) -> int:
        return 10


def test_own_count_takes_the_place_of_ours() -> None:
    callback = Bytes(30, "constant")
    _, trainer = watched(sgd_module(gpt2()), callback)
    assert (trainer.global_step, callback.tokens_seen) == (3, 30)


@pytest.mark.parametrize(
    ("batch", "held"),
    [
        ([torch.zeros(2, 4), torch.zeros(2)], r"\[Tensor \(2, 4\), Tensor \(2,\)\]"),
        ({"pixels": torch.zeros(2, 3)}, r"\{pixels: Tensor \(2, 3\)\}"),
        ({"pixels": torch.zeros(2, 3), "labels": torch.zeros(2)}, "labels: Tensor"),
    ],
)
def test_batch_without_tokens_is_refused_before_a_step(batch: Any, held: str) -> None:
    module = HandWritten(scheduler=False)
    rule = rf"^TokenSchedule\(batch='.*{held}.*must hold labels.*override count_tokens\(batch\)"
    with pytest.raises(ValueError, match=rule):
        fit(module, [batch], callbacks=[TokenSchedule(9)])
    assert module.trainer.global_step == 0


# Bad input


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"max_tokens": 0}, r"max_tokens=0\): must be at least 1"),
        ({"max_tokens": -5}, r"max_tokens=-5\): must be at least 1"),
        ({"schedule": "cos"}, r"schedule='cos'\): must be one of \['constant', 'cosine', 'linear'"),
        ({"warmup_tokens": -1}, r"warmup_tokens=-1\): must not be negative"),
        ({"max_tokens": float("inf")}, r"max_tokens=inf\): must be a whole number"),
        ({"warmup_tokens": float("nan")}, r"warmup_tokens=nan\): must be a whole number"),
        (
            {"decay_tokens": -float("inf"), "schedule": "wsd"},
            r"decay_tokens=-inf\): must be a whole number",
        ),
        ({"warmup_tokens": 101}, r"max_tokens=100\): is less than .* together, 101 \+ 0 tokens"),
        ({"schedule": "wsd", "warmup_tokens": 95}, r"max_tokens=100\): is less than .* 95 \+ 10"),
        ({"schedule": "wsd", "decay_tokens": 101}, r"max_tokens=100\): is less than .* 0 \+ 101"),
        ({"schedule": "wsd", "decay_tokens": 0}, r"decay_tokens=0\): must be at least 1"),
        ({"schedule": "wsd", "decay_type": "exp"}, r"decay_type='exp'\): must be one of"),
        ({"decay_tokens": 5}, r"decay_tokens=5\): belongs to schedule='wsd', and this is 'cosine'"),
        ({"decay_type": "linear"}, r"decay_type='linear'\): belongs to schedule='wsd'"),
        ({"min_lr_ratio": -0.1}, r"min_lr_ratio=-0.1\): must be in \[0, 1\]"),
        ({"min_lr_ratio": 1.1}, r"min_lr_ratio=1.1\): must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^TokenSchedule\({rule}"):
        TokenSchedule(**{"max_tokens": 100, **arguments})


@pytest.mark.parametrize("own", [True, False], ids=["ours", "hand-written"])
def test_a_second_scheduler_is_refused_before_training(own: bool) -> None:
    module = HandWritten()
    if own:
        scheduler = torch.optim.lr_scheduler.ExponentialLR
        module = sgd_module(lr_scheduler=lambda optimizer: scheduler(optimizer, 0.9))
    name = type(module).__name__
    rule = rf"{name} has the scheduler ExponentialLR.*Leave lr_scheduler out of the module, or"
    with pytest.raises(ValueError, match=rf"^TokenSchedule\(schedule='cosine'\): {rule}"):
        fit(module, BATCHES, callbacks=[TokenSchedule(9)])
    assert module.trainer.global_step == 0


def test_arguments_come_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TokenSchedule, "schedule")
    parsed = parser.parse_string(
        """
        schedule:
          max_tokens: 1_000_000
          schedule: wsd
          warmup_tokens: 10_000
        """
    )
    settings = parser.instantiate_classes(parsed).schedule.settings
    assert settings["max_tokens"] == 1_000_000
    assert settings["decay_tokens"] == 100_000
