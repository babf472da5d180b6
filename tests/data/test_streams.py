"""Batches of growing size from streams without indices."""

import json
from itertools import chain, islice

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_align.data.streams import StreamBatches


class Numbers(IterableDataset):
    """The numbers up to a last one, shared out among the workers."""

    def __init__(self, last=50):
        self.last = last

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from range(first, self.last, step)


class WithState(Numbers):
    """Goes on where it stood; it counts how many it has drawn."""

    def __init__(self, last=50):
        super().__init__(last)
        self.next = self.drawn = 0

    def __iter__(self):
        while self.next < self.last:
            self.next, self.drawn = self.next + 1, self.drawn + 1
            yield self.next - 1
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def grows(n):
    return 1 + n // 2


def test_batch_n_has_as_many_samples_as_its_number_says_and_nothing_is_left_out():
    batches = [*StreamBatches(Numbers(), grows, list)]
    assert [len(batch) for batch in batches] == [grows(n) for n in range(13)] + [1]
    assert [*chain(*batches)] == list(range(50))


def test_workers_make_them_in_turn():
    """Until a worker has no more: each has half of the samples, in batches of its own numbers."""
    data = StreamBatches(Numbers(), grows, list)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    batches = [*loader]
    assert [len(batch) for batch in batches[:12]] == [grows(n) for n in range(12)]
    assert sorted([*chain(*batches)]) == list(range(50))


def test_numbers_go_on_from_epoch_to_epoch_where_they_are_told():
    batches = StreamBatches(Numbers(), grows, list)
    batches.start = 6
    assert [len(batch) for batch in islice(batches, 3)] == [grows(n) for n in (6, 7, 8)]


@pytest.mark.parametrize("stream", [Numbers, WithState])
@pytest.mark.parametrize("given", [0, 1, 5, 11])
def test_its_state_is_where_it_stands(stream, given):
    whole = [*StreamBatches(stream(), grows, list)]
    first = StreamBatches(stream(), grows, list)
    assert [*islice(first, given)] == whole[:given]
    state = json.loads(json.dumps(first.state_dict()))
    later = StreamBatches(stream(), grows, list)
    later.load_state_dict(state)
    assert later.state_dict() == first.state_dict()
    assert [*later] == whole[given:]
    if stream is WithState:
        assert later.stream.drawn == 50 - sum(map(len, whole[:given]))
    assert [*later] == whole  # another epoch begins at its first sample


def test_a_stream_whose_state_asks_for_arguments_is_drawn_again():
    class Asks(Numbers):
        def state_dict(self, num_samples_yielded, num_workers):
            raise AssertionError

        def load_state_dict(self, state):
            raise AssertionError

    first = StreamBatches(Asks(), grows, list)
    seen = [*islice(first, 4)]
    later = StreamBatches(Asks(), grows, list)
    later.load_state_dict(first.state_dict())
    assert [*seen, *later] == [*StreamBatches(Asks(), grows, list)]


def test_a_stream_that_is_its_own_iterator_is_begun_once_an_epoch():
    class OwnIterator(IterableDataset):
        def __iter__(self):
            self.next = 0
            return self

        def __next__(self):
            if self.next == 50:
                raise StopIteration
            self.next += 1
            return self.next - 1

    batches = StreamBatches(OwnIterator(), grows, list)
    assert [*batches] == [*batches] == [*StreamBatches(Numbers(), grows, list)]


def test_batches_are_collated():
    batch = next(iter(StreamBatches([{"a": torch.ones(2)}] * 3, lambda n: 3)))
    assert torch.equal(batch["a"], torch.ones(3, 2))


class Rows:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index


def test_refuses_what_is_no_stream_and_what_is_no_size():
    with pytest.raises(ValueError, match=r"stream='Rows'\): must be a stream.* PositionSampler"):
        StreamBatches(Rows(), grows)
    with pytest.raises(ValueError, match=r"whole number from 1 on, and gave 0 for batch 0"):
        next(iter(StreamBatches(Numbers(), lambda n: 0)))
    with pytest.raises(ValueError, match=r"gave 2\.5 for batch 0"):
        next(iter(StreamBatches(Numbers(), lambda n: 2.5)))


def test_a_sampler_has_nothing_to_order_in_a_stream():
    """torch refuses it by itself."""
    with pytest.raises(ValueError, match="expected unspecified sampler option"):
        DataLoader(Numbers(), sampler=range(3), batch_size=None)
