"""Buckets, and schedulers that losses pace, in runs of our datamodule."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_align import Curriculum, ExactResume, TextDataModule
from lightning_align.callbacks.curriculum.feedback import Feedback
from lightning_align.data.bucket_sampler import BucketSampler
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.streams import StreamBatches
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.children import in_child
from tests.helpers.curriculum import linear
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import Fit, KillAt, WithValidation, model_checkpoint
from tests.helpers.resumable import later as from_position
from tests.helpers.resume import SaveEveryBatch, Sequences, weights_hash
from tests.helpers.stateful import StatefulLoader
from tests.modules.test_pretrain import gpt2, sgd_module

LENGTHS = [3, 40, 17, 9, 33, 64, 25, 12, 50, 7]  # tokens of documents, the closing one not counted


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in which no two tokens of a run of eight are the same."""
    folder = tmp_path_factory.mktemp("texts")
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(letters[(7 * i + n) % 26] for i in range(n)) for n in LENGTHS]
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def data(texts: Path, **options: Any) -> TextDataModule:
    given = {"block_size": 16, "batch_size": 4, "separate_documents": True, **options}
    tokenizer = ByteTokenizer(61 + 256)
    path = str(texts / "all.jsonl")
    return TextDataModule(path, tokenizer, val_fraction=0.0, cache_dir=texts / "cache", **given)


def buckets(**options: Any) -> dict[str, Any]:
    """Rows of 4 to 16 in pieces of 4, 8 and 16 tokens, whose cap grows in six batches."""
    scheduler = linear(total=6, least=4, most=16, each=4)
    return {"mode": "bucket", "scheduler": scheduler, "least": 4, **options}


def self_paced(lag: int = 3, least: int = 4, most: int = 16, step: int = 4) -> dict[str, Any]:
    rule = {"difficulty_step": step, "window": 2, "threshold": 0.5, "lag": lag}
    return {
        "min_difficulty": least,
        "max_difficulty": most,
        "schedule_type": "self_paced",
        "schedule_config": rule,
    }


