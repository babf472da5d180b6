"""What a check says of a batch."""

import torch

from lightning_align.cli.check_report import tensors


def test_tensors_of_a_batch_by_where_they_are() -> None:
    one, two = torch.zeros(2, 3), torch.zeros(4)
    batch = {"rows": {"ids": one}, "pair": (one, [two]), "name": "no tensor"}
    found = [(path, tuple(tensor.shape)) for path, tensor in tensors(batch, "")]
    assert found == [("rows.ids", (2, 3)), ("pair[0]", (2, 3)), ("pair[1][0]", (4,))]
    assert next(tensors(one, ""))[0] == ""
