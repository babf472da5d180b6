"""Loading and writing a model draw no bars; other bars are as they were."""

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lightning_align._compat.transformers_bars import without_bars

SIZES = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}


def test_no_bar_is_drawn_and_afterwards_they_are_again(tmp_path, capfd):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=1))

    def write_and_load() -> str:
        capfd.readouterr()
        model.save_pretrained(tmp_path)
        LlamaForCausalLM.from_pretrained(tmp_path)
        return capfd.readouterr().err

    with without_bars():
        assert write_and_load() == ""
    loud = write_and_load()
    assert "Writing model shards" in loud
    assert "Loading weights" in loud


def test_the_hook_of_somebody_else_comes_back():
    before = logging.set_tqdm_hook(lambda factory, given, options: factory(*given, **options))
    try:
        mine = logging._tqdm_hook
        with without_bars():
            assert logging._tqdm_hook is not mine
        assert logging._tqdm_hook is mine
    finally:
        logging.set_tqdm_hook(before)
