"""Order, size and corpora of batches: handed to a datamodule, told beforehand, refused where they
do not fit."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import Curriculum, TextDataModule
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.data.sampler import PositionSampler
from tests.data.test_deepspeed_index import write_items
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.curriculum import Watch, by_length, linear
from tests.modules.test_pretrain import gpt2, sgd_module

BLOCK, BATCH = 12, 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, letter in (("one", "a"), ("other", "b")):
        lines = [json.dumps({"text": letter * 11}) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def data(texts: Path, weights: bool = False, **options: Any) -> TextDataModule:
    paths: Any = [str(texts / "one.jsonl"), str(texts / "other.jsonl")]
    return TextDataModule(
        dict.fromkeys(paths, 1.0) if weights else paths,
        ByteTokenizer(61 + 256),
        **{"block_size": BLOCK, "batch_size": BATCH, "val_fraction": 0.0, **options},
        cache_dir=texts / "cache",
    )


class Indices(pl.Callback):
    """Which samples each batch has, as the sampler's list of them."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        taken, found = trainer.datamodule.train_dataset, self

        class Noted:
            def __len__(self) -> int:
                return len(taken)

            def __getitem__(self, indices: Any) -> Any:
                found.batches.append(list(indices))
                return taken[indices]

        trainer.datamodule.train_dataset = Noted()


def train(
    curriculum: Curriculum | None, module: TextDataModule, *callbacks: pl.Callback, **options: Any
) -> tuple[Watch, pl.Trainer]:
    watch = Watch()
    ckpt_path = options.pop("ckpt_path", None)
    own = [curriculum] if curriculum else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.pop("max_steps", 8),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        callbacks=[*own, *callbacks, watch],
        **options,
    )
    config = gpt2(0.1)
    config.vocab_size = 61 + 256
    trainer.fit(sgd_module(config), module, ckpt_path=ckpt_path)
    return watch, trainer


def samples_of(module: TextDataModule) -> int:
    module.setup()
    assert module.train_dataset is not None
    return len(module.train_dataset)


