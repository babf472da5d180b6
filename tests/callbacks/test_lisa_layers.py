"""The draw of blocks, and which parameter belongs to which part of a model."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_align.callbacks.lisa_layers import (
    Partition,
    draw_blocks,
    language_model,
    num_bytes,
    partition,
    weight_norms,
)
from lightning_align.layers import find_layers
from tests.helpers.lisa import BLOCKS, Layered, build
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder


def names(module: nn.Module, parameters: Any) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter in parameters}


def parts(module: nn.Module, embeddings: bool = True, head: bool = True) -> Partition:
    layers = find_layers(module)
    return partition(module, layers, train_embeddings=embeddings, train_head=head)


# The draw


def test_the_draw_is_a_function_of_seed_and_interval_and_moves_no_generator() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = [draw_blocks(3, interval, 2, [1.0] * 5) for interval in range(40)]
    assert drawn == [draw_blocks(3, interval, 2, [1.0] * 5) for interval in range(40)]
    assert drawn != [draw_blocks(4, interval, 2, [1.0] * 5) for interval in range(40)]
    assert all(len(set(blocks)) == 2 and list(blocks) == sorted(blocks) for blocks in drawn)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_uniform_draws_have_every_pair_of_blocks_equally_often() -> None:
    """10 pairs in 4000 draws: 400 each, standard deviation sqrt(4000 x 0.1 x 0.9) = 19."""
    counts = Counter(draw_blocks(0, interval, 2, [1.0] * 5) for interval in range(4000))
    assert len(counts) == 10
    assert all(abs(count - 400) < 4.5 * 19 for count in counts.values())


def test_weighted_draws_are_drawn_one_after_the_other_by_weight() -> None:
    """Weights 3, 2, 1: P({0, 1}) = 3/6 x 2/3 + 2/6 x 3/4 = 7/12, and so on; 0 is never drawn."""
    draws = 4000
    counts = Counter(draw_blocks(0, interval, 2, [3.0, 2.0, 0.0, 1.0]) for interval in range(draws))
    expected = {
        (0, 1): 3 / 6 * 2 / 3 + 2 / 6 * 3 / 4,
        (0, 3): 3 / 6 * 1 / 3 + 1 / 6 * 3 / 5,
        (1, 3): 2 / 6 * 1 / 4 + 1 / 6 * 2 / 5,
    }
    assert counts.keys() == expected.keys()
    for pair, share in expected.items():
        assert counts[pair] == pytest.approx(draws * share, abs=4.5 * (draws * 0.25) ** 0.5)


@pytest.mark.parametrize("weight", [5e-324, 1e-300, 1.7e308])
def test_only_the_ratios_of_weights_matter(weight: float) -> None:
    """A logarithm divided by 5e-324 is infinite: always the last blocks would train."""
    for interval in range(40):
        drawn = draw_blocks(3, interval, 2, [weight] * 5)
        assert drawn == draw_blocks(3, interval, 2, [1.0] * 5)


@given(
    seed=st.integers(0, 2**63),
    weights=st.lists(st.sampled_from([0.0, 1e-300, 0.5, 1.0, 1e300]), min_size=1, max_size=12),
    data=st.data(),
)
def test_as_many_blocks_as_asked_are_drawn_ascending_and_none_of_weight_0(
    seed: int, weights: list[float], data: st.DataObject
) -> None:
    possible = [block for block, weight in enumerate(weights) if weight]
    number = data.draw(st.integers(0, len(possible)))
    blocks = draw_blocks(seed, 3, number, weights)
    assert len(blocks) == number
    assert list(blocks) == sorted({*blocks})
    assert {*blocks} <= {*possible}
    if number == len(possible):
        assert list(blocks) == possible


def test_norms_are_of_all_weights_of_a_block_in_fp32() -> None:
    """sqrt(3^2 + 4^2); the norm of 100 times 1e4 is no fp16."""
    first = nn.ParameterList([torch.tensor([3.0]), torch.tensor([[0.0, -4.0]])])
    second = nn.ParameterList([torch.full((100,), 1e4, dtype=torch.float16)])
    assert weight_norms([first, second]) == pytest.approx([5.0, 1e5])


# The parts of a model


def test_each_parameter_of_a_model_is_in_one_part() -> None:
    module = TINY_MODELS["llama"]()
    found = parts(module)
    assert names(module, found.always) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert not found.never
    for number, block in enumerate(found.blocks):
        assert block == {*module.model.layers[number].parameters()}


def test_embedding_and_head_with_its_norm_can_be_left_out() -> None:
    module = PlainDecoder()
    head, embeddings = (
        {"norm.weight", "norm.bias", "to_logits.weight", "to_logits.bias"},
        {
            "tokens.weight",
            "positions.weight",
        },
    )
    for with_embeddings in (True, False):
        for with_head in (True, False):
            found = parts(module, with_embeddings, with_head)
            always = (embeddings if with_embeddings else set()) | (head if with_head else set())
            assert names(module, found.always) == always
            assert names(module, found.never) == (embeddings | head) - always


def test_tied_embedding_and_head_go_together() -> None:
    module = TINY_MODELS["llama_tied"]()
    for embeddings, head in ((True, False), (False, True)):
        message = rf"LISA\(train_embeddings={embeddings}\): .* are one weight, which trains or does"
        with pytest.raises(ValueError, match=message):
            parts(module, embeddings, head)
    assert names(module, parts(module, False, False).never) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert not parts(module).never


def test_what_was_frozen_before_is_in_no_part() -> None:
    module = Layered()
    frozen = [module.embedding.weight, module.blocks[1][0].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for with_embeddings in (True, False):
        found = parts(module, embeddings=with_embeddings)
        everywhere = found.always.union(found.never, *found.blocks)
        assert everywhere == {*module.parameters()} - {*frozen}


def test_a_parameter_of_two_blocks_trains_with_either_and_one_shared_outside_always() -> None:
    module = Layered()
    module.blocks[1][0].weight = module.blocks[0][0].weight
    module.blocks[3][0].bias = nn.Parameter(torch.zeros(16))
    module.norm_bias = module.blocks[3][0].bias
    found = parts(module)
    shared = module.blocks[0][0].weight
    assert [shared in block for block in found.blocks] == [True, True, False, False]
    assert shared in found.trained([1])
    assert shared not in found.frozen([0])
    assert shared in found.frozen([2, 3])
    assert module.norm_bias in found.trained([])
    assert module.norm_bias not in found.blocks[3]


@given(active=st.sets(st.integers(0, BLOCKS - 1)), head=st.booleans())
def test_what_trains_and_what_is_frozen_are_all(active: set[int], head: bool) -> None:
    module = Layered()
    found = parts(module, head=head)
    trained, frozen = found.trained(active), found.frozen(active)
    assert trained | frozen == {*module.parameters()}
    assert not trained & frozen
    for number, block in enumerate(module.blocks):
        assert {*block.parameters()} <= (trained if number in active else frozen)
    assert (module.head.weight in trained) is head


def test_a_block_with_nothing_to_train_is_named() -> None:
    module = Layered()
    module.blocks[2].requires_grad_(False)
    message = r"LISA\(model='Layered'\): its block 'blocks\.2' has no parameter that requires"
    with pytest.raises(ValueError, match=message):
        parts(module)


# The language model in a module


def test_the_map_of_a_module_of_ours_is_taken() -> None:
    module = build("gpt2")
    assert language_model(module, None) is module.layers
    other = language_model(module, "transformer.h")
    assert other.blocks_name == "transformer.h"
    with pytest.raises(ValueError, match=r"layers_attribute='nowhere'"):
        language_model(module, "nowhere")


def test_a_path_from_the_lightning_module_is_taken_too() -> None:
    module = build("gpt2")
    assert language_model(module, "model.transformer.h").blocks_name == "transformer.h"
    held = nn.ModuleDict({"net": TINY_MODELS["llama"]()})
    for path in ("net.model.layers", "model.layers"):
        assert language_model(held, path).blocks_name == "model.layers"
    with pytest.raises(ValueError, match=r"layers_attribute='net\.layers'\).*'model\.layers' \("):
        language_model(held, "net.layers")


def test_the_model_may_be_held_by_the_module_or_be_it() -> None:
    inner = TINY_MODELS["llama"]()
    assert language_model(nn.ModuleDict({"policy": inner}), None).model is inner
    plain = Layered()
    assert language_model(plain, None).model is plain


def test_bytes_are_counted_once() -> None:
    first, second = torch.zeros(3), torch.zeros(2, dtype=torch.float64)
    assert num_bytes([first, second, first]) == 28
    assert num_bytes([]) == 0
