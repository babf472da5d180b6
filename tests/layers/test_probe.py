"""The map of a model, checked on a few tokens: its logits, its documents."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_align.layers import find_layers
from tests.helpers.decoders import MODELS, own_logits, tiny_bert, tokens
from tests.helpers.exact import assert_as_exact_as
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE, PlainDecoder, TiedDecoder

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])


class LastTokenOnly(PlainDecoder):
    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTD = self.tokens(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.to_logits(self.norm(x_BTD)[:, [-1]])


class HeadByHand(PlainDecoder):
    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.linear(self.tokens(input_ids), self.to_logits.weight)


@pytest.mark.parametrize(
    ("model", "match"),
    [(LastTokenOnly(), r"\(2, 8\) it did on \[\(2, 1\)\]"), (HeadByHand(), "it did on nothing")],
)
def test_a_head_that_does_not_see_every_token_is_refused(model: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_layers(model).probe()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "cohere", "phi", "tied_capped"])
def test_probe_sees_what_the_head_does(name: str, dtype: torch.dtype) -> None:
    """In every dtype: right as found, wrong when softcap or scale is ignored."""
    layers = find_layers(MODELS[name]().to(dtype))
    layers.probe()
    ignored = replace(layers, softcap=None, logit_scale=1.0)
    if name == "phi":
        layers.model.lm_head.register_forward_hook(lambda head, args, logits: logits - head.bias)
    with pytest.raises(ValueError, match=r"logits are not those of its head.*differ by up to \d"):
        ignored.probe()


def test_probe_sees_a_softcap_far_above_the_logits() -> None:
    """A default Gemma 2 caps at 30; untrained logits stay near 0.1, where tanh is the identity."""
    model = TINY_MODELS["gemma2"](initializer_range=0.005, final_logit_softcapping=30.0)
    layers = find_layers(model)
    ids_BT = tokens()
    ignoring = replace(layers, softcap=None)
    # The plain comparison would let it through at any tolerance that a probe could have.
    plain = ignoring.head.logits(layers.hidden_states(ids_BT))
    torch.testing.assert_close(plain, own_logits(model, ids_BT), rtol=1e-5, atol=1e-6)
    layers.probe()
    with pytest.raises(ValueError, match="final_logit_softcapping=30"):
        ignoring.probe()


def test_probe_sees_a_small_bias_that_is_not_the_heads() -> None:
    model = PlainDecoder()
    model.to_logits.register_forward_hook(lambda head, args, logits: logits + 1e-3)
    with pytest.raises(ValueError, match=r"differ by up to 0\.001"):
        find_layers(model).probe()


class Drawing(PlainDecoder):
    def forward(self, input_ids: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(input_ids)


def test_probe_leaves_the_generator_alone_though_the_model_draws() -> None:
    layers = find_layers(Drawing())
    state = torch.get_rng_state()
    layers.probe()
    assert torch.equal(torch.get_rng_state(), state)
    layers.hidden_states(tokens())
    assert not torch.equal(torch.get_rng_state(), state)


def test_probe_names_what_config_it_does_not_understand() -> None:
    model = TiedDecoder(logit_scale=3.0)
    model.config = SimpleNamespace(
        logit_scale=3.0, final_logit_softcapping=None, logits_temperature=0.7
    )
    layers = replace(find_layers(model), logit_scale=1.0)
    with pytest.raises(ValueError, match=r"logit_scale=3, logits_temperature=0\.7"):
        layers.probe()


def test_probe_leaves_no_trace() -> None:
    model = TINY_MODELS["gpt2"](resid_pdrop=0.5)
    layers = find_layers(model)
    layers.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    layers.probe()
    with pytest.raises(ValueError, match="differ by"):
        replace(layers, logit_scale=2.0).probe()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_probe_refuses_nan() -> None:
    model = PlainDecoder()
    nn.init.constant_(model.to_logits.bias, float("nan"))
    with pytest.raises(ValueError, match="differ by up to nan"):
        find_layers(model).probe()


def test_probe_refuses_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = PlainDecoder()
    with pytest.raises(ValueError, match="meta device"):
        find_layers(model).probe()


def test_probe_refuses_a_model_that_sees_the_future() -> None:
    with pytest.raises(ValueError, match="must not depend on later tokens"):
        find_layers(tiny_bert("BertForMaskedLM")).probe()


def test_probe_refuses_the_wrong_embedding() -> None:
    model = PlainDecoder(max_positions=VOCAB_SIZE)
    layers = replace(find_layers(model), embedding_name="positions")
    with pytest.raises(ValueError, match="tokens must go through its embedding 'positions'"):
        layers.probe()


def test_probe_refuses_other_logits_and_other_widths() -> None:
    model = TINY_MODELS["llama"]()
    layers = find_layers(model)
    model.resize_token_embeddings(VOCAB_SIZE + 4)
    layers.probe()  # The head is read live, so this one is fine.
    model.lm_head.register_forward_hook(lambda head, args, logits: logits[..., :VOCAB_SIZE])
    with pytest.raises(ValueError, match=r"must have shape \(2, 8, 105\), not \(2, 8, 101\)"):
        layers.probe()
    with pytest.raises(ValueError, match="gives 32 features, not 16"):
        replace(layers, hidden_size=16).probe()


# Documents that share a row. OPT's positions come from a mask, and Falcon's mask is a triangle.
# From 5.24 on, Falcon of transformers attends by position_ids as well.
SEEING = ("opt",) if TRANSFORMERS >= (5, 24) else ("opt", "falcon")
SEPARATE = [name for name in TINY_MODELS if name not in SEEING]
KERNELS = [
    (name, kernel)
    for name in SEPARATE
    for kernel in ("eager", "sdpa")
    if (name, kernel) != ("gemma2", "sdpa")  # its scores have a softcap, which sdpa does not know
]
WINDOWED = ("mistral", "gemma2", "gemma3", "cohere2")


def row_of(lengths: list[int], generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
    """Documents of these lengths, a row of them all, and their positions."""
    documents = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return documents, torch.cat(documents)[None], positions[None]


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_a_document_is_the_same_to_the_bit_whatever_its_neighbours_are(name, kernel) -> None:
    """The same tokens in the same place of a row of the same length.

    Experts round by the number of tokens they are given, and that depends on the neighbours.
    """
    layers = find_layers(TINY_MODELS[name](attn_implementation=kernel).eval())
    generator = torch.Generator().manual_seed(3)
    documents, _, _ = row_of([17], generator)
    found = []
    for before, behind in ([5, 6], [8, 3]), ([11], [11]), ([1] * 11, [1] * 11):
        _, ids, positions = row_of([*before, 17, *behind], generator)
        ids[0, 11:28] = documents[0]
        with torch.no_grad():
            found.append(layers.hidden_states(ids, positions)[0, 11:28])
    for other in found[1:]:
        if name == "mixtral":
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
        else:
            assert torch.equal(other, found[0])


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_a_document_is_what_it_is_alone(name, kernel) -> None:
    """Up to rounding: a shorter row is another shape, and kernels sum in another order.

    Windows are shorter than the documents, where a model has any.
    """
    window = {"sliding_window": 6} if name in WINDOWED else {}
    layers = find_layers(TINY_MODELS[name](attn_implementation=kernel, **window).eval())
    wide = find_layers(copy.deepcopy(layers.model).double())
    wide.model.config._experts_implementation = "eager"  # grouped products exist up to fp32
    documents, ids, positions = row_of([11, 1, 17, 9], torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = layers.hidden_states(ids, positions)[0].split([11, 1, 17, 9])
        for document, found in zip(documents, together, strict=True):
            alone = layers.hidden_states(document[None])[0]
            assert_as_exact_as(found, alone, wide.hidden_states(document[None])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEPARATE)
def test_probe_documents_accepts_who_attends_by_positions(name, dtype) -> None:
    model = TINY_MODELS[name]().to(dtype)
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    find_layers(model).probe_documents()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("name", [*SEEING, "plain", "tied"])
def test_probe_documents_refuses_who_does_not(name) -> None:
    model = MODELS[name]()
    rule = "its forward takes no" if name == "tied" else "its documents must not see each other"
    message = rf"\(model='{type(model).__name__}'\): {rule}.* Set separate_documents=False"
    with pytest.raises(ValueError, match=message):
        find_layers(model).probe_documents()


def test_probe_documents_accepts_bits_that_move_without_any_flow() -> None:
    """As in a mixture of experts: what is added to the second document rounds by the first."""

    class Rounding(PlainDecoder):
        leak = 0.0

        def forward(self, input_ids, position_ids=None, attention_mask=None):
            half = input_ids.shape[1] // 2
            x_BTD = self.tokens(input_ids) + self.positions(position_ids)
            x_BTD[:, half:] += self.leak * x_BTD[:, :half]
            x_BTD[:, half:] += 1e-7 * input_ids[:, :half, None]
            return self.to_logits(self.norm(x_BTD))

    model = Rounding()
    find_layers(model).probe_documents()
    model.leak = 1e-6
    with pytest.raises(ValueError, match="its documents must not see each other"):
        find_layers(model).probe_documents()