class Notes(pl.Callback):
    """Rows and labels of each batch as it is trained, in a file of this rank, and its loss."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        n = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        line = [n, batch["labels"].tolist(), float(outputs["loss"]).hex()]
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")


def train(
    folder: Path, name: str, curriculum: Curriculum, module: Any, **options: Any
) -> list[Any]:
    """What was noted, and a hash of the weights."""
    torch.set_num_threads(1)
    extra, ckpt_path = options.pop("callbacks", []), options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.pop("max_steps", 14),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in extra),
        # The one that saves comes first: what it saves must be whole all the same.
        callbacks=[*extra, curriculum, Notes(folder / name)],
        **options,
    )
    config = gpt2(0.1)
    config.vocab_size = 61 + 256
    config.n_positions = 32
    learner = sgd_module(config)
    given = {"datamodule" if isinstance(module, TextDataModule) else "train_dataloaders": module}
    trainer.fit(learner, **given, ckpt_path=ckpt_path and str(ckpt_path))
    lines = Path(f"{folder / name}.{trainer.global_rank}").read_text().splitlines()
    return [*map(json.loads, lines), weights_hash(learner)]


def later(record: list[Any], position: int) -> list[Any]:
    return [*(line for line in record[:-1] if line[0] > position), record[-1]]


def saved(folder: Path, position: int) -> Path:
    return next(folder.glob(f"*step={position}.ckpt"))


def each_batch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def learned(record: list[Any]) -> Counter[int]:
    """Predictions by token, over batches."""
    rows = (row for _, labels, _ in record[:-1] for row in labels)
    return Counter(label for row in rows for label in row[1:] if label != -100)


def test_in_buckets_every_pass_learns_each_token_once_in_rows_no_longer_than_allowed(
    texts: Path, tmp_path: Path
) -> None:
    module, curriculum = data(texts), Curriculum(length=buckets(), filename=None)
    module.prepare_data()
    module.setup()
    tokens, offsets = module.train_dataset.split.tokens, module.train_dataset.split.offsets
    firsts = Counter(tokens[offsets[:-1]].tolist())
    once = Counter(tokens.tolist()) - firsts
    record = train(tmp_path, "run", curriculum, module, max_epochs=2, max_steps=-1)
    sampler = module.train_sampler
    assert isinstance(sampler, BucketSampler)
    assert len(record) - 1 == 2 * len(sampler)
    assert learned(record) == Counter({token: 2 * number for token, number in once.items()})
    told = curriculum.preview(range(len(record) - 1))
    for n, (_, labels, _) in enumerate(record[:-1]):
        (width,) = {len(row) for row in labels}
        most = 4 if n == 0 else 8 if n < 5 else 16  # the schedule, rounded down
        assert width - 1 == told[n]["length"] == min(most, sampler.buckets.length(n))
        assert len(labels) * (width - 1) <= 4 * 16
    assert {line["length"] for line in told} == {4, 8, 16}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"odds": "grow_p2", "cycles": 2}], ids=["even", "odds"])
def test_buckets_are_resumed_from_any_batch(
    texts: Path, tmp_path: Path, workers: int, options: dict[str, Any]
) -> None:
    def run(name: str, **more: Any) -> list[Any]:
        curriculum = Curriculum(length=buckets(**options), filename=None)
        return train(tmp_path, name, curriculum, data(texts, num_workers=workers), **more)

    whole = run("whole", callbacks=[each_batch(tmp_path)])
    for position in (1, 5, 11):
        resumed = run(f"from-{position}", ckpt_path=saved(tmp_path, position))
        assert later(resumed, position) == later(whole, position), position


def test_another_decomposition_is_refused_on_a_resume(texts: Path, tmp_path: Path) -> None:
    def run(name: str, length: dict[str, Any], **more: Any) -> None:
        train(tmp_path, name, Curriculum(length=length, filename=None), data(texts), **more)

    run("first", buckets(), callbacks=[each_batch(tmp_path)], max_steps=2)
    for other in (buckets(cycles=2), buckets(odds="grow_p2"), buckets(least=8)):
        with pytest.raises(ValueError, match=r"checkpoint's run has|written with another"):
            run("other", other, ckpt_path=saved(tmp_path, 2))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (buckets(), {"separate_documents": False}, "Set separate_documents=True"),
        (buckets(), {"block_size": 12}, r"greatest=12\): must be a power of two"),
        (buckets(least=3), {}, r"least=3\): must be a power of two"),
        (buckets(odds=[1]), {}, r"odds=\[1\]\): must be 'grow_p2', or one number for each"),
    ],
)
def test_what_has_no_buckets_is_refused(
    texts: Path, tmp_path: Path, length: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "run", Curriculum(length=length, filename=None), data(texts, **options))


def test_buckets_beside_an_order_are_refused_and_their_keys_in_other_modes() -> None:
    with pytest.raises(ValueError, match=r"Curriculum\(batch_size=.*mode='bucket' says which"):
        Curriculum(length=buckets(), batch_size={"scheduler": linear()})
    with pytest.raises(ValueError, match=r"length=\['least'\]\): knows mode"):
        Curriculum(length={**buckets(), "mode": "reshape"})


def test_the_longest_rows_of_buckets_go_through_before_the_first_step(
    texts: Path, tmp_path: Path
) -> None:
    """To the bit as without."""
    runs = [
        train(
            tmp_path,
            str(preflight),
            Curriculum(length=buckets(), preflight=preflight, filename=None),
            data(texts),
            max_steps=4,
        )
        for preflight in (True, False)
    ]
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_buckets_on_two_ranks(texts: Path, tmp_path: Path) -> None:
    """Both learn from the same batches as one process does, and are resumed."""
    one = train(tmp_path, "one", Curriculum(length=buckets(), filename=None), data(texts))

    def on(rank: int) -> None:
        options = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        curriculum = lambda: Curriculum(length=buckets(), filename=None)  # noqa: E731
        module = lambda: data(texts, batch_size=2)  # noqa: E731
        saver = [each_batch(tmp_path)]
        whole = train(tmp_path, "two", curriculum(), module(), callbacks=saver, **options)
        again = {"ckpt_path": saved(tmp_path, 5), **options}
        resumed = train(tmp_path, "resumed", curriculum(), module(), **again)
        assert later(resumed, 5) == later(whole, 5)

    run_ranks(on)
    parts = [
        [json.loads(line) for line in (tmp_path / f"two.{rank}").read_text().splitlines()]
        for rank in range(2)
    ]
    for (_, whole, _), (_, first, _), (_, second, _) in zip(one[:-1], *parts, strict=True):
        real = [row for row in [*first, *second] if set(row) != {-100}]
        assert sorted(real) == sorted(row for row in whole if set(row) != {-100})


# Streams, and loaders that others have the say in


class Stream(IterableDataset[Any]):
    """Rows of thirteen tokens without indices, with a state or without."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        self.next %= 26
        while self.next < 26:
            self.next += 1
            row = Sequences()[[self.next - 1]]
            yield {name: value[0] for name, value in row.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def of_streams(kind: str) -> Any:
    growing = StreamBatches(Stream(), lambda n: 2 + n // 3)
    return {
        "plain": lambda: DataLoader(Stream(), batch_size=4),
        "stateful": lambda: StatefulLoader(growing, batch_size=None),
        "workers": lambda: DataLoader(
            growing, batch_size=None, num_workers=1, multiprocessing_context="fork"
        ),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["stateful", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "workers"))]
)
def test_rows_of_a_stream_grow_and_are_resumed(tmp_path: Path, kind: str) -> None:
    """Batches of the stream grow at the same time, but for a plain loader."""

    def run(name: str, **more: Any) -> list[Any]:
        length = {"mode": "reshape", "scheduler": linear()}
        curriculum = Curriculum(length=length, filename=None, preflight=False)
        return train(tmp_path, name, curriculum, of_streams(kind), max_steps=12, **more)

    whole = run("whole", callbacks=[each_batch(tmp_path)])
    widths = [len(labels[0]) - 1 for _, labels, _ in whole[:5]]
    assert widths == [3, 6, 6, 9, 9]
    if kind != "plain":  # rows are cut into more of them
        assert [len(labels) for _, labels, _ in whole[:5]] == [2 * 4, 2 * 2, 2 * 2, 3, 3]
    for position in (4,) if kind == "stateful" else (2, 8):
        resumed = run(f"from-{position}", ckpt_path=saved(tmp_path, position))
        assert later(resumed, position) == later(whole, position), position


