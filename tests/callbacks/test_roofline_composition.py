"""RooflineMonitor with strategies, objectives, optimizers and settings: FLOPs are those of what is
computed, and weights are those of a run without it."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_align as la
from lightning_align import LISA, Curriculum, DPOModule, PretrainModule
from lightning_align.planner import analyze_step
from lightning_align.planner.report import StepReport
from tests.callbacks.test_roofline import FORWARD, Analyses, fit
from tests.helpers.offloaded import small
from tests.helpers.pipelines import Batches, Run
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.recorder import trainer as quiet_trainer
from tests.helpers.resume import HandWritten, SequenceData, weights_hash
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import llama, rows

BATCHES = [rows(*range(i, i + 4)) for i in range(8)]
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def pretrain(**options: Any) -> PretrainModule:
    pl.seed_everything(3, verbose=False)
    return PretrainModule(llama(), **{"optimizer": ADAMW, **options})


def trained(folder: Path, module: Any, batches: Any, *callbacks: Any, **options: Any) -> Any:
    """A run of few steps; its Trainer."""
    pl.seed_everything(5, verbose=False)
    options = {
        "max_steps": -1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = quiet_trainer(str(folder), callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def both(folder: Path, build: Any, batches: Any, **options: Any) -> Analyses:
    """A run with each step analysed, and one without: the same bits."""
    seen = Analyses(every_n_steps=1)
    extra = options.pop("callbacks", list)
    hashes = []
    for monitors in ([seen], []):
        pl.seed_everything(3, verbose=False)
        module = build()
        trained(folder, module, batches, *extra(), *monitors, **options)
        hashes.append(weights_hash(module))
    assert hashes[0] == hashes[1]
    assert seen.found
    return seen


def alone(module: Any, batch: Any) -> StepReport:
    """Forward and backward of a batch without a Trainer."""
    return analyze_step(module, lambda: module.training_step(batch, 0))


def flops(report: StepReport | None, phase: str) -> int:
    assert report is not None
    return report.phases[phase].flops


# Strategies


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero_infinity"])
def test_two_ranks_learn_from_the_tokens_of_both(tmp_path: Path, name: str) -> None:
    def run(rank: int) -> Any:
        hashes, seen = [], Analyses(every_n_steps=2)
        for callbacks in ([seen], []):
            pl.seed_everything(5, verbose=False)
            strategy = "ddp" if name == "ddp" else small(overwrite=True)
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=2,
                strategy=strategy,
                plugins=[ForkedRanks(rank, 2)],
                default_root_dir=str(tmp_path / str(bool(callbacks))),
                callbacks=callbacks,
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                limit_train_batches=5,
                log_every_n_steps=5,
            )
            module = HandWritten()
            trainer.fit(module, SequenceData())
            state = trainer.strategy.lightning_module_state_dict()
            hashes.append({name: value.sum().item() for name, value in state.items()})
        step_s = seen.values["step_s"]
        # Steps 3 and 5: the first makes states, the second and the fourth are analysed.
        learned = seen.values["tokens_per_s"] * 2 * step_s
        return hashes, seen.found, learned, seen.values["mfu"] * step_s

    for (ours, theirs), found, learned, done in run_ranks(run):
        assert ours == theirs
        assert found == [(2, 3 * FORWARD), (4, 3 * FORWARD)]
        assert learned == pytest.approx(2 * (4 + 3) * 13)  # the last batch is smaller
        assert done == pytest.approx(3 * FORWARD / 1e9)  # of one device


PIPELINE: dict[str, Any] = {
    "strategy": {"num_microbatches": 4},
    "steps": 6,
    "data": {"masked": False},
}


@pytest.mark.slow
def test_stages_of_a_pipeline_are_one_step_in_one_table(tmp_path: Path) -> None:
    """Micro-batches come to the FLOPs of the batch; comparing them with it is no part of a step."""

    def run(rank: int) -> Any:
        seen = Analyses(every_n_steps=1)
        options = {**PIPELINE, "accumulate": 2}
        results = []
        for callbacks in ((), (lambda: seen,)):
            fits = Run(**options, callbacks=callbacks, trainer={"default_root_dir": str(tmp_path)})
            results.append(fits.fit(rank)["losses"])
        works = seen._works
        assert results[0] == results[1]
        return seen.values, works, seen.found, [a.name for a in seen.advice]

    batch = Batches(1, masked=False)[0]
    module = Run().module()
    whole = analyze_step(module, lambda: module.loss(batch))
    first, second = run_ranks(run)
    for values, works, found, advice in (first, second):
        assert sum(work.model_flops for work in works) == 2 * whole.model_flops
        assert all(work.model_flops for work in works)
        assert [step for step, _ in found] == [2, 3]
        done = values["mfu"] * values["step_s"] if values else None
        assert done is None or done == pytest.approx(whole.model_flops / 1e9)
        assert "larger micro-batch" not in advice
    assert first[1] == second[1]
    assert first[3] == second[3]
    lines = (tmp_path / "roofline.jsonl").read_text().splitlines()
    modules = [line for line in lines if '"rank": 1' in line]
    assert any('"module": "head"' in line for line in modules)


@pytest.mark.slow
def test_under_a_pipeline_time_goes_to_backward_and_waiting_too(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        seen = Analyses(every_n_steps=100)
        Run(
            **PIPELINE,
            callbacks=(lambda: seen,),
            trainer={"default_root_dir": str(tmp_path)},
        ).fit(rank)
        return seen.values

    for values in run_ranks(run):
        assert values["backward_share"] > 0
        assert values["waiting_share"] > 0
        assert sum(v for k, v in values.items() if k.endswith("_share")) == pytest.approx(1)


@pytest.mark.slow
def test_values_that_come_from_a_drive_are_waited_for(tmp_path: Path) -> None:
    def build() -> Any:
        return pretrain()

    seen = Analyses(every_n_steps=2)
    ours, theirs = build(), build()
    run = trained(
        tmp_path, ours, BATCHES, seen, strategy=small(overwrite=True), log_every_n_steps=8
    )
    state = run.strategy.lightning_module_state_dict()
    run.strategy.close()
    trained(tmp_path, theirs, BATCHES)
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    assert seen.found[0][1] == alone(pretrain(), BATCHES[1]).total_flops
    assert seen.values["waiting_share"] >= 0
    assert seen.values["commit_share"] > 0


# Objectives and optimizers


@pytest.mark.slow
def test_policy_and_reference_of_pairs_are_counted(tmp_path: Path) -> None:
    def build(**options: Any) -> DPOModule:
        pl.seed_everything(3, verbose=False)
        return DPOModule(llama(), **{"optimizer": ADAMW, "prefix_sharing": False, **options})

    batches = [pairs(i, i + 1, i + 2) for i in range(6)]
    seen = Analyses(every_n_steps=3)
    trained(tmp_path, build(), batches, seen, log_every_n_steps=6)
    free = Analyses(every_n_steps=3)
    trained(tmp_path, build(loss_type="simpo"), batches, free)
    expected = alone(build(), batches[1])
    assert seen.found[0] == (2, expected.total_flops)
    assert flops(seen.report, "forward") > 1.5 * flops(free.report, "forward")
    assert flops(seen.report, "backward") == flops(free.report, "backward")
    # Of 6 steps the first, and 2 and 5, which are analysed, are not timed.
    assert seen.values["pairs_per_s"] * 3 * seen.values["step_s"] == pytest.approx(3 * 3)
    both(tmp_path, build, batches)
    both(tmp_path, partial(build, prefix_sharing=True), batches)  # whose attention is its own


@pytest.mark.slow
def test_each_draw_of_lisa_is_analysed(tmp_path: Path) -> None:
    class Trained(Analyses):
        """Notes which blocks have gradients of weights."""

        def _finish_analysis(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super()._finish_analysis(trainer, pl_module)
            assert self.report is not None
            blocks = {name.split(".")[-1]: cost.flops for name, cost in self.report.blocks.items()}
            self.blocks = [*getattr(self, "blocks", []), (trainer.global_step, blocks)]

    lisa = LISA(activated_layers=1, interval_steps=3, seed=0)
    seen = Trained(every_n_steps=10)
    trained(tmp_path, pretrain(), BATCHES, lisa, seen)
    assert [step for step, _ in seen.blocks] == [
        2,
        5,
        8,
    ]  # of each draw, when states have been made
    for step, blocks in seen.blocks:
        (drawn,) = lisa.schedule(step - 1)
        others = [cost for name, cost in blocks.items() if name != str(drawn)]
        assert blocks[str(drawn)] > max(others)
    both(
        tmp_path,
        pretrain,
        BATCHES,
        callbacks=lambda: [LISA(activated_layers=1, interval_steps=2, seed=0)],
    )


@pytest.mark.slow
def test_refreshes_of_galore_are_a_part_of_their_steps(tmp_path: Path) -> None:
    galore = partial(la.GaLoreAdamW, lr=1e-2, rank=4, update_proj_gap=3, stagger=False)

    class Updates(Analyses):
        def _finish_analysis(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super()._finish_analysis(trainer, pl_module)
            assert self.report is not None
            cost = self.report.phases["optimizer"]
            self.updates = [*getattr(self, "updates", []), (trainer.global_step, cost.calls)]

    seen = Updates(every_n_steps=1)
    trained(tmp_path, pretrain(optimizer=galore), BATCHES, seen)
    usual = min(calls for _, calls in seen.updates)
    assert [step for step, calls in seen.updates if calls > 2 * usual] == [4, 7]
    both(tmp_path, lambda: pretrain(optimizer=galore), BATCHES)


@pytest.mark.slow
def test_products_of_muon_are_no_flops_of_the_model(tmp_path: Path) -> None:
    muon = partial(la.Muon, lr=1e-2)
    seen = both(tmp_path, lambda: pretrain(optimizer=muon), BATCHES)
    assert flops(seen.report, "optimizer") > 0
    assert seen.report is not None
    assert seen.report.model_flops == alone(pretrain(), BATCHES[-1]).model_flops


# Settings


class Validates(HandWritten):
    """Notes whether the clock runs while it validates."""

    callback: Any = None

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.parts = {*getattr(self, "parts", ()), self.callback._clock.part}
        super().validation_step(batch, batch_idx)


def test_validation_between_steps_counts_for_nothing(tmp_path: Path) -> None:
    module = Validates()
    module.callback = seen = Analyses(every_n_steps=2)
    fit(tmp_path, seen, module=module, max_epochs=1, val_check_interval=2, limit_val_batches=2)
    assert module.parts == {None}
    assert [step for step, _ in seen.found] == [2, 4, 6, 8, 10]
    assert {flops for _, flops in seen.found[:-1]} == {3 * FORWARD}  # the last batch is of 2 rows


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["module", "part"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_is_analysed_as_it_was_written(tmp_path: Path, whole: bool) -> None:
    module = HandWritten()
    if whole:
        compiled: Any = torch.compile(module, backend="eager")
    else:
        module.head = torch.compile(module.head, backend="eager")  # type: ignore[assignment]
        compiled = module
    seen = Analyses(every_n_steps=4)
    fit(tmp_path, seen, module=compiled, max_epochs=1)
    assert [step for step, _ in seen.found] == [2, 6, 10]
    assert {flops for _, flops in seen.found[:-1]} == {3 * FORWARD}


@pytest.mark.slow
def test_in_mixed_precision_products_are_of_16_bits(tmp_path: Path) -> None:
    seen = both(tmp_path, HandWritten, BATCHES, precision="bf16-mixed", limit_train_batches=4)
    assert seen.report is not None
    products = [r for r in seen.report.trace.records if r.flops]
    assert {str(record.dtype) for record in products} == {"torch.bfloat16"}
    assert seen.found[-1][1] == 3 * FORWARD


@pytest.mark.slow
def test_rows_that_grow_are_analysed_anew(tmp_path: Path) -> None:
    steps = {"total_curriculum_step": 6, "difficulty_step": 4}
    scheduler = {"min_difficulty": 4, "max_difficulty": 12, "schedule_type": "fixed_linear"}
    growing = {"mode": "truncate", "scheduler": {**scheduler, "schedule_config": steps}}
    seen = Analyses(every_n_steps=10)
    curriculum = Curriculum(length=growing, filename=None)
    fit(tmp_path, curriculum, seen, module=pretrain(), max_epochs=1)
    work = [flops for _, flops in seen.found]
    assert len(work) >= 3
    assert work == sorted(work)
    assert len(set(work)) == len(work)
