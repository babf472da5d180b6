"""Finding the layers of a decoder: what is read, what decides, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_align.layers import find_layers
from lightning_align.layers.find import (
    find_held_model,
    find_language_models,
    inner_attribute,
    kept_layers,
)
from tests.helpers.decoders import MODELS, Outputs, tiny_bert
from tests.helpers.tiny_models import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    TINY_MODELS,
    VOCAB_SIZE,
    CausalBlock,
    PlainDecoder,
    TiedDecoder,
)


@settings(max_examples=25, deadline=None)
@given(
    vocab_size=st.integers(9, 80),
    half_width=st.integers(1, 12),
    max_positions=st.integers(12, 80),
    num_blocks=st.integers(1, 3),
    tied=st.booleans(),
)
def test_any_sizes_of_a_custom_module(
    vocab_size: int, half_width: int, max_positions: int, num_blocks: int, tied: bool
) -> None:
    """Also where positions, MLP widths or attention widths are as many as there are tokens."""
    build = TiedDecoder if tied else PlainDecoder
    layers = find_layers(build(vocab_size, 2 * half_width, num_blocks, max_positions))
    assert (layers.embedding_name, layers.head_name, layers.blocks_name) == (
        ("transformer.wte", "lm_head", "transformer.h")
        if tied
        else ("tokens", "to_logits", "layers")
    )
    assert layers.final_norm_name == ("transformer.ln_f" if tied else "norm")
    assert len(layers.blocks) == num_blocks
    layers.probe()


def test_sequential_blocks_and_no_final_norm() -> None:
    model = nn.Sequential()
    model.embed = nn.Embedding(50, 8)
    model.body = nn.Sequential(*(CausalBlock(8, 2) for _ in range(3)))
    model.head = nn.Linear(8, 50)
    layers = find_layers(model)
    assert (layers.blocks_name, layers.final_norm_name) == ("body", None)
    assert layers.final_norm is None
    layers.probe()


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=HIDDEN_SIZE, d_ff=48, d_kv=8, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


class Adapted(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def _with(**modules: nn.Module) -> nn.Module:
    model = PlainDecoder()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


class Peft(nn.Module):
    peft_config: dict[str, object] = {}  # noqa: RUF012

    def get_base_model(self) -> None: ...


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: tiny_bert("BertModel"), "no language-model head.*AutoModelForCausalLM"),
        (_t5, "encoder-decoder and must be a decoder"),
        (lambda: TINY_MODELS["llama"]().model, "no language-model head"),
        (lambda: torch.compile(PlainDecoder()), "wrapper.*from before torch.compile"),
        (Peft, r"wrapper.*get_base_model\(\)"),
        (lambda: _with(to_logits=Adapted(32, 101)), "'to_logits' is a Adapted and must be a plain"),
        (lambda: _with(to_logits=nn.Linear(32, 99)), r"'tokens': 101.*'to_logits': 99"),
        (
            lambda: _with(second=nn.Linear(32, 101)),
            "'to_logits': 101, 'second': 101.*get_output_emb",
        ),
        (lambda: _with(layers=CausalBlock(32, 2)), r"candidates \(lengths\): none"),
        (
            lambda: _with(more=nn.ModuleList(CausalBlock(32, 2) for _ in range(2))),
            r"'layers' \(3\), 'more' \(2\)\. Name it with layers_attribute",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(build, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_layers(build())


def test_layers_attribute_decides() -> None:
    model = _with(more=nn.ModuleList(CausalBlock(32, 2) for _ in range(2)))
    assert find_layers(model, layers_attribute="layers").block_names[0] == "layers.0"
    assert len(find_layers(model, layers_attribute="more").blocks) == 2
    with pytest.raises(ValueError, match=r"layers_attribute='layer'\): must.*'layers' \(3\)"):
        find_layers(model, layers_attribute="layer")
    llama = TINY_MODELS["llama"]()
    assert find_layers(llama, layers_attribute="model.layers").blocks == find_layers(llama).blocks
    with pytest.raises(ValueError, match=r"'model.layers' \(3\)"):
        find_layers(llama, layers_attribute="layers")


def test_a_path_from_the_holder_leads_into_the_model() -> None:
    llama = TINY_MODELS["llama"]()
    module = nn.ModuleDict({"net": nn.ModuleDict({"policy": llama})})
    within = partial(inner_attribute, module, llama)
    assert within("net.policy.model.layers") == within("model.layers") == "model.layers"
    for path in ("net.model.layers", "net.policy.layers", "nowhere"):
        assert within(path) == path
    assert inner_attribute(llama, llama, "model.layers") == "model.layers"


def test_a_small_side_list_is_not_ambiguous() -> None:
    model = _with(gates=nn.ModuleList(nn.Linear(32, 1) for _ in range(NUM_BLOCKS)))
    assert find_layers(model).blocks_name == "layers"


def test_the_tied_head_is_the_head() -> None:
    model = TiedDecoder()
    model.value_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    assert find_layers(model).head_name == "lm_head"


def test_a_custom_module_may_declare_its_ends() -> None:
    model = _with(second=nn.Linear(32, 101))
    model.get_input_embeddings = lambda: model.tokens
    model.get_output_embeddings = lambda: model.to_logits
    assert find_layers(model).head_name == "to_logits"


def test_finding_computes_nothing() -> None:
    models = [build() for build in MODELS.values()]
    with Outputs() as outputs:
        for model in models:
            find_layers(model)
    assert outputs.seen == []


# The language models in a module


class Passing(nn.Module):
    """A wrapper that has whatever the model has, as torch.compile's and PEFT's do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_model_of_transformers_is_found_whole_wherever_it_is(name: str) -> None:
    model, other = TINY_MODELS[name](), TINY_MODELS["llama"]()
    assert find_language_models(model) == {"": model}
    module = nn.ModuleDict({"norm": nn.LayerNorm(3), "policy": model, "reference": other})
    assert list(find_language_models(module).items()) == [("policy", model), ("reference", other)]
    assert find_held_model(module, "generate", where="Us", way_out="") == ("policy", model)


