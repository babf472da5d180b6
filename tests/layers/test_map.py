"""The map of a model. Shapes: B batch, T tokens, D hidden size, V vocabulary."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align.layers import Head, ModelLayers, checkpoint_blocks, find_layers
from tests.helpers.exact import assert_as_exact_as
from tests.helpers.tiny_models import (
    HIDDEN_SIZE,
    MAX_POSITIONS,
    NUM_BLOCKS,
    TINY_MODELS,
    VOCAB_SIZE,
    CausalBlock,
    PlainDecoder,
    TiedDecoder,
    tiny_openai_gpt,
)

CAPPED = {"logit_scale": 2.0, "final_logit_softcapping": 0.5}
MODELS = {
    **TINY_MODELS,
    "plain": PlainDecoder,
    "tied": TiedDecoder,
    "tied_capped": lambda: TiedDecoder(**CAPPED),
}
every_model = pytest.mark.parametrize("name", MODELS)


def tokens(rows: int = 2, length: int = 12, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def own_logits(model: nn.Module, *args: Tensor, **kwargs: object) -> Tensor:
    output = model(*args, **kwargs)
    return getattr(output, "logits", output)


class Outputs(TorchDispatchMode):
    """Every operation that runs, with the shape of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.seen.append((func.__name__, tuple(output.shape)))
        return output


