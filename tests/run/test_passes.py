"""Where batches are in the passes of a loader, against a walk over these passes."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.passes import EndedPasses, EpochStream
from lightning_align.run.position import Place

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4).map(
    lambda pairs: SkippedBatches((first, first + size) for first, size in pairs)
)
lengths = st.integers(1, 9)


@given(ranges, lengths, st.integers(0, 6))
def test_with_a_length_the_stream_is_the_passes_one_after_the_other(
    skipped: SkippedBatches, length: int, epoch: int
) -> None:
    """The kept batches of all passes, of which each epoch takes as many as a pass has."""
    stream = EpochStream(epoch, epoch * length, length, skipped, EndedPasses())
    kept = [n for n in range(200) if n not in skipped]
    for batch, number in enumerate(kept[epoch * length : (epoch + 1) * length]):
        assert stream.number(batch) == number
        assert stream.place(batch) == Place(*divmod(number, length))
        place, following = stream.behind(batch + 1)
        assert (place, following) == (Place(number // length, number % length + 1), number + 1)
    place, number = stream.behind(0)
    assert place == Place(kept[epoch * length] // length, 0)
    assert number == place.epoch * length


@given(ranges, st.lists(lengths, min_size=60, max_size=60))
def test_without_a_length_an_epoch_is_what_is_kept_of_a_pass(
    skipped: SkippedBatches, passes: list[int]
) -> None:
    """A pass of which nothing is kept is no epoch: the one behind it takes its place."""
    expected, number = [], 0
    for index, length in enumerate(passes):
        batches = range(number, number + length)
        number += length
        epoch = [(n, Place(index, n - batches[0])) for n in batches if n not in skipped]
        expected += [epoch] if epoch else []
    ended, trained, found = EndedPasses(), 0, []
    for epoch in range(len(expected)):
        stream, batch = EpochStream(epoch, trained, None, skipped, ended), 0
        trained_here = []
        for _ in range(1000):
            place, n = stream.place(batch), stream.number(batch)
            if place.batch >= passes[place.epoch]:
                end = n - place.batch + passes[place.epoch]
                if stream.end_pass(end, batch) if skipped else False:
                    continue
                break
            trained_here.append((n, place))
            batch += 1
        trained += batch
        found.append(trained_here)
    assert found == expected


def test_ends_of_what_is_gone_back_behind_are_forgotten() -> None:
    ended = EndedPasses()
    ended.note(1, 0, 0)
    assert ended.ends == [], "nothing had been passed over"
    ended.note(2, 0, 3)
    ended.note(3, 0, 3)
    ended.note(5, 1, 7)
    again = EndedPasses()
    again.load(ended.plain())
    assert again.ends == ended.ends == [(2, 0, 3), (5, 1, 7)]
    assert [again.before(epoch) for epoch in (1, 2, 4, 5)] == [(0, 0), (0, 3), (0, 3), (1, 7)]
    again.forget_behind(4)
    assert again.before(9) == (0, 3)


def test_nothing_passed_over_is_where_it_always_was() -> None:
    stream = EpochStream(3, 10, 6, SkippedBatches(), EndedPasses([(2, 1, 4)]))
    assert [stream.place(n) for n in (0, 4)] == [Place(3, 0), Place(3, 4)]
    assert stream.behind(2) == (Place(3, 2), 12)
