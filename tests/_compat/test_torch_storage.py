import io
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lightning_align._compat.torch_storage import (
    expiry,
    identity,
    is_shared_with_others,
    is_storage,
    negative_view,
    pickled_type,
    plain_alias,
    rebuild_typed,
    rebuild_with_dtype,
    rebuilds_dense,
    retyped,
    untyped,
)


@pytest.fixture(autouse=True)
def _no_deprecated_storages() -> None:
    warnings.simplefilter("error")


def storage_in_pickle(tensor: torch.Tensor) -> object:
    return tensor.__reduce_ex__(2)[1][0]


def test_a_pickled_tensor_shows_its_storage() -> None:
    tensor = torch.ones(6, dtype=torch.float64)
    storage = storage_in_pickle(tensor)

    assert is_storage(storage)
    assert is_storage(tensor.untyped_storage())
    assert not is_storage(tensor)
    assert untyped(storage).data_ptr() == tensor.data_ptr()
    assert untyped(tensor.untyped_storage()) is not None
    assert pickled_type(storage, 48) == (torch.DoubleStorage, 6)
    assert pickled_type(tensor.untyped_storage(), 48) == (torch.UntypedStorage, 48)


def test_identity_is_that_of_the_bytes() -> None:
    tensor = torch.ones(6)

    assert identity(tensor.untyped_storage()) == identity(tensor[2:].untyped_storage())
    assert identity(tensor.untyped_storage()) != identity(tensor.clone().untyped_storage())


def test_rebuild_with_dtype_reads_bytes_as_it_is_told_and_weights_only_allows_it() -> None:
    class OneTensor:
        def __reduce__(self) -> object:
            floats = torch.tensor([1.0, 2.0])
            storage = floats.untyped_storage()
            arguments = (storage, 1, (1,), (1,), False, OrderedDict(), torch.float32)
            return rebuild_with_dtype, arguments

    file = io.BytesIO()
    torch.save({"x": OneTensor()}, file)
    file.seek(0)

    assert torch.equal(torch.load(file, weights_only=True)["x"], torch.tensor([2.0]))


def test_negative_view_shares_memory() -> None:
    tensor = torch.tensor([1.0, -2.0])
    view = negative_view(tensor)

    assert view.is_neg()
    assert view.tolist() == [-1.0, 2.0]
    assert view.untyped_storage().data_ptr() == tensor.data_ptr()


class Labelled(torch.Tensor):
    pass


def test_a_subclass_is_rebuilt_over_a_plain_tensor_and_weights_only_allows_it() -> None:
    tensor = torch.ones(3).as_subclass(Labelled)
    tensor.label = "a"  # type: ignore[attr-defined]
    reduced = tensor.__reduce_ex__(2)
    assert rebuilds_dense(reduced)
    assert not rebuilds_dense(torch.eye(2).to_sparse().__reduce_ex__(2))
    assert not rebuilds_dense(torch.ones(3).__reduce_ex__(2))
    alias = plain_alias(tensor)
    assert alias is not None
    assert (type(alias), vars(alias)) == (torch.Tensor, {})
    assert alias.data_ptr() == tensor.data_ptr()

    made = rebuild_typed(lambda: alias, Labelled, (), {"label": "a"})
    assert (type(made), made.label, made.data_ptr()) == (Labelled, "a", tensor.data_ptr())
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    with torch.serialization.safe_globals([Labelled]):
        assert torch.load(file, weights_only=True).label == "a"


def test_a_plain_tensor_with_attributes_has_an_alias_without() -> None:
    tensor = torch.ones(3)
    tensor.label = "a"  # type: ignore[attr-defined]
    alias = plain_alias(tensor)
    assert alias is not None
    assert vars(alias) == {}
    assert alias.data_ptr() == tensor.data_ptr()


def test_a_storage_takes_the_type_of_another() -> None:
    storage = storage_in_pickle(torch.ones(2, dtype=torch.float64))
    plain = torch.arange(2.0, dtype=torch.float64).untyped_storage()
    assert retyped(plain, plain) is plain
    typed = retyped(plain, storage)
    assert typed.dtype is torch.float64
    assert untyped(typed).data_ptr() == plain.data_ptr()


def test_a_storage_that_is_gone_is_known_to_be() -> None:
    tensor = torch.ones(6)
    gone = expiry(tensor.untyped_storage())
    view = tensor[2:]
    del tensor
    assert not gone()
    del view
    assert gone()


def test_whoever_else_looks_at_a_tensors_memory_is_seen() -> None:
    over_buffer = torch.ones(6)
    over_buffer.data = torch.frombuffer(np.zeros(64, np.float32), dtype=torch.float32)[:8]
    for tensor in (torch.ones(6), over_buffer):
        assert not is_shared_with_others(tensor)
        view = tensor[2:]
        assert is_shared_with_others(tensor)
        del view
        assert not is_shared_with_others(tensor)
        storage = tensor.untyped_storage()
        tensor.add_(1)
        assert not is_shared_with_others(tensor)
        del storage
