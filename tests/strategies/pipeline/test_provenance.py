"""What a step computes from outputs other than the last one is followed, whatever it does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_align.strategies.pipeline.provenance import Provenance


class RefusedError(Exception):
    pass


def refuse(origin: str) -> None:
    raise RefusedError(origin)


FOLLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda marked, other: (marked + other).sum(),
    "view": lambda marked, other: marked[0].view(-1),
    "detached": lambda marked, other: marked.detach() * 2,
    "mask": lambda marked, other: torch.where(marked > 0, other, -other),
    "in place": lambda marked, other: other.clone().add_(marked),
    "through memory": lambda marked, other: _written(other.clone(), marked),
    "tuple": lambda marked, other: marked.max(0).indices,
    "list": lambda marked, other: torch.stack([other, marked]),
    "copy": lambda marked, other: marked.clone(),
}
FORGOTTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "other": lambda marked, other: other * 2,
    "zeros": lambda marked, other: torch.zeros_like(marked) + 1,
    "noise": lambda marked, other: torch.randn_like(marked) * 2,
    "empty": lambda marked, other: marked.new_ones(3) * 2,
    "shape": lambda marked, other: other * marked.shape[0],
}


def _written(memory: Tensor, value: Tensor) -> Tensor:
    view = memory[:1]
    view.copy_(value[:1])
    return memory


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_made_of_a_marked_tensor_is_marked(name: str) -> None:
    with Provenance(refuse) as provenance:
        marked, other = torch.randn(2, 2), torch.randn(2, 2)
        provenance.mark({"output": (marked,)}, "layer 0")
        assert provenance.of(other) is None
        assert provenance.of([None, FOLLOWED[name](marked, other)]) == "layer 0"


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_only_has_its_shape_is_not(name: str) -> None:
    with Provenance(refuse) as provenance:
        marked, other = torch.randn(2, 2), torch.randn(2, 2)
        provenance.mark(marked, "layer 0")
        assert provenance.of(FORGOTTEN[name](marked, other)) is None


@pytest.mark.parametrize("ask", [Tensor.item, float, bool, lambda t: torch.equal(t, t)])
def test_a_value_that_python_asks_for_is_refused(ask: Callable[[Tensor], object]) -> None:
    with Provenance(refuse) as provenance:
        marked = torch.tensor(2.0)
        provenance.mark(marked, "layer 3")
        assert ask(torch.tensor(1.0)) is not None
        with pytest.raises(RefusedError, match="layer 3"):
            ask(marked + 1)


def test_the_last_output_is_cleared_and_pauses_mark_nothing() -> None:
    with Provenance(refuse) as provenance:
        marked = torch.ones(2)
        provenance.mark(marked, "layer 0")
        with provenance.paused():
            inside = marked * 2
            assert marked.sum().item() == 2
        assert provenance.of(inside) is None
        output = marked * 3
        provenance.clear((output,))
        assert provenance.of(output) is None
        assert provenance.of(marked) == "layer 0"


def test_marked_memory_is_held_lest_its_key_is_used_again() -> None:
    with Provenance(refuse) as provenance:
        for _ in range(20):
            provenance.mark(torch.ones(1000), "layer 0")
            assert provenance.of(torch.ones(1000)) is None