class OwnBatches(BatchSampler):
    """Somebody's own say in what is in a batch."""


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda data: DataLoader(Stream()), "a stream has no indices: what comes next is its own"),
        (
            lambda data: DataLoader(
                data, batch_sampler=OwnBatches(SequentialSampler(data), 2, False)
            ),
            "its batch_sampler, OwnBatches, has the say in what is in a batch",
        ),
        (lambda data: DataLoader(data, 2), "its sampler, SequentialSampler, is not the datamodul"),
    ],
)
def test_an_order_that_would_not_reach_the_loader_is_refused(
    texts: Path, tmp_path: Path, loader: Any, message: str
) -> None:
    class Own(TextDataModule):
        def train_dataloader(self) -> Any:
            return loader(self.train_dataset)

    module = data(texts)
    module.__class__ = Own
    module.prepare_data()
    module.setup()
    number = len(module.train_dataset)
    scheduler = linear(least=4, most=number, each=1)
    order = {"difficulties": [*range(1, number + 1)], "scheduler": scheduler}
    with pytest.raises(ValueError, match=rf"Curriculum\(order='train_dataloader: .*{message}"):
        train(tmp_path, "run", Curriculum(order=order, filename=None), module)


def test_an_order_of_a_stream_without_our_datamodule_is_refused(tmp_path: Path) -> None:
    order = {"difficulties": [1, 2], "scheduler": linear(least=1, most=2, each=1)}
    with pytest.raises(ValueError, match=r"Curriculum\(order=.*CurriculumSampler to a DataLoader"):
        train(tmp_path, "run", Curriculum(order=order, filename=None), of_streams("plain"))


# Feedback


def decisions(path: Path) -> dict[str, Any]:
    states = torch.load(path, weights_only=True)["callbacks"]["Curriculum"]["feedback"]
    return {part: each["decisions"] for part, each in states["schedulers"].items()}


def paced(module: TextDataModule, **options: Any) -> Curriculum:
    """Rows and order of a run, both paced by its losses."""
    module.prepare_data()
    module.setup()
    values = [1 + sample % 3 for sample in range(len(module.train_dataset))]
    order = {"difficulties": values, "scheduler": self_paced(least=1, most=3, step=1, **options)}
    length = {"mode": "reshape", "scheduler": self_paced(**options)}
    return Curriculum(order=order, length=length, filename=None)


def run_paced(
    texts: Path, folder: Path, name: str, *, workers: int = 0, lag: int = 3, **more: Any
) -> list[Any]:
    module = data(texts, num_workers=workers)
    return train(folder, name, paced(module, lag=lag), module, **more)


def test_rows_and_order_follow_decisions_that_a_resume_repeats(texts: Path, tmp_path: Path) -> None:
    """From the batch that it was taken with, and the last before its effect.

    Whoever saves comes first in the Trainer.
    """
    savers = [ExactResume(), SaveEveryBatch()]
    whole = run_paced(texts, tmp_path, "whole", callbacks=savers, default_root_dir=tmp_path)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    found = decisions(paths[-1])
    assert len(found["length"]) > 2
    effect = found["length"][1][0]
    widths = [len(labels[0]) - 1 for _, labels, _ in whole[:-1]]
    assert widths[effect - 1] == 4 < widths[effect] == 8
    for position in (effect - 3, effect - 1):
        name = f"from-{position}"
        resumed = run_paced(texts, tmp_path, name, ckpt_path=paths[position - 1])
        assert later(resumed, position) == later(whole, position), position


