"""Checkpoints of a pipeline as a folder that every rank writes its own stages into."""

import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from torch.distributed.checkpoint import FileSystemReader, state_dict_saver
from transformers import AutoModelForCausalLM

from lightning_align import ExactResume, GaLoreAdamW, Muon, PretrainModule, StableAdamW
from lightning_align.cli.export import export
from tests.helpers.pipelines import ADAMW, Chained, PositionedBatches, Run
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.strategies.pipeline.test_checkpoints import DROPOUT, SaveAt, equal

pytestmark = pytest.mark.slow  # `make test-laws` runs them

TWO = {"schedule": "1F1B", "num_microbatches": 4, "save_distributed_checkpoint": True}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"schedule": "GPipe", "num_microbatches": 4}),
    "four ranks": (4, {"schedule": "GPipe", "num_microbatches": 4}),
    "interleaved": (2, {"schedule": "Interleaved1F1B", "num_microbatches": 4}),
}
MODELS = {
    "llama": Run("llama", TWO, clip=0.5, steps=6),
    "gpt2": Run("gpt2", TWO, clip=0.5, steps=6),  # its embeddings are tied
    "chain": Run("chain", TWO, steps=6),
}


def changed(run: Run, **fields: Any) -> Run:
    return Run(**{**vars(run), **fields})


def fit(run: Run, rank: int | None, ranks: int = 2, **options: Any) -> list[float]:
    """Losses of a training run; ``save={step: path}`` are its checkpoints."""
    saved = options.pop("save", {})
    with run.setting(rank, ranks) as (trainer, seen):
        trainer.callbacks.extend(SaveAt(step, path) for step, path in saved.items())
        trainer.fit(
            run.module(),
            datamodule=PositionedBatches(run.steps, masked=run.model != "chain"),
            **options,
        )
    return seen.losses


def on_ranks(run: Run, ranks: int = 2, **options: Any) -> list[float]:
    losses: list[float] = run_ranks(lambda rank: fit(run, rank, ranks, **options), ranks)[0]
    return losses


