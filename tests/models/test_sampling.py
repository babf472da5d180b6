"""continue_prompts: rows on the left, and which tokens were written."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_align.layers import find_layers
from lightning_align.layers.sharding import shard
from lightning_align.models.sampling import continue_prompts
from tests.helpers.ranks import run_ranks

SPECIAL = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=9,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        **SPECIAL,
    )
    return GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        **SPECIAL,
    )
    return LlamaForCausalLM(config).eval()


def write(model, prompts, **options):
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    return continue_prompts(model, prompts, max_new_tokens=5, **options)


def test_a_prompt_is_continued_as_alone_however_long_the_others_are():
    prompts = [[3], [4, 5, 6, 7], [8, 1]]
    for model in (gpt2(), llama()):
        together = write(model, prompts)
        for row, prompt in enumerate(prompts):
            (alone,) = write(model, [prompt])["input_ids"].tolist()
            kept = together["attention_mask"][row].bool()
            assert together["input_ids"][row][kept].tolist() == alone
        assert together["completion_mask"].sum(1).tolist() == [5, 5, 5]
        assert (together["completion_mask"] <= together["attention_mask"]).all()


def test_a_completion_ends_with_the_token_that_ends_it():
    """Here it is what fills rows up, too, and a token that a prompt may hold."""
    model = gpt2()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(9, 16))  # uniform, not tied
    torch.manual_seed(1)
    rows = write(model, [[0, 3]] * 200, eos_token_id=0, do_sample=True, top_k=0)
    new, mask = rows["input_ids"][:, 2:], rows["completion_mask"][:, 2:]
    lengths = set()
    for written, counted in zip(new.tolist(), mask.tolist(), strict=True):
        length = written.index(0) + 1 if 0 in written else 5
        lengths.add(length)
        assert counted == [1] * length + [0] * (len(counted) - length)
    assert lengths == {1, 2, 3, 4, 5}
    assert rows["completion_mask"][:, :2].sum() == 0


def test_ranks_that_hold_parts_of_the_model_stop_together():
    """One has written its last token when another has four to go, and gathers layers for it."""
    (ids,) = write(gpt2(), [[3, 4]])["input_ids"].tolist()
    ends = [None, ids[2]]

    def on_a_rank(rank):
        model, calls = gpt2(), []
        model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
        rows = write(model, [[3, 4]], eos_token_id=ends[rank], together=True)
        return rows["input_ids"][rows["attention_mask"].bool()].tolist(), len(calls)

    assert run_ranks(on_a_rank, timeout_s=30) == [(ids, 5), (ids[:3], 5)]


def test_a_model_that_is_sharded_is_whole_while_it_writes_and_sharded_again_behind_it():
    expected = write(gpt2(), [[3, 4]])["input_ids"].tolist()

    def on_a_rank(rank):
        layers = find_layers(gpt2())
        shard(layers, init_device_mesh("cpu", (2,)), where="test")
        found = write(layers.model, [[3, 4]], together=True)["input_ids"].tolist()
        assert all(isinstance(p, DTensor) for p in layers.model.parameters())
        return found

    assert run_ranks(on_a_rank, timeout_s=30) == [expected] * 2