def test_a_module_written_by_hand_is_one_if_it_says_where_its_head_is() -> None:
    class Declared(PlainDecoder):
        def get_output_embeddings(self) -> nn.Module:
            return self.to_logits

    model = Declared()
    module = nn.Sequential(nn.ModuleDict({"net": model}), PlainDecoder())
    assert find_language_models(module) == {"0.net": model}
    assert find_language_models(PlainDecoder()) == {}


def test_a_wrapper_is_no_model_and_the_model_in_it_is() -> None:
    model = TINY_MODELS["gpt2"]()
    for wrapper in (Passing(model), torch.compile(model)):
        assert callable(wrapper.generate)
        ((name, found),) = find_language_models(wrapper).items()
        assert (name, found) in (("inner", model), ("_orig_mod", model))
        held = find_held_model(nn.ModuleList([wrapper]), "generate", where="Us", way_out="")
        assert held == (f"0.{name}", model)


def test_a_method_of_the_user_module_is_no_model() -> None:
    class Own(nn.Module):
        def __init__(self, **models: nn.Module) -> None:
            super().__init__()
            for name, model in models.items():
                self.add_module(name, model)

        def generate(self, prompt: str) -> str:
            return prompt

    model = TINY_MODELS["llama"]()
    assert find_held_model(Own(net=model), "generate", where="Us", way_out="") == ("net", model)
    message = r"^Us\(pl_module='Own'\): holds no module with a generate method\. Pass a model\.$"
    with pytest.raises(ValueError, match=message):
        find_held_model(Own(net=PlainDecoder()), "generate", where="Us", way_out="Pass a model")


def test_layers_are_kept_by_modules_of_ours_only() -> None:
    module = nn.Module()
    assert kept_layers(module) is None
    module.layers = find_layers(PlainDecoder())
    assert kept_layers(module) is module.layers
    assert kept_layers(PlainDecoder()) is None, "its layers are a ModuleList"
