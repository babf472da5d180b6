"""The reference before training: the values of a run without it, from a cache that outlives it."""

import copy
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import MixtralConfig

from lightning_align import DPOModule, PreferenceDataModule
from lightning_align.data import reference_cache
from lightning_align.layers import ModelLayers
from lightning_align.modules import frozen_reference, precomputed
from lightning_align.modules.reference import fingerprint_until_0_1
from lightning_align.run.plain import Encoder
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules.test_pretrain import gpt2, llama, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

SAME, OTHER = ("batches", "folder", "model path", "order"), ("dtype", "precision")
LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {"prefix_sharing": False},
    "shared": {"prefix_sharing": True},
    "packed": {"prefix_sharing": True, "packing": True},
}
WORDS = ["good", "so good", "bad", "no", "well, well", "meh"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: Any) -> None:
    monkeypatch.setattr(reference_cache, "PIECE", 6)


def write_pairs(path: Path, number: int = 10, first: int = 0) -> Path:
    rows = [
        {
            "prompt": chr(65 + i) * (1 + i % 4),
            "chosen": WORDS[i % 6],
            "rejected": WORDS[(i + 1 + i // 6) % 6],
        }
        for i in range(first, first + number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


def data(path: Path, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(str(path), ByteTokenizer(), **{"batch_size": 2, **options})


def vocabulary() -> int:
    return len(ByteTokenizer())


def module(cache: Path | None = None, config: Any = None, **options: Any) -> DPOModule:
    pl.seed_everything(1, verbose=False)
    if cache is not None:
        options |= {"precompute_ref_log_probs": True, "ref_cache_dir": str(cache)}
    config = config or llama(vocab_size=vocabulary())
    return DPOModule(config, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def trainer_of(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "max_epochs": 2, **options},
    )


def fit(ours: DPOModule, datamodule: Any, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    trainer = trainer_of(**options)
    trainer.fit(ours, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@contextmanager
def counted() -> Iterator[list[int]]:
    """Completions that a reference is asked for before training, a number for each piece."""
    asked: list[int] = []
    score = frozen_reference.score_rows

    def counting(layers: Any, rows: Any, **options: Any) -> Any:
        asked.append(len(rows))
        return score(layers, rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_reference, "score_rows", counting)
        yield asked


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(llama, {}, marks=pytest.mark.slow),
        pytest.param(llama, {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5}, marks=pytest.mark.slow),
        pytest.param(gpt2, {}, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_with_a_reference_beside(
    tmp_path: Path, pairs: Path, family: Any, options: Any
) -> None:
    config = llama() if family is llama else gpt2(0.3)
    config.vocab_size = vocabulary()
    beside = module(config=config, **options)
    cached = module(tmp_path / "cache", config=copy.deepcopy(config), **options)
    trainers = [fit(each, data(pairs, val_fraction=0.2)) for each in (beside, cached)]
    torch.testing.assert_close(weights(cached), weights(beside), rtol=0, atol=1e-5)
    ours, theirs = (trainer.callback_metrics for trainer in trainers)
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - {"tokens_per_second"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert cached.frozen_modules() == cached.frozen_copies() == {}


def test_a_warm_cache_asks_no_reference_and_gives_the_same_bits(
    tmp_path: Path, pairs: Path
) -> None:
    cold, warm = module(tmp_path / "cache"), module(tmp_path / "cache")
    with counted() as asked:
        fit(cold, data(pairs, val_fraction=0.2))
    assert asked == [6, 6, 6, 2], "10 pairs, 20 completions, those held out among them"
    with counted() as asked:
        fit(warm, data(pairs, val_fraction=0.2))
    assert asked == []
    assert torch.equal(weights(cold), weights(warm))


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=pytest.mark.slow) for how in ("options", *SAME)],
)
def test_what_does_not_change_the_values_finds_them(tmp_path: Path, pairs: Path, how: str) -> None:
    cache = tmp_path / "cache"
    for name in "ab":
        module().model.save_pretrained(tmp_path / name)
    options: dict[str, Any] = {"config": str(tmp_path / "a")}
    fit(module(cache, **options), data(pairs))
    datamodule = data(pairs)
    if how == "options":
        options |= {"beta": 0.5, "ld_alpha": 0.0, "loss_type": "ipo", "length_alpha": 0.1}
        options |= {"chunk_size": 8}
    elif how == "batches":
        datamodule = data(pairs, batch_size=5, seed=3, num_workers=1)
    elif how == "folder":
        cache = cache.rename(tmp_path / "moved")
    elif how == "model path":
        options["config"] = str(tmp_path / "b")
    else:
        lines = pairs.read_text().splitlines(keepends=True)
        datamodule = data(tmp_path / "turned.jsonl")
        (tmp_path / "turned.jsonl").write_text("".join(lines[::-1]))
    ours = module(cache, **options)
    ours.optimizer = partial(torch.optim.AdamW, lr=1e-5)
    with counted() as asked:
        fit(ours, datamodule, max_epochs=1, default_root_dir=str(tmp_path / "elsewhere"))
    assert asked == []


@pytest.mark.parametrize(
    "how",
    ["weight", *(pytest.param(how, marks=pytest.mark.slow) for how in ("rope", *OTHER))],
)
def test_another_reference_is_asked_anew(tmp_path: Path, pairs: Path, how: str) -> None:
    fit(module(tmp_path / "cache"), data(pairs))
    reference = module().model
    trainer: dict[str, Any] = {"max_epochs": 1}
    if how == "weight":
        with torch.no_grad():
            reference.lm_head.weight[0, 0] = -reference.lm_head.weight[0, 0]
    elif how == "rope":
        config = llama(vocab_size=vocabulary())
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        reference = module(config=config).model
    elif how == "dtype":
        reference = reference.bfloat16()
    else:
        trainer["precision"] = "bf16-mixed"
    with counted() as asked:
        fit(module(tmp_path / "cache", ref_model=reference), data(pairs), **trainer)
    assert sum(asked) == 20


def test_added_and_changed_data_compute_themselves_alone(tmp_path: Path, pairs: Path) -> None:
    fit(module(tmp_path / "cache"), data(pairs))
    more = write_pairs(tmp_path / "more.jsonl", 13)
    with counted() as asked:
        fit(module(tmp_path / "cache"), data(more), max_epochs=1)
    assert sum(asked) == 6
    more.write_text(more.read_text().replace('"rejected": "bad"', '"rejected": "sad"', 1))
    with counted() as asked:
        fit(module(tmp_path / "cache"), data(more), max_epochs=1)
    assert asked == [1]


def test_killed_and_resumed_has_the_same_bits(tmp_path: Path, pairs: Path) -> None:
    whole = module(tmp_path / "whole")
    fit(whole, data(pairs))
    killed = module(tmp_path / "killed")
    write = reference_cache.ReferenceCache.write
    written: list[int] = []

    def dies(self: Any, values: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(values))
        write(self, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_cache.ReferenceCache, "write", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(killed, data(pairs))
    assert len(files(tmp_path / "killed")) == 2
    resumed = module(tmp_path / "killed")
    with counted() as asked:
        fit(resumed, data(pairs))
    assert asked == [6, 2]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.slow
def test_a_damaged_file_is_named_and_computed_anew(tmp_path: Path, pairs: Path) -> None:
    cold = module(tmp_path / "cache")
    fit(cold, data(pairs))
    before = files(tmp_path / "cache")
    path = sorted((tmp_path / "cache").rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-3])
    again = module(tmp_path / "cache")
    with counted() as asked, pytest.warns(UserWarning, match=path.name):
        fit(again, data(pairs))
    assert len(asked) == 1
    assert files(tmp_path / "cache") == before
    assert torch.equal(weights(again), weights(cold))


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    ours, theirs = module(tmp_path / "cache"), module()
    with pytest.warns(UserWarning, match="cannot be written") as told:
        fit(ours, data(pairs))
    assert sum("cannot be written" in str(each.message) for each in told) == 1
    fit(theirs, data(pairs))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "wanted", "shown"), [(0, True, 1), (1, True, 0), (0, False, 0)])
def test_one_rank_shows_how_far_it_is_if_the_trainer_has_a_bar(
    rank: int, wanted: bool, shown: int, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(precomputed, "BAR_DELAY_S", 0)
    trainer: Any = SimpleNamespace(
        global_rank=rank, progress_bar_callback=object() if wanted else None
    )
    with precomputed._bar(trainer, 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err.count("3/3") == shown


def test_no_second_model_is_ever_made(tmp_path: Path, pairs: Path, monkeypatch: Any) -> None:
    deepcopy = copy.deepcopy

    def refuse(value: Any, *memo: Any) -> Any:
        assert not isinstance(value, torch.nn.Module)
        return deepcopy(value, *memo)

    monkeypatch.setattr(copy, "deepcopy", refuse)
    fit(module(tmp_path / "cache"), data(pairs), max_epochs=1)


def test_every_layout_trains_as_separate_rows_with_a_reference_beside(
    tmp_path: Path, pairs: Path
) -> None:
    beside = module(prefix_sharing=False)
    fit(beside, data(pairs, batch_size=5), max_epochs=1)
    for layout, options in LAYOUTS.items():
        cached = module(tmp_path / "cache", **options)
        fit(cached, data(pairs, batch_size=5), max_epochs=1)
        assert cached.layout == layout
        torch.testing.assert_close(weights(cached), weights(beside), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_warm_cache_the_reference_runs_no_forward(
    tmp_path: Path, pairs: Path, layout: str
) -> None:
    forwards: list[Any] = []
    for expected in (True, False):
        reference = module().model
        reference.model.register_forward_hook(lambda *_: forwards.append(1))
        ours = module(tmp_path / "cache", ref_model=reference, **LAYOUTS[layout])
        fit(ours, data(pairs, batch_size=5, val_fraction=0.2), max_epochs=1)
        assert bool(forwards) is expected
        forwards.clear()


def test_the_reference_is_let_go(tmp_path: Path, pairs: Path) -> None:
    """And with it the checkpoint's knowledge of which it was is not."""
    ours = module(tmp_path / "cache", ref_model=module().model)
    assert ours.frozen_modules()
    trainer = fit(ours, data(pairs))
    assert ours.reference_layers is None
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["reference"]
    assert saved == module()._reference.fingerprint


def test_no_checkpoint_looks_at_the_values(tmp_path: Path, pairs: Path) -> None:
    """They are as many as the tokens of all data."""
    ours = module(tmp_path / "cache")
    fit(ours, data(pairs))
    kind, _, held = Encoder({}).encode(ours._reference.cached, "cached")
    assert (kind, held) == ("state_dict", Encoder({}).encode({}, ""))
    assert not pickle.loads(pickle.dumps(ours._reference.cached)).is_of(None)


@pytest.mark.slow
def test_values_are_kept_for_validation_and_prediction(tmp_path: Path, pairs: Path) -> None:
    ours, datamodule = module(tmp_path / "cache"), data(pairs, val_fraction=0.3)
    fit(ours, datamodule)
    with counted() as asked:
        trainer = trainer_of()
        (metrics,) = trainer.validate(ours, datamodule, verbose=False)
        rewards = trainer.predict(ours, datamodule)
    assert asked == []
    margins = torch.cat([each[:, 0] - each[:, 1] for each in rewards or []])  # type: ignore[misc]
    assert float(margins.mean()) == pytest.approx(metrics["val_rewards/margins"], rel=1e-5)
    fresh = module(tmp_path / "cache")
    (untrained,) = trainer_of().validate(fresh, data(pairs, val_fraction=0.3), verbose=False)
    assert untrained["val_loss"] == pytest.approx(0.6931471805599453, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_reference_runs_in_the_precision_of_the_run(
    tmp_path: Path, pairs: Path, precision: Any
) -> None:
    """Else the untrained policy would seem to have moved, by the rounding of bf16."""
    trainer, datamodule = trainer_of(precision=precision), data(pairs, val_fraction=0.4)
    (metrics,) = trainer.validate(module(tmp_path / "cache"), datamodule, verbose=False)
    assert metrics["val_kl/k2"] < 1e-9


@pytest.mark.slow
def test_unpaired_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    rows = [
        {"prompt": chr(65 + i), "completion": WORDS[i % 6], "label": i % 3 == 0} for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"loss_type": "apo_zero_unpaired", "beta": 0.3}
    ours, theirs = module(tmp_path / "cache", **options), module(**options)
    for each in (ours, theirs):
        fit(each, data(path, val_fraction=0.2))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_hand", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_of_another_precision_are_not_taken(
    at_hand: bool, tmp_path: Path, pairs: Path
) -> None:
    """Which a reference that is gone cannot give; in the folder they are apart."""
    datamodule = data(pairs, val_fraction=0.3)
    ours = module(tmp_path / "cache")
    if at_hand:
        trainer_of().validate(module(tmp_path / "cache"), datamodule, verbose=False)
    fit(ours, datamodule, precision="bf16-mixed", max_epochs=1)
    with counted() as asked:
        trainer_of(precision="bf16-mixed").validate(ours, datamodule, verbose=False)
        if at_hand:
            (metrics,) = trainer_of().validate(ours, datamodule, verbose=False)
            beside = module(ref_model=module().model)
            beside.load_state_dict(ours.state_dict())
            (expected,) = trainer_of().validate(beside, datamodule, verbose=False)
            assert metrics["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        else:
            rule = r"lacks values of the reference \(precision '32-true'\).*run with the data and"
            with pytest.raises(ValueError, match=rule):
                trainer_of().validate(ours, datamodule, verbose=False)
    assert asked == []


def test_loaders_of_another_datamodule_are_noticed(tmp_path: Path, pairs: Path) -> None:
    """The Trainer keeps the datamodule of the run before; lengths and numbers are the same."""
    ours = module(tmp_path / "cache")
    trainer = fit(ours, data(pairs, val_fraction=0.3), max_epochs=1)
    other, same = (
        data(path, val_fraction=0.3) for path in (write_pairs(tmp_path / "o.jsonl", 10, 36), pairs)
    )
    for each in (other, same):
        each.setup()
    trainer.validate(ours, same.val_dataloader(), verbose=False)
    with pytest.raises(ValueError, match="a batch has other tokens than the data that"):
        trainer.validate(ours, other.val_dataloader(), verbose=False)


# Resuming


class SavesAfter(pl.Callback):
    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


def started(tmp_path: Path, pairs: Path, **options: Any) -> Path:
    path = tmp_path / "a.ckpt"
    fit(module(tmp_path / "cache"), data(pairs), callbacks=[SavesAfter(3, path)], **options)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2], ids=["steps", "mid-window"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, pairs: Path, window: int) -> None:
    path = started(tmp_path, pairs, accumulate_grad_batches=window)
    whole, resumed = module(tmp_path / "cache"), module(tmp_path / "cache")
    fit(whole, data(pairs), accumulate_grad_batches=window)
    with counted() as asked:
        fit(resumed, data(pairs), path, accumulate_grad_batches=window)
    assert asked == []
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.slow
def test_a_resume_without_its_cache_needs_the_reference(tmp_path: Path, pairs: Path) -> None:
    path = started(tmp_path, pairs)
    (tmp_path / "cache").rename(tmp_path / "gone")
    rule = r"DPOModule\(ref_model=None\): .*cache lacks values of the reference.*has moved on"
    with pytest.raises(ValueError, match=rule):
        fit(module(tmp_path / "cache"), data(pairs), path)
    whole = module(tmp_path / "gone")
    fit(whole, data(pairs))
    resumed = module(tmp_path / "cache", ref_model=module().model)
    fit(resumed, data(pairs), path)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-5)


def test_a_policy_whose_weights_were_loaded_is_no_reference(tmp_path: Path, pairs: Path) -> None:
    ours = module(tmp_path / "cache")
    ours.load_state_dict({name: 1.1 * x for name, x in ours.state_dict().items()})
    with pytest.raises(ValueError, match="has moved on"):
        fit(ours, data(pairs))


@pytest.mark.slow
def test_a_second_fit_on_other_data_needs_the_reference(tmp_path: Path, pairs: Path) -> None:
    ours = module(tmp_path / "cache")
    fit(ours, data(pairs))
    with pytest.raises(ValueError, match="has moved on"):
        fit(ours, data(write_pairs(tmp_path / "other.jsonl", 10, 20)))


@pytest.mark.slow
def test_other_data_in_the_same_datamodule_are_noticed(tmp_path: Path, pairs: Path) -> None:
    """Other prompts before the same completions, so that numbers and lengths fit."""
    ours, datamodule = module(tmp_path / "cache"), data(pairs)
    fit(ours, datamodule)
    datamodule.paths = [str(write_pairs(tmp_path / "other.jsonl", 10, 36))]
    datamodule.train_dataset = None
    with pytest.raises(ValueError, match="has moved on"):
        fit(ours, datamodule)


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path, pairs: Path) -> None:
    path = started(tmp_path, pairs)
    checkpoint = torch.load(path, weights_only=True)
    for saved, refused in ((fingerprint_until_0_1(module().model), False), ("0" * 32, True)):
        checkpoint["reference"] = saved
        torch.save(checkpoint, path)
        if refused:
            with pytest.raises(ValueError, match="trained against another reference"):
                fit(module(tmp_path / "cache"), data(pairs), path)
        else:
            with pytest.warns(UserWarning, match="cannot be told for certain"):
                fit(module(tmp_path / "cache"), data(pairs), path)


# Ranks


def on_two_ranks(cache: Path, pairs: Path, rank: int) -> Any:
    ours = module(cache)
    with warnings.catch_warnings(), counted() as asked:
        warnings.simplefilter("ignore")
        datamodule = data(pairs, batch_size=1)
        fit(ours, datamodule, devices=2, strategy="ddp", plugins=[ForkedRanks(rank, 2)])
    return asked, weights(ours).numpy()


@pytest.mark.slow
def test_two_ranks_share_the_work_and_train_as_one(tmp_path: Path, pairs: Path) -> None:
    (first, ours), (second, same) = run_ranks(partial(on_two_ranks, tmp_path / "two", pairs))
    assert (first, second) == ([6, 6], [6, 2])
    assert np.array_equal(ours, same)
    alone = module(tmp_path / "one")
    fit(alone, data(pairs))
    np.testing.assert_allclose(ours, weights(alone).numpy(), rtol=0, atol=1e-5)
    again = run_ranks(partial(on_two_ranks, tmp_path / "two", pairs))
    assert [asked for asked, _ in again] == [[], []]
    assert np.array_equal(again[0][1], ours)


@pytest.mark.slow
def test_ranks_need_no_common_folder(tmp_path: Path, pairs: Path) -> None:
    """What one of them finds and the other does not is computed for both."""
    fit(module(tmp_path / "0"), data(pairs))

    def apart(rank: int) -> Any:
        return on_two_ranks(tmp_path / str(rank), pairs, rank)

    (first, ours), (second, same) = run_ranks(apart)
    assert (first, second) == ([6, 6], [6, 2])
    assert np.array_equal(ours, same)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_ranks_with_different_references_are_refused(
    cached: bool, tmp_path: Path, pairs: Path
) -> None:
    def other_weights(rank: int) -> Any:
        ours = module(tmp_path / "cache" if cached else None)
        ours._reference.fingerprint = {"weights": str(rank)}
        with pytest.raises(ValueError, match="the ranks hold different references"):
            fit(ours, data(pairs), devices=2, strategy="ddp", plugins=[ForkedRanks(rank, 2)])

    run_ranks(other_weights)


@pytest.mark.slow
def test_an_error_on_one_rank_is_told_to_all(tmp_path: Path, pairs: Path) -> None:
    def broken(rank: int) -> Any:
        def score(*_: Any, **__: Any) -> Any:
            raise ValueError("of rank one")

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(frozen_reference, "score_rows", score)
            with pytest.raises(ValueError, match="of rank one"):
                on_two_ranks(tmp_path / "cache", pairs, rank)

    run_ranks(broken)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, "does nothing with loss_type='simpo'"),
        ({"reference_free": True}, "does nothing with reference_free=True"),
        ({"loss_type": "kto"}, "drawn anew for each batch"),
    ],
)
def test_losses_without_values_to_keep_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "cache", **options)


def test_a_folder_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="serves precompute_ref_log_probs=True alone"):
        module(ref_cache_dir=str(tmp_path))