def test_a_lag_that_workers_outrun_is_refused_at_set_up(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SelfPaced\(lag=3\): 2 workers .* Set it to 5 or more"):
        run_paced(texts, tmp_path, "run", workers=2)


def test_another_rule_is_refused_on_a_resume(texts: Path, tmp_path: Path) -> None:
    run_paced(texts, tmp_path, "first", callbacks=[each_batch(tmp_path)], max_steps=2)
    with pytest.raises(ValueError, match=r"written with another|checkpoint's run has"):
        run_paced(texts, tmp_path, "other", lag=4, ckpt_path=saved(tmp_path, 2))


@pytest.mark.slow
def test_a_run_is_killed_one_batch_before_and_behind_a_decision_takes_effect(
    texts: Path, tmp_path: Path
) -> None:
    """With two workers, which are ahead of it; without them the batches are the same."""
    options = {"workers": 2, "lag": 5}
    whole = run_paced(texts, tmp_path, "whole", callbacks=[each_batch(tmp_path)], **options)
    effect = decisions(saved(tmp_path, 14))["length"][1][0]
    alone = run_paced(texts, tmp_path, "alone", lag=5)
    assert [line[1:] for line in alone[:-1]] == [line[1:] for line in whole[:-1]]
    for position in (effect - 1, effect + 1):
        folder = tmp_path / str(position)
        folder.mkdir()
        killed = partial(run_paced, texts, folder, "killed", **options)
        assert in_child(partial(killed, callbacks=[each_batch(folder), KillAt(position)])) < 0
        resumed = run_paced(texts, folder, "on", ckpt_path=saved(folder, position), **options)
        assert later(resumed, position) == later(whole, position), position


@pytest.mark.slow
def test_without_what_was_decided_a_resumed_run_is_another(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_paced(texts, tmp_path, "whole", callbacks=[each_batch(tmp_path)])
    effect = decisions(saved(tmp_path, 14))["length"][1][0]
    monkeypatch.setattr(Feedback, "load_state_dict", lambda self, state: None)
    resumed = run_paced(texts, tmp_path, "from", ckpt_path=saved(tmp_path, effect))
    assert later(resumed, effect) != later(whole, effect)


def test_sizes_at_constant_tokens_are_refused_where_losses_pace_the_length(
    texts: Path, tmp_path: Path
) -> None:
    length = {"mode": "truncate", "scheduler": self_paced()}
    curriculum = Curriculum(length=length, batch_size={"constant_tokens": True}, filename=None)
    with pytest.raises(ValueError, match="sizes of all batches must be known, and losses pace"):
        train(tmp_path, "run", curriculum, data(texts))


# An order in a loader of one's own


class Own(WithValidation):
    """Its loader draws from a sampler that it is given."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.given = sampler

    def train_dataloader(self) -> Any:
        rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, sampler=self.given, batch_size=None)


class OwnOrder:
    """A sampler for each run, and the callback that tells it of losses."""

    def __init__(self, lag: int = 3, **parts: Any) -> None:
        self.lag, self.parts = lag, parts

    def __call__(self) -> list[pl.Callback]:
        pace = self_paced(self.lag, least=1, most=3, step=1)
        self.sampler = CurriculumSampler([1 + row % 3 for row in range(24)], pace, 4)
        return [Curriculum(order={"sampler": self.sampler}, filename=None, **self.parts)]


@pytest.mark.slow
def test_an_order_in_a_loader_of_ones_own_is_paced_and_resumed(tmp_path: Path) -> None:
    """Before a decision takes effect, and behind it."""
    order = OwnOrder()
    fit = Fit(tmp_path, lambda: Own(order.sampler), model_checkpoint, order)
    whole = fit.run()
    first = order.sampler.schedulers["difficulty"].decisions
    assert [decision.level for decision in first] == [0, 1, 2]
    for position in (first[1].batch - 1, first[1].batch + 1):
        resumed = fit.run(f"from-{position}", ckpt_path=fit.checkpoint(position))
        assert order.sampler.schedulers["difficulty"].decisions == first
        assert from_position(resumed, position) == from_position(whole, position), position
    order.lag = 4
    with pytest.raises(ValueError, match=r"written with another one"):
        fit.run("other", ckpt_path=fit.checkpoint(position))


def test_an_order_in_a_loader_of_ones_own_that_nobody_would_tell_is_refused(
    tmp_path: Path,
) -> None:
    order = OwnOrder()
    fit = Fit(tmp_path, lambda: Own(order.sampler), model_checkpoint, order)
    with pytest.raises(ValueError, match=r"Set it to 4 or more; .* hears of losses by Curriculum"):
        fit.run("alone", callbacks=[ExactResume()])
    with pytest.raises(ValueError, match="its sampler, CurriculumSampler, is not that of order"):
        fit.run("another", module=lambda: Own(order.sampler if order() else None))
    with pytest.raises(ValueError, match=r"order.sampler=.*says how many samples a batch has"):
        OwnOrder(batch_size={"scheduler": linear()})()
    with pytest.raises(ValueError, match=r"must be a CurriculumSampler, and it knows the rest"):
        Curriculum(order={"sampler": order.sampler, "replacement": True})
