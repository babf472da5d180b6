import dataclasses
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_align import ConversationDataModule, PreferenceDataModule, TextDataModule
from lightning_align.data.packing import PackedDataset
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.skipped import SkippedBatches
from lightning_align.data.token_cache import TokenSplit
from lightning_align.modules.positioned import PositionedDataModule
from lightning_align.run.capture import capture, restore
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.skipping import skip_batches, stream_position
from tests.helpers.covers import cover
from tests.helpers.recorder import Recorder, recorded, samples, trainer

NUM_SAMPLES = 19
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@dataclasses.dataclass
class Blocks:
    """Blocks of two tokens; the first token of sample i is 2 i."""

    number: int = NUM_SAMPLES

    def dataset(self):
        tokens = np.arange(2 * self.number + 1, dtype=np.uint16)
        split = TokenSplit("folder", "train", "uint16", len(tokens), 1, "hash")
        split.__dict__["tokens"] = tokens
        return PackedDataset(split, 2, 0)


class Numbers(PositionedDataModule):
    def __init__(self, batch_size=4, seed=5, num_workers=0, fingerprint="numbers", val=True):
        super().__init__(batch_size, seed, num_workers)
        self.wanted = fingerprint
        self.val = val

    def setup(self, stage=None):
        self.train_dataset = Blocks().dataset()
        self.val_dataset = Blocks(7).dataset() if self.val else None
        self.fingerprint = self.wanted


def expected(begin, end, batch_size=4, **options):
    sampler = PositionSampler(NUM_SAMPLES, batch_size, seed=5, **options)
    return [[2 * i for i in sampler.batch(n)] for n in range(begin, end)]


def fit(folder, data, ckpt_path=None, **options):
    fitter = trainer(folder, **options)
    fitter.fit(Recorder(folder), data, ckpt_path=ckpt_path, weights_only=False)
    return fitter


def test_training_sees_the_stream_across_epochs(tmp_path):
    fit(tmp_path, Numbers(), max_steps=13)
    assert samples(tmp_path, "train") == expected(0, 13)
    assert samples(tmp_path, "val")[-2:] == [[0, 2, 4, 6], [8, 10, 12]]


def test_a_shorter_epoch_is_only_a_window(tmp_path):
    fit(tmp_path, Numbers(), max_steps=8, limit_train_batches=3)
    assert samples(tmp_path, "train") == expected(0, 8)


@cover(stop=[3, 5, 7], num_workers=[2, 0])
def test_a_resumed_run_sees_the_tail_of_the_uninterrupted_one(tmp_path, num_workers, stop):
    """Five batches are an epoch: 3 and 7 stop in its middle, 5 at its end."""
    first = fit(tmp_path, Numbers(num_workers=num_workers), max_steps=stop)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = fit(tmp_path, Numbers(num_workers=num_workers), tmp_path / "a.ckpt", max_steps=12)
    assert samples(tmp_path, "train") == expected(0, 12)
    assert again.datamodule.position == 12


def test_accumulation_counts_batches_and_not_steps(tmp_path):
    first = fit(tmp_path, Numbers(), max_steps=2, accumulate_grad_batches=3)
    assert first.datamodule.position == 5, "the end of the epoch closes the second window early"
    first.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, Numbers(), tmp_path / "a.ckpt", max_steps=4, accumulate_grad_batches=3)
    assert samples(tmp_path, "train") == expected(0, 10)


def test_what_is_skipped_moves_the_position_and_is_resumed(tmp_path):
    data = Numbers()
    data.skipped = 2
    first = fit(tmp_path, data, max_steps=3)
    assert data.position == 5
    assert data.train_sampler.start == 2
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = Numbers()
    fit(tmp_path, again, tmp_path / "a.ckpt", max_steps=6)
    assert again.skipped == SkippedBatches([(0, 2)])
    assert samples(tmp_path, "train") == expected(2, 8)


def test_the_state_round_trips():
    data, again = Numbers(), Numbers()
    for module in (data, again):
        module.setup()
    data.skipped = 3
    state = data.state_dict()
    assert state == {
        "position": 3,
        "skipped": [[0, 3]],
        "seed": 5,
        "batch": 4,
        "fingerprint": "numbers",
    }
    again.load_state_dict(state)
    assert again.state_dict() == state


def test_a_checkpoint_with_a_number_goes_on_where_it_did(tmp_path):
    """It was added to the batches consumed, at every position."""
    fit(tmp_path, Numbers(), max_steps=3).save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=False)
    state["Numbers"] |= {"skipped": 4, "position": 7}
    torch.save(state, tmp_path / "a.ckpt")
    fit(tmp_path, Numbers(), tmp_path / "a.ckpt", max_steps=8)
    assert samples(tmp_path, "train") == expected(0, 3) + expected(7, 12)


