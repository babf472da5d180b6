import copy

import pytest
import torch

from lightning_align.layers import find_layers
from lightning_align.losses.reference import reference_layers
from lightning_align.offload.away import go_away
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE


def llama(**options):
    return TINY_MODELS["llama"](**options)


def test_a_copy_is_a_reference():
    model = llama()
    reference = copy.deepcopy(model)
    assert reference_layers("here", find_layers(model), reference).model is reference
    frozen = copy.copy(model.requires_grad_(False))
    assert reference_layers("here", find_layers(model), frozen).model is frozen  # it cannot learn
    meta = model.requires_grad_(True).to("meta")
    assert reference_layers("here", find_layers(meta), copy.deepcopy(meta)).vocab_size == VOCAB_SIZE


def test_what_would_learn_with_the_policy_is_none():
    model = llama()
    with pytest.raises(ValueError, match=r"here\(ref_model='model'\): must be another object"):
        reference_layers("here", find_layers(model), model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM'\): shares '.*' with model.*deepcopy"):
        reference_layers("here", find_layers(model), copy.copy(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_memory_under_two_names_is_found():
    """The optimizer writes to it in place."""
    model, reference = llama(), llama()
    reference.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"shares 'model.embed_tokens.weight' with model"):
        reference_layers("here", find_layers(model), reference)
    one = copy.deepcopy(reference)
    one.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach())
    with pytest.raises(ValueError, match=r"shares 'model.norm.weight' with model"):
        reference_layers("here", find_layers(model), one)


def test_weights_that_are_away_are_not_brought_to_be_compared():
    """Those that are brought have the memory of those that were brought before."""
    model, reference = llama(), llama()
    for parameter in (*model.parameters(), *reference.parameters()):
        go_away(parameter, "away", torch.full((), torch.nan).expand(parameter.shape))
    assert reference_layers("here", find_layers(model), reference).model is reference


def test_another_vocabulary():
    rule = rf"its vocabulary has {VOCAB_SIZE + 1} rows and that of model {VOCAB_SIZE}; they must"
    with pytest.raises(ValueError, match=rf"ref_model='LlamaForCausalLM'\): {rule}"):
        reference_layers("here", find_layers(llama()), llama(vocab_size=VOCAB_SIZE + 1))


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as those of quantised weights."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.values if isinstance(arg, Wrapper) else arg for arg in args]
        return Wrapper(func(*plain, **(kwargs or {})))


def test_weights_without_memory_of_their_own_are_told_apart_as_objects():
    model, reference = llama(), llama()
    for one in (model, reference):
        values = one.model.norm.weight.detach().clone()
        one.model.norm.weight = torch.nn.Parameter(Wrapper(values))
    assert reference_layers("here", find_layers(model), reference).model is reference
    reference.model.norm.weight = model.model.norm.weight
    with pytest.raises(ValueError, match=r"shares 'model.norm.weight' with model"):
        reference_layers("here", find_layers(model), reference)
