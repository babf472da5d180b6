import pytest
import torch
from transformers import BloomConfig

from lightning_align.layers import find_layers
from lightning_align.models.build import build_model
from lightning_align.modules.pair_rows import PairRows, by_pair, by_sequence
from lightning_align.strategies.pipeline.microbatches import batch_rows, split_batch
from tests.helpers.tiny_models import TINY_MODELS
from tests.modules.test_dpo import pairs

LLAMA = find_layers(TINY_MODELS["llama"]())


def laid_out(*numbers: int, prefix_sharing: bool = True) -> dict[str, torch.Tensor]:
    rows = PairRows("Test", prefix_sharing, packing=False)
    rows.set_up(LLAMA, None)
    batch = pairs(*numbers) | {"number": torch.tensor(numbers)}
    return {**batch, "layout": rows.of(batch, LLAMA.hidden_size)}


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_pairs_that_were_cut_apart_are_those_of_a_smaller_batch(prefix_sharing: bool) -> None:
    """With the tokens of the whole batch's rows, which are as wide in each part."""
    batch = laid_out(0, 1, 2, 3, prefix_sharing=prefix_sharing)
    cut = by_pair(batch)
    assert batch_rows(cut) == 4
    parts = [by_sequence(part) for part in split_batch(cut, 2)]
    for part, numbers in zip(parts, ((0, 1), (2, 3)), strict=True):
        theirs = pairs(*numbers)
        width = theirs["input_ids"].shape[1]
        for key, value in theirs.items():
            assert torch.equal(part[key][:, :width], value)
            assert not part["attention_mask"][:, width:].any()
        assert part["number"].tolist() == list(numbers)
        layout = part["layout"]
        if prefix_sharing:
            is_token = part["attention_mask"].bool()
            tokens = layout.input_ids_RL.flatten()[layout.index_BT[is_token]]
            assert torch.equal(tokens, part["input_ids"][is_token])
            assert layout.input_ids_RL.shape[1] == batch["layout"].input_ids_RL.shape[1]
        else:
            assert layout is None


def test_a_whole_batch_comes_back_as_it_was() -> None:
    batch = laid_out(0, 1, 2)
    back = by_sequence(by_pair(batch))
    is_token = batch["attention_mask"].bool()
    for ours, theirs in zip(back["layout"][:-1], batch["layout"][:-1], strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = back["layout"].index_BT, batch["layout"].index_BT
    assert torch.equal(ours[is_token], theirs[is_token])
    assert all(torch.equal(back[key], batch[key]) for key in pairs(0))


def test_a_model_that_cannot_share_is_named_and_gives_separate_rows() -> None:
    bloom = find_layers(
        build_model(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2), where="Test")
    )
    rows = PairRows("Test", "auto", packing=True)
    with pytest.warns(UserWarning, match="Test computes the prompt of a pair twice"):
        rows.set_up(bloom, None)
    assert rows.of(pairs(0), 16) is None
    with pytest.raises(ValueError, match=r"Test\(prefix_sharing=True\): this model cannot"):
        PairRows("Test", True, packing=False).set_up(bloom, None)