def test_a_url_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ref_cache_dir='nowhere://a'.*cannot open such a URL"):
        module(ref_cache_dir="nowhere://a", precompute_ref_log_probs=True)


def test_data_of_unknown_length_is_refused(tmp_path: Path, pairs: Path) -> None:
    datamodule = data(pairs)
    datamodule.setup()
    batch = datamodule.train_dataset[[0, 1]]  # type: ignore[index]
    loader = DataLoader([batch], batch_size=None)
    with pytest.raises(ValueError, match="needs to know all data before training"):
        trainer_of().fit(module(tmp_path / "cache"), loader)


def test_values_that_are_not_finite_are_refused_and_not_kept(
    tmp_path: Path, pairs: Path, monkeypatch: Any
) -> None:
    reference = module().model
    monkeypatch.setattr(ModelLayers, "probe", lambda self: None)
    with torch.no_grad():
        reference.lm_head.weight[:] = torch.inf
    with pytest.raises(ValueError, match="must be finite"):
        fit(module(tmp_path / "cache", ref_model=reference), data(pairs))
    assert files(tmp_path / "cache") == {}


def test_a_reference_without_weights_is_built_and_refused_later(tmp_path: Path) -> None:
    with torch.device("meta"):
        ours = module(tmp_path / "cache")
    assert ours._reference.fingerprint == {}


@pytest.mark.slow
def test_a_mixture_of_experts_is_its_own_reference(tmp_path: Path, pairs: Path) -> None:
    config = MixtralConfig(
        vocab_size=vocabulary(),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    ours, theirs = module(tmp_path / "cache", config=config), module(config=config)
    for each in (ours, theirs):
        fit(each, data(pairs), max_epochs=1)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)
