"""Where tensors lie in a stretch of memory."""

import torch

from lightning_align.offload.places import aligned, cut_anywhere, cut_between, placed


def test_parameters_are_padded_to_64_elements():
    places, nbytes = placed({"a": torch.zeros(3), "b": torch.zeros(65), "c": torch.zeros(2, 2)})
    assert [place.offset for place in places.values()] == [0, 256, 768]
    assert nbytes == 4096


def test_sections_are_of_one_length_and_whole_tensors_lie_in_one():
    tensors = {"a": torch.zeros(3000), "b": torch.zeros(100), "c": torch.zeros(50)}
    for cut in (cut_anywhere, cut_between):
        places, nbytes = cut(tensors, 2)
        assert nbytes % (2 * 4096) == 0
        ends = [place.offset + place.nbytes for place in places.values()]
        assert max(ends) <= nbytes
        if cut is cut_between:
            halves = [
                (p.offset * 2 // nbytes, (end - 1) * 2 // nbytes)
                for p, end in zip(places.values(), ends, strict=True)
            ]
            assert halves == [(0, 0), (1, 1), (1, 1)]
    assert aligned(1) == 4096
