"""Our modules under ModelParallelStrategy; see tests/laws/test_fully_sharded.py, too."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_align import GaLoreAdamW, PretrainModule, SavePretrained
from lightning_align._compat.lightning_trainer import all_ranks_for_data
from lightning_align.models.trained import load_trained
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.randint(VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))


def loader(rows: torch.Tensor) -> DataLoader[Any]:
    return DataLoader([{"input_ids": rows, "labels": rows}] * 2, batch_size=None)


def module_of(name: str = "llama") -> PretrainModule:
    return PretrainModule(TINY_MODELS[name](), optimizer=partial(torch.optim.SGD, lr=0.1))


def trainer_of(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **{**quiet, **options},
    )


def on_ranks(rank: int, **options: Any) -> pl.Trainer:
    strategy = options.pop("strategy", None) or ModelParallelStrategy()
    return trainer_of(devices=2, strategy=strategy, plugins=[ForkedRanks(rank, 2)], **options)


def test_fit_evaluate_and_save_as_one_process_does(tmp_path: Path) -> None:
    def on_a_rank(rank: int) -> tuple[dict[str, float], float, torch.Tensor]:
        own = IDS[2 * rank : 2 * rank + 2]
        module = module_of()
        trainer = on_ranks(rank, callbacks=[SavePretrained(str(tmp_path / "callback"))])
        trainer.fit(module, loader(own), loader(own))
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        module.save_pretrained(str(tmp_path / "method"))
        trainer.save_checkpoint(tmp_path / "parts.ckpt")
        (tested,) = trainer.test(module, loader(own), verbose=False)
        (scores,) = trainer.predict(module, loader(own))[:1]
        return logged, tested["test_loss"], scores

    ours = run_ranks(on_a_rank, timeout_s=120)
    module = module_of()
    trainer = trainer_of(devices=1)
    trainer.fit(module, loader(IDS), loader(IDS))
    theirs = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(module, loader(IDS), verbose=False)
    (scores, *_) = trainer.predict(module, loader(IDS))
    for logged, test_loss, _ in ours:
        for name in ("train_loss", "val_loss", "grad_norm", "tokens_seen"):
            # fp32 sums in another order
            assert logged[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert test_loss == pytest.approx(tested["test_loss"], rel=1e-5)
    torch.testing.assert_close(torch.cat([ours[0][2], ours[1][2]]), scores, rtol=1e-5, atol=1e-5)
    parts = load_trained(tmp_path / "parts.ckpt", where="T", model=tmp_path / "method")
    parts.model.save_pretrained(tmp_path / "parts")
    for folder in ("callback", "method", "parts"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        with torch.no_grad():
            logits, expected = model(IDS).logits, module.model.eval()(IDS).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


class Losses(pl.Callback):
    """The loss of each batch, on this rank."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        pytest.param("gpt2", "32-true", 1e-5, id="gpt2"),  # fp32 sums in another order
        pytest.param("llama", "32-true", 1e-5, id="llama"),
        pytest.param("llama", "bf16-mixed", 1e-2, id="llama-bf16"),  # bf16 has 8 bits
    ],
)
def test_galore_trains_families_and_precisions_with_clipping(
    name: str, precision: Any, tolerance: float
) -> None:
    batches = [{"input_ids": rows, "labels": rows} for rows in (IDS, IDS.flip(1)) * 3]

    def losses(trainer: Any, own: slice, **options: Any) -> list[float]:
        recorder = Losses()
        optimizer = partial(GaLoreAdamW, lr=0.02, rank=2, update_proj_gap=2)
        module = PretrainModule(TINY_MODELS[name](), optimizer=optimizer)
        parts = [{key: rows[own] for key, rows in batch.items()} for batch in batches]
        options |= {"precision": precision, "gradient_clip_val": 0.5, "callbacks": [recorder]}
        trainer(**options).fit(module, DataLoader(parts, batch_size=None))
        return recorder.losses

    ours = run_ranks(
        lambda rank: losses(partial(on_ranks, rank), slice(2 * rank, 2 * rank + 2)), timeout_s=120
    )
    theirs = losses(trainer_of, slice(None), devices=1)
    assert theirs[-1] < 0.9 * theirs[0]
    assert list(map(sum, zip(*ours, strict=True))) == pytest.approx(theirs, rel=tolerance)


def test_what_cannot_be_sharded_is_refused_at_set_up() -> None:
    class Extended(PretrainModule):
        def __init__(self) -> None:
            super().__init__(TINY_MODELS["llama"]())
            self.own_head = nn.Linear(2, 2)

    def refused(rank: int, module: PretrainModule, rule: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=rule):
            on_ranks(rank, **options).fit(module, loader(IDS))

    def on_a_rank(rank: int) -> None:
        rule = r"^Extended\(strategy='ModelParallelStrategy'\): .*'own_head\.weight' is outside"
        refused(rank, Extended(), rule)
        rule = r"^PretrainModule\(callbacks='EMAWeightAveraging'\): it keeps a copy of the module"
        refused(rank, module_of(), rule, callbacks=[EMAWeightAveraging()])
        rule = r"^ModelParallelStrategy\(tensor_parallel_size=2\): no layer is divided"
        divided = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        refused(rank, module_of(), rule, strategy=divided)
        module = module_of()
        on_ranks(rank).fit(module, loader(IDS))
        with pytest.raises(ValueError, match="the module is sharded, by an earlier run"):
            trainer_of(devices=1).fit(module, loader(IDS))

    run_ranks(on_a_rank, timeout_s=120)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_flatten_parameters_are_refused(strategy: Any) -> None:
    module, trainer = module_of(), trainer_of()
    trainer.strategy.__class__ = strategy  # Lightning builds them on GPUs only
    module.trainer = trainer
    rule = rf"^PretrainModule\(strategy='{strategy.__name__}'\): it flattens .*Use ModelParallel"
    with pytest.raises(ValueError, match=rule):
        module.setup("fit")


def test_automatic_sizes_give_each_rank_batches_of_its_own() -> None:
    sizes = {
        ("auto", "auto"): (8, 1),
        (8, "auto"): (8, 1),
        ("auto", 2): ("auto", 2),
        (4, 2): (4, 2),
    }
    for given, expected in sizes.items():
        strategy = ModelParallelStrategy(*given)
        strategy.num_nodes, strategy.parallel_devices = 2, [torch.device("cpu")] * 4
        all_ranks_for_data(strategy)
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == expected


def test_under_other_strategies_nothing_is_overridden() -> None:
    """Callbacks that average weights warn of every module that overrides ``configure_model``."""
    module = module_of()
    trainer_of(devices=1).fit(module, loader(IDS))
    assert not is_overridden("configure_model", module)