def test_ranges_are_left_out_and_those_of_a_run_are_of_its_trainer_alone(tmp_path):
    class Skips(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            skip_batches(trainer, [(2, 4)])

    data = Numbers()
    data.skipped = [(8, 9)]
    module = Recorder(tmp_path)
    first = trainer(tmp_path, max_steps=7, callbacks=[ExactResume(), Skips()])
    first.fit(module, data)
    assert samples(tmp_path, "train") == [*expected(0, 2), *expected(4, 8), *expected(9, 10)]
    assert data.skipped == SkippedBatches([(2, 4), (8, 9)])
    (tmp_path / "again").mkdir()
    fit(tmp_path / "again", data, max_steps=4)
    assert data.skipped == SkippedBatches([(8, 9)])
    assert samples(tmp_path / "again", "train") == expected(0, 4)


def test_what_is_left_out_stays_so_when_the_run_goes_back_again(tmp_path):
    """Both times to the state of the second batch, which knows of nothing that is left out."""

    class Back(pl.Callback):
        def __init__(self):
            self.state, self.done = None, []

        def on_train_batch_end(self, trainer, *args):
            position = stream_position(trainer)
            if self.state is None and position == 2:
                self.state = capture(trainer)
            elif position in (4, 6) and position not in self.done:
                self.done.append(position)
                restore(trainer, self.state)
                skip_batches(trainer, [(position - 2, position)])

    back, data = Back(), Numbers()
    fitter = trainer(tmp_path, max_steps=7, callbacks=[ExactResume(), back])
    fitter.fit(Recorder(tmp_path), data)
    assert back.done == [4, 6]
    assert samples(tmp_path, "train") == expected(0, 11)
    assert data.skipped == SkippedBatches([(2, 6)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, r"Numbers\(seed=6\): the checkpoint's run has 5\. Resume with the same"),
        ({"batch_size": 3}, r"Numbers\(batch=3\): the checkpoint's run has 4"),
        ({"fingerprint": "b"}, r"Numbers\(fingerprint='b'\): the checkpoint's run has 'numbers'"),
    ],
)
def test_another_stream_is_refused_for_training_but_not_for_evaluation(tmp_path, change, message):
    fit(tmp_path, Numbers()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Numbers(**change), tmp_path / "a.ckpt", max_steps=2)
    evaluator = trainer(tmp_path)
    path = tmp_path / "a.ckpt"
    evaluator.validate(Recorder(tmp_path), Numbers(**change), ckpt_path=path, weights_only=False)


def test_the_checkpoint_is_plain_data(tmp_path):
    fit(tmp_path, Numbers()).save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert state["Numbers"]["position"] == 1


def test_no_validation(tmp_path):
    fit(tmp_path, Numbers(val=False), max_steps=6)
    assert len(samples(tmp_path, "train")) == 6
    assert not list(tmp_path.glob("val*"))


def test_loaders_pin_memory_only_for_cuda(tmp_path):
    fitter = fit(tmp_path, Numbers())
    assert fitter.train_dataloader.pin_memory is False


def test_overfit_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Trainer\(overfit_batches=2\).*limit_train_batches"):
        fit(tmp_path, Numbers(), overfit_batches=2)


@pytest.mark.parametrize("argument", ["paths", "val_paths"])
@pytest.mark.parametrize(
    "make",
    [
        TextDataModule,
        partial(PreferenceDataModule, tokenizer="none"),
        partial(ConversationDataModule, tokenizer="none"),
    ],
    ids=["text", "pairs", "chats"],
)
def test_data_in_memory_are_refused_where_paths_are_named(make, argument):
    with pytest.raises(ValueError, match=rf"{argument}='<Blocks>'\): must be paths.* save_to_disk"):
        make(**{"paths": "some.jsonl", argument: Blocks()})


def test_two_ranks_share_every_batch_and_lightning_leaves_the_sampler_alone(tmp_path):
    """19 = 2 * 8 + 3 samples and 7 = 7: last batches are split as evenly as it goes."""
    fit(
        tmp_path,
        Numbers(),
        strategy="ddp_fork",
        devices=2,
        max_steps=5,
        num_sanity_val_steps=0,
    )
    ranks = [samples(tmp_path, "train", rank) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == expected(0, 5, batch_size=8)
    validated = [batch for rank in (0, 1) for batch in samples(tmp_path, "val", rank)]
    assert [len(batch) for batch in validated] == [4, 3]
    assert sorted(i for batch in validated for i in batch) == list(range(0, 14, 2))


def test_a_rank_without_samples_gets_one_with_nothing_to_learn(tmp_path):
    class Nine(Numbers):
        def setup(self, stage=None):
            super().setup(stage)
            self.val_dataset = Blocks(9).dataset()

    fit(tmp_path, Nine(), strategy="ddp_fork", devices=2, num_sanity_val_steps=0, max_steps=3)
    last = [recorded(tmp_path, "val", rank)[-1] for rank in (0, 1)]
    assert last == [{"samples": [16], "learns": [True]}, {"samples": [16], "learns": [False]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"Numbers\(batch_size=0\): must be at least 1"),
        ({"seed": -1}, r"Numbers\(seed=-1\): must be at least 0"),
        ({"num_workers": -1}, r"Numbers\(num_workers=-1\): must be at least 0"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Numbers(**change)