def step(model: nn.Module, layers: ModelLayers) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and number of saved activations of one training step with a fixed seed."""
    parameters = {id(parameter) for parameter in model.parameters()}
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        saved[0] += 0 if id(tensor) in parameters else tensor.numel()
        return tensor

    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BTD = layers.hidden_states(tokens(length=32))
    loss = layers.head.logits(hidden_BTD).logsumexp(-1).mean()
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, saved[0]


# --- the map ------------------------------------------------------------------------------------


@every_model
def test_hidden_states_and_head_give_the_models_own_logits(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    ids_BT = tokens()
    ours = layers.head.logits(layers.hidden_states(ids_BT))
    theirs = own_logits(model, ids_BT)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs)
    layers.probe()


@every_model
def test_map_names_the_parts(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    assert layers.embedding.weight.shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert layers.embedding is not getattr(model, "positions", None)
    assert len(layers.blocks) == len(layers.block_names) == NUM_BLOCKS
    for block, block_name in zip(layers.blocks, layers.block_names, strict=True):
        assert model.get_submodule(block_name) is block
    assert (layers.vocab_size, layers.hidden_size) == layers.head.weight.shape
    assert layers.head_module.weight is layers.head.weight
    tied = ((f"{layers.embedding_name}.weight", f"{layers.head_name}.weight"),)
    assert layers.tied_parameters == (tied if layers.embedding.weight is layers.head.weight else ())


@every_model
def test_final_norm_makes_the_hidden_states_and_blocks_run_in_order(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    outputs: dict[str, Tensor] = {}
    parts = [*layers.block_names, layers.final_norm_name]
    for part in parts:
        model.get_submodule(part).register_forward_hook(
            lambda module, args, output, part=part: outputs.update({part: output})
        )
    hidden_BTD = layers.hidden_states(tokens())
    assert list(outputs) == parts
    assert torch.equal(outputs[layers.final_norm_name], hidden_BTD)


def test_gemma_granite_cohere_and_phi_do_more_than_a_product() -> None:
    heads = {name: find_layers(build()).head for name, build in TINY_MODELS.items()}
    assert {name for name, head in heads.items() if head.softcap == 0.5} == {"gemma2", "gemma3"}
    scales = {name: head.logit_scale for name, head in heads.items() if head.logit_scale != 1.0}
    assert scales == {"granite": 1 / 8, "cohere": 0.25, "cohere2": 0.25}
    assert {name for name, head in heads.items() if head.bias is not None} == {"phi"}


def test_head_computes_its_formula() -> None:
    """Weights and inputs are chosen so that the products are 1 and 3, hence logits 2 and 4.

    With bias 1 both are doubled by the scale; the softcap 4 then gives 4 tanh(1), 4 tanh(2).
    """
    head = Head(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
    hidden = torch.ones(1)
    assert head.logits(hidden).tolist() == [2.0, 4.0]
    assert replace(head, logit_scale=2.0).logits(hidden).tolist() == [4.0, 8.0]
    capped = replace(head, logit_scale=2.0, softcap=4.0).logits(hidden)
    torch.testing.assert_close(capped, 4 * torch.tensor([1.0, 2.0]).tanh())
    assert replace(head, logit_scale=2.0).logits(hidden.bfloat16().float()).dtype == torch.float32


def test_head_is_read_live() -> None:
    model = TINY_MODELS["llama_tied"]()
    layers = find_layers(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB_SIZE, HIDDEN_SIZE))
    assert layers.head.weight is model.lm_head.weight
    assert layers.tied_parameters == ()
    model.resize_token_embeddings(VOCAB_SIZE + 4)
    assert layers.head.weight.shape == (VOCAB_SIZE + 4, HIDDEN_SIZE)
    assert layers.embedding.num_embeddings == VOCAB_SIZE + 4


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


# --- hidden states ------------------------------------------------------------------------------


@every_model
def test_hidden_states_compute_no_logits(name: str) -> None:
    layers = find_layers(MODELS[name]())
    with Outputs() as outputs:
        layers.hidden_states(tokens())
    assert outputs.seen
    assert not [shape for _, shape in outputs.seen if shape[-1:] == (VOCAB_SIZE,)]


def test_hidden_states_and_head_run_what_the_model_runs() -> None:
    layers = find_layers(PlainDecoder())
    ids_BT = tokens()
    with Outputs() as ours:
        layers.head.logits(layers.hidden_states(ids_BT))
    with Outputs() as theirs:
        layers.model(ids_BT)
    assert ours.seen == theirs.seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere2", "opt", "plain"])
def test_positions_and_mask_reach_the_model(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    ids_BT = tokens()
    extra = {
        "position_ids": torch.arange(12).mul(2).expand(2, -1),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }
    extra["attention_mask"][1, 8:] = 0
    ours = layers.head.logits(layers.hidden_states(ids_BT, **extra))
    torch.testing.assert_close(ours, own_logits(model, ids_BT, **extra))
    for missing in extra:
        given = {key: value for key, value in extra.items() if key != missing}
        assert not torch.allclose(ours, layers.head.logits(layers.hidden_states(ids_BT, **given)))


@pytest.mark.parametrize("argument", ["position_ids", "attention_mask"])
def test_an_argument_that_forward_lacks_is_refused(argument: str) -> None:
    layers = find_layers(TiedDecoder())
    with pytest.raises(ValueError, match=rf"hidden_states\({argument}=.*has no argument"):
        layers.hidden_states(tokens(), **{argument: torch.ones(2, 12)})


def test_the_head_is_itself_again_after_an_error() -> None:
    model = PlainDecoder()
    layers = find_layers(model)
    with pytest.raises(IndexError):
        layers.hidden_states(tokens() + VOCAB_SIZE)
    assert "forward" not in vars(model.to_logits)
    assert model(tokens()).shape == (2, 12, VOCAB_SIZE)
    override = vars(model.to_logits)["forward"] = lambda hidden: hidden[..., :1]
    assert layers.hidden_states(tokens()).shape == (2, 12, HIDDEN_SIZE)
    assert vars(model.to_logits)["forward"] is override


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


# --- probe --------------------------------------------------------------------------------------


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
        find_layers(_bert("BertForMaskedLM")).probe()


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


# --- what is refused ----------------------------------------------------------------------------


def _bert(class_name: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.5,
    )
    return getattr(transformers, class_name)(config)


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
        (lambda: _bert("BertModel"), "no language-model head.*AutoModelForCausalLM"),
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


def test_import_needs_no_transformers() -> None:
    code = (
        "import sys, lightning_align.layers; print([m for m in ('transformers', 'lightning') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- activation checkpointing -------------------------------------------------------------------

WITH_DROPOUT = {
    "gpt2": lambda: TINY_MODELS["gpt2"](resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1),
    "gemma2": lambda: TINY_MODELS["gemma2"](attention_dropout=0.1),
    "mixtral": lambda: TINY_MODELS["mixtral"](attention_dropout=0.1),
    "plain": lambda: PlainDecoder(dropout=0.1),
    "tied": lambda: TiedDecoder(dropout=0.1),
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_checkpointing_saves_less_and_changes_no_bit(name: str) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    keys = list(model.state_dict())
    loss, gradients, saved = step(model, layers)
    checkpoint_blocks(layers)
    loss_2, gradients_2, saved_2 = step(model, layers)
    assert torch.equal(loss, loss_2)
    assert gradients.keys() == gradients_2.keys()
    assert all(torch.equal(gradients[key], gradients_2[key]) for key in gradients)
    assert len(gradients) == len(list(model.parameters()))
    # What is left are the inputs of the blocks and the final norm.
    assert saved_2 < 0.15 * saved
    assert list(model.state_dict()) == keys
    layers.probe()


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_twice_is_once(name: str) -> None:
    layers = find_layers(WITH_DROPOUT[name]())
    checkpoint_blocks(layers)
    once = [vars(block).get("forward") for block in layers.blocks]
    checkpoint_blocks(layers)
    assert [vars(block).get("forward") for block in layers.blocks] == once


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_rests_in_evaluation_and_without_gradients(name: str) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    model.eval()
    _, _, saved = step(model, layers)
    checkpoint_blocks(layers)
    assert step(model, layers)[2] == saved
    model.train()
    calls = []
    layers.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        assert not layers.hidden_states(tokens()).requires_grad
    assert calls == [False]


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_leaves_frozen_blocks_out_of_backward(name: str) -> None:
    """With everything below the last block frozen, nothing below it may ask for gradients."""
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    checkpoint_blocks(layers)
    model.requires_grad_(False)
    layers.blocks[-1].requires_grad_(True)
    requires_grad = []
    for block in layers.blocks:
        block.register_forward_hook(
            lambda module, args, output: requires_grad.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    _, gradients, _ = step(model, layers)
    assert requires_grad == [False] * (NUM_BLOCKS - 1) + [True]
    assert all(key.startswith(layers.block_names[-1]) for key in gradients)


@pytest.mark.parametrize("name", ["gpt2", "plain"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_its_own_blocks(name: str, duplicate) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    checkpoint_blocks(layers)
    expected = step(model, layers)
    model.zero_grad()
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss, gradients, saved = step(other, find_layers(other))
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[key], expected[1][key]) for key in expected[1])
    assert saved == expected[2]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_keeps_a_forward_that_was_overridden() -> None:
    model = PlainDecoder()
    layers = find_layers(model)
    original = layers.blocks[0].forward
    layers.blocks[0].forward = lambda x_BTD, mask_BT: 2 * original(x_BTD, mask_BT)
    before = layers.hidden_states(tokens())
    checkpoint_blocks(layers)
    assert torch.equal(layers.hidden_states(tokens()), before)


def test_checkpointed_hugging_face_model_still_trains_through_its_own_forward() -> None:
    """Its default fills a cache, which the recomputation would fill a second time."""
    model = TINY_MODELS["llama"]()
    layers = find_layers(model)
    ids_BT = tokens(length=MAX_POSITIONS // 2)
    model(ids_BT, labels=ids_BT).loss.backward()
    before = layers.embedding.weight.grad.clone()
    model.zero_grad()
    checkpoint_blocks(layers)
    output = model(ids_BT, labels=ids_BT)
    output.loss.backward()
    assert torch.equal(layers.embedding.weight.grad, before)
    assert output.past_key_values is None or output.past_key_values.get_seq_length() == 0


def test_a_model_without_checkpointing_of_its_own_gets_ours() -> None:
    model = tiny_openai_gpt()
    assert not model.supports_gradient_checkpointing
    layers = find_layers(model)
    layers.probe()
    loss, gradients, saved = step(model, layers)
    checkpoint_blocks(layers)
    loss_2, gradients_2, saved_2 = step(model, layers)
    assert torch.equal(loss, loss_2)
    assert all(torch.equal(gradients[key], gradients_2[key]) for key in gradients)
    assert saved_2 < 0.15 * saved


# Documents that share a row. OPT's positions come from a mask, and Falcon's mask is a triangle.
SEEING = ("opt", "falcon")
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