def easy(num_samples: int) -> list[int]:
    """Samples of even numbers first."""
    return [1 + (sample % 2) + sample // 20 for sample in range(num_samples)]


def test_an_order_decides_which_samples_come_and_preview_tells(texts: Path) -> None:
    module = data(texts)
    values = easy(samples_of(module))
    scheduler = linear(total=6, least=1, most=max(values), each=1)
    order = {"difficulties": values, "scheduler": scheduler}
    curriculum, indices = Curriculum(order=order, filename=None), Indices()
    before = curriculum.preview(range(8))
    _, trainer = train(curriculum, module, indices)
    assert isinstance(module.train_sampler, CurriculumSampler)
    for n, batch in enumerate(indices.batches):
        allowed = before[n]["difficulty"]["difficulty"]
        assert max(values[sample] for sample in batch) <= allowed
        eligible = sum(value <= allowed for value in values)
        assert before[n]["eligible"] == pytest.approx(eligible / len(values))
    now = curriculum.preview(range(8))
    assert [row["difficulty"] for row in now] == [row["difficulty"] for row in before]
    assert [row["batch_size"] for row in now] == [BATCH] * 8
    assert trainer.callback_metrics["curriculum/difficulty/difficulty"] == max(values)
    assert trainer.callback_metrics["curriculum/eligible"] == 1.0
    assert train(None, module)[1].datamodule.train_sampler.order is not None
    assert type(module.train_sampler) is PositionSampler, "another Trainer knows of none"


def growing(*sizes: int) -> dict[str, Any]:
    return {
        "min_difficulty": sizes[0],
        "max_difficulty": sizes[-1],
        "schedule_type": "fixed_discrete",
        "schedule_config": {
            "difficulty": list(sizes),
            "max_step": [2 * n for n in range(1, len(sizes))],
        },
    }


def test_batches_grow_and_no_sample_is_left_out(texts: Path) -> None:
    module, indices = data(texts), Indices()
    curriculum = Curriculum(batch_size={"scheduler": growing(1, 2, 4)}, filename=None)
    watch, trainer = train(curriculum, module, indices)
    rows = [len(labels) for _, labels in sorted(watch.trained.items())]
    assert rows == [1, 1, 2, 2, 4, 4, 4, 4]
    seen = [sample for batch in indices.batches for sample in batch]
    assert len(seen) == len({*seen}) == 22
    assert trainer.callback_metrics["curriculum/batch_size"] == 4


@pytest.mark.slow
def test_the_largest_batch_goes_first(texts: Path) -> None:
    tried: list[Any] = []

    class Sees(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            step = pl_module.training_step

            def noted(batch: Any, batch_idx: int) -> Any:
                tried.append(tuple(batch["labels"].shape))
                return step(batch, batch_idx)

            pl_module.training_step = noted

    def curriculum(preflight: bool) -> Curriculum:
        return Curriculum(
            batch_size={"scheduler": growing(1, 4)},
            length={"mode": "truncate", "scheduler": linear()},
            preflight=preflight,
            filename=None,
        )

    ours, _ = train(curriculum(True), data(texts), Sees())
    assert tried[:3] == [(4, 13), (1, 4), (1, 7)]
    assert ours.losses == train(curriculum(False), data(texts))[0].losses


@pytest.mark.slow
def test_truncated_rows_leave_room_for_more_of_them(texts: Path) -> None:
    curriculum = Curriculum(
        length={"mode": "truncate", "scheduler": linear()},
        batch_size={"constant_tokens": True},
        filename=None,
    )
    watch, _ = train(curriculum, data(texts))
    shapes = [tuple(labels.shape) for _, labels in sorted(watch.trained.items())]
    assert shapes == [(16, 4), *[(8, 7)] * 2, *[(5, 10)] * 2, *[(4, 13)] * 3]
    rows = curriculum.preview(range(3))
    assert [row["tokens"] for row in rows] == [0, 48, 96]


def test_weights_of_corpora_change_over_time(texts: Path) -> None:
    module, indices = data(texts, weights=True), Indices()
    one, other = module.paths
    mixture = {"steps": [0, 4], "weights": {other: [0, 1], one: [1, 0]}}
    curriculum = Curriculum(mixture=mixture, filename=None)
    planned: dict[int, str | None] = {}

    class Asks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            planned.update({n: curriculum.planned_change(n) for n in range(8)})

    train(curriculum, module, indices, Asks())
    first = module.corpora[one]
    of_one = [sum(sample < first for sample in batch) for batch in indices.batches]
    assert of_one == [4, 4, 4, 4, 0, 0, 0, 0]
    assert curriculum.preview([5])[0]["weights"] == {one: 0.0, other: 1.0}
    assert {n: each for n, each in planned.items() if each} == {
        4: "Curriculum: other weights of corpora"
    }


def test_a_resume_goes_on_and_another_stream_is_refused(texts: Path, tmp_path: Path) -> None:
    values = easy(samples_of(data(texts)))

    def curriculum(total: int = 6) -> Curriculum:
        scheduler = linear(total=total, least=1, most=max(values), each=1)
        order = {"difficulties": values, "scheduler": scheduler}
        size = {"scheduler": growing(2, 4)}
        return Curriculum(order=order, batch_size=size, filename=None)

    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = train(curriculum(), data(texts), saving)
    path = str(tmp_path / "step=3.ckpt")
    resumed, _ = train(curriculum(), data(texts), ckpt_path=path)
    assert resumed.losses == {n: loss for n, loss in whole.losses.items() if n > 3}
    for other in (curriculum(total=9), None, Curriculum(batch_size={"scheduler": growing(2, 4)})):
        with pytest.raises(ValueError, match=r"TextDataModule\(curriculum="):
            train(other, data(texts), ckpt_path=path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mapping": ({"order": 3}, r"order=3\): must be a mapping"),
    "an unknown key": ({"batch_size": {"schedule": {}}}, "knows scheduler, constant_tokens"),
    "no scheduler": ({"order": {"difficulties": [1, 2]}}, "needs scheduler"),
    "nothing of a batch": ({"batch_size": {}}, "needs one of scheduler and constant_tokens"),
    "a false constant": ({"batch_size": {"constant_tokens": False}}, "must be one of True"),
    "order and mixture": (
        {
            "order": {"difficulties": [1, 2], "scheduler": linear()},
            "mixture": {"steps": [0], "weights": {}},
        },
        "Order the samples of all corpora by one index",
    ),
    "no such index": (
        {"order": {"difficulties": "nowhere", "scheduler": linear()}},
        r"order.difficulties='nowhere'\): is no usable difficulty index",
    ),
    "NaN": (
        {"order": {"difficulties": [1.0, float("nan")], "scheduler": linear()}},
        "finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Curriculum(**arguments)


def test_what_the_data_cannot_follow_is_refused_before_training(texts: Path) -> None:
    module = data(texts)
    count = samples_of(module)

    def refused(message: str, weights: bool = False, **parts: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train(Curriculum(**parts, filename=None), data(texts, weights))

    def order(values: Any, **keys: Any) -> dict[str, Any]:
        return {"difficulties": values, "scheduler": linear(least=1, most=9, each=1), **keys}

    refused("samples, and there are", order=order(easy(count)[:-1]))
    stale = DifficultyIndex.of_values(easy(count))
    object.__setattr__(stale, "fingerprint", "of yesterday")
    refused("is of other data: of 'of yesterday'", order=order(stale))
    refused("all samples are equally difficult", order=order([3] * count))
    refused("no sample is eligible|the least is 7", order=order(np.arange(count) + 7))
    refused("mixes corpora by weight", True, order=order(easy(count)))
    refused("must be the last of the sizes", batch_size={"scheduler": growing(1, 2)})
    refused("needs length with mode='truncate'", batch_size={"constant_tokens": True})
    mixture = {"steps": [0], "weights": {"here": [1]}}
    refused("has no corpora with weights", mixture=mixture)
    refused("must be by the datamodule's paths", True, mixture=mixture)
    size = Curriculum(batch_size={"scheduler": growing(1, 4)}, filename=None)
    with pytest.raises(ValueError, match="there is no datamodule that follows one"):
        pl.Trainer(
            accelerator="cpu", callbacks=[size], logger=False, enable_checkpointing=False
        ).fit(sgd_module(gpt2()), torch.utils.data.DataLoader([1]))
    assert by_length().preview([0]) == [{"batch": 0, "length": 3, "tokens": None}]


def of_deepspeed(texts: Path, values: "np.ndarray[Any, Any]", **options: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed's, and the index that it names."""
    index = DifficultyIndex.of_values(values)
    lists = [index.samples(level) for level in range(len(index.levels))]
    write_items(texts / "length_index_to_sample", lists, np.int64)
    write_items(texts / "length_index_to_metric", index.levels[:, None], np.int64)
    metric = {
        "index_to_sample_path": str(texts / "length_index_to_sample"),
        "index_to_metric_path": str(texts / "length_index_to_metric"),
        "difficulty_type": "value",
        **linear(8, 5, 40, 5),
    }
    learning = {"enabled": True, "curriculum_metrics": {"length": metric}}
    sampling = {"enabled": True, "curriculum_learning": learning}
    return {"data_efficiency": {"enabled": True, "data_sampling": sampling, **options}}


def test_a_configuration_of_deepspeed_orders_samples(texts: Path) -> None:
    module = data(texts)
    values = 1 + np.arange(samples_of(module)) % 40
    config = of_deepspeed(texts, values, seed=7)
    with pytest.warns(UserWarning, match="is not kept .*seed: the datamodule's seed"):
        curriculum = Curriculum(order=config, filename=None, preflight=False)
    noted = Indices()
    train(curriculum, module, noted)
    scheduler = CurriculumScheduler(linear(8, 5, 40, 5))
    for n, batch in enumerate(noted.batches[:8]):
        assert values[batch].max() <= scheduler.get_difficulty(n + 1)


def test_steps_of_deepspeed_are_told_from_batches(texts: Path) -> None:
    module = data(texts)
    config = of_deepspeed(texts, 1 + np.arange(samples_of(module)) % 40)
    curriculum = Curriculum(order=config, filename=None, preflight=False)
    with pytest.warns(UserWarning, match="a step of DeepSpeed's has 3 batches here"):
        train(curriculum, module, accumulate_grad_batches=3, max_steps=1)


def test_batches_that_are_passed_over_count_as_unseen(texts: Path) -> None:
    """Of 8 batches the first 6 are: what 2 batches had is seen, and no more."""
    module = data(texts)
    values = 1 + np.arange(samples_of(module)) % 40
    order = {"difficulties": values, "scheduler": linear(8, 40, 41, 1)}
    curriculum = Curriculum(order=order, filename=None, preflight=False)
    module.skipped = 6
    noted = Indices()
    train(curriculum, module, noted, max_steps=2)
    sampler = curriculum._stream.sampler
    assert isinstance(sampler, CurriculumSampler)
    seen = {sample for batch in noted.batches[:2] for sample in batch}
    assert sampler.never_seen(8)["not_drawn"] == len(values) - len(seen)
