import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_align.layers import find_layers
from lightning_align.losses import (
    PairAttention,
    PairLayout,
    check_pair_attention,
    lay_out_pairs,
    sequence_logps,
)
from lightning_align.losses import pair_attention as of_pairs
from lightning_align.losses.pair_attention import pair_attention
from lightning_align.losses.sequence_logps import model_completion_logps
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE, PlainDecoder

MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "llama": ("llama", {}),
    "eager": ("llama", {"attn_implementation": "eager"}),
    "qwen3": ("qwen3", {}),
    "qwen3_window": (
        "qwen3",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gpt2": ("gpt2", {}),
    "gemma3": ("gemma3", {"sliding_window": 4, **MIXED}),
    "gemma3_eager": ("gemma3", {"sliding_window": 4, "attn_implementation": "eager", **MIXED}),
}


def make_batch(pairs=3, side="right", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    prompts = [
        torch.randint(1, VOCAB_SIZE, (number(1, 12),), generator=generator) for _ in range(pairs)
    ]
    batch = {
        name: torch.zeros(2 * pairs, 24, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row in range(2 * pairs):
        prompt, length = prompts[row % pairs], number(1, 11)
        completion = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        start = 0 if side == "right" else 24 - len(prompt) - length
        middle, end = start + len(prompt), start + len(prompt) + length
        batch["input_ids"][row, start:end] = torch.cat([prompt, completion])
        batch["attention_mask"][row, start:end] = 1
        batch["completion_mask"][row, middle:end] = 1
    return batch


def values_and_gradients(model, batch, **options):
    scored = model_completion_logps(model, *batch.values(), **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, len(scored.logps_B)).to(scored.logps_B)
    return scored, torch.autograd.grad((scored.logps_B * weights).sum(), parameters)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_pairs_match_separate_rows(name, packing, side):
    family, options = MODELS[name]
    eager = "eager" in options.values()
    model, batch = TINY_MODELS[family](**options), make_batch(side=side)
    if not eager:  # which cannot hide padding in float64
        model.double()
    theirs, their_gradients = values_and_gradients(model, batch)
    ours, our_gradients = values_and_gradients(model, batch, prefix_sharing=True, packing=packing)
    # Norms are in fp32 also in float64: a difference of 1e-16 may round to one of 1e-7 there.
    tolerance = 2e-5 if eager else 2e-6
    for field, value in theirs._asdict().items():
        if value is not None:
            torch.testing.assert_close(
                getattr(ours, field), value, rtol=tolerance, atol=tolerance, msg=field
            )
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert (our - their).abs().max() <= tolerance * max(1.0, their.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_in_fp32_they_differ_by_rounding(name):
    family, options = MODELS[name]
    model, batch = TINY_MODELS[family](**options), make_batch()
    ours = sequence_logps(model, **batch, prefix_sharing=True)
    torch.testing.assert_close(ours, sequence_logps(model, **batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [4, 4096])
@pytest.mark.parametrize("name", ["qwen3_window", "mistral", "gemma3"])
def test_the_check_sees_a_forgotten_window_of_any_size(name, window, monkeypatch):
    """16 tokens fit into a window of 4096, so the check has it shrunk for a while."""
    family, options = MODELS[name]
    model = TINY_MODELS[family](**{**options, "sliding_window": window})
    attention = check_pair_attention(find_layers(model))
    assert window in dict(attention.windows).values()
    assert model.config.sliding_window == window

    def without_windows(model):
        found = pair_attention(model)
        return PairAttention(tuple((name, None) for name, _ in found.windows), found.form)

    monkeypatch.setattr(of_pairs, "pair_attention", without_windows)
    with pytest.raises(ValueError, match="two pairs in one row must be those of four"):
        check_pair_attention(find_layers(model))
    assert model.config.sliding_window == window


def test_windows_are_counted_in_positions_not_in_places():
    """Three places and one position are between the prompt and the second rejected token."""
    model = TINY_MODELS["mistral"](sliding_window=3).double()
    batch = make_batch()
    ours = sequence_logps(model, **batch, prefix_sharing=True)
    torch.testing.assert_close(ours, sequence_logps(model, **batch), rtol=1e-6, atol=1e-6)
    without = sequence_logps(TINY_MODELS["llama"]().double(), **batch, prefix_sharing=True)
    assert (without - ours).abs().max() > 0.1


def built(model_type, **options):
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **options)
    return AutoModelForCausalLM.from_config(config)


BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
}
REFUSED = {
    "bloom": (lambda: built("bloom", **BLOOM), "takes no position_ids"),
    "mamba": (lambda: built("mamba", **MAMBA), "takes no position_ids"),
    "falcon_alibi": (lambda: built("falcon", **FALCON), "mask of rows|two pairs in one row"),
    "gpt_neo": (lambda: built("gpt_neo", **NEO), "window_size=256"),
    "by_hand": (PlainDecoder, "not that of a model of transformers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_share_is_refused_and_auto_takes_separate_rows(name):
    build, message = REFUSED[name]
    model, batch = build(), make_batch()
    with pytest.raises(ValueError, match=message):
        sequence_logps(model, **batch, prefix_sharing=True)
    separate = sequence_logps(model, **batch)
    assert torch.equal(sequence_logps(model, **batch, prefix_sharing="auto"), separate)


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", True), ("eager", False), ("mistral", False)]
)
def test_it_is_seen_whether_attention_runs_each_pair_alone(name, expected):
    family, options = MODELS[name]
    assert check_pair_attention(find_layers(TINY_MODELS[family](**options))).pairs_alone is expected


def test_no_position_is_read_where_one_would_wait_for_a_device():
    """As on meta, where there is none to read."""
    batch = make_batch()
    layout = lay_out_pairs(batch["input_ids"], batch["attention_mask"])
    elsewhere = PairLayout(*(each.to("meta") for each in layout))
    mask = PairAttention((("", 4),), "boolean").arguments(elsewhere, torch.float32)
    assert mask["attention_mask"].shape == layout.visible().shape


@pytest.mark.parametrize("part", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_a_compiled_model_gets_the_mask_written_out(part):
    """Its pairs are others in each batch, and none may be traced as if they were always there."""
    model, batch = TINY_MODELS["llama"](), make_batch()
    theirs = sequence_logps(model, **batch)
    for each in find_layers(model).blocks if part == "blocks" else [model.model]:
        each.compile(backend="eager")
    ours = sequence_logps(model, **batch, prefix_sharing=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not check_pair_attention(find_layers(model)).pairs_alone


@pytest.mark.slow
def test_a_step_that_is_compiled_whole_makes_no_mask_of_pairs():
    batches = [make_batch(seed=seed) for seed in range(2)]
    attention = check_pair_attention(find_layers(TINY_MODELS["llama"]()))

    def mask(batch):
        layout = lay_out_pairs(batch["input_ids"], batch["attention_mask"])
        return attention.arguments(layout, torch.float32)["attention_mask"]

    for batch in batches:
        ours = torch.compile(mask, backend="eager")(batch)
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, mask(batch).written())


def test_layers_and_kernels_that_look_back_in_another_way_are_refused():
    model = TINY_MODELS["llama"]()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2' takes no mask.*Use 'sdpa' or"):
        pair_attention(model)
    model = TINY_MODELS["qwen3"]()
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="layers of 'chunked_attention'"):
        pair_attention(model)
    with pytest.raises(ValueError, match="not here to compare"):
        check_pair_attention(find_layers(TINY_MODELS["llama"]().to("meta")))


def test_a_prompt_that_differs_within_a_pair_is_shared_as_far_as_it_is_the_same():
    model, batch = TINY_MODELS["llama"]().double(), make_batch()
    batch["input_ids"][0, 0] = batch["input_ids"][0, 0] % (VOCAB_SIZE - 1) + 1
    ours = sequence_logps(model, **batch, prefix_sharing=True)
    torch.testing.assert_close(ours, sequence_logps(model, **batch), rtol=1e-6, atol=1e-6)


def test_a_completion_behind_padding_is_predicted_from_there():
    """As TRL scores an empty prompt that is padded on the left: no row of a pair has that place."""
    model, batch = TINY_MODELS["llama"](), make_batch(side="left")
    batch["attention_mask"][0] = batch["completion_mask"][0]
    ours = sequence_logps(model, **batch, prefix_sharing=True)
    assert torch.equal(ours, sequence_logps(model, **batch))


@pytest.mark.parametrize("window", [None, 3])
def test_blocks_for_flex_attention_have_the_same_mask(window):
    """The kernel itself needs a device; what it is told does not."""
    from torch.nn.attention.flex_attention import create_mask

    batch = make_batch(pairs=5)
    layout = lay_out_pairs(batch["input_ids"], batch["attention_mask"], packing=True)
    attention = PairAttention((("", window),), "blocks")
    blocks = attention.arguments(layout, torch.float32)["attention_mask"]
    rows, width = layout.input_ids_RL.shape
    dense = create_mask(blocks.mask_mod, rows, None, width, width, device="cpu")
    assert torch.equal(dense, layout.visible(window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_flex_attention_matches_separate_rows(name):
    family, options = MODELS[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}  # a kernel's least
    flex = TINY_MODELS[family](**{**options, **sizes, "attn_implementation": "flex_attention"})
    sdpa = TINY_MODELS[family](**{**options, **sizes, "attn_implementation": "sdpa"}).cuda()
    batch = {key: value.cuda() for key, value in make_batch().items()}
    flex.load_state_dict(sdpa.state_dict())
    assert check_pair_attention(find_layers(flex.cuda())).form == "blocks"
    ours = sequence_logps(flex, **batch, prefix_sharing=True)
    # Two kernels with sums in another order, possibly in TF32: 1e-3 of a few dozen nats.
    torch.testing.assert_close(ours, sequence_logps(sdpa, **batch), rtol=1e-3, atol=1e-3)