def consolidated(folder: Path) -> dict[str, Any]:
    """What Lightning's own tool makes of a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(folder)])
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    checkpoint: dict[str, Any] = torch.load(f"{folder}.consolidated", weights_only=True)
    return checkpoint


@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_stages_goes_on_from_a_folder(model: str, tmp_path: Path) -> None:
    run, folder = MODELS[model], tmp_path / "step2"
    whole = on_ranks(run, save={2: folder})
    assert on_ranks(run, ckpt_path=folder, weights_only=True) == whole[2:]
    for ranks, strategy in OTHERS.values():
        losses = on_ranks(changed(run, strategy=strategy), ranks, ckpt_path=folder)
        # nats over a batch of some 45 tokens, and summation order
        assert losses == pytest.approx(whole[2:], rel=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "run",
    [
        Run("gpt2", TWO, clip=0.5, steps=8, overrides=DROPOUT),
        Run("chain", TWO, steps=8, overrides={"dropout": 0.1}, callbacks=[ExactResume]),
    ],
    ids=lambda run: run.model,
)
def test_resume_is_exact(run: Run, accumulate: int, tmp_path: Path) -> None:
    """With dropout; at ``accumulate=2`` in the middle of a window."""
    run = changed(run, accumulate=accumulate)
    middle, end, resumed = (tmp_path / name for name in ("middle", "end", "resumed"))
    whole = on_ranks(run, save={5: middle, 8: end})
    assert on_ranks(run, save={8: resumed}, ckpt_path=middle) == whole[5:]
    theirs, ours = consolidated(end), consolidated(resumed)
    assert equal(theirs["state_dict"], ours["state_dict"])
    assert equal(theirs["optimizer_states"], ours["optimizer_states"])


@pytest.mark.parametrize("model", MODELS)
def test_one_file_of_the_folder_is_what_rank_0_would_have_saved(model: str, tmp_path: Path) -> None:
    run, folder, file = MODELS[model], tmp_path / "folder", tmp_path / "file.ckpt"
    on_ranks(run, save={2: folder})
    on_ranks(changed(run, strategy={**TWO, "save_distributed_checkpoint": False}), save={2: file})
    ours, theirs = consolidated(folder), torch.load(file, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert equal(ours["state_dict"], theirs["state_dict"])
    one_device = changed(run, strategy=None)
    from_folder = fit(one_device, None, ckpt_path=f"{folder}.consolidated")
    assert from_folder == fit(one_device, None, ckpt_path=file)


def test_each_rank_writes_its_own_stages(tmp_path: Path) -> None:
    run, folder = MODELS["gpt2"], tmp_path / "folder"

    def train(rank: int) -> dict[str, int]:
        with run.setting(rank) as (trainer, _):
            module = run.module()
            trainer.fit(module, datamodule=PositionedBatches(2))
            trainer.save_checkpoint(folder)
        return {name for name, value in module.named_parameters() if not value.is_meta}

    here = run_ranks(train)
    files: dict[str, set[str]] = {}
    index = FileSystemReader(folder).read_metadata()
    for entry, about in index.storage_data.items():
        levels = index.planner_data[entry.fqn]
        name = levels[1] if levels[0] == "model" else levels[2]
        if name in here[0] | here[1]:
            files.setdefault(about.relative_path, set()).add(name)
    shared = here[0] & here[1]
    assert {"model.transformer.wte.weight"} == shared
    assert files == {"__0_0.distcp": here[0], "__1_0.distcp": here[1] - shared}


SENDERS = (
    *("send", "broadcast", "all_gather"),
    *("send_object_list", "broadcast_object_list", "all_gather_object", "gather_object"),
)


def test_nothing_of_the_model_is_sent_for_a_save(tmp_path: Path) -> None:
    """In the middle of an accumulation window, when gradients are saved, too."""

    def train(rank: int) -> int:
        run = changed(MODELS["llama"], accumulate=2)
        sent: list[int] = []
        with run.setting(rank) as (trainer, _), pytest.MonkeyPatch.context() as patch:
            callback = SaveAt(3, tmp_path / "folder")
            trainer.callbacks.append(callback)
            save = trainer.save_checkpoint

            def save_and_count(path: Path) -> None:
                for name in SENDERS:
                    patch.setattr(distributed, name, counting(getattr(distributed, name), sent))
                save(path)
                patch.undo()

            trainer.save_checkpoint = save_and_count
            trainer.fit(run.module(), datamodule=PositionedBatches(4))
        return sum(sent)

    assert run_ranks(train) == [0, 0]
    names = FileSystemReader(tmp_path / "folder").read_metadata().planner_data.values()
    windows = {levels[1:3] for levels in names if levels[0] == "lightning_align.accumulation"}
    assert {("0", "gradients"), ("1", "gradients")} <= windows


def counting(send: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """``send``, which notes how many values the larger tensors have that it is given."""

    def count(*arguments: Any, **options: Any) -> Any:
        floats = (t for t in tensors([arguments, options]) if t.is_floating_point())
        sent.extend(t.numel() for t in floats if t.numel() > 8)  # sums of metrics are smaller
        return send(*arguments, **options)

    return count


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors(entry)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_without_memory_takes_its_values_from_the_folder(
    ranks: int, tmp_path: Path
) -> None:
    run, folder, weights = MODELS["llama"], tmp_path / "folder", tmp_path / "weights"
    module = run.module()
    assert isinstance(module, PretrainModule)
    module.save_pretrained(str(weights))
    whole = on_ranks(run, save={2: folder})

    def resume(rank: int) -> list[float]:
        with run.setting(rank, ranks) as (trainer, seen):
            with trainer.init_module(empty_init=True):
                module = PretrainModule(str(weights), optimizer=ADAMW)
            trainer.fit(
                module,
                datamodule=PositionedBatches(run.steps, masked=run.model != "chain"),
                ckpt_path=folder,
            )
        losses: list[float] = seen.losses
        return losses

    assert run_ranks(resume, ranks)[0] == pytest.approx(whole[2:], rel=2e-5)


def test_model_checkpoint_keeps_the_newest_folder_and_evaluates_it(tmp_path: Path) -> None:
    run = changed(MODELS["chain"], data={"masked": False})

    def train(rank: int) -> tuple[str, list[float]]:
        with run.setting(rank) as (trainer, _):
            callback = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
            trainer.callbacks.append(callback)
            module = run.module()
            trainer.fit(module, datamodule=PositionedBatches(6, masked=False))

            def loss(module: Any, **options: Any) -> float:
                (metrics,) = trainer.validate(module, run.loader(), verbose=False, **options)
                return metrics["val_loss"]

            loaded = [loss(run.module(), ckpt_path=which) for which in ("best", "last")]
            return callback.best_model_path, [*loaded, loss(module)]

    (best, losses), other = run_ranks(train)
    assert (best, losses) == other
    assert losses[0] == losses[1] == losses[2]
    assert Path(best).name == "epoch=0-step=6.ckpt"
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0-step=6.ckpt", "last.ckpt"}


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def cut_off(folder: Path) -> None:
    content = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove("__1_0.distcp"), "1 of its files are missing or cut off, first __1_0.distcp"),
        (cut_off, "1 of its files are missing or cut off, first __1_0.distcp"),
        (remove("meta.pt"), "no checkpoint that was written to its end: no meta.pt in it"),
        (remove(".metadata"), "no checkpoint that was written to its end: no .metadata in it"),
    ],
    ids=["lost", "cut off", "without meta.pt", "without index"],
)
def test_a_folder_that_is_not_whole_is_refused_on_every_rank(
    damage: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    run, folder = MODELS["chain"], tmp_path / "folder"
    on_ranks(run, save={2: folder})
    damage(folder)

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match=r"PipelineStrategy\(ckpt_path=") as caught:
            fit(run, rank, ckpt_path=folder)
        return str(caught.value)

    assert all(told in message for message in run_ranks(refused))


def test_a_folder_with_damaged_bytes_is_refused(tmp_path: Path) -> None:
    run, folder = MODELS["chain"], tmp_path / "folder"
    on_ranks(run, save={2: folder})
    shard = folder / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[::50] = b"?" * len(content[::50])
    shard.write_bytes(content)

    ended = end_of_ranks(lambda rank: fit(run, rank, ckpt_path=folder), timeout_s=30)
    assert not any(end.stuck for end in ended)
    told = "its files cannot be read as plain data"
    assert told in ended[1].error
    assert f"rank 1, between steps: ValueError: PipelineStrategy(ckpt_path={str(folder)!r})" in (
        ended[0].error
    )

    (folder / ".metadata").write_bytes(b"nothing")
    ended = end_of_ranks(lambda rank: fit(run, rank, ckpt_path=folder), timeout_s=30)
    assert all(told in end.error for end in ended)


@pytest.mark.parametrize("model", ["chain", "llama"])
def test_a_folder_of_another_model_is_refused(model: str, tmp_path: Path) -> None:
    run, folder = MODELS[model], tmp_path / "folder"
    on_ranks(run, save={2: folder})
    overrides = {"num_blocks": 5} if model == "chain" else {"num_hidden_layers": 5}

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match=r"of another model: \d+ parameter") as caught:
            fit(changed(run, overrides=overrides), rank, ckpt_path=folder)
        return str(caught.value)

    told = run_ranks(refused)
    assert all("4." in message for message in told)  # the fifth block


def test_other_groups_of_parameters_are_refused(tmp_path: Path) -> None:
    run, folder = MODELS["chain"], tmp_path / "folder"
    on_ranks(run, save={2: folder})

    class Other(Chained):
        def configure_optimizers(self) -> Any:
            head, *rest = list(self.parameters())
            return torch.optim.AdamW([{"params": [head]}, {"params": rest}])

    def refused(rank: int) -> None:
        with (
            run.setting(rank) as (trainer, _),
            pytest.raises(ValueError, match="its optimizer has other groups of parameters"),
        ):
            trainer.fit(Other(), datamodule=PositionedBatches(6, masked=False), ckpt_path=folder)

    run_ranks(refused)


def test_a_file_and_a_folder_take_each_others_place(tmp_path: Path) -> None:
    run, path = MODELS["chain"], tmp_path / "last.ckpt"
    to_file = changed(run, strategy={**TWO, "save_distributed_checkpoint": False})
    whole = on_ranks(run, save={2: path})
    on_ranks(to_file, save={3: path})
    assert on_ranks(run, ckpt_path=path) == whole[3:]
    assert path.is_file()
    on_ranks(run, save={2: path})
    assert on_ranks(to_file, ckpt_path=path) == whole[2:]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("optimizer", [Muon, GaLoreAdamW, StableAdamW])
def test_every_optimizer_goes_on_exactly(optimizer: Any, tmp_path: Path) -> None:
    folder, lr = tmp_path / "folder", 1e-3
    run = changed(MODELS["llama"], optimizer=partial(optimizer, lr=lr), clip=None)
    whole = on_ranks(run, save={2: folder})
    assert on_ranks(run, ckpt_path=folder) == whole[2:]
    one = changed(run, strategy={"schedule": "GPipe", "num_microbatches": 4})
    assert on_ranks(one, 1, ckpt_path=folder) == pytest.approx(whole[2:], rel=1e-3)


def test_a_consolidated_folder_is_exported_and_the_folder_says_how(tmp_path: Path) -> None:
    run, folder = MODELS["llama"], tmp_path / "folder"
    on_ranks(run, save={2: folder})
    module = run.module()
    assert isinstance(module, PretrainModule)
    module.save_pretrained(str(tmp_path / "architecture"))
    with pytest.raises(ValueError, match="Make one file of it: python -m lightning"):
        export(folder, tmp_path / "model")
    weights = consolidated(folder)["state_dict"]
    export(f"{folder}.consolidated", tmp_path / "model", model=tmp_path / "architecture")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = {name.removeprefix("model."): value for name, value in weights.items()}
    assert equal(dict(exported.state_dict()), {n: theirs[n] for n in exported.state_dict()})


def test_a_folder_in_use_and_a_url_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")

    def train(rank: int) -> None:
        run = MODELS["chain"]
        with run.setting(rank) as (trainer, _):
            trainer.fit(run.module(), datamodule=PositionedBatches(1, masked=False))
            with pytest.raises(ValueError, match="the folder is in use"):
                trainer.save_checkpoint(tmp_path / "notes")
            with pytest.raises(ValueError, match="not to a URL"):
                trainer.save_checkpoint("s3://bucket/checkpoint")

    run_ranks(train)
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "mine.txt"]


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    run, folder = MODELS["chain"], tmp_path / "folder"

    def train(rank: int) -> list[float]:
        with run.setting(rank) as (trainer, seen):
            trainer.callbacks.append(SaveAt(2, folder))
            trainer.fit(run.module(), datamodule=PositionedBatches(6, masked=False))

            def fail(*_: Any, **__: Any) -> None:
                raise OSError("no space left on device")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(state_dict_saver, "save", fail)
                with pytest.raises(OSError, match="no space"):
                    trainer.save_checkpoint(folder)
        losses: list[float] = seen.losses
        return losses

    whole = run_ranks(train)[0]
    assert on_ranks(run, ckpt_path=folder) == whole[2:]
    run_ranks(lambda rank: fit(run, rank, save={3: folder}))
    assert on_ranks(run, ckpt_path=folder) == whole[3:]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
